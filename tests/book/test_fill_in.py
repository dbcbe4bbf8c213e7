"""Fill-in chapters: bodies go, signatures and docstrings stay, and a reader's own file is left alone."""

import ast
import json

import pytest

from magic.book.fill_in import TAG, fill_in, has_stubs, stub, write
from tests.project.test_notebooks import NOTEBOOKS


def test_bodies_become_stubs():
    source = (
        'x = 1\n\n\ndef f(a,\n      b):\n    """Adds."""\n'
        "    def inner():\n        return a\n    return inner() + b\n\n\n"
        "class C:\n    def g(self):\n        return 2\n\n\ny = f(1, 2)"
    )
    assert stub(source) == (
        'x = 1\n\n\ndef f(a,\n      b):\n    """Adds."""\n    raise NotImplementedError("your turn")\n\n\n'
        'class C:\n    def g(self):\n        raise NotImplementedError("your turn")\n\n\ny = f(1, 2)'
    )
    assert stub('def f():\n    """Only says."""') == (
        'def f():\n    """Only says."""\n    raise NotImplementedError("your turn")'
    )


def test_only_tagged_cells_lose_their_bodies():
    def cell(source, *tags):
        return {"cell_type": "code", "source": [source], "metadata": {"tags": list(tags)},
                "outputs": ["x"], "execution_count": 3}  # fmt: skip

    text = {"cell_type": "markdown", "source": ["[a](04_b.ipynb#c) [d](https://e) [f](#g)"], "metadata": {}}
    notebook = {"cells": [cell("def f(): return 1"), cell("def g():\n    return 2", "your-turn"), text]}
    first, second, text = fill_in(notebook)["cells"]
    assert text["source"] == ["[a](../04_b.ipynb#c) [d](https://e) [f](#g)"]
    assert first["source"] == ["def f(): return 1"] and second["source"][1].strip().startswith("raise Not")
    assert first["outputs"] == second["outputs"] == [] and second["execution_count"] is None
    assert has_stubs(notebook) and not has_stubs({"cells": notebook["cells"][:1]})


@pytest.mark.parametrize("name", ["03", "04", "05", "06"])
def test_the_chapters_have_functions_to_write(name):
    """Each stub raises by its own words, and nothing of the finished body is left in its cell."""
    (path,) = NOTEBOOKS.glob(f"{name}_*.ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    before = [cell for cell in notebook["cells"] if TAG in cell["metadata"].get("tags", [])]
    after = [cell for cell in fill_in(notebook)["cells"] if TAG in cell["metadata"].get("tags", [])]
    assert len(before) >= 3
    for cell, emptied in zip(before, after, strict=True):
        tree = ast.parse("".join(emptied["source"]))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert functions and len("".join(emptied["source"])) < len("".join(cell["source"]))
        for node in functions:
            assert ast.unparse(node.body[-1]) == "raise NotImplementedError('your turn')"
            assert ast.get_docstring(node), f"{node.name} does not say what to write"


def test_they_are_written_once(tmp_path):
    cell = {
        "cell_type": "code",
        "source": ["def g():\n", "    return 2"],
        "metadata": {"tags": ["your-turn"]},
    }
    (tmp_path / "03_a.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "04_b.ipynb").write_text(json.dumps({"cells": []}))
    (written,) = write(tmp_path, tmp_path / "fill_in")
    assert written == tmp_path / "fill_in" / "03_a.ipynb" and "your turn" in written.read_text()
    written.write_text("filled in")
    assert write(tmp_path, tmp_path / "fill_in") == [] and written.read_text() == "filled in"


def test_no_chapters_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no chapters in .*root of the repository"):
        write(tmp_path, tmp_path / "fill_in")
