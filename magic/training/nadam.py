"""torch.optim.NAdam: its update.

Source: torch/optim/nadam.py; Dozat 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .differentiated import root
from .update import Slots, moments


def nadam(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.NAdam: betas, eps, momentum_decay, weight decay of both kinds, maximize.

    The slot "mu_product" is the product of the momenta so far, a number of the hyper-parameters alone that
    has no derivative. PyTorch's is in the precision of `torch.get_default_dtype()`; kept are its bits, as an
    integer.
    """
    lr, (beta1, beta2), decay = hyper["lr"], hyper["betas"], hyper["weight_decay"]
    if hyper["maximize"]:
        grad = -grad
    if not slots:
        one = torch.ones((), dtype=_get_scalar_dtype(), device="cpu")
        slots = moments(param) | {"mu_product": _bits(one)}
    if decay != 0 and hyper["decoupled_weight_decay"]:
        param = param.mul(1 - lr * decay)
    elif decay != 0:
        grad = grad.add(param, alpha=decay)
    step = slots["step"] + 1
    t, slower = step.item(), hyper["momentum_decay"]
    mu = beta1 * (1.0 - 0.5 * (0.96 ** (t * slower)))
    mu_next = beta1 * (1.0 - 0.5 * (0.96 ** ((t + 1) * slower)))
    kept = slots["mu_product"]
    made = kept.view(torch.float64 if kept.dtype == torch.int64 else torch.float32) * mu
    product = made.item()
    m = slots["exp_avg"].lerp(grad, 1 - beta1)
    v = slots["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = root(v.div(1 - beta2**t)).add(hyper["eps"])
    param = param.addcdiv(grad, denominator, value=-lr * (1.0 - mu) / (1.0 - product))
    param = param.addcdiv(m, denominator, value=(-lr * mu_next) / (1.0 - product * mu_next))
    return param, {"step": step, "mu_product": _bits(made), "exp_avg": m, "exp_avg_sq": v}


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
