"""torch.optim.Muon: its update.

Source: torch/optim/_muon.py; Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv
2502.16982) for the rates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .differentiated import laid_out_as, standing_for
from .update import Slots

PRECISION = torch.bfloat16  # in which PyTorch's Muon iterates, whatever the precision of the parameters


def muon(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.Muon: momentum, Nesterov, ns_coefficients, ns_steps, eps, weight decay, and
    adjust_lr_fn.

    The state has training's bits, so the iteration is done in bfloat16, as there. Rounding to bfloat16 is
    a staircase: its derivative is 0 or does not exist. What is differentiated is the same iteration at the
    same point in the gradient's own precision, that is, the update without the rounding.

    How large the rounding is: against float64 the direction is off by 1 to 2 % for random matrices of 16 × 8
    to 1024 × 256, and by 4 to 20 % where their singular values range over three powers of ten, since the
    iteration amplifies the small ones. On an MLP with 8, 16 and 3 units, AdamW on its biases, a central
    difference of trainings whose weights move by ±0.1 is 7 % off the derivative, by ±0.01 33 %, by ±0.001
    five times its size; without the rounding 2 %, 2e-4 and 7e-7. Leaving single examples out is predicted
    alike with it and without (correlations .956, .982, .985 and .956, .983, .985 for three outputs).
    """
    if grad.dim() != 2:
        raise ValueError(f"Muon updates matrices, and a parameter has shape {tuple(param.shape)}")
    grad = laid_out_as(grad, param)
    momentum, lr, decay = hyper["momentum"], hyper["lr"], hyper["weight_decay"]
    before = slots["momentum_buffer"] if slots else torch.zeros_like(grad)
    buffer = before.lerp(grad, 1 - momentum)
    update = grad.lerp(buffer, momentum) if hyper["nesterov"] else buffer
    rounded = orthogonalised(update, hyper, PRECISION).to(param.dtype)
    direction = standing_for(rounded, lambda: orthogonalised(update, hyper, param.dtype))
    rate = lr * _ratio(hyper["adjust_lr_fn"], *param.shape)
    return param.mul(1 - lr * decay).add(direction, alpha=-rate), {"momentum_buffer": buffer}


def orthogonalised(matrix: Tensor, hyper: dict, dtype: torch.dtype) -> Tensor:
    """Nearly U Vᵀ, of the singular value decomposition U S Vᵀ of `matrix`: ns_steps times

        X ← a X + (b X Xᵀ + c (X Xᵀ)²) X,    from X = matrix / ‖matrix‖,

    a Newton–Schulz iteration that brings every singular value into the vicinity of 1, in the precision
    `dtype`.
    """
    a, b, c = hyper["ns_coefficients"]
    if hyper["ns_steps"] >= 100:
        raise ValueError(f"ns_steps={hyper['ns_steps']}: torch.optim.Muon takes fewer than 100")
    x, tall = matrix.to(dtype), matrix.size(0) > matrix.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=hyper["eps"])
    for _ in range(hyper["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _ratio(adjust: str | None, rows: int, columns: int) -> float:
    """What the rate is multiplied by for a matrix of this shape."""
    if adjust is None or adjust == "original":
        return math.sqrt(max(1, rows / columns))
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if adjust == "spectral_unclamped" else 1.0
