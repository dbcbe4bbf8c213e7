"""The formulas of batch, layer and group normalisation: the first and the second derivative, in closed form.

    x̂ = (x − mean(x)) s,    s = 1/√(mean((x − mean(x))²) + eps),    y = w x̂ + b

All derivatives go through one linear map, Pv = v − mean(v) − x̂ mean(v x̂). To add a number to x, or to
multiply x by one, leaves x̂ as it is (the latter but for eps), so P removes the parts of v along the two.

Here is arithmetic on tensors only; how it enters autograd's graph is in normalisation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

First: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]  # the gradients of x, weight and bias
Second: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # the cotangents of g, x and w


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
    backward: Callable[[Tensor, Kept, list[bool]], First]
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

    def first_written_out(self, g: Tensor, x: Tensor, weight: Tensor | None) -> First:
        """The gradients of x and, where there is a weight, of weight and bias, by plain arithmetic.

        PyTorch's own cannot stand here: its third derivative of LayerNorm is wrong, without an error,
        and BatchNorm has none.
        """
        to_x, to_weight, to_bias = _first(self, g.reshape(self.shape), self.written_out(x, weight))
        return to_x.view(x.shape), shaped_like(to_weight, weight), shaped_like(to_bias, weight)

    def standard(self, kept: Kept) -> Standard:
        """x̂, s and w from the mean and rstd that PyTorch's kernel returned."""
        # Invariant: nothing that a ctx keeps (see `shared`) may lead to the ctx itself. rstd is an output of
        # the Function whose ctx it is, so it holds the ctx; a view of it would hold rstd as its base, and
        # this circle, which goes through autograd, would never be freed. A copy holds neither.
        s = kept.rstd.view(self.small).clone()
        w = s.new_ones(()) if kept.weight is None else kept.weight.view(self.affine)
        return Standard((kept.x.reshape(self.shape) - kept.mean.view(self.small)) * s, s, w)


def shaped_like(v: Tensor | None, other: Tensor | None) -> Tensor | None:
    """v in the shape of the other; None if one of them is not there."""
    return None if v is None or other is None else v.view(other.shape)


def first_derivative(kind: Normalisation, g: Tensor, standard: Standard) -> First:
    """∂x, ∂w and ∂b, for the cotangent g of y: ∂x = s P(w g), ∂w = Σ g x̂ and ∂b = Σ g."""
    return (_first_per_channel if kind.per_channel else _first)(kind, g, standard)


def _first(kind: Normalisation, g: Tensor, standard: Standard) -> First:
    xhat, s, w = standard
    return s * kind.project(w * g, xhat), kind.to_affine(g * xhat, w), kind.to_affine(g, w)


def _first_per_channel(kind: Normalisation, g: Tensor, standard: Standard) -> First:
    """The same, where each mean has one weight: ∂x = sw (g − mean(g) − x̂ m), with m = mean(g x̂).

    The two means are a channel's numbers; ∂w and ∂b are N times them. Apart from them, ∂x takes two passes
    over memory, one for each addcmul.
    """
    xhat, s, w = standard
    mean, m, sw = kind.mean(g), kind.mean(g * xhat), s * w
    return torch.addcmul(torch.addcmul(-sw * mean, g, sw), xhat, -sw * m), m * kind.count, mean * kind.count


class Given(NamedTuple):
    """What the second derivative needs of the step alone, and so shares between targets; h = w g."""

    g: Tensor
    standard: Standard
    projected: Tensor  # Ph, or Pg where each mean has one weight
    m: Tensor  # mean(h x̂)


def given(kind: Normalisation, g: Tensor, standard: Standard) -> Given:
    """What the second derivative needs, for the cotangent g of y."""
    xhat, _, w = standard
    projected = kind.project(g if kind.per_channel else w * g, xhat)
    return Given(g, standard, projected, kind.mean(w * g * xhat))


class Cotangents(NamedTuple):
    """The cotangents of ∂x, ∂w and ∂b, which a target brings."""

    c: Tensor
    c_w: Tensor
    c_b: Tensor


def second_derivative(kind: Normalisation, cotangents: Cotangents, given: Given) -> Second:
    """The cotangents of g, x and w, for those of ∂x, ∂w and ∂b, which are c, c_w and c_b.

    Let h = w g, m = mean(h x̂), q = mean(c x̂) and r = mean(c Ph). Then

        to g:  w s Pc + c_w x̂ + c_b        to w:  Σ g s Pc        to x:  sP(c_w g) − s²(q Ph + m Pc + r x̂)

    The first two hold since P is symmetric and ∂x, ∂w and ∂b are linear in g. For the third, write
    ⟨c, sPh⟩ = sN(mean(c h) − mean(c) mean(h) − q m), and ⟨c_w, Σ g x̂⟩ beside it. What x̂ receives from both
    is c_w g − s(q h + m c), and what s receives is Nr. They go on to x as in the first derivative: the one
    by sP, the other by ∂s/∂x = −s² x̂ / N.
    """
    return (_second_per_channel if kind.per_channel else _second)(kind, cotangents, given)


def _second(kind: Normalisation, cotangents: Cotangents, given: Given) -> Second:
    """With s times c for c, and so sPc, s q and s r for Pc, q and r."""
    (c, c_w, c_b), (g, (xhat, s, w), ph, m) = cotangents, given
    c = s * c
    c = c - kind.mean(c)
    q, r = kind.mean(c * xhat), kind.mean(c * ph)
    pc = torch.addcmul(c, xhat, q, value=-1)
    v = g * c_w
    to_x = torch.addcmul(v - kind.mean(v), xhat, kind.mean(v * xhat) + r, value=-1)
    to_x = torch.addcmul(torch.addcmul(to_x, ph, q, value=-1), pc, m, value=-1)
    return torch.addcmul(torch.addcmul(c_b, pc, w), xhat, c_w), s * to_x, kind.to_affine(pc * g, w)


def _second_per_channel(kind: Normalisation, cotangents: Cotangents, given: Given) -> Second:
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
