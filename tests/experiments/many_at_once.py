"""What it saves to retrain many models together, and to share targets between processes.

`python -m tests.experiments.many_at_once [--networks mlp,conv --rounds 3]`, on a machine with nothing else
to do

For each network: --trainings retrainings by `magic.outputs(together=)`, beside some of them one by one, both
in one process; and the scores of --targets targets by `magic.attribute(jobs=)`, beside those of one process.
The two are timed in turns; the medians of the rounds go into --out, where rows of the same network and device
are replaced.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import magic
from magic import subsets
from magic.book import data, models, recipes
from tests import bench
from tests.experiments import kept

OUT = Path(__file__).parents[2] / "notebooks" / "banks" / "15_at_the_scale_speed.csv"
COLUMNS = ["what", "network", "parameters", "steps", "batch", "count", "seconds_one", "seconds_many", "ratio",
           "rounds", "cores", "device", "date", "torch", "threads"]  # fmt: skip


def small() -> bench.Work:
    """Digits and a network of 2,400 parameters."""
    torch.manual_seed(0)
    return replace(bench.build("mlp"), name="small MLP", model=models.MLP((64, 32, 10)))


def resnet9() -> bench.Work:
    """The published ResNet-9, an eighth as wide, on clothing of 14 × 14 pixels, for ten steps."""
    x, y, *test = data.fashion_mnist(train=1000, test=64, size=14)
    run = recipes.resnet9((x, y), width=10, size=100)
    return bench.Work(
        "ResNet-9, width 10", run.model(run.initial), bench.momentum, (x, y), test, recipes.classify,
        torch.stack(list(run.batches[:10])),
    )  # fmt: skip


NETWORKS = {
    "small": small, "mlp": partial(bench.build, "mlp"), "conv": partial(bench.build, "conv"),
    "resnet9": resnet9,
}  # fmt: skip


def medians(rounds: int, *jobs: Callable) -> list[float]:
    """The median seconds of each, done in turns."""
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, own in zip(jobs, times, strict=True):
            own.append(bench.seconds(job))
    return [statistics.median(own) for own in times]


def together(work: bench.Work, count: int, rounds: int) -> dict:
    """So many retrainings at once, and what as many take one by one, by a quarter of them."""
    run, few = work.run(), max(1, count // 4)
    measure, weights = work.measure(4), subsets.random(len(work.data[0]), 0.05, count, 0)
    one, many = medians(
        rounds,
        lambda: magic.outputs(run, measure, weights[:few], jobs=1, progress=False),
        lambda: magic.outputs(run, measure, weights, together=count, progress=False),
    )
    one *= count / few
    return {"what": "together", "count": count, "seconds_one": one, "seconds_many": many}


def shared(work: bench.Work, targets: int, jobs: int, rounds: int) -> dict:
    """The scores of so many targets in several processes, which are there already, and in one."""
    run, measure = work.run(), work.measure(targets)
    found: list = []

    def scores(jobs: int):
        found.append(magic.attribute(run, measure, memory="1GB", jobs=jobs, progress=False).values)

    scores(jobs)
    one, many = medians(rounds, lambda: scores(1), lambda: scores(jobs))
    if not all(torch.equal(found[0], values) for values in found):
        raise RuntimeError("the scores of several processes have other bits than those of one")
    return {"what": f"jobs={jobs}", "count": targets, "seconds_one": one, "seconds_many": many}


def rows_of(name: str, asked: argparse.Namespace) -> list[dict]:
    """The rows of a network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = NETWORKS[name]().to(device)
    work = replace(work, order=work.order[: asked.steps])
    found = [together(work, asked.trainings, asked.rounds)]
    if device == "cpu" and asked.jobs > 1 and name in asked.shared.split(","):
        found.append(shared(work, asked.targets, asked.jobs, asked.rounds))
    same = {
        "network": work.name, "parameters": sum(p.numel() for p in work.model.parameters()),
        "steps": len(work.order), "batch": len(work.order[0]), "rounds": asked.rounds,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip
    for row in found:
        one, many = row["seconds_one"], row["seconds_many"]
        row |= same | kept.provenance() | {"ratio": round(one / many, 3)}
        row |= {"seconds_one": round(one, 3), "seconds_many": round(many, 3)}
        print(row, flush=True)
    return found


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    for name, value in {"trainings": 16, "targets": 32, "jobs": 2, "rounds": 3, "steps": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shared", default="mlp", help="the networks whose targets are shared, too")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    new = [row for name in asked.networks.split(",") for row in rows_of(name, asked)]
    kept.replace(asked.out, COLUMNS, ("what", "network", "device"), new)
    return new


if __name__ == "__main__":
    main()
