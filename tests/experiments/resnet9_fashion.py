"""The published ResNet-9 recipe on Fashion-MNIST: its LDS at 1 and 5 %, beside those of TRAK and EK-FAC.

`python -m tests.experiments.resnet9_fashion [--images 10000 --size 14 --width 10 --targets 8 --sets 20]`

It is trained as Chen et al. 2026 (arXiv 2609.15044) train theirs on CIFAR-10 (`magic.book.recipes.resnet9`),
at the size that is asked for: --size in pixels, --width of the first layer, whose own is 80. The outputs are
the losses of the first test images. Their scores at w = 1 are judged by trainings without random 1 and 5 % of
the images, those at the centre by the 5 %; so are TRAK's, with --models trained models, and EK-FAC's, each
with the best of a few settings, which favours them. Last, image 42 is left out for once.

Replays and trainings that were stopped go on from --folder. --out gets a row for each method and removal,
with --points the predicted and true outputs beside it; rows of the same size and device are replaced. The
seconds are those of the last call, which goes on from what there is.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import magic
from magic import baselines, subsets
from magic.book import data, recipes
from tests.experiments import kept

DROPS = (0.01, 0.05)
DIMENSIONS, DAMPINGS = (512, 2048), (None, 0.1)  # of TRAK's projection, and of EK-FAC
SIZES = ("images", "size", "width", "epochs", "batch", "targets", "sets", "models", "seed")
WHERE = (*SIZES, "device")
COLUMNS = [*WHERE, "steps", "parameters", "accuracy", "method", "removed", "lds", "low", "high", "r2",
           "seconds", "date", "torch", "threads"]  # fmt: skip
POINTS = [*WHERE, "method", "removed", "set", "target", "predicted", "true", "before"]
BANKS = Path(__file__).parents[2] / "notebooks" / "banks"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"images": 60_000, "size": 28, "width": 80, "epochs": 20, "batch": 500, "targets": 100,
             "sets": 60, "models": 3, "seed": 0}  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--folder", type=Path, default=Path("data") / "resnet9")
    parser.add_argument("--out", type=Path, default=BANKS / "15_at_the_scale_resnet9.csv")
    parser.add_argument("--points", type=Path, default=BANKS / "15_at_the_scale_resnet9_points.csv")
    return parser.parse_args(given)


@dataclass
class Found:
    """Rows for the two files, which are written whenever there is another."""

    asked: argparse.Namespace
    same: dict
    rows: list[dict] = field(default_factory=list)
    points: list[dict] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Those since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return round(self.clock - before, 1)

    def add(self, method: str, removed: str, judged=None, seconds: float | None = None) -> None:
        """A row, printed and written at once."""
        row = {"method": method, "removed": removed, "seconds": seconds}
        if judged is not None:
            figure = judged.spearman
            row |= {name: round(getattr(figure, end), 4)
                    for name, end in (("lds", "mean"), ("low", "low"), ("high", "high"))}  # fmt: skip
            row["r2"] = round(judged.r2.mean, 4)
            self.draw(method, removed, judged.predicted, judged.true, judged.baseline)
        print(row, flush=True)
        self.rows.append(self.same | row)
        self.write()

    def draw(self, method: str, removed: str, predicted, true, before) -> None:
        """Points of predicted and true outputs, (S, K), and (K,) of the model with all images."""
        given = {name: self.same[name] for name in WHERE} | {"method": method, "removed": removed}
        for s, pair in enumerate(zip(predicted.tolist(), true.tolist(), strict=True)):
            for k, (guess, truth) in enumerate(zip(*pair, strict=True)):
                place = {"set": s, "target": k, "predicted": guess, "true": truth, "before": before[k].item()}
                self.points.append(given | place)

    def write(self) -> None:
        """Both files, with these rows in the place of those of the same size and device."""
        kept.replace(self.asked.out, COLUMNS, WHERE, self.rows)
        kept.replace(self.asked.points, POINTS, WHERE, self.points)


def the_run(asked: argparse.Namespace):
    """The run, its first test images and the others, of which the accuracy is taken."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, x_test, y_test = (
        part.to(device) for part in data.fashion_mnist(asked.images, asked.targets + 500, size=asked.size)
    )

    def recipe(seed: int) -> magic.Run:
        return recipes.resnet9((x, y), asked.width, asked.epochs, asked.batch, seed=seed)

    return recipe, (x_test[: asked.targets], y_test[: asked.targets]), (x_test, y_test)


