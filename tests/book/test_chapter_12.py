"""The checkers of chapter 12: right answers pass, and wrong ones are told what is wrong."""

import math

import pytest
import torch

from tests.support.answers import fails, passes


def second_order(scores_at, removed, n, h, first=1.0, half=0.5, ends=2.0, everyone=False):
    one = torch.ones(n, dtype=torch.float64)
    d = torch.zeros_like(one)
    d[removed] = -1.0
    along = -one if everyone else d
    bend = (scores_at(one + h * along) - scores_at(one - h * along)) / (ends * h)
    return first * scores_at(one) @ d + half * bend @ d


def one_sided(scores_at, removed, n, h):
    one = torch.ones(n, dtype=torch.float64)
    d = torch.zeros_like(one)
    d[removed] = -1.0
    return scores_at(one) @ d + 0.5 * ((scores_at(one + h * d) - scores_at(one)) / h) @ d


def but(**changed):
    """The right answer to 12.1 with something changed."""
    return lambda scores_at, removed, n, h: second_order(scores_at, removed, n, h, **changed)


def normalised(gradients, cotangent, weights):
    mean = (weights @ gradients) / weights.sum()
    return (gradients - mean) @ cotangent / weights.sum()


def zero(rising):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return high


def where_r2_is_zero(second, slope):
    return zero(lambda p: 0.25 * p**3 * second**2 - (1 - p) * slope**2)


def replays_needed(agreement, ceiling, wanted, power=2, rounded=math.ceil):
    """The least number of directions, by trying one after the other."""
    if wanted >= ceiling:
        return math.inf
    law = [m * agreement / (1 + (m - 1) * agreement) for m in range(1, 10_000)]
    enough = next(m for m, x in enumerate(law, 1) if x >= (wanted / ceiling) ** power)
    return enough if rounded is math.ceil else enough - 1


@pytest.mark.parametrize(
    "number, answer",
    [("12.1", but()), ("12.2", normalised), ("12.3", where_r2_is_zero), ("12.6", replays_needed)],
)
def test_right_answers(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, words",
    [
        ("12.1", but(half=0.0), ["right for a linear function", "first order only"]),
        ("12.1", but(half=1.0), ["wrong for a quadratic function", "its factor ½ is missing"]),
        ("12.1", but(ends=1.0), ["its ends are 2h apart"]),
        ("12.1", but(half=-0.5), ["the second-order term has the wrong sign"]),
        ("12.1", but(first=-1.0), ["the first-order term has the wrong sign"]),
        ("12.1", but(first=0.0), ["wrong for a linear function", "the second-order term alone"]),
        ("12.1", but(everyone=True), ["with all examples leaving"]),
        ("12.1", one_sided, ["right for a linear function and a quadratic function", "one-sided"]),
        ("12.2", lambda G, c, w: G @ c / len(w), ["this is ÷ B"]),
        (
            "12.2",
            lambda G, c, w: normalised(G, c, torch.ones_like(w)),
            ["weights that differ", "do not occur in it"],
        ),
        ("12.2", lambda G, c, w: normalised(G, c, w) * w.sum() / len(w), ["weights that differ", "by Σw"]),
        ("12.2", lambda G, c, w: w * normalised(G, c, w), ["a factor once too often"]),
        ("12.2", lambda G, c, w: normalised(G, c, w).sum(), ["the shape is ()"]),
        ("12.3", lambda a, t: zero(lambda p: p**3 * a**2 - (1 - p) * t**2), ["without its factor ½"]),
        ("12.3", lambda a, t: zero(lambda p: 0.25 * p**3 * a**2 - t**2), ["not p(1 − p)"]),
        ("12.3", lambda a, t: 40 * t**2 / a, ["a fraction is between 0 and 1"]),
        ("12.3", lambda a, t: where_r2_is_zero(max(a, 0.1), t), ["right for a mild", "concave"]),
        ("12.6", lambda *x: replays_needed(*x, power=1), ["whose square has"]),
        ("12.6", lambda *x: replays_needed(*x, rounded=math.floor), ["rounded down"]),
        ("12.6", lambda r, end, lds: replays_needed(r, 1.0, lds), ["the ceiling is left out"]),
        ("12.6", lambda r, end, lds: replays_needed(r, max(end, 0.71), lds), ["that is infinity"]),
    ],
)
def test_wrong_answers_are_explained(number, answer, words):
    fails(number, answer, words)
