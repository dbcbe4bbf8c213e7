"""Scaled dot-product attention (Vaswani et al. 2017), with the second derivative in closed form.

    S = σ q kᵀ + M,   P = softmax(S),   y = P v

with σ the scale and M a mask that is added. PyTorch's fused kernels compute y and its gradient without ever
holding P, and have no second derivative. Here they compute both, so that a trace has training's bits, and
P is made again for the pull. Let g be the gradient of y, and r the row sums of P∘(g vᵀ), which are those of
g∘y. The gradients are

    X = g vᵀ − r,   D = P∘X,   ∂q = σ D k,   ∂k = σ Dᵀ q,   ∂v = Pᵀ g

and cotangents a, b, c of these go, with E = σ (a kᵀ + q bᵀ), e the row sums of E∘P, and F = P∘(E − e),

    to g: F v + P c                      to v: Fᵀ g
    to q: σ (H k + D b)                  to k: σ (Hᵀ q + Dᵀ a)

where H = P∘(G − row sums of P∘G) is what reaches S, and G = (E − e)∘X + g cᵀ is what reaches P, up to a
number for each row: since the rows of P add up to 1, such a number changes nothing in H.

These matrices are the largest of the pull, one for each example and head, and to pass over them takes longer
than the products. So P∘G = F∘X + P∘(g cᵀ) is made of what is there already, and the two terms of E are one
product, of [σa, σq] and [k, b].

Where a group of query heads shares a head of keys and values (Ainslie et al. 2023), k, v, b and c are
repeated for each of the group, and what goes to k and v is added up.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend

from .higher_order import batched, further, shared

aten = torch.ops.aten
PLAIN = F.scaled_dot_product_attention  # as it was before anything was put in its place


class _Way(NamedTuple):
    """Whether each query sees only the keys up to its own place, and the scale or None for 1/√E."""

    causal: bool
    scale: float | None


class _Attention(Function):
    """y = P v, by PyTorch's fused kernel for the CPU; `mask` is added, or None."""

    @staticmethod
    def forward(ctx, q, k, v, mask, way):
        y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, way.causal, attn_mask=mask, scale=way.scale
        )
        ctx.way = way
        ctx.save_for_backward(q, k, v, mask, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx, g):
        q, k, v, mask, y, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled() and not batched(g):
            return *_AttentionBackward.apply(g, q, k, v, mask, y.detach(), logsumexp, ctx), None, None
        if torch.is_grad_enabled():
            return *_gradients(g, q, k, v, mask, ctx.way), None, None
        P = _kept(ctx)
        _, D = _parts(P, y, g, _repeated(v, _group(q, k)))
        return *_gradients_at(P, D, g, q, k, _scale(q, ctx.way)), None, None


def _kept(ctx) -> Tensor:
    """P, where ctx is that of `_Attention`."""
    q, k, _, mask, _, _ = ctx.saved_tensors
    return shared(ctx, lambda: _weights(q, k, mask, ctx.way))


class _AttentionBackward(Function):
    """∂q, ∂k and ∂v. The kernel's y and logsumexp are functions of q, k and v, and the closed form knows
    that: no cotangent goes to them."""

    @staticmethod
    def forward(ctx, g, q, k, v, mask, y, logsumexp, of):
        ctx.of = of  # the ctx of `_Attention`, whose P both derivatives use
        ctx.save_for_backward(g, q, k, v, mask, y)
        ctx.set_materialize_grads(False)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, y, logsumexp, 0.0, of.way.causal, attn_mask=mask, scale=of.way.scale
        )

    @staticmethod
    def backward(ctx, a, b, c):
        g, q, k, v, mask, y = ctx.saved_tensors
        way = ctx.of.way
        if torch.is_grad_enabled():
            first = partial(_gradients, mask=mask, way=way)
            return *further(first, (g, q, k, v), a, b, c), None, None, None, None
        group, scale, P = _group(q, k), _scale(q, way), _kept(ctx.of)
        k, v = _repeated(k, group), _repeated(v, group)
        b, c = b if b is None else _repeated(b, group), c if c is None else _repeated(c, group)
        X, D = shared(ctx, lambda: _parts(P, y, g, v))
        E = _products([(a if a is None else scale * a, k), (scale * q, b)], P)
        inner = P * (E - (E * P).sum(-1, keepdim=True))
        weighted = inner * X if c is None else torch.addcmul(inner * X, P, g @ c.mT)
        H = torch.addcmul(weighted, P, weighted.sum(-1, keepdim=True), value=-1)
        to_g, to_v, to_q, to_k = inner @ v, inner.mT @ g, H @ k, H.mT @ q
        to_g = to_g if c is None else to_g + P @ c
        to_q = to_q if b is None else to_q + D @ b
        to_k = to_k if a is None else to_k + D.mT @ a
        return to_g, scale * to_q, _added(scale * to_k, group), _added(to_v, group), None, None, None, None


