"""The retrainings that chapters ship, so that a reader need not wait for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evidence.bank import Bank
    from ..training.run import Run


def shipped_bank(chapter: str, run: Run, measure: Callable, *, name: str = "", how: str = "weight") -> Bank:
    """A bank of `run` over a copy of the chapter's file, banks/CHAPTER.sqlite in the folder of notebooks.

    On another machine, whose sums round differently, the rows are taken over by `Bank.adopt`, after two of
    them have been trained again and compared; `name` tells runs apart there. Where there is no file, the
    bank is empty and fills with what is trained.
    """
    from ..evidence.bank import Bank

    bank = Bank(_copy(chapter), run, measure, name=name, how=how)
    if len(bank) == 0:
        bank.adopt()
    return bank


@cache
def _copy(chapter: str) -> Path:
    """A copy in a folder of its own: what a notebook trains is not written into the book."""
    folder = Path(tempfile.mkdtemp())
    for place in (Path("banks"), Path("../banks")):  # seen from a chapter, and from its solutions
        if (file := place / f"{chapter}.sqlite").exists():
            shutil.copy(file, folder)
            break
    return folder / f"{chapter}.sqlite"
