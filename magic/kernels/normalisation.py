"""Batch, layer and group normalisation, with the second derivative in closed form.

Value and first derivative are PyTorch's own kernels, so their bits are training's. PyTorch's
derivative of the derivative takes some fifty passes over memory, and for BatchNorm it has none with
respect to the running statistics; the forms here take ten, and have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .orders import batched, further, shared

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalisation:
    """Which numbers a normalisation averages over, and PyTorch's own kernels for it.

    shape    how x is viewed, so that mean and deviation are taken over `axes`
    affine   the shape in which weight and bias stand beside that view
    forward  (x, weight, bias) -> (y, mean, rstd, …), kernels of training
    backward (g, x, weight, mean, rstd, which are asked, the rest of forward) -> gradients of x, weight, bias
    eps      what is added to the variance
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    affine: tuple[int, ...]
    forward: Callable
    backward: Callable
    eps: float

    @property
    def small(self) -> tuple[int, ...]:
        """The shape of a mean."""
        return tuple(1 if i in self.axes else n for i, n in enumerate(self.shape))

    @property
    def count(self) -> int:
        """N, how many numbers a mean is taken over."""
        return math.prod(self.shape[i] for i in self.axes)

    @property
    def per_channel(self) -> bool:
        """All numbers that are averaged share their weight, as in BatchNorm."""
        return self.affine == self.small

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.axes, keepdim=True)

    def project(self, v: Tensor, xhat: Tensor) -> Tensor:
        """Pv = v − mean(v) − x̂ mean(v x̂): v without what shifts or scales x̂; symmetric."""
        v = v - self.mean(v)
        return torch.addcmul(v, xhat, self.mean(v * xhat), value=-1)

    def to_affine(self, v: Tensor, weight: Tensor) -> Tensor | None:
        """Sum of v over all that shares one number of weight or bias; None without a weight."""
        if weight.dim() == 0:
            return None
        return v.sum([i for i, n in enumerate(self.affine) if n == 1], keepdim=True).view(weight.shape)

    def written_out(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x̂, s and w by plain arithmetic, which can be differentiated to any order."""
        v = x.reshape(self.shape)
        v = v - self.mean(v)
        s = (self.mean(v * v) + self.eps).rsqrt()
        return v * s, s, s.new_ones(()) if weight is None else weight.view(self.affine)

    def first(self, g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients of x and, where there is one, weight and bias, by plain arithmetic.

        PyTorch's own cannot stand here: its third derivative of LayerNorm is wrong, without an error,
        and BatchNorm has none.
        """
        xhat, s, w = self.written_out(x, weight)
        g = g.reshape(self.shape)
        if weight is None:
            return ((s * self.project(g, xhat)).view(x.shape),)
        to_x, to_w, to_b = _first(self, g, xhat, s, w)
        return to_x.view(x.shape), to_w.view(weight.shape), to_b.view(weight.shape)

    def standard(self, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor):
        """x̂ = (x − mean) s, s = rstd and w (1 without weight), in the view."""
        s = rstd.view(self.small).clone()  # a view would hold on to the graph that holds on to it
        w = s.new_ones(()) if weight is None else weight.view(self.affine)
        return (x.reshape(self.shape) - mean.view(self.small)) * s, s, w


class _Normalise(Function):
    """y = w x̂ + b. With s = rstd: ∂x = s P(w g), ∂w = Σ g x̂, ∂b = Σ g.

    Mean and rstd are outputs, too: BatchNorm's running statistics are made of them. Over N numbers,
    ∂mean/∂x = 1/N and ∂s/∂x = −s² x̂ / N.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, kind):
        y, mean, rstd, *ctx.kept = kind.forward(x, weight, bias)
        ctx.kind, ctx.asked = kind, (True, weight is not None, bias is not None)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, g, g_mean, g_rstd):
        x, weight, mean, rstd = ctx.saved_tensors
        kind = ctx.kind
        differentiably = torch.is_grad_enabled()
        if g is None:
            to_x, to_weight, to_bias = x.new_zeros(kind.shape), None, None
        elif differentiably:
            to_x, to_weight, to_bias = _first_again(ctx, g, x, weight, mean, rstd)
        else:
            first = _first_per_channel if kind.per_channel else _first
            to_x, to_weight, to_bias = first(kind, g.reshape(kind.shape), *_standard(ctx))
        if g_mean is not None or g_rstd is not None:
            # what is kept for all targets has no graph
            xhat, s, _ = kind.standard(x, weight, mean, rstd) if differentiably else _standard(ctx)
            to_x = to_x.view(kind.shape)
            if g_mean is not None:
                to_x = to_x + g_mean.view(s.shape) / kind.count
            if g_rstd is not None:
                to_x = to_x - xhat * (s.square() * g_rstd.view(s.shape) / kind.count)
        found = zip((to_x, to_weight, to_bias), (x, weight, weight), ctx.asked, strict=True)
        return *(v.view(like.shape) if asked and v is not None else None for v, like, asked in found), None


def _first_again(ctx, g, x, weight, mean, rstd) -> tuple[Tensor | None, ...]:
    """∂x, ∂w, ∂b by PyTorch's kernels, with a graph of their own."""
    if not batched(g):
        return _NormaliseBackward.apply(g, x, weight, mean, rstd, ctx)
    found = ctx.kind.first(g, x, weight)
    return (*found, *[None] * (3 - len(found)))


def _standard(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, s and w, where ctx is that of `_Normalise`."""
    x, weight, mean, rstd = ctx.saved_tensors
    return shared(ctx, lambda: ctx.kind.standard(x, weight, mean, rstd))


def _first(kind: Normalisation, g: Tensor, xhat: Tensor, s: Tensor, w: Tensor):
    """∂x, ∂w, ∂b."""
    return s * kind.project(w * g, xhat), kind.to_affine(g * xhat, w), kind.to_affine(g, w)


def _first_per_channel(kind: Normalisation, g: Tensor, xhat: Tensor, s: Tensor, w: Tensor):
    """The same, in two passes over what two means leave."""
    mean, m, sw = kind.mean(g), kind.mean(g * xhat), s * w
    return torch.addcmul(torch.addcmul(-sw * mean, g, sw), xhat, -sw * m), m * kind.count, mean * kind.count


def _laid_out(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory layout in which PyTorch's kernels take x; it decides how their sums are rounded."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return g.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return g.contiguous(
        memory_format=last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    )


class _NormaliseBackward(Function):
    """The three gradients above, and how they move with g, x and w.

    Let c, c_w, c_b be the cotangents of ∂x, ∂w, ∂b, and h = w g, m = mean(h x̂), q = mean(c x̂),
    r = mean(c Ph). Then ⟨c, sPh⟩ = sN(mean(ch) − mean(c) mean(h) − qm) is bilinear, and

        to g:  w s Pc + c_w x̂ + c_b        to w:  Σ g s Pc
        to x:  sP(c_w g) − s²(q Ph + m Pc + r x̂)

    the last being ∂x for the cotangent of x̂, −s(q h + m c) + c_w g, and Nr for the cotangent of s.
    """

    @staticmethod
    def forward(ctx, g, x, weight, mean, rstd, of):
        ctx.of = of
        ctx.save_for_backward(g, x, weight)
        return tuple(of.kind.backward(_laid_out(g, x), x, weight, mean, rstd, list(of.asked), *of.kept))

    @staticmethod
    def backward(ctx, c, c_weight, c_bias):
        (g, x, weight), kind = ctx.saved_tensors, ctx.of.kind
        if torch.is_grad_enabled():
            cotangents = (c, c_weight, c_bias)[: 1 if weight is None else 3]
            return *further(kind.first, (g, x, weight), *cotangents), None, None, None
        zero = g.new_zeros(())
        c_w = zero if c_weight is None else c_weight.view(kind.affine)
        c_b = zero if c_bias is None else c_bias.view(kind.affine)

        def prepare():
            xhat, s, w = _standard(ctx.of)
            given = g.reshape(kind.shape)
            projected = kind.project(given if kind.per_channel else w * given, xhat)
            return given, xhat, s, w, projected, kind.mean(w * given * xhat)

        second = _second_per_channel if kind.per_channel else _second
        to_g, to_x, to_w = second(kind, c.reshape(kind.shape), c_w, c_b, *shared(ctx, prepare))
        to_w = None if weight is None else to_w.view(weight.shape)
        return to_g.view(g.shape), to_x.view(g.shape), to_w, None, None, None


def _second(kind: Normalisation, c, c_w, c_b, g, xhat, s, w, ph, m):
    """The cotangents of g, x and w."""
    c = c - kind.mean(c)
    q, r = kind.mean(c * xhat), kind.mean(c * ph)
    pc = torch.addcmul(c, xhat, q, value=-1)
    to_x = torch.addcmul(torch.addcmul(pc * (-s * s * m), ph, -s * s * q), xhat, -s * s * r)
    to_x = to_x + s * kind.project(g * c_w, xhat)
    return torch.addcmul(pc * (s * w) + c_b, xhat, c_w), to_x, kind.to_affine(pc * (g * s), w)


def _second_per_channel(kind: Normalisation, c, c_w, c_b, g, xhat, s, w, pg, m):
    """The same, in five passes over what three means leave: P(w g) = w Pg, and w is one number."""
    mean, q, r = kind.mean(c), kind.mean(c * xhat), kind.mean(c * pg)
    sw, a = s * w, -s * s * m
    to_g = torch.addcmul(torch.addcmul(c_b - sw * mean, c, sw), xhat, c_w - sw * q)
    to_x = torch.addcmul(torch.addcmul(-a * mean, c, a), pg, s * (c_w - sw * q))
    return to_g, torch.addcmul(to_x, xhat, -a * q - s * sw * r), s * r * kind.count


def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Normalisation):
    """y, mean and rstd; inside torch.func's transforms y alone, and by plain arithmetic."""
    if not batched():
        return _Normalise.apply(x, weight, bias, kind)
    xhat, _, w = kind.written_out(x, weight)
    y = xhat * w if bias is None else torch.addcmul(bias.view(kind.affine), xhat, w)
    return y.view(x.shape), None, None


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """F.layer_norm (Ba et al. 2016)."""
    if (weight is None and bias is not None) or x.numel() == 0:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    shape, axes = tuple(normalized_shape), tuple(range(x.dim() - len(normalized_shape), x.dim()))
    kind = Normalisation(
        shape=x.shape,
        axes=axes,
        affine=(1,) * (x.dim() - len(shape)) + shape,
        forward=lambda x, w, b: aten.native_layer_norm(x, shape, w, b, eps),
        backward=lambda g, x, w, mean, rstd, asked: aten.native_layer_norm_backward(
            g, x, shape, mean, rstd, w, w, asked
        ),
        eps=eps,
    )
    return _normalise(x, weight, bias, kind)[0]


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    """F.group_norm (Wu & He 2018)."""
    if (weight is None and bias is not None) or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    n, channels = x.shape[:2]
    sizes = n, channels, x.numel() // (n * channels), num_groups
    kind = Normalisation(
        shape=(n, num_groups, channels // num_groups, sizes[2]),
        axes=(2, 3),
        affine=(1, num_groups, channels // num_groups, 1),
        forward=lambda x, w, b: aten.native_group_norm(_laid_out(x, x), w, b, *sizes, eps),
        backward=lambda g, x, w, mean, rstd, asked: aten.native_group_norm_backward(
            g, _laid_out(x, x), mean, rstd, w, *sizes, asked
        ),
        eps=eps,
    )
    return _normalise(x, weight, bias, kind)[0]


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """F.batch_norm (Ioffe & Szegedy 2015), differentiable in its running statistics, too.

    In training the running variance is the unbiased one, and weight-0 examples move the statistics
    like any other.
    """
    axes, shape = (0, *range(2, x.dim())), (1, -1) + (1,) * (x.dim() - 2)
    if x.numel() == 0 or (training and running_mean is not None and batched()):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        x = (x - running_mean.view(shape)) / (running_var + eps).sqrt().view(shape)
        x = x if weight is None else x * weight.view(shape)
        return x if bias is None else x + bias.view(shape)
    if running_mean is not None:
        after = running_mean.detach().clone(), running_var.detach().clone()
    else:
        after = None, None

    def forward(x, w, b):
        y, mean, rstd, reserve, kernel = torch._batch_norm_impl_index(
            x, w, b, *after, True, momentum, eps, torch.backends.cudnn.enabled
        )
        return y, mean, rstd, reserve, kernel

    def backward(g, x, w, mean, rstd, asked, reserve, kernel):
        return aten._batch_norm_impl_index_backward(
            kernel, x, g, w, *after, mean, rstd, True, eps, asked, reserve
        )

    affine = tuple(n if i == 1 else 1 for i, n in enumerate(x.shape))
    kind = Normalisation(x.shape, axes, affine, forward, backward, eps)
    y, mean, rstd = _normalise(x, weight, bias, kind)
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        variance = (rstd.pow(-2) - eps) * (count / (count - 1))
        for running, new, value in ((running_mean, mean, after[0]), (running_var, variance, after[1])):
            running.copy_(_Valued.apply(running.lerp(new, momentum), value))
    return y


class _Valued(Function):
    """An expression with its value replaced by the same number as another kernel rounds it."""

    @staticmethod
    def forward(ctx, expression, value):
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None
