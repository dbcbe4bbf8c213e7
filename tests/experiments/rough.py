"""Rough trainings: whence they come, what rescues their scores, what warns.

`python -m tests.experiments.rough [processes]`

Recipes on 800 digits, each of which turns one knob of a smooth one (a few turn two), from three starts (the
longest from one); and chapter 09's ResNet-9 on 2,000 images of clothing, at its rate and at ten times that.
For each, everything is measured that the questions need: 50 retrainings without a random 5 % of the data, and
30 of the same with weights that are jittered by 1 %; the scores at w = 1, at the centre and at three other
sets; eight trainings with jittered weights. Where the LDS is below .95, also what may rescue it: the scores
at three jittered weights, through the last half and the last quarter, and of a smooth neighbour; 15 more
retrainings, for corrections. The roughest recipes are replayed at 32 sets, for means over many. All that
takes minutes a recipe, and is kept in data/rough, a file for each: a recipe that is there is not measured
again. From these files tests/experiments/rough_tables.py writes three tables that chapter 12 shows,

    notebooks/banks/12_how_far_does_a_tangent_reach_recipes.csv   a row for each recipe and start
    notebooks/banks/12_how_far_does_a_tangent_reach_rescues.csv   a row for each of these and each rescue
    notebooks/banks/12_how_far_does_a_tangent_reach_many.csv      a row for each mean over many sets
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import joblib
import numpy as np
import torch
from torch import Tensor, nn

import magic
from magic import smoothness, subsets
from magic.book import data, models
from magic.book.recipes import classify

RAW = Path("data") / "rough"
SETS, AGAIN, DROP, FITTED, MEANS, TARGETS, JITTER, HEALTHY = 50, 30, 0.05, 15, 3, 4, 0.01, 0.95

STARTS = 3
MANY = 32  # sets, of the roughest recipes

KNOBS: dict[str, dict[str, dict]] = {
    "none": {"our recipe": {}},
    "rate": {"rate × 2": {"rate": 0.1}, "rate × 4": {"rate": 0.2}, "rate × 8": {"rate": 0.4}},
    "batch": {"batches of 25": {"size": 25}, "batches of 400": {"size": 400}},
    "momentum": {
        "no momentum, rate × 10": {"momentum": 0.0, "rate": 0.5},
        "momentum .98, rate ÷ 5": {"momentum": 0.98, "rate": 0.01},
        "momentum .98": {"momentum": 0.98},
    },
    "activation": {
        "ReLU": {"activation": nn.ReLU},
        "maximum pooling": {"pool": nn.MaxPool2d},
        "ReLU, maximum pooling": {"activation": nn.ReLU, "pool": nn.MaxPool2d},
        "ReLU, maximum pooling, rate × 4": {"activation": nn.ReLU, "pool": nn.MaxPool2d, "rate": 0.2},
        "ReLU, rate × 4": {"activation": nn.ReLU, "rate": 0.2},
        "maximum pooling, AdamW": {"pool": nn.MaxPool2d, "adam": True, "rate": 3e-3},
        "leaky ReLU": {"activation": nn.LeakyReLU},
    },
    "dropout": {"dropout .1": {"dropout": 0.1}, "dropout .4": {"dropout": 0.4}},
    "normalisation": {"GroupNorm": {"norm": "group"}, "GroupNorm, rate × 10": {"norm": "group", "rate": 0.5}},
    "AdamW": {
        "AdamW": {"adam": True, "rate": 3e-3},
        "AdamW, rate × 5": {"adam": True, "rate": 15e-3},
        "AdamW, batches of 25": {"adam": True, "rate": 3e-3, "size": 25},
        "AdamW, rate × 5, batches of 25": {"adam": True, "rate": 15e-3, "size": 25},
        "AdamW, rate × 5, batches of 25, eps_root 1e-6": {
            "adam": True, "rate": 15e-3, "size": 25, "eps_root": 1e-6,
        },
    },
    "width": {"width 2": {"width": 2}, "width 32": {"width": 32}},
    "steps": {
        "4 epochs": {"epochs": 4},
        "32 epochs": {"epochs": 32},
        "32 epochs, rate × 4": {"epochs": 32, "rate": 0.2},
    },
    "ResNet-9, clothing": {
        "ResNet-9, clothing, rate ÷ 10": {"clothing": True, "rate": 0.005},
        "ResNet-9, clothing": {"clothing": True},
    },
}  # fmt: skip
ROUGHEST = ["rate × 8", "GroupNorm, rate × 10", "ReLU, maximum pooling, rate × 4"]
# From one start only.
LONG = ["width 32", "32 epochs", "32 epochs, rate × 4", "ResNet-9, clothing, rate ÷ 10"]
RECIPES = {name: knobs for group in KNOBS.values() for name, knobs in group.items()}


class Net(nn.Sequential):
    """Two convolutions with a normalisation, each pooled, and a linear layer, as in chapter 08."""

    def __init__(self, width=8, activation=nn.GELU, norm="batch", pool=nn.AvgPool2d, dropout=0.0):
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [models.normalisation(norm, outputs), activation(), pool(2)]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, 10))


def start_of(start: int, clothing: bool, net: dict) -> tuple[nn.Module, list[Tensor]]:
    """The network, and the images and labels to train and to test it: float64, or chapter 09's float32."""
    torch.manual_seed(start)
    if clothing:
        return models.ResNet9(1, width=8, scale=1.0), list(data.fashion_mnist(2000, 500, size=14))
    x, y, x_test, y_test = data.digits(train=800, test=500)
    return Net(**net).double(), [x.double(), y, x_test.double(), y_test]


