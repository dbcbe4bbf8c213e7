"""Fill-in versions of chapters, from the finished ones: `python -m magic.book.fill_in` writes them all.

In a cell tagged "your-turn", each function loses its body and keeps its signature and its docstring; the
cells after it, which compare and claim, tell the reader whether the new body is right. The outputs are gone.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

TAG = "your-turn"
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)]+)")
STUB = 'raise NotImplementedError("your turn")'


def stub(source: str) -> str:
    """The source with the body of each top-level function and method replaced, docstrings kept."""
    lines = source.splitlines()
    for node in reversed([n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]):
        if node.col_offset and not _is_method(node, source):
            continue  # it goes with the function around it
        first = 1 if ast.get_docstring(node) is not None else 0
        start = node.body[first].lineno - 1 if first < len(node.body) else node.end_lineno
        indent = " " * node.body[0].col_offset
        lines[start : node.end_lineno] = [indent + STUB]
    return "\n".join(lines)


def _is_method(node: ast.FunctionDef, source: str) -> bool:
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    return any(inner.lineno == node.lineno for one in classes for inner in one.body)


def fill_in(notebook: dict) -> dict:
    """The notebook, as nbformat's dictionary, with stubs in the cells that are tagged and without outputs."""
    cells = [_emptied(cell) for cell in notebook["cells"]]
    return {**notebook, "cells": cells}


def _emptied(cell: dict) -> dict:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":  # a link to a file leads from one folder deeper
        source = LINK.sub(r"](../\1", source)
        return {**cell, "source": source.splitlines(keepends=True)}
    if TAG in cell["metadata"].get("tags", []):
        source = stub(source)
    return {**cell, "source": source.splitlines(keepends=True), "outputs": [], "execution_count": None}


def has_stubs(notebook: dict) -> bool:
    return any(TAG in cell["metadata"].get("tags", []) for cell in notebook["cells"])


def written(notebook: dict) -> str:
    return json.dumps(fill_in(notebook), indent=1, ensure_ascii=False) + "\n"


def main(notebooks: Path) -> None:
    """Write notebooks/fill_in/NAME for each chapter with a tagged cell."""
    for path in sorted(notebooks.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if has_stubs(notebook):
            target = notebooks / "fill_in" / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_text(written(notebook), encoding="utf-8")
            print(target.relative_to(notebooks.parent))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "notebooks"))
