"""Every baseline, on three tasks, before every judge: `python -m tests.experiments.judges`

The tasks: the digits of chapter 10; a convolutional net with BatchNorm and momentum on Fashion-MNIST; a
small GPT-2 on Python's documentation, chapter 13's recipe. The targets are the losses of eight test examples.
Each method has a few settings; the one with the highest LDS on the very sets of the comparison is kept, which
favours the methods with settings to try. The judges are those of `magic.judge`: random sets, single examples,
and the examples that a method ranks first, with 95 % intervals. Costs are processor time, in plain trainings.

A task's rows of notebooks/banks/10_is_it_right_judges.csv are written when it is done; a task that is there
is not made again.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

import magic
from magic import baselines, subsets
from magic.book import data, models
from magic.book.recipes import classify
from magic.evidence.comparison import Comparison
from tests.experiments import kept, language_sweep

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "10_is_it_right_judges.csv"
TARGETS, SETS, DROP, SINGLE, SEED = 8, 60, 0.05, 30, 0
JUDGES = ("lds", "alone", "removed")
COLUMNS = [
    "task", "method", "setting", "tried", "trainings",
    *(f"{judge}{end}" for judge in JUDGES for end in ("", "_low", "_high")),
    "n", "steps", "parameters", "targets", "sets", "drop", "single", "seed", "date", "torch", "threads",
]  # fmt: skip


def mlp(x: Tensor, y: Tensor, start: int = 0, order: int = 0) -> magic.Run:
    """Chapter 10's run on these digits, with seeds of the initial weights and of the batches' order."""
    torch.manual_seed(start)
    model = models.MLP((64, 128, 10)).to(x.dtype)
    batches = magic.batches(len(x), size=100, epochs=20, seed=order)
    return magic.Run(model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), classify, batches)


def digits(start: int = 0):
    """Chapter 10's run, and its first test images."""
    x, y, *test = data.digits(train=1200, test=500)
    return mlp(x, y, start), tuple(part[:TARGETS] for part in test)


def fashion(start: int = 0):
    """A convolutional net with BatchNorm and momentum, as in chapter 10, on a quarter of its images."""
    x, y, *test = data.fashion_mnist(train=1000, test=100, size=14)
    torch.manual_seed(start)
    net = models.ConvNet(width=8, norm="batch")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    batches = magic.batches(len(x), size=50, epochs=8, seed=0)
    rate = models.triangle(optimizer, len(batches))
    run = magic.Run(net, optimizer, (x, y), classify, batches, scheduler=rate)
    return run, tuple(part[:TARGETS] for part in test)


def language(start: int = 0):
    """Chapter 13's recipe on half of its passages, as in its sweep.

    Another start has the rows of the initial weights in another order."""
    sweep = language_sweep
    train, test, words = data.documentation(
        train=sweep.PASSAGES, test=200, length=sweep.LENGTH, words=sweep.WORDS
    )
    run = sweep.language_run(len(words), train, *sweep.CHAPTER)
    if start:
        dice = torch.Generator().manual_seed(start)
        params = run.initial.params
        other = {k: p[torch.randperm(len(p), generator=dice)] for k, p in params.items()}
        run = magic.changed(run, start=other)
    return run, (test[:TARGETS],)


TASKS = {"digits": digits, "fashion": fashion, "language": language}


