"""The house of the package: imports go one way, modules and functions stay small, one public surface.

The order is DESIGN's, down to up. A module imports only modules before it in the order. A leaf and the
core reach each other only inside a function, or for a type; `show`, the ground, is everybody's.
"""

import ast
import functools
import io
import tokenize
import types
from pathlib import Path

import pytest

import magic

PACKAGE = Path(magic.__file__).parent
ORDER = [
    "show",
    "identity.fingerprints", "identity.bytecode", "identity.content", "identity.parts",
    "kernels.graph", "kernels.valued", "kernels.higher_order", "kernels.gelu", "kernels.convolution",
    "kernels.pooling", "kernels.attention",
    "kernels.normalisation_formulas", "kernels.normalisation", "kernels.layer_norm", "kernels.batch_norm",
    "kernels.rewritten", "kernels.checkpointing", "kernels.replace", "kernels.escapes",
    "kernels.stop_gradients", "kernels.precision",
    "training.determinism", "training.hidden_state", "training.arguments", "training.examples",
    "training.dataset_identity", "training.order", "training.state", "training.record", "training.finite",
    "training.update", "training.differentiated", "training.by_hypers", "training.sgd", "training.adam",
    "training.rmsprop", "training.adagrad", "training.nadam", "training.radam", "training.adafactor",
    "training.muon", "training.optim", "training.clipping",
    "training.hypers", "training.network", "training.gradient", "training.first_step",
    "training.run_identity", "training.run", "training.ranks", "training.variants",
    "engine.refusals", "engine.vjp", "engine.asked", "engine.tracing", "engine.adjoint",
    "engine.finite_difference", "engine.witness",
    "engine.measure_witness", "engine.rounding", "engine.actions", "engine.walk", "engine.schedule",
    "engine.costs", "engine.timeline", "engine.files", "engine.store", "engine.places", "engine.footprint",
    "engine.measuring", "engine.trial", "engine.work", "engine.search", "engine.planning", "engine.health",
    "engine.verdict",
    "engine.folder", "engine.resume", "engine.listeners", "engine.finders", "engine.replay",
    "subsets", "points", "saved", "workers", "shares", "attribution", "metagradients",
    "evidence.together", "evidence.retraining", "evidence.rows", "evidence.bank", "evidence.outputs",
    "evidence.comparison", "evidence.judging",
    "evidence.verification", "evidence.optimality", "evidence.curvature", "evidence.forecast",
    "evidence.smoothness",
    "evidence.estimates", "evidence.classes", "evidence.trak", "evidence.ekfac",
    "evidence.controls", "evidence.source", "evidence.dvemb", "evidence.baselines",
    "evidence.explorer_widgets", "evidence.explorer",
    "text.losses", "text.packing", "text.loading", "text.passages",
]  # fmt: skip
WINGS = ["identity", "kernels", "training", "engine", "evidence", "text", "book"]
LEAVES = [
    "book.plot", "book.data", "book.recipes", "book.corpora", "book.banks", "book.models", "book.checks",
    "book.fill_in", "book.claims_table",
    "book.exercises.judging",
    *(f"book.exercises.chapter_{chapter:02}" for chapter in range(17)),
    "book.exercises.small_run", "book.exercises.capstone",
]  # fmt: skip
PLACED = {*ORDER, *LEAVES}
OUTSIDE = [
    "__init__",
    "_moved",
    *(f"{wing}.__init__" for wing in WINGS),
    "book.exercises.__init__",
]  # in no order: the surface, the maps
# policy and place know no numerics
ONLY = {
    "engine.actions": [],
    "engine.walk": ["engine.actions"],
    "engine.schedule": ["engine.actions", "engine.walk"],
    "engine.costs": ["engine.schedule"],
    "engine.timeline": ["engine.schedule"],
    "engine.store": ["training.state", "training.record"],
    "engine.places": ["engine.files", "engine.store", "training.state", "training.record"],
}
NUMERICS = ["torch", "numpy"]
MODULE_LINES, BODY_LINES, PARAMETERS = 300, 40, 6
# What has to be read to follow one metagradient: the reading order in magic/__init__.
CORE = [
    "training.state", "training.update", "training.sgd", "training.network", "training.gradient",
    "training.run", "engine.vjp", "engine.tracing", "engine.adjoint", "engine.actions", "engine.schedule",
    "engine.store", "engine.replay",
]  # fmt: skip
CORE_LINES = 1080  # of code
# What a user may ask for is said argument by argument, since an editor shows it so; and what stands in the
# place of a function of PyTorch's has its signature.
MORE_PARAMETERS = {
    "attribution.attribute": 11, "metagradients.metagradient": 11, "training.run.__init__": 11,
    "evidence.outputs.outputs": 8, "evidence.comparison.lds": 8, "evidence.comparison.leave_one_out": 7,
    "evidence.comparison.compare": 7, "engine.planning.plan": 7, "engine.replay.metagradient": 7,
    "kernels.batch_norm.batch_norm": 8, "kernels.replace._torch_batch_norm": 9,
    "kernels.pooling.avg_pool2d": 7, "kernels.convolution.conv": 7, "kernels.attention.attention": 8,
}  # fmt: skip
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def modules(package: Path) -> dict[str, ast.Module]:
    """The modules by name, from the package down: "run" of the wing "training" is "training.run"."""
    paths = {".".join(p.relative_to(package).with_suffix("").parts): p for p in sorted(package.rglob("*.py"))}
    return {name: parsed(p.read_text(encoding="utf-8")) for name, p in paths.items()}


