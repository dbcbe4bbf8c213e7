"""Scores in a file: their numbers, what is known of them, and the identity of the run and the measure.

The file is a NumPy .npz without pickle, so that reading a stranger's file runs none of his code. It is
written whole or not at all. Run and measure themselves are not in it: whoever loads it may give them, and is
refused if they are not those that the scores were made from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .engine.files import replacing
from .engine.health import Health
from .engine.verdict import Verification
from .identity import parts
from .training.run import Run

FORMAT = 3  # in format 2, `point` was called `where`
NUMBERS = ("values", "outputs", "at")  # the arrays of the file
KEPT = ("point", "tangent", "run_parts", "measure_parts", "made")  # in its JSON, as they are
JUDGED: dict[str, Any] = {"health": Health, "verification": Verification}  # in its JSON, by `note` and `of`
FIELDS = (*NUMBERS, "run_fingerprint", *KEPT, *JUDGED)


def write(path: str | os.PathLike, fields: Mapping[str, Any]) -> None:
    """Write the `FIELDS` of an Attribution. Raises OSError where the file cannot be written."""
    path = os.fspath(path)
    meta = {"format": FORMAT, "run": fields["run_fingerprint"]}
    meta |= {name: fields[name] for name in KEPT}
    meta |= {name: fields[name].note() for name in JUDGED if fields[name]}
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
            **{name: fields[name].detach().cpu().numpy() for name in NUMBERS},
        )


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Those of the `FIELDS` that the file has. What is raised for a foreign file, `only_ours` translates."""
    with np.load(os.fspath(path), allow_pickle=False) as file:
        meta = _checked(json.loads(file["meta"].tobytes()))
        fields: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in NUMBERS}
    fields |= {"run_fingerprint": meta["run"]}
    fields |= {name: meta[name] for name in KEPT if name in meta}
    return fields | {name: kind.of(meta[name]) for name, kind in JUDGED.items() if name in meta}


@contextlib.contextmanager
def only_ours(path: str | os.PathLike) -> Iterator[None]:
    """Within the block, whatever fails but the search for the file is a ValueError: it is no file of ours.

    A file that is damaged, or made to do harm, fails in zlib, in struct, in NumPy, in json or in a class's
    constructor.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} was not written by Attribution.save: {error}") from error


def check_serves(
    path: str | os.PathLike,
    fields: Mapping[str, Any],
    run: Run | None,
    measure: Callable | None,
    trust: bool | Iterable[str],
) -> None:
    """Raise ValueError unless the scores in the file are of this run and this measure.

    run, measure   None where the reader does not ask
    trust  as `Attribution.load` has it
    """
    of_run, of_measure = fields.get("run_parts"), fields.get("measure_parts")
    knows_run = of_run or fields["run_fingerprint"]
    here = parts.Identity()
    there: dict[str, str] = {}
    mine: dict[str, str] = {}
    if run is not None and knows_run:
        mine = run.identity()
        here |= parts.Identity(mine, run.unknown())
        there |= of_run or {}
    if measure is not None and (of_measure or knows_run):
        here |= parts.of_callable(measure, "measure")
        there |= of_measure or {}
    if names := parts.changed(here, there, trust):
        whose = "run" if mine.keys() & set(names) else "measure"
        raise ValueError(
            parts.refusal(
                f"{os.fspath(path)} holds scores of another {whose}",
                names,
                fields.get("made"),
                "Load without run= and measure=, or attribute what is here into another file",
                here.unknown,
            )
        )


def _checked(meta) -> dict:
    """What a file says of its scores, in today's words; ValueError if no version can have written it."""
    if not isinstance(meta, dict) or "run" not in meta:
        raise ValueError("it does not say of which run it is")
    if "where" in meta:  # format 2
        meta = {"point": meta["where"]} | meta
    texts: dict[str, type] = {"run": str, "point": str, "made": str, "tangent": bool}
    texts |= {name: dict for name in ("run_parts", "measure_parts", *JUDGED)}
    for name, kind in texts.items():
        value: Any = meta.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"its {name} is {value!r}")
        digests = value.values() if name.endswith("_parts") and isinstance(value, dict) else ()
        if not all(isinstance(x, str) for x in digests):
            raise ValueError(f"its {name} holds what is no digest")
    return meta
