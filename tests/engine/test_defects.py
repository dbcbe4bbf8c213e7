"""Ordinary things that once gave a wrong number, a raw traceback or no word at all."""

import random
import sys
import warnings
from collections import deque
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import magic
from magic import schedule
from magic.engine.rounding import underflowing
from magic.training import arguments, examples, hidden_state, optim

N, B = 12, 4
DICE = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, dtype=torch.float64, generator=DICE)
Y = torch.randint(0, 3, (N,), generator=DICE)
ORDER = magic.batches(N, B, 2)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, X[:2], Y[:2])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()


def run_of(model, *, loss=loss, data=(X, Y), optimizer=torch.optim.Adam, scheduler=None):
    made = optimizer(model.parameters(), 0.01)
    return magic.Run(model, made, data, loss, ORDER, scheduler(made) if scheduler else None)


def scores(run, measure=measure):
    return magic.attribute(run, measure, progress=False).values


def by_differences(run, i, measure=measure, step=1e-5):
    """∂φ/∂w_i by central differences of whole trainings."""
    found = []
    for sign in (1, -1):
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] += sign * step
        with torch.no_grad():
            found.append(measure(run.model(run.train(weights, progress=False))))
    return (found[0] - found[1]) / (2 * step)


class Around(nn.Module):
    """An MLP, and something that is done with it and its output."""

    def __init__(self, after=lambda self, h: h, **held):
        super().__init__()
        self.body, self.after = mlp(), after
        for name, x in held.items():
            if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter):
                self.register_buffer(name, x)
            else:
                setattr(self, name, x)

    def forward(self, x):
        return self.after(self, self.body(x))


def kept(self, h):
    self.h = h
    return h


def kept_in_a_list(self, h):
    self.seen = []
    self.seen.append({"h": h})
    return h


def scalar(value=0.3):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


# --- models that work now


def logit_scale():
    return Around(lambda self, h: h * self.scale.exp(), scale=scalar())


def one_norm():
    model = mlp()
    parametrizations.weight_norm(model[0], dim=None)
    return model


def nothing_first():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing, self.body = nn.Parameter(torch.zeros(0, dtype=torch.float64)), mlp()

        def forward(self, x):
            return self.body(x) + self.nothing.sum()

    return Empty()


def extra_state():
    class Extra(Around):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    return Extra()


def already_called():
    model = Around(kept)
    model(X)
    return model


WORK = {
    "0-dimensional": logit_scale,
    "weight-norm-of-one": one_norm,
    "keeps-its-activation": lambda: Around(kept),
    "keeps-it-in-a-list": lambda: Around(kept_in_a_list),
    "kept-it-before": already_called,
    "empty-parameter-first": nothing_first,
    "extra-state": extra_state,
    "dropout-in-place": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Dropout(0.3, inplace=True), nn.Linear(5, 3)
    ).double(),
}


@pytest.mark.filterwarnings("ignore:the 2 targets are pulled back one by one")
@pytest.mark.parametrize("name", WORK)
def test_models_that_are_right(name):
    torch.manual_seed(1)
    run = run_of(WORK[name]())
    found = scores(run)
    torch.testing.assert_close(found[:, 3], by_differences(run, 3), rtol=1e-5, atol=1e-8)
    assert found.abs().max() > 1e-4


def test_what_a_model_keeps_has_no_history_in_a_copy():
    model = already_called()
    copied = arguments.clean_copy(model)
    assert copied.h.grad_fn is None and torch.equal(copied.h, model.h)
    assert model.h.grad_fn is not None, "the model itself is left alone"


def test_a_loss_that_uses_what_the_model_keeps():
    def with_penalty(model, x, y):
        return loss(model, x, y) + 0.1 * model.h.square().sum(1)

    run = run_of(Around(kept), loss=with_penalty)
    torch.testing.assert_close(scores(run)[:, 5], by_differences(run, 5), rtol=1e-5, atol=1e-8)


