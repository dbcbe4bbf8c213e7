"""A small table of what a GPU has told: `python -m tests.gpu --keep FOLDER/results.jsonl`.

Each number, and whether something holds, becomes a row with its part's stage and seconds and with what it was
measured on: the machine's line before it in the file says so for all parts of a call. What is told in words,
such as why a test failed, stays in the file; how many failed is a number. The tables of the experiment
with ResNet-9, which lie in a folder beside the results, are merged into those of the book.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.experiments import kept as tables

TABLE = Path(__file__).parents[2] / "notebooks" / "banks" / "15_gpu.csv"
MACHINE = ("GPU", "driver", "torch", "CUDA", "commit", "date")
COLUMNS = ("stage", "part", "what", "value", *MACHINE, "seconds")
# of which work, method and size a number is: these stand before its name
CONTEXT = ("work", "chapter", "method", "removed", "K", "steps")
WORDS = {"outcome", "error", "skipped"}  # a line with one of these tells no number


def keep(results: Path, table: Path = TABLE, commit: str | None = None) -> str:
    """Put the numbers of a results file into the table; returns a sentence that says so.

    commit   of the code that was measured, where the machine had no git to ask

    Rows of the same GPU, commit and part are replaced, all others kept. Raises ValueError for a file that is
    no measurement or does not say of what, with the way out, and OSError for one that cannot be read.
    """
    calls = measured(results, commit)
    for call in calls:
        tables.replace(table, list(COLUMNS), ("GPU", "commit", "part"), call)
    for path in sorted((results.parent / "resnet9").glob("15_*.csv")):
        merge(path, table.with_name(path.name))
    parts = {row["part"] for call in calls for row in call}
    return f"{table} now has {sum(map(len, calls))} numbers of {len(parts)} parts from {results}"


def merge(path: Path, into: Path) -> None:
    """Put the rows of an experiment's table into the book's, replacing those of the same device and size.

    The columns up to "device" say of which run a row is.
    """
    rows = tables.read(path)
    columns = list(rows[0])
    tables.replace(into, columns, tuple(columns[: columns.index("device") + 1]), rows)


def measured(results: Path, commit: str | None = None) -> list[list[dict]]:
    """The rows of each call that has written to a results file. Raises ValueError as `keep` does."""
    calls: list[list[dict]] = []
    machine: dict[str, str] = {}
    for told in _lines(results):
        part = told["part"]
        if part == "machine" and "ended" not in told:
            machine = provenance(told, results, commit)
            calls.append([])
        elif part == "machine":
            continue
        elif not calls:
            raise ValueError(
                f"{results} has no line of the machine before that of {part!r}, so nobody knows what was "
                "measured; keep the file of a whole call of python -m tests.gpu"
            )
        elif "ended" in told:
            for row in calls[-1]:
                if row["part"] == part:
                    row |= {"stage": told["stage"], "seconds": _value(told["seconds"])}
        else:
            calls[-1] += [_row(part, machine, *number) for number in numbers(told)]
    if not any(calls):
        raise ValueError(f"{results} tells no number; run python -m tests.gpu on a machine with a GPU")
    return calls


def provenance(machine: dict, results: Path, commit: str | None) -> dict[str, str]:
    """What the machine's line says of where, when and of which code. Raises ValueError as `keep` does."""
    if machine.get("device") != "cuda" or not machine.get("GPU"):
        raise ValueError(
            f"{results} is a rehearsal on device {machine.get('device')}, and no measurement; run "
            "python -m tests.gpu on a machine with a GPU, with a new folder as --out"
        )
    found = {name: str(machine.get(name) or "") for name in MACHINE}
    if found["commit"] in ("", "unknown"):
        if commit is None:
            raise ValueError(f"{results} does not say of which commit it is; say so with --commit HASH")
        found["commit"] = commit
    return found


def numbers(told: dict) -> Iterator[tuple[str, str]]:
    """(what, value) of each number in a line, "mlp, K 4: ratio" for what."""
    if WORDS & told.keys():
        return
    context = [str(told[name]) if isinstance(told[name], str) else f"{name} {told[name]}"
               for name in CONTEXT if name in told]  # fmt: skip
    for name, x in told.items():
        if isinstance(x, int | float) and name not in ("at", *CONTEXT):
            yield f"{', '.join(context)}: {name}" if context else name, _value(x)


def _value(x: float) -> str:
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def _row(part: str, machine: dict[str, str], what: str, value: str) -> dict[str, str]:
    """A row of a part whose end is not told yet; where it never is, the name of the part is its stage."""
    return {"stage": part.split()[0], "part": part, "what": what, "value": value, **machine, "seconds": ""}


def _lines(results: Path) -> Iterator[dict]:
    for number, line in enumerate(results.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {results} is not whole: {error}; take it out, and keep the file again"
            ) from error
