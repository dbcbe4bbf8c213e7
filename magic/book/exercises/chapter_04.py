"""The checkers of chapter 04: steps pulled back, Adam's diagonal, slopes of a batch, a part held fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .judging import Cases, exercise

RATE, SIZE, TARGETS = 0.3, 3, 2


class Batch:
    """One batch of three examples for four parameters, with everything of its step at one state."""

    def __init__(self) -> None:
        self.chance = torch.Generator().manual_seed(4)
        self.x, self.y = self.draw(SIZE, 4), self.draw(SIZE)
        self.theta, self.m = self.draw(4), self.draw(4)
        self.weight = 1 + 0.3 * self.draw(SIZE)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.chance, dtype=torch.float64)

    def losses(self, theta: Tensor) -> Tensor:
        return (torch.tanh(self.x @ theta) - self.y) ** 2

    def gradient(self, theta: Tensor, weight: Tensor) -> Tensor:
        return torch.func.grad(lambda theta: (weight * self.losses(theta)).sum() / SIZE)(theta)

    def pull(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """ḡ, one or a row for each target -> H ḡ and ∇ℓᵢ · ḡ / B."""
        pull = torch.func.vjp(self.gradient, self.theta, self.weight)[1]
        return pull(cotangents) if cotangents.dim() == 1 else torch.vmap(pull)(cotangents)

    def through(self, step: Callable, *cotangents: Tensor) -> tuple[Tensor, ...]:
        """The cotangents of θ, m, … and of the weights, by PyTorch through the whole step."""
        state = (self.theta, self.m)[: len(cotangents)]
        pull = torch.func.vjp(step, *state, self.weight)[1]
        return torch.vmap(pull)(cotangents if len(cotangents) > 1 else cotangents[0])


def _two(cases: Cases, case: str, got: Any, form: str) -> tuple[Any, Any]:
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        cases.true(case, False, f"asked for are two things, {form}")
    return got[0], got[1]


@exercise("04.1", "the way back through a step with weight decay")
def pull_decayed(answer: Any) -> None:
    b = Batch()
    cases = Cases({"the rate": RATE, "the factor 1/B": 1 / SIZE})
    to_theta = b.draw(TARGETS, 4)
    curved = b.pull(-RATE * to_theta)[0]
    for decay, name in ((0.0, "no decay"), (0.5, "decay")):
        want, want_scores = b.through(
            lambda theta, weight, decay=decay: theta - RATE * (b.gradient(theta, weight) + decay * theta),
            to_theta,
        )
        got = cases.call(f"a step with {name}", answer, to_theta, b.pull, RATE, decay)
        pulled, scores = _two(cases, f"a step with {name}", got, "Δ_θ and the scores")
        suspects = {
            "the decay is left out": to_theta + curved,
            "the decay is there without the rate: its Jacobian in θ' is ηλI": (1 - decay) * to_theta + curved,
            "the decay has the wrong sign": (1 + RATE * decay) * to_theta + curved,
            "Δ' itself is missing: θ' contains θ": curved,
            "ḡ lacks the minus sign of the step": to_theta - curved - RATE * decay * to_theta,
        }
        cases.same(f"Δ of the parameters with {name}", pulled, want, suspects)
        decayed = b.pull(-RATE * (1 - RATE * decay) * to_theta)[1]
        more = {"the decay is in them, and λθ does not depend on the weights": decayed}
        cases.same(f"the scores with {name}", scores, want_scores, more)


@exercise("04.2", "the way back through Nesterov's momentum")
def pull_nesterov(answer: Any) -> None:
    b = Batch()
    cases = Cases({"the rate": RATE, "the factor 1/B": 1 / SIZE})
    some, none = b.draw(TARGETS, 4), torch.zeros(TARGETS, 4, dtype=torch.float64)
    to_theta = b.draw(TARGETS, 4)
    for case, mu, to_m in (
        ("μ = 0", 0.0, none),
        ("momentum", 0.6, none),
        ("momentum that goes on", 0.6, some),
    ):
        cases.scalars = {"the rate": RATE, "the factor 1/B": 1 / SIZE} | ({"μ": mu} if mu else {})

        def step(theta: Tensor, m: Tensor, weight: Tensor, mu: float = mu) -> tuple[Tensor, Tensor]:
            g = b.gradient(theta, weight)
            m = mu * m + g
            return theta - RATE * (g + mu * m), m

        want_theta, want_m, want_scores = b.through(step, to_theta, to_m)
        form = "(Δ_θ, Δ_m) and the scores"
        got = cases.call(case, answer, to_theta, to_m, b.pull, RATE, mu)
        pair, scores = _two(cases, case, got, form)
        pulled, buffer = _two(cases, case, pair, "Δ_θ and Δ_m, before the scores")
        ways = {
            "this is ordinary momentum; with Nesterov's, g also reaches θ' directly": to_m - RATE * to_theta,
            "g reaches θ' directly, and by way of m' too": to_m - RATE * mu * to_theta,
            "g reaches m' and θ' directly, and θ' by way of m' too, with μ once more":
                to_m - RATE * (1 + mu**2) * to_theta,
            "what arrives at m' is left out: Δ'_m belongs to ḡ": -RATE * (1 + mu) * to_theta,
        }  # fmt: skip
        curved = {reason: to_theta + b.pull(bar)[0] for reason, bar in ways.items()}
        cases.same(f"Δ_θ, {case}", pulled, want_theta, curved)
        memories = {
            "m does not reach θ' by the direct way of g: take m̄, not ḡ": mu * (want_m / mu - RATE * to_theta)
            if mu
            else want_m,
            "what comes by way of θ' is left out": mu * to_m,
            "this is ordinary momentum; here m' stands in θ' with the factor ημ": mu
            * (to_m - RATE * to_theta),
        }
        cases.same(f"Δ_m, {case}", buffer, want_m, memories)
        cases.same(f"the scores, {case}", scores, want_scores, {r: b.pull(bar)[1] for r, bar in ways.items()})


@exercise("04.3", "Adam's diagonal ∂θ'/∂g")
def adam_diagonal(answer: Any) -> None:
    b = Batch()
    g, m, v = b.draw(5), b.draw(5), b.draw(5) ** 2
    zero = torch.zeros_like(g)
    settings = {
        "the first update": (g, zero, zero, 1, 1e-1),
        "a later update": (g, m, v, 4, 1e-2),
        "another ε": (g, m, v, 9, 0.5),
        "parameters whose gradients have all been 0": (zero, zero, zero, 3, 1e-3),
    }
    cases = Cases({"the rate": 0.1, "1 − β₁": 0.2})
    for case, (g, m, v, count, eps) in settings.items():
        options = 0.1, 0.8, 0.95, eps
        want = _diagonal((g, m, v), count, options)
        suspects = {
            "v' is held fixed: g also reaches θ' by way of v'": _diagonal((g, m, v), count, options, "v"),
            "m' is held fixed: g also reaches θ' by way of m'": _diagonal((g, m, v), count, options, "m"),
            "the corrections by count are left out": _diagonal((g, m, v), 10**6, options),
            "count includes this update already": _diagonal((g, m, v), count + 1, options),
        }
        cases.same(case, cases.call(case, answer, g, m, v, count, *options), want, suspects)


def _diagonal(before: tuple[Tensor, ...], count: int, options: tuple[float, ...], fixed: str = "") -> Tensor:
    """By autograd through Adam's update of (g, m, v); `fixed` names an average that does not move."""
    (g, m, v), (lr, beta1, beta2, eps) = before, options
    g = g.clone().requires_grad_()
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    m, v = (m.detach() if fixed == "m" else m), (v.detach() if fixed == "v" else v)
    c = (1 - beta2**count) ** 0.5
    root = torch.where(v > 0, v, 1.0).sqrt()  # autograd would make NaN of √0
    r = torch.where(v > 0, root, 0.0) / c + eps
    moved = -lr / (1 - beta1**count) * m / r
    return torch.autograd.grad(moved.sum(), g)[0]


