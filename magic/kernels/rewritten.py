"""Operations whose second derivative is wrong or missing in PyTorch, written out in other operations.

They were found by going through PyTorch's own database of operators (test_operations.py), where single
pulls are compared with finite differences, and pulls of many cotangents at once with single ones. What
cannot be written out is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm written out, g v / ‖v‖ (Salimans & Kingma 2016).

    In PyTorch 2.15 the second derivative of the fused form is wrong on the CPU (gradgradcheck fails),
    without an error; `magic.engine.witness` found it.
    """
    kept = None if dim == -1 else dim % v.dim()  # -1: one norm for all of v
    axes = [i for i in range(v.dim()) if i != kept]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """torch.cdist written out: ‖a − b‖_p for each row a of x1 and b of x2.

    In PyTorch 2.15 its second derivative is wrong by up to 145 % where vmap batches it, without an error.
    Where a difference is 0, its derivatives are 0, as PyTorch has it. All differences are held at once:
    with P and R rows of M numbers, these are P × R × M.
    """
    size = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p == 0:
        return (size != 0).sum(-1) + 0.0 * size.sum(-1)  # constant, but part of the graph
    if p == float("inf"):
        return size.amax(-1) if size.shape[-1] else size.sum(-1)
    if p == 1:
        return size.sum(-1)
    powers = size.square() if p == 2 else _safely(size, lambda s: s**p)
    return _safely(powers.sum(-1), torch.sqrt if p == 2 else lambda s: s ** (1 / p))


def _safely(x: Tensor, f: Callable) -> Tensor:
    """f(x), but 0, with derivatives 0, where x is 0.

    There f may have an infinite slope, as the root has. To choose 0 with where() after f would multiply that
    slope by 0, which is NaN, so x is exchanged before f, too.
    """
    nought = x == 0
    return f(x.masked_fill(nought, 1.0)).masked_fill(nought, 0.0)


def native_layer_norm(x, normalized_shape, weight, bias, eps):
    """torch.native_layer_norm written out; returns (y, mean, rstd). PyTorch's fails without a weight."""
    axes = list(range(x.dim() - len(normalized_shape), x.dim()))
    mean = x.mean(axes, keepdim=True)
    rstd = ((x - mean).square().mean(axes, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def linear_cross_entropy(*args, options=None, **kwargs):
    """F.linear_cross_entropy, not in chunks. In chunks, PyTorch computes the gradient in the forward pass,
    and that gradient cannot be differentiated."""
    return F.linear_cross_entropy(*args, **kwargs)


def without_cudnn(f: Callable) -> Callable:
    """f, computed without cuDNN, whose recurrent layers have no second derivative."""

    def call(*args, **kwargs):
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = (
            False  # not by cudnn.flags(), which fails where TF32 is set as `fix` does
        )
        try:
            return f(*args, **kwargs)
        finally:
            torch.backends.cudnn.enabled = before

    return call


def max_unpool(plain: Callable, dimensions: int) -> Callable:
    """F.max_unpool, refused where two numbers go to one place: PyTorch's first derivative is wrong there."""

    def unpool(x, indices, *args, **kwargs):
        places = indices.flatten(-dimensions).sort(-1).values
        if (places[..., 1:] == places[..., :-1]).any():
            raise RuntimeError(
                f"F.{plain.__name__} puts two numbers in one place, and PyTorch's derivative counts both; "
                "pool without overlap (stride = kernel_size)"
            )
        return plain(x, indices, *args, **kwargs)

    return unpool


def refused(name: str, instead: str) -> Callable:
    """What raises an error in the place of an operation without a right derivative."""

    def call(*args, **kwargs):
        raise RuntimeError(f"{name} has a wrong derivative in PyTorch; use {instead}")

    return call


REWRITTEN: dict[Callable, Callable] = {
    torch._weight_norm: weight_norm,
    torch.cdist: cdist,
    torch.native_layer_norm: native_layer_norm,
    **{f: without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
if hasattr(F, "linear_cross_entropy"):  # new in PyTorch
    REWRITTEN[F.linear_cross_entropy] = linear_cross_entropy
# These are refused, always or for arguments with which their derivative is wrong.
REFUSED: dict[Callable, Callable] = {
    f: max_unpool(f, i) for i, f in enumerate((F.max_unpool1d, F.max_unpool2d, F.max_unpool3d), start=1)
}
for _f in (torch.as_strided_scatter, Tensor.as_strided_scatter):
    REFUSED[_f] = refused("as_strided_scatter", "torch.slice_scatter, or index_put")
