"""The checkers of chapter 11: right answers pass, and wrong ones are told what is wrong."""

import pytest
import torch

from tests.support.answers import fails, passes


def affine(outputs, scores, centre, weights):
    return outputs + (weights - centre) @ scores.T


def fit(weights, outputs, penalty):
    D, r = weights - weights.mean(0), outputs - outputs.mean(0)
    return D.T @ torch.linalg.solve(D @ D.T + penalty * torch.eye(len(D)).to(D), r)


def fit_raw(weights, outputs, penalty):
    system = weights @ weights.T + penalty * torch.eye(len(weights)).to(weights)
    return weights.T @ torch.linalg.solve(system, outputs)


def squared_length(x):
    S = len(x)
    return (x.sum(0).square().sum() - x.square().sum()) / (S * (S - 1))


def from_halves(x):
    half = len(x) // 2
    return x[:half].mean(0) @ x[half:].mean(0)


def best_slopes(f, sets):
    slopes = []
    for i in range(sets.shape[1]):
        present, absent = sets.clone(), sets.clone()
        present[:, i], absent[:, i] = 1.0, 0.0
        slopes.append(torch.stack([f(a) - f(b) for a, b in zip(present, absent, strict=True)]).mean())
    return torch.stack(slopes)


def at_the_centre(f, sets):
    centre = sets.mean(0).requires_grad_()
    return torch.autograd.grad(f(centre), centre)[0]


def from_the_full_set(f, sets):
    full = torch.ones_like(sets[0])
    return torch.stack([f(full) - f(full - row) for row in torch.eye(len(full)).to(full)])


def only_present(f, sets):
    return torch.stack([torch.stack([f(w) for w in sets[sets[:, i] == 1]]).mean() for i in range(4)])


@pytest.mark.parametrize(
    "number, answer",
    [("11.1", affine), ("11.2", fit), ("11.3", squared_length), ("11.4", best_slopes)],
)
def test_right_answers(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, words",
    [
        ("11.1", lambda o, s, c, w: o + (w - 1) @ s.T, ["the centre itself", "the start is taken as w = 1"]),
        ("11.1", lambda o, s, c, w: o + w @ s.T, ["w is used where w − c should be"]),
        ("11.1", lambda o, s, c, w: (w - c) @ s.T, ["the outputs at the centre are left out"]),
        ("11.1", lambda o, s, c, w: o - (w - c) @ s.T, ["right for the centre itself", "wrong way round"]),
        ("11.1", lambda o, s, c, w: o + (w - c[0]) @ s.T, ["wrong for a centre whose entries differ"]),
        ("11.1", lambda o, s, c, w: s @ (w - c).T, ["the shape is (3, 1), and it should be (1, 3)"]),
        ("11.2", fit_raw, ["right for weights and outputs whose means are 0", "keep their means"]),
        ("11.2", lambda w, o, a: fit(w, o, a**2), ["the penalty is squared"]),
        ("11.2", lambda w, o, a: fit(w, o, len(w) * a), ["multiplied by the number of retrainings"]),
        (
            "11.2",
            lambda w, o, a: torch.linalg.pinv(w - w.mean(0)) @ (o - o.mean(0)),
            ["the penalty is left out"],
        ),
        ("11.2", lambda w, o, a: fit(w, o, 2.5), ["right for weights and outputs", "another penalty"]),
        ("11.3", lambda x: x.mean(0).square().sum(), ["pairs of a draw with itself are counted"]),
        ("11.3", lambda x: squared_length(x) * (len(x) - 1) / len(x), ["divided by S²"]),
        ("11.3", lambda x: squared_length(x) / 2, ["occurs twice"]),
        ("11.3", lambda x: x.square().sum(1).mean(), ["the mean of the squared lengths"]),
        ("11.3", from_halves, ["wrong for three draws", "only the pairs of one half"]),
        ("11.4", at_the_centre, ["right for a linear function", "wrong for an exponential", "derivative at"]),
        ("11.4", from_the_full_set, ["wrong for products of two weights", "when all others are there"]),
        ("11.4", only_present, ["wrong for a linear function", "those without it are to be subtracted"]),
        ("11.4", lambda f, sets: best_slopes(f, sets[:8]), ["wrong for products of two weights"]),
    ],
)
def test_wrong_answers_are_explained(number, answer, words):
    fails(number, answer, words)
