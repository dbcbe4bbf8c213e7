"""One seed's scores, another seed's model: `python -m tests.experiments.seeds`

A run is one training of many that its recipe allows: the initial weights and the order of the batches come
from a seed. Twelve seeds of one recipe are attributed, and each is retrained without the same 100 random
sets of 5 %. How well does the mean of the scores of S seeds predict a seed that is not among them? The mean
of the true outputs of the other seeds is the ceiling: what all of them know, without any error of a
derivative. Each row of notebooks/banks/10_is_it_right_seeds.csv is a mean over seeds, sets and
targets, with the interval of 300 bootstrap resamples of all three.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import magic
from magic import subsets
from magic.book import data
from magic.book.recipes import classify
from magic.evidence.comparison import QUANTILES, spearman
from tests.experiments import judges, kept

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "10_is_it_right_seeds.csv"
SEEDS, SETS, DROP, TARGETS, RESAMPLES = 12, 100, 0.05, 10, 300
COLUMNS = [
    "differs", "predicted by", "seeds", "lds", "low", "high", "n", "sets", "targets", "drop", "date", "torch",
    "threads",
]  # fmt: skip
# what differs -> whether the start does, and the order
DIFFERS = {"the order": (False, True), "the start": (True, False), "both": (True, True)}


def measured(differs: str) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, sets, targets): predicted changes and true ones."""
    x, y, x_test, y_test = data.digits(train=1200, test=500)

    def measure(model):
        return classify(model, x_test[:TARGETS], y_test[:TARGETS])

    predicted, true = [], []
    for number in range(SEEDS):
        start, order = (number if other else 0 for other in DIFFERS[differs])
        run = judges.mlp(x, y, start, order)
        sets = subsets.random(run.n, DROP, SETS, seed=0)
        rows = torch.cat([torch.ones(1, run.n), sets])
        outputs = magic.outputs(run, measure, rows, together=50, progress=False).double()
        true.append(outputs[1:] - outputs[0])
        predicted.append(magic.attribute(run, measure, progress=False).effect(sets).double())
    return torch.stack(predicted).numpy(), torch.stack(true).numpy()


def others(values: np.ndarray, number: int, count: int) -> np.ndarray:
    """(sets, targets): the mean over the `count` seeds that come after this one, in a circle."""
    return values[[(number + i) % SEEDS for i in range(1, count + 1)]].mean(0)


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """(who predicts, by how many seeds) -> the (seeds, sets, targets) predictions of each seed's outputs."""
    found = {("its own scores", 1): predicted}
    for count in (1, 2, 4, 8, SEEDS - 1):
        for kind, values in (("others' scores", predicted), ("others' outputs", true)):
            found[kind, count] = np.stack([others(values, number, count) for number in range(SEEDS)])
    return found


def mean_lds(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.nanmean(spearman(predicted, true)))


def interval(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    dice, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = np.ix_(*(dice.integers(size, size=size) for size in true.shape))
        found.append(mean_lds(predicted[chosen], true[chosen]))
    low, high = np.quantile(found, QUANTILES)
    return float(low), float(high)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for differs in DIFFERS:
        clock = time.perf_counter()
        predicted, true = measured(differs)
        for (kind, count), told in correlations(predicted, true).items():
            low, high = interval(told, true)
            rows.append(
                {
                    "differs": differs, "predicted by": kind, "seeds": count,
                    "lds": round(mean_lds(told, true), 4), "low": round(low, 4), "high": round(high, 4),
                    "n": 1200, "sets": SETS, "targets": TARGETS, "drop": DROP, **kept.provenance(),
                }
            )  # fmt: skip
            print(*list(rows[-1].values())[:6], flush=True)
        print(f"{differs}: {time.perf_counter() - clock:.0f} s", flush=True)
        kept.write(KEPT, COLUMNS, rows)


if __name__ == "__main__":
    main()
