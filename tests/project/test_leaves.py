"""Data sets, models, figures and the checks that notebooks use; what is shown, and what is missing."""

import ast
import gzip
import hashlib
import pickle
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch

import magic
from magic import subsets, text
from magic.book import checks, corpora, data, models, plot, recipes
from magic.evidence import judging
from magic.show import DISTRIBUTIONS, Figure
from tests.evidence.test_controls import texts
from tests.support import cases

matplotlib.use("agg")


def test_digits():
    x, y, x_test, _ = data.digits(train=100, test=50)
    assert x.shape == (100, 1, 8, 8) and x_test.shape == (50, 1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3
    again = data.digits(train=100, test=50)
    assert torch.equal(x, again[0]) and not torch.equal(x, data.digits(100, 50, seed=1)[0])
    with pytest.raises(ValueError, match="1,797"):
        data.digits(train=1700, test=100)


@pytest.fixture
def fashion_folder(tmp_path):
    """Four files in Fashion-MNIST's format, of noise."""
    dice = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = dice.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes(range(10)) * (count // 10))
    return tmp_path


def test_fashion_mnist_from_a_folder(fashion_folder, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(fashion_folder))
    x, y, x_test, _ = data.fashion_mnist(train=40, test=20)
    assert x.shape == (40, 1, 28, 28) and x_test.shape == (20, 1, 28, 28)
    assert y.tolist() == list(range(10)) * 4
    small = data.fashion_mnist(train=30, test=20, size=14)[0]
    assert small.shape == (30, 1, 14, 14)
    with pytest.raises(ValueError, match="41 images asked for; there are 40"):
        data.fashion_mnist(train=41, test=20)
    (fashion_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not hold .*t10k-labels-idx1-ubyte"):
        data.fashion_mnist(train=40, test=20)


def test_some_fashion_comes_with_magic(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    shipped = data.fashion_mnist(train=4000, test=1000)
    assert [tuple(part.shape) for part in shipped[::2]] == [(4000, 1, 28, 28), (1000, 1, 28, 28)]
    assert set(shipped[1].tolist()) == set(shipped[3].tolist()) == set(range(10))
    fewer = data.fashion_mnist(train=100, test=50)
    assert torch.equal(fewer[1], shipped[1][:100]) and torch.equal(fewer[3], shipped[3][:50])


@pytest.mark.skipif(not data.DEBIAN.exists(), reason="the whole of Fashion-MNIST is not on this machine")
def test_the_fashion_that_comes_with_magic_is_what_seed_0_draws_from_the_whole(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    shipped = data.fashion_mnist(train=4000, test=1000)
    monkeypatch.setenv("FASHION_MNIST", str(data.DEBIAN))
    drawn = data.fashion_mnist(train=4000, test=1000)
    assert all(torch.equal(a, b) for a, b in zip(shipped, drawn, strict=True))


def test_documentation():
    train, test, words = data.documentation(train=60, test=20, length=10, words=300)
    assert train.shape == (60, 11) and test.shape == (20, 11) and len(words) == 300
    assert train.min() >= 0 and train.max() < 300 and words[0] == "<other>"
    assert {"the", "version", "object"} <= set(words)
    assert torch.equal(train[:5], data.documentation(5, 20, 10, 300)[0])
    with pytest.raises(ValueError, match="sequences of this length"):
        data.documentation(train=10**6)


def test_data_that_cannot_be_had_says_how_to_get_it(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    with pytest.raises(RuntimeError, match=r"apt-get install dataset-fashion-mnist.*FASHION_MNIST"):
        data.fashion_mnist()
    with pytest.raises(RuntimeError, match=r"no network.*cifar-10-python.tar.gz"):
        data.cifar10()


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    """An archive of CIFAR-10's format with 30 + 10 images; torchvision reads it, and checks its sums."""
    folder, dice, sums = tmp_path / "cifar-10-batches-py", np.random.default_rng(0), {}
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for name, count in [*((name, 6) for name in names), ("test_batch", 10)]:
        images = dice.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": images, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    kinds = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(kinds, protocol=2))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    kind = pytest.importorskip("torchvision").datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    x, y, x_test, y_test = data.cifar10(train=20, test=10, root=tmp_path)
    assert x.shape == (20, 3, 32, 32) and x_test.shape == (10, 3, 32, 32)
    assert len(y) == 20 and sorted(y_test.tolist()) == list(range(10))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5


# --- packages that may be missing


PACKAGE = Path(magic.__file__).parent
OURS = {"magic", "torch", "numpy"}  # what `import magic` may take for granted


def needed(source: str) -> list[tuple[str, str, str]]:
    """(function, package, extra) for each call of `needs` in a module's source."""
    found = []
    for function in ast.walk(ast.parse(source)) if "needs(" in source else ():
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "needs":
                first = node.args[0]  # a string, or an f-string that begins with one
                text = first.values[0] if isinstance(first, ast.JoinedStr) else first
                package = ast.literal_eval(text).partition(".")[0]
                found.append((function.name, package, ast.literal_eval(node.args[1])))
    return found


def bare_imports(source: str) -> list[str]:
    """Foreign packages that are imported without a way out: neither tried, nor after `needs`."""
    tree, excused = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers):
            excused |= {id(n) for part in [*node.body, *node.handlers] for n in ast.walk(part)}
        elif isinstance(node, ast.FunctionDef):
            had = {package for _, package, _ in needed(ast.unparse(node))}
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            excused |= {id(n) for n in inside if {top for top in imported(n)} <= had}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in excused]
    return [top for node in found for top in imported(node) if top not in OURS | sys.stdlib_module_names]


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "magic"]
    return ["magic" if getattr(node, "level", 0) else name.partition(".")[0] for name in names]


SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
PLACES = sorted(
    (f"{module}.{function}", package, extra)
    for module, source in SOURCES.items()
    if module != "show"
    for function, package, extra in set(needed(source))
)


def compared():
    weights = subsets.random(40, 0.1, 12).double()
    columns = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0)).double()
    return magic.Comparison(columns[0], columns[1], torch.zeros(2).double(), weights=weights)


def small_run():
    run, *_ = cases.build("sgd")
    return run, cases.measure_on(*run.data)


def scored():
    run, measure = small_run()
    outputs = torch.zeros(3, dtype=torch.float64)
    values = torch.eye(3, run.n, dtype=torch.float64)
    return magic.Attribution(values, outputs, run.weights(), run, measure)


def shown(images):
    return magic.explore(scored(), None, images)._repr_html_()


def first(run):
    return tuple(x[:3] for x in run.data)


def in_two_processes():
    run, measure = small_run()
    return magic.outputs(run, measure, subsets.single(run.n, [1, 2]), jobs=2, progress=False)


def estimated(method):
    run, _ = small_run()
    return method(run, first(run), run.initial)


def texts_by_bm25():
    run = texts()
    return magic.baselines.bm25(run, (run.data[0][:2],), run.initial)


def in_a_wheel(folder):
    """The model of a package that is there."""
    there = SimpleNamespace(submodule_search_locations=[str(folder)])
    with mock.patch("importlib.util.find_spec", return_value=there):
        return text.loading._place("SmolLM2-135M-Instruct", {})


CALLS = {
    "attribution.top": lambda folder: scored().top(0),
    "book.corpora._documents": lambda folder: corpora.corpus(str(folder), None, 1, 1),
    "book.data._torchvision": lambda folder: data.cifar10(root=folder),
    "book.data.digits": lambda folder: data.digits(),
    "book.plot._libraries": lambda folder: plot.style(),
    "book.recipes.gpt2_of_92m": lambda folder: recipes.gpt2_of_92m(),
    "engine.files._safetensors": lambda folder: magic.train(small_run()[0], disk=folder, progress=False),
    "evidence.bank.frame": lambda folder: magic.Bank(":memory:", *small_run()).frame(),
    "evidence.comparison.ready": lambda folder: magic.lds(scored(), drop=0.1, subsets=3),
    "evidence.comparison.frame": lambda folder: compared().frame(),
    "evidence.comparison.spearman": lambda folder: compared().per_target,
    "evidence.controls.bm25": lambda folder: texts_by_bm25(),
    "evidence.ekfac._library": lambda folder: estimated(magic.baselines.ekfac),
    "evidence.ekfac._task": lambda folder: estimated(magic.baselines.ekfac),
    "evidence.explorer._drawn": lambda folder: shown(torch.rand(3, 4, 4)),
    "evidence.explorer_widgets.__init__": lambda folder: magic.explore(scored()).live(),
    "evidence.judging.area": lambda folder: judging.area(torch.arange(4) == 1, torch.rand(4), 0),
    "evidence.judging.frame": lambda folder: magic.Judgement({}, {}, {}).frame(),
    "evidence.optimality._held_out": lambda folder: magic.evidence.optimality.ridge(compared()),
    "evidence.optimality.ridge": lambda folder: magic.evidence.optimality.ridge(compared()),
    "workers.count": lambda folder: magic.workers.count(2),
    "workers.spread": lambda folder: in_two_processes(),
    "evidence.rows.frame": lambda folder: magic.evidence.bank.frame(folder / "bank"),
    "evidence.smoothness.survey": lambda folder: magic.smoothness.survey({}, None),
    "evidence.trak._output": lambda folder: magic.evidence.trak._output(None, None),
    "evidence.trak._traker": lambda folder: estimated(magic.baselines.trak),
    "text.loading._place": in_a_wheel,
    "text.loading.pretrained": lambda folder: text.pretrained(str(folder)),
    "text.packing.byte_tokenizer": lambda folder: text.byte_tokenizer(),
    "text.passages.frame": lambda folder: text.Passages(()).frame(),
    "text.passages.plot": lambda folder: text.Passages(()).plot(),
}


def hidden(monkeypatch, package):
    """From now on the package is not there."""
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(("place", "package", "extra"), PLACES)
def test_a_missing_package_names_its_extra(place, package, extra, monkeypatch, tmp_path):
    """Every place of the sources that needs a package is called without it."""
    hidden(monkeypatch, package)
    name = DISTRIBUTIONS.get(package, package)
    with pytest.raises(ImportError, match=rf"needs? {name}: pip install 'magic-attribution\[{extra}\]'"):
        CALLS[place](tmp_path)


@pytest.mark.parametrize(("package", "extra"), sorted({(package, extra) for _, package, extra in PLACES}))
def test_the_extra_brings_the_package(package, extra):
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {line.partition(">")[0] for line in project["optional-dependencies"][extra]}
    assert DISTRIBUTIONS.get(package, package) in brought


def test_every_place_was_found():
    places = {place for place, *_ in PLACES}
    assert places == set(CALLS)
    assert {package for _, package, _ in PLACES} >= {
        "pandas",
        "joblib",
        "scipy",
        "seaborn",
        "sklearn",
        "trak",
    }


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_import_without_a_way_out(module):
    assert bare_imports(SOURCES[module]) == []


def test_a_bare_import_is_found():
    assert bare_imports("def f():\n    import pandas as pd\n    import os, numpy") == ["pandas"]
    assert bare_imports("from scipy.stats import rankdata\nfrom .show import bar") == ["scipy"]
    assert bare_imports("try:\n    import tqdm\nexcept ImportError:\n    tqdm = None") == []
    tried = "try:\n    import tqdm\nexcept ValueError:\n    pass"
    assert bare_imports(tried) == ["tqdm"]
    after = "def f():\n    needs('joblib', 'notebooks')\n    from joblib.parallel import x\n    import dask"
    assert bare_imports(after) == ["dask"]


# --- statistics


def test_a_figure_prints_itself():
    figure = Figure(0.99, 0.978, 0.993)
    assert magic.Figure is Figure
    assert str(figure) == repr(figure) == f"{figure}" == "0.990 [0.978, 0.993]"
    assert f"{figure:.4f}" == "0.9900 [0.9780, 0.9930]"
    mean, low, high = figure
    assert (mean, low, high) == figure and figure[1:] == (0.978, 0.993) and figure.high == 0.993
    assert pickle.loads(pickle.dumps(figure)) == figure


# --- models


MODELS = {
    "mlp": (lambda: models.MLP((64, 16, 10)), (4, 1, 8, 8)),
    "convnet-group": (lambda: models.ConvNet(width=8, size=12), (4, 1, 12, 12)),
    "convnet-batch": (lambda: models.ConvNet(width=8, size=12, norm="batch"), (4, 1, 12, 12)),
    "resnet9": (lambda: models.ResNet9(width=4), (4, 3, 16, 16)),
    "resnet9-group": (lambda: models.ResNet9(channels=1, width=8, norm="group"), (4, 1, 28, 28)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train_and_differentiate(name, device):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double().to(device)
    x = torch.randn(12, *shape[1:], dtype=torch.float64, device=device)
    y = torch.randint(10, (12,), device=device)
    assert model(x[:4]).shape == (4, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(12, 4, 2))
    scores = magic.attribute(run, cases.measure_on(x, y), progress=False, plan=magic.plan(run, states=3))
    weights, change = run.weights(), 1e-5
    weights[5] += change
    above = scores.measure(run.model(run.train(weights, progress=False)))
    weights[5] -= 2 * change
    below = scores.measure(run.model(run.train(weights, progress=False)))
    slope = ((above - below) / (2 * change)).detach()
    assert ((slope - scores.values[:, 5]).norm() / slope.norm()) < 1e-4


def test_models_have_no_bias_before_a_normalisation():
    for make, _ in MODELS.values():
        for module in make().modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.bias is None
    with pytest.raises(ValueError, match='"group" or "batch"'):
        models.ConvNet(norm="layer")


def test_resnet9_of_the_papers_size():
    count = sum(p.numel() for p in models.ResNet9().parameters())
    assert 2_000_000 < count < 10_000_000
    outputs = []
    for scale in (0.125, 0.5):
        torch.manual_seed(0)
        outputs.append(models.ResNet9(width=8, scale=scale)(torch.ones(2, 3, 8, 8).tril()))
    assert outputs[0].abs().max() > 0
    torch.testing.assert_close(outputs[1], 4 * outputs[0])


def test_figures():
    import matplotlib.pyplot as plt

    plot.style()
    figure = plot.images(torch.rand(7, 1, 8, 8), [str(i) for i in range(7)], columns=3)
    assert len(figure.axes) == 9 and [ax.get_title() for ax in figure.axes][:2] == ["0", "1"]
    assert len(plot.images(torch.rand(1, 3, 8, 8), ["one"]).axes) == 1
    true = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    ax = magic.Comparison(true * 1.1, true, torch.zeros(3), "trainings without 5 % of the data").plot(
        targets=2
    )
    assert len(ax.collections[0].get_offsets()) == 40
    assert "LDS 1.000" in ax.get_title() and "5 % of" in ax.get_title()
    plt.close("all")


def test_figure_of_the_cotangents():
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    sizes = ((8, (1.0, 2.0)), (4, (1e-2, 1.5)), (0, (1e-7, 1.0)))
    health = magic.Health(12, sizes, 0, {})
    ax = health.plot()
    steady, wide = ax.lines[1], ax.lines[0]
    assert list(wide.get_xdata()) == [8, 4, 0] and list(wide.get_ydata()) == [1.0, 1e-2, 1e-7]
    assert to_hex(wide.get_color()) == plot.HARMFUL and to_hex(steady.get_color()) == plot.HELPFUL
    assert "2 targets; the widest ranges over 7.0" in ax.get_title() and ax.get_yscale() == "log"
    assert len(health.plot(1).lines) == 1 and "1 target;" in health.plot(targets=[1]).get_title()
    with pytest.raises(ValueError, match="there are 2 targets, 0 … 1"):
        health.plot(2)
    with pytest.raises(ValueError, match="no cotangent was measured"):
        magic.Health(12, (), 0, {}).plot()
    plt.close("all")


def test_python_text():
    train, test, characters = data.python_text(train=50, test=10, length=16)
    assert train.shape == (50, 17) and test.shape == (10, 17) and train.dtype == torch.int64
    assert train.min() >= 0 and train.max() < len(characters) < 200
    words = "".join(characters[i] for row in data.python_text(2000, 1)[0] for i in row).split()
    assert {"the", "a", "of"} <= set(words)
    assert torch.equal(train, data.python_text(50, 10, 16)[0])
    assert not torch.equal(train, data.python_text(50, 10, 16, seed=1)[0])
    with pytest.raises(ValueError, match="sequences of this length"):
        data.python_text(train=10**6)


def test_the_transformer_sees_no_future():
    torch.manual_seed(0)
    model = models.Transformer(20, width=16, heads=2).double()
    tokens = torch.randint(20, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(20, (3, 5))
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 20)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 0.01


def test_agree_and_claim(capsys):
    a = torch.tensor([1.0, 2.0])
    checks.agree("equal", a, a.clone())
    checks.agree("close", a, a * (1 + 3e-7))
    out = capsys.readouterr().out
    assert "same bits" in out and "agree to 1e-06" in out
    checks.agree("signed zero", torch.zeros(2), -torch.zeros(2))
    checks.agree("other type", a, a.double())
    assert "same bits" not in capsys.readouterr().out
    with pytest.raises(AssertionError, match="relative difference is"):
        checks.agree("far", a, a + 1)
    with pytest.raises(AssertionError, match="shape"):
        checks.agree("shape", a, a[:1])
    with pytest.raises(AssertionError, match="difference is nan"):
        checks.agree("nan", a * float("nan"), a)
    with pytest.warns(DeprecationWarning, match=r"magic\.book\.checks\.compare is agree now"):
        from magic.book.checks import compare
    assert compare is checks.agree
    checks.claim("holds", True)
    assert "✓ holds" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="does not hold: no"):
        checks.claim("no", False)


def test_a_claim_prints_its_number_beside_its_bound(capsys):
    figure = Figure(0.99213, 0.9781, 0.996)
    checks.claim("LDS", figure, at_least=0.98)
    checks.claim("error", torch.tensor(3.14e-13), at_most=1e-9, digits=2)
    checks.claim("slope", 1.1301, at_least=0.9, at_most=1.2)
    assert capsys.readouterr().out.splitlines() == [
        "✓ LDS ≥ 0.98 (0.992 [0.978, 0.996])", "✓ error ≤ 1e-09 (3.1e-13)", "✓ slope in [0.9, 1.2] (1.13)",
    ]  # fmt: skip
    for number, bounds in ((0.97, {"at_least": 0.98}), (float("nan"), {"at_most": 1}), (3, {"at_most": 2})):
        with pytest.raises(AssertionError, match=r"does not hold: it [≥≤] .*, it is (0.97|nan|3)"):
            checks.claim("it", number, **bounds)
    for number in (0.5, 3, figure, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="is a number; say what it is at_least, or at_most"):
            checks.claim("it", number)
    with pytest.raises(AssertionError, match=r"LDS ≥ 0.999, it is 0.992 \[0.978, 0.996\]"):
        checks.claim("LDS", figure, at_least=0.999)
