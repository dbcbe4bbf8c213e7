"""The style of the package and its tests: what the linter, the formatter and the type checker say of it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WATCHED

ROOT = Path(__file__).parents[2]


def passes(*command: str) -> None:
    """Run `python -m` with this command in the root; fail with its output if it finds something."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} does not pass:\n{done.stdout}{done.stderr}"


def test_the_linter_passes():
    passes("ruff", "check")


def test_everything_is_formatted():
    passes("ruff", "format", "--check", "magic", "tests")


@pytest.mark.slow
def test_the_types_agree():
    """With an empty cache, this checks PyTorch's stubs too, which takes most of its time."""
    passes("mypy")


@pytest.mark.parametrize("file", WATCHED)
def test_what_coverage_watches_is_there(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert set(WATCHED[file]) <= set(names) and len(WATCHED[file]) < len(names)
