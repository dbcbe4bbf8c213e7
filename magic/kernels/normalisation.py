"""What batch, layer and group normalisation have in common: the second derivative in closed form.

    x̂ = (x − mean(x)) s,    s = 1/√(mean((x − mean(x))²) + eps),    y = w x̂ + b

Value and first derivative are PyTorch's own kernels, so their bits are training's. PyTorch's derivative of
the derivative takes some fifty passes over memory, and for BatchNorm it has none with respect to the
running statistics. The forms here take ten passes, and have that derivative. The three operations
themselves are in layer_norm.py and batch_norm.py.

All derivatives go through one linear map, Pv = v − mean(v) − x̂ mean(v x̂). To add a number to x, or to
multiply x by one, leaves x̂ as it is (the latter but for eps), so P removes the parts of v along the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .higher_order import batched, further, shared


class Standard(NamedTuple):
    """x̂, s and w of the formulas above, in the view of a `Normalisation`; w is 1 without a weight."""

    xhat: Tensor
    s: Tensor
    w: Tensor


class Kept(NamedTuple):
    """What PyTorch's forward kernel was given and has made, which its backward kernel asks for."""

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor  # s, by the name that PyTorch gives it
    rest: tuple  # whatever else the forward kernel returned


@dataclass(frozen=True)
class Normalisation:
    """Which numbers a normalisation averages over, and PyTorch's own kernels for it.

    shape    how x is viewed, so that mean and deviation are taken over `axes`
    affine   the shape in which weight and bias stand beside that view
    forward  (x, weight, bias) -> (y, mean, rstd, …), the kernel of training
    backward (g, what forward kept, which are asked) -> gradients of x, weight and bias
    eps      what is added to the variance
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    affine: tuple[int, ...]
    forward: Callable
    backward: Callable[[Tensor, Kept, list[bool]], tuple[Tensor | None, ...]]
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
        """Whether all numbers that are averaged together share one weight, as in BatchNorm."""
        return self.affine == self.small

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.axes, keepdim=True)

    def project(self, v: Tensor, xhat: Tensor) -> Tensor:
        """Pv = v − mean(v) − x̂ mean(v x̂). P is symmetric."""
        v = v - self.mean(v)
        return torch.addcmul(v, xhat, self.mean(v * xhat), value=-1)

    def to_affine(self, v: Tensor, weight: Tensor) -> Tensor | None:
        """The sum of v over all that shares one number of weight or bias; None without a weight."""
        if weight.dim() == 0:
            return None
        return v.sum([i for i, n in enumerate(self.affine) if n == 1], keepdim=True).view(weight.shape)

    def written_out(self, x: Tensor, weight: Tensor | None) -> Standard:
        """x̂, s and w by plain arithmetic, which can be differentiated to any order."""
        v = x.reshape(self.shape)
        v = v - self.mean(v)
        s = (self.mean(v * v) + self.eps).rsqrt()
        return Standard(v * s, s, s.new_ones(()) if weight is None else weight.view(self.affine))

    def first(self, g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x and, where there is one, weight and bias, by plain arithmetic.

        PyTorch's own cannot stand here: its third derivative of LayerNorm is wrong, without an error,
        and BatchNorm has none.
        """
        standard = self.written_out(x, weight)
        g = g.reshape(self.shape)
        if weight is None:
            return ((standard.s * self.project(g, standard.xhat)).view(x.shape),)
        return tuple(
            None if v is None else v.view(like.shape)
            for v, like in zip(_first(self, g, standard), (x, weight, weight), strict=True)
        )

    def standard(self, kept: Kept) -> Standard:
        """x̂, s and w from the mean and rstd that PyTorch's kernel returned."""
        # Invariant: nothing that a ctx keeps (see `shared`) may lead to the ctx itself. rstd is an output of
        # the Function whose ctx it is, so it holds the ctx; a view of it would hold rstd as its base, and
        # this circle, which goes through autograd, would never be freed. A copy holds neither.
        s = kept.rstd.view(self.small).clone()
        w = s.new_ones(()) if kept.weight is None else kept.weight.view(self.affine)
        return Standard((kept.x.reshape(self.shape) - kept.mean.view(self.small)) * s, s, w)


class _Normalise(Function):
    """y = w x̂ + b. Its gradients are ∂x = s P(w g), ∂w = Σ g x̂ and ∂b = Σ g.

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
            first = _first_per_channel if kind.per_channel else _first
            to_x, to_weight, to_bias = first(kind, g.reshape(kind.shape), _standard(ctx))
        if g_mean is not None or g_rstd is not None:
            # what the ctx keeps for all targets has no graph, so it is made again where one is recorded
            xhat, s, _ = kind.standard(kept) if differentiably else _standard(ctx)
            to_x = to_x.view(kind.shape)
            if g_mean is not None:
                to_x = to_x + g_mean.view(s.shape) / kind.count
            if g_rstd is not None:
                to_x = to_x - xhat * (s.square() * g_rstd.view(s.shape) / kind.count)
        found = zip((to_x, to_weight, to_bias), (kept.x, kept.weight, kept.weight), ctx.asked, strict=True)
        return *(v.view(like.shape) if asked and v is not None else None for v, like, asked in found), None


def _kept(ctx) -> Kept:
    return Kept(*ctx.saved_tensors, ctx.rest)


def _first_with_graph(ctx, g, kept: Kept) -> tuple[Tensor | None, ...]:
    """∂x, ∂w and ∂b by PyTorch's kernels, with a graph of their own."""
    if not batched(g):
        return _NormaliseBackward.apply(g, kept.x, kept.weight, kept.mean, kept.rstd, ctx)
    found = ctx.kind.first(g, kept.x, kept.weight)
    return (*found, *[None] * (3 - len(found)))


