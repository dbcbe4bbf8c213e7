"""The checkers of chapter 10 say what is wrong with the usual wrong answers, and accept the right ones."""

import pytest
import torch
from scipy.stats import rankdata

from tests.support.answers import fails, passes

QUANTILES = torch.tensor([0.025, 0.975], dtype=torch.float64)


def ranks(x):
    return torch.tensor(rankdata(x.numpy(), axis=0))


def untied(predicted, true):
    return pearson(*(x.argsort(0).argsort(0).double() for x in (predicted, true))).mean()


def pearson(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def lds(predicted, true):
    return pearson(ranks(predicted), ranks(true)).mean()


def fit(predicted, true):
    a, b = predicted - predicted.mean(), true - true.mean()
    return (a @ b) / (a @ a), 1 - ((true - predicted) ** 2).sum() / (b @ b)


def resampled(a, b, true, draws):
    return torch.stack([lds(a[rows], true[rows]) - lds(b[rows], true[rows]) for rows in draws])


def paired(a, b, true, draws):
    return torch.quantile(resampled(a, b, true, draws), QUANTILES)


def one(x, true, draws):
    return torch.quantile(torch.stack([lds(x[rows], true[rows]) for rows in draws]), QUANTILES)


def share(chosen, random):
    return (1 + (random >= chosen).sum()) / (1 + len(random))


def unpaired(a, b, true, draws):
    return torch.quantile(torch.stack([lds(a[r], true) - lds(b[r], true) for r in draws]), QUANTILES)


def normal(a, b, true, draws):
    d = resampled(a, b, true, draws)
    return d.mean() + 1.96 * d.std() * torch.tensor([-1.0, 1.0])


@pytest.mark.parametrize(
    "number, answer",
    [
        ("10.1", lds),
        ("10.1", lambda p, t: float(lds(p, t))),
        ("10.2", fit),
        ("10.2", lambda p, t: torch.stack(fit(p, t))),
        ("10.3", paired),
        ("10.3", lambda *arguments: tuple(paired(*arguments).tolist())),
        ("10.4", share),
    ],
)
def test_right(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, words",
    [
        ("10.1", lambda p, t: pearson(p, t).mean(), ["wrong for one target", "Pearson", "rank them first"]),
        ("10.1", lambda p, t: lds(p.T, t.T), ["for one target some entries are not finite"]),
        (
            "10.1",
            lambda p, t: lds(p, t) if p.shape[1] == 1 else lds(p.T, t.T),
            ["right for one target; wrong for six targets", "across the targets"],
        ),
        (
            "10.1",
            lambda p, t: lds(p.reshape(-1, 1), t.reshape(-1, 1)),
            ["right for one target; wrong for six targets", "ranked together"],
        ),
        (
            "10.1",
            lambda p, t: pearson(p.argsort(0).double(), t.argsort(0).double()).mean(),
            ["wrong for one target", "argsort of argsort"],
        ),
        (
            "10.1",
            lambda p, t: lds(p, t).abs(),
            ["wrong for predictions of the other sign", "the sign is lost"],
        ),
        ("10.1", lambda p, t: pearson(ranks(p), ranks(t)), ["the shape is (1,)"]),
        (
            "10.1",
            untied,
            ["right for one target, six targets", "wrong for retrainings that occur twice", "share"],
        ),
        ("10.2", lambda p, t: fit(p, t)[0], ["return two numbers"]),
        ("10.2", lambda p, t: (fit(t, p)[0], 0.0), ["wrong for the slope", "predicted on true"]),
        ("10.2", lambda p, t: ((p @ t) / (p @ p), 0.0), ["wrong for the slope", "through the origin"]),
        ("10.2", lambda p, t: (pearson(p, t), 0.0), ["wrong for the slope", "knows no scale"]),
        ("10.2", lambda p, t: fit(p, t)[::-1], ["the two numbers are exchanged"]),
        (
            "10.2",
            lambda p, t: (fit(p, t)[0], pearson(p, t) ** 2),
            ["right for the slope", "wrong for R²", "as it stands"],
        ),
        (
            "10.2",
            lambda p, t: (fit(p, t)[0], 1 - ((t - p) ** 2).sum() / (t @ t)),
            ["wrong for R²", "(true − mean)²"],
        ),
        (
            "10.2",
            lambda p, t: (fit(p, t)[0], fit(p - p.mean(), t - t.mean())[1]),
            ["wrong for R²", "also counts a shift"],
        ),
        ("10.2", lambda p, t: (fit(p, t)[0], 1 - fit(p, t)[1]), ["left unexplained"]),
        ("10.3", lambda a, b, t, d: one(a, t, d) - one(b, t, d), ["ends of two intervals are subtracted"]),
        ("10.3", lambda a, b, t, d: one(a, t, d) - one(b, t, d).flip(0), ["widest span of two separate"]),
        (
            "10.3",
            lambda a, b, t, d: torch.quantile(
                torch.stack([untied(a[r], t[r]) - untied(b[r], t[r]) for r in d]), QUANTILES
            ),
            ["which every resample has"],
        ),
        ("10.3", unpaired, ["the same rows of all three"]),
        ("10.3", lambda a, b, t, d: paired(b, a, t, d), ["b minus a"]),
        ("10.3", lambda a, b, t, d: paired(a, b, t, d).flip(0), ["the upper end comes first"]),
        (
            "10.3",
            lambda a, b, t, d: torch.quantile(
                resampled(a, b, t, d), torch.tensor([0.05, 0.95], dtype=torch.float64)
            ),
            ["cuts 2.5 %"],
        ),
        ("10.3", normal, ["assumes a normal distribution"]),
        ("10.3", lambda a, b, t, d: resampled(a, b, t, d), ["return two numbers"]),
        ("10.4", lambda c, r: (r >= c).double().mean(), ["p can be 0"]),
        ("10.4", lambda c, r: (1 + (r >= c).sum()) / len(r), ["above the line and not below"]),
        ("10.4", lambda c, r: (r >= c).sum() / (1 + len(r)), ["below the line and not above"]),
        ("10.4", lambda c, r: (1 + (r <= c).sum()) / (1 + len(r)), ["at or below"]),
        (
            "10.4",
            lambda c, r: (1 + (r > c).sum()) / (1 + len(r)),
            ["right for a change in the middle", "equal to the largest", "exactly count, too"],
        ),
        (
            "10.4",
            lambda c, r: (1 + (r.abs() >= c.abs()).sum()) / (1 + len(r)),
            ["compared without their sign"],
        ),
        (
            "10.4",
            lambda c, r: 1 - torch.special.ndtr((c - r.mean()) / r.std()),
            ["normal distribution", "count"],
        ),
    ],
)
def test_wrong(number, answer, words):
    fails(number, answer, words)
