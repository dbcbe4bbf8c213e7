"""Average pooling, with quicker kernels for the pull back.

Means over windows of k × k that tile the image are a linear map, and so is its transpose. PyTorch's kernels
go pixel by pixel; sums of strided slices are four to six times as fast on a CPU. They are used only in
the pull, whose last bit may differ; value and gradient keep PyTorch's kernels, and so training's bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .higher_order import batched

aten = torch.ops.aten


class _AvgPool(Function):
    """The means of the windows."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.k, ctx.shape = k, x.shape
        return aten.avg_pool2d(x, k)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            return (_spread if batched(g) else _AvgPoolBackward.apply)(g, ctx.k, ctx.shape), None
        k, g = ctx.k, g / ctx.k**2
        high, wide = g.shape[-2] * k, g.shape[-1] * k
        covers = (high, wide) == ctx.shape[-2:]
        out = g.new_empty(ctx.shape) if covers else g.new_zeros(ctx.shape)
        for i in range(k * k):
            out[..., i // k : high : k, i % k : wide : k] = g
        return out, None


class _AvgPoolBackward(Function):
    """The transpose, which spreads each number over its window; the transpose of that are means again."""

    @staticmethod
    def forward(ctx, g, k, shape):
        ctx.k, ctx.high, ctx.wide = k, g.shape[-2] * k, g.shape[-1] * k
        return _spread(g, k, shape)

    @staticmethod
    def backward(ctx, c):
        k = ctx.k
        rows = sum(c[..., i : ctx.high : k, :] for i in range(k))
        return sum(rows[..., j : ctx.wide : k] for j in range(k)) / k**2, None, None


def _spread(g: Tensor, k: int, shape) -> Tensor:
    """PyTorch's own transpose. It reads the shape of its second argument only, so that is a single number."""
    like = g.new_empty(1).expand(shape)
    return aten.avg_pool2d_backward(g, like, [k, k], [k, k], [0, 0], False, True, None)


def avg_pool2d(
    x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """F.avg_pool2d; windows that are not square, or do not tile the image, keep PyTorch's own derivatives."""
    k = kernel_size if isinstance(kernel_size, int) else None
    tiles = k is not None and stride in (None, k) and padding == 0 and not ceil_mode
    if x.dim() == 4 and tiles and divisor_override is None:
        return _AvgPool.apply(x, k)
    return F.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override=divisor_override
    )
