"""The table of all claims is what the stored outputs say, and loses none of them."""

import json
from pathlib import Path

import pytest

from magic.book.checks import claim
from magic.book.claims_table import Claim, claims, parsed, written
from magic.show import Figure

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def notebook(*printed, heading="# 04 · A chapter"):
    outputs = [{"output_type": "stream", "name": "stdout", "text": text} for text in printed]
    cells = [{"cell_type": "markdown", "source": [f"{heading}\n", "\n", "Text."]}]
    return {"cells": [*cells, {"cell_type": "code", "source": [], "outputs": outputs}]}


def test_the_table_is_current():
    stored = (NOTEBOOKS / "claims.md").read_text(encoding="utf-8")
    assert stored == written(NOTEBOOKS), "run: python -m magic.book.claims_table"


def test_no_claim_is_lost():
    """However a line is read, there are as many rows as ticks in the sources of the outputs."""
    text = (NOTEBOOKS / "claims.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    heads = text.count("\n## ")
    ticks = sum(path.read_text(encoding="utf-8").count('"✓ ') for path in NOTEBOOKS.glob("*.ipynb"))
    assert len(rows) - 2 * heads == ticks > 100
    assert heads >= 10


@pytest.mark.parametrize(
    "arguments, read",
    [
        (("no state is kept twice", True), ("no state is kept twice", "", "")),
        (("LDS", Figure(0.9921, 0.978, 0.996), 0.98, None), ("LDS", "≥ 0.98", "0.992 [0.978, 0.996]")),
        (("relative error", 3.14e-13, None, 1e-9), ("relative error", "≤ 1e-09", "3.14e-13")),
        (("slope (of ten)", 1.131, 0.9, 1.2), ("slope (of ten)", "in [0.9, 1.2]", "1.13")),
        (("cosine ≥ 0 (all)", -0.5, -1, None), ("cosine ≥ 0 (all)", "≥ -1", "-0.5")),
        (("norm ≥ 0.5 (in all ten)", True), ("norm ≥ 0.5 (in all ten)", "", "")),
    ],
    ids=lambda value: str(value[0]),
)
def test_a_claim_is_read_as_it_was_made(capsys, arguments, read):
    text, holds, *bounds = arguments
    claim(text, holds, **dict(zip(("at_least", "at_most"), bounds, strict=False)))
    printed = capsys.readouterr().out
    assert parsed(printed[2:].strip()) == Claim(*read)
    assert list(claims(notebook(printed))) == [Claim(*read)]


def test_a_page_has_a_table_for_each_chapter(tmp_path):
    one = notebook("✓ a|b ≥ 1 (2)\n", ["not claimed\n", "✓ costs $3\n"])
    (tmp_path / "04_one.ipynb").write_text(json.dumps(one))
    (tmp_path / "05_none.ipynb").write_text(json.dumps(notebook("3\n")))
    text = written(tmp_path)
    assert "2 claims, 1 of them" in text and "05_none" not in text
    assert text.endswith(
        "## [04 · A chapter](04_one.ipynb)\n\n| claim | bound | value |\n| --- | --- | --- |\n"
        "| a\\|b | ≥ 1 | 2 |\n| costs \\$3 |  |  |\n"
    )
