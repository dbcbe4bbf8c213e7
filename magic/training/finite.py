"""What stops a run: a number that is not finite, or a frozen parameter that has changed.

The messages say at which step, in which tensor, and what to do about it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import State


class NonFinite(ArithmeticError):
    """A number of the run became NaN or infinite; the message says at which step and where."""


def not_finite(state: State, initial: State) -> list[str]:
    """The names of the tensors of a state that hold NaN or infinity.

    A buffer may keep one that it began with, as an attention mask keeps its −∞.
    """
    found = []
    for name, x in state.flatten().items():
        fine = x.isfinite()
        if not fine.all() and name.startswith("buffers/"):
            before = initial.buffers[name.removeprefix("buffers/")]
            fine = fine | (x == before) | (x.isnan() & before.isnan())
        if not fine.all():
            found.append(name)
    return found


def checked(final: State, run) -> State:
    """The last state of a run; raises if a tensor in it is not finite, or a frozen parameter has changed."""
    if where := not_finite(final, run.initial):
        t = final.step
        raise NonFinite(f"step {t}: {where[0]!r} is not finite; lower the learning rate or warm it up")
    if name := run.network.changed():
        raise ValueError(
            f"the loss wrote into {name!r}, a frozen parameter, in place, and the run is not what it "
            "was: keep in a registered buffer what moves, or write into a copy, and make a new Run"
        )
    return final


def why(run, state: State, weight: Tensor, total: Tensor) -> NonFinite:
    """The error for a step whose loss, `total`, is not finite."""
    where = not_finite(state, run.initial)
    if run.normalize == "weights" and weight.sum() == 0:
        cause = 'every example of its batch has weight 0; use normalize="batch" or larger batches'
    elif where:
        cause = f"{where[0]!r} is not finite; lower the learning rate or warm it up"
    else:
        largest = max(x.abs().max().item() for x in state.params.values() if x.numel())
        with torch.no_grad():
            batch = run.batch(state.step)
            losses, _ = run.network.apply(lambda model: run.loss(model, *batch), state.params, state.buffers)
        examples = run.batches[state.step][(~losses.isfinite()).cpu()].tolist()
        cause = (
            f"a per-example loss is NaN or infinite (examples {examples[:5]}) while every parameter is "
            f"finite (the largest is {largest:.3g}): look at these examples and at loss, or lower the "
            "learning rate"
        )
    return NonFinite(f"step {state.step}: the loss is {total.item()}: {cause}")
