"""A long run survives being killed, and goes on to the same bits.

Its folder holds states that do not fit into memory, what training passed through, and, now and then, how
far the work is: a state while training, the cotangents and scores while going back. Each file is written
whole or not at all and carries a fingerprint of its bits, so a kill at any moment costs at most the
work since the last note. Whose a folder is, `magic.engine.folder` says.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..show import bar
from ..training import determinism
from ..training.record import Passed, ReplayMismatch, checksums
from ..training.run import Run
from ..training.state import Cotangent, State
from .files import PARTS, read, read_json, writable, write, write_json
from .folder import identity, opened
from .places import Disk

CHOICES, PASSED = "choices.json", "passed.json"
# Two notes are at least EVERY seconds apart, and SHARE times what the last note took: then notes take no more
# than a fiftieth of the time, however large the state is.
EVERY, SHARE = 10.0, 50


@dataclass(frozen=True)
class Trusted:
    """A folder that is given, and what of it the reader vouches for.

    trust  names of parts that have changed since it was made; True for all code, and for all that cannot be
           known
    """

    path: str | os.PathLike
    trust: bool | Iterable[str] = False


@dataclass(eq=False)
class Progress:
    """How far a replay is. It changes while the replay goes on, and a note of it is a copy on the disk.

    values, outputs   (K, n) and (K,); None before the first way down has ended
    rows     the targets in work; those before them are done
    t        the step that `cotangent` is taken at, or None before the way back
    sizes    step -> the norm of each target's cotangent there
    witnessed  step -> how far the derivative was from a finite difference there, None where that cannot
             be told
    verified   how many states were compared with what training noted
    clipped    the steps whose gradients were clipped, of those pulled back so far
    more     what else was asked for (`magic.engine.asked`), by flat names; (K, ...) each
    """

    values: Tensor | None
    outputs: Tensor | None
    rows: slice
    t: int | None = None
    cotangent: Cotangent | None = None
    sizes: dict[int, list[float]] = field(default_factory=dict)
    witnessed: dict[int, float | None] = field(default_factory=dict)
    verified: int = 0
    clipped: set[int] = field(default_factory=set)
    more: dict[str, Tensor] = field(default_factory=dict)

    def rows_of(self, name: str, like: Tensor) -> Tensor:
        """The rows of the targets in work in `more[name]`, which is made of zeros if it is not there yet.

        like  a tensor with the shape and the type of these rows
        """
        if name not in self.more:
            assert self.outputs is not None, "outputs are measured before the first pull"
            self.more[name] = like.new_zeros(len(self.outputs), *like.shape[1:])
        return self.more[name][self.rows]


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
        if run.ranks is not None:
            raise ValueError(f"disk={path!r}: a folder is of one process, and this run is shared by several")
        with opened(place, identity(run, weights, what, measure), trust) as owner:
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
        """Whether the last note is long enough ago."""
        return time.monotonic() - self._last >= max(EVERY, SHARE * self._took)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Take the time of a note."""
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
            # The state noted before goes only now: a final state counts only once its checksums are written.
            for t in before:
                if t != state.step:
                    self._training.drop(t)

    def _note_passed(self, passed: Passed) -> None:
        content = {"run": self._owner, "noted": passed.noted, "totals": passed.totals}
        write_json(self.path / PASSED, content)

    def note(self, progress: Progress, passed: Passed, now: bool = False) -> None:
        """Now and then, or `now`, keep how far the way back is."""
        if not (now or self._due()):
            return
        values, outputs = progress.values, progress.outputs
        assert values is not None and outputs is not None, "the way back begins with measured outputs"
        with self._noting():
            tensors = {"values": values, "outputs": outputs}
            tensors |= {f"more/{name}": x for name, x in progress.more.items()}
            if progress.cotangent is not None:
                tensors |= {f"cotangent/{k}": x for k, x in progress.cotangent.flatten().items()}
            rows, sizes = [progress.rows.start, progress.rows.stop], list(progress.sizes.items())
            meta: dict[str, Any] = {"rows": rows, "t": progress.t, "sizes": sizes}
            meta |= {"verified": progress.verified, "witnessed": list(progress.witnessed.items())}
            meta |= {"clipped": sorted(progress.clipped)}
            write(self.path / "progress.safetensors", tensors, meta | self._mark())
            self._note_passed(passed)

    def _mark(self) -> dict[str, str]:
        """What a note of a replay says of itself, and must say when it is read."""
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
        return Progress(
            tensors["values"],
            tensors["outputs"],
            slice(*meta["rows"]),
            meta["t"],
            cotangent,
            sizes={t: list(row) for t, row in meta["sizes"]},
            witnessed=dict(map(tuple, meta["witnessed"])),
            verified=meta["verified"],
            clipped=set(meta.get("clipped", ())),  # older folders are of runs without clipping
            more={k.removeprefix("more/"): x for k, x in tensors.items() if k.startswith("more/")},
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


def train(
    run: Run,
    weights=None,
    *,
    disk: str | os.PathLike,
    progress: bool = True,
    allow_negative: bool = False,
    trust: bool | Iterable[str] = False,
) -> State:
    """`run.train(weights)` with a folder: a training that was killed goes on where it was noted last.

    The bits are the same. A training that is finished is read from the folder. Raises ValueError for a
    folder of another run, of other data or code, or from a machine that calculates otherwise; `trust`
    names what of it the reader vouches for, or is True for all code and all that cannot be known.
    """
    weights = run.weights(weights, allow_negative=allow_negative)
    with Directory.open(disk, run, weights, "a training", trust=trust) as folder, determinism.alone():
        passed = run.passed(weights)
        passed.adopt(*folder.passed())
        state = folder.latest() or run.initial
        with bar(run.steps - state.step, "train", progress) as shown:

            def after(state: State) -> None:
                shown.update()
                folder.note_training(state, passed, now=state.step == run.steps)

            return run.advance(state, run.steps, weights, passed, after)
