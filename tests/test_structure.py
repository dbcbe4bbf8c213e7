"""The house of the package: imports go one way, modules and functions stay small, one public surface.

The order is DESIGN's, down to up. A module imports only modules before it in the order. A leaf and the
core reach each other only inside a function, or for a type.
"""

import ast
import types
from pathlib import Path

import pytest

import magic

PACKAGE = Path(magic.__file__).parent
ORDER = [
    "orders", "rewritten", "checkpointing", "determinism", "show", "memory", "bytecode", "content",
    "identity", "inputs", "escapes", "order", "state", "record", "finite", "optim", "trial",
    "normalisation", "equivalents", "stopgradients", "precision", "run", "optim_adjoint", "adjoint",
    "witness", "schedule", "costs", "timeline", "files", "store", "footprint", "tryout", "planning",
    "health", "directory", "replay", "subsets", "where", "attribution", "retraining", "bank",
    "counterfactual", "judgement", "verification", "best_linear", "second_order", "smoothness",
    "baselines",
]  # fmt: skip
LEAVES = ["plot", "data", "models", "checks"]
# policy and place know no numerics
ONLY = {
    "schedule": [],
    "costs": ["schedule"],
    "timeline": ["schedule"],
    "store": ["files", "state", "record"],
}
NUMERICS = ["torch", "numpy"]
MODULE_LINES, FUNCTION_LINES = 400, 60


def modules(package: Path) -> dict[str, ast.Module]:
    return {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(package.glob("*.py"))}


def imports(tree: ast.Module):
    """Yield (name, where) of each import; a module of magic is ".name", the package itself "."."""
    inside = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= dict.fromkeys(ast.walk(node), "function")
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside |= dict.fromkeys((n for child in node.body for n in ast.walk(child)), "types")
    for node in ast.walk(tree):
        where = inside.get(node, "module")
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "magic." * node.level + (node.module or "")
            names = [source.rstrip(".")]
            if names == ["magic"]:
                known = [a.name for a in node.names if a.name in ORDER + LEAVES]
                names = [f"magic.{name}" for name in known] + ["magic"] * (len(known) < len(node.names))
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            yield ("." + rest.partition(".")[0] if first == "magic" else first), where


def direction_problems(package: Path) -> list[str]:
    problems = []
    for name, tree in modules(package).items():
        if name == "__init__":
            continue
        if name not in ORDER + LEAVES:
            problems.append(f"{name}.py is in no order: place it in ORDER or LEAVES of test_structure.py")
            continue
        before = ORDER[: ORDER.index(name)] if name in ORDER else []
        for source, where in imports(tree):
            other = source.removeprefix(".")
            if not source.startswith("."):
                wrong = name == "schedule" and source in NUMERICS
            elif name in LEAVES or other in LEAVES:
                wrong = where == "module"
            else:
                wrong = other not in ONLY.get(name, before)
            if wrong:
                problems.append(f"{name}.py imports {source} ({where}): the order does not allow it")
    return problems


def size_problems(package: Path) -> list[str]:
    problems = []
    for path in sorted(package.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = len(text.splitlines())
        if lines > MODULE_LINES:
            problems.append(f"{path.name} has {lines} lines, more than {MODULE_LINES}: its role has split")
        if not ast.get_docstring(tree):
            problems.append(f"{path.name} has no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    problems.append(f"{path.name}: {node.name} has {lines} lines, more than {FUNCTION_LINES}")
    return problems


def test_imports_go_one_way():
    found = {(name, source) for name, tree in modules(PACKAGE).items() for source, _ in imports(tree)}
    assert {("run", ".state"), ("replay", ".run"), ("replay", ".store")} <= found, "no imports were seen"
    assert direction_problems(PACKAGE) == []


def test_modules_and_functions_stay_small():
    assert "run" in modules(PACKAGE), "no modules were seen"
    assert size_problems(PACKAGE) == []


@pytest.mark.parametrize(
    "name, source, word",
    [
        ("state", "from .run import Run", "state.py imports .run (module)"),
        ("state", "from . import run", "state.py imports .run (module)"),
        ("state", "import magic.run as r", "state.py imports .run (module)"),
        ("state", "from magic.run import Run", "state.py imports .run (module)"),
        ("state", "def f():\n    from .run import Run", "state.py imports .run (function)"),
        ("replay", "from . import Run", "replay.py imports . (module)"),
        ("replay", "import magic", "replay.py imports . (module)"),
        ("schedule", "from .state import State", "schedule.py imports .state"),
        ("schedule", "import torch.nn.functional as F", "schedule.py imports torch"),
        ("store", "from .run import Run", "store.py imports .run"),
        ("judgement", "from .plot import scatter", "judgement.py imports .plot (module)"),
        ("plot", "from .run import Run", "plot.py imports .run (module)"),
        ("novel", "import torch", "novel.py is in no order"),
        ("__init__", "", "__init__.py has no docstring"),
        ("long", "x = 1\n" * (MODULE_LINES + 1), "long.py has 401 lines"),
        ("run", "def f():\n" + "    x = 1\n" * FUNCTION_LINES, "f has 61 lines"),
    ],
)
def test_a_bad_module_is_found(tmp_path, name, source, word):
    (tmp_path / f"{name}.py").write_text(source)
    problems = direction_problems(tmp_path) + size_problems(tmp_path)
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize(
    "name, source",
    [
        ("replay", "from . import determinism, schedule\nfrom .store import Memory\nimport torch"),
        ("store", "import torch\nfrom .state import State"),
        ("judgement", "def plot():\n    from .plot import scatter"),
        ("plot", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .run import Run"),
    ],
)
def test_a_good_module_passes(tmp_path, name, source):
    (tmp_path / f"{name}.py").write_text(f'"""Says what it does."""\n{source}\n')
    assert direction_problems(tmp_path) + size_problems(tmp_path) == []


def test_the_public_surface_is_all():
    missing = [name for name in magic.__all__ if not hasattr(magic, name)]
    assert missing == [], f"in __all__, but not there: {missing}"
    public = {
        name
        for name, value in vars(magic).items()
        if not name.startswith("_") and (name in magic.__all__ or not isinstance(value, types.ModuleType))
    }
    assert public == set(magic.__all__)
    assert len(magic.__all__) == len(public) > 0


def test_init_defines_nothing_of_its_own():
    tree = modules(PACKAGE)["__init__"]
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    own = [node.name for node in ast.walk(tree) if isinstance(node, defined)]
    assert own == []
