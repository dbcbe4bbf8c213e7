"""Other runs made from one: with other data, hyper-parameters or another start, or only its last steps.

A run is a function of its data weights. These make visible what else it is a function of, so that what
`magic.metagradient` finds can be used, and checked by training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from . import determinism
from .hypers import Frozen
from .run import Run
from .state import State

BETAS = ("beta1", "beta2")  # Adam has the two in one pair, "betas"


def hyper(run: Run, name: str) -> Tensor:
    """(T, groups), float64: a hyper-parameter of each step and parameter group, "lr" for example.

    "beta1" and "beta2" are the two of Adam's "betas". It is NaN in a group that has none of that name.

    Raises ValueError for a name that no group has.
    """
    found = [[_value(group, name) for group in groups] for groups in run.hypers]
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    if values.isnan().all():
        known = dict.fromkeys(k for group in run.hypers[0] for k in group)
        raise ValueError(f"{name!r}: no group of the run has such a number; they have {', '.join(known)}")
    return values


def changed(
    run: Run,
    *,
    start: State | Mapping[str, Tensor] | None = None,
    hypers: Mapping[str, Tensor | float] | None = None,
    data: tuple | None = None,
) -> Run:
    """The same run with something else in the place of what is given.

    start   a state, or name -> value of some of the parameters and buffers of s_0
    hypers  name -> a number, or a tensor (T,) or (T, groups), of the hyper-parameters to change
    data    a tuple like the run's, with tensors of the same shapes and types; None in it keeps a tensor

    Raises ValueError for a shape, a name or a value that the run cannot have, such as a negative rate.
    """
    other = copy.copy(run)
    if start is not None:
        other.initial = _started(run, start)
    if hypers is not None:
        other.hypers = _hypers(run, hypers)
    if data is not None:
        other.data = _data(run, data)
    return other


def tail(run: Run, last: int, weights: Tensor | None = None) -> Run:
    """The last steps of a run as a run of its own, which starts in the state that training has reached there.

    Data weights enter with its first step: of what was learned before, everything stays. `weights` are
    those of the steps before, None for 1. Randomness is that of the whole run, step by step. Engstrom et al.
    2025 (arXiv 2503.13751) take the derivative for choosing data in this way.

    Raises ValueError unless 1 <= last <= T.
    """
    if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= run.steps:
        raise ValueError(f"last={last!r}: how many steps at the end, from 1 to the run's {run.steps}")
    other, skipped = copy.copy(run), run.steps - last
    if not skipped:
        return other
    given = run.weights(weights)
    with determinism.alone():
        state = run.advance(run.initial, skipped, given, run.passed(given), lambda _: None)
    other.initial = replace(state, step=0, moved=frozenset())
    other.batches, other.hypers = run.batches[skipped:], run.hypers[skipped:]
    other.first = run.first + skipped
    return other


def _started(run: Run, start: State | Mapping[str, Tensor]) -> State:
    here = run.initial
    if isinstance(start, State):
        given = start.params | start.buffers
        missing = (here.params | here.buffers).keys() - given.keys()
        if missing:
            raise ValueError(f"start: the state is of another run; it has no {sorted(missing)[0]!r}")
    else:
        given = dict(start)
    params, buffers = dict(here.params), dict(here.buffers)
    for name, x in given.items():
        into = params if name in params else buffers
        if name not in into:
            raise ValueError(f"start: {name!r} is no parameter that is trained, and no buffer")
        into[name] = _alike(f"start: {name!r}", x, into[name])
    return replace(here, params=params, buffers=buffers)


def _data(run: Run, data: tuple) -> tuple:
    if not isinstance(run.data, tuple) or not isinstance(data, tuple) or len(data) != len(run.data):
        raise ValueError("data: a tuple of as many tensors as the run's data; a Dataset needs a new Run")
    return tuple(
        x if new is None else _alike(f"data[{i}]", new, x)
        for i, (new, x) in enumerate(zip(data, run.data, strict=True))
    )


def _alike(what: str, new: Tensor, old: Tensor) -> Tensor:
    """A copy of the new tensor in the place of the old one. Raises ValueError for another shape or type."""
    new = torch.as_tensor(new)
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"{what} is {tuple(new.shape)} of {new.dtype}; it must be {tuple(old.shape)} of {old.dtype}"
        )
    if new.is_floating_point() and old.isfinite().all() and not new.isfinite().all():
        raise ValueError(f"{what} is not finite")
    return torch.empty_like(old).copy_(new.detach())


def _hypers(run: Run, given: Mapping[str, Tensor | float]) -> tuple:
    steps, groups = run.steps, len(run.updates)
    found = [[dict(group) for group in at] for at in run.hypers]
    for name, value in given.items():
        before = hyper(run, name)
        new = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        given_shape = tuple(new.shape)
        new = new[:, None] if new.dim() == 1 else new
        if new.shape not in ((), (steps, 1), (steps, groups)):
            raise ValueError(
                f"{name!r} has shape {given_shape}; give a number, ({steps},), or ({steps}, {groups}): "
                "one for each step and parameter group"
            )
        new = new.expand(steps, groups)
        for t in range(steps):
            for group in range(groups):
                if not before[t, group].isnan():
                    _put(found[t][group], name, _checked(name, new[t, group].item(), t))
    return tuple(tuple(Frozen(group) for group in at) for at in found)


def _value(group: Mapping, name: str) -> float:
    if name in BETAS:
        return group["betas"][BETAS.index(name)] if "betas" in group else math.nan
    value = group.get(name, math.nan)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _put(group: dict, name: str, value: float) -> None:
    if name in BETAS:
        betas = list(group["betas"])
        betas[BETAS.index(name)] = value
        group["betas"] = tuple(betas)
    else:
        group[name] = value


def _checked(name: str, value: float, t: int) -> float:
    """The value, if an optimizer can have it."""
    below = 1.0 if name in BETAS else math.inf
    if not 0 <= value < below:
        allowed = "from 0 to 1, without 1" if name in BETAS else "0 or more, and finite"
        raise ValueError(
            f"{name!r} is {value:g} at step {t}; it must be {allowed}. A step of descent "
            "that leaves this range is brought back by clamp(min=0)"
        )
    return value
