"""What a thing is: an edit that may change a result changes its identity, and names what changed."""

import dataclasses
import datetime
import enum
import functools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.book import models
from magic.identity import parts
from magic.training.dataset_identity import of_dataset
from tests.support import cases


def cell(source: str, name: str = "loss", **given):
    """What a notebook's cell defines under this name."""
    defined = {"__name__": "__main__", "torch": torch, "F": F, "nn": nn, **given}
    exec(compile(textwrap.dedent(source), "<cell>", "exec"), defined)
    return defined[name]


def differ(before, after, role="loss") -> list[str]:
    return parts.changed(parts.of_callable(after, role), parts.of_callable(before, role).parts)


LOSS = """
    SCALE = 2.0

    def helper(x, power=2):
        return x ** power

    def unused(x):
        return x

    class Parent:
        def add(self, x):
            return x + 1

    class Child(Parent):
        shift = 3

        def __call__(self, x):
            return self.add(x) + self.shift

    child = Child()

    def loss(model, x, y, eps=0.1):
        def inner(z):
            return z + eps
        each = F.cross_entropy(model(x), y, reduction="none")
        return SCALE * helper(inner(each)) + child(each) + (lambda u: u * 5)(each)
"""

CODE, HELPER, CHILD = "the code of the loss", "the code of the loss: helper", "what the loss holds: child"


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("model(x), y, red", "model(x).clamp(max=3.5), y, red", CODE),
        ("SCALE = 2.0", "SCALE = 2.5", "what the loss holds: SCALE"),
        ("SCALE = 2.0", "SCALE = torch.tensor(2.0)", "what the loss holds: SCALE"),
        ("eps=0.1", "eps=0.2", "what the loss holds: eps"),
        ("z + eps", "z - eps", CODE),
        ("u * 5", "u * 6", CODE),
        ("u * 5", "u * 5.0", CODE),
        ("x ** power", "x ** power + 1", HELPER),
        ("power=2", "power=3", "what the loss holds: helper.power"),
        ("return x + 1", "return x + 2", CHILD),
        ("shift = 3", "shift = 4", CHILD),
        ("y, eps=0.1", "y, *, eps=0.1", CODE),
        ('"none"', '"sum"', CODE),
        ("F.cross_entropy(", "torch.cross_entropy(", CODE),
        (
            "helper(x, power=2):\n        return x ** power",
            "helper(power, x=2):\n        return power ** x",
            HELPER,
        ),
    ],
)
def test_an_edit_changes_the_part_that_it_is_in(old, new, part):
    assert old in LOSS
    assert part in differ(cell(LOSS), cell(LOSS.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("    SCALE = 2.0", "    # a comment\n\n\n    SCALE = 2.0"),
        (
            "def inner(z):\n",
            '"""What it does."""\n        def inner(z):\n            "Adds."\n            # yes\n',
        ),
        ("return x ** power", '"""Told\n        at length."""\n        return x ** power'),
        ("class Parent:", 'class Parent:\n        """Adds 1."""\n'),
        ("each", "per_example"),
        ("inner(", "within("),
        ("(model, x, y", "(net, x, y"),
        ("return x + 1", "return (  # in lines\n\n            x + 1\n        )"),
        ("return x\n", "return x + 1\n"),
    ],
)
def test_an_edit_that_changes_nothing_is_none(old, new):
    assert old in LOSS
    edited = LOSS.replace(old, new)
    if "net, x" in new:
        edited = edited.replace("model(x)", "net(x)")
    edited = edited.replace("            \n", "\n")
    assert differ(cell(LOSS), cell(edited)) == []


def closing(value):
    return lambda model: model(value)


def changed_in_place(x):
    x = x.clone()
    x[1] += 1e-7
    return x


ONES = torch.ones(3, dtype=torch.float64)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    rate: float = 0.1


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def recursive(value):
    loop = [value]
    loop.append(loop)
    return loop


