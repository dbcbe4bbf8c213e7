"""What a step minimises, and its gradient: Σ wᵢ ℓᵢ / B of a batch, by one backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.graph import leaves_reached
from ..kernels.replace import differentiable
from ..kernels.stop_gradients import Stops
from . import arguments, determinism
from .state import State


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a step's backward pass returns.

    total      the weighted loss, a scalar
    by_name    parameter -> gradient, or None where the step does not use the parameter
    buffers    the buffers after the forward pass
    written    the names of those that it wrote
    same_bits  no operation was replaced by one with other bits
    escaped    ways on which a number that depends on the parameters may have left the graph
    """

    total: Tensor
    by_name: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    written: frozenset[str]
    same_bits: bool
    escaped: tuple[str, ...] = ()


def gradient(
    run, params: dict, buffers: dict, weight: Tensor, t: int, create_graph: bool = False
) -> Gradient:
    """`Run.gradient`. With create_graph the gradient's own graph is kept, for the adjoint.

    The backward pass runs while the tensors are in the model, since activation checkpointing calls the
    model again there.
    """
    arguments.check_mode(run.device)
    determinism.seed_step(run.seed, t)
    batch = run.batch(t)
    held = {name: x.clone() for name, x in buffers.items()}
    # While the gradient is taken, a `detach` cuts, as in training. Afterwards, when `stops.pulling` is set,
    # it is the identity: what it held fixed moves with the parameters from step to step. `stops.escapes`
    # notes the ways on which a number may have left the graph unseen.
    stops = Stops(cuts=True, buffers=held.values())

    def weighted(model):
        with contextlib.ExitStack() as modes:
            replace = modes.enter_context(differentiable()) if create_graph else None
            if create_graph:
                modes.enter_context(stops)
            losses = run.loss(model, *batch)
        arguments.check_leaves(params, t)
        total = _total(run, losses, weight, t)
        leaves, stops.escapes.open = list(params.values()), False
        grads: Sequence[Tensor | None]
        grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
        if stops.stopped:  # what only a stopped path reaches has no gradient in the plain loop
            used = leaves_reached(total, leaves)
            grads = [g if i in used else None for i, g in enumerate(grads)]
        stops.pulling = True
        return total, grads, not (replace and replace.rewritten) and not stops.stopped

    watched = params | run.network.frozen
    before = [p._version for p in watched.values()]
    (total, grads, same_bits), after = run.network.apply(weighted, params, buffers, held)
    arguments.check_unwritten(watched, before, t)
    written = frozenset(name for name, b in after.items() if b is not buffers[name])
    by_name = dict(zip(params, grads, strict=True))
    escaped = stops.escapes.found([total, *after.values()]) if create_graph else ()
    return Gradient(total, by_name, after, written, same_bits, escaped)


def total(run, state: State, weights: Tensor) -> float:
    """`Run.total`: the weighted loss of the step at `state`, with training's bits."""
    t = state.step
    determinism.seed_step(run.seed, t)
    batch, weight = run.batch(t), weights[run.batches[t].to(weights.device)]
    with torch.enable_grad():  # some kernels are others where no gradient is taken
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        losses, _ = run.network.apply(lambda model: run.loss(model, *batch), leaves, state.buffers)
        return _total(run, losses, weight, t).item()


def _total(run, losses: Tensor, weight: Tensor, t: int) -> Tensor:
    """Σ wᵢℓᵢ / B, or, under normalize="weights", Σ wᵢℓᵢ / Σ wᵢ."""
    arguments.check_losses(losses, len(weight), t)
    w = weight.to(losses.dtype)
    return (w * losses).sum() / (len(w) if run.normalize == "batch" else w.sum())
