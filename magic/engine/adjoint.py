"""The adjoint of one training step: pull K cotangents back through it.

REPLAY (Engstrom et al. 2025, arXiv 2503.13751), section 3. One step is s' = U(s, g), with U the
optimizer's update and g = ∇ Σ wᵢℓᵢ / B. A cotangent Δ' = ∂φ/∂s' is pulled back in two pulls:

1. through U, one parameter at a time (`training.update`): Δ' -> what reaches s directly, and ḡ = ∂φ/∂g;
2. through g, itself a derivative:    (∂g/∂params)ᵀ ḡ, a Hessian-vector product, and
                                      (∂g/∂wᵢ)ᵀ ḡ = ḡ · ∇ℓᵢ / B, one directional derivative per example.

The second is autograd over the very function that training calls, reverse over reverse: the step is
traced once (`trace`), and the pull through the trace is batched over targets by `torch.vmap`
(`magic.engine.vjp`). Where PyTorch has no second derivative of an operation, or a slow one, another takes
its place (`magic.kernels.replace`).

The order of the two is that of the chain rule: the step computes g first and U last, so its adjoint goes
through U first. The pull through U must be whole before that through g begins, for ḡ, which it finds, is
the cotangent of g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.replace import differentiable
from ..kernels.stop_gradients import Stops
from ..training.gradient import Gradient, Inputs, gradient_of_part
from ..training.record import Passed
from ..training.run import Run
from ..training.state import Cotangent, State
from ..training.update import Pull
from .refusals import NotDifferentiable, refusing
from .vjp import CHUNK, pull


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as new leaves of a graph, to differentiate with respect to."""
    return {k: x.detach().requires_grad_() for k, x in tensors.items()}


