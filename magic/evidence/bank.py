"""A bank of retrained models' outputs: what was computed once is never computed again.

A SQLite file holds a row for each training: its data weights and what was measured of the model that
came out. A row is written when its training is done, whole or not at all, so interrupted retrainings
resume where they stopped, and several processes may work on one file.

Rows belong to a run, a measure and a way of removing. Their key is made of the identity of run and
measure, which includes their code, and of the bits of the first step and of what is measured at the start.
The same file may hold rows of other runs, which are never served. On another machine the bits differ;
there `adopt` takes rows over after it has trained some of them again. Each row carries a digest of its
bits; whenever a row is read, it must match its digest and be finite.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.measuring import measured_outputs
from ..identity import fingerprints
from ..identity.parts import Identity, changed, of_callable, refusal
from ..show import needs
from ..training import determinism
from ..training.optim import named
from ..training.run import Run
from .retraining import retrained
from .rows import (
    COLUMNS,
    TABLES,
    Row,
    damage,
    digest_of,
    frame,
    frame_of,
    name_of,
    opened,
    outputs_of,
    pack,
    pack_outputs,
    spread,
    weights_of,
)  # fmt: skip

__all__ = ["Bank", "frame"]


class Bank:
    """Outputs of one run's retrained models, in the file `path`; ":memory:" is a bank without a file.

    how   "weight": removed by weight 0; "rows": left out of their batches (see magic.retrain);
          "together": by weight 0, and trained many at once (magic.outputs(together=))
    name  by which `adopt` tells apart runs that differ in their seeds only
    trust  names of parts whose code cannot be read completely (a C extension, a call of eval), or True for
           all of them: the caller vouches that they do not change

    Raises ValueError for a file that is no bank, or for a run or measure whose code cannot be read
    completely, and TimeoutError for a file that stays locked.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        run: Run,
        measure: Callable,
        *,
        how: str = "weight",
        name: str = "",
        trust: bool | Iterable[str] = False,
    ):
        self.path, self.run, self.measure, self.how = os.fspath(path), run, measure, how
        # widgets' callbacks run in a thread of their own; SQLite itself takes one caller at a time
        self._memory = (
            sqlite3.connect(":memory:", check_same_thread=False) if self.path == ":memory:" else None
        )
        self.trust = True if self._memory else trust if isinstance(trust, (bool, str)) else list(trust)
        self.identity = _identity(run, measure)
        if names := changed(self.identity, self.identity.parts, self.trust):
            out = "Write them so that their code can be read"
            what = f"{self.path}: a bank would serve its rows after an edit that it cannot see"
            raise ValueError(refusal(what, names, None, out, self.identity.unknown))
        with determinism.alone():
            start = measured_outputs(run, run.initial, measure, finite=False)
            first = run.step(run.initial, run.weights()).fingerprint()
        self.about: dict[str, Any] = {
            "n": math.prod(run.shape),
            "steps": run.steps,
            "targets": len(start),
            "rule": named(run.updates),
            "normalize": run.normalize,
            "how": how,
            "name": name,
        }
        parts = sorted(self.identity.parts.items())
        self.key = fingerprints.digest(repr([parts, first, fingerprints.fingerprint(start), how]))
        with self._open() as file:
            file.executescript(TABLES)
            file.execute("INSERT OR IGNORE INTO banks VALUES (?, ?)", (self.key, json.dumps(self.about)))
            row = (self.key, time.strftime("%Y-%m-%d %H:%M:%S"), json.dumps(self.identity.parts))
            file.execute("INSERT OR IGNORE INTO parts VALUES (?, ?, ?)", row)

    def serves(self, run: Run, measure: Callable) -> None:
        """Raise ValueError unless this bank is of this run and measure as they are now."""
        here = _identity(run, measure)
        names = changed(here, self.identity.parts, self.trust)
        if not names and (run is self.run or Bank(":memory:", run, measure, how=self.how).key == self.key):
            return
        out = "Make magic.Bank(path, run, measure) of those that are to be retrained and measured"
        what = f"{self.path}: the bank is of another run or measure"
        raise ValueError(refusal(what, names or ["the first step or the start"], None, out, here.unknown))

    def others(self) -> list[str]:
        """For each other run or measure that has rows in the file: how many, since when, and what differs."""
        with self._open() as file:
            query = "SELECT count(*), since, parts FROM outputs JOIN parts USING (key)"
            found = file.execute(f"{query} WHERE key != ? GROUP BY key", (self.key,)).fetchall()
        told = []
        for count, since, parts in found:
            there = json.loads(parts)
            names = [
                k for k in {**self.identity.parts, **there} if self.identity.parts.get(k) != there.get(k)
            ]
            told.append(
                f"{count} rows since {since}, before a change of {'; '.join(names) or 'the numerics'}"
            )
        return told

    def only_rounded_otherwise(self) -> bool:
        """Whether all rows that `adopt` would take over are of this very run and measure, of which only the
        bits of the first step, or of what is measured at the start, were others."""
        with self._open() as file:
            query = "SELECT parts FROM banks LEFT JOIN parts USING (key) WHERE about = ? AND key != ?"
            found = file.execute(query, (json.dumps(self.about), self.key)).fetchall()
        return all(parts is not None and json.loads(parts) == self.identity.parts for (parts,) in found)

    def __repr__(self) -> str:
        rest = "".join(f"\n  others: {told}" for told in self.others())
        return f"Bank({self.path!r}, {len(self)} rows){rest}"

    def __len__(self) -> int:
        with self._open() as file:
            return file.execute("SELECT count(*) FROM outputs WHERE key = ?", (self.key,)).fetchone()[0]

    def get(self, weights: Tensor) -> Tensor | None:
        """(K,) outputs of the model trained with these (n,) weights, or None if they are not known.

        Raises ValueError for a damaged row.
        """
        with self._open() as file:
            query = f"SELECT {COLUMNS} FROM outputs WHERE key = ? AND id = ?"
            row = file.execute(query, (self.key, name_of(self._exact(weights)))).fetchone()
        return None if row is None else self._checked(row)[1]

    def put(self, weights: Tensor, outputs: Tensor) -> None:
        """Keep the (K,) outputs of the model trained with these (n,) weights; existing rows stay unchanged.

        Raises ValueError for another shape or for numbers that are not finite, OSError for a full disk.
        """
        self._put([(weights, outputs)])

    def _put(self, trained: Iterable[tuple[Tensor, Tensor]]) -> None:
        """`put` for several, in one transaction."""
        rows = [self._row(weights, outputs) for weights, outputs in trained]
        with self._open() as file:
            file.executemany("INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?, ?)", rows)

    def _row(self, weights: Tensor, outputs: Tensor) -> tuple:
        if outputs.shape != (self.about["targets"],) or weights.shape not in ((self.run.n,), self.run.shape):
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)} and weights {tuple(weights.shape)}; this bank's "
                f"are ({self.about['targets']},) and {self.run.shape}"
            )
        if not outputs.isfinite().all():
            raise ValueError(f"outputs are not finite: {outputs[~outputs.isfinite()][0].item()}")
        exact = self._exact(weights)
        row = (self.key, name_of(exact), pack(exact), pack_outputs(outputs))
        return (*row, json.dumps(determinism.numerics() | {"digest": digest_of(*row)}))

    def forget(self, weights: Tensor) -> None:
        """Remove the row of these (n,) weights, if there is one."""
        row = (self.key, name_of(self._exact(weights)))
        with self._open() as file:
            file.execute("DELETE FROM outputs WHERE key = ? AND id = ?", row)

    def repair(self) -> int:
        """Remove this bank's damaged rows, so that they are trained again; returns how many."""
        with self._open() as file:
            query = f"SELECT {COLUMNS} FROM outputs WHERE key = ?"
            found = file.execute(query, (self.key,)).fetchall()
            bad = [(row[0],) for row in found if damage(row, self.about["n"], self.about["targets"])]
            file.executemany("DELETE FROM outputs WHERE rowid = ?", bad)
        return len(bad)

    def _exact(self, weights: Tensor) -> Tensor:
        """The weights as the run takes them: in float32 where that holds their bits, else in float64."""
        weights = weights.detach().cpu()
        if self.run.tokens and weights.shape == (self.run.n,):
            weights = weights[:, None].expand(self.run.shape)
        weights = weights.flatten()
        if self.run.dtype == torch.float64 and weights.dtype == torch.float64:
            return weights.float() if torch.equal(weights.float().double(), weights) else weights
        return weights.float()

    def _checked(self, row: Row, sealed: bool = True) -> tuple[Tensor, Tensor]:
        """(n,) weights and (K,) outputs of a row of the file; ValueError if it is damaged."""
        if why := damage(row, self.about["n"], self.about["targets"], sealed):
            raise ValueError(
                f"{self.path}: row {row[0]} is damaged: {why}. bank.repair() removes this bank's damaged "
                "rows, to be trained again; or give another file"
            )
        return weights_of(row, self.about["n"]).reshape(self.run.shape), outputs_of(row)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(S, n) weights and (S, K) outputs of all trainings in the bank, in the order they were added."""
        return self._rows(self.key)

    def frame(self):
        """A DataFrame with a row for each training and target: how many were removed, and the output."""
        pd = needs("pandas", "notebooks")
        with self._open() as file:
            return frame_of(pd, self.path, file, "WHERE key = ?", self.key)

    def adopt(
        self, check: int = 2, tolerance: float = 1e-2, *, train: Callable[..., Tensor] = retrained
    ) -> int:
        """Take over rows that another machine computed for this run, by name and sizes; returns how many.

        check      how many rows, drawn at random, are trained here and compared
        tolerance  how far each of their outputs may be from the row's, relative to the spread of that output
                   over the bank (its median absolute deviation, so that one wild row does not count)
        train      (run, measure, weights (n,), how) -> (K,) outputs; by default what `magic.outputs` calls

        Banks of fewer than three rows are skipped, because a spread needs three. Raises ValueError for rows
        that differ by more, which must come from another run, and for a damaged row.
        """
        with self._open() as file:
            found = file.execute(
                "SELECT key FROM banks WHERE about = ?", (json.dumps(self.about),)
            ).fetchall()
        taken = 0
        for (key,) in found:
            if key == self.key:
                continue
            weights, outputs = self._rows(key, sealed=False)
            if len(weights) < 3:
                continue
            unit = spread(outputs, self.run.dtype)
            for s in self._drawn(key, len(weights))[:check]:
                here = train(self.run, self.measure, weights[s], self.how).double().cpu()
                self._check_agrees(s, ((here - outputs[s]).abs() / unit).max().item(), tolerance)
            self._put(zip(weights, outputs, strict=True))
            taken += len(weights)
        return taken

    @staticmethod
    def _drawn(key: str, count: int) -> list[int]:
        """The numbers of a bank's rows in a random order, the same for the same bank."""
        dice = torch.Generator().manual_seed(int(fingerprints.digest(key)[:15], 16))
        return torch.randperm(count, generator=dice).tolist()

    def _check_agrees(self, number: int, far: float, tolerance: float) -> None:
        """Raise ValueError for a row that is too `far` from the same training made here; NaN is too far."""
        if not far <= tolerance:
            raise ValueError(
                f"{self.path}: training number {number} of the bank, trained again here, differs by "
                f"{far:.2g} of the spread of the outputs, more than {tolerance:g}. It is of another run"
            )

    def _rows(self, key: str, sealed: bool = True) -> tuple[Tensor, Tensor]:
        with self._open() as file:
            query = f"SELECT {COLUMNS} FROM outputs WHERE key = ? ORDER BY rowid"
            found = [self._checked(row, sealed) for row in file.execute(query, (key,)).fetchall()]
        if not found:
            return torch.empty(0, *self.run.shape), torch.empty(0, self.about["targets"], dtype=torch.float64)
        weights, outputs = (list(column) for column in zip(*found, strict=True))
        if len({w.dtype for w in weights}) > 1:
            weights = [w.double() for w in weights]
        return torch.stack(weights), torch.stack(outputs)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            with self._memory:
                yield self._memory
            return
        with opened(self.path) as file:
            yield file


def _identity(run: Run, measure: Callable) -> Identity:
    return Identity(run.identity(), run.unknown()) | of_callable(measure, "measure")
