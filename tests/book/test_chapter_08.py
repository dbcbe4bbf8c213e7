"""The checkers of chapter 08: right answers pass, and each usual mistake is told apart."""

import pytest
import torch

from tests.support.answers import fails, passes


def right_smoothness(start, once, twice):
    first, second = once - start, twice - once
    return (first.abs() * first.sign() * second.sign()).sum() / first.abs().sum()


def unweighted(start, once, twice):
    return ((once - start).sign() * (twice - once).sign()).mean()


def from_the_start(start, once, twice):
    return right_smoothness(start, once, once + twice - start)


def by_the_second(start, once, twice):
    first, second = once - start, twice - once
    return (second.abs() * first.sign() * second.sign()).sum() / second.abs().sum()


def only_those_that_go_on(start, once, twice):
    first, second = once - start, twice - once
    return (first.abs() * (first.sign() == second.sign())).sum() / first.abs().sum()


def undivided(start, once, twice):
    return right_smoothness(start, once, twice) * (once - start).abs().sum()


def cosine(start, once, twice):
    return torch.cosine_similarity(once - start, twice - once, dim=0)


def right_slopes(rate, steps):
    return rate * steps / 2, (1 - (1 - rate) ** steps) / 2


RIGHT = {"08.1": right_smoothness, "08.2": right_slopes, "08.3": lambda c, mu: 2 * (1 + mu) / c}

WRONG = [
    ("08.1", unweighted, ["right for parameters on a straight line", "how far it moved at first"]),
    ("08.1", from_the_start, ["counted from the start"]),
    ("08.1", by_the_second, ["the weights are those of the second change"]),
    ("08.1", only_those_that_go_on, ["what turns back has to be subtracted"]),
    ("08.1", undivided, ["wrong for parameters on a straight line", "not divided"]),
    ("08.1", cosine, ["only the signs count"]),
    ("08.1", lambda a, b, c: torch.sign(b - a), ["the shape is (7,)"]),
    ("08.2", lambda rate, steps: rate * steps / 2, ["return two numbers"]),
    ("08.2", lambda rate, steps: (rate * steps, 0.0), ["wrong for rate 0.1 and 1 step", "with a half"]),
    (
        "08.2",
        lambda rate, steps: (rate / 2, rate / 2),
        ["right for rate 0.1 and 1 step", "the number of steps is missing"],
    ),
    ("08.2", lambda rate, steps: (rate * steps / 2, rate * steps / 2), ["moves θ back by rate·θ"]),
    ("08.2", lambda rate, steps: 2 * [right_slopes(rate, steps)[1]], ["for autograd the gradient is flat"]),
    ("08.2", lambda rate, steps: (rate * steps / 2, 0.5), ["has not come to its end"]),
    (
        "08.2",
        lambda rate, steps: (rate * steps / 2, (1 - (1 - rate) ** (steps + 1)) / 2),
        ["one step too many"],
    ),
    ("08.3", lambda c, mu: 2 / c, ["right for curvature 1 and momentum 0", "the edge without momentum"]),
    ("08.3", lambda c, mu: 2 * (1 - mu) / c, ["the edge moves up"]),
    ("08.3", lambda c, mu: 2 * (1 + mu) / (1 - mu) / c, ["the edge of the effective rate"]),
    ("08.3", lambda c, mu: (1 + mu) / c, ["only overshoots"]),
    ("08.3", lambda c, mu: 2 * (1 + mu), ["wrong for curvature 4", "the curvature once too often"]),
]


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_passes(number):
    passes(number, RIGHT[number])


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)


def test_the_edge_is_that_of_trainings():
    """Heavy-ball momentum on a parabola settles below 2(1 + μ)/λ and grows above it."""
    for curvature, momentum in ((1.0, 0.0), (4.0, 0.5), (0.7, 0.9)):
        for share, settles in ((0.98, True), (1.02, False)):
            rate = share * RIGHT["08.3"](curvature, momentum)
            theta, buffer = 1.0, 0.0
            for _ in range(2000):
                buffer = momentum * buffer + curvature * theta
                theta -= rate * buffer
            assert (abs(theta) < 1e-3) == settles


def test_the_two_slopes_are_those_of_trainings():
    """By autograd, and by a difference of two trainings on very many kinks."""
    kinks = torch.linspace(0, 1, 20_001, dtype=torch.float64)

    def train(w, rate, steps):
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            loss = torch.relu(theta - kinks).mean() - w / 2 * theta
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - rate * gradient
        return theta

    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    told, true = right_slopes(0.1, 40)
    (slope,) = torch.autograd.grad(train(w, 0.1, 40), w)
    assert slope.item() == pytest.approx(told)
    difference = (train(w.detach() + 0.1, 0.1, 40) - train(w.detach() - 0.1, 0.1, 40)).item() / 0.2
    assert difference == pytest.approx(true, rel=2e-3)
