"""Each optimizer: PyTorch's bits, the adjoint of its rule, by hand or by autograd, and the whole replay; and
several of them in one run."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import magic
from magic.engine.measuring import measured_outputs
from magic.training import muon, optim
from magic.training.adam import adam_adjoint
from magic.training.differentiated import root
from tests.engine.test_exact import at_random, error_against_finite_differences
from tests.support import cases
from tests.support.unroll import unroll

SGD = [
    {"lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
     "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0, 0.9), (0, 0.3), (False, True), (0, 0.05), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening))
]  # fmt: skip
ADAM = [
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay,
     "decoupled_weight_decay": decoupled, "amsgrad": amsgrad, "maximize": maximize}
    for decay, decoupled, amsgrad, maximize in itertools.product((0, 0.05), *[(False, True)] * 3)
]  # fmt: skip
RMSPROP = [
    {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "momentum": momentum, "centered": centered,
     "weight_decay": decay, "maximize": maximize}
    for momentum, decay, centered, maximize in itertools.product((0, 0.9), (0, 0.05), *[(False, True)] * 2)
]  # fmt: skip


# For each optimizer, options that differ in one thing or in several from its defaults.
OPTIONS = {
    torch.optim.SGD: [{"momentum": 0.9, "nesterov": True}],
    torch.optim.AdamW: [{"amsgrad": True}],
    torch.optim.RMSprop: [{"momentum": 0.9, "centered": True, "eps": 1e-4}],
    torch.optim.Adagrad: [
        {},
        {"lr_decay": 0.2},
        {"weight_decay": 0.1, "initial_accumulator_value": 0.1},
        {"eps": 1e-3, "maximize": True},
    ],
    torch.optim.NAdam: [
        {},
        {"momentum_decay": 0.1, "betas": (0.7, 0.9)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"eps": 1e-3, "maximize": True},
    ],
    torch.optim.RAdam: [
        {},
        {"betas": (0.7, 0.9)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"eps": 1e-3, "maximize": True},
    ],
    torch.optim.Adafactor: [
        {},
        {"lr": 0.3, "beta2_decay": -0.5},
        {"eps": (1e-4, 0.2), "d": 1.3},
        {"weight_decay": 0.1, "maximize": True},
    ],
    torch.optim.Muon: [
        {},
        {"nesterov": False, "momentum": 0.8},
        {"weight_decay": 0.0, "adjust_lr_fn": "original"},
        {"ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"},
        {"ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3, "adjust_lr_fn": "spectral_unclamped"},
    ],
}
KINDS = [(kind, options) for kind, several in OPTIONS.items() for options in several]
NEW = [(kind, options) for kind, options in KINDS if optim.UPDATES[kind].by_hand is None]


def named(x):
    return getattr(x, "__name__", str(x))


def hyper_of(kind, options):
    """What a group of this optimizer holds beside its parameters."""
    group = kind([torch.zeros(2, 2, requires_grad=True)], **{"lr": 0.01, **options}).param_groups[0]
    return {name: value for name, value in group.items() if name != "params"}


@pytest.fixture
def exact_muon(monkeypatch):
    """Rounded to bfloat16, a training is a staircase, and no finite difference can tell its slope."""
    monkeypatch.setattr(muon, "PRECISION", torch.float64)


def stepped(rule, hyper, shape, updates):
    """A parameter, a gradient and slots in float64, after a few updates; and a source of random tensors."""
    dice = torch.Generator().manual_seed(updates)

    def randn(*shape):
        return torch.randn(shape, generator=dice, dtype=torch.float64)

    param, slots = randn(*shape), {}
    for _ in range(updates):
        param, slots = rule(param, randn(*shape), slots, hyper)
    return param, randn(*shape), slots, randn


def leaves_of(param, grad, slots):
    given = {"param": param, "grad": grad} | {k: x for k, x in slots.items() if x.is_floating_point()}
    return {k: x.detach().requires_grad_() for k, x in given.items()}


def applied(rule, leaves, slots, hyper):
    """What the rule returns of floating-point tensors, with autograd watching."""
    held = {**slots, **{k: leaves[k] for k in slots if k in leaves}}
    after, made = rule(leaves["param"], leaves["grad"], held, hyper)
    return {"param": after} | {k: x for k, x in made.items() if x.is_floating_point()}, made


@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize(
    "rule, hyper",
    [(optim.sgd, h) for h in SGD]
    + [(optim.adam, h) for h in ADAM]
    + [(optim.rmsprop, h) for h in RMSPROP]
    + [(optim.UPDATES[kind].rule, hyper_of(kind, options)) for kind, options in NEW],
    ids=named,
)
def test_against_autograd_of_the_rule(rule, hyper, updates):
    param, grad, slots, randn = stepped(rule, hyper, (3, 4), updates)
    leaves = leaves_of(param, grad, slots)
    outputs, made = applied(rule, leaves, slots, hyper)
    cotangent = {k: randn(2, *x.shape) for k, x in outputs.items()}
    expected = [
        torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), [c[k] for c in cotangent.values()],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        for k in range(2)
    ]  # fmt: skip
    found = {k: c.clone() for k, c in cotangent.items()}
    known = made if updates % 2 else None
    known = known and {k: x.detach() for k, x in known.items()}
    adjoint = next(update.adjoint for update in optim.UPDATES.values() if update.rule is rule)
    found["grad"] = adjoint(param, leaves["grad"].detach(), slots, hyper, known)(found)
    assert found.keys() >= leaves.keys()
    for i, name in enumerate(leaves):
        torch.testing.assert_close(found[name], torch.stack([e[i] for e in expected]), rtol=1e-12, atol=1e-14)
    assert found["grad"].abs().min() > 0


@pytest.mark.parametrize("updates", [0, 7])
@pytest.mark.parametrize(
    "kind, options, shape",
    [
        (kind, options, shape)
        for kind, options in NEW
        for shape in ((3, 2), (3,), (), (2, 2, 3))
        if kind is not torch.optim.Muon or len(shape) == 2
    ],
    ids=named,
)
def test_autograd_of_a_rule_is_right(kind, options, shape, updates, exact_muon):
    """Against finite differences: a number that was read out of a tensor would be missing."""
    rule, hyper = optim.UPDATES[kind].rule, hyper_of(kind, options)
    param, grad, slots, _ = stepped(rule, hyper, shape, updates)
    leaves = leaves_of(param, grad, slots)

    def f(*values):
        return tuple(applied(rule, dict(zip(leaves, values, strict=True)), slots, hyper)[0].values())

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind, options", NEW, ids=named)
def test_without_any_gradient(kind, options):
    """Zeros, as of an embedding that no batch has touched: the update is finite, and so is its adjoint."""
    update, hyper = optim.UPDATES[kind], hyper_of(kind, options)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    param, slots = torch.ones_like(zeros), {}
    for _ in range(7):
        after, made = update.rule(param, zeros, slots, hyper)
        cotangent = {k: torch.ones(2, *x.shape, dtype=x.dtype) for k, x in made.items()} | {
            "param": torch.ones(2, 2, 3, dtype=torch.float64)
        }
        to_grad = update.adjoint(param, zeros, slots, hyper)(cotangent)
        assert to_grad.isfinite().all() and all(x.isfinite().all() for x in cotangent.values())
        assert after.isfinite().all()
        param, slots = after, made


@pytest.mark.parametrize("updates", [0, 2])
def test_where_no_gradient_has_been(updates):
    """v = 0 in one row: no NaN, and the slope of the numerator, −α(1 − β₁)/ε."""
    hyper = next(h for h in ADAM if h["weight_decay"] == 0 and not h["amsgrad"] and not h["maximize"])
    param, slots, (beta1, _) = torch.ones(2, 3, dtype=torch.float64), {}, hyper["betas"]
    grad = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    for _ in range(updates):
        param, slots = optim.adam(param, grad, slots, hyper)
    cotangent = {k: torch.zeros(1, 2, 3, dtype=torch.float64) for k in ("exp_avg", "exp_avg_sq")}
    cotangent["param"] = torch.ones(1, 2, 3, dtype=torch.float64)
    to_grad = adam_adjoint(param, grad, slots, hyper)(cotangent)
    alpha = hyper["lr"] / (1 - beta1 ** (updates + 1))
    assert to_grad[0, 0].tolist() == pytest.approx([-alpha * (1 - beta1) / hyper["eps"]] * 3)
    assert all(c.isfinite().all() for c in cotangent.values())
    h = 1e-12  # a real step to both sides of 0, small against ε
    slopes = [
        optim.adam(param, grad + d, slots, hyper)[0][0] - optim.adam(param, grad - d, slots, hyper)[0][0]
        for d in [torch.tensor([[h] * 3, [0.0] * 3], dtype=torch.float64)]
    ]
    assert (slopes[0] / (2 * h)).tolist() == pytest.approx(to_grad[0, 0].tolist(), rel=1e-3)


class Mixed(nn.Module):
    """Matrices, vectors and a scalar; rows of an embedding that are in no batch, and a layer that not every
    step uses."""

    def __init__(self):
        super().__init__()
        self.words, self.sometimes, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, x):
        h = self.words((x[:, :3].abs() * 3).long().clamp(max=5)).mean(1)
        h = torch.tanh(self.sometimes(h)) if x[0, 0] > 0 else h
        return self.head(self.scale * torch.tanh(h))


def made(kind, options, dtype=torch.float64):
    """A model and what trains it: Muon has the matrices only, and AdamW the others."""
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    options = {"lr": 0.02, **options}
    if kind is not torch.optim.Muon:
        return model, kind(model.parameters(), **options)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return model, [kind(matrices, **options), torch.optim.AdamW(others, 0.02)]


def slowing(optimizer):
    """A scheduler for each optimizer, in the form in which a Run takes them."""
    found = [torch.optim.lr_scheduler.StepLR(one, 3, 0.5) for one in cases.listed(optimizer)]
    return found if isinstance(optimizer, list) else found[0]


ORDER = magic.batches(cases.N, 10, 2, seed=2)
STEPS = len(ORDER)


def run_of(kind, options, scheduled, dtype=torch.float64):
    model, optimizer = made(kind, options, dtype)
    scheduler = slowing(optimizer) if scheduled else None
    return magic.Run(model, optimizer, cases.data(dtype), cases.loss, ORDER, scheduler)


@pytest.mark.parametrize(
    "dtype, scheduled", [(torch.float32, True), (torch.float64, False)], ids=["float32-scheduled", "float64"]
)
@pytest.mark.parametrize("kind, options", KINDS, ids=named)
def test_bits_of_the_plain_loop(kind, options, dtype, scheduled):
    final = run_of(kind, options, scheduled, dtype).train(progress=False)
    model, optimizer = made(kind, options, dtype)
    schedulers = cases.listed(slowing(optimizer)) if scheduled else []
    x, y = cases.data(dtype)
    used = set()
    for indices in ORDER:
        model.zero_grad()
        cases.loss(model, x[indices], y[indices]).mean().backward()
        used.add(model.sometimes.weight.grad is not None)
        for one in [*cases.listed(optimizer), *schedulers]:
            one.step()
    assert used == {False, True}, "degenerate: the layer is used always or never"
    for name, p in model.named_parameters():
        assert torch.equal(final.params[name], p), name


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("kind, options", NEW, ids=named)
def test_the_whole_replay(kind, options, exact_muon):
    """Against a full unroll, along a direction against finite differences, and target by target."""
    run, measure = run_of(kind, options, True), cases.measure_on(*cases.data())
    at = at_random(run.n)
    scores = magic.attribute(run, measure, at=at, progress=False).values
    model, optimizer = made(kind, options)
    data, scheduler = cases.data(), slowing(optimizer)
    truth = unroll(model, optimizer, scheduler, data, cases.loss, ORDER, measure, at)
    assert truth.norm() > 1e-6, "degenerate: no influence at all"
    assert ((scores - truth).norm() / truth.norm()) <= 1e-10
    alone = magic.attribute(run, lambda model: measure(model)[1:2], at=at, progress=False).values
    assert ((scores[1:2] - alone).norm() / alone.norm()) <= 1e-12

    way = torch.randn(run.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = scores @ way

    def f(change):
        return measured_outputs(run, run.train(at + change * way, progress=False), measure)

    errors = [
        ((8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h) - slope).norm() / slope.norm()
        for h in (1e-3, 1e-4)
    ]
    assert min(errors) <= 1e-8


def test_a_gradient_in_another_layout():
    """A sum is rounded in the order of memory, and `param.grad` has its parameter's."""
    kind = torch.optim.Adafactor
    rule, hyper = optim.UPDATES[kind].rule, hyper_of(kind, {})
    param, grad = torch.randn(2, 33, 70, generator=torch.Generator().manual_seed(0))
    other = grad.T.contiguous().T
    rows = [torch.linalg.vector_norm(g, dim=-1) for g in (grad, other)]
    assert not torch.equal(*rows), "degenerate: these sums are the same in both orders"
    assert torch.equal(rule(param, grad, {}, hyper)[0], rule(param, other, {}, hyper)[0])


