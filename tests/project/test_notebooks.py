"""Each notebook is a pair that agrees, was executed top to bottom, and says something that is compared.

nbval, which runs the notebooks, compares nothing where nothing is stored: a notebook without outputs
passes it. What it needs is checked here. Every check returns a list of problems, and each has a test
that it finds one.
"""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupytext.compare import NotebookDifference, compare_notebooks
from nbformat import v4
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
# what a reader has written, or Jupyter, is no pair
NO_PAIRS = {"fill_in", ".ipynb_checkpoints"}
PAIRS = sorted(p for p in NOTEBOOKS.rglob("*.ipynb") if not NO_PAIRS & set(p.parts))
LINES = 25
WIDTH = 100  # of a line of code; a page clips what is longer
NOT_COMPARED = "nbval-ignore-output"
# a tag that is spelled otherwise does nothing; nbval-skip is left out on purpose
TAGS = {
    NOT_COMPARED, "raises-exception", "your-turn",
    "hide-input", "hide-output", "hide-cell", "remove-input", "remove-output", "remove-cell",
}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def images(cell) -> bool:
    return any(kind.startswith("image/") for out in cell.outputs for kind in out.get("data", {}))


def says_something(out) -> bool:
    data = out.get("data", {})
    return out.get("name") == "stdout" or ("text/plain" in data and WIDGET not in data)


def widget_problems(notebook) -> list[str]:
    """The state of widgets that no output shows, such as that of bars long gone."""
    shown = any(WIDGET in out.get("data", {}) for cell in code_cells(notebook) for out in cell.outputs)
    return [] if shown or "widgets" not in notebook.metadata else ["stores widgets that no output shows"]


def pair_problems(path: Path) -> list[str]:
    script = path.with_suffix(".py")
    if not script.exists():
        return [f"{path.name} has no {script.name}"]
    notebook, text = nbformat.read(path, 4), jupytext.read(script)
    problems = []
    for name, half in ((path.name, notebook), (script.name, text)):
        if half.metadata.get("kernelspec", {}).get("name") != "python3":
            problems.append(f"{name} does not name the kernel python3")
    try:
        compare_notebooks(notebook, text, "py:percent")
    except NotebookDifference as difference:
        problems.append(f"{path.name} and {script.name} differ: {difference}")
    return problems


def run_problems(notebook) -> list[str]:
    """Was it executed top to bottom, in a fresh kernel, and without an error it does not announce?"""
    cells = code_cells(notebook)
    problems = [] if cells else ["has no code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        problems.append(f"was not executed top to bottom: execution counts {counts}")
    for i, cell in enumerate(cells, 1):
        failed = any(out.output_type == "error" for out in cell.outputs)
        if failed and "raises-exception" not in tags(cell):
            problems.append(f"code cell {i} stores an error")
        if not failed and "raises-exception" in tags(cell):
            problems.append(f"code cell {i} is tagged raises-exception and raises none")
    return problems


def comparison_problems(notebook) -> list[str]:
    """Does nbval compare what should be compared, and nothing else?"""
    problems, compared = [], 0
    for i, cell in enumerate(code_cells(notebook), 1):
        if unknown := tags(cell) - TAGS:
            problems.append(f"code cell {i} has unknown tags {sorted(unknown)}")
        if re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.MULTILINE):
            problems.append(f"code cell {i} talks to nbval in a comment: use a tag")
        if NOT_COMPARED in tags(cell):
            continue
        if images(cell):
            problems.append(f"code cell {i} shows a figure and is not tagged {NOT_COMPARED}")
        if any(out.get("name") == "stderr" for out in cell.outputs):
            problems.append(f"code cell {i} writes to stderr, which differs between machines")
        compared += any(says_something(out) for out in cell.outputs)
    if not compared:
        problems.append("stores no text that nbval compares")
    return problems


def size_problems(notebook) -> list[str]:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    problems = [
        f"code cell {i} has {n} lines, more than {LINES}" for i, n in enumerate(lengths, 1) if n > LINES
    ]
    for i, cell in enumerate(code_cells(notebook), 1):
        widest = max(map(len, cell.source.splitlines()), default=0)
        if widest > WIDTH:
            problems.append(f"code cell {i} has a line of {widest} characters, more than {WIDTH}")
    return problems


