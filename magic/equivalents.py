"""Equivalent expressions for operations that PyTorch cannot differentiate twice.

States are always computed by the operations that training uses. The adjoint only linearises around
them, so there another expression of the same function may stand in: its value differs by rounding,
its derivative exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """F.batch_norm written out. PyTorch's own has no derivative with respect to the running statistics.

    Ioffe & Szegedy 2015. In training the running variance is the unbiased one, and weight-0 examples
    move the statistics like any other.
    """
    axes = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training:
        count = x.numel() // x.shape[1]
        mean = x.mean(axes)
        variance = (x - mean.view(shape)).square().mean(axes)
        if running_mean is not None:
            running_mean.copy_(running_mean.lerp(mean, momentum))
            running_var.copy_(running_var.lerp(variance * (count / (count - 1)), momentum))
    else:
        mean, variance = running_mean, running_var
    x = (x - mean.view(shape)) / (variance + eps).sqrt().view(shape)
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _torch_batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm written out, g v / ‖v‖ (Salimans & Kingma 2016).

    In PyTorch 2.15 the second derivative of the fused form is wrong on the CPU (gradgradcheck fails),
    without an error; `magic.witness` found it.
    """
    kept = None if dim == -1 else dim % v.dim()  # -1: one norm for all of v
    axes = [i for i in range(v.dim()) if i != kept]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def _without_cudnn(f: Callable) -> Callable:
    def call(*args, **kwargs):
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False  # cudnn.flags() would read a TF32 switch that `fix` has split
        try:
            return f(*args, **kwargs)
        finally:
            torch.backends.cudnn.enabled = before

    return call


EQUIVALENT: dict[Callable, Callable] = {
    F.batch_norm: batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch._weight_norm: weight_norm,
    **{f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}


class _Replace(TorchFunctionMode):
    """Calls an equivalent of an operation in its place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return EQUIVALENT.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def differentiable():
    """Inside it, operations without a second derivative are replaced by equivalent ones.

    Batch and weight normalisation are written out, attention takes its plain form instead of a fused
    kernel, and recurrent layers leave cuDNN.
    """
    with sdpa_kernel(SDPBackend.MATH), _Replace():
        yield
