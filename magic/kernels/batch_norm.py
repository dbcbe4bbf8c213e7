"""Batch normalisation, by the formulas that all share; its running statistics are part of the graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .higher_order import batched
from .normalisation import normalise
from .normalisation_formulas import Normalisation
from .valued import Valued

aten = torch.ops.aten


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """F.batch_norm (Ioffe & Szegedy 2015), differentiable in its running statistics, too.

    In training the running variance is the unbiased one, and an example of weight 0 moves the statistics
    like any other.
    """
    if x.numel() == 0 or (training and running_mean is not None and batched()):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        x = (x - running_mean.view(shape)) / (running_var + eps).sqrt().view(shape)
        x = x if weight is None else x * weight.view(shape)
        return x if bias is None else x + bias.view(shape)
    # PyTorch's kernel writes the statistics in place; these copies receive its bits
    after = (None, None) if running_mean is None else (_copied(running_mean), _copied(running_var))
    y, mean, rstd = normalise(x, weight, bias, _kind(x, after, momentum, eps))
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        variance = (rstd.pow(-2) - eps) * (count / (count - 1))
        for running, new, value in ((running_mean, mean, after[0]), (running_var, variance, after[1])):
            # the bits of PyTorch's kernel, as in training, and the derivative of the expression
            running.copy_(Valued.apply(running.lerp(new, momentum), value))
    return y


def _copied(statistic: Tensor) -> Tensor:
    return statistic.detach().clone()


def _kind(x: Tensor, after: tuple[Tensor | None, Tensor | None], momentum, eps: float) -> Normalisation:
    """Means over all but the channels, by PyTorch's kernels, which write the new statistics into `after`."""

    def forward(x, weight, bias):
        y, mean, rstd, reserve, kernel = torch._batch_norm_impl_index(
            x, weight, bias, *after, True, momentum, eps, torch.backends.cudnn.enabled
        )
        return y, mean, rstd, reserve, kernel

    def backward(g, kept, asked):
        reserve, kernel = kept.rest
        return aten._batch_norm_impl_index_backward(
            kernel, kept.x, g, kept.weight, *after, kept.mean, kept.rstd, True, eps, asked, reserve
        )

    affine = tuple(n if i == 1 else 1 for i, n in enumerate(x.shape))
    return Normalisation(x.shape, (0, *range(2, x.dim())), affine, forward, backward, eps)
