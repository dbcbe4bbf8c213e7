"""Derivatives of a higher order than a training step needs by itself.

A training step takes one derivative, the gradient, and its adjoint takes the second. For these two the
operations of this wing have closed forms. A loss that takes gradients itself (a gradient penalty, a
physics-informed loss, an inner step of MAML) makes it a third or a fourth. There PyTorch's own
differentiation of the first derivative stands in, which can be repeated as often as one likes; the
numbers are equally exact; only speed is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def shared(ctx: Any, make: Callable[[], T]) -> T:
    """What the pulls of all targets have in common: made once, and kept with the Function's ctx.

    Targets are pulled back a few at a time through one graph, so a backward method is called several times
    with the same ctx and other cotangents. Invariant: what `make` returns depends on saved tensors alone.
    Made of a cotangent, it would be wrong for the next targets, and under vmap it would be a batch that no
    longer exists outside. A ctx keeps one such thing.
    """
    if not hasattr(ctx, "shared"):
        ctx.shared = make()
    return ctx.shared


def batched(g: Tensor | None = None) -> bool:
    """Whether the caller is inside a transform of torch.func, or g is a batch of gradients.

    Why it matters: the autograd Functions of this wing have no rule for either. Inside torch.func.grad or
    torch.func.vmap their `apply` raises. Given a batch of gradients, as autograd.grad(is_grads_batched=True)
    hands to a backward, a Function returns the right numbers without a graph, and what is differentiated
    next lacks a part. So where this is true, callers use PyTorch's own operations, which have the rules.
    """
    if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):  # autograd.grad(is_grads_batched)
        return True
    return torch._C._are_functorch_transforms_active()


def further(
    first: Callable, inputs: tuple[Tensor | None, ...], *cotangents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The pull of the cotangents through first(*inputs), with a graph of its own.

    first   inputs -> a tensor, or tensors and None, by operations that PyTorch differentiates to any order
    returns the product for each input, None for those that need none

    The derivative is taken with respect to views of the inputs. It stops at the views, so nothing that the
    inputs were made of is walked through here. But a view's graph leads on to its input, so the products,
    which are computed from the views, can be differentiated in the inputs, and so to any order.
    """
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        held = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = first(*held)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        both = zip(outputs, cotangents, strict=True)
        pairs = [(y, c) for y, c in both if c is not None and y is not None and y.requires_grad]
        into = [x for x in held if x is not None and x.requires_grad]
        if not pairs or not into:
            return (None,) * len(inputs)
        ys, cs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, into, cs, create_graph=True, allow_unused=True))
        return tuple(next(found) if x is not None and x.requires_grad else None for x in held)