def _standard(ctx) -> Standard:
    """x̂, s and w, where ctx is that of `_Normalise`."""
    return shared(ctx, lambda: ctx.kind.standard(_kept(ctx)))


def _first(kind: Normalisation, g: Tensor, standard: Standard) -> tuple[Tensor | None, ...]:
    """∂x, ∂w and ∂b."""
    xhat, s, w = standard
    return s * kind.project(w * g, xhat), kind.to_affine(g * xhat, w), kind.to_affine(g, w)


def _first_per_channel(kind: Normalisation, g: Tensor, standard: Standard) -> tuple[Tensor, ...]:
    """The same, where each mean has one weight: ∂x = sw (g − mean(g) − x̂ m), with m = mean(g x̂).

    The two means are a channel's numbers; ∂w and ∂b are N times them. Apart from them, ∂x takes two passes
    over memory, one for each addcmul.
    """
    xhat, s, w = standard
    mean, m, sw = kind.mean(g), kind.mean(g * xhat), s * w
    return torch.addcmul(torch.addcmul(-sw * mean, g, sw), xhat, -sw * m), m * kind.count, mean * kind.count


def laid_out(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory layout in which PyTorch's kernels take x; it decides how their sums are rounded."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return g.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return g.contiguous(
        memory_format=last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    )


class _Given(NamedTuple):
    """What the second derivative needs of the step alone, and so shares between targets; h = w g."""

    g: Tensor
    standard: Standard
    projected: Tensor  # Ph, or Pg where each mean has one weight
    m: Tensor  # mean(h x̂)


class _Cotangents(NamedTuple):
    """The cotangents of ∂x, ∂w and ∂b, which a target brings."""

    c: Tensor
    c_w: Tensor
    c_b: Tensor


class _NormaliseBackward(Function):
    """The three gradients above, and how they move with g, x and w.

    Let c, c_w, c_b be the cotangents of ∂x, ∂w and ∂b; h = w g, m = mean(h x̂), q = mean(c x̂) and
    r = mean(c Ph). Then

        to g:  w s Pc + c_w x̂ + c_b        to w:  Σ g s Pc        to x:  sP(c_w g) − s²(q Ph + m Pc + r x̂)

    The first two hold since P is symmetric and ∂x, ∂w and ∂b are linear in g. For the third, write
    ⟨c, sPh⟩ = sN(mean(c h) − mean(c) mean(h) − q m): what x̂ receives is c_w g − s(q h + m c), and what s
    receives is Nr. They go on to x by the formulas of `_Normalise`, x̂'s as s P(…), and that of s as
    −s² x̂ r.
    """

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
            cotangents = (c, c_weight, c_bias)[: 1 if weight is None else 3]
            return *further(kind.first, (g, x, weight), *cotangents), None, None, None
        zero = g.new_zeros(())
        c_w = zero if c_weight is None else c_weight.view(kind.affine)
        c_b = zero if c_bias is None else c_bias.view(kind.affine)

        def prepare() -> _Given:
            standard, rows = _standard(ctx.of), g.reshape(kind.shape)
            xhat, _, w = standard
            projected = kind.project(rows if kind.per_channel else w * rows, xhat)
            return _Given(rows, standard, projected, kind.mean(w * rows * xhat))

        second = _second_per_channel if kind.per_channel else _second
        cotangents = _Cotangents(c.reshape(kind.shape), c_w, c_b)
        to_g, to_x, to_w = second(kind, cotangents, shared(ctx, prepare))
        to_w = None if weight is None else to_w.view(weight.shape)
        return to_g.view(g.shape), to_x.view(g.shape), to_w, None, None, None


def _second(kind: Normalisation, cotangents: _Cotangents, given: _Given) -> tuple[Tensor | None, ...]:
    """The cotangents of g, x and w."""
    (c, c_w, c_b), (g, (xhat, s, w), ph, m) = cotangents, given
    c = c - kind.mean(c)
    q, r = kind.mean(c * xhat), kind.mean(c * ph)
    pc = torch.addcmul(c, xhat, q, value=-1)
    to_x = torch.addcmul(torch.addcmul(pc * (-s * s * m), ph, -s * s * q), xhat, -s * s * r)
    to_x = to_x + s * kind.project(g * c_w, xhat)
    return torch.addcmul(pc * (s * w) + c_b, xhat, c_w), to_x, kind.to_affine(pc * (g * s), w)


def _second_per_channel(kind: Normalisation, cotangents: _Cotangents, given: _Given) -> tuple[Tensor, ...]:
    """The same, where each mean has one weight, so that Ph = w Pg and P(c_w g) = c_w Pg.

    With three means taken, a = −s² m and r = mean(c Pg), each cotangent is a sum of c, x̂ and Pg with one
    factor a channel, and the two take five passes over memory, one for each addcmul.
    """
    (c, c_w, c_b), (_, (xhat, s, w), pg, m) = cotangents, given
    mean, q, r = kind.mean(c), kind.mean(c * xhat), kind.mean(c * pg)
    sw, a = s * w, -s * s * m
    to_g = torch.addcmul(torch.addcmul(c_b - sw * mean, c, sw), xhat, c_w - sw * q)
    to_x = torch.addcmul(torch.addcmul(-a * mean, c, a), pg, s * (c_w - sw * q))
    return to_g, torch.addcmul(to_x, xhat, -a * q - s * sw * r), s * r * kind.count


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Normalisation):
    """y, mean and rstd; inside torch.func's transforms y alone, and by plain arithmetic."""
    if not batched():
        return _Normalise.apply(x, weight, bias, kind)
    xhat, _, w = kind.written_out(x, weight)
    y = xhat * w if bias is None else torch.addcmul(bias.view(kind.affine), xhat, w)
    return y.view(x.shape), None, None
