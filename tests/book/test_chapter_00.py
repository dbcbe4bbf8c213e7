"""The checkers of chapter 00: right answers pass, and each usual mistake is named."""

import pytest
import torch

from tests.support.answers import fails, passes


def effect(values, without):
    return -values[:, without].sum(1)


def score(f, n, i, epsilon=1e-4):
    e = torch.zeros(n, dtype=torch.float64)
    e[i] = epsilon
    return (f(1 + e) - f(1 - e)) / (2 * epsilon)


def margin(logits, labels):
    rows = torch.arange(len(logits))
    others = logits.index_put((rows, labels), torch.tensor(-torch.inf, dtype=logits.dtype))
    return logits[rows, labels] - others.max(1).values


@pytest.mark.parametrize("number, answer", [("00.1", effect), ("00.2", score), ("00.3", margin)])
def test_a_right_answer_passes(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, word",
    [
        ("00.1", lambda v, d: v[:, d].sum(1), "mind the sign"),
        ("00.1", lambda v, d: -v[:, d].mean(1), "right for one image; wrong for two images"),
        ("00.1", lambda v, d: -v[:, d].sum(), "the shape is ()"),
        ("00.1", lambda v, d: -v[:, d[0]], "right for one image; wrong for two images"),
        ("00.2", lambda f, n, i, e=1e-4: score(f, n, i) * 2, "the factor 2 once too often"),
        ("00.2", lambda f, n, i, e=1e-4: score(f, n, i) * e, "ε once too often"),
        ("00.2", lambda f, n, i, e=1e-4: score(lambda w: f(w - 1), n, i), "not around 1"),
        ("00.2", lambda f, n, i, e=1e-4: f(torch.ones(n)), "raised RuntimeError"),
        ("00.3", lambda z, y: z[range(len(z)), y] - z.max(1).values, "leave it out"),
        ("00.3", lambda z, y: z[range(len(z)), y], "no margin"),
        ("00.3", lambda z, y: -margin(z, y), "the sign is the other way round"),
    ],
)
def test_a_mistake_is_named(number, answer, word):
    fails(number, answer, [word])
