"""The adjoint of one training step: pull K cotangents back through it.

REPLAY (Engstrom et al. 2025, arXiv 2503.13751), section 3. One step is s' = U(s, g), with U the
optimizer's update and g = ∇ Σ wᵢℓᵢ / B. A cotangent Δ' = ∂φ/∂s' is pulled back in two pulls:

1. through U, which is elementwise:   Δ' -> what reaches s directly, and ḡ = ∂φ/∂g;
2. through g, itself a derivative:    (∂g/∂params)ᵀ ḡ, a Hessian-vector product, and
                                      (∂g/∂wᵢ)ᵀ ḡ = ḡ · ∇ℓᵢ / B, one directional derivative per example.

Both are autograd over the very functions that training calls (reverse over reverse). The first
backward pass is traced once; the pull through it is batched over the K targets by `torch.vmap`.

Where PyTorch has no second derivative of an operation, an equivalent expression takes its place
(`magic.equivalents`). That is allowed here, where a state is only linearised around; never in training.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .equivalents import differentiable
from .inputs import graph_nodes
from .optim import safe_sqrt
from .run import Run
from .state import State


class NotDifferentiable(RuntimeError):
    """A part of the run or of the measure has no derivative PyTorch can give; the message names it."""


CHUNK = 64  # targets pulled back at once; more would hold more copies of a batch's activations


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fresh leaves to differentiate with respect to."""
    return {k: x.detach().requires_grad_() for k, x in tensors.items()}


