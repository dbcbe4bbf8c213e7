"""How near is near-optimal? What the best linear predictor could still add, as a number with an interval.

A prediction that is affine in w leaves a residual r = true − predicted. A part of r is linear in w, and a
better linear predictor would have it; the rest no linear predictor can have. Over random sets of one size
the two can be told apart without fitting anything, though n is larger than the number S of retrainings:
with D_s = w_s − E w, whose covariance is κ·(1 − 11ᵀ/n) with κ = p(1 − p)·n/(n − 1), the variance of the
linear part of r is ‖E[D r]‖²/κ, and

    L = 1/(S(S − 1)) · Σ_{s≠t} r_s r_t (D_s·D_t) / κ

estimates it without bias: a U-statistic (Hoeffding 1948), the first-order term of the decomposition of
Efron & Stein 1981 on sets of fixed size. Training is deterministic, so that nothing of r is noise. The
better the prediction to begin with, the smaller r and the sharper the answer: the standard error is about
var(r)·√(2n)/S.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from ..show import Figure, Table, needs, warn_of_old
from .comparison import Comparison, pearson, r2, spearman

QUANTILE = 1.96  # a normal variable is within so many standard deviations with probability 0.95


@dataclass(eq=False, repr=False)
class Optimality(Table):
    """What a prediction reaches over random sets of one size, and what the best linear one would.

    predicted, true  (S, K), in the unit of the measure
    weights          (S, n), 0 or 1, every row with the same number of removed examples

    `correlation`, `best_correlation` and `gap` are Figures: means over targets, each with a 95 % interval.
    Its variance is that of the jackknife over retrainings (Efron & Stein 1981, Annals of Statistics 9) and
    that of a mean over targets, added.
    """

    predicted: np.ndarray
    true: np.ndarray
    weights: np.ndarray

    @cached_property
    def correlation(self) -> Figure:
        """Pearson's correlation of predicted and true."""
        return self._figure(0)

    @cached_property
    def best_correlation(self) -> Figure:
        """That of the best linear predictor with the truth: √ of the share of the variance that is linear."""
        return self._figure(1)

    @property
    def best(self) -> Figure:
        """The old name of `best_correlation`."""
        warn_of_old("Optimality.best", "Optimality.best_correlation")
        return self.best_correlation

    @cached_property
    def gap(self) -> Figure:
        """best_correlation − correlation, the optimality gap."""
        return self._figure(2)

    @property
    def per_target(self) -> np.ndarray:
        """(3, K): correlation, best correlation and gap of each target."""
        return self._all[0]

    @cached_property
    def _gram(self) -> np.ndarray:
        """(S, S): D_s·D_t / κ, with a zero diagonal."""
        n = self.weights.shape[1]
        p = 1 - self.weights[0].mean()
        centred = self.weights - (1 - p)
        gram = centred @ centred.T / (p * (1 - p) * n / (n - 1))
        np.fill_diagonal(gram, 0)
        return gram

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """(3, K) figures, and (S, 3, K) the same without each retraining."""
        S = len(self.true)
        every = np.arange(S)
        without = np.stack([self._estimate(every[every != s]) for s in range(S)])
        return self._estimate(every), without

    def _estimate(self, rows: np.ndarray) -> np.ndarray:
        """(3, K): correlation, best correlation and gap from the retrainings with these numbers, (S',).

        The prediction is first stretched to fit the truth best, which no correlation notices. Of the variance
        of what it leaves, `linear` is the module docstring's L; a predictor with that part would leave
        `left − linear`. It is divided by S − 2, since a mean and a slope were fitted.
        """
        predicted, true = (x[rows] - x[rows].mean(0) for x in (self.predicted, self.true))
        residual = true - predicted * ((predicted * true).sum(0) / (predicted**2).sum(0))
        S = len(rows)
        variance = (true**2).sum(0) / (S - 1)
        left = (residual**2).sum(0) / (S - 2)
        linear = (residual * (self._gram[np.ix_(rows, rows)] @ residual)).sum(0) / (S * (S - 1))
        reached = pearson(predicted, true)
        best = np.sqrt(np.clip(1 - (left - linear) / variance, 0, None))
        return np.stack([reached, best, best - reached])

    def _figure(self, i: int) -> Figure:
        """Row i of the figures: the mean over targets, and its interval."""
        whole, without = self._all[0][i], self._all[1][:, i].mean(1)
        S, K = self.true.shape
        variance = (S - 1) / S * ((without - without.mean()) ** 2).sum() + whole.var(ddof=1) / K
        mean = float(whole.mean())
        return Figure(mean, mean - QUANTILE * variance**0.5, mean + QUANTILE * variance**0.5)

    @property
    def caption(self) -> str:
        S, K = self.true.shape
        removed = 1 - self.weights[0].mean()
        return f"How near to the best linear predictor? {S} sets with {removed:.3g} removed, {K} targets"

    def rows(self) -> list[tuple[str, str]]:
        """The table: what is reached, what could be, and the difference."""
        return [
            ("correlation", f"{self.correlation:.4f}"),
            ("of the best linear predictor", f"{self.best_correlation:.4f}"),
            ("optimality gap", f"{self.gap:.4f}"),
        ]


