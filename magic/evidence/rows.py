"""The rows of a bank, and the SQLite file that holds them.

A row holds one training: its data weights, (n,), and what was measured of its model, (K,), with the key of
the run and a digest of its bits. This module packs rows, tells damaged ones, opens the file, and makes a
table of all rows for someone who has only the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..identity import fingerprints
from ..show import needs

TABLES = """
CREATE TABLE IF NOT EXISTS banks (key TEXT PRIMARY KEY, about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outputs (
    key TEXT NOT NULL, id TEXT NOT NULL, weights BLOB NOT NULL, outputs BLOB NOT NULL,
    made TEXT NOT NULL, PRIMARY KEY (key, id)
);
CREATE TABLE IF NOT EXISTS parts (key TEXT PRIMARY KEY, since TEXT NOT NULL, parts TEXT NOT NULL);
"""
COLUMNS = "rowid, key, id, weights, outputs, made"  # what `damage`, `weights_of` and `outputs_of` take
PATIENCE = 60.0  # seconds to wait for another process that writes
OUTPUTS = "<f8"  # outputs are float64, lowest byte first; so are weights that float32 cannot hold

Row = tuple  # of COLUMNS


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[sqlite3.Connection]:
    """A connection; all that its block writes is one transaction, written whole or not at all.

    Raises TimeoutError for a file that stays locked for `PATIENCE` seconds, OSError for one that cannot be
    opened or written, and ValueError for one that is no bank.
    """
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
        out = ". The rows in it are whole: free some space, and call again" if "full" in str(error) else ""
        raise OSError(f"{path} cannot be used as a bank: {error}{out}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is not a bank: {error}. Give another file") from error


def name_of(weights: Tensor) -> str:
    """The name under which a row is found: the fingerprint of its weights, (n,)."""
    return fingerprints.fingerprint(weights)


def pack(weights: Tensor) -> bytes:
    """Weights, (n,) in float32 or float64 on the CPU, compressed, since most of them are equal."""
    kind = "<f8" if weights.dtype == torch.float64 else "<f4"
    return zlib.compress(weights.numpy().astype(kind).tobytes(), 9)


def pack_outputs(outputs: Tensor) -> bytes:
    """Outputs, (K,), as float64."""
    return outputs.detach().cpu().numpy().astype(OUTPUTS).tobytes()


def weights_of(row: Row, n: int) -> Tensor:
    """(n,): the weights of a row, in float32 or, where that could not hold their bits, in float64."""
    raw = zlib.decompress(row[3])
    return _numbers(raw, "<f8" if len(raw) == 8 * n else "<f4")


def outputs_of(row: Row) -> Tensor:
    """(K,): the outputs of a row, in float64."""
    return _numbers(row[4], OUTPUTS)


def digest_of(key: str, name: str, weights: bytes, outputs: bytes) -> str:
    """The digest of a row's content, which is stored with it."""
    return fingerprints.digest(repr((key, name, weights, outputs)))


def damage(row: Row, n: int, targets: int, sealed: bool = True) -> str | None:
    """Why a row cannot be what was written, or None. Only a `sealed` row must have a digest."""
    _, key, name, weights, outputs, made = row
    try:
        digest = json.loads(made).get("digest")
        if digest is None and sealed:
            return "it has no digest"
        if digest is not None and digest != digest_of(key, name, weights, outputs):
            return "its bits are not those that were written"
        there, numbers = weights_of(row, n), outputs_of(row)
    except (ValueError, TypeError, AttributeError, zlib.error) as error:
        return str(error)
    if len(there) != n or len(numbers) != targets:
        return f"it has {len(there)} weights and {len(numbers)} outputs, not {n} and {targets}"
    if not (there.isfinite().all() and numbers.isfinite().all()):
        return "its numbers are not finite"
    return None


def frame(path: str | os.PathLike):
    """The DataFrame of all banks in a file, for someone who has only the file.

    It has a row for each training and target, with the bank's key, the number of the training in the file,
    how many examples were removed, the target, and the output. Raises ValueError for a damaged row, and
    ImportError without pandas.
    """
    pd = needs("pandas", "notebooks")
    with opened(path) as file:
        return frame_of(pd, path, file)


def frame_of(pd, path: str | os.PathLike, file: sqlite3.Connection, where: str = "", *arguments):
    """`frame` of an open file, with the rows for which the SQL condition `where` holds."""
    names = ", ".join(f"outputs.{name}" for name in COLUMNS.split(", "))
    query = f"SELECT {names}, about FROM outputs JOIN banks USING (key) {where} ORDER BY outputs.rowid"
    table = []
    for training, (*columns, about) in enumerate(file.execute(query, arguments)):
        row, sizes = tuple(columns), json.loads(about)
        if why := damage(row, sizes["n"], sizes["targets"]):
            raise ValueError(
                f"{path}: row {row[0]} is damaged: {why}. Bank(path, run, measure).repair() removes it"
            )
        removed = int((weights_of(row, sizes["n"]) == 0).sum())
        for target, output in enumerate(outputs_of(row).tolist()):
            table.append((row[1], training, removed, target, output))
    return pd.DataFrame(table, columns=["bank", "training", "removed", "target", "output"])


def _numbers(blob: bytes, kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(blob, kind).copy())


def spread(outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """(K,): how far each of the (S, K) outputs is spread over the bank, as a standard deviation.

    It is estimated from ranks, so that single wild rows do not count. For normally distributed outputs the
    median distance from the middle is 1/1.4826 of the standard deviation. That alone would be too small
    where most rows hardly move an output, so the distance that nine rows in ten stay within, which is 1.645
    standard deviations for a normal distribution, counts as well. The spread is at least what rounding does
    in a training, taken as 10,000 units in the last place.
    """
    middle = outputs.median(0).values
    far = (outputs - middle).abs().sort(0).values
    deviation = torch.maximum(1.4826 * far.median(0).values, far[int(0.9 * (len(far) - 1))] / 1.645)
    rounding = 1e4 * torch.finfo(dtype).eps * middle.abs()
    return deviation.maximum(rounding).clamp_min(1e-300)  # the last so that nothing is divided by 0
