"""torch.optim.Adafactor: its update.

Source: torch/optim/_adafactor.py; Shazeer & Stern 2018 (arXiv 1804.04235), from which PyTorch's differs in
its use of lr and of the first eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .differentiated import laid_out_as, standing_for
from .update import Slots


def adafactor(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.Adafactor: beta2_decay, eps, d, weight decay, maximize.

    The update is not elementwise: the second moment of a matrix is kept as one number for each row and one
    for each column, and the size of the step depends on the parameter's and on the update's, by their root
    mean squares. PyTorch reads these two numbers out of tensors; the derivative goes through them.
    """
    lr, (eps1, eps2) = hyper["lr"], hyper["eps"]
    eps1 = torch.finfo(param.dtype).eps if eps1 is None else eps1
    grad = laid_out_as(grad, param)
    if hyper["maximize"]:
        grad = -grad
    step = slots.get("step", torch.zeros((), dtype=torch.int64, device="cpu")) + 1
    t = float(step.item())
    relative = _number(param.norm(2)) / (param.numel() ** 0.5)
    alpha = relative.clamp(min=eps2) * min(lr, 1 / (t**0.5))
    if hyper["weight_decay"] != 0:
        param = param.mul(1 - lr * hyper["weight_decay"])
    estimate, new = _second_moment(grad, slots, t ** hyper["beta2_decay"], eps1)
    update = estimate.clamp(min=eps1 * eps1).rsqrt().mul(grad)
    clipped = (_number(update.norm(2)) / ((update.numel() ** 0.5) * hyper["d"])).clamp(min=1.0)
    factor = -alpha / clipped
    moved = param.add(update, alpha=factor.item())
    return standing_for(moved, lambda: param + factor.to(param) * update), {"step": step, **new}


def _number(x: Tensor) -> Tensor:
    """A tensor's only number as Python would go on with it: in double precision, on the CPU."""
    return x.to("cpu", torch.float64)


def _second_moment(grad: Tensor, slots: Slots, weight: float, eps: float) -> tuple[Tensor, Slots]:
    """The estimate of the gradient's square, and the slots that it is made from; `weight` is 1 − β₂."""
    if grad.dim() < 2:
        before = slots["variance"] if slots else torch.zeros_like(grad, memory_format=torch.preserve_format)
        variance = before.lerp(grad * grad, weight)
        return variance, {"variance": variance}
    new = {}
    for name, axis in (("row_var", -1), ("col_var", -2)):
        mean = torch.linalg.vector_norm(grad, dim=axis, keepdim=True).square().div(grad.size(axis))
        new[name] = (slots[name] if slots else torch.zeros_like(mean)).lerp(mean, weight)
    rows, columns = new["row_var"], new["col_var"]
    return (rows @ columns).div(rows.mean(dim=-2, keepdim=True).clamp(min=eps)), new
