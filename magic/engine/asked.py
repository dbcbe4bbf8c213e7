"""What a replay may be asked for beside the derivative of the data weights.

The cotangent that a replay pulls back holds everything that the result depends on. So with the scores come,
at little cost, three derivatives more:

    of the start    the cotangent ∂φ/∂s_0 that the way back ends with;
    of the hypers   ⟨∂φ/∂s_{t+1}, ∂s_{t+1}/∂h⟩ for each hyper-parameter h of each step and group;
    of the data     what a step's gradient hands on to the inputs of its batch, added up over the steps.

Here is what may be asked, of which run; `magic.engine.finders` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.examples import check_indices
from ..training.run import Run

NAMES = ("weights", "start", "hypers", "data")


@dataclass(frozen=True, eq=False)
class Asked:
    """The derivatives that are asked for; those of the data weights are always found.

    start     whether that of s_0 is
    hypers    the names of hyper-parameters
    examples  whose inputs, (m,) indices; None for none
    """

    start: bool = False
    hypers: tuple[str, ...] = ()
    examples: Tensor | None = None

    def __str__(self) -> str:
        """In words, for a folder that must know what it is of; empty for the data weights alone."""
        data = [] if self.examples is None else [f"data {self.examples.tolist()}"]
        parts = ["start"] * self.start + [*self.hypers] + data
        return f", with {', '.join(parts)}" if parts else ""

    def row_bytes(self, run: Run) -> int:
        """Bytes that the results of one target take, beside its scores."""
        size, found = run.dtype.itemsize, 0
        if self.start:
            found += run.initial.nbytes
        found += len(self.hypers) * run.steps * len(run.updates) * size
        if self.examples is not None:
            found += len(self.examples) * sum(x[0].numel() for _, x in inputs_of(run)) * size
        return found


WEIGHTS = Asked()  # nothing but the scores


def read(run: Run, of, examples=None) -> Asked:
    """What `metagradient(of=, examples=)` means.

    Raises TypeError or ValueError for a name that this run has no derivative by, and says why.
    """
    names = (of,) if isinstance(of, str) else tuple(of)
    if run.ranks is not None and "start" in names and run.initial.buffers:
        raise ValueError('of="start": of a run that is shared between ranks the buffers have no derivative')
    known = hypers_known(run)
    hypers: dict[str, None] = {}
    for name in names:
        if name == "hypers":
            hypers |= dict.fromkeys(known)
        elif name not in NAMES:
            _check_hyper(run, name, known)
            hypers[name] = None
    if "hypers" in names and not known:
        _check_hyper(run, "hypers", known)
    if "data" not in names:
        if examples is not None:
            raise ValueError('examples= says of whose inputs the derivative is taken: ask for "data", too')
        return Asked("start" in names, tuple(hypers))
    if not list(inputs_of(run)):
        raise TypeError(_why_no_inputs(run))
    rows = torch.arange(run.n, device="cpu") if examples is None else check_indices(examples, run.n)
    return Asked("start" in names, tuple(hypers), rows)


def inputs_of(run: Run) -> Iterator[tuple[int, Tensor]]:
    """The floating-point tensors of the training data, with their places."""
    if isinstance(run.data, tuple) and run.collate is None:
        yield from ((i, x) for i, x in enumerate(run.data) if x.is_floating_point())


def hypers_known(run: Run) -> dict[str, list[int]]:
    """The hyper-parameters that the run has a derivative by -> the groups that have it.

    Left out is momentum 0, where SGD keeps no buffer that a larger one would begin with.
    """
    found: dict[str, list[int]] = {}
    for group, update in enumerate(run.updates):
        hypers = [hyper[group] for hyper in run.hypers]
        if not update.hypers:
            continue
        names = ["lr", "weight_decay"]
        if "betas" in hypers[0]:
            names += ["beta1", "beta2", "eps"] + ["eps_root"] * all(h.get("eps_root") for h in hypers)
        elif all(h["momentum"] for h in hypers):
            names += ["momentum", "dampening"]
        for name in names:
            found.setdefault(name, []).append(group)
    return found


def _check_hyper(run: Run, name: str, known: dict[str, list[int]]) -> None:
    """Raise ValueError for a hyper-parameter that the run has no derivative by."""
    if name in known:
        return
    rules = ", ".join(dict.fromkeys(update.told for update in run.updates))
    without = [update.told for update in run.updates if not update.hypers]
    has = f"it has {', '.join(map(repr, known))}" if known else "it has none"
    why = ""
    if without:
        why = f". Of SGD, Adam and AdamW magic knows the derivative by a hyper-parameter, not of {without[0]}"
    elif name in ("momentum", "dampening"):
        why = ". Where momentum is 0, SGD keeps no buffer, so that there is no slope"
    elif name == "eps_root":
        why = ". The root has no slope at 0: give the group an eps_root"
    raise ValueError(
        f"of={name!r}: no quantity of a run, and no hyper-parameter that this run ({rules}) has a derivative "
        f"by; {has}, beside {', '.join(map(repr, NAMES))}{why}"
    )


def _why_no_inputs(run: Run) -> str:
    if not isinstance(run.data, tuple) or run.collate is not None:
        return (
            'of="data": the derivative is that of tensors, and this run reads items of a Dataset; pass the '
            "training data as a tuple of tensors"
        )
    kinds = ", ".join(str(x.dtype) for x in run.data)
    return (
        f'of="data": a derivative is that of floating-point numbers, and the training data are {kinds}; '
        "train on embeddings of them, or ask for the weights"
    )
