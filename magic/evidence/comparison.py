"""Is the prediction true? Predicted against true outputs, over many retrainings.

LDS, the linear datamodeling score: over random subsets of the training data, Spearman's rank
correlation between predicted and true outputs, per target (Ilyas et al. 2022; Park et al. 2023). A
prediction can rank well and be wrong in size, so Pearson's correlation, R² and the slope stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..attribution import Attribution
from ..show import Figure, Table, needs
from ..subsets import permutations, random, single
from ..training.run import Run
from .bank import Bank
from .outputs import outputs

RESAMPLES = 1000  # of the bootstrap
NUMBERS = 1_000_000  # that are resampled at once, which is quicker than one by one
QUANTILES = (0.025, 0.975)  # what 95 % lies between


@dataclass(eq=False, repr=False)
class Comparison(Table):
    """Predicted against true outputs of S retrained models.

    predicted, true  (S, K), in the unit of the measure
    baseline         (K,): outputs with nothing removed
    what             the retrainings, in words
    drop             the share removed in each, if it is the same for all
    seed             of the bootstrap
    weights          (S, n): the data weights of the retrainings, if known
    per_target       (K,): Spearman's correlation for each target
    mean, interval   the mean of `per_target`, the LDS, and its interval

    `spearman`, `pearson` and `r2` are means over targets, `slope` is one for all targets together. Each is a
    Figure, with an interval that holds 95 % of 1,000 bootstrap resamples of retrainings and targets (Efron
    1979, Annals of Statistics 7).

    Raises ValueError for other shapes, fewer than three retrainings, or an output that never varies.
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
        """(K,): Spearman's rank correlation of predicted and true, for each target."""
        return spearman(*self._columns)

    @property
    def mean(self) -> float:
        """The linear datamodeling score: the mean of `per_target`."""
        return float(self.per_target.mean())  # without its interval, whose bootstrap takes longer

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval of `mean`."""
        return self.spearman.low, self.spearman.high

    @cached_property
    def spearman(self) -> Figure:
        """Spearman's rank correlation: the linear datamodeling score, LDS."""
        return self._figure(spearman)

    @cached_property
    def pearson(self) -> Figure:
        """Pearson's correlation."""
        return self._figure(pearson)

    @cached_property
    def r2(self) -> Figure:
        """R² of the prediction as it stands: 1 − Σ(true − predicted)² / Σ(true − mean)².

        Below 0, the mean of the true outputs would have been the better prediction.
        """
        return self._figure(r2)

    @cached_property
    def slope(self) -> Figure:
        """Least-squares slope of true on predicted changes, over all targets together."""
        return self._figure(slope)

    def _figure(self, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Figure:
        """The mean of a statistic over targets, with its bootstrap interval."""
        predicted, true = self._columns
        rows, columns = _resamples(self.seed, true.shape)
        at_once, found = max(1, NUMBERS // true.size), []
        for i in range(0, RESAMPLES, at_once):
            chosen = rows[i : i + at_once, :, None], columns[i : i + at_once, None, :]
            with np.errstate(invalid="ignore", divide="ignore"):  # a resample may happen to be constant
                found.append(np.nanmean(statistic(predicted[chosen], true[chosen]), axis=1))
        low, high = np.nanquantile(np.concatenate(found), QUANTILES)
        return Figure(float(np.mean(statistic(predicted, true))), float(low), float(high))

    @property
    def caption(self) -> str:
        return f"Predicted against true: {len(self.true)} {self.what}, {self.true.shape[1]} targets"

    def rows(self) -> list[tuple[str, str]]:
        """The table: each statistic with its interval."""
        return [
            ("Spearman (LDS)", str(self.spearman)),
            ("Pearson", str(self.pearson)),
            ("R²", str(self.r2)),
            ("slope, true on predicted", str(self.slope)),
        ]

    def frame(self):
        """A DataFrame of changes against the baseline: retraining, target, predicted, true.

        Raises ImportError without pandas.
        """
        pd = needs("pandas", "notebooks")
        predicted, true = self._columns
        grid = np.indices(true.shape)
        columns = {"retraining": grid[0], "target": grid[1], "predicted": predicted, "true": true}
        return pd.DataFrame({name: x.ravel() for name, x in columns.items()})

    def plot(self, ax=None, targets: int | None = 1):
        """Predicted against true change, a dot for each retrained model; exact ones lie on the diagonal.

        targets   how many of the K are shown, from the first; None for all. Returns the axes. Raises
                  ImportError without seaborn
        """
        from ..book.plot import predicted_against_true

        return predicted_against_true(self, ax=ax, targets=targets)


def lds(
    scores: Attribution,
    drop: float = 0.01,
    subsets: int = 100,
    *,
    seed: int = 0,
    bank: Bank | None = None,
    jobs: int | None = None,
    together: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Retrain without `subsets` random sets of a fraction `drop`, and compare with the prediction.

    seed    of the sets, and of the bootstrap
    bank, jobs, together, progress   as in `magic.outputs`

    Takes `subsets` + 1 trainings, minus those in `bank`. Raises ValueError for fewer than 3 subsets, a
    fraction that rounds to no example or to all, or a target whose true output does not vary; ImportError
    without scipy. Source: Park et al. 2023, arXiv 2303.14186, section 2.
    """
    run, _ = ready(scores)
    if subsets < 3:
        raise ValueError(f"subsets={subsets}: a rank correlation needs at least 3")
    weights = random(run.n, drop, subsets, seed)
    compared = compare(scores, weights, bank=bank, jobs=jobs, together=together, progress=progress, seed=seed)
    compared.drop, compared.what = drop, f"trainings without {100 * drop:g} % of the data"
    return compared


def leave_one_out(
    scores: Attribution,
    examples: int | Iterable[int] = 30,
    *,
    seed: int = 0,
    bank: Bank | None = None,
    jobs: int | None = None,
    together: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Retrain without single examples, and compare: a number of them at random, or those given.

    seed   of the examples, and of the bootstrap
    bank, jobs, together, progress   as in `magic.outputs`

    Raises ValueError for fewer than 3 examples, or for scores without run and measure.
    """
    n = ready(scores)[0].n
    if isinstance(examples, int):
        if not 3 <= examples <= n:
            raise ValueError(f"examples={examples}: between 3 and n={n}")
        examples = permutations(n, 1, seed)[0][:examples]
    compared = compare(
        scores, single(n, examples), bank=bank, jobs=jobs, together=together, progress=progress, seed=seed
    )
    compared.what = "trainings without one example"
    return compared


def compare(
    scores: Attribution,
    weights: Tensor,
    *,
    bank: Bank | None = None,
    jobs: int | None = None,
    together: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Retrain at each row of `weights`, (S, n) as `magic.subsets` makes them, and compare.

    bank, jobs, together, progress   as in `magic.outputs`
    seed   of the bootstrap

    Takes S + 1 trainings, minus those in `bank`. Raises ValueError for fewer than 3 rows, for a target
    whose true or predicted output does not vary, and for scores without run and measure; ImportError without
    scipy.
    """
    run, measure = ready(scores)
    everything = torch.ones(1, run.n, device="cpu")
    rows = torch.cat([everything, weights.to(everything)])
    true = outputs(run, measure, rows, bank=bank, jobs=jobs, together=together, progress=progress).cpu()
    return Comparison(scores.predict(weights).cpu(), true[1:], true[0], seed=seed, weights=weights)


def ready(scores: Attribution) -> tuple[Run, Callable]:
    """Run and measure of the scores. Errors that would otherwise show after the trainings are raised here."""
    needs("scipy.stats", "notebooks")
    if scores.run is None or scores.measure is None:
        raise ValueError(
            "these scores know no run and measure; give them to Attribution.load(path, run, measure)"
        )
    return scores.run, scores.measure


@lru_cache(maxsize=8)
def _resamples(seed: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of each resample, with replacement: (RESAMPLES, S) and (RESAMPLES, K)."""
    dice = np.random.default_rng(seed)
    draws = [[dice.integers(size, size=size) for size in shape] for _ in range(RESAMPLES)]
    return np.stack([rows for rows, _ in draws]), np.stack([columns for _, columns in draws])


def _refuse_constant(true: Tensor, predicted: Tensor) -> None:
    for what, x, why in (
        ("true", true, "in every retrained model: drop more, or measure something that varies"),
        ("predicted", predicted, "for every subset: its scores are all 0, or all equal"),
    ):
        constant = (x == x[0]).all(dim=0)
        if constant.any():
            target = constant.nonzero()[0].item()
            raise ValueError(f"the {what} output of target {target} is the same {why}")


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,): Spearman's rank correlation of the columns of two (S, K) arrays; ties share their rank.

    As the other statistics, it takes (R, S, K) arrays as well, and then returns a row for each of the R.
    """
    rankdata = needs("scipy.stats", "notebooks").rankdata
    return pearson(rankdata(a, axis=-2), rankdata(b, axis=-2))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,): Pearson's correlation of the columns of two (S, K) arrays."""
    a, b = _centred(a), _centred(b)
    return (a * b).sum(-2) / np.sqrt((a**2).sum(-2) * (b**2).sum(-2))


def r2(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(K,): the share of the true outputs' variance that the prediction explains."""
    return 1 - ((true - predicted) ** 2).sum(-2) / (_centred(true) ** 2).sum(-2)


def slope(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(1,): least-squares slope of true on predicted, all columns together, each about its mean."""
    a, b = _centred(predicted), _centred(true)
    return ((a * b).sum((-2, -1)) / (a * a).sum((-2, -1)))[..., None]


def _centred(a: np.ndarray) -> np.ndarray:
    """Each column less its mean."""
    return a - a.mean(-2, keepdims=True)
