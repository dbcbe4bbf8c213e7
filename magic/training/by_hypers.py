"""The derivative of an update by its hyper-parameters η, λ, μ, δ, β₁, β₂, ε and ρ, for SGD, Adam and AdamW.

The adjoint of an update has on its way the cotangents of all that the update computes: of what it returns,
as a whole, and of the gradient g that it sees. A hyper-parameter is one number for all entries of a
parameter, so the derivative by it is a sum over what moves with it: ⟨the cotangent, how it moves⟩. If
g = ±grad + λp, say, the one by λ is ⟨ḡ, p⟩. The tests compare all of them with autograd of textbook formulas
through the whole run.

Both functions are called in the middle of a pull, and are given

    found      name -> (K,), the hyper-parameters that are asked for, to be added to
    cotangent  of what the update returns, by name, with all ways that lead to it inside the update
    to_grad    that of g
    given      what the update took, with g in the place of the gradient, and the slots after it or None
"""

from __future__ import annotations

import torch
from torch import Tensor

from .update import Hypers, Slots, inverse, moments

Given = tuple[Tensor, Tensor, Slots, dict, Slots | None]


def of_sgd(found: Hypers, cotangent: Slots, to_grad: Tensor, given: Given) -> None:
    """As in `sgd_adjoint`: b' = μb + (1 − δ)g, p' = p − η(g + μb') with Nesterov, else p − ηb'."""
    param, g, slots, hyper, after = given
    lr, momentum, nesterov, to_param = hyper["lr"], hyper["momentum"], hyper["nesterov"], cotangent["param"]
    along(found, to_grad, param, weight_decay=1.0)
    if nesterov or momentum == 0:
        along(found, to_param, g, lr=-1.0)
    if momentum == 0:
        return
    old, to_buffer = slots.get("momentum_buffer"), cotangent["momentum_buffer"]
    if old is not None:  # else nothing is there to remember, and nothing is dampened
        along(found, to_buffer, old, momentum=1.0)
        along(found, to_buffer, g, dampening=-1.0)
    if after is not None:
        new = after["momentum_buffer"]
    else:
        new = g if old is None else (momentum * old).add_(g, alpha=1 - hyper["dampening"])
    if nesterov:
        along(found, to_param, new, lr=-momentum, momentum=-lr)
    else:
        along(found, to_param, new, lr=-1.0)


def of_adam(found: Hypers, cotangent: Slots, to_grad: Tensor, given: Given) -> None:
    """p' = p − η/c₁ · m'/D with D = √(v' + ρc₂)/√c₂ + ε and cᵢ = 1 − βᵢᵗ, v' under amsgrad the largest.

    D moves with c₂ by −√(v' + ρc₂)/2c₂√c₂, which is −(D − ε)/2c₂, and by ρ/2√(c₂(v' + ρc₂)). It is
    computed once more, since an adjoint that held it would take memory where nobody asks.
    """
    param, g, slots, hyper, after = given
    lr, (beta1, beta2), rho, decay = hyper["lr"], hyper["betas"], hyper.get("eps_root"), hyper["weight_decay"]
    before, to_param = slots or moments(param), cotangent["param"]
    if after is None:
        after = {"step": before["step"] + 1, "exp_avg": before["exp_avg"].lerp(g, 1 - beta1)}
        v = after["exp_avg_sq"] = before["exp_avg_sq"].mul(beta2).addcmul_(g, g, value=1 - beta2)
        after["max_exp_avg_sq"] = torch.maximum(before.get("max_exp_avg_sq", v), v)
    most, t = after["max_exp_avg_sq" if hyper["amsgrad"] else "exp_avg_sq"], int(after["step"].item())
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    root = (most + rho * c2 if rho else most).sqrt()
    d = (root / c2**0.5).add_(hyper["eps"])
    by_beta1 = -t * beta1 ** (t - 1) * lr / c1**2
    by_beta2 = -t * beta2 ** (t - 1) * lr / c1 / (2 * c2)
    unit = after["exp_avg"] / d
    by_d = unit / d
    along(found, to_param, unit, lr=-1 / c1, beta1=by_beta1, beta2=-by_beta2)
    along(found, to_param, by_d, eps=lr / c1, beta2=by_beta2 * hyper["eps"])
    if rho:
        by_root = by_d * inverse(root)
        along(found, to_param, by_root, eps_root=lr / c1 * c2**0.5 / 2, beta2=by_beta2 * rho * c2**0.5)
    along(found, cotangent["exp_avg"], before["exp_avg"] - g, beta1=1.0)
    along(found, cotangent["exp_avg_sq"], before["exp_avg_sq"].addcmul(g, g, value=-1.0), beta2=1.0)
    if hyper["decoupled_weight_decay"]:
        along(found, to_param, param, lr=-decay, weight_decay=-lr)
    else:
        along(found, to_grad, param, weight_decay=1.0)


def along(found: Hypers, cotangent: Tensor, x: Tensor, **factors: float) -> None:
    """Add what comes by way of something that moves with each hyper-parameter by its factor · x, and whose
    cotangent this is, (K, *shape)."""
    asked = factors.keys() & found.keys()
    if asked:
        product = cotangent.flatten(1) @ x.flatten()
        for name in asked:
            found[name].add_(product, alpha=factors[name])
