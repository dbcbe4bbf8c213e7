"""What the checkers of chapter 04 say of right answers, and of the mistakes that are easily made."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vjp

from tests.support.answers import fails, passes


def pull_decayed(to_theta, pull, lr, decay):
    curved, scores = pull(-lr * to_theta)
    return (1 - lr * decay) * to_theta + curved, scores


def decayed_with(factor, sign=-1, own=1):
    """Variants of the above: another factor of Δ', another sign of ḡ, or Δ' left out."""

    def answer(to_theta, pull, lr, decay):
        curved, scores = pull(sign * lr * to_theta)
        return own * factor(lr, decay) * to_theta + curved, scores

    return answer


def decayed_scores_too(to_theta, pull, lr, decay):
    curved, _ = pull(-lr * to_theta)
    return (1 - lr * decay) * to_theta + curved, pull(-lr * (1 - lr * decay) * to_theta)[1]


def pull_nesterov(to_theta, to_m, pull, lr, mu):
    m_bar = to_m - lr * mu * to_theta
    curved, scores = pull(m_bar - lr * to_theta)
    return (to_theta + curved, mu * m_bar), scores


def nesterov_with(g_bar, m_bar=lambda to_theta, to_m, lr, mu: to_m - lr * mu * to_theta):
    def answer(to_theta, to_m, pull, lr, mu):
        curved, scores = pull(g_bar(to_theta, to_m, lr, mu))
        return (to_theta + curved, mu * m_bar(to_theta, to_m, lr, mu)), scores

    return answer


def whole(a, b, lr, mu):
    return b - lr * (1 + mu) * a


def adam_diagonal(g, m, v, count, lr, beta1, beta2, eps, *, by_m=True, by_v=True, c=None, safe=True):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    alpha, c = lr / (1 - beta1**count), c or (1 - beta2**count) ** 0.5
    root = v.sqrt()
    r = root / c + eps
    slope = alpha * m / (2 * c * r**2 * root)
    slope = torch.where(root > 0, slope, 0.0) if safe else slope
    return by_m * -(1 - beta1) * alpha / r + by_v * 2 * (1 - beta2) * g * slope


def counting(change):
    def answer(g, m, v, count, *options):
        return adam_diagonal(g, m, v, change(count), *options)

    return answer


def directional(losses, theta, direction):
    return jvp(losses, (theta,), (direction,))[1]


def twice(losses, theta, direction):
    losses(theta)
    return directional(losses, theta, direction)


def by_difference(losses, theta, direction):
    return (losses(theta + 1e-6 * direction) - losses(theta - 1e-6 * direction)) / 2e-6


def pull_held(objective, held, theta, cotangent):
    return vjp(lambda theta: grad(objective)(theta, held(theta)), theta)[1](cotangent)[0]


def detached(objective, held, theta, cotangent):
    z = held(theta)
    return vjp(lambda theta: grad(objective)(theta, z), theta)[1](cotangent)[0]


def forwards(objective, held, theta, cotangent):
    def fixed(theta):
        return torch.func.grad(objective)(theta, held(theta))

    return torch.func.jvp(fixed, (theta,), (cotangent,))[1]


def never_fixed(objective, held, theta, cotangent):
    return vjp(grad(lambda theta: objective(theta, held(theta))), theta)[1](cotangent)[0]


@pytest.mark.parametrize(
    "number, answer",
    [
        ("04.1", pull_decayed),
        ("04.2", pull_nesterov),
        ("04.3", adam_diagonal),
        ("04.4", directional),
        ("04.4", lambda losses, theta, d: jacrev(losses)(theta) @ d),
        ("04.5", pull_held),
    ],
)
def test_a_right_answer_is_right(number, answer):
    passes(number, answer)


WRONG = [
    ("04.1", decayed_with(lambda lr, decay: 1), ["with no decay", "parameters with decay", "left out"]),
    ("04.1", decayed_with(lambda lr, decay: 1 - decay), ["without the rate"]),
    ("04.1", decayed_with(lambda lr, decay: 1 + lr * decay), ["the wrong sign"]),
    ("04.1", decayed_with(lambda lr, decay: 1, own=0), ["with no decay", "θ' contains θ"]),
    ("04.1", decayed_with(lambda lr, decay: 1 - lr * decay, sign=1), ["lacks the minus sign"]),
    ("04.1", decayed_scores_too, ["the scores with decay", "does not depend on the weights"]),
    ("04.1", lambda *a: pull_decayed(*a)[0], ["asked for are two things"]),
    ("04.2", nesterov_with(lambda a, b, lr, mu: b - lr * a), ["right for", "ordinary momentum"]),
    ("04.2", nesterov_with(lambda a, b, lr, mu: b - lr * mu * a), ["Δ_θ, μ = 0", "by way of m' too"]),
    ("04.2", nesterov_with(lambda a, b, lr, mu: -lr * (1 + mu) * a),
     ["wrong for Δ_θ, momentum that goes on", "Δ'_m belongs to ḡ"]),
    ("04.2", nesterov_with(whole, whole), ["wrong for Δ_m, momentum", "take m̄, not ḡ"]),
    ("04.2", nesterov_with(whole, lambda a, b, lr, mu: b - lr * a), ["Δ_m", "with the factor ημ"]),
    ("04.2", nesterov_with(whole, lambda a, b, lr, mu: b), ["Δ_m", "by way of θ' is left out"]),
    ("04.2", lambda *a: pull_nesterov(*a)[0] + (pull_nesterov(*a)[1],), ["two things"]),
    ("04.3", lambda *a: adam_diagonal(*a, by_v=False), ["by way of v'"]),
    ("04.3", lambda *a: adam_diagonal(*a, by_m=False), ["by way of m'"]),
    ("04.3", lambda *a: adam_diagonal(*a, safe=False), ["gradients have all been 0", "not finite"]),
    ("04.3", counting(lambda count: count + 1), ["the first update", "includes this update already"]),
    ("04.3", counting(lambda count: 10**6), ["the corrections by count"]),
    ("04.3", lambda *a: -adam_diagonal(*a), ["the sign is the other way round"]),
    ("04.4", twice, ["one pass", "called 2 times"]),
    ("04.4", by_difference, ["finite difference", "exact"]),
    ("04.4", lambda f, th, d: directional(f, th, d / d.norm()), ["any direction", "length 1"]),
    ("04.4", lambda f, th, d: directional(f, th, d).mean(), ["the shape is ()"]),
    ("04.4", lambda f, th, d: directional(f, th, d) / 3, ["1/B once too often"]),
    ("04.4", lambda f, th, d: f(th), ["these are the losses"]),
    ("04.5", detached, ["right for a part that does not move", "the first term only"]),
    ("04.5", forwards, ["right for", "wrong for a part of other examples", "takes the transpose"]),
    ("04.5", never_fixed, ["z moved while the gradient was taken"]),
    ("04.5", lambda *a: pull_held(*a) - detached(*a), ["the second term only"]),
]  # fmt: skip


@pytest.mark.parametrize("number, answer, words", WRONG, ids=[f"{n} {w[-1][:30]}" for n, _, w in WRONG])
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    fails(number, answer, words)