@dataclass(frozen=True, eq=False)
class Part:
    """The graph of the gradient of a step's batch, or of a part of it (`Run(accumulate=)`).

    params, buffers, weight   the leaves of the graph
    gradient   what they give, as functions of the leaves
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weight: Tensor
    gradient: Gradient

    @property
    def outputs(self) -> list[Tensor]:
        """The gradients of the parameters that this part uses."""
        return [g for g in self.gradient.by_name.values() if g is not None]


@dataclass(frozen=True, eq=False)
class Traced:
    """Step t with the graph of its gradient: all that its pull needs.

    state      s_t
    gradient   the sum over the parts, without a graph
    after      s_{t+1}, or None where it was not asked for
    last       the last part, from which the pull begins
    begins     the buffers that each part begins with, and the names of those that carry a derivative
    """

    state: State
    gradient: Gradient
    after: State | None
    last: Part
    begins: tuple[tuple[dict[str, Tensor], list[str]], ...]

    @property
    def grads(self) -> dict[str, Tensor]:
        """name -> gradient, of the parameters that the step uses."""
        return {name: g for name, g in self.gradient.by_name.items() if g is not None}

    @property
    def escaped(self) -> tuple[str, ...]:
        """Ways on which a number that depends on the parameters may have left the graph."""
        return self.gradient.escaped


def trace(run: Run, state: State, weights: Tensor, step: bool = True, passed: Passed | None = None) -> Traced:
    """Do step t with its gradient's own graph recorded; with `step`, go on to s_{t+1}.

    Invariant: s_{t+1} has training's bits. The graph is recorded around the very operations that training
    uses, so what they return is what training got. Only where an expression with other bits stood in for an
    operation is the step done once more, as in training. So a trace may take the place of a step, and one
    made on the way down serves for the adjoint too. The total loss is compared with the one that training
    `passed` here.

    A batch that is done in parts is traced part by part, and of these graphs only the last is kept, so that
    no more memory is needed than for one. The pull traces the others again.

    A `detach` in the loss is in the graph as a stop, which has two phases. While the gradient is taken,
    inside `run.gradient`, it hands nothing back: the step is that of the plain loop. From then on it is the
    identity: the value that was held fixed in this step moves with the parameters from step to step, and the
    derivative of the step flows through it. A trace is always in the second phase.
    """
    t, begins = state.step, [(state.buffers, run.moved(state))]
    whole: Gradient | None = None
    weight = weights[run.batches[t].to(weights.device)].detach()
    for part in range(run.accumulate):
        last = trace_part(run, state, *begins[part], weight, part)
        one = last.gradient.detached()
        whole = one if whole is None else whole.plus(one)
        moved = state.moved | whole.written
        begins.append(
            (whole.buffers, [k for k, b in whole.buffers.items() if k in moved and b.is_floating_point()])
        )
        if part + 1 < run.accumulate:
            del last  # its graph must be gone before the next is made
    assert whole is not None, "a batch has at least one part"
    after = None
    if step and whole.same_bits:
        after = run.moved_on(state, weight, whole, passed)
    elif step:
        after = run.step(state, weights, passed)
    elif passed is not None:
        total = whole.total.item() if whole.same_bits else run.total(state, weights)
        passed.witness(t, total)
    return Traced(state, whole, after, last, tuple(begins[:-1]))


def trace_part(
    run: Run, state: State, buffers: dict[str, Tensor], moved: list[str], weight: Tensor, part: int
) -> Part:
    """The graph of the gradient of a part of the batch; it begins with these buffers, of which those named in
    `moved` carry a derivative."""
    t = state.step
    with torch.enable_grad(), refusing(f"step {t}"):
        params = _leaves(state.params)
        held = buffers | _leaves({name: buffers[name] for name in moved})
        weight = weight.detach().requires_grad_()
        found = gradient_of_part(run, Inputs(params, held, weight), t, part, create_graph=True)
    return Part(params, {name: held[name] for name in moved}, weight, found)


def step_vjp(
    run: Run, state: State, cotangent: Cotangent, weights: Tensor, *, chunk: int = CHUNK
) -> tuple[Cotangent, Tensor]:
    """Pull ∂φ/∂s_{t+1} back through step t, taken at `state`: one step by itself, as chapter 04 does it. The
    replay has traced its steps and calls `traced_vjp`.

    cotangent  that of s_{t+1}; each tensor has a leading axis K
    chunk      how many of the K targets are pulled back at once
    returns    ∂φ/∂s_t in the same form, of the buffers only those that depend on the weights by then,
               and what the step adds to ∂φ/∂w: (K, B), for batches[t], or (K, B, L)
    """
    traced = trace(run, state, weights, step=False)
    return traced_vjp(run, traced, cotangent.map(torch.clone), chunk)


def traced_vjp(
    run: Run, traced: Traced, cotangent: Cotangent, chunk: int = CHUNK
) -> tuple[Cotangent, Tensor]:
    """`step_vjp` of a step that has been traced. The given cotangent's tensors are used up.

    Invariant: rows of the cotangent that have not been pulled yet are ∂φ/∂s_{t+1}, and rows that have been
    are ∂φ/∂s_t; no row is read again after it was pulled. So the work can be done in place, and K targets
    need no second copy of what is as large as K states. In a row, the update's pull first turns the
    cotangents of (param, slots) after the step into those of before, as far as they go around the gradient;
    then what flows through the gradient is added.

    Where the batch was done in parts, the gradient is a sum, so that its cotangent is that of each part. Only
    the buffers went from part to part: their cotangents are pulled through the parts, the last one first.
    """
    state, count = traced.state, cotangent.targets
    updates = _adjoints(run, traced)
    unclip = run.clip.adjoint(traced.grads) if run.clip is not None else None

    def through_the_update(rows: slice) -> dict[str, Tensor]:
        """The first pull, in place on these rows of the cotangent; returns the gradients' cotangents."""
        to_grads = {}
        for name, update in updates.items():
            slots = {k: c[rows] for k, c in cotangent.slots[name].items()}
            to_grads[name] = update({"param": cotangent.params[name][rows], **slots})
        if unclip is not None:
            unclip(to_grads)
        return to_grads

    parts = len(traced.begins)
    everything = through_the_update(slice(0, count)) if parts > 1 else {}
    to_buffers, scores = cotangent.buffers, traced.last.weight.new_zeros(count, *traced.last.weight.shape)
    for part in reversed(range(parts)):
        here = traced.last
        if part + 1 < parts:
            here = trace_part(run, state, *traced.begins[part], traced.last.weight, part)

        grads = [k for k, g in here.gradient.by_name.items() if g is not None]
        outputs = [*here.outputs, *(here.gradient.buffers[name] for name in to_buffers)]

        def to_outputs(rows: slice, grads=grads, after=to_buffers) -> list[Tensor]:
            to_grads = {k: c[rows] for k, c in everything.items()} or through_the_update(rows)
            return [to_grads[k] for k in grads] + [c[rows] for c in after.values()]

        with torch.enable_grad(), refusing(f"step {state.step}"):
            to_buffers = _pull_part(here, outputs, to_outputs, cotangent, scores, chunk)
    before = {
        name: {k: c for k, c in cotangent.slots[name].items() if k in slots}
        for name, slots in state.slots.items()
    }
    return Cotangent(cotangent.params, to_buffers, before, state.step), scores


