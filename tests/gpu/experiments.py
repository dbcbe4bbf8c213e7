"""The parts of `python -m tests.gpu` that are experiments of tests/experiments, and take several calls.

Each keeps its states and retrainings in build/gpu, whatever folder the results go to. So a call that ends
before the experiment does loses little: the next goes on from there. Its tables come beside the results.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path

from .stages import ROOT, Teller

KEPT = ROOT / "build" / "gpu"
# name -> the module in tests.experiments, the recipe in magic.book.recipes, and the words of a rehearsal
KNOWN = {
    "resnet9": (
        "resnet9_fashion", "resnet9",
        "--images 60 --size 8 --width 2 --epochs 1 --batch 20 --targets 2 --sets 3",
    ),
    "gpt2-wikitext": ("gpt2_wikitext", "gpt2", "--small --sets 3 --targets 2 --drop 0.1"),
}  # fmt: skip


def experiment(teller: Teller, name: str) -> None:
    """Do what is left of an experiment: at its full size, or a rehearsal of it; and tell its rows."""
    from magic.book import recipes

    module, recipe, small = KNOWN[name]
    with teller.trying(name):
        made = importlib.import_module(f"tests.experiments.{module}")
        folder = f"{name}-rehearsal" if teller.small else name
        kept, tables = KEPT / folder, Path(teller.into).resolve().parent / folder
        words = small.split() if teller.small else []
        rows = made.main([*words, *paths(made.arguments(words), kept, tables)])
        seed = inspect.signature(getattr(recipes, recipe)).parameters["seed"].default
        tell_rows(teller, [rows] if isinstance(rows, dict) else list(rows), {"seed": seed})


def paths(asked: argparse.Namespace, kept: Path, tables: Path) -> list[str]:
    """The words that put the experiment's folder into the one, and the files it writes into the other.

    An experiment without a folder keeps its retrainings beside its file, which then is in the first, too.
    """
    for folder in (kept, tables):
        folder.mkdir(parents=True, exist_ok=True)
    words = []
    for name, value in vars(asked).items():
        if isinstance(value, Path):
            place = tables / value.name if "folder" in vars(asked) else kept / value.name
            words += [f"--{name}", str(kept if name == "folder" else place)]
    return words


def tell_rows(teller: Teller, rows: list[dict], more: dict) -> None:
    """Tell what all rows have in common, and `more` that they lack, once; then what is each row's own."""
    full = [{name: x for name, x in row.items() if x not in (None, "")} for row in rows]
    same = {name: x for name, x in full[0].items() if all(row.get(name) == x for row in full)} if full else {}
    teller.tell(**(more | same))
    for row in full:
        if own := {name: x for name, x in row.items() if name not in same}:
            teller.tell(**own)
