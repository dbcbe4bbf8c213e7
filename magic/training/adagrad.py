"""torch.optim.Adagrad: its update.

Source: torch/optim/adagrad.py; Duchi, Hazan & Singer 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .differentiated import root
from .update import Slots


def adagrad(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.Adagrad: lr_decay, eps, weight decay, initial_accumulator_value, maximize."""
    if hyper["maximize"]:
        grad = -grad
    slots = slots or adagrad_start(param, hyper)
    step = slots["step"] + 1
    if hyper["weight_decay"] != 0:
        grad = grad.add(param, alpha=hyper["weight_decay"])
    rate = hyper["lr"] / (1 + (step.item() - 1) * hyper["lr_decay"])
    squares = slots["sum"].addcmul(grad, grad, value=1)
    param = param.addcdiv(grad, root(squares).add(hyper["eps"]), value=-rate)
    return param, {"step": step, "sum": squares}


def adagrad_start(param: Tensor, hyper: dict) -> Slots:
    """The slots of a parameter before its first update, which torch.optim.Adagrad makes at once."""
    first = torch.full_like(param, hyper["initial_accumulator_value"], memory_format=torch.preserve_format)
    return {"step": torch.zeros((), dtype=torch.int64, device="cpu"), "sum": first.detach()}
