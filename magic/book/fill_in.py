"""Fill-in versions of chapters, from the finished ones, for a reader: `python -m magic.book.fill_in`.

In a cell tagged "your-turn", each function loses its body and keeps its signature and its docstring; the
cells after it, which compare and claim, tell the reader whether the new body is right. The outputs are gone.
"""

from __future__ import annotations

import ast
import json
import re
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
    if _tagged(cell):
        source = stub(source)
    return {**cell, "source": source.splitlines(keepends=True), "outputs": [], "execution_count": None}


def has_stubs(notebook: dict) -> bool:
    return any(map(_tagged, notebook["cells"]))


def _tagged(cell: dict) -> bool:
    return TAG in cell.get("metadata", {}).get("tags", [])


def write(notebooks: Path, folder: Path) -> list[Path]:
    """Write each chapter with a tagged cell into the folder, and return what was written.

    A file that is there stays as it is, since a reader may have filled it in. Raises FileNotFoundError
    where there are no chapters.
    """
    chapters = {
        path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(notebooks.glob("*.ipynb"))
    }
    if not chapters:
        raise FileNotFoundError(f"no chapters in {notebooks}/: run this in the root of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    new = [
        path for path, chapter in chapters.items() if has_stubs(chapter) and not (folder / path.name).exists()
    ]
    for path in new:
        text = json.dumps(fill_in(chapters[path]), indent=1, ensure_ascii=False) + "\n"
        (folder / path.name).write_text(text, encoding="utf-8")
    return [folder / path.name for path in new]


if __name__ == "__main__":
    print(*write(Path("notebooks"), Path("notebooks/fill_in")), sep="\n")
