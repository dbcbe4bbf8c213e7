"""The derivative by everything a training is made from: three witnesses, and what cannot be asked."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.engine.measuring import measured_outputs
from magic.training import variants
from tests.support import cases
from tests.support.unroll import unrolled

EVERYTHING = ("weights", "start", "hypers", "data")
NAMES = (
    "sgd", "sgd-nesterov-decay", "sgd-dampening", "sgd-maximize", "sgd-onecycle", "adam-decay", "adamw",
    "adamw-amsgrad", "adamw-maximize", "two-groups-onecycle", "batchnorm-sgd", "batchnorm-now-and-then",
    "dropout", "clip-partly", "accumulate-now-and-then",
)  # fmt: skip

DIFFERENCES = (
    "sgd-nesterov-decay", "sgd-dampening", "sgd-onecycle", "adam-decay", "adamw-amsgrad",
    "two-groups-onecycle", "batchnorm-sgd", "dropout", "clip-partly",
)  # fmt: skip


def flat(found):
    """What was found by flat names, those of `magic.changed` and of the unroll."""
    parts = {f"params/{k}": x for k, x in found.start.params.items()}
    parts |= {f"buffers/{k}": x for k, x in found.start.buffers.items()}
    parts |= {f"hypers/{k}": x for k, x in found.hypers.items()}
    return parts | {f"data/{i}": x for i, x in enumerate(found.data) if x is not None}


def value_of(run, key):
    kind, _, name = key.partition("/")
    if kind == "data":
        return run.data[int(name)]
    return magic.hyper(run, name) if kind == "hypers" else getattr(run.initial, kind)[name]


def with_values(run, values):
    """The run with other values of one kind, by their flat names."""
    kind, named = next(iter(values)).partition("/")[0], {k.partition("/")[2]: x for k, x in values.items()}
    if kind == "data":
        return magic.changed(run, data=tuple(named.get(str(i)) for i in range(len(run.data))))
    return magic.changed(run, **({"hypers": named} if kind == "hypers" else {"start": named}))


def direction_of(key, value, dice):
    """A random direction in which a training may be moved both ways: a beta must not reach 1."""
    v = torch.randn(value.shape, generator=dice, dtype=value.dtype)
    name = key.partition("/")[2]
    if name.endswith("running_var"):
        return 0.1 * v.abs()
    scale = {
        "lr": 0.3 * value,
        "eps": 0.3 * value,
        "beta1": 0.03,
        "beta2": 0.3 * (1 - value),
        "eps_root": value,
    }
    return v * scale.get(name, 0.1 if key.startswith("hypers/") else 1.0)


@pytest.fixture
def any_hypers(monkeypatch):
    """A finite difference in a weight decay of 0 passes through negative ones."""
    monkeypatch.setattr(variants, "_checked", lambda name, value, t: value)


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("name", NAMES)
def test_against_a_full_unroll(name):
    run, model, optimizer, scheduler = cases.build(name)
    measure = cases.measure_on(*run.data)
    found = magic.metagradient(run, measure, EVERYTHING, progress=False, plan=magic.plan(run, states=3))
    parts = flat(found)
    leaves = {key: value_of(run, key).clone().requires_grad_() for key in parts}
    weights = run.weights().requires_grad_()
    outputs = unrolled(
        model, optimizer, scheduler, run.data, cases.loss, cases.order(), measure, weights, run.seed,
        clip=run.clip and (run.clip.kind, run.clip.limit), accumulate=run.accumulate, by=leaves,
    )  # fmt: skip
    for k, y in enumerate(outputs):
        grads = torch.autograd.grad(y, list(leaves.values()), retain_graph=True, allow_unused=True)
        for (key, x), truth in zip(parts.items(), grads, strict=True):
            truth = torch.zeros_like(x[k]) if truth is None else truth
            size = truth.norm().item()
            error = (x[k] - truth).norm().item()
            assert error <= 1e-10 * size + (0 if size else 1e-300), f"{key}: {error:.1e} of {size:.1e}"
    assert all(x.abs().max() > 0 for x in parts.values() if x.shape[1:] != (1, 1)), "degenerate: no influence"


@pytest.mark.parametrize("name", DIFFERENCES)
def test_against_finite_differences(name, any_hypers):
    """Five points along a random direction; ε of Adam moves too little to be seen so: it is unrolled above.

    With dropout a gradient is nearly 0. Where Adam divides it by itself there is nearly a kink: ε is larger.
    """
    run, *_ = cases.build(name)
    run = magic.changed(run, hypers={"eps": 1e-3}) if name == "dropout" else run
    measure, dice = cases.measure_on(*run.data), torch.Generator().manual_seed(0)
    parts = flat(magic.metagradient(run, measure, EVERYTHING, progress=False))
    together = {}  # the parameters and the buffers of the start move all at once, all else by itself
    for key in parts:
        kind = key.partition("/")[0]
        if key != "hypers/eps":
            together.setdefault(kind if kind in ("params", "buffers") else key, []).append(key)
    for what, keys in together.items():
        values = {key: value_of(run, key) for key in keys}
        directions = {key: direction_of(key, value, dice) for key, value in values.items()}
        seen = sum((parts[key] * v.to(parts[key])).flatten(1).sum(1) for key, v in directions.items())

        def f(h, values=values, directions=directions):
            other = with_values(run, {key: value + h * directions[key] for key, value in values.items()})
            return measured_outputs(other, other.train(progress=False), measure)

        errors = []
        for h in (1e-4, 1e-3, 1e-5):
            slope = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
            errors.append(((slope - seen).norm() / seen.norm()).item())
            if errors[-1] <= 1e-8:
                break
        assert min(errors) <= 1e-8, f"{what}: {min(errors):.1e}"


@pytest.mark.parametrize("amsgrad", [False, True])
def test_eps_root(amsgrad):
    torch.manual_seed(0)
    model = cases.mlp().double()
    group = {"params": list(model.parameters()), "eps_root": 1e-4}
    optimizer = torch.optim.AdamW([group], lr=1e-2, amsgrad=amsgrad)
    run = magic.Run(model, optimizer, cases.data(), cases.loss, cases.order())
    measure = cases.measure_on(*run.data)
    found = magic.metagradient(run, measure, ("eps_root", "beta2"), progress=False)
    assert found.start is None and found.data is None and set(found.hypers) == {"eps_root", "beta2"}
    leaves = {f"hypers/{k}": magic.hyper(run, k).requires_grad_() for k in found.hypers}
    outputs = unrolled(
        model, optimizer, None, run.data, cases.loss, cases.order(), measure, run.weights(), by=leaves
    )
    for k, y in enumerate(outputs):
        for name, truth in zip(
            leaves, torch.autograd.grad(y, leaves.values(), retain_graph=True), strict=True
        ):
            x = found.hypers[name.removeprefix("hypers/")][k]
            assert (x - truth).norm() <= 1e-10 * truth.norm()


def test_the_weights_are_those_of_attribute():
    run, *_ = cases.build("batchnorm-adamw")
    measure = cases.measure_on(*run.data)
    found = magic.metagradient(run, measure, EVERYTHING, progress=False)
    scores = magic.attribute(run, measure, progress=False)
    assert (found.weights - scores.values).abs().max() <= 1e-13 * scores.values.abs().max()
    assert torch.equal(found.scores.values, found.weights) and found.scores.run is run
    assert torch.equal(found.outputs, scores.outputs)
    alone = magic.metagradient(run, measure, "weights", progress=False)
    assert torch.equal(alone.weights, scores.values) and not alone.hypers
    for shown in ("data weights", "hyper-parameter: beta2", "data[0]", "start: 1.running_var"):
        assert shown in str(dict(found.rows()))


def test_inputs_of_chosen_examples():
    run, *_ = cases.build("dropout")
    measure = cases.measure_on(*run.data)
    everyone = magic.metagradient(run, measure, "data", progress=False)
    some = magic.metagradient(run, measure, "data", examples=[7, 3], progress=False)
    assert some.data[1] is None and torch.equal(some.examples, torch.tensor([7, 3]))
    assert torch.equal(some.data[0], everyone.data[0][:, [7, 3]])


def test_targets_in_several_sweeps_and_from_a_folder(tmp_path, monkeypatch):
    """As many targets a sweep as fit, and a replay that was stopped: the same bits."""
    run, *_ = cases.build("batchnorm-adamw")
    measure = cases.measure_on(*run.data, targets=6)
    whole = magic.metagradient(run, measure, EVERYTHING, progress=False)
    plan = magic.engine.planning.replace(magic.plan(run, targets=6), group=2)
    parts = flat(whole)
    grouped = flat(magic.metagradient(run, measure, EVERYTHING, plan=plan, progress=False))
    for key, x in parts.items():
        assert (grouped[key] - x).norm() <= 1e-12 * x.norm()

    class Stopped(Exception):
        pass

    pulled, stopped = magic.engine.finders.OfData.pulled, []

    def stopping(self, traced, cotangent, rows):
        if traced.state.step == 5 and not stopped:
            stopped.append(True)
            raise Stopped
        pulled(self, traced, cotangent, rows)

    monkeypatch.setattr(magic.engine.finders.OfData, "pulled", stopping)
    monkeypatch.setattr(magic.engine.resume, "EVERY", 0.0)
    monkeypatch.setattr(magic.engine.resume, "SHARE", 0)
    with pytest.raises(Stopped):
        magic.metagradient(run, measure, EVERYTHING, disk=tmp_path / "work", progress=False)
    resumed = flat(magic.metagradient(run, measure, EVERYTHING, disk=tmp_path / "work", progress=False))
    for key, x in parts.items():
        assert torch.equal(resumed[key], x), key
    with pytest.raises(ValueError, match="what is computed"):
        magic.metagradient(run, measure, "weights", disk=tmp_path / "work", progress=False)


def test_a_budget_holds_the_inputs_too():
    """Of each target there is a row of the data: what is asked for counts in the plan."""
    run, *_ = cases.build("sgd")
    measure = cases.measure_on(*run.data)
    alone = magic.metagradient(run, measure, "weights", progress=False).plan
    beside = magic.metagradient(run, measure, EVERYTHING, progress=False).plan
    data = run.data[0].nbytes + run.initial.nbytes
    assert beside.work.row_bytes - alone.work.row_bytes >= data


def test_tail_is_the_end_of_the_run():
    run, *_ = cases.build("dropout")
    whole = run.train(progress=False)
    last = magic.tail(run, 5)
    assert last.steps == 5 and last.fingerprint() != run.fingerprint()
    assert last.train(progress=False).map(lambda x: x).fingerprint() == whole.fingerprint()
    again = magic.tail(magic.tail(run, 9), 5)
    assert again.train(progress=False).fingerprint() == whole.fingerprint()
    assert magic.tail(run, run.steps) is not run
    for wrong in (0, 17, 2.0, True):
        with pytest.raises(ValueError, match="last="):
            magic.tail(run, wrong)


@pytest.mark.parametrize("name", ["dropout", "batchnorm-sgd", "adamw-onecycle"])
def test_the_derivative_through_the_last_steps(name):
    """The weights enter late: the truth is training that has w = 1 before."""
    run, *_ = cases.build(name)
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, last=6, progress=False)
    assert "last 6 steps" in scores.point and scores.run.steps == 6
    whole = magic.attribute(run, measure, progress=False)
    assert (scores.values - whole.values).norm() > 0.1 * whole.values.norm()
    for i in (0, 19):
        slopes = []
        for h in (1e-3, 1e-4):
            w = torch.ones(4, run.n, dtype=torch.float64)
            w[:, i] += torch.tensor([h, -h, 2 * h, -2 * h], dtype=w.dtype)
            near, less, far, least = magic.outputs(scores.run, measure, w, progress=False)
            slopes.append((8 * (near - less) - (far - least)) / (12 * h))
        size = scores.values[:, i].norm()
        assert min((s - scores.values[:, i]).norm() / size for s in slopes) <= 1e-8
    assert magic.lds(scores, drop=0.1, subsets=8, progress=False).mean > 0.5
    assert magic.verify(scores, progress=False).ok


def test_a_changed_run_is_that_run():
    """What `changed` gives trains like a run that was made so."""
    run, model, optimizer, _ = cases.build("adamw")
    faster = magic.changed(run, hypers={"lr": 0.02, "beta1": 0.8})
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 0.02, (0.8, 0.999)
    made = magic.Run(model, optimizer, run.data, cases.loss, cases.order())
    assert faster.train(progress=False).fingerprint() == made.train(progress=False).fingerprint()
    assert run.hypers[0][0]["lr"] == 1e-2, "the run itself is as it was"
    other = magic.changed(run, data=(run.data[0] + 1, None))
    moved = magic.Run(*cases.build("adamw")[1:3], (run.data[0] + 1, run.data[1]), cases.loss, cases.order())
    assert other.fingerprint() == moved.fingerprint() != run.fingerprint()
    start = magic.changed(run, start=run.train(progress=False))
    assert torch.equal(start.initial.params["0.bias"], run.train(progress=False).params["0.bias"])
    assert start.initial.step == 0 and not start.initial.slots["0.bias"]


def test_what_cannot_be_changed():
    run, *_ = cases.build("two-groups")
    with pytest.raises(ValueError, match="'lr' is -1 at step 0; it must be 0 or more"):
        magic.changed(run, hypers={"lr": -1.0})
    with pytest.raises(ValueError, match="'beta2' is 1 at step 0"):
        magic.changed(run, hypers={"beta2": 1.0})
    with pytest.raises(ValueError, match="'lr' is nan at step 3"):
        rates = magic.hyper(run, "lr")
        rates[3, 1] = math.nan
        magic.changed(run, hypers={"lr": rates})
    with pytest.raises(ValueError, match=r"'lr' has shape \(3,\)"):
        magic.changed(run, hypers={"lr": torch.ones(3)})
    with pytest.raises(ValueError, match="'momentum': no group of the run has such a number"):
        magic.hyper(run, "momentum")
    with pytest.raises(ValueError, match=r"data\[0\] is \(40, 7\)"):
        magic.changed(run, data=(run.data[0][:, :7], None))
    with pytest.raises(ValueError, match="data: a tuple of as many tensors"):
        magic.changed(run, data=(run.data[0],))
    with pytest.raises(ValueError, match=r"data\[0\] is not finite"):
        magic.changed(run, data=(run.data[0] * math.inf, None))
    with pytest.raises(ValueError, match=r"'7\.weight' is no parameter"):
        magic.changed(run, start={"7.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="the state is of another run"):
        magic.changed(run, start=cases.build("dropout")[0].initial)


def test_what_cannot_be_asked():
    run, *_ = cases.build("sgd")
    measure = cases.measure_on(*run.data)
    ask = lambda of, run=run, **options: magic.metagradient(run, measure, of, progress=False, **options)  # noqa: E731
    with pytest.raises(ValueError, match=r"of='momentum'.*Where momentum is 0, SGD keeps no buffer"):
        ask("momentum")
    with pytest.raises(ValueError, match=r"of='beta1'.*it has 'lr', 'weight_decay'"):
        ask("beta1")
    with pytest.raises(ValueError, match=r"of='hypers'.*not of RMSprop"):
        ask("hypers", cases.build("rmsprop")[0])
    with pytest.raises(ValueError, match=r"of='eps_root'.*no slope at 0"):
        ask("eps_root", cases.build("adam")[0])
    with pytest.raises(ValueError, match='ask for "data", too'):
        ask("weights", examples=[0])
    with pytest.raises(IndexError, match="example 40 does not exist"):
        ask("data", examples=[40])
    with pytest.raises(ValueError, match="a mean over several points"):
        ask("start", at="path", drop=0.1)
    with pytest.raises(ValueError, match="contradict"):
        ask("start", plan=magic.plan(run), memory="1GB")


def test_integers_and_datasets_have_no_derivative():
    def of_tokens(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    tokens = torch.randint(9, (8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = magic.batches(8, 4, 1)
    run = magic.Run(model, optimizer, (tokens,), of_tokens, batches)
    with pytest.raises(TypeError, match=r"the training data are torch.int64"):
        magic.metagradient(run, lambda model: of_tokens(model, tokens), "data", progress=False)
    items = [{"tokens": row} for row in tokens]
    run = magic.Run(model, optimizer, items, lambda model, batch: of_tokens(model, batch["tokens"]), batches)
    with pytest.raises(TypeError, match="reads items of a Dataset"):
        magic.metagradient(run, lambda model: of_tokens(model, tokens), "data", progress=False)


def test_a_loss_that_writes_into_its_batch():
    """The inputs are leaves; the loss gets copies, and its own noise is replayed."""

    def noisy(model, x, y):
        x += 0.1 * torch.randn_like(x)
        return cases.loss(model, x, y)

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.adamw()(model), cases.data(), noisy, cases.order(), seed=3)
    measure = cases.measure_on(*cases.data())
    found = magic.metagradient(run, measure, "data", progress=False)
    v = torch.randn(run.data[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [magic.changed(run, data=(run.data[0] + h * v, None)) for h in (1e-5, -1e-5)]
    high, low = (measured_outputs(r, r.train(progress=False), measure) for r in ends)
    seen = (found.data[0] * v).flatten(1).sum(1)
    assert ((high - low) / 2e-5 - seen).norm() <= 1e-6 * seen.norm()
    assert copy.copy(run).fingerprint() == run.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_verify_finds_one_wrong_number(dtype):
    """By trainings in which that part is moved; each part has its own, so that none hides behind another."""
    run, *_ = cases.build("batchnorm-sgd", dtype)
    measure = cases.measure_on(*run.data)
    found = magic.metagradient(run, measure, ("start", "lr", "momentum", "data"), progress=False)
    for part in ("weights", "start", "lr", "momentum", "data"):
        assert magic.verify(found, part, progress=False).ok is True, part
    rates = found.hypers["lr"].clone()
    rates[:, 7] += rates.abs().sum(1)
    wrong = dataclasses.replace(found, hypers={"lr": rates})
    assert magic.verify(wrong, "lr", progress=False).ok is False
    with pytest.raises(ValueError, match="of='eps': this metagradient has no such part"):
        magic.verify(found, "eps", progress=False)
    with pytest.raises(ValueError, match="scores of data weights"):
        magic.verify(found.scores, "lr", progress=False)
    still = magic.metagradient(run, measure, "weight_decay", progress=False)
    with pytest.raises(ValueError, match="0 everywhere"):
        magic.verify(still, "weight_decay", progress=False)


def test_the_witness_looks_at_the_inputs_where_they_are_asked_for():
    """Numbers that leave the graph on the way from an input: nothing to the weights, wrong for the inputs."""

    def hidden(model, x, y):
        scale = torch.tensor(x.abs().mean(1).tolist(), dtype=x.dtype)
        return cases.loss(model, x / scale[:, None], y)

    model = cases.mlp().double()
    run = magic.Run(model, cases.adamw()(model), cases.data(), hidden, cases.order())
    measure = cases.measure_on(*cases.data())
    assert magic.metagradient(run, measure, "weights", progress=False).weights.norm() > 0
    with pytest.raises(magic.NotDifferentiable, match=r"behind autograd's back: look for \.item"):
        magic.metagradient(run, measure, "data", progress=False)