def _pull_part(
    part: Part,
    outputs: list[Tensor],
    to_outputs: Callable[[slice], list[Tensor]],
    cotangent: Cotangent,
    scores: Tensor,
    chunk: int,
) -> dict[str, Tensor]:
    """The second pull, through the graph of a part: adds to the cotangents of the parameters and to the
    scores, and returns those of the buffers that the part began with."""
    count = cotangent.targets
    to_buffers = {k: b.new_empty(count, *b.shape) for k, b in part.buffers.items()}
    inputs = [*part.params.values(), *part.buffers.values(), part.weight]
    added = [*(cotangent.params[name] for name in part.params)]
    for rows, products in pull(outputs, inputs, to_outputs, count, chunk):
        for x, product in zip(added, products, strict=False):
            x[rows].add_(product)
        for x, product in zip(to_buffers.values(), products[len(added) : -1], strict=True):
            x[rows] = product
        scores[rows].add_(products[-1])
    return to_buffers


def _adjoints(run: Run, traced: Traced) -> dict[str, Pull]:
    """The adjoint of each parameter's update, at the gradients that it saw. It has the same bits whether the
    slots after the update are known from the trace or are computed again."""
    state, hyper = traced.state, run.hypers[traced.state.step]
    after = traced.after.slots if traced.after and traced.gradient.same_bits else {}
    seen = run.clip.clip(traced.grads, state.params) if run.clip is not None else traced.grads

    def adjoint(name: str, grad: Tensor) -> Pull:
        group, given = run.group_of[name], (state.params[name], grad, state.slots[name])
        return run.updates[group].adjoint(*given, hyper[group], after.get(name))

    return {name: adjoint(name, grad) for name, grad in seen.items()}


def measure_vjp(
    run: Run, state: State, measure: Callable, rows: slice | None = None, chunk: int = CHUNK
) -> Cotangent:
    """Δ_T = ∂φ/∂s_T for the K numbers that measure(model) returns, or those in `rows`: (K, ...) tensors."""
    moved = run.moved(state)
    with torch.enable_grad(), refusing("measure"):
        params = _leaves(state.params)
        buffers = dict(state.buffers) | _leaves({name: state.buffers[name] for name in moved})
        with differentiable(), Stops(cuts=False):
            outputs = run.measured(measure, params, buffers)
        if not outputs.requires_grad:
            raise NotDifferentiable(
                "measure does not depend on the model by any differentiable path; look for argmax, "
                "rounding or .item() in it, for .backward() (use torch.autograd.grad with "
                "create_graph=True), or a model from outside. A loss or a margin has a derivative, an "
                "accuracy has none"
            )
        inputs = [*params.values(), *(buffers[name] for name in moved)]
        one_each = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)[rows or slice(None)]
        pulled = [x.new_empty(len(one_each), *x.shape) for x in inputs]
        count = len(one_each)
        for some, products in pull([outputs], inputs, lambda some: [one_each[some]], count, chunk):
            for x, product in zip(pulled, products, strict=True):
                x[some] = product
    to_params = dict(zip(params, pulled[: len(params)], strict=True))
    to_buffers = dict(zip(moved, pulled[len(params) :], strict=True))
    to_slots = {
        name: {k: x.new_zeros(len(one_each), *x.shape) for k, x in slots.items() if x.is_floating_point()}
        for name, slots in state.slots.items()
    }
    return Cotangent(to_params, to_buffers, to_slots, state.step)
