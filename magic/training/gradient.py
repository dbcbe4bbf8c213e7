"""What a step minimises, and its gradient: Σ wᵢ ℓᵢ / B of a batch, by one backward pass.

Where gradients are accumulated, the batch is divided into parts, and there is a pass for each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.graph import leaves_reached
from ..kernels.replace import differentiable
from ..kernels.stop_gradients import Stops
from . import arguments, determinism
from .state import State


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of which a step's gradient is a function.

    weight  (B,) or (B, L), the data weights of the batch
    batch   what the loss gets of the examples; None stands for the run's own
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weight: Tensor
    batch: tuple | None = None


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a step's backward pass returns, or that of a part of its batch.

    total      the weighted loss, a scalar
    by_name    parameter -> gradient, or None where the step does not use the parameter
    buffers    the buffers after the forward pass
    written    the names of those that it wrote
    same_bits  no operation was replaced by one with other bits
    escaped    ways on which a number that depends on the parameters may have left the graph
    losses     the shape of what the loss returned
    """

    total: Tensor
    by_name: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    written: frozenset[str]
    same_bits: bool
    escaped: tuple[str, ...] = ()
    losses: tuple[int, ...] = ()

    def plus(self, next: Gradient) -> Gradient:
        """This and that of the next part: gradients add up in the order of the parts, as in .grad."""
        by_name = dict(self.by_name)
        for name, grad in next.by_name.items():
            mine = by_name[name]
            by_name[name] = grad if mine is None else mine if grad is None else mine + grad
        return Gradient(
            self.total + next.total,
            by_name,
            next.buffers,
            self.written | next.written,
            self.same_bits and next.same_bits,
            self.escaped + next.escaped,
            next.losses,
        )

    def detached(self) -> Gradient:
        """The same numbers without their graph."""
        by_name = {name: g if g is None else g.detach() for name, g in self.by_name.items()}
        buffers = {name: b.detach() for name, b in self.buffers.items()}
        return replace(self, total=self.total.detach(), by_name=by_name, buffers=buffers)


def gradient(run, inputs: Inputs, t: int, create_graph: bool = False) -> Gradient:
    """`Run.gradient`: the sum over the parts of the batch. Each begins with the buffers that the one before
    it has left."""
    first, *others = parts_here(run)
    whole = gradient_of_part(run, inputs, t, first, create_graph)
    for part in others:
        inputs = replace(inputs, buffers=whole.buffers)
        whole = whole.plus(gradient_of_part(run, inputs, t, part, create_graph))
    return whole if run.ranks is None else run.ranks.whole(whole, inputs.params)


def parts_here(run) -> range:
    """The parts of a batch that this process does: all of them, unless it is one of several ranks."""
    return range(run.accumulate) if run.ranks is None else run.ranks.own(run.accumulate)


def gradient_of_part(run, inputs: Inputs, t: int, part: int, create_graph: bool = False) -> Gradient:
    """What this part of step t's batch adds. With create_graph the gradient's own graph is kept, for the
    adjoint.

    The backward pass runs while the tensors are in the model, since activation checkpointing calls the
    model again there.
    """
    params, buffers = inputs.params, inputs.buffers
    arguments.check_mode(run.device)
    determinism.seed_step(run.seed, run.first + t, part)
    batch = inputs.batch
    if batch is None:
        batch = run.batch(t, part) if run.accumulate > 1 else run.batch(t)
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
        total = weighted_sum(run, losses, inputs.weight, t, part)
        leaves, stops.escapes.open = list(params.values()), False
        grads: Sequence[Tensor | None]
        grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
        if stops.stopped:  # what only a stopped path reaches has no gradient in the plain loop
            used = leaves_reached(total, leaves)
            grads = [g if i in used else None for i, g in enumerate(grads)]
        stops.pulling = True
        return total, grads, not (replace and replace.rewritten) and not stops.stopped, tuple(losses.shape)

    watched = params | run.network.frozen
    before = [p._version for p in watched.values()]
    (total, grads, same_bits, shape), after = run.network.apply(weighted, params, buffers, held)
    arguments.check_unwritten(watched, before, t)
    written = frozenset(name for name, b in after.items() if b is not buffers[name])
    by_name = dict(zip(params, grads, strict=True))
    escaped = stops.escapes.found([total, *after.values()]) if create_graph else ()
    return Gradient(total, by_name, after, written, same_bits, escaped, shape)


def total(run, state: State, weights: Tensor) -> float:
    """`Run.total`: the weighted loss of the step at `state`, with training's bits."""
    t, buffers, whole = state.step, state.buffers, None
    weight = weights[run.batches[t].to(weights.device)]
    with torch.enable_grad():  # some kernels are others where no gradient is taken
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        for part in parts_here(run):
            determinism.seed_step(run.seed, run.first + t, part)
            batch = run.batch(t, part)
            losses, buffers = run.network.apply(
                lambda model, batch=batch: run.loss(model, *batch), leaves, buffers
            )
            one = weighted_sum(run, losses, weight, t, part).detach()
            whole = one if whole is None else whole + one
    assert whole is not None, "a batch has at least one part"
    if run.ranks is not None:
        run.ranks.sum([whole])
    return whole.item()


def weighted_sum(run, losses: Tensor, weight: Tensor, t: int, part: int) -> Tensor:
    """Σ wᵢℓᵢ / B, or, under normalize="weights", Σ wᵢℓᵢ / Σ wᵢ; the sums over the examples of this part.

    B is divided by as in a plain loop that accumulates: by the number of examples in the part, which gives
    the mean, and then by the number of parts.
    """
    rows = run.part(t, part)
    arguments.check_losses(losses, rows.stop - rows.start, run.tokens, t)
    w = weight.to(losses.dtype)
    everything = w.sum() if run.normalize == "weights" else None
    w = w[rows] if run.accumulate > 1 else w
    if losses.dim() > w.dim():  # one weight for each example, before it is known that each token has its own
        w = w[:, None]
    summed = (w * losses).sum()
    if everything is not None:
        return summed / everything
    mean = summed / len(losses)
    return mean / run.accumulate if run.accumulate > 1 else mean