def pull(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """The vector-Jacobian products of K cotangents, (K, *output) -> (K, *input), in one batched call."""
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    outputs, cotangents = [y for y, _ in pairs], [c for _, c in pairs]

    def vjp(*rows):
        return torch.autograd.grad(
            outputs, inputs, rows, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    if len(cotangents[0]) == 1:
        return tuple(x.unsqueeze(0) for x in vjp(*(c[0] for c in cotangents)))
    try:
        return torch.vmap(vjp, chunk_size=CHUNK)(*cotangents)
    except RuntimeError as error:
        if "vmap" not in str(error) and "batch" not in str(error):
            raise
        warnings.warn(
            f"the {len(cotangents[0])} targets are pulled back one by one, which is slower: {error}",
            stacklevel=2,
        )
        rows = [vjp(*(c[k] for c in cotangents)) for k in range(len(cotangents[0]))]
        return tuple(torch.stack(x) for x in zip(*rows, strict=True))


@contextlib.contextmanager
def refusing(where: str):
    """Turn autograd's refusals into NotDifferentiable, with the operation that PyTorch names.

    A Function marked once_differentiable is not among them: autograd cuts its graph without a word,
    and `magic.witness` finds it.
    """
    try:
        yield
    except NotDifferentiable:
        raise
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiable" not in str(error):
            raise
        raise NotDifferentiable(
            f"{where}: {str(error).rstrip('.')}. The derivative of a training step is a second derivative of "
            "the model; use an operation that has one"
        ) from error


def own_functions(tensors: list[Tensor]) -> str:
    """The names of the user's autograd Functions in the graphs of these tensors, comma-separated."""
    own = torch.autograd.function.BackwardCFunction
    return ", ".join({node.name(): True for node in graph_nodes(tensors) if isinstance(node, own)})


def step_vjp(run: Run, state: State, cotangent: State, weights: Tensor) -> tuple[State, Tensor]:
    """Pull ∂φ/∂s_{t+1} back through step t, taken at `state`.

    cotangent  a State whose tensors have a leading axis K
    returns    ∂φ/∂s_t in the same form, of the buffers only those that depend on the weights by then,
               and what the step adds to ∂φ/∂w: (K, B), for batches[t]
    """
    t, moved = state.step, run.moved(state)
    with torch.enable_grad(), refusing(f"step {t}"):
        params = _leaves(state.params)
        buffers = dict(state.buffers) | _leaves({name: state.buffers[name] for name in moved})
        weight = weights[run.batches[t].to(weights.device)].detach().requires_grad_()
        with differentiable():
            _, grads, after = run.gradient(params, buffers, weight, t, create_graph=True)
        grads = {name: g for name, g in grads.items() if g is not None}

        direct, grad_cotangent = _pull_update(run, state, grads, cotangent)

        outputs = list(grads.values()) + [after[name] for name in cotangent.buffers]
        cotangents = [grad_cotangent[name] for name in grads] + list(cotangent.buffers.values())
        inputs = [*params.values(), *(buffers[name] for name in moved), weight]
        *pulled, scores = pull(outputs, inputs, cotangents)
    to_params = {name: direct.params[name] + x for name, x in zip(params, pulled[: len(params)], strict=True)}
    to_buffers = dict(zip(moved, pulled[len(params) :], strict=True))
    return State(to_params, to_buffers, direct.slots, t), scores


def _pull_update(run: Run, state: State, grads: dict, cotangent: State) -> tuple[State, dict]:
    """The first pull, through the optimizer's update U: to the state directly, and to the gradient.

    U is elementwise: ∂output/∂input is a diagonal, one vector for each pair, and the same for all K
    targets. Parameters with equal hyper-parameters and equal memory are laid end to end for it.
    """
    to_params, to_slots, to_grads = dict(cotangent.params), dict(cotangent.slots), {}
    for names in _alike(run, state, grads):
        diagonals = _diagonals(run, state, {name: grads[name].detach() for name in names})
        sizes = [state.params[name].numel() for name in names]
        pieces = {pair: x.split(sizes) for pair, x in diagonals.items()}
        for i, name in enumerate(names):
            coming = {"param": cotangent.params[name]} | cotangent.slots[name]
            shape = state.params[name].shape
            pulled = {kind: torch.zeros_like(coming["param"]) for kind in ("param", "grad")}
            pulled |= {k: torch.zeros_like(coming["param"]) for k in _moving(state.slots[name])}
            for (output, kind), piece in pieces.items():
                pulled[kind].addcmul_(coming[output], piece[i].view(shape))
            to_params[name], to_grads[name] = pulled.pop("param"), pulled.pop("grad")
            to_slots[name] = pulled
    return State(to_params, cotangent.buffers, to_slots, state.step), to_grads


def _diagonals(run: Run, state: State, grads: dict) -> dict[tuple[str, str], Tensor]:
    """(output, input) -> ∂output/∂input of the update, elementwise, over these parameters end to end."""
    names = list(grads)
    slots = state.slots[names[0]]
    flat = {"param": _lay(state.params[name] for name in names), "grad": _lay(grads.values())}
    flat |= {k: _lay(state.slots[name][k] for name in names) for k in _moving(slots)}
    flat = {k: x.detach().requires_grad_() for k, x in flat.items()}
    hyper = run.hypers[state.step][run.group_of[names[0]]]
    given = {k: flat.get(k, x) for k, x in slots.items()}
    param, after = run.rule(flat["param"], flat["grad"], given, hyper, sqrt=safe_sqrt)
    outputs = {"param": param} | {k: after[k] for k in _moving(after)}
    found = {}
    for output, y in outputs.items():
        ones = torch.ones_like(y)
        for kind, x in zip(
            flat,
            torch.autograd.grad(y, list(flat.values()), ones, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if x is not None:
                found[output, kind] = x
    return found


def _moving(slots: dict[str, Tensor]) -> list[str]:
    """The slots that carry derivative: all but integer counters."""
    return [k for k, x in slots.items() if x.is_floating_point()]


def _alike(run: Run, state: State, grads: dict) -> list[list[str]]:
    """The names in `grads`, grouped by what their update depends on besides the elements themselves."""
    groups: dict[tuple, list[str]] = {}
    for name in grads:
        p, slots = state.params[name], state.slots[name]
        count = slots["step"].item() if "step" in slots else None
        groups.setdefault((run.group_of[name], tuple(slots), count, p.dtype, p.device), []).append(name)
    return list(groups.values())


def _lay(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors laid end to end."""
    return torch.cat([x.reshape(-1) for x in tensors])


def measure_vjp(run: Run, state: State, measure: Callable) -> State:
    """Δ_T = ∂φ/∂s_T for each of the K numbers that measure(model) returns: a State of (K, ...) tensors."""
    moved = run.moved(state)
    with torch.enable_grad(), refusing("measure"):
        params = _leaves(state.params)
        buffers = dict(state.buffers) | _leaves({name: state.buffers[name] for name in moved})
        with differentiable():
            outputs = run.measured(measure, params, buffers)
        if not outputs.requires_grad:
            raise NotDifferentiable(
                "measure does not depend on the model by any differentiable path; look for argmax, "
                "rounding, no_grad(), detach() or .item() in it, or a model from outside. A loss or a "
                "margin has a derivative, an accuracy has none"
            )
        inputs = [*params.values(), *(buffers[name] for name in moved)]
        one_each = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        pulled = pull([outputs], inputs, [one_each])
    to_params = dict(zip(params, pulled[: len(params)], strict=True))
    to_buffers = dict(zip(moved, pulled[len(params) :], strict=True))
    to_slots = {
        name: {k: x.new_zeros(len(outputs), *x.shape) for k, x in slots.items() if x.is_floating_point()}
        for name, slots in state.slots.items()
    }
    return State(to_params, to_buffers, to_slots, state.step)
