"""PyTorch's own operator database, as a list of operations to differentiate twice.

Each operation is made a scalar along random directions, differentiated with a graph as a training step
is, and pulled back as the engine does it. `examine` says how far the pull is from finite differences of
the gradient, and the batched pull from single ones.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from magic.engine import adjoint
from magic.kernels.replace import differentiable

TARGETS = 3
SMALL = 1e-4  # where a derivative is 0 it is compared with this: the sample inputs are of size 1 to 10
SIGNS = {"nn.functional.hinge_embedding_loss", "nn.functional.cosine_embedding_loss"}  # the last argument is
ROUND = {"bfloat16", "half", "float", "chalf", "cfloat"}  # to less than float64: no finite difference sees it
LEFT_OUT = {"as_strided.partial_views"}  # its samples are views of a storage that a copy has not
STEPS = (1e-4, 1e-5, 1e-6, 1e-7)


def database() -> list:
    """All operations with a second derivative in float64 on the CPU."""
    if "expecttest" not in sys.modules:  # imported by the database's module; not needed here
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase
    with mock.patch.object(torch.backends, "disable_global_flags"):  # it would freeze switches for good
        from torch.testing._internal.common_methods_invocations import op_db
    twice = (
        op for op in op_db if op.supports_autograd and op.supports_gradgrad and name_of(op) not in LEFT_OUT
    )
    return [op for op in twice if torch.float64 in op.supported_dtypes("cpu")]


def name_of(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def samples(op, most: int) -> Iterator:
    """Sample inputs, spread over those that the database has for the operation.

    Most of the time would go into stacks of calls: the database asks which unittest it is in, and sets the
    seed for each sample, where torch.manual_seed formats a stack for each kind of device not used so far.
    """
    seeded = mock.patch.object(torch, "manual_seed", torch.default_generator.manual_seed)
    with seeded, mock.patch("inspect.stack", return_value=[]):
        torch.default_generator.manual_seed(0)
        found = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    step = max(1, len(found) / most)
    return (found[int(i * step)] for i in range(min(most, len(found))))


@dataclass
class Found:
    """How far the second derivative is off, relative to its size; None where there is nothing to compare."""

    differences: float | None = None  # the single pull against finite differences
    batched: float | None = None  # the batched pull against single ones
    one_by_one: bool = False  # vmap has no rule
    refused: str = ""


def function_of(op, sample) -> tuple[Callable, list[Tensor]]:
    """f(*leaves) -> real tensors, and the leaves, for one sample of one operation."""
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    at = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
    if op.name in SIGNS:
        at = at[:-1]

    def f(*leaves):
        held = list(flat)
        for i, x in zip(at, leaves, strict=True):
            held[i] = x
        first, args, kwargs = tree_unflatten(held, spec)
        torch.default_generator.manual_seed(0)
        out = sample.output_process_fn_grad(op.gradcheck_wrapper(op.op, first, *args, **kwargs))
        tensors = [y for y in tree_flatten(out)[0] if isinstance(y, Tensor)]
        reals = [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in tensors]
        return [y for y in reals if y.is_floating_point() and y.requires_grad and y.layout == torch.strided]

    return f, [flat[i].detach().clone().requires_grad_() for i in at]


def examine(op, sample) -> Found:
    """Differentiate one sample twice, or say why that is refused."""
    try:
        with adjoint.refusing(name_of(op)):
            return _examine(op, sample)
    except adjoint.NotDifferentiable as refusal:
        return Found(refused=str(refusal))


def _examine(op, sample) -> Found:
    f, leaves = function_of(op, sample)
    dice = torch.Generator().manual_seed(1)

    def random(x):
        return torch.randn(x.shape, dtype=x.dtype, generator=dice)

    with differentiable():
        values = f(*leaves)
    if not values or not any(y.numel() for y in values):
        return Found()
    scales = [1 / (1 + y.detach().abs().max()) if y.numel() else 1.0 for y in values]
    directions = [random(y).requires_grad_() for y in values]

    def gradient(inputs):
        """The gradient of Σ r (y + a y²) with respect to the leaves, with its graph."""
        rs, xs = inputs[: len(values)], inputs[len(values) :]
        with differentiable():
            total = sum((r * (y + a * y * y)).sum() for r, y, a in zip(rs, f(*xs), scales, strict=True))
        found = torch.autograd.grad(total, xs, create_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]

    inputs = [*directions, *leaves]
    outputs = gradient(inputs)
    cotangents = [torch.stack([random(y) for _ in range(TARGETS)]) for y in outputs]
    singles = [_single(outputs, inputs, [c[k] for c in cotangents]) for k in range(TARGETS)]
    if singles[0] is None:
        return Found()
    found = Found()
    if op.name not in ROUND:
        found.differences = _against_differences(gradient, inputs, cotangents, singles[0], random)
    found.batched, found.one_by_one = _against_singles(outputs, inputs, cotangents, singles)
    return found


def _single(outputs, inputs, cotangent) -> tuple[Tensor, ...] | None:
    pairs = [(y, c) for y, c in zip(outputs, cotangent, strict=True) if y.requires_grad]
    if not pairs:
        return None
    ys, cs = zip(*pairs, strict=True)
    return torch.autograd.grad(ys, inputs, cs, retain_graph=True, allow_unused=True, materialize_grads=True)


def _real_dot(a: Tensor, b: Tensor) -> float:
    return (a * b.conj()).sum().real.item()


def _against_differences(gradient, inputs, cotangents, pulled, random) -> float | None:
    """The relative error at the step size that suits best, or None where the function is not finite."""
    ways = [random(x) * (x.detach() if x.dim() else 1.0) for x in inputs]
    seen = sum(_real_dot(p, way) for p, way in zip(pulled, ways, strict=True))
    sizes = sum(abs(_real_dot(p.abs(), way.abs())) for p, way in zip(pulled, ways, strict=True))
    errors = []
    for step in STEPS:
        ends = []
        for sign in (1, -1):
            moved = [
                (x.detach() + sign * step * way).requires_grad_() for x, way in zip(inputs, ways, strict=True)
            ]
            ends.append([g.detach() for g in gradient(moved)])
        slopes = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
        true = sum(_real_dot(c[0], s) for c, s in zip(cotangents, slopes, strict=True))
        noise = (
            1e-16
            / step
            * sum(_real_dot(c[0].abs(), a.abs()) for c, a in zip(cotangents, ends[0], strict=True))
        )
        errors.append(max(0.0, abs(true - seen) - 10 * noise) / max(abs(true), sizes, SMALL))
    errors = [e for e in errors if e == e and e != float("inf")]
    return min(errors) if errors else None


def _against_singles(outputs, inputs, cotangents, singles) -> tuple[float | None, bool]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = list(
            adjoint.pull(list(outputs), list(inputs), lambda rows: [c[rows] for c in cotangents], TARGETS)
        )
    one_by_one = any("one by one" in str(w.message) for w in caught)
    together = [torch.cat(xs) for xs in zip(*(products for _, products in parts), strict=True)]
    worst = 0.0
    for k, single in enumerate(singles):
        for a, b in zip(single, together, strict=True):
            if a.numel() and a.isfinite().all():
                # compared with this product or with one of size 1, whichever is larger
                error = ((a - b[k]).abs().max() / max(a.abs().max().item(), 1e-9)).item()
                worst = max(worst, error if error == error else float("inf"))
    return worst, one_by_one