def test_nadam_counts_in_the_default_precision():
    torch.set_default_dtype(torch.float64)
    try:
        test_bits_of_the_plain_loop(torch.optim.NAdam, {}, torch.float32, True)
        slots = run_of(torch.optim.NAdam, {}, True).train(progress=False).slots
    finally:
        torch.set_default_dtype(torch.float32)
    product = slots["head.bias"]["mu_product"]
    assert product.dtype == torch.int64 and 0 < product.view(torch.float64).item() < 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor], ids=named)
def test_noise_counts_where_an_optimizer_divides_by_it(kind):
    """The bias in front of a normalisation, in a run whose other parameters AdamW trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)).double()
    others = [p for name, p in model.named_parameters() if name != "0.bias"]
    pair = [kind([model[0].bias], lr=0.01), torch.optim.AdamW(others, 0.01)]
    run = magic.Run(model, pair, cases.data(), cases.loss, ORDER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        magic.attribute(run, cases.measure_on(*run.data), progress=False)
    says = [str(w.message) for w in caught if "rounding noise" in str(w.message)]
    assert len(says) == (kind is torch.optim.Adafactor)
    assert all("'0.bias'" in say and "Adafactor divides it by itself" in say for say in says)


def test_muon_rounds_and_its_derivative_does_not(monkeypatch):
    """The rule's update is a staircase of bfloat16; the adjoint is that of the slope which it follows."""
    update, hyper = optim.UPDATES[torch.optim.Muon], hyper_of(torch.optim.Muon, {})
    param, grad, _, randn = stepped(update.rule, hyper, (6, 4), 0)
    cotangent = randn(1, 6, 4)

    def pulled():
        given = {"param": cotangent.clone(), "momentum_buffer": torch.zeros_like(cotangent)}
        return update.adjoint(param, grad, {}, hyper)(given)

    rounded, seen = update.rule(param, grad, {}, hyper)[0], pulled()
    assert torch.equal(update.rule(param, grad * (1 + 1e-9), {}, hyper)[0], rounded), "no staircase"
    monkeypatch.setattr(muon, "PRECISION", torch.float64)
    smooth = update.rule(param, grad, {}, hyper)[0]
    gap = (rounded - smooth).norm() / (smooth - param).norm()
    assert 1e-4 < gap < 2e-2
    torch.testing.assert_close(seen, pulled(), rtol=1e-12, atol=1e-14)
    assert seen.norm() > 0


