"""The table of all claims, from the chapters' stored outputs: `python -m magic.book.claims_table` writes it.

A claim is a line that `magic.book.checks.claim` printed: what is claimed and, where it bounds a number, the
bound and the number that was found, with its interval if it has one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BOUNDED = re.compile(r"(?P<text>.+) (?P<bound>[≥≤] \S+|in \[\S+, \S+\]) \((?P<value>\S+(?: \[\S+, \S+\])?)\)")
MARKUP = re.compile(r"([\\|$*_`<>\[\]])")
HEAD = """# All claims

What the chapters claim, as their stored outputs have it: {count} claims, {bounded} of them with a number,
each asserted whenever its chapter is executed. Where a claim bounds a number, the bound is what has to hold
on every machine, and the value is what the stored run found, with its 95 % interval in square brackets.

*Written by `python -m magic.book.claims_table`.*
"""


class Claim(NamedTuple):
    """What is claimed; and the bound and the value, which are empty where the claim has none."""

    text: str
    bound: str = ""
    value: str = ""


def claims(notebook: dict) -> Iterator[Claim]:
    """The claims that a notebook, as nbformat's dictionary, has in its stored outputs, in their order."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for line in "".join(output.get("text", [])).splitlines():
                if line.startswith("✓ "):
                    yield parsed(line[2:].strip())


def parsed(line: str) -> Claim:
    """The claim in a line that has lost its tick."""
    match = BOUNDED.fullmatch(line)
    return Claim(**match.groupdict()) if match else Claim(line)


def title(notebook: dict) -> str:
    """The first heading of the first size; nothing where there is none."""
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return next(iter(re.findall(r"^# (.+)$", text, re.MULTILINE)), "")


def written(notebooks: Path) -> str:
    """The whole page, in Markdown: a table for each chapter that claims something."""
    sections, found = [], []
    for path in sorted(notebooks.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        here = list(claims(notebook))
        found += here
        if here:
            sections.append(f"## [{title(notebook)}]({path.name})\n\n{table(here)}")
    head = HEAD.format(count=len(found), bounded=sum(bool(claim.bound) for claim in found))
    return "\n".join([head, *sections])


def table(found: list[Claim]) -> str:
    rows = [Claim("claim", "bound", "value"), Claim("---", "---", "---")]
    rows += [Claim(*(MARKUP.sub(r"\\\1", part) for part in claim)) for claim in found]
    return "".join(f"| {row.text} | {row.bound} | {row.value} |\n" for row in rows)


def main(notebooks: Path) -> None:
    """Write claims.md into the folder of the chapters."""
    (notebooks / "claims.md").write_text(written(notebooks), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "notebooks"))
