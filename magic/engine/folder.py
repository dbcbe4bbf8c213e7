"""Whose a folder is: one run, one point, one measure, one version of the code and one machine's numerics.

A folder of anything else is refused by name, never mixed with. Nothing in it that others made is opened for
writing, emptied or removed: a folder that is not empty and not ours is refused. While a process works in a
folder, no other does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from ..identity import fingerprints
from ..identity.parts import Identity, changed, of_callable, refusal
from ..training import determinism
from ..training.optim import UPDATES
from ..training.run import Run
from .files import read_json, writable, write_json

PACKAGE = Path(__file__).parents[1]
# The modules that the bits of a state or of a score depend on, or what the files of a folder say.
NUMERICS = (
    "kernels/graph", "kernels/higher_order", "kernels/attention", "kernels/gelu", "kernels/convolution",
    "kernels/pooling",
    "kernels/normalisation_formulas", "kernels/normalisation", "kernels/layer_norm", "kernels/batch_norm",
    "kernels/rewritten", "kernels/replace", "kernels/stop_gradients",
    "training/determinism", "training/arguments", "training/examples", "training/state", "training/optim",
    "training/hypers", "training/update", "training/differentiated",
    *sorted({update.rule.__module__.removeprefix("magic.").replace(".", "/") for update in UPDATES.values()}),
    "training/network", "training/gradient", "training/run", "training/first_step",
    "engine/measuring", "engine/vjp", "engine/adjoint", "engine/schedule", "engine/actions",
    "engine/store", "engine/places",
    "engine/files", "engine/folder", "engine/resume", "engine/listeners", "engine/replay",
)  # fmt: skip
IDENTITY, LOCK = "identity.json", "magic.lock"
WHEN = "%Y-%m-%d %H:%M:%S"


@contextlib.contextmanager
def opened(place: Path, mine: Identity, trust: bool | Iterable[str]) -> Iterator[str]:
    """The folder, made if it is not there and locked for the length of a `with`; yields whose it is.

    Raises ValueError if it is of something else than `mine`, or if another process works in it.
    """
    _ours_or_empty(writable(place))
    with _locked(place):
        _ours_or_empty(place)
        yield _belongs(place, mine, trust)


def identity(run: Run, weights: Tensor, what: str, measure: Callable | None = None) -> Identity:
    """What a folder belongs to, by name. `what` says what is computed there."""
    source = [PACKAGE.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in NUMERICS]
    with determinism.alone():
        first = run.step(run.initial, weights).fingerprint()
    parts = {
        **run.identity(fresh=True),
        "the data weights": fingerprints.fingerprint(weights),
        "what is computed": what,
        "magic's code": fingerprints.digest(repr(source)),
        **{name: str(value) for name, value in determinism.numerics().items()},
        "the first step (code of model or loss, items of the data, or the machine's numerics)": first,
    }
    found = Identity(parts, run.unknown())
    return found if measure is None else found | of_callable(measure, "measure")


def _ours_or_empty(place: Path) -> None:
    """Raise ValueError for a folder in which others keep something, or whose identity was removed."""
    if os.path.lexists(place / IDENTITY):
        return
    # What may be there before the identity is written: a lock, and what a trial of the folder leaves.
    harmless = (LOCK, ".magic-")
    others = sorted(p.name for p in place.iterdir() if not p.name.startswith(harmless))
    if others:
        raise ValueError(
            f"{place} is not empty and not magic's (it holds {', '.join(map(repr, others[:3]))} and no "
            f"{IDENTITY}); give a new or empty folder"
        )


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Keep other processes out of this folder; ValueError if one is in it. On Windows, nobody is kept out."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = place / LOCK
    try:  # a file that is there is not emptied, and a link is not followed to make one elsewhere
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(f"{path} cannot be opened as a lock ({error}); give another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process works in {place}; wait, or give another folder") from error
        yield
    finally:
        os.close(lock)


def _belongs(place: Path, mine: Identity, trust: bool | Iterable[str]) -> str:
    """Whose the folder is, as its files say; ValueError unless it is of `mine`, which a new one becomes."""
    path = place / IDENTITY
    try:
        there = read_json(path)
    except FileNotFoundError:
        now = time.strftime(WHEN)
        fresh = fingerprints.digest(repr((sorted(mine.parts.items()), time.time_ns())))
        write_json(path, {"made": now, "run": fresh, "parts": mine.parts})
        return fresh
    owner, made, parts = (there.get(name) for name in ("run", "made", "parts"))
    if not (isinstance(owner, str) and isinstance(made, str) and isinstance(parts, dict)):
        raise ValueError(f"{path} was not written by this version of magic: give another folder")
    if names := changed(mine, parts, trust):
        raise ValueError(
            refusal(
                f"{place} belongs to something else{_in_words(names, mine.parts, parts)}",
                names,
                made,
                "Give another folder, or remove this one",
                mine.unknown,
            )
        )
    return owner


def _in_words(names: list[str], here: dict[str, str], there: dict[str, str]) -> str:
    """How those parts differ that are plain words or numbers; the others are digests, which say nothing."""
    words = ("what is computed", *determinism.numerics())
    told = [f"{k} is {here.get(k)!r} here, and there it is {there.get(k)!r}" for k in names if k in words]
    return f" ({'; '.join(told)})" if told else ""