def _group(q: Tensor, k: Tensor) -> int:
    """How many heads of queries share one of keys and values."""
    return q.shape[-3] // k.shape[-3]


def _repeated(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.repeat_interleave(group, -3)


def _added(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.unflatten(-3, (-1, group)).sum(-3)


def _scale(q: Tensor, way: _Way) -> float:
    return 1 / math.sqrt(q.shape[-1]) if way.scale is None else way.scale


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, way: _Way) -> Tensor:
    """P; k may have fewer heads than q, or as many."""
    S = _scale(q, way) * (q @ _repeated(k, _group(q, k)).mT)
    if mask is not None:
        S = S + mask
    if way.causal:
        S = S.masked_fill(S.new_ones(S.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if mask is None:
        return S.softmax(-1)
    empty = S.isneginf().all(-1, keepdim=True)  # where all is masked, the kernel makes a row of zeros
    return torch.where(empty, 0.0, torch.where(empty, 0.0, S).softmax(-1))


def _parts(P: Tensor, y: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """X and D."""
    X = g @ v.mT - (g * y).sum(-1, keepdim=True)
    return X, P * X


def _products(pairs: list[tuple[Tensor | None, Tensor | None]], like: Tensor) -> Tensor:
    """The sum of left rightᵀ over the pairs of which both are there, as one product; or zeros."""
    there = [(left, right) for left, right in pairs if left is not None and right is not None]
    if not there:
        return torch.zeros_like(like)
    left, right = (torch.cat(side, -1) for side in zip(*there, strict=True))
    return left @ right.mT


def _gradients(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, way: _Way):
    """∂q, ∂k and ∂v, by operations that PyTorch differentiates to any order, and batches."""
    P, v = _weights(q, k, mask, way), _repeated(v, _group(q, k))
    _, D = _parts(P, P @ v, g, v)
    return _gradients_at(P, D, g, q, k, _scale(q, way))


def _gradients_at(
    P: Tensor, D: Tensor, g: Tensor, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """∂q, ∂k and ∂v of P and D."""
    group = _group(q, k)
    return (
        scale * (D @ _repeated(k, group)),
        _added(scale * (D.mT @ q), group),
        _added(P.mT @ g, group),
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """F.scaled_dot_product_attention with training's bits, or None where only another form is available.

    PyTorch is asked which kernel it would choose. The plain one it can differentiate itself; a mask that
    requires a gradient goes there, too. Where there is no batch axis, PyTorch adds one of length 1, and so
    does this function. It returns None for other shapes. Raises ValueError for dropout in a kernel whose
    random numbers the plain form does not draw.
    """
    q, k, v, mask = query, key, value, attn_mask
    given = (q, k, v, mask, dropout_p, is_causal)
    if q.device.type != "cpu" or not q.dim() == k.dim() == v.dim() or q.dim() not in (3, 4):
        if dropout_p and not _is_plain(given, scale, enable_gqa):
            raise ValueError(
                f"attention with dropout on {q.device.type}: PyTorch's fused kernel has no second derivative "
                "and its plain form draws other random numbers. Train with the plain form, too, by `with "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):` in the loss (in "
                'transformers attn_implementation="eager"), or without dropout in attention'
            )
        return None
    if _is_plain(given, scale, enable_gqa):
        return PLAIN(*given, scale=scale, enable_gqa=enable_gqa)
    if mask is not None:  # a copy, since the user may fill theirs anew before the derivative is pulled back
        fresh = torch.zeros_like(mask, dtype=q.dtype)
        mask = fresh.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask.clone()
    if q.dim() == 4:
        return _Attention.apply(q, k, v, mask, _Way(is_causal, scale))
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(0)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    return _Attention.apply(q, k, v, mask, _Way(is_causal, scale)).squeeze(0)


def _is_plain(given: tuple, scale: float | None, enable_gqa: bool) -> bool:
    """Whether PyTorch would choose the plain form for these arguments."""
    return torch._fused_sdp_choice(*given, scale=scale, enable_gqa=enable_gqa) == SDPBackend.MATH.value


@contextlib.contextmanager
def everywhere(replacement: Callable) -> Iterator[None]:
    """Inside, F.scaled_dot_product_attention is `replacement`, for functions of PyTorch that call it by that
    name where no mode listens, as F.multi_head_attention_forward does. Other threads get what it was."""
    original, here = F.scaled_dot_product_attention, threading.get_ident()

    def called(*args, **kwargs):
        return (replacement if threading.get_ident() == here else original)(*args, **kwargs)

    F.scaled_dot_product_attention = called
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
