"""Can the scores of a rough run be rescued? `python -m tests.experiments.rough`

Recipes like those of chapter 08, made rough by maximum pooling and large rates, from three starts each. The
derivative at w = 1 follows a function that wriggles on a scale far below that of a removal. The rescues take
it where the function is smoother, or many times:

    last half, last quarter    through the last steps alone, where the weights enter late
    centre                     at the centre of the removals
    mean of 4 sets             the mean of the derivatives without four random sets of the removed size
    mean of 4 jitters          the same at w = 1 + σ·noise, with σ the spread of a weight under the removals
    w = 1, corrected           w = 1 scaled, and a ridge on what it leaves of 15 retrainings
    retrainings alone          the same ridge without the derivative

Each is judged by LDS over 60 random removals of 5 %, with its 95 % interval; its cost is processor time, in
plain trainings. A recipe's rows of notebooks/banks/12_how_far_does_a_tangent_reach_rough.csv are written when
it is done, and a recipe that is there is not made again.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

import magic
from magic import subsets
from magic.book import data, models
from magic.evidence.comparison import Comparison
from tests.experiments import kept

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "12_how_far_does_a_tangent_reach_rough.csv"
SETS, DROP, FITTED, MEANS, TARGETS = 60, 0.05, 15, 4, 4
COLUMNS = [
    "recipe", "start", "rescue", "lds", "low", "high", "trainings", "accuracy", "moves", "n", "steps",
    "targets", "sets", "drop", "seconds", "date", "torch", "threads",
]  # fmt: skip


class Net(nn.Sequential):
    """Two convolutions with BatchNorm, each pooled, and a linear layer: chapter 08's."""

    def __init__(self, pool=nn.AvgPool2d, width=8):
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.GELU(), pool(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * width, 10))


RECIPES = {
    "average pooling": {},
    "maximum pooling": {"pool": nn.MaxPool2d},
    "maximum pooling, rate × 4": {"pool": nn.MaxPool2d, "rate": 0.2},
    "rate × 8": {"rate": 0.4},
}


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def recipe(start: int, pool=nn.AvgPool2d, rate=0.05):
    x, y, x_test, y_test = data.digits(train=800, test=500)
    torch.manual_seed(start)
    model = Net(pool).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    batches = magic.batches(len(x), size=100, epochs=8)
    scheduler = models.triangle(optimizer, len(batches))
    run = magic.Run(model, optimizer, (x.double(), y), loss, batches, scheduler=scheduler)
    return run, (x_test.double(), y_test)


def rescues(run: magic.Run, measure) -> dict:
    """name -> a function that returns (K, n) values."""

    def at(weights=None, **options) -> Tensor:
        return magic.attribute(run, measure, at=weights, progress=False, **options).values

    dice = torch.Generator().manual_seed(7)
    sigma = (DROP * (1 - DROP)) ** 0.5
    jitters = [1 + sigma * torch.randn(run.n, generator=dice) for _ in range(MEANS)]
    sets = subsets.random(run.n, DROP, MEANS, seed=99)
    return {
        "last half": lambda: at(last=run.steps // 2),
        "last quarter": lambda: at(last=run.steps // 4),
        "centre": lambda: at("centre", drop=DROP),
        "mean of 4 sets": lambda: torch.stack([at(w) for w in sets]).mean(0),
        "mean of 4 jitters": lambda: torch.stack([at(w) for w in jitters]).mean(0),
    }


def corrected(run: magic.Run, measure, values: Tensor, base: Tensor) -> Tensor:
    """(K, n): scaled values, and a ridge on what they leave of retrainings without other sets."""
    weights = subsets.random(run.n, DROP, FITTED, seed=5)
    true = magic.outputs(run, measure, weights, jobs=1, progress=False).double() - base
    moved, found = (weights - 1).double().numpy(), []
    for own, outcome in zip(values.double().numpy(), true.numpy().T, strict=True):
        told = moved @ own
        scale = float(told @ outcome / max(told @ told, 1e-300))
        rest = outcome - scale * told
        ridge = RidgeCV(alphas=np.logspace(-1, 7, 25), fit_intercept=True).fit(moved, rest)
        found.append(scale * own + ridge.coef_)
    return torch.from_numpy(np.stack(found))


def cell(name: str, start: int) -> list[dict]:
    """A row for each rescue."""
    begun = time.perf_counter()
    run, (x_test, y_test) = recipe(start, **RECIPES[name])

    def measure(model):
        return loss(model, x_test[:TARGETS], y_test[:TARGETS])

    clock = time.process_time()
    final = run.train(progress=False)
    plain = time.process_time() - clock
    with torch.no_grad():
        accuracy = (run.model(final).eval()(x_test).argmax(1) == y_test).double().mean().item()
    sets = subsets.random(run.n, DROP, SETS, seed=0)
    weights = torch.cat([torch.ones(1, run.n), sets])
    true = magic.outputs(run, measure, weights, jobs=1, progress=False).double()
    clock = time.process_time()
    scores = magic.attribute(run, measure, progress=False)
    moves, plainly = max(scores.health.moves), scores.values.double()
    found, cost = {"w = 1": plainly}, {"w = 1": (time.process_time() - clock) / plain}
    for rescue, compute in rescues(run, measure).items():
        clock = time.process_time()
        found[rescue] = compute().double()
        cost[rescue] = (time.process_time() - clock) / plain
    for rescue, values in (("w = 1, corrected", plainly), ("retrainings alone", 0 * plainly)):
        cost[rescue] = FITTED + (cost["w = 1"] if values.any() else 0)
        found[rescue] = corrected(run, measure, values, true[0])
    rows = []
    for rescue, values in found.items():
        told = true[0] + (sets - 1).double() @ values.T
        judged = Comparison(told, true[1:], true[0]).spearman
        rows.append(
            {
                "recipe": name, "start": start, "rescue": rescue, "lds": round(judged.mean, 4),
                "low": round(judged.low, 4), "high": round(judged.high, 4),
                "trainings": round(cost[rescue], 1), "accuracy": round(accuracy, 4), "moves": f"{moves:.3g}",
                "n": run.n, "steps": run.steps, "targets": TARGETS, "sets": SETS, "drop": DROP,
                "seconds": round(time.perf_counter() - begun), **kept.provenance(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = kept.read(KEPT)
    there = {(row["recipe"], int(row["start"])) for row in rows}
    for start in range(3):
        for name in RECIPES:
            if (name, start) in there:
                continue
            rows += cell(name, start)
            kept.write(KEPT, COLUMNS, rows)
            here = [row for row in rows if row["recipe"] == name and int(row["start"]) == start]
            print(name, start, here[0]["accuracy"], {row["rescue"]: row["lds"] for row in here}, flush=True)


if __name__ == "__main__":
    main()