def test_health_says_that_muon_rounds():
    """In a row, with the number of parameters; it is no reason to doubt, so no problem."""
    said = {}
    for kind in (torch.optim.Muon, torch.optim.AdamW):
        model, pair = made(kind, {})
        run = magic.Run(model, pair, cases.data(), cases.loss, ORDER)
        said[kind] = magic.attribute(run, cases.measure_on(*run.data), progress=False).health
    muons, all_of_them = said[torch.optim.Muon].unrounded
    assert (muons, all_of_them) == (
        sum(p.dim() == 2 for p in model.parameters()),
        len(list(model.parameters())),
    )
    assert f"of {muons} of {all_of_them} parameters, whose steps Muon" in repr(said[torch.optim.Muon])
    assert said[torch.optim.Muon].problems == [] and said[torch.optim.AdamW].unrounded is None
    assert "unrounded" not in repr(said[torch.optim.AdamW])
    assert magic.Health.of(said[torch.optim.Muon].note()) == said[torch.optim.Muon]


def test_two_optimizers_are_two_groups_of_one():
    """Where both are of one kind, a list of two is what one with two groups is, to the identity."""
    model = cases.mlp().double()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    several = [torch.optim.AdamW(first, 0.02), torch.optim.AdamW(second, 0.01)]
    one = torch.optim.AdamW([{"params": first, "lr": 0.02}, {"params": second, "lr": 0.01}])
    runs = [magic.Run(model, o, cases.data(), cases.loss, cases.order()) for o in (several, one)]
    assert runs[0].identity() == runs[1].identity()
    assert len({run.train(progress=False).fingerprint() for run in runs}) == 1


