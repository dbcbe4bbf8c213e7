"""Is the prediction true? Predicted against true outputs, over many retrainings.

LDS, the linear datamodeling score: over random subsets of the training data, Spearman's rank
correlation between predicted and true outputs, per target (Ilyas et al. 2022; Park et al. 2023). A
prediction can rank well and be wrong in size, so Pearson's correlation, R² and the slope stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .. import subsets as choose
from ..attribution import Attribution
from ..show import Table, needs
from .bank import Bank
from .outputs import outputs

RESAMPLES = 1000


@dataclass(eq=False, repr=False)
class Comparison(Table):
    """Predicted against true outputs of S retrained models.

    predicted, true  (S, K)
    baseline         (K,): outputs with nothing removed
    what             the retrainings, in words
    weights          (S, n) they were trained with, if known
    per_target       (K,): Spearman correlation of each target's column, `mean` their mean
    interval         95 % of 1,000 bootstrap resamples, over subsets and targets
    """

    predicted: Tensor
    true: Tensor
    baseline: Tensor
    what: str = "retrainings"
    drop: float | None = None
    seed: int = 0
    weights: Tensor | None = None

    def __post_init__(self):
        if self.predicted.shape != self.true.shape or self.true.dim() != 2:
            raise ValueError(
                f"predicted is {tuple(self.predicted.shape)} and true {tuple(self.true.shape)}; "
                "both are (S, K)"
            )
        if len(self.true) < 3:
            raise ValueError(f"{len(self.true)} retrainings: a rank correlation needs at least 3")
        _refuse_constant(self.true, self.predicted)

    @cached_property
    def _columns(self) -> tuple[np.ndarray, ...]:
        """Predicted and true changes against the baseline."""
        return tuple((x - self.baseline).double().cpu().numpy() for x in (self.predicted, self.true))

    @cached_property
    def per_target(self) -> np.ndarray:
        return spearman(*self._columns)

    @property
    def mean(self) -> float:
        return float(self.per_target.mean())

    @cached_property
    def interval(self) -> tuple[float, float]:
        return self._interval(spearman)

    @cached_property
    def pearson(self) -> tuple[float, float, float]:
        """Pearson's correlation, mean over targets, and its interval."""
        return self._figure(pearson)

    @cached_property
    def r2(self) -> tuple[float, float, float]:
        """R² of the prediction as it stands, mean over targets, and its interval: 1 − Σ(true − predicted)² /
        Σ(true − mean)². Below 0, the mean of the true outputs would have been the better prediction."""
        return self._figure(r2)

    @cached_property
    def slope(self) -> tuple[float, float, float]:
        """Least-squares slope of true on predicted changes over all targets together, and its interval."""
        return self._figure(slope)

    def _figure(self, statistic) -> tuple[float, float, float]:
        return (float(np.mean(statistic(*self._columns))), *self._interval(statistic))

    def _interval(self, statistic) -> tuple[float, float]:
        predicted, true = self._columns
        dice = np.random.default_rng(self.seed)
        found = []
        for _ in range(RESAMPLES):
            rows = dice.integers(len(true), size=len(true))
            columns = dice.integers(true.shape[1], size=true.shape[1])
            with np.errstate(invalid="ignore", divide="ignore"):  # a resample may happen to be constant
                found.append(np.nanmean(statistic(predicted[rows][:, columns], true[rows][:, columns])))
        low, high = np.nanquantile(found, [0.025, 0.975])
        return float(low), float(high)

    @property
    def caption(self) -> str:
        return f"Predicted against true: {len(self.true)} {self.what}, {self.true.shape[1]} targets"

    def rows(self) -> list[tuple[str, str]]:
        def line(mean, low, high):
            return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

        return [
            ("Spearman (LDS)", line(self.mean, *self.interval)),
            ("Pearson", line(*self.pearson)),
            ("R²", line(*self.r2)),
            ("slope, true on predicted", line(*self.slope)),
        ]

    def frame(self):
        """A DataFrame of changes against the baseline: retraining, target, predicted, true."""
        pd = needs("pandas", "notebooks")

        predicted, true = self._columns
        retraining, target = np.indices(true.shape)
        columns = {"retraining": retraining, "target": target, "predicted": predicted, "true": true}
        return pd.DataFrame({name: x.ravel() for name, x in columns.items()})

    def plot(self, ax=None, targets: int | None = 1):
        """Predicted against true change, one dot per retrained model; the diagonal is exactness."""
        from ..book.plot import predicted_against_true

        return predicted_against_true(self, ax=ax, targets=targets)