def test_another_default_dtype():
    model = mlp()
    expected = scores(run_of(model))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(scores(run_of(model)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device():
    """ "meta", where no tensor has values: the run makes none of its own there."""
    model, order = mlp(), ORDER.tolist()
    expected = scores(run_of(model))
    torch.set_default_device("meta")
    try:
        made = torch.optim.Adam(model.parameters(), 0.01)
        run = magic.Run(model, made, (X, Y), loss, order)
        found = magic.attribute(run, measure, progress=False)
        assert torch.equal(found.values, expected)
        assert found.removal_effect([1, 2]).device.type == "cpu"
    finally:
        torch.set_default_device(None)


# --- models that are refused by name


def reads_what_it_kept(self, h):
    before, self.h = getattr(self, "h", None), h.detach()
    return h if before is None else h + 0.1 * before


def tied_through_data():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[1].weight.data = model[0].weight.data
    return model


def old(f, *arguments):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f(model[0], *arguments)
    return model


def frozen_midway(self, h):
    self.body[0].weight.requires_grad_(False)
    return h


def complex_statistics(self, h):
    self.z.mul_(0.9).add_(0.1 * h.detach().mean().to(torch.complex128))
    return h * self.z.abs()


REFUSED = {
    "two-dtypes": (
        lambda: nn.Sequential(nn.Linear(4, 5).double(), nn.Linear(5, 3)),
        TypeError,
        "'0.weight' is torch.float64 and '1.weight' is torch.float32",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "'0.weight' is not initialised"),
    "meta": (lambda: mlp().to("meta"), ValueError, "meta device"),
    "reads": (lambda: Around(reads_what_it_kept), magic.NotDeterministic, "remembers earlier calls"),
    "tied": (tied_through_data, ValueError, r"'0.weight' and '1.weight' are two tensors in the same memory"),
    "old-weight-norm": (lambda: old(nn.utils.weight_norm), TypeError, "use .*parametrizations.weight_norm"),
    "old-spectral": (lambda: old(nn.utils.spectral_norm), TypeError, "parametrizations.spectral_norm"),
    "prune": (lambda: old(prune.random_unstructured, "weight", 0.3), TypeError, r"prune\.remove"),
    "frozen-midway": (lambda: Around(frozen_midway), ValueError, "requires_grad of 'body.0.weight' to False"),
    "complex-buffer": (
        lambda: Around(complex_statistics, z=torch.ones((), dtype=torch.complex128)),
        TypeError,
        "buffer 'z' is torch.complex128",
    ),
    "list": (
        lambda: Around(lambda self, h: self.seen.append(1) or h, seen=[]),
        magic.NotDeterministic,
        "attribute 'seen' of module '' changes",
    ),
    "deque": (
        lambda: Around(lambda self, h: self.seen.append(h.detach()) or h, seen=deque()),
        magic.NotDeterministic,
        "attribute 'seen' of module '' changes",
    ),
    "dict": (
        lambda: Around(lambda self, h: self.seen.update(n=self.seen["n"] + 1) or h, seen={"n": 0}),
        magic.NotDeterministic,
        "attribute 'seen' of module '' changes",
    ),
    "reentrant": (
        lambda: Around(lambda self, h: checkpoint(self.body[2], h @ h.new_ones(3, 5), use_reentrant=True)),
        ValueError,
        "use_reentrant=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name):
    make, error, says = REFUSED[name]
    with pytest.raises(error, match=says):
        run_of(make(), optimizer=torch.optim.SGD)


def test_two_tensors_that_share_a_storage_and_no_memory_are_accepted():
    flat = torch.randn(30, dtype=torch.float64)
    model = mlp()
    model[0].weight.data, model[0].bias.data = flat[:20].view(5, 4), flat[20:25]
    run_of(model)


def test_a_complex_buffer_that_stays_is_accepted():
    table = torch.ones((), dtype=torch.complex128)
    run_of(Around(lambda self, h: h * self.z.real, z=table))


def test_inside_inference_mode():
    model, run = mlp(), run_of(mlp())
    with torch.inference_mode():
        with pytest.raises(ValueError, match="inference_mode is on"):
            run_of(model)
        with pytest.raises(ValueError, match="inference_mode is on"):
            run.train(progress=False)
        made_inside = mlp()
    with pytest.raises(ValueError, match=r"'0.weight' was made inside torch.inference_mode"):
        run_of(made_inside)


def test_a_complex_measure():
    run = run_of(mlp())
    with pytest.raises(TypeError, match=r"measure returned torch\.complex128; measure real numbers"):
        scores(run, lambda model: measure(model) * 1j)


# --- losses that remember or use what is outside


def in_eval(model, x, y):
    return loss(model.eval(), x, y)


def distilled(outer):
    def f(model, x, y):
        with torch.no_grad():
            target = outer(x).softmax(1)
        return loss(model, x, y) - (target * model(x).log_softmax(1)).sum(1)

    return f


def remembering(thing, use):
    def f(model, x, y):
        use(thing)
        return loss(model, x, y)

    return f


class Ramp:
    def __init__(self):
        self.calls = 0

    def __call__(self, model, x, y):
        self.calls += 1
        return loss(model, x, y) * (1 if self.calls < 50 else 2)


def test_a_loss_that_leaves_another_mode():
    with pytest.raises(ValueError, match="leaves module '' in eval mode"):
        run_of(mlp(), loss=in_eval)


def test_a_loss_that_distils_from_the_outer_net():
    model = mlp()
    with pytest.raises(ValueError, match=r"the losses use '0.weight' of the model outside"):
        run_of(model, loss=distilled(model))
    run_of(model, loss=distilled(mlp()))  # a teacher of its own is a constant


@pytest.mark.parametrize(
    ("thing", "use"),
    [
        ([0], lambda seen: seen.append(1)),
        (deque(), lambda seen: seen.append(1)),
        ({"n": 0}, lambda seen: seen.update(n=seen["n"] + 1)),
        (random.Random(0), lambda dice: dice.random()),
        (np.random.default_rng(0), lambda dice: dice.random()),
        (count(), next),
    ],
    ids=["list", "deque", "dict", "random", "numpy", "count"],
)
def test_a_loss_that_remembers(thing, use):
    with pytest.raises(magic.NotDeterministic, match="'thing', which loss holds, changes"):
        run_of(mlp(), loss=remembering(thing, use))


def test_a_loss_that_is_an_object_and_counts():
    with pytest.raises(magic.NotDeterministic, match=r"Ramp.calls', which loss holds, changes"):
        run_of(mlp(), loss=Ramp())


def test_a_loss_that_fills_a_cache_once_is_accepted():
    cache = {}
    run_of(mlp(), loss=remembering(cache, lambda seen: seen.setdefault("n", 3)))
    assert cache == {"n": 3}


def test_what_is_held_is_found_through_functions():
    inner = [1]

    def helper():
        return inner

    assert any("inner" in name for name in hidden_state.held(lambda model: helper()))


# --- optimizers and schedulers


class Same(torch.optim.SGD):
    """Adds nothing."""


class Other(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Empty:
    """A mixin without anything in it."""


class Mixed(Empty, torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [Same, Mixed])
def test_a_derived_optimizer(kind):
    assert torch.equal(
        scores(run_of(mlp(), optimizer=kind)), scores(run_of(mlp(), optimizer=torch.optim.SGD))
    )


def test_a_derived_optimizer_with_a_step_of_its_own():
    with pytest.raises(TypeError, match="Other is not known to magic"):
        run_of(mlp(), optimizer=Other)


def test_a_step_that_was_replaced():
    def replaced(parameters, lr):
        made = torch.optim.SGD(parameters, lr)
        step = made.step
        made.step = lambda closure=None: step(closure)
        return made

    with pytest.raises(ValueError, match=r"optimizer.step was replaced"):
        run_of(mlp(), optimizer=replaced)
    # a scheduler wraps it, too, and changes nothing
    run_of(mlp(), scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, 2))


def test_hooks_for_every_optimizer():
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="hooks for every optimizer"):
            run_of(mlp())
    finally:
        handle.remove()


def test_a_scheduler_that_counts():
    calls = []

    def rate(epoch):
        calls.append(1)
        return 1 / len(calls)

    with pytest.raises(ValueError, match="when it was rehearsed again"):
        run_of(mlp(), scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, rate))


def test_a_scheduler_that_reads_parameters():
    model = mlp()

    def rate(epoch):
        return 1 / (1 + model[0].weight.norm().item())

    with pytest.raises(ValueError, match="the scheduler's function holds 'model'"):
        run_of(model, scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, rate))


@pytest.mark.parametrize(("size", "expected"), [(1e-25, 3), (1e-3, 0)])
def test_squares_that_underflow_are_counted(size, expected):
    grad = torch.tensor([size, 0.0, -size, size])
    hyper = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "maximize": False}
    _, after = optim.adam(torch.zeros(4), grad, {}, hyper | {"amsgrad": False})
    assert underflowing(grad, after["exp_avg_sq"]) == expected


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]
)
@pytest.mark.parametrize(
    ("scale", "eps", "warned"), [(1e-25, 1e-24, True), (1e-25, 1e-8, False), (1.0, 1e-24, False)]
)
def test_a_run_whose_squares_underflow_warns(kind, scale, eps, warned):
    """With Adam, against float64, the scores are wrong by 3 % in the first case, and right to 1e-7 in the
    second."""

    def optimizer(parameters, lr):
        return kind(parameters, lr * 1e-3, eps=eps)

    def scaled(model, x, y):
        return loss(model, x, y) * scale

    run = run_of(mlp().float(), loss=scaled, data=(X.float(), Y), optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        magic.attribute(run, lambda model: loss(model, X[:2].float(), Y[:2]), progress=False)
    says = [str(w.message) for w in caught if "underflow" in str(w.message)]
    assert bool(says) == warned
    if warned:
        assert f"entries underflow to 0 in {kind.__name__}" in says[0] and "'0.weight'" in says[0]


# --- precision


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_the_precision_of_matrix_products_is_set_and_restored(precision):
    mkldnn = torch.backends.mkldnn
    torch.set_float32_matmul_precision(precision)
    try:
        before = mkldnn.matmul.fp32_precision
        with magic.determinism.fix():
            assert mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert mkldnn.matmul.fp32_precision == before != "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- data


class Items:
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.item(i)


def test_numpy_arrays():
    assert torch.equal(scores(run_of(mlp(), data=(X.numpy(), Y.numpy()))), scores(run_of(mlp())))
    with pytest.raises(TypeError, match=r"data\[0\] is a NumPy array of <U1"):
        run_of(mlp(), data=(np.array(["a"] * N), Y))


def test_datasets_of_dicts_and_nested_tuples():
    expected = scores(run_of(mlp()))

    def of_dicts(model, batch):
        return loss(model, batch["x"], batch["more"]["y"])

    dicts = Items(lambda i: {"x": X[i], "more": {"y": Y[i]}})
    assert torch.equal(scores(run_of(mlp(), data=dicts, loss=of_dicts)), expected)
    nested = Items(lambda i: (X[i], (Y[i], Y[i])))
    of_pairs = scores(run_of(mlp(), data=nested, loss=lambda model, x, y: loss(model, x, y[1])))
    assert torch.equal(of_pairs, expected)


def test_datasets_that_make_no_batch():
    with pytest.raises(TypeError, match=r"item\[1\] of the Dataset, in example \d+, is text"):
        run_of(mlp(), data=Items(lambda i: (X[i], "word")))
    with pytest.raises(TypeError, match=r"cannot be put together: .*pad them"):
        run_of(mlp(), data=Items(lambda i: (torch.zeros(i + 1), Y[i])))


def test_an_index_given_twice_takes_no_square_of_memory():
    indices = torch.arange(300_000) % 299_999  # m × m would be 90 GB
    with pytest.raises(ValueError, match="example 0 is named twice"):
        examples.check_indices(indices, 300_000)


# --- packages that are not installed


def test_a_missing_package_is_told_before_anything_is_trained(monkeypatch):
    run = run_of(mlp())
    found = magic.attribute(run, measure, progress=False)
    trained = []
    monkeypatch.setattr(magic.Run, "step", lambda *_: trained.append(1))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    ways = [
        lambda: magic.lds(found, 0.3, 5, progress=False),
        lambda: magic.leave_one_out(found, 5, progress=False),
        lambda: magic.compare(found, magic.subsets.random(N, 0.3, 5), progress=False),
    ]
    for way in ways:
        with pytest.raises(ImportError, match=r"needs scipy: pip install 'magic-attribution\[notebooks\]'"):
            way()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas: pip install"):
        magic.smoothness.survey({"a": run}, lambda model: 1.0)
    assert trained == []


# --- plans


@pytest.mark.parametrize("states", [{"states": 3}, {"actions": list(schedule.store_all(len(ORDER)))}])
def test_arguments_of_a_plan_that_contradict(states, tmp_path):
    run = run_of(mlp())
    (name,) = states
    with pytest.raises(ValueError, match=f"memory= and {name}= contradict"):
        magic.plan(run, memory="1GB", **states)
    with pytest.raises(ValueError, match=f"disk= and {name}= contradict"):
        magic.plan(run, disk=tmp_path, **states)
    magic.plan(run, **states)


def test_states_and_actions_and_a_plan_with_memory_contradict():
    run = run_of(mlp())
    with pytest.raises(ValueError, match="states= and actions= contradict"):
        magic.plan(run, states=3, actions=schedule.store_all(run.steps))
    plan = magic.plan(run, states=3)
    with pytest.raises(ValueError, match="plan= and memory= contradict"):
        magic.attribute(run, measure, plan=plan, memory="1GB", progress=False)
