"""How the rules of SGD and Adam move with their hyper-parameters: ∂(what an update returns)/∂(η, λ, μ, β, ε).

A hyper-parameter is one number for all entries of a parameter, so the derivative by it is a sum over them:
⟨∂φ/∂s_{t+1}, ∂s_{t+1}/∂h⟩. The second factor is found here, in the terms that `update.py` describes; the
tests compare it with autograd of textbook formulas through the whole run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adam import adam
from .sgd import sgd
from .update import Slopes, Slots, Term, inverse, moments


def sgd_slopes(param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None) -> Slopes:
    """How `sgd` moves with its hyper-parameters: in the letters of `sgd_adjoint`, and with g = ±grad + λp."""
    lr, momentum, nesterov = hyper["lr"], hyper["momentum"], hyper["nesterov"]
    decayed = (-grad if hyper["maximize"] else grad).add(param, alpha=hyper["weight_decay"])
    if momentum == 0:
        return {"lr": [("param", -1.0, decayed)], "weight_decay": [("param", -lr, param)]}
    after = sgd(param, grad, slots, hyper)[1] if after is None else after
    buffer, ahead = after["momentum_buffer"], momentum if nesterov else 1.0

    def through_buffer(factor: float, x: Tensor) -> list[Term]:
        """Where b' moves by factor · x, and p' with it."""
        return [("momentum_buffer", factor, x), ("param", -lr * ahead * factor, x)]

    slopes = {"lr": [("param", -ahead, buffer)], "momentum": [], "dampening": []}
    first = "momentum_buffer" not in slots  # nothing is there to remember, and nothing is dampened
    slopes["weight_decay"] = through_buffer(1.0 if first else 1.0 - hyper["dampening"], param)
    if not first:
        slopes["momentum"] += through_buffer(1.0, slots["momentum_buffer"])
        slopes["dampening"] += through_buffer(-1.0, decayed)
    if nesterov:
        slopes["lr"].append(("param", -1.0, decayed))
        slopes["weight_decay"].append(("param", -lr, param))
        slopes["momentum"].append(("param", -lr, buffer))
    return slopes


def adam_slopes(param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None) -> Slopes:
    """How `adam` moves with its hyper-parameters: p' = p − α m'/D with α = η/c₁, D = √(v' + ρc₂)/√c₂ + ε and
    cᵢ = 1 − βᵢᵗ; under amsgrad, the largest v' so far takes the place of v'."""
    lr, (beta1, beta2), rho = hyper["lr"], hyper["betas"], hyper.get("eps_root") or 0.0
    decay, decoupled, amsgrad = hyper["weight_decay"], hyper["decoupled_weight_decay"], hyper["amsgrad"]
    after = adam(param, grad, slots, hyper)[1] if after is None else after
    grad = -grad if hyper["maximize"] else grad
    grad = grad if decoupled or decay == 0 else grad.add(param, alpha=decay)
    before = slots or moments(param) | {"max_exp_avg_sq": torch.zeros_like(param)}
    v = after["exp_avg_sq"]
    most = after["max_exp_avg_sq"] if amsgrad else v
    t = after["step"].item()
    c1, c2, c1_slope, c2_slope = 1 - beta1**t, 1 - beta2**t, -t * beta1 ** (t - 1), -t * beta2 ** (t - 1)
    root, alpha = (most + rho * c2 if rho else most).sqrt(), lr / c1
    denominator = (root / c2**0.5).add_(hyper["eps"])
    unit = after["exp_avg"] / denominator
    by_d = unit / denominator  # times α: how p' moves with D
    by_v = by_d * inverse(root)  # times α/2√c₂: with v'. It is 0 where v' is, as in `adam_adjoint`
    from_v = None if not amsgrad else _larger(v, before["max_exp_avg_sq"])

    through_m, through_v = _through_moments(alpha, c2, denominator, by_v, from_v)
    slopes = {
        "lr": [("param", -1 / c1, unit)],
        "weight_decay": [("param", -lr, param)],
        "beta1": [*through_m(1.0, before["exp_avg"] - grad), ("param", lr * c1_slope / c1**2, unit)],
        "beta2": through_v(1.0, before["exp_avg_sq"].addcmul(grad, grad, value=-1.0)),
        "eps": [("param", alpha, by_d)],
        "eps_root": [("param", alpha * c2**0.5 / 2, by_v)],
    }
    # D moves with c₂ by −√(v' + ρc₂)/2c₂√c₂, which is −(D − ε)/2c₂, and by ρ/2√(c₂(v' + ρc₂))
    by_c2 = alpha * c2_slope / (2 * c2)
    slopes["beta2"] += [("param", -by_c2, unit), ("param", by_c2 * hyper["eps"], by_d)]
    if rho:
        slopes["beta2"].append(("param", by_c2 * rho * c2**0.5, by_v))
    if decoupled:
        slopes["lr"].append(("param", -decay, param))
    else:
        slopes["weight_decay"] = through_m(1 - beta1, param) + through_v(2 * (1 - beta2), grad * param)
    return slopes


def _through_moments(alpha: float, c2: float, denominator: Tensor, by_v: Tensor, from_v: Tensor | None):
    """Two functions (factor, x) -> terms: where m' moves by factor · x, or v', and p' with it."""

    def through_m(factor: float, x: Tensor) -> list[Term]:
        return [("exp_avg", factor, x), ("param", -alpha * factor, x / denominator)]

    def through_v(factor: float, x: Tensor) -> list[Term]:
        most = x if from_v is None else x * from_v
        more = [] if from_v is None else [("max_exp_avg_sq", factor, most)]
        return [("exp_avg_sq", factor, x), ("param", alpha * factor / (2 * c2**0.5), by_v * most), *more]

    return through_m, through_v


def _larger(new: Tensor, old: Tensor) -> Tensor:
    """How the larger of the two moves with the new one: 1, 0, or a half at a tie, as autograd shares it."""
    return (new > old).to(new) + 0.5 * (new == old).to(new)
