"""A folder in which a long run survives being killed, and goes on to the same bits.

It holds states that do not fit into memory, what training passed through, and, now and then, how far
the work is: a state while training, the cotangents and scores while going back. Each file is written
whole or not at all and carries a fingerprint of its bits, so a kill at any moment costs at most the
work since the last note.

What is in a folder belongs to one run, one point, one measure, one version of the code and one
machine's numerics. Anything else is refused by name, never mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import determinism
from .files import read, writable, write
from .run import Run
from .state import State
from .store import Disk
from .verify import Passed

# the modules that bits depend on
NUMERICS = (
    "determinism", "state", "optim", "optim_adjoint", "run", "normalisation", "equivalents", "adjoint",
    "replay",
)  # fmt: skip
EVERY = 10.0  # seconds between notes at least; and 50 times what a note takes


@dataclass(frozen=True)
class Progress:
    """How far a replay is.

    values, outputs   (K, n) and (K,), as far as they are known
    rows     the targets in work; those before them are done
    t        the step that `cotangent` is taken at, or None before the way back
    sizes    step -> the norm of each target's cotangent there
    """

    values: Tensor
    outputs: Tensor
    rows: slice
    t: int | None = None
    cotangent: State | None = None
    sizes: dict[int, list[float]] = field(default_factory=dict)


def identity(run: Run, weights: Tensor, what: str) -> dict[str, object]:
    """What a folder belongs to, by name. `what` says what is computed there."""
    source = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in NUMERICS]
    with determinism.fix():
        first = run.step(run.initial, weights).fingerprint()
    return {
        **run.identity(),
        "the data weights": determinism.fingerprint(weights),
        "what is computed": what,
        "magic's code": determinism.digest(repr(source)),
        **determinism.numerics(),
        "the first step (code of model or loss, items of the data, or the machine's numerics)": first,
    }


class Directory:
    """The folder of one training or one replay. Use as `with Directory.open(...) as folder:`.

    Raises ValueError for a folder of another run or one that another process works in, OSError for one
    that cannot be written.
    """

    def __init__(self, path: Path, run: Run):
        self.path, self._run = path, run
        self.states = Disk(path / "states", run.initial)
        self._training = Disk(path / "training", run.initial)
        self._last, self._took = time.monotonic(), 0.0

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | os.PathLike, run: Run, weights: Tensor, what: str) -> Iterator[Directory]:
        folder = cls(Path(path), run)
        mine = identity(run, weights, what)
        for place in (folder.path, folder.states.folder, folder._training.folder):
            writable(place)
        with folder._locked():
            try:
                theirs = json.loads((folder.path / "identity.json").read_text())
            except FileNotFoundError:
                _write_json(folder.path / "identity.json", mine)
                theirs = mine
            except ValueError as error:
                raise ValueError(f"{path}/identity.json was not written by magic: {error}") from error
            for name, value in mine.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"{path} belongs to something else: {name} is {value!r} here, and there it is "
                        f"{theirs.get(name)!r}. Give another folder, or remove this one"
                    )
            yield folder

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"another process works in {self.path}; wait, or give another folder"
                ) from error
            yield

    # -- choices that must be the same when the work goes on ---------------------------------------

    def choices(self, made: dict) -> dict:
        """These choices, or those made when the work began."""
        path = self.path / "choices.json"
        if not path.exists():
            _write_json(path, made)
        return json.loads(path.read_text())

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
            for t in before:
                if t != state.step:
                    self._training.drop(t)
            _write_json(self.path / "passed.json", passed.noted)

    def note(self, progress: Progress, now: bool = False) -> None:
        """Now and then, or `now`, keep how far the way back is."""
        if not (now or self._due()):
            return
        with self._noting():
            tensors = {"values": progress.values, "outputs": progress.outputs}
            if progress.cotangent is not None:
                tensors |= {f"cotangent/{k}": x for k, x in progress.cotangent.flatten().items()}
            rows, sizes = [progress.rows.start, progress.rows.stop], list(progress.sizes.items())
            meta = {"rows": rows, "t": progress.t, "sizes": sizes}
            write(self.path / "progress.safetensors", tensors, meta)

    # -- going on ---------------------------------------------------------------------------------

    def passed(self) -> dict[int, dict[str, int]]:
        """The checksums of what the training noted here passed through, by step."""
        try:
            found = json.loads((self.path / "passed.json").read_text())
        except FileNotFoundError:
            return {}
        return {int(t): sums for t, sums in found.items()}

    def progress(self) -> Progress | None:
        """How far the way back was, if it had begun."""
        path = self.path / "progress.safetensors"
        if not path.exists():
            return None
        tensors, meta = read(path, self._run.device)
        flat = {k.removeprefix("cotangent/"): x for k, x in tensors.items() if k.startswith("cotangent/")}
        cotangent = State.unflatten(flat, meta["t"]) if meta["t"] is not None else None
        sizes = {t: list(row) for t, row in meta["sizes"]}
        rows = slice(*meta["rows"])
        return Progress(tensors["values"], tensors["outputs"], rows, meta["t"], cotangent, sizes)

    def kept(self, todo: int) -> list[int]:
        """The states on disk from which the first `todo` steps can be reversed; the others are removed."""
        for t in self._training.kept():
            os.replace(self._training.path(t), self.states.path(t))
        kept = self.states.kept()
        for t in kept:
            if t >= todo:
                self.states.drop(t)
        return [t for t in kept if t < todo]

    def latest(self) -> State | None:
        """The state in which a training was noted last."""
        kept = self._training.kept()
        return self._training.load(max(kept)) if kept else None


def _write_json(path: Path, content: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)