def lds(
    scores: Attribution,
    drop: float = 0.01,
    subsets: int = 100,
    *,
    seed: int = 0,
    progress: bool = True,
    bank: Bank | None = None,
    jobs: int | None = None,
) -> Comparison:
    """Retrain without `subsets` random sets of a fraction `drop`, and compare with the prediction.

    Takes `subsets` + 1 trainings, less those that `bank` holds; `jobs` as in `magic.outputs`.
    Raises ValueError for fewer than 3 subsets, a fraction that rounds to nothing or everything, or a
    target whose true output does not vary.
    """
    _check_ready(scores)
    if subsets < 3:
        raise ValueError(f"subsets={subsets}: a rank correlation needs at least 3")
    weights = choose.random(scores.run.n, drop, subsets, seed)
    compared = compare(scores, weights, bank=bank, jobs=jobs, progress=progress, seed=seed)
    compared.drop, compared.what = drop, f"trainings without {100 * drop:g} % of the data"
    return compared


def leave_one_out(
    scores: Attribution, examples: int | Iterable[int] = 30, *, seed: int = 0, **options
) -> Comparison:
    """Retrain without single examples, and compare: a number of them at random, or those given.

    `options` are those of `compare`: bank, jobs, progress.
    """
    _check_ready(scores)
    n = scores.run.n
    if isinstance(examples, int):
        if not 3 <= examples <= n:
            raise ValueError(f"examples={examples}: between 3 and n={n}")
        examples = choose.permutations(n, 1, seed)[0][:examples]
    compared = compare(scores, choose.single(n, examples), seed=seed, **options)
    compared.what = "trainings without one example"
    return compared


def compare(
    scores: Attribution,
    weights: Tensor,
    *,
    bank: Bank | None = None,
    jobs: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Retrain at each row of `weights`, (S, n) as `magic.subsets` makes them, and compare."""
    _check_ready(scores)
    everything = torch.ones(1, scores.run.n, device="cpu")
    rows = torch.cat([everything, weights.to(everything)])
    true = outputs(scores.run, scores.measure, rows, bank=bank, jobs=jobs, progress=progress).cpu()
    return Comparison(scores.predict(weights).cpu(), true[1:], true[0], seed=seed, weights=weights)


def _check_ready(scores: Attribution) -> None:
    """Raise, before anything is trained, for what would only show afterwards."""
    needs("scipy.stats", "notebooks")
    if scores.run is None or scores.measure is None:
        raise ValueError(
            "these scores know no run and measure; give them to Attribution.load(path, run, measure)"
        )


def _refuse_constant(true: Tensor, predicted: Tensor) -> None:
    constant = (true == true[0]).all(dim=0)
    if constant.any():
        raise ValueError(
            f"the true output of target {constant.nonzero()[0].item()} is the same in every retrained "
            "model, so there is nothing to rank: drop more, or measure something that varies"
        )
    constant = (predicted == predicted[0]).all(dim=0)
    if constant.any():
        raise ValueError(
            f"the predicted output of target {constant.nonzero()[0].item()} is the same for every subset: "
            "its scores are all 0, or all equal"
        )


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,): Spearman's rank correlation of the columns of two (S, K) arrays; ties share their rank."""
    rankdata = needs("scipy.stats", "notebooks").rankdata
    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,): Pearson's correlation of the columns of two (S, K) arrays."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


def r2(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(K,): the share of the true outputs' variance that the prediction explains."""
    return 1 - ((true - predicted) ** 2).sum(0) / ((true - true.mean(0)) ** 2).sum(0)


def slope(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(1,): least-squares slope of true on predicted, all columns together, each about its mean."""
    a, b = predicted - predicted.mean(0), true - true.mean(0)
    return np.array([(a * b).sum() / (a * a).sum()])