def test_what_a_run_with_several_optimizers_is():
    model, pair = made(torch.optim.Muon, {})
    run = magic.Run(model, pair, cases.data(), cases.loss, ORDER)
    turned = magic.Run(model, pair[::-1], cases.data(), cases.loss, ORDER)
    slower = magic.Run(model, pair, cases.data(), cases.loss, ORDER, slowing(pair))
    adam = torch.optim.Adam([p for p in model.parameters() if p.dim() != 2], 0.02)
    other = magic.Run(model, [pair[0], adam], cases.data(), cases.loss, ORDER)
    assert len({r.fingerprint() for r in (run, slower, other)}) == 3
    assert turned.train(progress=False).fingerprint() == run.train(progress=False).fingerprint()
    assert "muon + adam" in repr(run)
    assert run.updates[run.group_of["words.weight"]].told == "Muon"
    alone = magic.Run(model, [adam], cases.data(), cases.loss, ORDER, [None])
    assert alone.identity() == magic.Run(model, adam, cases.data(), cases.loss, ORDER).identity()
    assert "words.weight" not in alone.initial.params, "what no optimizer holds is a constant"


def refused(model, optimizer, scheduler=None):
    magic.Run(model, optimizer, cases.data(), cases.loss, ORDER, scheduler)


def test_lists_that_are_refused():
    model, pair = made(torch.optim.Muon, {})
    twice = [pair[0], torch.optim.AdamW(model.parameters())]
    with pytest.raises(ValueError, match=r"optimizer 0, Muon, and optimizer 1, AdamW, both hold 'words.we"):
        refused(model, twice)
    with pytest.raises(ValueError, match=r"optimizer 0, Muon, and optimizer 1, Muon, both hold"):
        refused(model, [pair[0], pair[0]])
    with pytest.raises(ValueError, match="the list of optimizers is empty"):
        refused(model, [])
    with pytest.raises(TypeError, match="str is not known to magic"):
        refused(model, [pair[0], "adam"])
    with pytest.raises(TypeError, match="optimizer is a dict"):
        refused(model, {"muon": pair[0]})
    with pytest.raises(TypeError, match=r"Adadelta is not known to magic.*torch.optim.Muon"):
        refused(model, [pair[0], torch.optim.Adadelta(model.head.parameters())])
    one = torch.optim.lr_scheduler.StepLR(pair[0], 3)
    for given, says in (
        (one, "there are 2 optimizers, and scheduler is no list"),
        ([one], "there are 2 optimizers, and scheduler is a list of 1"),
        ([None, one], "the scheduler belongs to another optimizer"),
        ([one, torch.optim.lr_scheduler.ReduceLROnPlateau(pair[1])], "reads a metric"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            refused(model, pair, given)


def test_muon_takes_matrices():
    model = Mixed()
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(model.parameters())
    late = torch.optim.Muon([model.head.weight])
    late.add_param_group({"params": [model.head.bias]})  # which PyTorch lets pass until the first step
    with pytest.raises(ValueError, match=r"Muon updates matrices.*\(3,\)"):
        magic.Run(model, late, cases.data(torch.float32), cases.loss, ORDER)
    many = torch.optim.Muon([model.head.weight], ns_steps=100)
    with pytest.raises(ValueError, match="fewer than 100"):
        magic.Run(model, many, cases.data(torch.float32), cases.loss, ORDER)


@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if kind is not torch.optim.Muon], ids=named)
def test_a_sparse_gradient_is_refused(kind):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 3, sparse=True)

        def forward(self, x):
            return self.words((x[:, :3].abs() * 3).long().clamp(max=5)).mean(1)

    model = Sparse().double()
    with pytest.raises(TypeError, match="sparse gradient"):
        refused(model, kind(model.parameters(), lr=0.01))


