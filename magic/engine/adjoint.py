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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.replace import differentiable
from ..kernels.stop_gradients import Stops
from ..training.gradient import parts_here
from ..training.run import Run
from ..training.state import Cotangent, State
from ..training.update import Hypers, Pull
from .refusals import NotDifferentiable, refusing
from .tracing import Part, Traced, leaves_of, trace, trace_part
from .vjp import CHUNK, pull


@dataclass(frozen=True, eq=False)
class Rows:
    """What a step adds to the derivatives by its examples, a row for each of them in the batch's order, and
    by its hyper-parameters.

    scores  (K, B), or (K, B, L): ∂φ/∂w through this step
    data    place in run.data -> (K, B, ...): ∂φ/∂(the inputs); empty unless the trace has them as leaves
    hypers  name -> (K, groups), of those that are asked for
    """

    scores: Tensor
    data: dict[int, Tensor]
    hypers: Hypers

    @classmethod
    def zeros(cls, targets: int, part: Part, hypers: dict[str, int]) -> Rows:
        """For all examples of a batch of which this is the trace of a part; hypers, name -> groups."""
        weight = part.weight
        data = {i: x.new_zeros(targets, len(weight), *x.shape[1:]) for i, x in part.data.items()}
        by_name = {name: weight.new_zeros(targets, groups) for name, groups in hypers.items()}
        return cls(weight.new_zeros(targets, *weight.shape), data, by_name)

    def of(self, part: slice) -> Rows:
        """The same, with the data of a part of the batch; scores are always those of the whole."""
        return replace(self, data={i: x[:, part] for i, x in self.data.items()})


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
    before, rows = traced_vjp(run, traced, cotangent.map(torch.clone), chunk)
    return before, rows.scores


def traced_vjp(
    run: Run, traced: Traced, cotangent: Cotangent, chunk: int = CHUNK, hypers: Sequence[str] = ()
) -> tuple[Cotangent, Rows]:
    """`step_vjp` of a step that has been traced, with all that it adds by its examples, and by the
    hyper-parameters of these names. The given cotangent's tensors are used up.

    Invariant: rows of the cotangent that have not been pulled yet are ∂φ/∂s_{t+1}, and rows that have been
    are ∂φ/∂s_t; no row is read again after it was pulled. So the work can be done in place, and K targets
    need no second copy of what is as large as K states. In a row, the update's pull first turns the
    cotangents of (param, slots) after the step into those of before, as far as they go around the gradient;
    then what flows through the gradient is added.

    Where the batch was done in parts, the gradient is a sum, so that its cotangent is that of each part. Only
    the buffers went from part to part: their cotangents are pulled through the parts, the last one first.
    """
    state, count, parts = traced.state, cotangent.targets, parts_here(run)
    found = Rows.zeros(count, traced.last, dict.fromkeys(hypers, len(run.updates)))
    through_the_update = _first_pull(run, traced, cotangent, found.hypers)
    whole = len(parts) == 1 and run.ranks is None
    everything = {} if whole else through_the_update(slice(0, count))
    to_params = cotangent.params if run.ranks is None else cotangent.map(torch.zeros_like).params
    weight, to_buffers = traced.last.weight, cotangent.buffers
    for part, begins in reversed(list(zip(parts, traced.begins, strict=True))):
        here = traced.last
        if part != parts[-1]:
            here = trace_part(run, state, begins, weight, part, bool(found.data))

        grads = [k for k, g in here.gradient.by_name.items() if g is not None]
        outputs = [*here.outputs, *(here.gradient.buffers[name] for name in to_buffers)]

        def to_outputs(rows: slice, grads=grads, after=to_buffers) -> list[Tensor]:
            to_grads = {k: c[rows] for k, c in everything.items()} or through_the_update(rows)
            return [to_grads[k] for k in grads] + [c[rows] for c in after.values()]

        with torch.enable_grad(), refusing(f"step {state.step}"):
            own = found.of(run.part(state.step, part))
            to_buffers = _pull_part(here, outputs, to_outputs, to_params, own, chunk)
    if run.ranks is not None:
        run.ranks.sum([*to_params.values(), found.scores, *found.data.values()])
        for name, c in to_params.items():
            cotangent.params[name].add_(c)
    before = {
        name: {k: c for k, c in cotangent.slots[name].items() if k in slots}
        for name, slots in state.slots.items()
    }
    return Cotangent(cotangent.params, to_buffers, before, state.step), found


def _first_pull(
    run: Run, traced: Traced, cotangent: Cotangent, hypers: Hypers
) -> Callable[[slice], dict[str, Tensor]]:
    """A function that pulls rows of the cotangent through the update, in place, adds to the derivatives by
    hyper-parameters, and returns the cotangents of the gradients."""
    state, hyper = traced.state, run.hypers[traced.state.step]
    unclip = run.clip.adjoint(traced.grads) if run.clip is not None else None
    seen = run.clip.clip(traced.grads, state.params) if run.clip is not None else traced.grads
    # The slots after the update, if the trace knows them. An adjoint that computes them has the same bits.
    after = traced.after.slots if traced.after and traced.gradient.same_bits else {}
    updates: dict[str, tuple[int, Pull]] = {}
    for name, grad in seen.items():
        group, given = run.group_of[name], (state.params[name], grad, state.slots[name])
        updates[name] = group, run.updates[group].adjoint(*given, hyper[group], after.get(name))

    def through_the_update(rows: slice) -> dict[str, Tensor]:
        to_grads = {}
        asked = [{k: x[rows, group] for k, x in hypers.items()} for group in range(len(run.updates))]
        for name, (group, update) in updates.items():
            given = {"param": cotangent.params[name]} | cotangent.slots[name]
            to_grads[name] = update({k: c[rows] for k, c in given.items()}, asked[group])
        if unclip is not None:
            unclip(to_grads)
        return to_grads

    return through_the_update


def _pull_part(
    part: Part,
    outputs: list[Tensor],
    to_outputs: Callable[[slice], list[Tensor]],
    to_params: dict[str, Tensor],
    found: Rows,
    chunk: int,
) -> dict[str, Tensor]:
    """The second pull, through the graph of a part: adds to the cotangents of the parameters and to the rows
    of the examples, and returns the cotangents of the buffers that the part began with."""
    count = len(found.scores)
    to_buffers = {k: b.new_zeros(count, *b.shape) for k, b in part.buffers.items()}
    inputs = [*part.params.values(), *part.buffers.values(), part.weight, *part.data.values()]
    added = [*(to_params[k] for k in part.params), *to_buffers.values(), found.scores, *found.data.values()]
    for rows, products in pull(outputs, inputs, to_outputs, count, chunk):
        for x, product in zip(added, products, strict=True):
            x[rows].add_(product)
    return to_buffers


def measure_vjp(
    run: Run, state: State, measure: Callable, rows: slice | None = None, chunk: int = CHUNK
) -> Cotangent:
    """Δ_T = ∂φ/∂s_T for the K numbers that measure(model) returns, or those in `rows`: (K, ...) tensors."""
    moved = run.moved(state)
    with torch.enable_grad(), refusing("measure"):
        params = leaves_of(state.params)
        buffers = dict(state.buffers) | leaves_of({name: state.buffers[name] for name in moved})
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
