"""Checkers of chapter 10: rank correlation, slope and R², a paired bootstrap, a test against random sets.

Each compares the reader's function with the statistics of `magic.evidence.comparison`, or with the
definition written out, on random matrices of predicted and true outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise

QUANTILES = torch.tensor([0.025, 0.975], dtype=torch.float64)


def _matrices(seed: int, retrainings: int, targets: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """(S, K) predicted and true outputs that agree somewhat: skewed, each target in a unit of its own."""
    dice = torch.Generator().manual_seed(seed)
    true, other = (
        torch.randn(retrainings, targets, generator=dice, dtype=torch.float64).exp() for _ in range(2)
    )
    unit = torch.logspace(-1, 1, targets, dtype=torch.float64)
    return 0.3 * unit * (true + noise * other) + 1, unit * true + 2


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the first axis, ties sharing theirs."""
    lower = (x.unsqueeze(0) < x.unsqueeze(1)).sum(1)
    return (lower + 0.5 * (x.unsqueeze(0) == x.unsqueeze(1)).sum(1)).double()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / ((a**2).sum(0) * (b**2).sum(0)).sqrt()


def _lds(predicted: Tensor, true: Tensor) -> Tensor:
    return _pearson(_ranks(predicted), _ranks(true)).mean()


def _mistaken_lds(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """What readers write instead of the LDS, and what comes out."""
    return {
        "that is Pearson's correlation of the outputs themselves; rank them first": _pearson(
            predicted, true
        ).mean(),
        "the ranks are taken across the targets; rank each target's outputs over the retrainings": _pearson(
            _ranks(predicted.T), _ranks(true.T)
        ).mean(),
        "all targets are ranked together; correlate each by itself, then take the mean": _lds(
            predicted.reshape(-1, 1), true.reshape(-1, 1)
        ),
        "argsort once gives an order, not ranks; argsort of argsort gives ranks": _pearson(
            predicted.argsort(0).double(), true.argsort(0).double()
        ).mean(),
    }


@exercise("10.1", "the linear datamodeling score of two matrices")
def lds(answer) -> None:
    cases = Cases({}, tolerance=1e-5)
    for case, shape in (("one target", (12, 1)), ("six targets", (20, 6))):
        for seed in range(3):
            predicted, true = _matrices(seed, *shape)
            got = cases.call(case, answer, predicted, true)
            cases.same(case, got, _lds(predicted, true), _mistaken_lds(predicted, true))
        cases.right = list(dict.fromkeys(cases.right))
    predicted, true = _matrices(7, 20, 6)
    want = _lds(predicted, true)
    case = "predictions in another unit"
    cases.same(case, cases.call(case, answer, 100 * predicted, true), want)
    case = "predictions of the other sign"
    got = cases.call(case, answer, -predicted, true)
    cases.same(case, got, -want, {"the sign is lost": want})
    case, twice = "retrainings that occur twice", torch.tensor([0, 0, *range(2, 15), 7, 7, 7])
    predicted, true = predicted[twice], true[twice]
    got, order = cases.call(case, answer, predicted, true), _by_order(predicted, true)
    ties = {"equal outputs got different ranks; they share the mean of theirs": order}
    cases.same(case, got, _lds(predicted, true), ties)


def _by_order(predicted: Tensor, true: Tensor) -> Tensor:
    """The LDS with ranks by argsort of argsort, which gives equal numbers different ranks."""
    return _pearson(*(x.argsort(0).argsort(0).double() for x in (predicted, true))).mean()


@exercise("10.2", "the best slope and R² of a prediction")
def slope_and_r2(answer) -> None:
    cases = Cases({}, tolerance=1e-5)
    for case, scale in (("a prediction that is too small", 1.0), ("one that is ten times too large", 30.0)):
        for seed in range(3):
            predicted, true = (x.squeeze(1) for x in _matrices(seed, 15, 1))
            predicted = scale * predicted
            got = _pair(cases.call(case, answer, predicted, true))
            _slope_and_r2(cases, case, got, predicted, true)
        cases.right = list(dict.fromkeys(cases.right))


def _pair(got) -> tuple:
    if isinstance(got, Tensor) and got.shape == (2,):
        return got[0], got[1]
    if isinstance(got, (tuple, list)) and len(got) == 2:
        return tuple(got)
    raise Wrong("return two numbers: the slope, then R².")


def _slope_and_r2(cases: Cases, case: str, got: tuple, predicted: Tensor, true: Tensor) -> None:
    a, b = predicted - predicted.mean(), true - true.mean()
    slope, r2 = (a @ b) / (a @ a), 1 - ((true - predicted) ** 2).sum() / (b @ b)
    instead = {
        "that is the slope of predicted on true; asked for is the reverse": (a @ b) / (b @ b),
        "the line goes through the origin; take both about their means": (predicted @ true)
        / (predicted @ predicted),
        "that is the correlation, which knows no scale": _pearson(predicted, true),
        "the two numbers are exchanged; the slope comes first": r2,
    }
    cases.same(f"the slope of {case}", got[0], slope, instead)
    instead = {
        "that is the squared correlation: R² of the best line, not of the prediction as it stands": _pearson(
            predicted, true
        )
        ** 2,
        "the squared errors are compared with Σ true²; compare with Σ (true − mean)²": 1
        - ((true - predicted) ** 2).sum() / (true @ true),
        "the share is of the variance of the predictions; take that of the true outputs": 1
        - ((true - predicted) ** 2).sum() / (a @ a),
        "that is the share left unexplained; subtract it from 1": 1 - r2,
        "both are taken about their means; R² also counts a shift": 1 - ((b - a) ** 2).sum() / (b @ b),
    }
    cases.same(f"R² of {case}", got[1], r2, instead)


@exercise("10.3", "a paired bootstrap interval for the difference of two methods")
def paired_bootstrap(answer) -> None:
    cases = Cases({}, tolerance=1e-5)
    for case, targets in (("one target", 1), ("four targets", 4)):
        a, true = _matrices(1, 15, targets, noise=0.2)
        b = a + 2 * (_matrices(2, 15, targets)[0] - 1)
        draws = torch.randint(15, (200, 15), generator=torch.Generator().manual_seed(targets))
        got = cases.call(case, answer, a, b, true, draws)
        got = torch.stack([torch.as_tensor(x) for x in _pair(got)])
        cases.same(f"{case}", got, *_difference(a, b, true, draws))


def _difference(a: Tensor, b: Tensor, true: Tensor, draws: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(2,): the interval; and what readers compute instead."""
    of_a, of_b = (torch.stack([_lds(x[rows], true[rows]) for rows in draws]) for x in (a, b))
    broken = torch.stack([_lds(a[rows], true) - _lds(b[rows], true) for rows in draws])
    untied = torch.stack([_by_order(a[r], true[r]) - _by_order(b[r], true[r]) for r in draws])
    difference, wide = of_a - of_b, torch.tensor([0.05, 0.95], dtype=torch.float64)
    spread = 1.96 * difference.std() * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    series = (difference, of_a, of_b, broken, untied, -difference)
    ends, ends_a, ends_b, of_broken, of_untied, of_negative = (torch.quantile(x, QUANTILES) for x in series)
    return ends, {
        "the ends of two intervals are subtracted; take the difference in each resample": ends_a - ends_b,
        "that is the widest span of two separate intervals; take the difference in each resample": (
            ends_a - ends_b.flip(0)
        ),
        "predictions are resampled and true outputs are not; take the same rows of all three": of_broken,
        "equal outputs, which every resample has, got different ranks; use the ranks of 10.1": of_untied,
        "that is b minus a; asked for is a minus b": of_negative,
        "the upper end comes first": ends.flip(0),
        "5 % is cut off at each end; an interval of 95 % cuts 2.5 %": torch.quantile(difference, wide),
        "mean ± 1.96 standard deviations assumes a normal distribution; take the quantiles": (
            difference.mean() + spread
        ),
    }


@exercise("10.4", "the p-value of a chosen set among random ones")
def against_random(answer) -> None:
    cases = Cases({}, tolerance=1e-5)
    dice = torch.Generator().manual_seed(0)
    random = torch.randn(49, generator=dice, dtype=torch.float64)
    largest = random.max()
    for case, chosen in (
        ("a change in the middle of the random ones", random.sort().values[30] + 1e-3),
        ("a change larger than all of them", largest + 1),
        ("a change smaller than all of them", random.min() - 1),
        ("a change equal to the largest of them", largest),
    ):
        got = cases.call(case, answer, chosen, random)
        _same_share(cases, case, got, chosen, random)


def _same_share(cases: Cases, case: str, got, chosen: Tensor, random: Tensor) -> None:
    count, above = len(random), (random >= chosen).sum().double()
    z = (chosen - random.mean()) / random.std()
    suspects = {
        "random sets that reach the chosen one exactly count, too": ((random > chosen).sum() + 1)
        / (count + 1),
        "the chosen set is not counted: add 1 above and below, or p can be 0": above / count,
        "1 is added above the line and not below it": (above + 1) / count,
        "1 is added below the line and not above it": above / (count + 1),
        "that is the share at or below; count the random sets at or above": ((random <= chosen).sum() + 1)
        / (count + 1),
        "sizes are compared without their sign; the question is whether the loss rises more": (
            (random.abs() >= chosen.abs()).sum() + 1
        )
        / (count + 1),
        "a normal distribution is assumed; count": 1 - torch.special.ndtr(z),
    }
    want = (above + 1) / (count + 1)
    different = {reason: x.double() for reason, x in suspects.items() if abs(x - want) > 1e-4}
    cases.same(case, got, want, different)
