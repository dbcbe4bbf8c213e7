"""What the checkers of chapter 02 say of right answers, and of the mistakes that readers make."""

import pytest
import torch

from tests.support.answers import fails, passes


def step(state, gradient, *, offset=1, old=False, count=1):
    rate = 0.1 * min(1, (state["step"] + offset) / 10)
    params = state["params"] - rate * gradient
    average = 0.9 * state["average"] + 0.1 * (state["params"] if old else params)
    return {"params": params, "average": average, "step": state["step"] + count}


def in_place(state, gradient):
    new = step(state, gradient)
    state["average"].copy_(new["average"])
    return new


def counting():
    """A step that keeps its own count of the calls after the first five."""
    calls = []

    def answer(state, gradient):
        calls.append(state)
        return step(state, gradient * (1 if len(calls) < 4 else 2))

    return answer


def ridge(x, y, query, decay, w, *, sign=-1.0, scale=True, h_decay=1.0, h_weights=True, g_weights=False):
    n = len(x)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    theta = torch.linalg.solve((x.T * w) @ x / n + decay * eye, x.T @ (w * y) / n)
    hessian = (x.T * (w if h_weights else torch.ones_like(w))) @ x / n + h_decay * decay * eye
    slopes = (x @ theta - y) * x.T
    slopes = slopes * w if g_weights else slopes
    return sign * query @ torch.linalg.solve(hessian, slopes) / (n if scale else 1)


def series(hessian, vector, rate, steps, *, front=True, first=0, last=0, inside=True):
    matrix = torch.eye(len(vector), dtype=vector.dtype) - (rate if inside else 1.0) * hessian
    powers = [torch.linalg.matrix_power(matrix, k) @ vector for k in range(first, steps + last)]
    return (rate if front else 1.0) * sum(powers, torch.zeros_like(vector))


def tangent(jacobian, memory, hessian, slopes, rate, mu, *, scale=True, old=False, hj=True, sign=-1):
    n = slopes.shape[1] if scale else 1
    new = mu * memory + (hessian @ jacobian if hj else 0.0) + slopes / n
    return jacobian + sign * rate * (memory if old else new), new


RIGHT = [("02.1", step), ("02.2", ridge), ("02.3", series), ("02.4", tangent)]


@pytest.mark.parametrize("number, answer", RIGHT)
def test_a_right_answer_is_right(number, answer):
    passes(number, answer)


def varied(function, **changes):
    return lambda *arguments: function(*arguments, **changes)


WRONG = [
    ("02.1", varied(step, offset=0), ["right for params in a step after", "which is zero in step 0"]),
    ("02.1", varied(step, offset=100), ["params in a step of the warm-up", "the rate is η from the start"]),
    ("02.1", varied(step, old=True), ["average", "the parameters before the step, not those after"]),
    ("02.1", varied(step, count=0), ["the step is still that of before"]),
    ("02.1", in_place, ["changes the average of the state it was given"]),
    ("02.1", counting(), ["another state came out", "not in its arguments"]),
    ("02.1", lambda s, g: step(s, g.detach()), ["forgotten that they depend on the gradient", "detach"]),
    ("02.1", lambda s, g: s["params"] - 0.1 * g, ["asked for is a new state", "'params'"]),
    ("02.2", varied(ridge, sign=1.0), ["the sign is the other way round", "more weight lowers φ"]),
    ("02.2", varied(ridge, scale=False), ["the 1/B is missing"]),
    ("02.2", varied(ridge, scale=False, sign=1.0), ["Koh & Liang", "sign and 1/B"]),
    ("02.2", varied(ridge, h_decay=0.0), ["right for all weights 1 and no decay", "decay is missing"]),
    ("02.2", varied(ridge, h_decay=12.0), ["wrong for weight decay", "the decay is multiplied by n"]),
    ("02.2", varied(ridge, h_weights=False), ["wrong for weights that are not 1", "no weights in it"]),
    ("02.2", varied(ridge, g_weights=True), ["the gradients are multiplied by the weights"]),
    ("02.3", varied(series, last=1), ["one term too many"]),
    ("02.3", varied(series, last=-1), ["wrong for one step", "one term too few; k starts at 0"]),
    ("02.3", varied(series, first=1, last=1), ["the sum starts at k = 1"]),
    ("02.3", varied(series, front=False), ["η is missing"]),
    ("02.3", varied(series, inside=False), ["right for one step", "powers are of I − H, without η"]),
    ("02.3", lambda h, v, r, t: torch.linalg.solve(h, v), ["this is H⁻¹v, the limit"]),
    ("02.4", varied(tangent, scale=False), ["the memory in the first step", "1/B", "is missing"]),
    ("02.4", varied(tangent, old=True), ["wrong for the jacobian", "the memory from before the step"]),
    ("02.4", varied(tangent, hj=False), ["right for the memory in the first step", "H J is missing"]),
    ("02.4", varied(tangent, sign=1), ["the sign is the other way round: a step goes down"]),
    ("02.4", lambda j, m, h, g, r, mu: tangent(j, m, h, g, r, 0.0), ["the old memory is left out"]),
    ("02.4", lambda j, m, h, g, r, mu: tangent(j, m, h, g, r, 1.0), ["momentum 0", "not multiplied by μ"]),
    ("02.4", lambda *arguments: tangent(*arguments)[0], ["asked for are two matrices"]),
]  # fmt: skip


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)
