"""A finite difference as witness: does the adjoint see everything the step does?

Autograd differentiates what it is shown. A `detach()`, a `no_grad()` block, a buffer updated behind
its back or an autograd Function with a wrong second derivative changes the derivative of a training
run without any error. So before a replay pulls anything back, one step is compared with what the
step really does when its inputs move. The optimizer's update is ours and tested; compared is the part
that is the user's, the gradient and the buffers as functions of parameters, buffers and weights.

The comparison is in float64 and along random directions that scale each number by 1 + ε, so that
exact zeros stay where they are (many are kinks) and variances stay positive.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from . import determinism
from .adjoint import NotDifferentiable, own_functions, pull, refusing
from .equivalents import differentiable
from .run import Run
from .state import State

STEPS = (1e-8, 1e-6, 1e-4)  # small first: a ReLU that flips between the two ends spoils a difference
TOLERANCE = 1e-3


def check_step(run: Run, state: State, weights: Tensor) -> float | None:
    """Raise NotDifferentiable if the derivative of the step at `state` is not what the step does.

    Returns the relative difference found, or None, with a warning, where no finite difference is
    steady enough to tell (float32 arithmetic inside the model, a gradient that is rounding noise).
    """
    dice = torch.Generator().manual_seed(0)
    with determinism.fix():
        try:
            gradient, point = _in_double(run, state, weights)
            gradient(point)
        except (RuntimeError, TypeError, ValueError) as error:
            _warn(state.step, f"it does not run in float64 ({str(error).splitlines()[0]})")
            return None
        found = None
        for _ in range(2):
            direction = {name: _random(x, dice) * x for name, x in point.items()}
            with refusing(f"step {state.step}"):
                seen, true, own = _compare(gradient, point, direction, dice)
            if true is None:
                continue
            found = abs(seen - true) / max(abs(seen), abs(true), 1e-300)
            if found > TOLERANCE:
                raise NotDifferentiable(
                    f"step {state.step}: autograd's derivative of the step along a random direction is "
                    f"{seen:.6g}, a finite difference gives {true:.6g}. Something in the model or loss "
                    "acts behind autograd's back: look for detach(), .data, no_grad(), .item(), or an "
                    "autograd Function that cannot be differentiated twice"
                    + (f" (this run has {own})" if own else "")
                )
        if found is None:
            _warn(
                state.step,
                "finite differences are not steady: either part of it is in low precision, or "
                "a gradient is rounding noise, as that of a bias in front of a normalisation is",
            )
        return found


def _in_double(run: Run, state: State, weights: Tensor):
    """The step's gradient and buffers as a function of one dict of float64 tensors, and the point."""
    t = state.step
    shadow = copy.copy(run)
    shadow._adopt(copy.deepcopy(run._model).double())
    shadow.data = tuple(_double(x) for x in run.batch(t))
    shadow.batches = [torch.arange(len(run.batches[t]))]
    shadow._constants = {name: _double(b) for name, b in run._constants.items()}
    buffers = {name: _double(b) for name, b in state.buffers.items()}
    point = {f"params/{name}": _double(p) for name, p in state.params.items()}
    point |= {f"buffers/{name}": b for name, b in buffers.items() if b.is_floating_point()}
    point["weights"] = _double(weights[run.batches[t].to(weights.device)])

    def gradient(values: dict[str, Tensor], create_graph: bool = False) -> list[Tensor]:
        params = {name: values[f"params/{name}"] for name in state.params}
        held = {name: values.get(f"buffers/{name}", b) for name, b in buffers.items()}
        if not create_graph:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        total, after = shadow.total(params, held, values["weights"], 0)
        leaves = list(params.values())
        grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
        return [x for x in (*grads, *after.values()) if x is not None and x.is_floating_point()]

    return gradient, point


def _compare(gradient, point: dict, direction: dict, dice) -> tuple[float, float | None, str]:
    """The derivative along `direction`, weighted at random: by autograd, and by differences if steady.

    With the names of the user's autograd Functions that it went through.
    """
    with torch.enable_grad(), differentiable():
        leaves = {name: x.detach().requires_grad_() for name, x in point.items()}
        outputs = gradient(leaves, create_graph=True)
        own = own_functions(outputs)
        # Each output tensor counts the same, whatever its size.
        rows = [_random(y, dice) / (y.detach().norm() + 1e-300) for y in outputs]
        pulled = pull(outputs, list(leaves.values()), [c.unsqueeze(0) for c in rows])
        seen = sum((g[0] * d).sum() for g, d in zip(pulled, direction.values(), strict=True)).item()

    def along(epsilon: float) -> float:
        moved = {name: x + epsilon * direction[name] for name, x in point.items()}
        with torch.enable_grad():
            outputs = gradient(moved)
        return sum((c * y.detach()).sum() for c, y in zip(rows, outputs, strict=True)).item()

    for h in STEPS:
        near, far = ((along(k * h) - along(-k * h)) / (2 * k * h) for k in (1, 2))
        if abs(near - far) <= TOLERANCE * max(abs(near), abs(far)):
            return seen, near, own
    return seen, None, own


def _random(x: Tensor, dice: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=dice, dtype=x.dtype).to(x.device)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _warn(t: int, why: str) -> None:
    warnings.warn(
        f"the derivative of step {t} could not be checked against the step itself: {why}", stacklevel=3
    )