@exercise("04.4", "the directional derivatives of a batch in one pass")
def directional(answer: Any) -> None:
    b = Batch()
    cases = Cases({"the factor 1/B": 1 / SIZE}, tolerance=1e-10)
    each = torch.func.jacrev(b.losses)(b.theta)
    calls: list[Tensor] = []

    def counted(theta: Tensor) -> Tensor:
        calls.append(theta)
        return b.losses(theta)

    for case, direction in (
        ("a coordinate direction", torch.eye(4, dtype=torch.float64)[1]),
        ("any direction", b.draw(4)),
    ):
        want = each @ direction
        close = (b.losses(b.theta + 1e-6 * direction) - b.losses(b.theta - 1e-6 * direction)) / 2e-6
        suspects = {
            "the direction was scaled to length 1": want / direction.norm(),
            "these are the losses, not their derivatives": b.losses(b.theta),
            "each example has the derivative of the sum": want.sum().expand(SIZE),
            "each example has the derivative of the mean": want.mean().expand(SIZE),
        }
        calls.clear()
        got = cases.call(case, answer, counted, b.theta, direction)
        if (
            isinstance(got, Tensor)
            and got.shape == want.shape
            and torch.allclose(got.to(want), close, 1e-5, 0)
        ):
            suspects["this looks like a finite difference; asked for is the exact derivative"] = got.to(want)
        cases.same(case, got, want, suspects)
        cases.true(f"one pass along {case}", len(calls) == 1, f"`losses` was called {len(calls)} times")


@exercise("04.5", "the way back through a gradient that was taken with a part held fixed")
def pull_held(answer: Any) -> None:
    b = Batch()

    def objective(theta: Tensor, z: Tensor) -> Tensor:
        return (b.weight * z * b.losses(theta)).sum() / SIZE

    parts = {
        "a part that does not move": lambda theta: torch.ones(SIZE, dtype=torch.float64) + 0 * theta.sum(),
        "a part that is linear in θ": lambda theta: b.x @ theta,
        "a part of other examples": lambda theta: b.x.flip(0) @ theta,  # dg/dθ is not symmetric
        "a focal loss": lambda theta: (1 - torch.exp(-b.losses(theta))) ** 2,
    }
    cases, cotangent = Cases({"the factor 1/B": 1 / SIZE}), b.draw(4)
    for case, held in parts.items():
        theta = b.theta

        def fixed(theta: Tensor, held: Callable = held) -> Tensor:
            return torch.func.grad(objective)(theta, held(theta))

        def moving(theta: Tensor, held: Callable = held) -> Tensor:
            return torch.func.grad(lambda theta: objective(theta, held(theta)))(theta)

        want = torch.func.vjp(fixed, theta)[1](cotangent)[0]
        first = torch.func.vjp(torch.func.grad(objective), theta, held(theta))[1](cotangent)[0]
        suspects = {
            "the first term only: z moves with θ from step to step": first,
            "the second term only": want - first,
            "this is (dg/dθ) ḡ, and the way back takes the transpose": torch.func.jvp(
                fixed, (theta,), (cotangent,)
            )[1],
            "z moved while the gradient was taken; it is fixed there": torch.func.vjp(moving, theta)[1](
                cotangent
            )[0],
        }
        cases.same(case, cases.call(case, answer, objective, held, theta, cotangent), want, suspects)
