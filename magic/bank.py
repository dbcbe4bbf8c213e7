"""A bank of retrained models' outputs: what was computed once is never computed again.

A SQLite file holds a row for each training: its data weights and what was measured of the model that
came out. A row is written when its training is done, whole or not at all, so a sweep that was killed
goes on where it was, and several processes may work on one file.

Rows belong to a run, a measure and a way of removing: the run's identity, the bits of its first step
and of what is measured at its start make the key. Rows of others may lie in the same file and are
never seen. On another machine the bits are others; there `adopt` takes rows over after training some
of them again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from . import determinism
from .replay import measured_outputs
from .retraining import retrained
from .run import Run

TABLES = """
CREATE TABLE IF NOT EXISTS banks (key TEXT PRIMARY KEY, about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outputs (
    key TEXT NOT NULL, id TEXT NOT NULL, weights BLOB NOT NULL, outputs BLOB NOT NULL,
    made TEXT NOT NULL, PRIMARY KEY (key, id)
);
"""
PATIENCE = 60.0  # seconds to wait for another process that writes


class Bank:
    """Outputs of one run's retrained models, in the file `path`.

    how   "weight": removed by weight 0; "rows": left out of their batches (see magic.retrain)
    name  what `adopt` tells runs apart by that differ in their seeds only

    Raises ValueError for a file that is no bank, and TimeoutError for one that stays locked.
    """

    def __init__(
        self, path: str | os.PathLike, run: Run, measure: Callable, *, how: str = "weight", name: str = ""
    ):
        self.path, self.run, self.measure, self.how = os.fspath(path), run, measure, how
        self._memory = sqlite3.connect(":memory:") if self.path == ":memory:" else None
        with determinism.fix():
            start = measured_outputs(run, run.initial, measure, finite=False)
            first = run.step(run.initial, run.weights()).fingerprint()
        self.about = {
            "n": run.n,
            "steps": run.steps,
            "targets": len(start),
            "rule": run.rule.__name__,
            "normalize": run.normalize,
            "how": how,
            "name": name,
        }
        identity = [run.identity(), first, determinism.fingerprint(start), how]
        self.key = determinism.digest(repr(identity))
        with self._open() as file:
            file.executescript(TABLES)
            file.execute("INSERT OR IGNORE INTO banks VALUES (?, ?)", (self.key, json.dumps(self.about)))

    def serves(self, run: Run, measure: Callable) -> None:
        """Raise ValueError unless this bank is of this run and measure."""
        if (run, measure) == (self.run, self.measure):
            return
        if Bank(":memory:", run, measure, how=self.how).key != self.key:
            raise ValueError(
                f"{self.path}: the bank is of another run or measure; make magic.Bank(path, run, measure) "
                "of those that are to be retrained and measured"
            )

    def __len__(self) -> int:
        with self._open() as file:
            return file.execute("SELECT count(*) FROM outputs WHERE key = ?", (self.key,)).fetchone()[0]

    def get(self, weights: Tensor) -> Tensor | None:
        """(K,) outputs of the model trained with these (n,) weights, or None if they are not known."""
        with self._open() as file:
            row = file.execute(
                "SELECT outputs FROM outputs WHERE key = ? AND id = ?", (self.key, _id(weights))
            ).fetchone()
        return None if row is None else _numbers(row[0], "<f8")

    def put(self, weights: Tensor, outputs: Tensor) -> None:
        """Keep the (K,) outputs of the model trained with these (n,) weights."""
        if outputs.shape != (self.about["targets"],) or weights.shape != (self.run.n,):
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)} and weights {tuple(weights.shape)}; this bank's "
                f"are ({self.about['targets']},) and ({self.run.n},)"
            )
        numbers = outputs.detach().cpu().numpy().astype("<f8").tobytes()
        row = (self.key, _id(weights), _pack(weights), numbers, json.dumps(determinism.numerics()))
        with self._open() as file:
            file.execute("INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?, ?)", row)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(S, n) weights and (S, K) outputs of all trainings that are known, in the order they came."""
        return self._rows(self.key)

    def frame(self):
        """A DataFrame with a row for each training and target: how many were removed, and the output."""
        with self._open() as file:
            query = "SELECT key, weights, outputs FROM outputs WHERE key = ? ORDER BY rowid"
            return _frame(file, query, self.key)

    def adopt(self, check: int = 2, tolerance: float = 1e-2) -> int:
        """Take over rows that another machine computed for this run, by name and sizes; returns how many.

        `check` of them, spread over the bank, are trained here. All their outputs must agree to
        `tolerance`, in units of the outputs' standard deviation over the bank; else ValueError.
        """
        with self._open() as file:
            found = file.execute(
                "SELECT key FROM banks WHERE about = ?", (json.dumps(self.about),)
            ).fetchall()
        taken = 0
        for (key,) in found:
            if key == self.key:
                continue
            weights, outputs = self._rows(key)
            if len(weights) < 3:
                continue
            self._compare(weights, outputs, check, tolerance)
            for w, out in zip(weights, outputs, strict=True):
                self.put(w, out)
            taken += len(weights)
        return taken

    def _compare(self, weights: Tensor, outputs: Tensor, check: int, tolerance: float) -> None:
        spread = outputs.std(0).clamp_min(1e-300)
        for s in torch.linspace(0, len(weights) - 1, check).long().tolist():
            here = retrained(self.run, self.measure, weights[s], self.how).double().cpu()
            far = ((here - outputs[s]).abs() / spread).max().item()
            if not far <= tolerance:
                raise ValueError(
                    f"{self.path}: training number {s} of the bank, trained again here, differs by {far:.2g} "
                    f"standard deviations of the outputs, more than {tolerance:g}. It is of another run"
                )

    def _rows(self, key: str) -> tuple[Tensor, Tensor]:
        with self._open() as file:
            rows = file.execute(
                "SELECT weights, outputs FROM outputs WHERE key = ? ORDER BY rowid", (key,)
            ).fetchall()
        weights = [_unpack(blob) for blob, _ in rows]
        outputs = [_numbers(blob, "<f8") for _, blob in rows]
        if not rows:
            return torch.empty(0, self.run.n), torch.empty(0, self.about["targets"], dtype=torch.float64)
        return torch.stack(weights), torch.stack(outputs)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            with self._memory:
                yield self._memory
            return
        with opened(self.path) as file:
            yield file


def frame(path: str | os.PathLike):
    """The DataFrame of all banks in a file, for someone who has the file only."""
    with opened(path) as file:
        return _frame(file, "SELECT key, weights, outputs FROM outputs ORDER BY rowid")


def _frame(file: sqlite3.Connection, query: str, *arguments):
    import pandas as pd

    rows = []
    for training, (bank, weights, blob) in enumerate(file.execute(query, arguments)):
        removed = int((_unpack(weights) == 0).sum())
        for target, output in enumerate(np.frombuffer(blob, "<f8")):
            rows.append((bank, training, removed, target, output))
    return pd.DataFrame(rows, columns=["bank", "training", "removed", "target", "output"])


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[sqlite3.Connection]:
    """A connection whose block is one transaction. Its errors are told in the project's words."""
    try:
        file = sqlite3.connect(path, timeout=PATIENCE)
        try:
            with file:
                yield file
        finally:
            file.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise TimeoutError(f"{path} is locked by another program for more than {PATIENCE:g} s") from error
        raise OSError(f"{path} cannot be used as a bank: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is not a bank: {error}. Give another file") from error


def _id(weights: Tensor) -> str:
    return determinism.fingerprint(weights.detach().cpu().to(torch.float32))


def _pack(weights: Tensor) -> bytes:
    return zlib.compress(weights.detach().cpu().numpy().astype("<f4").tobytes(), 9)


def _unpack(blob: bytes) -> Tensor:
    return _numbers(zlib.decompress(blob), "<f4")


def _numbers(blob: bytes, kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(blob, kind).copy())
