"""A folder in which a long run survives being killed, and goes on to the same bits.

It holds states that do not fit into memory, what training passed through, and, now and then, how far
the work is: a state while training, the cotangents and scores while going back. Each file is written
whole or not at all and carries a fingerprint of its bits, so a kill at any moment costs at most the
work since the last note.

What is in a folder belongs to one run, one point, one measure, one version of the code and one
machine's numerics. Anything else is refused by name, never mixed. Nothing in it that others made is
opened for writing, emptied or removed: a folder that is not empty and not ours is refused.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..identity import fingerprints
from ..identity.parts import Identity, changed, of_callable, refusal
from ..training import determinism
from ..training.record import Passed, ReplayMismatch, checksums
from ..training.run import Run
from ..training.state import Cotangent, State
from .files import PARTS, read, read_json, writable, write, write_json
from .store import Disk

# the modules that bits depend on
NUMERICS = (
    "kernels/higher_order", "kernels/gelu", "kernels/convolution", "kernels/pooling",
    "kernels/normalisation_formulas", "kernels/normalisation", "kernels/layer_norm", "kernels/batch_norm",
    "kernels/rewritten", "kernels/replace", "kernels/stop_gradients",
    "training/determinism", "training/arguments", "training/examples", "training/state", "training/optim",
    "training/hypers", "training/update", "training/sgd", "training/adam", "training/rmsprop",
    "training/network", "training/gradient", "training/run", "training/first_step",
    "engine/adjoint", "engine/schedule", "engine/store", "engine/files", "engine/resume", "engine/replay",
)  # fmt: skip
PACKAGE = Path(__file__).parents[1]
IDENTITY, CHOICES, PASSED, LOCK = "identity.json", "choices.json", "passed.json", "magic.lock"
WHEN = "%Y-%m-%d %H:%M:%S"
EVERY = 10.0  # seconds between notes at least; and 50 times what a note takes


@dataclass(frozen=True)
class Progress:
    """How far a replay is.

    values, outputs   (K, n) and (K,), as far as they are known
    rows     the targets in work; those before them are done
    t        the step that `cotangent` is taken at, or None before the way back
    sizes    step -> the norm of each target's cotangent there
    witnessed  step -> how far the derivative was from a finite difference there, None where that cannot
             be told
    verified   how many states were compared with what training noted
    """

    values: Tensor
    outputs: Tensor
    rows: slice
    t: int | None = None
    cotangent: Cotangent | None = None
    sizes: dict[int, list[float]] = field(default_factory=dict)
    witnessed: dict[int, float | None] = field(default_factory=dict)
    verified: int = 0


def identity(run: Run, weights: Tensor, what: str, measure: Callable | None = None) -> Identity:
    """What a folder belongs to, by name. `what` says what is computed there."""
    source = [
        Path(__file__).parents[1].joinpath(f"{name}.py").read_text(encoding="utf-8") for name in NUMERICS
    ]
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


class Directory:
    """The folder of one training or one replay. Use as `with Directory.open(...) as folder:`.

    Raises ValueError for a folder of another run or one that another process works in, OSError for one
    that cannot be written.
    """

    def __init__(self, path: Path, run: Run, owner: str):
        self.path, self._run, self._owner = path, run, owner
        self.states = Disk(path / "states", run.initial, "state", owner)
        self._training = Disk(path / "training", run.initial, "training", owner)
        self._last, self._took = time.monotonic(), 0.0

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: str | os.PathLike,
        run: Run,
        weights: Tensor,
        what: str,
        measure: Callable | None = None,
        trust: bool | Iterable[str] = False,
    ) -> Iterator[Directory]:
        """The folder, locked, made if it is not there; ValueError if it is of something else.

        trust  names of changed parts that the reader vouches for; True for all code, and for all that
               cannot be known
        """
        place = Path(path)
        mine = identity(run, weights, what, measure)
        _ours_or_empty(writable(place))
        with _locked(place):
            _ours_or_empty(place)
            owner = _belongs(place, mine, trust)
            folder = cls(place, run, owner)
            for inner in (folder.states.folder, folder._training.folder):
                writable(inner)
            for part in place.glob(PARTS):
                part.unlink(missing_ok=True)
            yield folder

    # -- choices that must be the same when the work goes on ---------------------------------------

    def choices(self, made: dict) -> dict:
        """These choices, or those made when the work began."""
        path = self.path / CHOICES
        if not path.exists():
            write_json(path, made)
        found = read_json(path)
        if found.keys() != made.keys() or not all(type(x) is int and x > 0 for x in found.values()):
            raise ValueError(f"{path} is damaged: it holds {found}. Remove the folder, or give another")
        return found

    # -- notes ------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return time.monotonic() - self._last >= max(EVERY, 50 * self._took)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._took = self._last - start

    def note_training(self, state: State, passed: Passed, now: bool = False) -> None:
        """Now and then, or `now`, keep the state that training is in."""
        if not (now or self._due()):
            return
        with self._noting():
            before = self._training.steps()
            self._training.save(state.step, state)
            self._note_passed(passed)
            for t in before:  # only now, since the last state counts with its checksums alone
                if t != state.step:
                    self._training.drop(t)

    def _note_passed(self, passed: Passed) -> None:
        content = {"run": self._owner, "noted": passed.noted, "totals": passed.totals}
        write_json(self.path / PASSED, content)

    def note(self, progress: Progress, passed: Passed, now: bool = False) -> None:
        """Now and then, or `now`, keep how far the way back is."""
        if not (now or self._due()):
            return
        with self._noting():
            tensors = {"values": progress.values, "outputs": progress.outputs}
            if progress.cotangent is not None:
                tensors |= {f"cotangent/{k}": x for k, x in progress.cotangent.flatten().items()}
            rows, sizes = [progress.rows.start, progress.rows.stop], list(progress.sizes.items())
            meta = {"rows": rows, "t": progress.t, "sizes": sizes, "verified": progress.verified}
            meta |= {"witnessed": list(progress.witnessed.items()), **self._mark()}
            write(self.path / "progress.safetensors", tensors, meta)
            self._note_passed(passed)

    def _mark(self) -> dict[str, str]:
        return {"kind": "progress", "run": self._owner}

    # -- going on ---------------------------------------------------------------------------------

    def passed(self) -> tuple[dict[int, dict[str, int]], dict[int, float]]:
        """What the training noted here passed through, by step: checksums of states, and total losses."""
        path = self.path / PASSED
        try:
            found = read_json(path)
        except FileNotFoundError:
            return {}, {}
        if found.get("run") != self._owner:
            raise ReplayMismatch(f"{path} is of another folder. Remove this folder, or put back its own file")
        try:
            noted = {int(t): {str(k): int(x) for k, x in sums.items()} for t, sums in found["noted"].items()}
            return noted, {int(t): float(total) for t, total in found["totals"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged, or was not written by magic: {error!r}. Remove the folder, or "
                "give another"
            ) from error

    def progress(self) -> Progress | None:
        """How far the way back was, if it had begun."""
        path = self.path / "progress.safetensors"
        if not path.exists():
            return None
        tensors, meta = read(path, self._run.device, self._mark())
        flat = {k.removeprefix("cotangent/"): x for k, x in tensors.items() if k.startswith("cotangent/")}
        cotangent = Cotangent.unflatten(flat, meta["t"]) if meta["t"] is not None else None
        sizes = {t: list(row) for t, row in meta["sizes"]}
        rows = slice(*meta["rows"])
        return Progress(
            tensors["values"],
            tensors["outputs"],
            rows,
            meta["t"],
            cotangent,
            sizes,
            dict(map(tuple, meta["witnessed"])),
            meta["verified"],
        )

    def kept(self, todo: int) -> list[int]:
        """The states on disk from which the first `todo` steps can be reversed; the others are removed."""
        for t in self._training.kept():
            self.states.save(t, self._training.load(t))
            self._training.drop(t)
        kept = self.states.kept()
        for t in kept:
            if t >= todo:
                self.states.drop(t)
        return [t for t in kept if t < todo]

    def latest(self) -> State | None:
        """The state in which a training was noted last; the final one only if its checksums are known.

        Raises ReplayMismatch for a state that is not what was noted.
        """
        noted, _ = self.passed()
        for t in reversed(self._training.kept()):
            if t == self._run.steps and t not in noted:  # killed before its checksums were written
                continue
            state = self._training.load(t)
            sums = checksums(state)
            wrong = next((k for k, x in noted.get(t, sums).items() if sums.get(k) != x), None)
            if wrong is not None or noted.get(t, sums).keys() != sums.keys():
                raise ReplayMismatch(
                    f"step {t}: {wrong or 'a tensor'!r} in {self._training.path(t)} is not what training "
                    "noted there. Remove the folder, or give another"
                )
            return state
        return None


def _ours_or_empty(place: Path) -> None:
    """Raise ValueError for a folder in which others keep something, or whose identity was removed."""
    if os.path.lexists(place / IDENTITY):
        return
    harmless = (LOCK, ".magic-")  # what is made before the identity: a lock, a file or folder of a trial
    others = sorted(p.name for p in place.iterdir() if not p.name.startswith(harmless))
    if others:
        raise ValueError(
            f"{place} is not empty and not magic's (it holds {', '.join(map(repr, others[:3]))} and no "
            f"{IDENTITY}); give a new or empty folder"
        )


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    path = place / LOCK
    try:  # neither emptied nor, through a link, made elsewhere
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
        made = time.strftime(WHEN)
        owner = fingerprints.digest(repr((sorted(mine.parts.items()), time.time_ns())))
        write_json(path, {"made": made, "run": owner, "parts": mine.parts})
        return owner
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
    """How the parts differ that are no digests."""
    words = ("what is computed", *determinism.numerics())
    told = [f"{k} is {here.get(k)!r} here, and there it is {there.get(k)!r}" for k in names if k in words]
    return f" ({'; '.join(told)})" if told else ""
