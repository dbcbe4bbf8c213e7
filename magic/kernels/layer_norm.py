"""Layer and group normalisation, which average within an example, by the formulas that all share.

Where an operation has a bias but no weight, or no numbers at all, PyTorch's own stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .normalisation import laid_out, normalise
from .normalisation_formulas import Normalisation

aten = torch.ops.aten


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """F.layer_norm (Ba et al. 2016)."""
    if (weight is None and bias is not None) or x.numel() == 0:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    shape, axes = tuple(normalized_shape), tuple(range(x.dim() - len(normalized_shape), x.dim()))
    kind = Normalisation(
        shape=x.shape,
        axes=axes,
        affine=(1,) * (x.dim() - len(shape)) + shape,
        forward=lambda x, weight, bias: aten.native_layer_norm(x, shape, weight, bias, eps),
        backward=lambda g, kept, asked: aten.native_layer_norm_backward(  # of a bias, its shape is read
            g, kept.x, shape, kept.mean, kept.rstd, kept.weight, kept.weight, asked
        ),
        eps=eps,
    )
    return normalise(x, weight, bias, kind)[0]


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
        forward=lambda x, weight, bias: aten.native_group_norm(laid_out(x, x), weight, bias, *sizes, eps),
        backward=lambda g, kept, asked: aten.native_group_norm_backward(
            g, laid_out(kept.x, kept.x), kept.mean, kept.rstd, kept.weight, *sizes, asked
        ),
        eps=eps,
    )
    return normalise(x, weight, bias, kind)[0]