def measured(asked: argparse.Namespace) -> Found:
    """The rows of all methods."""
    recipe, test, (x_test, y_test) = the_run(asked)
    run = recipe(asked.seed)

    def measure(model):
        return recipes.classify(model, *test)

    start = time.perf_counter()
    final = run.train(progress=False)
    took = round(time.perf_counter() - start, 1)
    with torch.no_grad():
        right = (run.model(final).eval()(x_test).argmax(1) == y_test).double().mean().item()
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
    same = {name: getattr(asked, name) for name in SIZES} | {"device": device, "accuracy": round(right, 4)}
    same |= {"steps": run.steps, "parameters": sum(p.numel() for p in run.initial.params.values())}
    found = Found(asked, same | kept.provenance())
    found.add("training", "nothing", seconds=took)
    asked.folder.mkdir(parents=True, exist_ok=True)
    bank = magic.Bank(asked.folder / "bank.sqlite", run, measure)

    def judge(scores, drop: float):
        return magic.lds(scores, drop=drop, subsets=asked.sets, bank=bank, jobs=1, progress=False)

    scores = replays(found, run, measure, judge)
    predicted = scores.outputs + scores.removal_effect([42])
    true = magic.outputs(run, measure, subsets.single(run.n, [42]), bank=bank, progress=False)
    found.draw("MAGIC, w = 1", "image 42", predicted[None], true, scores.outputs)
    found.write()
    others = [recipe(seed).train(progress=False) for seed in range(asked.seed + 1, asked.seed + asked.models)]
    rivals(found, run, test, [*others, final], lambda s, drop: judge(scores.like(s.values), drop))
    return found


def replays(found: Found, run: magic.Run, measure, judge) -> magic.Attribution:
    """Rows of the scores at w = 1, which are returned, and of those at the centre of 5 %."""
    asked, made = found.asked, []
    for point, at, drops in (("w = 1", None, DROPS), ("centre", "centre", DROPS[1:])):
        found.seconds()
        scores = magic.attribute(
            run, measure, at=at, drop=0.05 if at else None, memory=asked.memory, progress=False,
            disk=asked.folder / point.replace(" ", ""),
        )  # fmt: skip
        made.append(scores)
        seconds = found.seconds()
        for drop in drops:
            found.add(f"MAGIC, {point}", f"{drop:.0%}", judge(scores, drop), seconds)
    return made[0]


def rivals(found: Found, run: magic.Run, test: tuple, states: list, judge) -> None:
    """Rows of EK-FAC and of TRAK, each with the setting that ranks best."""
    dimensions = sorted({min(dim, run.n // 4) for dim in DIMENSIONS})
    tried: tuple = (
        ("EK-FAC", DAMPINGS, lambda s: baselines.ekfac(run, test, states[-1], damping=s)),
        ("TRAK", dimensions, lambda s: baselines.trak(run, test, states, dim=s, batch_size=500)),
    )
    for method, settings, make in tried:
        found.seconds()
        try:
            scores = [make(setting) for setting in settings]
        except ImportError as missing:
            print(f"{method} is left out: {missing}")
            continue
        seconds = round(found.seconds() / len(settings), 1)
        for drop in DROPS:
            judged = max((judge(one, drop) for one in scores), key=lambda result: result.mean)
            found.add(method, f"{drop:.0%}", judged, seconds)


def main(words: list[str] | None = None) -> list[dict]:
    return measured(arguments(words)).rows


if __name__ == "__main__":
    main()
