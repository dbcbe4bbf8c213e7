"""GELU (Hendrycks & Gimpel 2016), with the second derivative in closed form.

y = xΦ(x), with Φ the normal distribution function and φ its density, so y' = Φ + xφ and y'' = (2 − x²)φ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .higher_order import batched, further, shared

aten = torch.ops.aten


class _Gelu(Function):
    """y = xΦ(x)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return aten.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return aten.gelu_backward(g, x) if batched(g) else _GeluBackward.apply(g, x, ctx)
        return g * _slope(ctx)


def _slope(ctx) -> Tensor:
    """y'(x), where ctx is that of `_Gelu`."""
    (x,) = ctx.saved_tensors
    return shared(ctx, lambda: aten.gelu_backward(torch.ones_like(x), x))


class _GeluBackward(Function):
    """∂x = g y'(x). A cotangent c of it goes to g as c y'(x), and to x as c g y''(x)."""

    @staticmethod
    def forward(ctx, g, x, of):
        ctx.of = of  # the ctx of `_Gelu`, whose slope both derivatives use
        ctx.save_for_backward(g, x)
        return aten.gelu_backward(g, x)

    @staticmethod
    def backward(ctx, c):
        if torch.is_grad_enabled():
            return *further(aten.gelu_backward, ctx.saved_tensors, c), None
        return c * _slope(ctx.of), c * shared(ctx, lambda: _bend(*ctx.saved_tensors)), None


def _bend(g: Tensor, x: Tensor) -> Tensor:
    """g y''(x)."""
    square = x * x
    density = square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return (2 - square).mul_(density).mul_(g)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu; the form approximated by tanh keeps PyTorch's own derivatives."""
    return _Gelu.apply(x) if approximate == "none" else F.gelu(x, approximate=approximate)
