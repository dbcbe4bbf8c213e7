"""Fill-in chapters: bodies go, signatures and docstrings stay, and what is stored is current."""

import json

import pytest

from magic.book.fill_in import fill_in, has_stubs, main, stub, written
from tests.project.test_notebooks import NOTEBOOKS

CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
STORED = sorted((NOTEBOOKS / "fill_in").glob("*.ipynb"))


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


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_is_stored_is_current(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    stored = NOTEBOOKS / "fill_in" / path.name
    assert stored.exists() == has_stubs(notebook), "run python -m magic.book.fill_in"
    if stored.exists():
        assert stored.read_text(encoding="utf-8") == written(notebook), "run python -m magic.book.fill_in"


def test_none_is_left_over():
    assert {path.name for path in STORED} <= {path.name for path in CHAPTERS}


def test_main_writes_them(tmp_path, capsys):
    cell = {
        "cell_type": "code",
        "source": ["def g():\n", "    return 2"],
        "metadata": {"tags": ["your-turn"]},
    }
    (tmp_path / "03_a.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "04_b.ipynb").write_text(json.dumps({"cells": []}))
    main(tmp_path)
    assert [path.name for path in (tmp_path / "fill_in").iterdir()] == ["03_a.ipynb"]
    assert "03_a.ipynb" in capsys.readouterr().out
