"""What the experiments share: rows of a CSV file, and on what they were measured."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch


def read(path: Path) -> list[dict]:
    """The rows that are there; none without a file."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write(path: Path, columns: list[str], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def provenance() -> dict:
    """The columns date, torch and threads of a row."""
    version, threads = torch.__version__, torch.get_num_threads()
    return {"date": time.strftime("%Y-%m-%d"), "torch": version, "threads": threads}