@functools.cache
def parsed(text: str) -> ast.Module:
    """The tree of a module, which several tests read and none changes."""
    return ast.parse(text)


@functools.cache
def imports(name: str, tree: ast.Module) -> list[tuple[str, str]]:
    """(source, where) of each import; a module of magic is ".wing.name", the package itself "."."""
    inside, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= dict.fromkeys(ast.walk(node), "function")
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside |= dict.fromkeys((n for child in node.body for n in ast.walk(child)), "types")
    for node in ast.walk(tree):
        where = inside.get(node, "module")
        if isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["magic", *name.split(".")][: -node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            known = [alias.name for alias in node.names if f"{source}.{alias.name}"[6:] in PLACED]
            sources = [f"{source}.{one}" for one in known] + [source] * (len(known) < len(node.names))
        else:
            continue
        for source in sources:
            first, _, rest = source.partition(".")
            found.append((f".{rest}" if first == "magic" else first, where))
    return found


def direction_problems(package: Path) -> list[str]:
    problems = []
    for name, tree in modules(package).items():
        if name in OUTSIDE:
            continue
        if name not in ORDER + LEAVES:
            problems.append(f"{name} is in no order: place it in ORDER or LEAVES of test_structure.py")
            continue
        before = ORDER[: ORDER.index(name)] if name in ORDER else []
        for source, where in imports(name, tree):
            other = source.removeprefix(".")
            if not source.startswith("."):
                wrong = name in ("engine.actions", "engine.walk", "engine.schedule") and source in NUMERICS
            elif name in LEAVES or other in LEAVES:
                own = name.startswith("book.exercises.") and other.startswith("book.exercises.")
                wrong = where == "module" and other != "show" and not own
            else:
                wrong = other not in ONLY.get(name, before)
            if wrong:
                problems.append(f"{name} imports {source} ({where}): the order does not allow it")
    return problems


def size_problems(package: Path) -> list[str]:
    problems = []
    for name, tree in modules(package).items():
        path = package.joinpath(*name.split(".")).with_suffix(".py")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            problems.append(f"{path.name} has {lines} lines, more than {MODULE_LINES}: its role has split")
        if not ast.get_docstring(tree):
            problems.append(f"{path.name} has no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                problems += function_problems(name, node)
    return problems


def function_problems(module: str, node) -> list[str]:
    """A body is what follows the docstring; `self` does not count; autograd says what a Function takes."""
    problems, name = [], f"{module}.{node.name}"
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = node.end_lineno - body[0].lineno + 1 if body else 0
    if lines > BODY_LINES:
        problems.append(f"{name} has a body of {lines} lines, more than {BODY_LINES}")
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls") for argument in given)
    autograd = bool(given) and given[0].arg == "ctx"
    if count > MORE_PARAMETERS.get(name, PARAMETERS) and not autograd:
        problems.append(f"{name} has {count} parameters, more than {PARAMETERS}")
    return problems


def code_lines(text: str) -> int:
    """Lines that hold code: without docstrings, comments and blank lines."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def core_problems(package: Path) -> list[str]:
    paths = {name: package.joinpath(*name.split(".")).with_suffix(".py") for name in CORE}
    counts = {name: code_lines(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    if sum(counts.values()) <= CORE_LINES:
        return []
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"the core has {sum(counts.values())} lines of code, more than {CORE_LINES}: {told}"]


def test_imports_go_one_way():
    found = {(name, source) for name, tree in modules(PACKAGE).items() for source, _ in imports(name, tree)}
    seen = {
        ("training.run", ".training.state"), ("engine.replay", ".training.run"), ("points", ".subsets"),
        ("engine.replay", ".engine.store"), ("training.run", ".training.arguments"),
    }  # fmt: skip
    assert seen <= found, "no imports were seen"
    assert direction_problems(PACKAGE) == []


def test_modules_and_functions_stay_small():
    assert "training.run" in modules(PACKAGE), "no modules were seen"
    assert size_problems(PACKAGE) == []


def test_the_core_can_be_read():
    assert core_problems(PACKAGE) == []


def test_lines_of_code_are_counted():
    assert code_lines('"""A docstring\nof two lines."""\n\n# a comment\nx = 1  # another\n') == 1
    assert code_lines('def f(\n    x,\n):\n    """Says."""\n\n    return f"""{x}\n\n"""\n') == 6
    assert code_lines('"""Says."""\nx = """no\ndocstring"""\n') == 2


def test_a_core_that_grows_is_found(tmp_path):
    for name in CORE:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("# nothing\n")
    assert core_problems(tmp_path) == []
    tmp_path.joinpath("engine", "replay.py").write_text("x = 1\n" * (CORE_LINES + 1))
    (problem,) = core_problems(tmp_path)
    assert f"{CORE_LINES + 1} lines of code" in problem and f"engine.replay {CORE_LINES + 1}" in problem


def test_every_module_is_in_the_map_of_its_wing():
    """A line of the map has the names of modules, two spaces or more, and what they hold."""
    for wing in WINGS:
        text = ast.get_docstring(modules(PACKAGE)[f"{wing}.__init__"])
        lines = [line.split("  ")[0] for line in text.splitlines()[1:] if "  " in line]
        told = {name for names in lines for name in names.split(", ")}
        there = {name.split(".")[1] for name in ORDER if name.startswith(f"{wing}.")}
        assert there == told or wing == "book", f"{wing}: {there ^ told} are in one of map and wing only"


@pytest.mark.parametrize(
    "name, source, word",
    [
        ("training.state", "from .run import Run", "training.state imports .training.run (module)"),
        ("training.state", "from . import run", "training.state imports .training.run (module)"),
        ("training.state", "import magic.training.run as r", "state imports .training.run (module)"),
        ("training.state", "from magic.training.run import Run", "state imports .training.run (module)"),
        ("training.state", "from ..engine import replay", "state imports .engine.replay (module)"),
        ("training.state", "def f():\n    from .run import Run", "state imports .training.run (function)"),
        ("engine.replay", "from .. import Run", "engine.replay imports . (module)"),
        ("engine.replay", "import magic", "engine.replay imports . (module)"),
        ("engine.schedule", "from ..training.state import State", "schedule imports .training.state"),
        ("engine.schedule", "import torch.nn.functional as F", "engine.schedule imports torch"),
        ("engine.walk", "import torch", "engine.walk imports torch"),
        ("engine.store", "from ..training.run import Run", "engine.store imports .training.run"),
        ("evidence.comparison", "from ..book.plot import scatter", "comparison imports .book.plot (module)"),
        ("book.plot", "from ..training.run import Run", "book.plot imports .training.run (module)"),
        ("training.novel", "import torch", "training.novel is in no order"),
        ("engine.__init__", "", "__init__.py has no docstring"),
        ("long", "x = 1\n" * (MODULE_LINES + 1), f"long.py has {MODULE_LINES + 1} lines"),
        ("training.run", "def f():\n" + "    x = 1\n" * (BODY_LINES + 1), "f has a body of 41 lines"),
        ("training.run", "def f(a, b, c, d, e, *, g, h): ...", "training.run.f has 7 parameters"),
    ],
)
def test_a_bad_module_is_found(tmp_path, name, source, word):
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    problems = direction_problems(tmp_path) + size_problems(tmp_path)
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize(
    "name, source",
    [
        ("engine.replay", "from ..training import determinism\nfrom . import schedule\nimport torch"),
        ("engine.store", "import torch\nfrom ..training.state import State"),
        ("evidence.comparison", "def plot():\n    from ..book.plot import scatter"),
        (
            "book.plot",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..training.run import Run",
        ),
    ],
)
def test_a_good_module_passes(tmp_path, name, source):
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir()
    path.write_text(f'"""Says what it does."""\n{source}\n')
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
