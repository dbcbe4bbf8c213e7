"""Batch, layer and group normalisation in autograd's graph, with a second derivative of their own.

Value and first derivative are PyTorch's own kernels, so their bits are training's. PyTorch's derivative of
the derivative takes some fifty passes over memory, and for BatchNorm it has none with respect to the
running statistics. The formulas of normalisation_formulas.py take ten passes, and have that derivative.
The three operations themselves are in layer_norm.py and batch_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .higher_order import batched, further, shared
from .normalisation_formulas import (
    Cotangents,
    First,
    Kept,
    Normalisation,
    Standard,
    first_derivative,
    given,
    second_derivative,
    shaped_like,
)


class _Normalise(Function):
    """y = w x̂ + b, and its first derivative.

    Mean and rstd are outputs, too, since BatchNorm's running statistics are made of them. Their gradients
    over N numbers are ∂mean/∂x = 1/N and ∂s/∂x = −s² x̂ / N.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, kind):
        y, mean, rstd, *rest = kind.forward(x, weight, bias)
        ctx.kind, ctx.asked, ctx.rest = kind, (True, weight is not None, bias is not None), tuple(rest)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, g, g_mean, g_rstd):
        kind, kept = ctx.kind, _kept(ctx)
        differentiably = torch.is_grad_enabled()
        if g is None:
            to_x, to_weight, to_bias = kept.x.new_zeros(kind.shape), None, None
        elif differentiably:
            to_x, to_weight, to_bias = _first_with_graph(ctx, g, kept)
        else:
            to_x, to_weight, to_bias = first_derivative(kind, g.reshape(kind.shape), _standard(ctx))
        if g_mean is not None or g_rstd is not None:
            # what the ctx keeps for all targets has no graph, so it is made again where one is needed
            xhat, s, _ = kind.standard(kept) if differentiably else _standard(ctx)
            to_x = to_x.view(kind.shape)
            if g_mean is not None:
                to_x = to_x + g_mean.view(s.shape) / kind.count
            if g_rstd is not None:
                to_x = to_x - xhat * (s.square() * g_rstd.view(s.shape) / kind.count)
        _, weight_asked, bias_asked = ctx.asked
        to_weight = shaped_like(to_weight, kept.weight) if weight_asked else None
        to_bias = shaped_like(to_bias, kept.weight) if bias_asked else None
        return to_x.view(kept.x.shape), to_weight, to_bias, None


def _kept(ctx) -> Kept:
    """What the forward kernel was given and has made, where ctx is that of `_Normalise`."""
    x, weight, mean, rstd = ctx.saved_tensors
    return Kept(x, weight, mean, rstd, ctx.rest)


def _first_with_graph(ctx, g: Tensor, kept: Kept) -> First:
    """∂x, ∂w and ∂b by PyTorch's kernels, with a graph of their own."""
    if not batched(g):
        return _NormaliseBackward.apply(g, kept.x, kept.weight, kept.mean, kept.rstd, ctx)
    return ctx.kind.first_written_out(g, kept.x, kept.weight)


def _standard(ctx) -> Standard:
    """x̂, s and w, where ctx is that of `_Normalise`."""
    return shared(ctx, lambda: ctx.kind.standard(_kept(ctx)))


def laid_out(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory layout in which PyTorch's kernels take x; it decides how their sums are rounded."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return g.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return g.contiguous(
        memory_format=last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    )


class _NormaliseBackward(Function):
    """The three gradients above, by PyTorch's kernel, and the second derivative in closed form."""

    @staticmethod
    def forward(ctx, g, x, weight, mean, rstd, of):
        ctx.of = of  # the ctx of `_Normalise`
        ctx.save_for_backward(g, x, weight)
        kept = Kept(x, weight, mean, rstd, of.rest)
        return tuple(of.kind.backward(laid_out(g, x), kept, list(of.asked)))

    @staticmethod
    def backward(ctx, c, c_weight, c_bias):
        (g, x, weight), kind = ctx.saved_tensors, ctx.of.kind
        if torch.is_grad_enabled():
            return *further(kind.first_written_out, (g, x, weight), c, c_weight, c_bias), None, None, None
        zero = g.new_zeros(())
        c_w = zero if c_weight is None else c_weight.view(kind.affine)
        c_b = zero if c_bias is None else c_bias.view(kind.affine)

        cotangents = Cotangents(c.reshape(kind.shape), c_w, c_b)
        step = shared(ctx, lambda: given(kind, g.reshape(kind.shape), _standard(ctx.of)))
        to_g, to_x, to_w = second_derivative(kind, cotangents, step)
        return to_g.view(g.shape), to_x.view(g.shape), shaped_like(to_w, weight), None, None, None


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Normalisation):
    """y, mean and rstd; inside torch.func's transforms y alone, and by plain arithmetic."""
    if not batched():
        return _Normalise.apply(x, weight, bias, kind)
    xhat, _, w = kind.written_out(x, weight)
    y = xhat * w if bias is None else torch.addcmul(bias.view(kind.affine), xhat, w)
    return y.view(x.shape), None, None
