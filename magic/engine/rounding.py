"""What rounding does to a derivative: how far two ways to it may differ, and what is nothing but rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.graph import graph_nodes
from ..training import optim
from ..training.run import Run
from ..training.state import Cotangent, State
from .adjoint import Rows
from .finite_difference import warn
from .refusals import NotDifferentiable
from .tracing import Traced

NOISE = 100  # rounding errors that a number may have gathered which is a difference of larger ones


def check_batching(alone: tuple[Cotangent, Rows], together: tuple[Cotangent, Rows], traced: Traced) -> None:
    """Raise NotDifferentiable unless the last of several targets pulled back together is what it is alone.

    Both are what the pull returns. PyTorch's batched derivative of an operation may be wrong where its plain
    one is right. A tensor may differ by the root of a rounding error, relative to its largest number. And
    it may differ by the noise of numbers as large as those beside it: the bias of an attention's keys, to
    which the softmax is blind, has a cotangent that is nothing else.
    """
    (cotangent, rows), (all_cotangents, all_rows) = alone, together
    flat, eps = all_cotangents.flatten(), _rounding(traced)
    pairs = {name: (x, flat[name][-1:]) for name, x in cotangent.flatten().items() if name in flat}
    pairs = {name: pair for name, pair in pairs.items() if pair[0].numel()}
    pairs["the scores"] = rows.scores, all_rows.scores[-1:]
    pairs |= {f"data[{i}]": (x, all_rows.data[i][-1:]) for i, x in rows.data.items()}
    sizes = {name: max(x.abs().max().item() for x in pair) for name, pair in pairs.items()}
    beside: dict[str, float] = {}  # the largest of a kind: params, buffers, a slot of the optimizer
    for name, size in sizes.items():
        beside[_kind(name)] = max(size, beside.get(_kind(name), 0.0))
    for name, (one, last) in pairs.items():
        limit = eps**0.5 * sizes[name] + NOISE * eps * beside[_kind(name)]
        if not (one - last).abs().max().item() <= limit:
            raise NotDifferentiable(
                f"step {traced.state.step}: pulled back together with others, a target gets other values of "
                f"{name} than alone. An operation of the model or the loss has a wrong batched derivative in "
                "PyTorch: measure one output at a time, or write the operation out"
            )


def warn_of_noise(run: Run, traced: Traced, cotangent: Cotangent) -> None:
    """Warn of a parameter whose gradient is nothing but rounding, where the optimizer makes it matter.

    The bias in front of a normalisation is one. Adam divides the noise by itself, so the parameter wanders;
    where the measure sees it, as through running statistics, so do the outputs and their derivative. The
    bias of an attention's keys wanders as well, but nothing sees it: its cotangent is noise, too.
    """
    of = {name: run.updates[group] for name, group in run.group_of.items()}

    def sizes(tensors: dict[str, Tensor]) -> dict[str, float]:
        norms = {name: x.detach().norm().item() for name, x in tensors.items()}
        largest = max(norms.values(), default=0.0)
        return {name: norm / largest for name, norm in norms.items() if norm}

    least = 10 * torch.finfo(run.dtype).eps
    seen = sizes(cotangent.params)
    found = sizes(traced.grads).items()
    noisy = [name for name, size in found if size < least < seen.get(name, 0.0) and of[name].divides]
    if noisy:
        warn(
            f"step {traced.state.step}: the gradient of {noisy[0]!r} is rounding noise, as that of a bias in "
            f"front of a normalisation is, and {of[noisy[0]].told} divides it by itself: what it does to "
            "the outputs is chance. Leave the bias out (bias=False), or do not train it"
        )


def underflowing(grad: Tensor, squares: Tensor) -> int:
    """Entries of a gradient that are not 0 while its squares, averaged, are: they underflowed.

    There the update depends on the gradient through its numerator alone, and what is taken for the derivative
    by the squares, 0, is not the one of exact arithmetic. In float32 it begins near 1e-22, and matters for an
    ε below 1e-16.
    """
    return int(((grad != 0) & (squares == 0)).sum())


def warn_of_underflow(run: Run, state: State, grads: Mapping[str, Tensor]) -> None:
    """Warn of the parameters in which squares of gradients underflow in this step, naming the worst.

    With eps_root, or beside an ε that is far larger than the root of what underflows, as the usual 1e-8 is,
    nothing is lost.
    """
    counts, hypers = {}, run.hypers[state.step]
    for name, grad in grads.items():
        update, hyper = run.updates[run.group_of[name]], hypers[run.group_of[name]]
        known = torch.finfo(grad.dtype)
        hidden = (known.smallest_normal * known.eps) ** 0.5  # the root of the smallest number
        if update.squares and not hyper.get("eps_root") and hyper["eps"] < hidden / known.eps:
            grad = grad.detach()
            slots = update.rule(state.params[name], grad, state.slots[name], hyper)[1]
            counts[name] = underflowing(grad, slots[update.squares])
    worst = max(counts, key=counts.__getitem__, default=None)
    if worst is not None and counts[worst]:
        update = run.updates[run.group_of[worst]]
        root = "an eps_root or " if update.rule is optim.adam else ""
        warn(
            f"step {state.step}: the squares of {sum(counts.values()):,} gradient entries underflow to 0 in "
            f"{update.told}, {counts[worst]:,} of them in {worst!r}; scores through them are wrong. Scale "
            f"the loss up, give the group {root}a larger eps, or use float64"
        )


def _kind(name: str) -> str:
    """ "slots/layers.0.weight/exp_avg" is a "slots exp_avg"."""
    first, *rest = name.split("/")
    return f"{first} {rest[-1]}" if first == "slots" else first


def _rounding(traced: Traced) -> float:
    """The rounding error of the least precise arithmetic in the step: a model may cast to float32 inside."""
    grads = traced.last.outputs
    casts = any(node.name().startswith("ToCopyBackward") for node in graph_nodes(grads))
    return torch.finfo(torch.float32 if casts else grads[0].dtype).eps
