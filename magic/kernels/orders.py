"""Derivatives of a higher order than a training step needs by itself.

A step's pull is a second derivative, and for that the operations here have closed forms. A loss that
takes gradients itself (a gradient penalty, a physics-informed loss, an inner step of MAML) makes it a
third or a fourth. There PyTorch's own first derivative stands in, which it can differentiate as often
as one likes; only speed is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def shared(ctx, make: Callable):
    """What a pull needs of the trace alone: made for the first targets, kept for the others."""
    if not hasattr(ctx, "shared"):
        ctx.shared = make()
    return ctx.shared


def batched(g: Tensor | None = None) -> bool:
    """Whether the caller is inside a transform of torch.func, or g is a batch of gradients.

    The Functions here have no rule for either: they would lose the graph.
    """
    if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):  # autograd.grad(is_grads_batched)
        return True
    return torch._C._are_functorch_transforms_active()


def further(first: Callable, inputs: tuple[Tensor | None, ...], *cotangents: Tensor | None):
    """The pull of the cotangents through first(*inputs), with a graph of its own.

    first   inputs -> tensors, by operations that PyTorch can differentiate to any order
    returns the product for each input, None for those that need none
    """
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        # views, so that the products depend on the inputs, but are stopped at them
        held = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = first(*held)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [
            (y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad
        ]
        into = [x for x in held if x is not None and x.requires_grad]
        if not pairs or not into:
            return (None,) * len(inputs)
        ys, cs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, into, cs, create_graph=True, allow_unused=True))
        return tuple(next(found) if x is not None and x.requires_grad else None for x in held)
