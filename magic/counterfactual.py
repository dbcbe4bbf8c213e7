"""What would really have happened: retrain without the examples, and judge the prediction by it.

LDS, the linear datamodeling score: over random subsets of the training data, the Spearman
correlation between predicted and true outputs, per target (Ilyas et al. 2022; Park et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import determinism
from .attribution import Attribution
from .inputs import check_indices
from .replay import measured_outputs
from .run import Run
from .show import bar
from .state import State


def retrain(run: Run, without: Iterable[int], progress: bool = True) -> State:
    """The final state of the same run without these training examples: their data weights are 0."""
    weights = run.weights()
    weights[check_indices(without, run.n).to(weights.device)] = 0.0
    return run.train(weights, progress)


def random_subsets(n: int, drop: float, subsets: int, seed: int = 0) -> Tensor:
    """(subsets, n) data weights: each row drops the same fraction of the examples, at random.

    Raises ValueError when the fraction rounds to no example or to all of them.
    """
    count = round(drop * n)
    if not 0 < count < n:
        raise ValueError(
            f"drop={drop} of n={n} examples rounds to {count}; a subset drops between 1 and {n - 1}: "
            f"use a fraction between {0.5 / n:.2g} and {1 - 0.5 / n:.6g}"
        )
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(subsets, n, device="cpu")
    for row in weights:
        row[torch.randperm(n, generator=generator, device="cpu")[:count]] = 0.0
    return weights


@dataclass(eq=False, repr=False)
class LDS:
    """Predicted against true outputs over random subsets.

    predicted, true  (S, K): outputs of S retrained models
    baseline         (K,): outputs with nothing removed
    drop             the fraction of the examples that each subset lacks
    per_target       (K,): Spearman correlation of each target's column
    mean             their mean
    interval         its 95 % bootstrap interval, over subsets and targets
    """

    predicted: Tensor
    true: Tensor
    baseline: Tensor
    drop: float
    per_target: np.ndarray
    mean: float
    interval: tuple[float, float]

    def plot(self, ax=None, targets: int | None = 1):
        """Predicted against true change, one dot per retrained model; the diagonal is exactness."""
        from .plot import predicted_against_true

        return predicted_against_true(self, ax=ax, targets=targets)

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"LDS {self.mean:.3f} [{low:.3f}, {high:.3f}]: {len(self.true)} subsets without "
            f"{self.drop:.3g} of the data, {self.true.shape[1]} targets"
        )


def lds(
    scores: Attribution,
    drop: float = 0.01,
    subsets: int = 100,
    *,
    seed: int = 0,
    progress: bool = True,
) -> LDS:
    """Retrain without `subsets` random sets of a fraction `drop`, and compare with the prediction.

    Takes `subsets` + 1 trainings. Raises ValueError for fewer than 3 subsets, a fraction that rounds to
    nothing or everything, or a target whose true output does not vary.
    """
    if scores.run is None or scores.measure is None:
        raise ValueError(
            "these scores know no run and measure; give them to Attribution.load(path, run, measure)"
        )
    if subsets < 3:
        raise ValueError(f"subsets={subsets}: a rank correlation needs at least 3")
    run, weights = scores.run, random_subsets(scores.run.n, drop, subsets, seed)
    everything = torch.ones(1, run.n, device="cpu")
    outputs = true_outputs(run, scores.measure, torch.cat([everything, weights]), progress).cpu()
    return judge(scores.predict(weights).cpu(), outputs[1:], outputs[0], drop, seed)


def true_outputs(run: Run, measure: Callable, weights: Tensor, progress: bool = True) -> Tensor:
    """(S, K): measured outputs of the models trained with each row of `weights`, (S, n)."""
    rows = []
    with determinism.fix(), bar(len(weights), "retrain", progress) as shown:
        for row in weights:
            rows.append(measured_outputs(run, run.train(row, progress=False), measure))
            shown.update()
    return torch.stack(rows)


def judge(predicted: Tensor, true: Tensor, baseline: Tensor, drop: float, seed: int = 0) -> LDS:
    """The LDS of (S, K) predicted against (S, K) true outputs, with its bootstrap interval."""
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
    per_target = spearman(predicted.numpy(), true.numpy())
    dice = np.random.default_rng(seed)
    means = []
    for _ in range(1000):
        rows = dice.integers(len(true), size=len(true))
        columns = dice.integers(true.shape[1], size=true.shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may happen to be constant
            resampled = spearman(predicted.numpy()[rows], true.numpy()[rows])
        means.append(np.nanmean(resampled[columns]))
    low, high = np.nanquantile(means, [0.025, 0.975])
    return LDS(
        predicted, true, baseline, drop, per_target, float(per_target.mean()), (float(low), float(high))
    )


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,): Spearman's rank correlation of the columns of two (S, K) arrays; ties share their rank."""
    try:
        from scipy.stats import rankdata
    except ImportError as error:
        raise ImportError(
            "rank correlations need scipy: pip install 'magic-attribution[notebooks]'"
        ) from error
    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (a, b))
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