def test_options_that_are_refused():
    model = Mixed().double()
    p, o = list(model.parameters()), torch.optim
    for optimizer, says in (
        (o.Adagrad(p, fused=True), "fused=True"),
        (o.Adagrad([{"params": p, "initial_accumulator_value": 0.1}]), "give it to the optimizer"),
        (o.NAdam(p, foreach=True), "foreach=True"),
        (o.NAdam(p, capturable=True), "capturable=True"),
        (o.NAdam([{"params": p, "eps_root": 1e-4}]), "of Adam or AdamW"),
        (o.RAdam(p, differentiable=True), "differentiable=True"),
        (o.RAdam(p, lr=torch.tensor(0.1)), "lr is a tensor"),
        (o.Adafactor(p, foreach=True), "foreach=True"),
        (o.Adafactor(p, eps=(torch.tensor(1e-4), 1e-3)), "eps is a tensor"),
    ):
        with pytest.raises(ValueError, match=says):
            refused(model, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor], ids=named)
def test_an_optimizer_that_has_been_stepped(kind):
    model = Mixed().double()
    optimizer = kind(model.parameters(), lr=0.1)
    refused(model, optimizer)  # a new one passes
    cases.loss(model, *cases.data()).mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="already been stepped"):
        refused(model, optimizer)


