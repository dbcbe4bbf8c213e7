"""What the checkers of chapter 03 say of right answers, and of the mistakes that are easily made."""

import pytest
import torch

from tests.support.answers import fails, passes


def slope(f, w, u, epsilon=1e-4):
    return (f(w + epsilon * u) - f(w - epsilon * u)) / (2 * epsilon)


def slope_changing_w(f, w, u, epsilon):
    w += epsilon * u
    ahead = f(w)
    return (ahead - f(w - epsilon * u)) / (2 * epsilon)


def unroll(losses, measure, theta, batches, weights, rate, *, cut=False, mean=False, graph=True, share=True):
    weights = weights.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    for batch in batches:
        theta = theta.detach().requires_grad_() if cut else theta
        total = (weights[batch] * losses(theta, batch)).sum()
        total = total / weights[batch].sum() if mean else total / len(batch) if share else total
        theta = theta - rate * torch.autograd.grad(total, theta, create_graph=graph)[0]
    return torch.autograd.grad(measure(theta), weights)[0]


def varied(function, **options):
    return lambda *arguments: function(*arguments, **options)


def go_back(step, states, batches, weights, cotangent, *, pulled=True, added=True, late=0, forwards=False):
    weights = weights.clone().requires_grad_()
    scores = torch.zeros_like(weights)
    for t in range(len(batches)) if forwards else reversed(range(len(batches))):
        state = tuple(part.detach().requires_grad_() for part in states[t + late])
        after = step(state, batches[t], weights)
        *before, part = torch.autograd.grad(after, (*state, weights), grad_outputs=cotangent)
        cotangent = before if pulled else cotangent
        scores = scores + part if added else part
    return scores


def go_back_with_batches_in_order(step, states, batches, weights, cotangent):
    return go_back(step, states, batches[::-1], weights, cotangent)


def go_back_for_sgd(step, states, batches, weights, cotangent):
    return go_back(lambda s, b, w: step((s[0],), b, w), [s[:1] for s in states], batches, weights, cotangent)


def carry(step, start, batches, weights, i, *, keep=True, once=False, everybody=False):
    unit = torch.zeros_like(weights)
    unit[slice(None) if everybody else i] = 1
    state, carried = start, tuple(torch.zeros_like(part) for part in start)
    for t, batch in enumerate(batches):
        if not keep:
            carried = tuple(torch.zeros_like(part) for part in start)
        along = torch.zeros_like(unit) if once and t else unit
        state, carried = torch.func.jvp(
            lambda s, w, batch=batch: step(s, batch, w), (state, weights), (carried, along)
        )
    return carried


@pytest.mark.parametrize(
    "number, answer",
    [("03.1", slope), ("03.2", unroll), ("03.3", go_back), ("03.4", carry)],
)
def test_a_right_answer_is_right(number, answer):
    passes(number, answer)


WRONG = [
    ("03.1", lambda f, w, u, e: (f(w + e * u) - f(w)) / e, ["a quadratic function", "one-sided"]),
    ("03.1", lambda f, w, u, e: (f(w) - f(w - e * u)) / e, ["right for a linear function", "one-sided"]),
    ("03.1", lambda f, w, u, e: (f(w + e * u) - f(w - e * u)) / e, ["a linear function", "1/2 is missing"]),
    ("03.1", lambda f, w, u, e: (f(w + e * u) - f(w - e * u)) / 2, ["the factor 1/ε is missing"]),
    ("03.1", lambda f, w, u, e: slope(f, w, u / u.norm(), e), ["scaled to length 1"]),
    ("03.1", lambda f, w, u, e: -slope(f, w, u, e), ["the sign is the other way round"]),
    ("03.1", slope_changing_w, ["was w changed in place"]),
    ("03.1", lambda f, w, u, e: None, ["returned None"]),
    ("03.2", varied(unroll, cut=True), ["right for one step; wrong for four steps", "cut from its trace"]),
    ("03.2", varied(unroll, mean=True), ["1/B"]),
    ("03.2", varied(unroll, share=False), ["wrong for one step", "not divided by B"]),
    ("03.2", varied(unroll, graph=False), ["raised RuntimeError"]),
    ("03.2", lambda f, m, th, b, w, r: unroll(f, m, th, b, torch.ones_like(w), r),
     ["right for one step and four steps", "all weights at 1"]),
    ("03.2", lambda f, m, th, b, w, r: unroll(f, m, th, b, w, r) / r, ["the rate is missing"]),
    ("03.2", lambda f, m, th, b, w, r: unroll(f, m, th, b, w, r)[b[0]], ["the shape is (2,)"]),
    ("03.3", varied(go_back, pulled=False), ["right for one step of SGD", "never pulled back"]),
    ("03.3", varied(go_back, added=False), ["only the part of step 0", "must be added"]),
    ("03.3", varied(go_back, late=1), ["starts from states[t]"]),
    ("03.3", varied(go_back, forwards=True), ["in the order of training"]),
    ("03.3", go_back_with_batches_in_order, ["four steps of SGD", "not those of their steps"]),
    ("03.3", go_back_for_sgd, ["right for one step of SGD and four steps of SGD", "raised"]),
    ("03.4", varied(carry, keep=False), ["right for one step of SGD", "lost at each step"]),
    ("03.4", varied(carry, once=True), ["at the first step only"]),
    ("03.4", varied(carry, everybody=True), ["wrong for one step of SGD", "all the weights move"]),
    ("03.4", lambda *a: carry(*a)[0], ["a tuple of 1 tensors"]),
    ("03.4", lambda *a: tuple(p.tolist() for p in carry(*a)), ["holds list", "should hold tensors"]),
    ("03.4", lambda *a: carry(*a)[:1], ["right for one step of SGD and four steps of SGD", "2 tensors"]),
]  # fmt: skip


@pytest.mark.parametrize("number, answer, words", WRONG, ids=[f"{n} {w[-1][:30]}" for n, _, w in WRONG])
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    fails(number, answer, words)
