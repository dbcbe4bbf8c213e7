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
class Traced:
    """Step t with the graph of its gradient: all that its pull needs.

    state           s_t
    params, buffers, weight   the leaves of the graph
    grads           name -> gradient, of the parameters that the step uses
    buffers_after   the buffers of s_{t+1}, as functions of the leaves
    after           s_{t+1}, or None where it was not asked for
    escaped         ways on which a number that depends on the parameters may have left the graph
    same_bits       the gradients are training's own to the bit
    """

    state: State
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weight: Tensor
    grads: dict[str, Tensor]
    buffers_after: dict[str, Tensor]
    after: State | None
    escaped: tuple[str, ...] = ()
    same_bits: bool = True


def trace(run: Run, state: State, weights: Tensor, step: bool = True, passed: Passed | None = None) -> Traced:
    """Do step t with its gradient's own graph recorded; with `step`, go on to s_{t+1}.

    Invariant: s_{t+1} has training's bits. The graph is recorded around the very operations that training
    uses, so what they return is what training got. Only where an expression with other bits stood in for an
    operation is the step done once more, as in training. So a trace may take the place of a step, and one
    made on the way down serves for the adjoint too. The total loss is compared with the one that training
    `passed` here.

    A `detach` in the loss is in the graph as a stop, which has two phases. While the gradient is taken,
    inside `run.gradient`, it hands nothing back: the step is that of the plain loop. From then on it is the
    identity: the value that was held fixed in this step moves with the parameters from step to step, and the
    derivative of the step flows through it. A trace is always in the second phase.
    """
    t = state.step
    with torch.enable_grad(), refusing(f"step {t}"):
        params = _leaves(state.params)
        buffers = dict(state.buffers) | _leaves({name: state.buffers[name] for name in run.moved(state)})
        weight = weights[run.batches[t].to(weights.device)].detach().requires_grad_()
        gradient = run.gradient(params, buffers, weight, t, create_graph=True)
    after, same_bits = None, gradient.same_bits
    if step and same_bits:
        after = run.moved_on(state, weight.detach(), gradient, passed)
    elif step:
        after = run.step(state, weights, passed)
    elif passed is not None:
        total = gradient.total.item() if same_bits else run.total(state, weights)
        passed.witness(t, total)
    grads = {name: g for name, g in gradient.by_name.items() if g is not None}
    return Traced(state, params, buffers, weight, grads, gradient.buffers, after, gradient.escaped, same_bits)


def step_vjp(
    run: Run, state: State, cotangent: Cotangent, weights: Tensor, *, chunk: int = CHUNK
) -> tuple[Cotangent, Tensor]:
    """Pull ∂φ/∂s_{t+1} back through step t, taken at `state`: one step by itself, as chapter 04 does it. The
    replay has traced its steps and calls `traced_vjp`.

    cotangent  that of s_{t+1}; each tensor has a leading axis K
    chunk      how many of the K targets are pulled back at once
    returns    ∂φ/∂s_t in the same form, of the buffers only those that depend on the weights by then,
               and what the step adds to ∂φ/∂w: (K, B), for batches[t]
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
    """
    state, t, moved = traced.state, traced.state.step, run.moved(traced.state)
    updates = _adjoints(run, traced)
    inputs = [*traced.params.values(), *(traced.buffers[name] for name in moved), traced.weight]
    outputs = [*traced.grads.values(), *(traced.buffers_after[name] for name in cotangent.buffers)]
    count = len(next(iter(cotangent.params.values())))
    to_buffers = {k: state.buffers[k].new_empty(count, *state.buffers[k].shape) for k in moved}
    scores = traced.weight.new_empty(count, len(traced.weight))
    fresh = [*to_buffers.values(), scores]

    def through_the_update(rows: slice) -> list[Tensor]:
        """The first pull, in place on these rows of the cotangent; returns what reaches the outputs."""
        to_grads = []
        for name, update in updates.items():
            slots = {k: c[rows] for k, c in cotangent.slots[name].items()}
            to_grads.append(update({"param": cotangent.params[name][rows], **slots}))
        return to_grads + [c[rows] for c in cotangent.buffers.values()]

    with torch.enable_grad(), refusing(f"step {t}"):
        for rows, products in pull(outputs, inputs, through_the_update, count, chunk):
            for name, product in zip(traced.params, products, strict=False):
                cotangent.params[name][rows].add_(product)
            for x, product in zip(fresh, products[len(traced.params) :], strict=True):
                x[rows] = product
    before = {
        name: {k: c for k, c in cotangent.slots[name].items() if k in slots}
        for name, slots in state.slots.items()
    }
    return Cotangent(cotangent.params, to_buffers, before, t), scores


def _adjoints(run: Run, traced: Traced) -> dict[str, Pull]:
    """The adjoint of each parameter's update, at the traced gradients. It has the same bits whether the slots
    after the update are known from the trace or are computed again."""
    state, hyper = traced.state, run.hypers[traced.state.step]
    after = traced.after.slots if traced.after and traced.same_bits else {}

    def adjoint(name: str, grad: Tensor) -> Pull:
        group, given = run.group_of[name], (state.params[name], grad.detach(), state.slots[name])
        return run.updates[group].adjoint(*given, hyper[group], after.get(name))

    return {name: adjoint(name, grad) for name, grad in traced.grads.items()}


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
