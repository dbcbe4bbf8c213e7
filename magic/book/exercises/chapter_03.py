"""The checkers of chapter 03: a slope from two trainings, the unroll, the loop backwards, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .judging import Cases, exercise

RATE, MU, SIZE = 0.4, 0.7, 2
State = tuple[Tensor, ...]


class Problem:
    """Six examples, three parameters, four batches of two; example 0 comes twice, example 5 never."""

    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=chance, dtype=torch.float64)  # noqa: E731
        self.x, self.y, self.theta, self.query = draw(6, 3), draw(6), draw(3), draw(3)
        self.batches = [torch.tensor(pair) for pair in ([0, 1], [2, 3], [4, 0], [3, 1])]
        self.ones = torch.ones(6, dtype=torch.float64)
        self.weights = self.ones + 0.3 * draw(6)

    def losses(self, theta: Tensor, batch: Tensor) -> Tensor:
        return (torch.tanh(self.x[batch] @ theta) - self.y[batch]) ** 2

    def measure(self, theta: Tensor) -> Tensor:
        return torch.sin(self.query @ theta)

    def gradient(self, theta: Tensor, batch: Tensor, weights: Tensor) -> Tensor:
        def objective(theta: Tensor) -> Tensor:
            return (weights[batch] * self.losses(theta, batch)).sum() / len(batch)

        return torch.func.grad(objective)(theta)

    def sgd(self, state: State, batch: Tensor, weights: Tensor) -> State:
        return (state[0] - RATE * self.gradient(state[0], batch, weights),)

    def momentum(self, state: State, batch: Tensor, weights: Tensor) -> State:
        buffer = MU * state[1] + self.gradient(state[0], batch, weights)
        return state[0] - RATE * buffer, buffer

    def states(self, step: Callable, start: State, steps: int) -> list[State]:
        states = [start]
        for batch in self.batches[:steps]:
            states.append(step(states[-1], batch, self.weights))
        return states

    def optimizers(self) -> list[tuple[str, Callable, State, int]]:
        """Name, step, first state and number of steps, in order of difficulty."""
        alone, pair = (self.theta,), (self.theta, torch.zeros_like(self.theta))
        return [
            ("one step of SGD", self.sgd, alone, 1),
            ("four steps of SGD", self.sgd, alone, 4),
            ("four steps with momentum", self.momentum, pair, 4),
        ]


@exercise("03.1", "the derivative along a direction, from two values of a function")
def slope(answer: Any) -> None:
    p = Problem()

    def trained(w: Tensor) -> Tensor:
        theta = p.theta
        for batch in p.batches:
            theta = theta - RATE * p.gradient(theta, batch, w)
        return p.measure(theta)

    functions = {
        "a linear function": (lambda w: p.x[:, 0] @ w, 0.3),
        "a quadratic function": (lambda w: (p.x[:, 1] @ w) ** 2 + w @ w, 0.3),
        "a training": (trained, 1e-3),
    }
    for case, (f, epsilon) in functions.items():
        cases = Cases({"the factor 1/2": 0.5, "the factor 1/ε": 1 / epsilon}, tolerance=1e-4)
        cases.right = list(functions)[: list(functions).index(case)]
        w, u = p.weights, p.y
        want = torch.func.grad(f)(w) @ u
        ahead, behind, here = f(w + epsilon * u), f(w - epsilon * u), f(w)
        suspects = {
            "this is half of a one-sided difference; was w changed in place before f was taken again?":
                (ahead - here) / (2 * epsilon),
            "this is a one-sided difference, off by a term in ε": (ahead - here) / epsilon,
            "this is a one-sided difference, off by a term in ε ": (here - behind) / epsilon,
            "the direction u was scaled to length 1": want / u.norm(),
        }  # fmt: skip
        cases.same(case, cases.call(case, answer, f, w, u, epsilon), want, suspects)


@exercise("03.2", "the derivative of a whole run by one call of autograd")
def unroll(answer: Any) -> None:
    p = Problem()
    cases = Cases({"the rate": RATE, "the factor 1/B": 1 / SIZE})
    for case, steps, weights in (
        ("one step", 1, p.ones),
        ("four steps", 4, p.ones),
        ("weights other than 1", 4, p.weights),
    ):
        batches = p.batches[:steps]
        want = _unrolled(p, batches, weights)
        suspects = {
            "only the last step counts; θ was cut from its trace between the steps":
                _unrolled(p, batches, weights, cut=True),
            "the derivative was taken with all weights at 1": _unrolled(p, batches, p.ones),
            "the objective was divided by the sum of the weights, and asked for is 1/B":
                _unrolled(p, batches, weights, mean=True),
            "the sum of the losses is not divided by B": _unrolled(p, batches, weights, share=1 / SIZE),
        }  # fmt: skip
        got = cases.call(case, answer, p.losses, p.measure, p.theta, batches, weights, RATE)
        cases.same(case, got, want, suspects)


def _unrolled(
    p: Problem, batches: list[Tensor], weights: Tensor, *,
    cut: bool = False, mean: bool = False, share: float = 1.0,
) -> Tensor:  # fmt: skip
    weights, theta = weights.clone().requires_grad_(), p.theta.clone().requires_grad_()
    for batch in batches:
        theta = theta.detach().requires_grad_() if cut else theta
        size = weights[batch].sum() if mean else share * len(batch)
        objective = (weights[batch] * p.losses(theta, batch)).sum() / size
        theta = theta - RATE * torch.autograd.grad(objective, theta, create_graph=True)[0]
    return torch.autograd.grad(p.measure(theta), weights)[0]


@exercise("03.3", "the loop that goes back through a run with any state")
def go_back(answer: Any) -> None:
    p = Problem()
    cases = Cases({"the rate": RATE})
    for case, step, start, steps in p.optimizers():
        states = p.states(step, start, steps)
        last = (torch.func.grad(p.measure)(states[-1][0]), *(torch.zeros_like(s) for s in start[1:]))
        batches = p.batches[:steps]
        loop = _Loop(step, states, batches, p.weights)
        suspects = {
            "the cotangent is never pulled back: each step got Δ_T": loop.scores(last, pulled=False),
            "only the part of step 0 is there: the parts must be added": loop.scores(last, added=False),
            "step t was done from states[t + 1]; it starts from states[t]": loop.scores(last, late=1),
            "the steps are taken in the order of training; the way back begins with the last":
                loop.scores(last, forwards=True),
            "the batches are not those of their steps": loop.scores(last, flipped=True),
        }  # fmt: skip
        got = cases.call(case, answer, step, states, batches, p.weights, last)
        cases.same(case, got, loop.scores(last), suspects)


class _Loop:
    """The loop of section 4, and what comes out when one thing in it is wrong."""

    def __init__(self, step: Callable, states: list[State], batches: list[Tensor], weights: Tensor):
        self.step, self.states, self.batches, self.weights = step, states, batches, weights

    def scores(
        self, cotangent: State, *, pulled: bool = True, added: bool = True, late: int = 0,
        forwards: bool = False, flipped: bool = False,
    ) -> Tensor:  # fmt: skip
        scores, count = torch.zeros_like(self.weights), len(self.batches)
        for t in range(count) if forwards else reversed(range(count)):
            batch = self.batches[count - 1 - t if flipped else t]
            of_both = lambda state, w, batch=batch: self.step(state, batch, w)  # noqa: E731
            before, part = torch.func.vjp(of_both, self.states[t + late], self.weights)[1](cotangent)
            cotangent = before if pulled else cotangent
            scores = scores + part if added else part
        return scores


@exercise("03.4", "the derivative of the last state in one weight, carried along with the training")
def carry(answer: Any) -> None:
    p = Problem()
    cases = Cases({"the rate": RATE, "the factor 1/B": 1 / SIZE})
    for case, step, start, steps in p.optimizers():
        batches, i = p.batches[:steps], 1
        want = _carried(step, start, batches, p.weights, i)
        suspects = {
            "what was carried is lost at each step; only the last step is there":
                _carried(step, start, batches, p.weights, i, "lost"),
            "the weight enters at the first step only; it does so whenever the example is in the batch":
                _carried(step, start, batches, p.weights, i, "once"),
            "all the weights move; only that of example i should":
                _carried(step, start, batches, p.weights, slice(None)),
        }  # fmt: skip
        got = cases.call(case, answer, step, start, batches, p.weights, i)
        if not isinstance(got, (tuple, list)) or len(got) != len(start):
            cases.true(case, False, f"asked for is a tuple of {len(start)} tensors, like the state")
        wrong = [part for part in got if not isinstance(part, Tensor)]
        if wrong:
            cases.true(case, False, f"the tuple holds {type(wrong[0]).__name__}, and should hold tensors")
        cases.same(case, torch.cat([part.flatten() for part in got]), want, suspects)


def _carried(
    step: Callable, state: State, batches: list[Tensor], weights: Tensor, i: Any, fault: str = ""
) -> Tensor:
    unit, still = torch.zeros_like(weights), torch.zeros_like(weights)
    unit[i] = 1
    carried = tuple(torch.zeros_like(part) for part in state)
    for t, batch in enumerate(batches):
        if fault == "lost":
            carried = tuple(torch.zeros_like(part) for part in state)
        along = still if fault == "once" and t else unit
        of_both = lambda state, w, batch=batch: step(state, batch, w)  # noqa: E731
        state, carried = torch.func.jvp(of_both, (state, weights), (carried, along))[:2]
    return torch.cat([part.flatten() for part in carried])
