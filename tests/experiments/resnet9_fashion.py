"""The published ResNet-9 recipe on Fashion-MNIST: its LDS at 1 and 5 %.

`python -m tests.experiments.resnet9_fashion [--images 10000 --size 14 --width 10 --targets 8 --sets 30]`

It is trained as Chen et al. 2026 (arXiv 2609.15044) train theirs on CIFAR-10 (`magic.book.recipes.resnet9`),
at the size that is asked for: --size in pixels, --width of the first layer, whose own is 80. The outputs are
the losses of some test images. At w = 1 their scores are judged by trainings without random 1 % of the images
and, as those at the centre, without 5 %. Replays and trainings that were stopped go on from --folder. A line
of JSON is added to --out; its seconds are those of the last call.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import magic
from magic.book import data, recipes
from tests.experiments import kept


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--sets", type=int, default=60)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--folder", type=Path, default=Path("data") / "resnet9")
    parser.add_argument("--out", type=Path, default=Path("data") / "resnet9" / "found.jsonl")
    return parser.parse_args(given)


def measured(asked: argparse.Namespace) -> dict:
    """The row for --out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, x_test, y_test = (
        part.to(device) for part in data.fashion_mnist(asked.images, asked.targets + 500, size=asked.size)
    )
    run = recipes.resnet9((x, y), asked.width, asked.epochs, asked.batch)

    def measure(model):
        return recipes.classify(model, x_test[: asked.targets], y_test[: asked.targets])

    clock = time.perf_counter()
    final = run.train(progress=False)
    seconds = {"training, s": round(time.perf_counter() - clock, 1)}
    with torch.no_grad():
        right = (run.model(final).eval()(x_test).argmax(1) == y_test).double().mean().item()
    asked.folder.mkdir(parents=True, exist_ok=True)
    bank, found = magic.Bank(asked.folder / "bank.sqlite", run, measure), {}
    for point, at, drops in (("w = 1", None, (0.01, 0.05)), ("centre", "centre", (0.05,))):
        clock = time.perf_counter()
        scores = magic.attribute(
            run, measure, at=at, drop=0.05 if at else None, memory=asked.memory, progress=False,
            disk=asked.folder / point.replace(" ", ""),
        )  # fmt: skip
        seconds[f"scores at {point}, s"] = round(time.perf_counter() - clock, 1)
        print(point, seconds, flush=True)
        for drop in drops:
            judged = magic.lds(scores, drop=drop, subsets=asked.sets, bank=bank, jobs=1, progress=False)
            found |= {
                f"{point}, {drop:.0%}, {end}": round(getattr(judged.spearman, end), 4)
                for end in ("mean", "low", "high")
            }
            print(found, flush=True)
    sizes = {name: getattr(asked, name) for name in ("images", "size", "width", "epochs", "batch", "targets")}
    return {
        **sizes, "accuracy": round(right, 4), "sets": asked.sets, "steps": run.steps, **found, **seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", **kept.provenance(),
    }  # fmt: skip


def main(words: list[str] | None = None) -> dict:
    asked = arguments(words)
    return kept.add_line(asked.out, measured(asked))


if __name__ == "__main__":
    main()