PAIRS = {
    "a tensor": (ONES, changed_in_place(ONES)),
    "its dtype": (ONES, ONES.float()),
    "an array": (np.ones(3), np.array([1.0, 1.0, 1.5])),
    "a masked array": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 1])),
    "a NumPy number": (np.float32(1), np.float64(1)),
    "a number": (1, 2),
    "its type": (1, 1.0),
    "its sign": (0.0, -0.0),
    "a text": ("a", "b"),
    "nothing": (None, 0),
    "a dtype": (torch.float32, torch.float64),
    "a device": (torch.device("cpu"), torch.device("meta")),
    "a range": (range(3), range(4)),
    "a set": ({"a", "b"}, {"a", "c"}),
    "a dict": ({"a": 1}, {"a": 2}),
    "a list in a list": ([[1], [2]], [[1, 2]]),
    "a cycle": (recursive(1), recursive(2)),
    "a dataclass": (Config(0.1), Config(0.2)),
    "an enum": (Colour.RED, Colour.BLUE),
    "slots": (Slotted(1), Slotted(2)),
    "a generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "NumPy's generator": (np.random.default_rng(1), np.random.default_rng(2)),
    "Python's generator": (__import__("random").Random(1), __import__("random").Random(2)),
    "a deque": (__import__("collections").deque([1]), __import__("collections").deque([2])),
    "a path": (pathlib.Path("a"), pathlib.Path("b")),
    "a table": (pd.DataFrame({"a": [1.0, 2.0]}), pd.DataFrame({"a": [1.0, 3.0]})),
    "a date": (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    "an error": (ValueError("a"), ValueError("b")),
    "a namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "limits": (torch.finfo(torch.float32), torch.finfo(torch.float64)),
    "a pattern": (__import__("re").compile("a"), __import__("re").compile("b")),
    "a partial": (
        functools.partial(F.gelu, approximate="none"),
        functools.partial(F.gelu, approximate="tanh"),
    ),
    "a C function": (F.gelu, F.softplus),
    "a module's weights": (linear(0), linear(1)),
    "a module's attribute": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "a module's mode": (nn.Dropout(0.1), nn.Dropout(0.1).eval()),
    "a method": (Config(0.1).__eq__, Config(0.2).__eq__),
    "a mapped function": (torch.func.vmap(lambda x: x + 1), torch.func.vmap(lambda x: x + 2)),
    "under no_grad": (torch.no_grad()(lambda x: x + 1), torch.no_grad()(lambda x: x + 2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_held_is_known_by_its_content(name):
    one, other = PAIRS[name]
    assert parts.of_callable(closing(one), "measure").unknown == {}
    assert differ(closing(one), closing(one)) == []
    found = differ(closing(one), closing(other))
    assert found and all("value" in part or part == CODE for part in found)


def test_equal_content_is_equal():
    for make in (
        lambda: linear(0),
        lambda: Config(0.3),
        lambda: recursive(3),
        lambda: ONES.clone(),
        lambda: {"b", "a"},
    ):
        assert differ(closing(make()), closing(make())) == []


def test_caches_are_no_content():
    path = pathlib.Path("a/b")
    before = parts.of_callable(closing(path), "measure")
    assert hash(path) and str(path) and path.parts
    assert parts.of_callable(closing(path), "measure") == before


def test_a_helper_module(monkeypatch):
    helpers = types.ModuleType("helpers_of_a_test")
    source = "alpha = 1\nother = 1\ndef f(x): return x * alpha"
    exec(source, helpers.__dict__)
    monkeypatch.setitem(sys.modules, helpers.__name__, helpers)
    for text in (
        "def loss(m, x): return helpers.f(m(x)) + helpers.alpha",
        "def loss(m, x):\n    import helpers_of_a_test as h\n    return h.f(m(x)) + h.alpha",
        "def loss(m, x):\n    from helpers_of_a_test import f, alpha\n    return f(m(x)) + alpha",
    ):
        loss = cell(text, helpers=helpers)
        before = parts.of_callable(loss, "loss")
        with monkeypatch.context() as patch:
            patch.setattr(helpers, "other", 2)
            assert parts.of_callable(loss, "loss") == before
            patch.setattr(helpers, "alpha", 2)
            names = parts.changed(parts.of_callable(loss, "loss"), before.parts)
            assert len(names) == 2 and all(name.endswith("alpha") for name in names)
        with monkeypatch.context() as patch:
            patch.setattr(helpers, "f", cell("def f(x): return x / alpha", "f", alpha=1))
            names = parts.changed(parts.of_callable(loss, "loss"), before.parts)
            assert any(name.startswith("the code of the loss: ") and name.endswith("f") for name in names)


def test_a_name_that_is_defined_later():
    loss = cell("def loss(m, x): return m(x) + late")
    before = parts.of_callable(loss, "loss").parts
    loss.__globals__["late"] = 3
    assert parts.changed(parts.of_callable(loss, "loss"), before) == ["what the loss holds: late"]


def test_callable_objects_and_their_parents():
    source = """
        class Parent:
            def power(self, x): return x ** 2

        class Measure(Parent):
            def __init__(self, x): self.x = x
            def __call__(self, model): return self.power(model(self.x))
    """
    make, edited = cell(source, "Measure"), cell(source.replace("** 2", "** 3"), "Measure")
    assert differ(make(ONES), make(ONES), "measure") == []
    assert differ(make(ONES), make(2 * ONES), "measure") != []
    assert differ(make(ONES), edited(ONES), "measure") != []
    assert differ(make(ONES).__call__, edited(ONES).__call__, "measure") != []
    assert differ(functools.partial(make(ONES)), functools.partial(edited(ONES)), "measure") != []


def test_a_model_in_a_measure_that_is_trained_further():
    teacher = linear(0)
    measure = closing(teacher)
    before = parts.of_callable(measure, "measure").parts
    with torch.no_grad():
        teacher.weight[0, 0] += 1e-6
    found = parts.changed(parts.of_callable(measure, "measure"), before)
    assert found == ["what the measure holds: value"]


MODEL = """
    LIMIT = 30.0

    class Base(nn.Module):
        def squash(self, x):
            return x.clamp(max=LIMIT)

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.layer, self.drop, self.gain, self.act = nn.Linear(3, 2), nn.Dropout(0.1), 2.0, F.gelu

        def forward(self, x):
            return self.squash(self.act(self.layer(x))) * self.gain
"""


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("* self.gain", "* self.gain + 0", "the code of the model: Net.forward"),
        ("clamp(max", "clamp(min", "the code of the model: Base.squash"),
        ("LIMIT = 30.0", "LIMIT = 31.0", "what the model holds: Base.squash.LIMIT"),
        ("2.0, F", "2.5, F", "what the model holds: gain"),
        ("F.gelu", "F.relu", "what the model holds: act"),
        ("Dropout(0.1)", "Dropout(0.2)", "what the model holds: in layers of libraries"),
        ("nn.Dropout(0.1)", "nn.AlphaDropout(0.1)", "the modules of the model"),
    ],
)
def test_an_edited_model(old, new, part):
    assert old in MODEL
    before = parts.of_model(cell(MODEL, "Net")())
    assert parts.of_model(cell(MODEL, "Net")()) == before and before.unknown == {}
    names = parts.changed(parts.of_model(cell(MODEL.replace(old, new), "Net")()), before.parts)
    assert part in names


def test_an_edit_of_a_model_of_the_book(monkeypatch):
    """The models that come with magic are code of the run that trains one, unlike the rest of magic."""
    before = parts.of_model(models.ConvNet())
    assert before == parts.of_model(models.ConvNet()) and before.unknown == {}
    monkeypatch.setattr(models.ConvNet, "forward", lambda self, x: self.head(self.features(x)) + 1)
    names = parts.changed(parts.of_model(models.ConvNet()), before.parts)
    assert "the code of the model: ConvNet.forward" in names


def test_what_cannot_be_known_is_said():
    held = {
        "lock": threading.Lock(),
        "file": sys.__stderr__,
        "generator": (i for i in "ab"),
        "meta": torch.ones(2, device="meta"),
    }
    for name, value in held.items():
        found = parts.of_callable(closing(value), "loss")
        assert list(found.unknown) == ["what the loss holds: value"], name
        assert parts.changed(found, found.parts) == ["what the loss holds: value"]
        assert parts.changed(found, found.parts, trust=True) == []
        assert parts.changed(found, found.parts, trust=["what the loss holds: value"]) == []
    evaluated = parts.of_callable(cell('def loss(m, x): return eval("m(x)")'), "loss")
    assert "eval()" in evaluated.unknown[CODE]
    assert parts.of_callable(eval("lambda m, x: m(x)"), "loss").unknown == {}
    assert "cannot be known: a _thread.lock" in parts.refusal(
        "it is of another loss", ["p"], None, "Give another", {"p": "a _thread.lock"}
    )


def test_trust_is_never_for_data():
    here = {CODE: "1", "the start s_0": "1", "the data": "1", "what the loss holds: x": "1"}
    there = dict.fromkeys(here, "2")
    assert parts.changed(here, there) == list(here)
    assert parts.changed(here, there, trust=True) == list(here)[1:]
    assert parts.changed(here, there, trust=list(here)) == []
    with pytest.raises(ValueError, match="no such parts"):
        parts.changed(here, there, trust=["the lost"])


# dask's distributed, which another test imports, changes how exceptions are taken apart, and with it the
# identity of one that is held; so both processes import it.
SCRIPT = """
import distributed, torch, magic
from magic.identity import parts
from tests.support import cases
from tests.identity import test_identity as t
run = cases.build("batchnorm-adamw")[0]
held = [[name, pair] for name, pair in t.PAIRS.items()]
everything = t.closing([held, {"a", "b", ("c", 1.5)}, t.Colour])
of = [parts.of_callable(everything, "measure"), parts.of_callable(t.cell(t.LOSS), "loss")]
of += [parts.of_model(t.cell(t.MODEL, "Net")()), run.identity()]
print(of)
"""


def test_the_same_in_every_process(request, capsys):
    """The hashes of texts, and with them the order of sets, differ from process to process."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True, text=True, check=True, cwd=request.config.rootpath,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )  # fmt: skip
    exec(SCRIPT, {})
    said = capsys.readouterr().out
    assert said == done.stdout and len(said) > 500


class Items(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Together(Items):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


def items(dataset):
    return of_dataset(dataset, len(dataset), progress=False)


def test_the_items_of_a_dataset():
    x, y = torch.randn(2500, 3), torch.randint(0, 9, (2500,))
    before = items(Items(x, y))
    assert items(Together(x, y)) == before
    for i in (0, 1200, 2499):
        corrected = y.clone()
        corrected[i] += 1
        assert items(Items(x, corrected)) != before
    assert items(Items(x[torch.randperm(2500)], y)) != before
    whole = torch.utils.data.TensorDataset(x, y)
    some = torch.utils.data.Subset(whole, range(5, 900))
    assert items(some) == items(torch.utils.data.TensorDataset(x[5:900], y[5:900])) != items(whole)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"x": ONES, "t": "a"}] * 3, [{"x": ONES, "t": "a"}] * 2 + [{"x": ONES, "t": "b"}]),
        ([(ONES, (1, [ONES]))] * 2, [(ONES, (1, [2 * ONES]))] * 2),
        ([ONES, ONES[:2]], [ONES, ONES[1:] * 2]),
        ([(np.ones(2), 1)] * 2, [(np.ones(2), 1), (np.zeros(2), 1)]),
        ([(1, 2), (3, 4)], [(1, 3), (2, 4)]),
        ([[1, 2], [3]], [[1], [2, 3]]),
    ],
)
def test_items_of_any_make(one, other):
    assert items(one) == items(list(one)) != items(other)


def test_random_items_are_the_same_each_time():
    class Noisy(Items):
        def __getitem__(self, i):
            return self.x[i] + torch.randn(3), np.random.rand()

    noisy, state = Noisy(torch.zeros(5, 3), torch.zeros(5)), torch.get_rng_state()
    assert items(noisy) == items(noisy)
    assert torch.equal(torch.get_rng_state(), state)


def regression(x_test, y_test, data=None, loss=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)

    def squares(model, x, y):
        return (model(x).squeeze(1) - y) ** 2

    run = magic.Run(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data or (x, y),
        loss or squares,
        magic.batches(12, 4, 2),
    )
    return run, lambda model: (model(x_test).squeeze(1) - y_test) ** 2


def test_another_test_set_that_measures_the_same_at_the_start(tmp_path):
    x_test, y_test = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    (run, measure), (again, other) = regression(x_test, y_test), regression(2 * x_test, y_test)
    start = run.model(run.initial)
    assert torch.equal(measure(start), other(start))
    assert run.identity() == again.identity()
    path = tmp_path / "scores.npz"
    scores = magic.attribute(run, measure, progress=False)
    scores.save(path)
    assert torch.equal(magic.Attribution.load(path, again, measure).values, scores.values)
    with pytest.raises(
        ValueError, match=r"(?s)another measure.*\(20\d\d.*what the measure holds: x_test.*trust=\["
    ):
        magic.Attribution.load(path, run, other)
    with pytest.raises(ValueError, match="x_test"):
        magic.Attribution.load(path, run, other, trust=True)
    name = "what the measure holds: x_test"
    assert magic.Attribution.load(path, run, other, trust=[name]).measure is other
    # saved again, the scores still say what they were made of
    magic.Attribution.load(path, run, other, trust=[name]).save(path)
    with pytest.raises(ValueError, match="x_test"):
        magic.Attribution.load(path, run, other)


def test_scores_of_another_loss_are_refused(tmp_path):
    x_test, y_test = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    run, measure = regression(x_test, y_test)
    path = tmp_path / "scores.npz"
    magic.attribute(run, measure, progress=False).save(path)
    edited, _ = regression(
        x_test, y_test, loss=lambda model, x, y: ((model(x).squeeze(1) - y) ** 2).clamp(max=300.0)
    )
    first = [r.step(r.initial, r.weights()).fingerprint() for r in (run, edited)]
    assert first[0] == first[1], "what tells them apart must not be the first step"
    with pytest.raises(ValueError, match=r"another run.*the code of the loss"):
        magic.Attribution.load(path, edited, measure)
    assert magic.Attribution.load(path, edited, measure, trust=True).run is edited
    magic.Attribution.load(path)


def test_labels_of_a_dataset_corrected_in_place():
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    run, _ = regression(x, y, data=Items(x, y))
    before = run.identity()
    assert run.identity() == before and run.unknown() == {}
    y[7] += 1
    assert run.identity() == before, "items are read once"
    assert parts.changed(run.identity(fresh=True), before) == ["the items of the data set"]


def test_a_loss_that_names_its_own_run():
    source = "def loss(model, x, y): return (model(x).squeeze(1) - y) ** 2 * (run.n if run else 12)"
    loss = cell(source, run=None)
    run, _ = regression(ONES, ONES, loss=loss)
    loss.__globals__["run"] = run
    assert run.fingerprint() == run.fingerprint()


def test_where_and_tangent_stay(tmp_path):
    run, *_ = cases.build("sgd-momentum")
    scores = magic.attribute(run, cases.measure_on(*run.data), "path", drop=0.2, progress=False)
    assert scores.tangent is False
    path = tmp_path / "scores.npz"
    scores.save(path)
    for other in (
        scores.like(scores.values),
        magic.Attribution.load(path),
        magic.Attribution.load(path, run),
    ):
        assert (other.tangent, other.point, other.made) == (False, scores.point, scores.made)


@pytest.mark.parametrize(
    "meta",
    [
        "[]",
        '{"run": 3}',
        '{"run": null, "tangent": "no"}',
        '{"run": null, "run_parts": {"a": 1}}',
        "{",
        '"x"',
    ],
)
def test_a_foreign_file_is_refused(tmp_path, meta):
    run, _ = regression(ONES, ONES)
    arrays = {"values": np.zeros((1, 12)), "outputs": np.zeros(1), "at": np.ones(12)}
    np.savez(tmp_path / "x.npz", meta=np.frombuffer(meta.encode(), dtype=np.uint8), **arrays)
    with pytest.raises(ValueError, match=r"not written by Attribution.save"):
        magic.Attribution.load(tmp_path / "x.npz", run)


@pytest.mark.parametrize("name", cases.CASES)
def test_training_does_not_change_what_a_run_is(name):
    run, *_ = cases.build(name)
    before = run.identity()
    assert run.unknown() == {}
    run.train(progress=False)
    assert parts.changed(run.identity(), before) == []
    assert parts.changed(cases.build(name)[0].identity(), before) == []


def test_an_object_that_cannot_be_read_is_unknown():
    class Hostile:
        @property
        def __dict__(self):
            raise RuntimeError("no")

    found = parts.of_callable(closing(Hostile()), "measure")
    assert list(found.unknown) == ["what the measure holds: value"]
    deep = []
    for _ in range(3000):
        deep = [deep]
    assert "too deeply" in next(iter(parts.of_callable(closing(deep), "measure").unknown.values()))


# Without its compiler, which takes seconds to import and is asked for at the first call.
COMPILE = functools.partial(torch.compile, backend="eager")


@pytest.mark.parametrize(
    "wrap", [torch.no_grad(), torch.func.vmap, functools.lru_cache, functools.partial, COMPILE]
)
def test_what_a_wrapped_function_holds_is_no_code(wrap):
    """So `trust=True`, which vouches for code, vouches for no tensor."""
    one, same, other = wrap(closing(ONES)), wrap(closing(ONES)), wrap(closing(2 * ONES))
    assert differ(one, same) == []
    before = parts.of_callable(one, "loss").parts
    assert parts.changed(parts.of_callable(other, "loss"), before, trust=True) != []
    assert differ(wrap(lambda x: x + 1), wrap(lambda x: x + 2)) != []


def test_a_hash_that_transformers_keeps_does_not_count():
    """Python's hash of texts differs from process to process, and a bank of one must serve the other."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 10, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    model.generation_config._original_object_hash = 1
    before = parts.of_model(model).parts
    model.generation_config._original_object_hash = 2
    assert parts.of_model(model).parts == before
    model.generation_config.max_length = 7
    assert parts.of_model(model).parts != before
