"""torch.optim.Adam and AdamW: their update and the adjoint of that.

Source: torch/optim/adam.py; Kingma & Ba 2015; Loshchilov & Hutter 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_hypers import of_adam
from .update import Hypers, Pull, Slots, inverse, moments, pull_decay_and_sign


def adam(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.Adam or AdamW: betas, eps, weight decay, amsgrad, maximize.

    `eps_root` is added to v̂ under the root, as in optax (Engstrom et al. 2025 use it for smoothness).
    torch.optim has no such option and ignores it in a parameter group, so a plain loop trains without it.
    """
    lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
    if hyper["maximize"]:
        grad = -grad
    if not slots:
        slots = moments(param)
        if hyper["amsgrad"]:
            slots["max_exp_avg_sq"] = slots["exp_avg_sq"]
    if hyper["weight_decay"] != 0:
        if hyper["decoupled_weight_decay"]:
            param = param.mul(1 - lr * hyper["weight_decay"])
        else:
            grad = grad.add(param, alpha=hyper["weight_decay"])
    step = slots["step"] + 1
    m = slots["exp_avg"].lerp(grad, 1 - beta1)
    v = slots["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    new = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if hyper["amsgrad"]:
        v = new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], v)
    t = step.item()
    if hyper.get("eps_root"):
        v = v + hyper["eps_root"] * (1 - beta2**t)
    denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(hyper["eps"])
    return param.addcdiv(m, denominator, value=-(lr / (1 - beta1**t))), new


def adam_adjoint(param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None) -> Pull:
    """The adjoint of `adam`: m' = β₁m + (1 − β₁)g, v' = β₂v + (1 − β₂)g², p' = p − α m'/(√v'/c + ε);
    with eps_root ρ, √(v' + ρc²)/c in place of √v'/c.

    d√v/dv is infinite at v = 0, where no gradient has been (an embedding row that no batch touched) or
    its square underflows. There m' is proportional to g, so the update m'/(c|g| + ε) has at g = 0 the
    slope that its numerator alone gives: the derivative by v is taken as 0, not as 0 · ∞.
    """
    (beta1, beta2), decay, decoupled = hyper["betas"], hyper["weight_decay"], hyper["decoupled_weight_decay"]
    if hyper["maximize"]:
        grad = -grad
    if decay != 0 and not decoupled:
        grad = grad.add(param, alpha=decay)
    given = (param, grad, slots, hyper, after)  # slots that are made here are not held
    after = after or adam(param, grad, slots, hyper | {"weight_decay": 0, "maximize": False})[1]
    t, m, v = after["step"].item(), after["exp_avg"], after["exp_avg_sq"]
    most = after["max_exp_avg_sq"] if hyper["amsgrad"] else v
    alpha, c = hyper["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5
    if hyper.get("eps_root"):
        most = most + hyper["eps_root"] * c**2
    root = most.sqrt()
    denominator = (root / c).add_(hyper["eps"])
    by_m = -alpha / denominator
    by_v = (by_m * m).div_(denominator).mul_(inverse(root))  # times −1 / (2c)
    if hyper["amsgrad"]:
        before = slots["max_exp_avg_sq"] if slots else torch.zeros_like(v)
        from_v = (v > before).to(v) + 0.5 * (v == before).to(v)  # as autograd shares a tie

    def pull(cotangent: dict[str, Tensor], hypers: Hypers | None = None) -> Tensor:
        to_param, to_m, to_v = cotangent["param"], cotangent["exp_avg"], cotangent["exp_avg_sq"]
        to_m.addcmul_(to_param, by_m)
        if hyper["amsgrad"]:
            to_most = cotangent["max_exp_avg_sq"].addcmul_(to_param, by_v, value=-0.5 / c)
            to_v.addcmul_(to_most, from_v)
            to_most.mul_(1 - from_v)
        else:
            to_v.addcmul_(to_param, by_v, value=-0.5 / c)
        to_grad = (to_m * (1 - beta1)).addcmul_(to_v, grad, value=2 * (1 - beta2))
        if hypers:
            of_adam(hypers, cotangent, to_grad, given)
        to_m.mul_(beta1)
        to_v.mul_(beta2)
        if decay != 0 and decoupled:
            to_param.mul_(1 - hyper["lr"] * decay)
            return pull_decay_and_sign(to_param, to_grad, hyper | {"weight_decay": 0})
        return pull_decay_and_sign(to_param, to_grad, hyper)

    return pull