def recipe(
    start: int, rate=0.05, momentum=0.9, size=100, epochs=8, adam=False, eps_root=0.0, clothing=False, **net
):
    """The run, and the test images with their labels. The start is that of the weights, not of the order."""
    model, (x, y, x_test, y_test) = start_of(start, clothing, net)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    if adam:
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "eps_root": eps_root}], lr=rate)
    batches = magic.batches(len(x), size=size, epochs=epochs)
    scheduler = models.triangle(optimizer, len(batches))
    run = magic.Run(model, optimizer, (x, y), classify, batches, scheduler=scheduler)
    return run, (x_test, y_test)


def neighbour(knobs: dict) -> dict:
    """The nearest recipe that is smooth by what chapter 08 says: no kinks, no higher rate, rounded AdamW."""
    if "clothing" in knobs:
        return {**knobs, "rate": 0.005}
    adam = knobs.get("adam", False)
    rate = 3e-3 if adam else 0.05
    calm = {"activation": nn.GELU, "pool": nn.AvgPool2d, "momentum": 0.9}
    calm["rate"] = min(knobs.get("rate", rate), rate)
    return {**knobs, **calm, **({"eps_root": 1e-6} if adam else {})}


class Watch:
    """Processor time of what is done, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work):
        clock = time.process_time()
        found = work()
        self.seconds[name] = time.process_time() - clock
        return found


def measured(name: str, start: int) -> dict[str, np.ndarray]:
    """Everything that is asked of one recipe from one start."""
    knobs, watch = RECIPES[name], Watch()
    run, (x_test, y_test) = recipe(start, **knobs)

    def measure(model):
        return classify(model, x_test[:TARGETS], y_test[:TARGETS])

    def scores(at=None, of=run, **options) -> magic.Attribution:
        return magic.attribute(of, measure, at=at, progress=False, **options)

    def true(weights: Tensor) -> Tensor:
        return magic.outputs(run, measure, weights, jobs=1, progress=False)

    run.train(progress=False)  # what only a first training takes time for
    final = watch("plain", lambda: run.train(progress=False))
    with torch.no_grad():
        accuracy = (run.model(final).eval()(x_test).argmax(1) == y_test).double().mean()
    dice = torch.Generator().manual_seed(7)
    sets = subsets.random(run.n, DROP, SETS, seed=0)
    others = subsets.random(run.n, DROP, MEANS, seed=99)
    near = 1 + JITTER * torch.randn(8, run.n, generator=dice)
    again = sets[:AGAIN] * (1 + JITTER * torch.randn(AGAIN, run.n, generator=dice))
    plain = watch("w = 1", scores)
    at_sets = watch("sets", lambda: [scores(w) for w in others])
    found = {
        "base": plain.outputs, "true": true(sets), "again": true(again),
        "near": near, "near_true": true(near),
        "w = 1": plain.values, "centre": watch("centre", lambda: scores("centre", drop=DROP)).values,
        "sets": torch.stack([s.values for s in at_sets]),
        "moves": torch.tensor(plain.health.moves), "decades": torch.tensor(plain.health.decades),
        "accuracy": accuracy,
    }  # fmt: skip
    ways = smoothness.directions(run.n, DROP, 2)
    found["metasmoothness"] = torch.tensor(
        watch("metasmoothness", lambda: [smoothness.metasmoothness(run, way, start=final) for way in ways])
    )
    if magic.Comparison(plain.predict(sets), found["true"], plain.outputs).mean < HEALTHY:
        wide = 1 + (DROP * (1 - DROP)) ** 0.5 * torch.randn(MEANS, run.n, generator=dice)
        beside, _ = recipe(start, **neighbour(knobs))
        found |= {
            "jitters": torch.stack([s.values for s in watch("jitters", lambda: [scores(w) for w in wide])]),
            "last half": watch("last half", lambda: scores(last=run.steps // 2)).values,
            "last quarter": watch("last quarter", lambda: scores(last=run.steps // 4)).values,
            "smooth neighbour": watch("smooth neighbour", lambda: scores(of=beside)).values,
            "fitted": true(subsets.random(run.n, DROP, FITTED, seed=5)),
        }  # fmt: skip
    times = {f"time {name}": np.array(seconds) for name, seconds in watch.seconds.items()}
    return {name: x.detach().double().cpu().numpy() for name, x in found.items()} | times


def many(name: str) -> dict[str, np.ndarray]:
    """The scores at many other sets, (sets, targets, n)."""
    run, (x_test, y_test) = recipe(0, **RECIPES[name])

    def measure(model):
        return classify(model, x_test[:TARGETS], y_test[:TARGETS])

    others = subsets.random(run.n, DROP, MANY, seed=99)
    return {"sets": np.stack([magic.attribute(run, measure, at=w, progress=False).values for w in others])}


def place(name: str, start: int | str) -> Path:
    return RAW / f"{name.replace(' ', '_').replace(',', '')}_{start}.npz"


def cell(name: str, start: int | str) -> str:
    torch.set_num_threads(1)
    clock = time.perf_counter()
    try:
        found = many(name) if start == "many" else measured(name, int(start))
    except (magic.NonFinite, RuntimeError, ValueError) as error:
        return f"{name} {start}: {type(error).__name__}: {str(error)[:200]}"
    RAW.mkdir(parents=True, exist_ok=True)
    part = place(name, start).with_suffix(".part.npz")
    np.savez(part, **found)
    part.replace(place(name, start))
    return f"{name} {start}: {time.perf_counter() - clock:.0f} s"


def main(jobs: int) -> None:
    quick = [name for name in RECIPES if name not in LONG]
    cells: list[tuple[str, int | str]] = [(name, start) for start in range(STARTS) for name in quick]
    cells += [(name, 0) for name in LONG] + [(name, "many") for name in ROUGHEST]
    todo = [(name, start) for name, start in cells if not place(name, start).exists()]
    for told in joblib.Parallel(jobs, return_as="generator_unordered")(
        joblib.delayed(cell)(name, start) for name, start in todo
    ):
        print(told, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