def optimality(result: Comparison) -> Optimality:
    """The optimality gap of what `magic.lds` or `magic.compare` compared, over random sets of one size.

    Raises ValueError for sets of several sizes, weights other than 0 and 1, or fewer than 10 retrainings
    or 2 targets, of which no interval could be told, and for a comparison that does not know its weights.
    """
    weights = _weights(result)
    removed = (weights == 0).sum(1)
    if not ((weights == 0) | (weights == 1)).all() or (removed != removed[0]).any():
        raise ValueError(
            "the gap is told from random sets of one size: each weight 0 or 1, as many 0 in each row"
        )
    if weights.shape[0] < 10 or result.true.shape[1] < 2:
        raise ValueError(f"true is {tuple(result.true.shape)}: at least 10 retrainings and 2 targets")
    predicted, true = (x.double().cpu().numpy() for x in (result.predicted, result.true))
    return Optimality(predicted, true, weights)


def ridge(result: Comparison, sizes: Iterable[int] = (), *, prior: bool = True, folds: int = 5):
    """A learning curve of the best linear predictor that can be *fitted* to the retrainings.

    A ridge regression (Hoerl & Kennard 1970, Technometrics 12) of the outputs on the data weights, judged on
    retrainings that it was not fitted to: a DataFrame with the columns size, LDS and R2.

    sizes    numbers of retrainings; that of all is always there. As long as the curve rises, the bank is
             too small to say what is best
    prior    fit what the prediction leaves (the scores and a correction); else fit from nothing
    folds    parts for the cross-validation: each is predicted from a fit to the others

    Raises ValueError for a size of fewer than two retrainings in each fold or more than there are, and
    ImportError without pandas or scikit-learn.
    """
    pd = needs("pandas", "notebooks")
    weights = _weights(result)
    predicted, true = (x.double().cpu().numpy() for x in (result.predicted, result.true))
    start = predicted if prior else np.zeros_like(predicted)
    rows = []
    for size in sorted({*sizes, len(true)}):
        if not 2 * folds <= size <= len(true):
            raise ValueError(f"sizes: {size} is not between {2 * folds} and {len(true)}")
        fitted = start[:size] + _held_out(weights[:size], (true - start)[:size], folds)
        scored = (float(score(fitted, true[:size]).mean()) for score in (spearman, r2))
        rows.append((size, *scored))
    return pd.DataFrame(rows, columns=["size", "LDS", "R2"])


def _held_out(x: np.ndarray, y: np.ndarray, folds: int) -> np.ndarray:
    """(S, K): outputs y, (S, K), at weights x, (S, n), each row predicted from a fit to the other folds.

    The penalty of each target is chosen from 25 over eight powers of ten by the error of leaving out one row.
    """
    linear = needs("sklearn.linear_model", "notebooks", "ridge needs")
    selection = needs("sklearn.model_selection", "notebooks", "ridge needs")
    found = np.empty_like(y)
    for seen, held in selection.KFold(folds).split(x):
        model = linear.RidgeCV(alphas=np.logspace(-1, 7, 25), alpha_per_target=y.shape[1] > 1)
        found[held] = model.fit(x[seen], y[seen]).predict(x[held]).reshape(len(held), -1)
    return found


def _weights(result: Comparison) -> np.ndarray:
    """(S, n): the weights of a comparison; ValueError for one that does not know them."""
    if not isinstance(result.weights, Tensor):
        raise ValueError("this comparison does not know its weights; make it with magic.lds or magic.compare")
    return result.weights.double().cpu().numpy()
