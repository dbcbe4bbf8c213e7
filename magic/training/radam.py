"""torch.optim.RAdam: its update.

Source: torch/optim/radam.py; Liu et al. 2020 (arXiv 1908.03265).
"""

from __future__ import annotations

from torch import Tensor

from .differentiated import root
from .update import Slots, moments


def radam(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.RAdam: betas, eps, weight decay of both kinds, maximize.

    In the first steps the second moment is too uncertain to divide by, and the update is that of momentum.
    """
    lr, (beta1, beta2), decay = hyper["lr"], hyper["betas"], hyper["weight_decay"]
    if hyper["maximize"]:
        grad = -grad
    if not slots:
        slots = moments(param)
    if decay != 0 and hyper["decoupled_weight_decay"]:
        param = param.mul(1 - lr * decay)
    elif decay != 0:
        grad = grad.add(param, alpha=decay)
    step = slots["step"] + 1
    t = step.item()
    m = slots["exp_avg"].lerp(grad, 1 - beta1)
    v = slots["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    update, correction = m / (1 - beta1**t) * lr, 1 - beta2**t
    longest = 2 / (1 - beta2) - 1  # the length of the average that the second moment is, and its limit
    length = longest - 2 * t * (beta2**t) / correction
    if length > 5.0:
        rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        update = update * ((correction**0.5) / root(v).add(hyper["eps"])) * rectified
    return param.add(update, alpha=-1.0), {"step": step, "exp_avg": m, "exp_avg_sq": v}
