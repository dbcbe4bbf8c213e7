"""torch.optim.RMSprop: its update and the adjoint of that.

Source: torch/optim/rmsprop.py; Tieleman & Hinton 2012, lecture 6.5; Graves 2013 (arXiv 1308.0850) for the
centred form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .update import Hypers, Pull, Slots, inverse, pull_decay_and_sign


def rmsprop(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.RMSprop: alpha, eps, weight decay, momentum, centered, maximize."""
    alpha, momentum = hyper["alpha"], hyper["momentum"]
    if hyper["maximize"]:
        grad = -grad
    if not slots:
        names = ["square_avg"] + ["momentum_buffer"] * (momentum > 0) + ["grad_avg"] * hyper["centered"]
        slots = dict.fromkeys(names, torch.zeros_like(param, memory_format=torch.preserve_format))
    if hyper["weight_decay"] != 0:
        grad = grad.add(param, alpha=hyper["weight_decay"])
    new = {**slots, "square_avg": slots["square_avg"].mul(alpha).addcmul_(grad, grad, value=1 - alpha)}
    square = new["square_avg"]
    if hyper["centered"]:
        mean = new["grad_avg"] = slots["grad_avg"].lerp(grad, 1 - alpha)
        square = square.addcmul(mean, mean, value=-1)
    denominator = square.sqrt().add(hyper["eps"])
    if momentum > 0:
        buffer = new["momentum_buffer"] = slots["momentum_buffer"].mul(momentum).addcdiv_(grad, denominator)
        return param.add(buffer, alpha=-hyper["lr"]), new
    return param.addcdiv(grad, denominator, value=-hyper["lr"]), new


def rmsprop_adjoint(
    param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None
) -> Pull:
    """The adjoint of `rmsprop`: v' = αv + (1 − α)g², m' = αm + (1 − α)g, d = √(v' − m'²) + ε with
    centered, else √v' + ε; b' = μb + g/d, p' = p − ηb'.

    Where the root is 0 (no gradient has been, its square underflows, or, centred, it is steady to the last
    bit), the derivative by v' is taken as 0, as in `adam_adjoint`.
    """
    alpha, momentum, centered = hyper["alpha"], hyper["momentum"], hyper["centered"]
    if after is None:
        after = rmsprop(param, grad, slots, hyper)[1]
    if hyper["maximize"]:
        grad = -grad
    if hyper["weight_decay"] != 0:
        grad = grad.add(param, alpha=hyper["weight_decay"])
    square = after["square_avg"]
    if centered:
        square = square.addcmul(after["grad_avg"], after["grad_avg"], value=-1)
    root = square.sqrt()
    denominator = root + hyper["eps"]
    by_square = (-0.5 * grad).div_(denominator).div_(denominator).mul_(inverse(root))  # of g/d

    def pull(cotangent: dict[str, Tensor], hypers: Hypers | None = None) -> Tensor:
        to_param, to_square = cotangent["param"], cotangent["square_avg"]
        to_ratio = to_param * -hyper["lr"]  # of g/d
        if momentum > 0:
            to_ratio.add_(cotangent["momentum_buffer"])
            cotangent["momentum_buffer"].copy_(to_ratio * momentum)
        through = to_ratio * by_square
        to_square.add_(through)
        to_grad = (to_ratio / denominator).addcmul_(to_square, grad, value=2 * (1 - alpha))
        to_square.mul_(alpha)
        if centered:
            to_mean = cotangent["grad_avg"].addcmul_(through, after["grad_avg"], value=-2)
            to_grad.add_(to_mean, alpha=1 - alpha)
            to_mean.mul_(alpha)
        return pull_decay_and_sign(to_param, to_grad, hyper)

    return pull
