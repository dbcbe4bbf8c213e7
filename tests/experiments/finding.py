"""What else scores are used for, and what they take: `python -m tests.experiments.finding`

Three questions to every baseline, each with the setting that was best in tests/experiments/judges.py, on the
digits with 20 test images as targets:

    brittleness   the 1, 2, 5 and 10 % of the training images that help a test image most by the scores are
                  left out; of how many test images does the probability of the right class fall below ½?
    wrong labels  60 of the 1,200 labels are wrong: the area under the ROC curve of finding them by the sum of
                  an image's scores over the targets
    copies        three training images are noisy copies of each test image: the area under the ROC curve of
                  finding them by their scores for it
    memory        the bytes of tensors at the peak, beyond those that were there before

A method that is there is not measured again. A row of notebooks/banks/10_is_it_right_finding.csv is a
method, with 95 % intervals by bootstrap over targets (wrong labels: over images).
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import magic
from magic.book import data
from magic.engine import footprint
from magic.evidence.comparison import QUANTILES, RESAMPLES
from magic.evidence.judging import area
from tests.experiments import judges, kept

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "10_is_it_right_finding.csv"
TARGETS, WRONG, COPIES, NOISE = 20, 60, 3, 0.3
UNSIGNED = ("loss", "gradient norm")
COUNTS = (12, 24, 60, 120)


def clean() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    x, y, *test = data.digits(train=1200, test=500)
    return x, y, (test[0][:TARGETS], test[1][:TARGETS])


def planted():
    """The same with wrong labels and with copies: also which images have a wrong label, (60,), and which are
    copies of each target, (20, 3)."""
    x, y, test = clean()
    dice = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(x), generator=dice)[: WRONG + COPIES * TARGETS]
    wrong, copies = chosen[:WRONG], chosen[WRONG:].view(TARGETS, COPIES)
    y[wrong] = (y[wrong] + torch.randint(1, 10, (WRONG,), generator=dice)) % 10
    spread = NOISE * x.std()
    for k, rows in enumerate(copies):
        x[rows] = test[0][k] + spread * torch.randn(COPIES, *x.shape[1:], generator=dice)
        y[rows] = test[1][k]
    return x, y, test, wrong, copies


def methods(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]):
    """Yield (name, how to compute its scores): MAGIC, and every other one in its best setting."""
    best = {row["method"]: row["setting"] for row in kept.read(judges.KEPT) if row["task"] == "digits"}
    run = judges.mlp(x, y)

    def measure(model):
        return run.loss(model, *test)

    yield "MAGIC", lambda: magic.attribute(run, measure, progress=False)
    found = judges.candidates("digits", lambda start: (judges.mlp(x, y, start), test), run, test)
    for name, settings in found.items():
        yield name, settings[best[name]][1]


def over_targets(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of (K,) values, and the ends of its interval."""
    dice = np.random.default_rng(0)
    found = [values[dice.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return (float(values.mean()), *map(float, np.quantile(found, QUANTILES)))


def wrong_labels(name: str, scores: magic.Attribution, wrong: Tensor) -> tuple[float, float, float]:
    """A wrong label raises losses: its sum of scores is large. Its own loss and its gradient are large, too,
    which the controls count as helping."""
    order = scores.values.sum(0)
    truth = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, wrong, True)
    return area(truth, -order if name in UNSIGNED else order, seed=0)


def copies_found(scores: magic.Attribution, copies: Tensor) -> tuple[float, float, float]:
    areas = []
    for values, rows in zip(scores.values.double(), copies, strict=True):
        truth = torch.zeros(len(values)).index_fill_(0, rows, 1.0)
        areas.append(roc_auc_score(truth, -values))
    return over_targets(np.array(areas))


def main() -> None:
    torch.set_num_threads(1)
    (x, y, test, wrong, copies), (clean_x, clean_y, _) = planted(), clean()
    rows = kept.read(KEPT)
    done = {row["method"] for row in rows}
    on_planted = dict(methods(x, y, test))
    for name, compute in methods(clean_x, clean_y, test):
        if name in done and name != "MAGIC":
            continue
        scores, _, peak = footprint.measured(compute, torch.device("cpu"))
        if name == "MAGIC":
            exact = scores
            bank = magic.Bank(":memory:", exact.run, exact.measure, how="together")
            if name in done:
                continue
        fragile = magic.brittleness(
            exact.like(scores.values), COUNTS, float(np.log(2)), together=40, bank=bank, progress=False
        )
        dirty = on_planted[name]()
        figures = {
            **{f"turned {c}": over_targets((fragile.needed <= c).double().numpy()) for c in COUNTS},
            "wrong labels": wrong_labels(name, dirty, wrong), "copies": copies_found(dirty, copies),
        }  # fmt: skip
        ends = {
            f"{kind}{end}": f"{x:.4g}"
            for kind, figure in figures.items()
            for end, x in zip(("", " low", " high"), figure, strict=True)
        }
        rows.append(
            {
                "method": name, "megabytes": f"{peak / 1e6:.4g}", **ends, "n": len(x), "targets": TARGETS,
                "wrong": WRONG, "copies of each": COPIES, **kept.provenance(),
            }
        )  # fmt: skip
        print(name, rows[-1]["megabytes"], {k: round(f[0], 3) for k, f in figures.items()}, flush=True)
        kept.write(KEPT, list(rows[0]), rows)


if __name__ == "__main__":
    main()
