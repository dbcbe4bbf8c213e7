"""Modules that have moved into a wing. The old names of those that were used from outside still work, with a
warning, for one version."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

from .show import warn_of_old

MOVED = {
    "bank": "evidence.bank",
    "best_linear": "evidence.optimality",
    "checks": "book.checks",
    "counterfactual": "evidence.outputs",
    "data": "book.data",
    "directory": "engine.resume",
    "equivalents": "kernels.replace",
    "files": "engine.files",
    "footprint": "engine.footprint",
    "health": "engine.health",
    "inputs": "training.arguments",
    "judgement": "evidence.comparison",
    "models": "book.models",
    "optim": "training.optim",
    "plot": "book.plot",
    "record": "training.record",
    "replay": "engine.replay",
    "retraining": "evidence.retraining",
    "second_order": "evidence.curvature",
    "state": "training.state",
    "store": "engine.store",
    "timeline": "engine.timeline",
    "trial": "training.first_step",
    "tryout": "engine.trial",
    "where": "points",
    "witness": "engine.witness",
    "adjoint": "engine.adjoint",
    "baselines": "evidence.baselines",
    "determinism": "training.determinism",
    "schedule": "engine.schedule",
    "smoothness": "evidence.smoothness",
}
PUBLIC = {"baselines", "determinism", "schedule", "smoothness"}  # attributes of the package, and stay so


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `magic.old`, and gives the module that it is now."""

    def find_spec(self, name, path=None, target=None):
        package, _, old = name.rpartition(".")
        if package == __package__ and old in MOVED:
            return importlib.util.spec_from_loader(name, self)
        return None

    def exec_module(self, module):
        old = module.__name__.rpartition(".")[2]
        new = f"{__package__}.{MOVED[old]}"
        if old not in PUBLIC:
            warn_of_old(f"magic.{old}", new)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """From now on, the old names are found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def attribute(name: str):
    """What `magic.name` is, for a name of old."""
    if name in MOVED:
        return importlib.import_module(f"{__package__}.{name}")
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