def problems(path: Path) -> list[str]:
    notebook = nbformat.read(path, 4)
    found = run_problems(notebook) + comparison_problems(notebook) + size_problems(notebook)
    return pair_problems(path) + found + widget_problems(notebook)


def lone_scripts(folder: Path) -> list[str]:
    return [p.name for p in sorted(folder.glob("*.py")) if not p.with_suffix(".ipynb").exists()]


def test_there_are_notebooks():
    assert any(path.parent == NOTEBOOKS for path in PAIRS), "no notebook: the tests below say nothing"
    assert lone_scripts(NOTEBOOKS) == []


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())
def test_notebook(path):
    assert problems(path) == []


# The checks themselves, on a small notebook that is right and on copies with one fault each.


def cell(count, source, *outputs, tags=()):
    made = v4.new_code_cell(source, execution_count=count, outputs=list(outputs))
    if tags:
        made.metadata["tags"] = list(tags)
    return made


def printed(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


def shown(kind, text="<Figure size 640x480 with 1 Axes>"):
    return v4.new_output("display_data", data={kind: "AAAA", "text/plain": text})


def error():
    return v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])


def small():
    cells = [
        v4.new_markdown_cell("# A small notebook"),
        cell(1, "print(1 + 1)", printed("2\n")),
        cell(2, "figure", shown("image/png"), tags=[NOT_COMPARED]),
        cell(3, "1 / 0", error(), tags=["raises-exception"]),
        cell(4, "x = 1"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def write(notebook, path: Path) -> Path:
    """Both halves of the pair."""
    nbformat.write(notebook, path)
    jupytext.write(notebook, path.with_suffix(".py"), fmt="py:percent")
    return path


def strip(notebook):
    for c in code_cells(notebook):
        c.outputs, c.execution_count = [], None


def out_of_order(notebook):
    notebook.cells[1].execution_count, notebook.cells[2].execution_count = 2, 1


def run_twice(notebook):
    notebook.cells[4].execution_count = 7


def add(*arguments, **keywords):
    def change(notebook):
        notebook.cells.append(cell(5, *arguments, **keywords))

    return change


def silence(notebook):
    notebook.cells[1].outputs = []


def only_a_bar(notebook):
    notebook.cells[1].outputs = [shown(WIDGET, "  0%|          | 0/200 [00:00<?, ?it/s]")]


def other_kernel(notebook):
    notebook.metadata.kernelspec["name"] = "my-environment"


FAULTS = [
    (strip, "was not executed top to bottom: execution counts [None, None, None, None]"),
    (strip, "stores no text that nbval compares"),
    (out_of_order, "was not executed top to bottom: execution counts [2, 1, 3, 4]"),
    (run_twice, "was not executed top to bottom: execution counts [1, 2, 3, 7]"),
    (add("1 / 0", error()), "code cell 5 stores an error"),
    (add("1", tags=["raises-exception"]), "code cell 5 is tagged raises-exception and raises none"),
    (add("1", tags=["nbval-ignore-outputs"]), "code cell 5 has unknown tags ['nbval-ignore-outputs']"),
    (add("# NBVAL_SKIP\n1"), "code cell 5 talks to nbval in a comment"),
    (add("plot()", shown("image/png")), "code cell 5 shows a figure and is not tagged"),
    (add("warn()", printed("careful", "stderr")), "code cell 5 writes to stderr"),
    (add("x = 1\n" * (LINES + 1)), "code cell 5 has 26 lines"),
    (add("x = 1" + " " * 93 + "# 1"), "code cell 5 has a line of 101 characters"),
    (silence, "stores no text that nbval compares"),
    (only_a_bar, "stores no text that nbval compares"),
    (other_kernel, "does not name the kernel python3"),
]


def test_a_good_notebook_passes(tmp_path):
    assert problems(write(small(), tmp_path / "small.ipynb")) == []
    assert lone_scripts(tmp_path) == []


@pytest.mark.parametrize("change, said", FAULTS, ids=[said[:40] for _, said in FAULTS])
def test_a_fault_is_found(tmp_path, change, said):
    notebook = small()
    change(notebook)
    found = problems(write(notebook, tmp_path / "small.ipynb"))
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    "old, new",
    [("print(1 + 1)", "print(1 + 2)"), ("# # A small", "# # A tiny"), (NOT_COMPARED, "hide-input")],
    ids=["code", "prose", "tag"],
)
def test_a_drifted_pair_is_found(tmp_path, old, new):
    path = write(small(), tmp_path / "small.ipynb")
    script = path.with_suffix(".py")
    assert old in script.read_text()
    script.write_text(script.read_text().replace(old, new))
    assert "small.ipynb and small.py differ" in "".join(problems(path))


def test_widgets_that_nothing_shows_are_found(tmp_path):
    notebook = small()
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    assert "stores widgets that no output shows" in problems(write(notebook, tmp_path / "small.ipynb"))


def test_half_a_pair_is_found(tmp_path):
    path = write(small(), tmp_path / "small.ipynb")
    path.with_suffix(".py").rename(tmp_path / "other.py")
    assert "small.ipynb has no small.py" in problems(path)
    assert lone_scripts(tmp_path) == ["other.py"]


# The comparison itself, under the project's own options.


def sanitized(text: str) -> str:
    for regex, replacement in get_sanitize_patterns((ROOT / "tests" / "sanitize.cfg").read_text()):
        text = re.sub(regex, replacement, text)
    return text


@pytest.mark.parametrize(
    "one, other",
    [
        ("took 1.3 s", "took 12.25 s"),
        ("took 850 ms", "took 1,250 ms"),
        ("Wall time: 59.9 s", "Wall time: 1min 3s"),
        ("1.3 ms ± 20 µs per loop", "900 µs ± 1.1 μs per loop"),
        ("at 0:00:59", "at 0:01:02"),
        ("run:  0%|     | 0/200 [00:00<?, ?it/s]", "run: 45%|██▎  | 90/200 [00:01<00:01, 70.1it/s]"),
        ("<object at 0x7f3a5c0d1e50>", "<object at 0x55d0c81a2f10>"),
        ("fingerprint 19a0d2e7b3c4f586", "fingerprint f00dfeed12345678"),
        ("on cpu", "on cuda:0"),
        ("steps, 68.6 MB of 1,000.0; 0 again", "steps, 71.2 MB of 1,000.0; 0 again"),
        ("✓ LDS ≥ 0.98 (0.992 [0.978, 0.996])", "✓ LDS ≥ 0.98 (0.991 [0.975, 0.995])"),
        ("✓ error ≤ 1e-09 (3.1e-13)\nx", "✓ error ≤ 1e-09 (2e-13)\nx"),
        ("✓ slope in [0.9, 1.2] (1.13)", "✓ slope in [0.9, 1.2] (1.1)"),
    ],
)
def test_sanitize_forgets_what_may_differ(one, other):
    assert sanitized(one) == sanitized(other) != one


@pytest.mark.parametrize(
    "claim",
    [
        "LDS 0.98, 10 targets, 40 subsets", "200 steps in 16 states", "largest relative error 4e-11",
        "removing 42 changes the loss by +0.031", "drop 20 % of 1,200 images", "tensor([1.5000, 2.2500])",
        "seed 1234567890123", "16 states = 2.1 MB", "min 3, max 5", "LDS ≥ 0.98 (12 targets)",
        "✓ four at once (at any memory)", "✓ LDS ≥ 0.98",
    ],
)  # fmt: skip
def test_sanitize_keeps_claims(claim):
    assert sanitized(claim) == claim


@pytest.mark.slow
def test_nbval_compares_the_outputs(tmp_path):
    """A false output stored in an otherwise good notebook must fail, by pytest's settings in pyproject."""
    source = 'print(f"{1 + 1} in {0.25:.2f} s")'
    cells = [cell(i, source, printed(stored)) for i, stored in enumerate(["2 in 1.5 s\n", "3 in 1.5 s\n"], 1)]
    nbformat.write(v4.new_notebook(cells=cells, metadata=small().metadata), tmp_path / "half.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-rA", "-n0"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert re.search(r"FAILED \S*half\.ipynb::Cell 1", done.stdout), done.stdout
