"""The retrainings and the scores that chapters ship, so that a reader need not wait for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..evidence.bank import Bank
    from ..training.run import Run

_compared: set[str] = set()  # chapters of whose files a row has been trained again in this process


def shipped_bank(
    chapter: str,
    run: Run,
    measure: Callable,
    *,
    name: str = "",
    how: str = "weight",
    tolerance: float = 1e-2,
) -> Bank:
    """A bank of `run` over a copy of the chapter's file, banks/CHAPTER.sqlite in the folder of notebooks.

    On another machine, whose sums round differently, the rows are taken over by `Bank.adopt`, after one of
    them has been trained again and compared, within a `tolerance` as there. Where a file has rows of several
    runs, told apart by `name`, that is done for the first of them, and for a run whose identity is not what
    it was. Where there is no file, the bank is empty and fills with what is trained.
    """
    from ..evidence.bank import Bank

    bank = Bank(_copy(chapter), run, measure, name=name, how=how)
    if len(bank) == 0:
        believed = chapter in _compared and bank.only_rounded_otherwise()
        if bank.adopt(check=0 if believed else 1, tolerance=tolerance):
            _compared.add(chapter)
    return bank


def shipped_scores(
    file: str, run: Run, measure: Callable, make: Callable[[], Attribution] | None = None
) -> Attribution:
    """Scores of `run` that come with a chapter, banks/FILE.npz in the folder of notebooks.

    make  what makes them where there is no file, or where it holds those of another run or measure; None is
          magic.attribute(run, measure)

    Raises ValueError for a file that holds others where the environment has MAGIC_SHIPPED=required: so the
    tests see one that was left behind by a change of the code.
    """
    import magic

    try:
        return magic.Attribution.load(_place(f"{file}.npz"), run, measure)
    except FileNotFoundError:
        pass
    except ValueError:
        if os.environ.get("MAGIC_SHIPPED") == "required":
            raise
    return magic.attribute(run, measure, progress=False) if make is None else make()


def _place(name: str) -> Path:
    """A file of banks/, seen from a chapter or from its solutions."""
    here, above = Path("banks") / name, Path("../banks") / name
    return above if above.exists() else here


@cache
def _copy(chapter: str) -> Path:
    """A copy in a folder of its own: what a notebook trains is not written into the book."""
    folder = Path(tempfile.mkdtemp())
    if (file := _place(f"{chapter}.sqlite")).exists():
        shutil.copy(file, folder)
    return folder / f"{chapter}.sqlite"
