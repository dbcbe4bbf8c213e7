"""Checkers of chapter 12: predictions of second order, weights under ÷ Σw, how far R² reaches, and how many
replays a mean needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise


def _dice(seed: int) -> Callable[..., Tensor]:
    """A function that draws normal numbers of a shape, in float64, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@exercise("12.1", "a removal effect of second order, from two more metagradients")
def second_order(answer) -> None:
    n, removed, h = 6, [1, 4, 5], 1e-3
    draw = _dice(1)
    slope, bent, third = draw(n), draw(n, n), draw(n)
    H = bent + bent.T
    d = torch.zeros(n, dtype=torch.float64)
    d[removed] = -1.0
    one = torch.ones(n, dtype=torch.float64)
    cases = Cases({"the step of the difference": h}, tolerance=1e-5)
    for case, scores_at in (
        ("a linear function", lambda w: slope),
        ("a quadratic function", lambda w: slope + H @ (w - 1)),
        ("a function with third derivatives", lambda w: slope + H @ (w - 1) + third * (w - 1) ** 2),
    ):
        bend = (scores_at(one + h * d) - scores_at(one - h * d)) / (2 * h)
        forward = (scores_at(one + h * d) - scores_at(one)) / h
        first, want = scores_at(one) @ d, scores_at(one) @ d + 0.5 * bend @ d
        every = (scores_at(one - h) - scores_at(one + h)) / (2 * h)
        suspects = {
            "this is the effect of first order only": first,
            "the second-order term is twice as large as it should be: its factor ½ is missing, or the "
            "difference is divided by h, and its ends are 2h apart": first + bend @ d,
            "the second-order term has the wrong sign: along d, dᵀHd is taken as it is": first
            - 0.5 * bend @ d,
            "the first-order term has the wrong sign: d is −1 for a removed example": -first + 0.5 * bend @ d,
            "this is the second-order term alone": 0.5 * bend @ d,
            "a one-sided difference has an error of first order in h; take ±h": first + 0.5 * forward @ d,
            "the curvature is taken with all examples leaving, not with those removed": first
            + 0.5 * every @ d,
        }
        cases.same(case, cases.call(case, answer, scores_at, removed, n, h), want, suspects)


@exercise("12.2", "the scores of one step under ÷ Σw")
def normalised_scores(answer) -> None:
    draw = _dice(2)
    cases = Cases({"the batch size": 5.0}, tolerance=1e-9)
    uneven = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    for case, gradients, cotangent, weights in (
        ("two examples of weight 1", draw(2, 3), draw(3), torch.ones(2, dtype=torch.float64)),
        ("five examples of weight 1", draw(5, 4), draw(4), torch.ones(5, dtype=torch.float64)),
        ("weights that differ", draw(5, 4), draw(4), uneven),
    ):
        w = weights.clone().requires_grad_()
        mean = (w @ gradients) / w.sum()
        (want,) = torch.autograd.grad(mean @ cotangent, w)
        B, total, mean = len(weights), weights.sum(), mean.detach()
        suspects = {
            "this is ÷ B: the divisor is held fixed": gradients @ cotangent / B,
            "the divisor is held fixed": gradients @ cotangent / total,
            "the weights do not occur in it": (gradients - gradients.mean(0)) @ cotangent / B,
            "the mean gradient that is subtracted is not weighted": (gradients - gradients.mean(0))
            @ cotangent
            / total,
            "it is divided by B, and should be by Σw": (gradients - mean) @ cotangent / B,
            "the mean gradient is added, and should be subtracted": (gradients + mean) @ cotangent / total,
            "the weight itself is a factor once too often": weights
            * ((gradients - mean) @ cotangent)
            / total,
        }
        cases.same(case, cases.call(case, answer, gradients, cotangent, weights), want, suspects)


@exercise("12.3", "the removed fraction at which the level alone makes R² zero")
def where_r2_is_zero(answer) -> None:
    cases = Cases({}, tolerance=1e-3)
    for case, a, t in (
        ("a mild curvature", 1.0, 0.5),
        ("a strong curvature", 30.0, 0.5),
        ("a concave function, whose second derivative is negative", -12.0, 0.8),
    ):
        want = _zero(a, t)
        got = cases.call(case, answer, a, t)
        suspects = {
            "the level is taken without its factor ½": _zero(2 * a, t),
            "the level is not squared": _zero(a, t, squared=False),
            "the variance of the sets is taken as p, not p(1 − p)": _zero(a, t, fixed=True),
        }
        if isinstance(got, (int, float)) and not 0 <= got <= 1:
            raise Wrong(f"wrong for {case}: a fraction is between 0 and 1, and this is {got:.3g}.")
        cases.same(case, got, want, suspects)


def _zero(second: float, slope: float, squared: bool = True, fixed: bool = False) -> Tensor:
    """The p at which the level's square, ¼ p³ second², is (1 − p)·slope², both divided by p; by bisection.

    squared, fixed   whether the level is squared, and whether the 1 − p is left out
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        level = 0.25 * p**3 * second**2 if squared else 0.5 * p * abs(second)
        low, high = (low, p) if level > (1 if fixed else 1 - p) * slope**2 else (p, high)
    return torch.tensor(high, dtype=torch.float64)


@exercise("12.6", "how many directions a mean needs for an LDS")
def replays_needed(answer) -> None:
    cases = Cases({}, tolerance=1e-9)
    for case, agreement, ceiling, wanted in (
        ("directions that agree well", 0.8, 0.95, 0.7),
        ("directions that hardly agree", 0.02, 0.9, 0.6),
        ("a number between two whole ones", 0.21, 0.73, 0.6),
    ):
        need = _directions((wanted / ceiling) ** 2, agreement)
        suspects = {
            "the law is that of the LDS, whose square has Mr / (1 + (M − 1) r)": math.ceil(
                _directions(wanted / ceiling, agreement)
            ),
            "it is rounded down, and then the LDS is below what is wanted": math.floor(need),
            "the ceiling is left out": math.ceil(_directions(wanted**2, agreement)),
        }
        told = {name: torch.tensor(float(number)) for name, number in suspects.items()}
        got = cases.call(case, answer, agreement, ceiling, wanted)
        cases.same(case, got, torch.tensor(float(max(1, math.ceil(need)))), told)
    case = "an LDS above the ceiling"
    got = cases.call(case, answer, 0.3, 0.6, 0.7)
    cases.true(case, got == math.inf, "no number of directions is enough, and that is infinity")


def _directions(square: float, agreement: float) -> float:
    """The M, not rounded, at which Mr / (1 + (M − 1) r) is `square`."""
    return square * (1 - agreement) / (agreement * (1 - square))