def candidates(name: str, make, run: magic.Run, test: tuple) -> dict[str, dict[str, tuple]]:
    """method -> setting -> (trainings needed before, how to compute the scores)."""
    states, state, weights = [], run.initial, run.weights()
    while state.step < run.steps:
        state = run.step(state, weights)
        states += [state] if state.step % (run.steps // 6) == 0 else []
    final = states[-1] if states[-1].step == run.steps else run.train(progress=False)
    three = [states[1], states[3], final]
    starts = [make(start)[0].train(progress=False) for start in range(1, 5)]
    paces = (0.1, 0.3, 1.0) if name != "language" else (10.0, 100.0, 1000.0)
    dims = (64, 128, run.n // 4)
    found = {
        "EK-FAC": {
            f"damping {d}": (1, lambda d=d: baselines.ekfac(run, test, final, damping=d))
            for d in (None, 1e-3, 1e-1)
        },
        "SOURCE": {
            f"3 segments, pace {p:g}": (1, lambda p=p: baselines.source(run, test, three, pace=p))
            for p in paces
        },
        "DVEmb": {
            f"pace {p:g}": (1, lambda p=p: baselines.dvemb(run, test, pace=p, progress=False)) for p in paces
        },
        "TRAK": {
            f"five models, {d}": (5, lambda d=d: baselines.trak(run, test, [*starts, final], dim=d))
            for d in dims
        },
        "TracIn": {"six states": (1, lambda: baselines.tracin(run, test, states))},
        "gradient similarity": {
            kind: (1, lambda c=c: baselines.gradient_similarity(run, test, final, cosine=c))
            for kind, c in (("product", False), ("cosine", True))
        },
        "embeddings": {"last layer": (1, lambda: baselines.embeddings(run, test, final))},
        "loss": {"": (1, lambda: baselines.loss(run, test, final))},
        "gradient norm": {"": (1, lambda: baselines.gradient_norm(run, test, final))},
        "chance": {"": (0, lambda: baselines.random_scores(run, test, final))},
    }
    if name == "language":
        found["BM25"] = {"": (0, lambda: baselines.bm25(run, test, final))}
    return found


def task(name: str) -> list[dict]:
    """A row for each method."""
    run, test = TASKS[name]()
    start = time.process_time()
    run.train(progress=False)
    plain = time.process_time() - start

    def measure(model):
        return run.loss(model, *test)

    start = time.process_time()
    exact = magic.attribute(run, measure, progress=False)
    best = {"MAGIC": ("", 1, (time.process_time() - start) / plain, exact)}
    bank = magic.Bank(":memory:", run, measure)
    sets = subsets.random(run.n, DROP, SETS, SEED)
    true = magic.outputs(run, measure, torch.cat([torch.ones(1, run.n), sets]), bank=bank, progress=False)
    for method, settings in candidates(name, TASKS[name], run, test).items():
        tried = []
        for setting, (before, compute) in settings.items():
            start = time.process_time()
            scores = exact.like(compute().values)
            cost = before + (time.process_time() - start) / plain
            judged = Comparison(scores.predict(sets).double(), true[1:].double(), true[0].double())
            tried.append((judged.mean, setting, cost, scores))
            print(
                f"{name:<9} {method:<20} {setting:<22} LDS {judged.mean:6.3f}   {cost:6.1f} trainings",
                flush=True,
            )
        _, setting, cost, scores = max(tried, key=lambda one: one[0])
        best[method] = (setting, len(tried), cost, scores)
    options = {"drop": DROP, "subsets": SETS, "examples": SINGLE, "seed": SEED}
    said = magic.judge({k: v[-1] for k, v in best.items()}, bank=bank, progress=False, **options)
    print(said, flush=True)
    rows = []
    for method, (setting, tried, cost, _) in best.items():
        figures = {
            f"{judge}{end}": f"{x:.4g}"
            for judge in JUDGES
            for end, x in zip(("", "_low", "_high"), getattr(said, judge)[method], strict=True)
        }
        rows.append(
            {
                "task": name, "method": method, "setting": setting, "tried": tried,
                "trainings": round(cost, 1), **figures, "n": run.n, "steps": run.steps,
                "parameters": sum(p.numel() for p in run.initial.params.values()), "targets": TARGETS,
                "sets": SETS, "drop": DROP, "single": SINGLE, "seed": SEED,
                **kept.provenance(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = kept.read(KEPT)
    for name in TASKS:
        if name not in {row["task"] for row in rows}:
            rows += task(name)
            kept.write(KEPT, COLUMNS, rows)


if __name__ == "__main__":
    main()
