"""Convolutions, with the derivatives of their derivatives by the kernels that fit them.

A convolution is bilinear in image and kernel, and so are its two gradients. All derivatives are therefore
convolutions again, and what is chosen here is only by which of PyTorch's kernels each is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .higher_order import batched, further

aten = torch.ops.aten


class Geometry(NamedTuple):
    """How a kernel moves over an image: an entry of each list for every axis of the image."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _Conv(Function):
    """y = W ∗ x + b."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() and not batched(g):
            return *_ConvBackward.apply(g, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), None
        return *_backward(g, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), None


class _ConvBackward(Function):
    """∂x = Wᵀ g, ∂W = g ⋆ x and ∂b = Σ g. Their cotangents c, c_W and c_b go

    to g: W ∗ c + c_W ∗ x + c_b        to x: c_Wᵀ g        to W: g ⋆ c

    as ⟨c, Wᵀ g⟩ + ⟨c_W, g ⋆ x⟩ + ⟨c_b, Σ g⟩ = ⟨g, W ∗ c + c_W ∗ x + c_b⟩ shows. PyTorch's own formula takes
    a forward convolution for the one to W, which is slower, and computes the one to x even where x is
    data and nobody asks for it.
    """

    @staticmethod
    def forward(ctx, g, x, weight, geometry, asked):
        ctx.geometry, ctx.asked = geometry, asked
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        return _backward(g, x, weight, geometry, asked)

    @staticmethod
    def backward(ctx, c, c_weight, c_bias):
        g, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *further(
                lambda g, x, weight: _backward(g, x, weight, ctx.geometry, ctx.asked),
                (g, x, weight), c, c_weight, c_bias,
            ), None, None  # fmt: skip
        to_g = to_x = to_weight = None
        if c is not None:
            to_g = _forward(c, weight, None, ctx.geometry)
            to_weight = _backward(g, c, weight, ctx.geometry, (False, True, False))[1]
        if c_weight is not None:
            more = _forward(x, c_weight, None, ctx.geometry)
            to_g = more if to_g is None else to_g + more
            if ctx.needs_input_grad[1]:
                to_x = _backward(g, x, c_weight, ctx.geometry, (True, False, False))[0]
        if c_bias is not None:
            more = c_bias.view(-1, *[1] * (g.dim() - 2))
            to_g = more.expand_as(g) if to_g is None else to_g + more
        return to_g, to_x, to_weight, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, asked) -> tuple[Tensor | None, ...]:
    """∂x, ∂W and ∂b, those that are asked for."""
    stride, padding, dilation, groups = geometry
    bias, zeros = [weight.shape[0]], [0] * len(stride)
    return aten.convolution_backward(
        g, x, weight, bias, stride, padding, dilation, False, zeros, groups, list(asked)
    )


def convolution(dimensions: int, plain: Callable) -> Callable:
    """What takes the place of `plain`, which is F.conv1d, F.conv2d or F.conv3d."""

    def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if isinstance(padding, str) or x.dim() != dimensions + 2:
            return plain(x, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation = (
            [n] * dimensions if isinstance(n, int) else list(n) for n in (stride, padding, dilation)
        )
        return _Conv.apply(x, weight, bias, Geometry(stride, padding, dilation, groups))

    conv.__name__ = plain.__name__
    return conv
