"""The chapters of the book on this machine: by nbval where it is installed, else their code cell by cell."""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from .stages import ROOT, Teller, absent, told_by_pytest

NOTEBOOKS = ROOT / "notebooks"
SANITIZE = ROOT / "tests" / "sanitize.cfg"
FEW = 5  # code cells of a rehearsal
CLAIMED = re.compile(r"✓ .*|.{34,} (?:same bits|agree to \S+|DIFFER)")  # what claim() and agree() print


def chapter(teller: Teller, number: str) -> None:
    """Compare a chapter with its stored outputs; without nbval, with the claims among them."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.py")
    if absent("nbval", "ipykernel") is None:
        by_nbval(teller, path.with_suffix(".ipynb"))
    else:
        cell_by_cell(teller, path)


def by_nbval(teller: Teller, path: Path) -> None:
    """Let nbval run the notebook, with the options that the project's tests have."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = settings["tool"]["pytest"]["ini_options"]["addopts"]
    chosen = [option for option in options if option.startswith("--nbval")]
    told_by_pytest(teller, [*chosen, str(path)], FIRST=str(FEW if teller.small else 0))


def cell_by_cell(teller: Teller, path: Path) -> None:
    """Execute the code cells, and compare the claims they print with those that are stored.

    Claims that fail are told, and what comes after them is done; a package that is not here ends the chapter.
    """
    code, claims, counts = cells_of(path), stored_claims(path.with_suffix(".ipynb")), Counter[str]()
    before, namespace = Path.cwd(), {"__name__": "__main__", "display": print}
    os.chdir(path.parent)
    try:
        with lenient(teller, counts):
            for i, cell in enumerate(code[:FEW] if teller.small else code):
                name = f"<{path.stem}, cell {i}>"
                linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
                printed = Printed()
                with teller.trying(f"cell {i}") as said, contextlib.redirect_stdout(printed):
                    exec(compile(cell, name, "exec"), namespace)
                if "skipped" in said:
                    break
                counts["cells done"] += 1
                counts["errors"] += "error" in said
                counts["lines that differ"] += tell_of_others(
                    teller, i, claims[i], claims_in(printed.getvalue())
                )
    finally:
        os.chdir(before)
    found = {name: counts[name] for name in ("held", "failed", "errors", "lines that differ", "cells done")}
    teller.tell(chapter=path.stem, cells=len(code), **found)


def tell_of_others(teller: Teller, cell: int, stored: list[str], now: list[str]) -> int:
    """Tell the claims of a cell that are stored and not printed now, and the reverse; how many they are."""
    gone, new = list(Counter(stored) - Counter(now)), list(Counter(now) - Counter(stored))
    if gone or new:
        teller.tell(differs=f"cell {cell}", stored=gone, now=new)
    return max(len(gone), len(new))


def cells_of(path: Path) -> list[str]:
    """The code cells of a chapter's script."""
    cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    heads = [cell.partition("\n") for cell in cells]
    return [code for head, _, code in heads if "[markdown]" not in head]


def stored_claims(path: Path) -> list[list[str]]:
    """The claims that each code cell of a notebook has printed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    texts = ("".join("".join(out.get("text", ())) for out in of_cell) for of_cell in outputs)
    return [claims_in(text) for text in texts]


def claims_in(printed: str) -> list[str]:
    """Lines of claims, without what tests/sanitize.cfg lets differ: the numbers beside their bounds."""
    rules = re.findall(r"^regex: (.*)\nreplace: ?(.*)$", SANITIZE.read_text(encoding="utf-8"), re.MULTILINE)
    for pattern, other in rules:
        printed = re.sub(pattern, other, printed)
    return [line for line in printed.splitlines() if CLAIMED.fullmatch(line)]


class Printed(io.StringIO):
    """What is printed, which goes on to where it was going."""

    def __init__(self):
        super().__init__()
        self.beyond = sys.stdout

    def write(self, text: str) -> int:
        self.beyond.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.beyond.flush()


@contextlib.contextmanager
def lenient(teller: Teller, counts: Counter) -> Iterator[None]:
    """In the block, a claim that fails is told and counted instead of raised."""
    from magic.book import checks

    def told(f: Callable) -> Callable:
        def checked(*args, **kwargs):
            try:
                f(*args, **kwargs)
                counts["held"] += 1
            except AssertionError as error:
                counts["failed"] += 1
                teller.tell(claim=str(args[0]), outcome="FAILED", why=str(error))

        return checked

    strict = checks.claim, checks.agree
    checks.claim, checks.agree = map(told, strict)
    try:
        yield
    finally:
        checks.claim, checks.agree = strict
