"""What the experiments share: rows of a file, and on what they were measured."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The rows that are there; none without a file."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write(path: Path, columns: list[str], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def replace(path: Path, columns: list[str], same: tuple[str, ...], rows: list[dict]) -> None:
    """Write these rows in the place of those of the file that have the same values in the columns `same`."""
    own = {tuple(str(row[name]) for name in same) for row in rows}
    others = [row for row in read(path) if tuple(row[name] for name in same) not in own]
    write(path, columns, [*others, *rows])


def add_line(path: Path, row: dict) -> dict:
    """The row, printed and added to a file of JSON lines."""
    line = json.dumps(row)
    with path.open("a") as file:
        file.write(line + "\n")
    print(line)
    return row


def provenance() -> dict:
    """The columns date, torch and threads of a row."""
    import torch  # not needed by those who only read

    version, threads = torch.__version__, torch.get_num_threads()
    return {"date": time.strftime("%Y-%m-%d"), "torch": version, "threads": threads}