class Toy(torch.optim.Optimizer):
    """p' = p − lr · g / √(g² + m²), m' = (m + g) / 2: what CONTRIBUTING says, tried."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_(group["lr"] * p.grad / (p.grad**2 + m**2).sqrt().clamp(min=1e-3))
                    m.add_(p.grad).div_(2)


def toy(param, grad, slots, hyper):
    m = slots.get("mean", torch.zeros_like(param))
    param = param.sub(hyper["lr"] * grad / root(grad**2 + m**2).clamp(min=1e-3))
    return param, {"mean": m.add(grad).div(2)}


def test_an_optimizer_of_your_own(monkeypatch):
    model = Mixed().double()
    with pytest.raises(TypeError, match="Toy is not known to magic"):
        refused(model, Toy(model.parameters()))
    monkeypatch.setitem(optim.UPDATES, Toy, optim.Update("Toy", toy))
    monkeypatch.setitem(OPTIONS, Toy, [{}])
    test_bits_of_the_plain_loop(Toy, {}, torch.float32, True)
    run, measure = run_of(Toy, {}, True), cases.measure_on(*cases.data())
    scores = magic.attribute(run, measure, progress=False)
    assert error_against_finite_differences(run, measure, scores) <= 1e-8

    def edited(param, grad, slots, hyper):
        return toy(param, 2 * grad, slots, hyper)

    monkeypatch.setitem(optim.UPDATES, Toy, optim.Update("Toy", edited))
    other = run_of(Toy, {}, True).identity()
    differ = {part for part, digest in run.identity().items() if other.get(part) != digest}
    assert any("rule of Toy" in part for part in differ), "its rule is a part of what a run is"
