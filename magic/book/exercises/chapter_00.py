"""Checkers of chapter 00: a predicted removal, a score from two trainings, a margin."""

from __future__ import annotations

import torch

from .judging import Cases, exercise


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@exercise("00.1", "the predicted effect of removing images")
def removal_effect(answer) -> None:
    values, cases = _numbers(3, 8), Cases({})
    for case, without in (("one image", [5]), ("two images", [0, 3]), ("no image", []), ("all", range(8))):
        total = values[:, list(without)].sum(1)
        suspects = {
            "the scores are added, but removing takes weight away: mind the sign": total,
            "each output sums its scores; yours is their mean": -total / max(len(without), 1),
            "the sum goes over the removed images, and yours goes over the outputs, too": -total.sum()
            * torch.ones(3, dtype=values.dtype),
        }
        cases.same(case, cases.call(case, answer, values, list(without)), -total, suspects)


@exercise("00.2", "a score as a central difference")
def one_score(answer) -> None:
    a, b = _numbers(6), 0.1 * _numbers(6, 6, seed=1)
    cases = Cases({"ε": 1e-4, "the factor 2": 2.0}, tolerance=1e-6)
    ones = torch.ones(6, dtype=torch.float64)

    def curved(w):
        return ((a @ w) + torch.sin(w @ b @ w)).item()

    for case, f in (("a linear function", lambda w: (a @ w).item()), ("a curved one", curved)):
        for i in (0, 4):
            e = torch.zeros(6, dtype=torch.float64)
            e[i] = 1e-4
            want = (f(ones + e) - f(ones - e)) / 2e-4
            suspects = {
                "a forward difference; the central one uses both sides": (f(ones + e) - f(ones)) / 1e-4,
                "the weights around 0, not around 1": (f(e) - f(-e)) / 2e-4,
                "all weights move, and only that of example i should": (f(ones * 1.0001) - f(ones * 0.9999))
                / 2e-4,
            }
            told = {reason: torch.tensor(value, dtype=torch.float64) for reason, value in suspects.items()}
            got = cases.call(case, answer, f, 6, i)
            cases.same(case, got, torch.tensor(want, dtype=torch.float64), told)


@exercise("00.3", "the margin of the right class")
def margins(answer) -> None:
    cases = Cases({})
    clear = torch.tensor([[3.0, 1.0, 0.0], [0.0, 5.0, 2.0]], dtype=torch.float64)
    for case, logits, labels in (
        ("an image that is right", clear[:1], torch.tensor([0])),
        ("one that is wrong", clear[1:], torch.tensor([2])),
        ("a batch at random", _numbers(7, 10), torch.arange(7) % 4),
    ):
        rows = torch.arange(len(logits))
        own = logits[rows, labels]
        others = logits.clone()
        others[rows, labels] = -torch.inf
        want = own - others.max(1).values
        suspects = {
            "the largest logit may be the right class's own: leave it out": own - logits.max(1).values,
            "the logit of the right class alone is no margin": own,
            "the other classes are averaged; the margin takes the largest": own
            - others.masked_fill(others.isinf(), 0).sum(1) / (logits.shape[1] - 1),
            "probabilities are subtracted, not logits": logits.softmax(1)[rows, labels]
            - others.softmax(1).max(1).values,
        }
        cases.same(case, cases.call(case, answer, logits, labels), want, suspects)
