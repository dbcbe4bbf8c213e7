"""Bad input gets an error that says what, where and the way out, and changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from tests.kernels.test_stop_gradients import relative_error
from tests.support import cases


def run_with(model=None, optimizer=None, data=None, loss=cases.loss, batches=None, **options):
    torch.manual_seed(0)
    model = cases.mlp().double() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer
    data = cases.data() if data is None else data
    batches = cases.order() if batches is None else batches
    before = of_the_user(model, optimizer, options.get("scheduler"), data)
    try:
        return magic.Run(model, optimizer, data, loss, batches, **options)
    finally:  # whatever is refused, nothing of the user's has changed
        assert of_the_user(model, optimizer, options.get("scheduler"), data) == before


def of_the_user(model, optimizer, scheduler, data):
    """Everything a Run must leave as it was, in a form that can be compared."""
    return (
        magic.fingerprint(model),
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [module.training for module in model.modules()],
        str(optimizer.state_dict()),
        str({k: v for k, v in scheduler.state_dict().items() if k[0] != "_"}) if scheduler else None,
        [magic.fingerprint(x) for x in data] if all(isinstance(x, torch.Tensor) for x in data) else None,
        magic.fingerprint(torch.get_rng_state()),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_data():
    x, y = cases.data()
    with pytest.raises(ValueError, match=r"one length.*\[40, 39\]"):
        run_with(data=(x, y[:-1]))
    with pytest.raises(TypeError, match=r"data\[1\] is a list"):
        run_with(data=(x, y.tolist()))
    with pytest.raises(TypeError, match="not a DataLoader"):
        run_with(data=iter([x]))


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([[0, 40]], IndexError, r"batches\[0\] asks for example 40"),
        ([[0, 1], [-1, 2]], IndexError, r"batches\[1\] asks for example -1"),
        ([], ValueError, "empty"),
        ([[0.5, 1.0]], ValueError, "indices"),
        ([[]], ValueError, "non-empty"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, "1-d"),
    ],
)
def test_batches(batches, error, says):
    with pytest.raises(error, match=says):
        run_with(batches=batches)


def test_batches_function():
    with pytest.raises(ValueError, match="size=11"):
        magic.batches(10, 11, 1)
    with pytest.raises(ValueError, match="epochs=0"):
        magic.batches(10, 5, 0)


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (lambda m, x, y: F.cross_entropy(m(x), y), ValueError, 'reduction="none"'),
        (lambda m, x, y: m(x)[None], ValueError, r"\(1, 10, 3\)"),
        (lambda m, x, y: m(x)[1:], ValueError, r"\(9, 3\)"),
        (lambda m, x, y: cases.loss(m, x, y)[:-1], ValueError, r"\(9,\)"),
        (lambda m, x, y: 3.0, ValueError, "float"),
        (lambda m, x, y: cases.loss(m, x, y) * float("nan"), magic.NonFinite, "step 0.*per-example loss"),
        (lambda m, x, y: cases.loss(m, x, y).detach(), ValueError, "differentiable path"),
        (lambda m, x, y: cases.loss(m, x, y).bfloat16(), TypeError, "bfloat16"),
    ],
)
def test_loss(loss, error, says):
    with pytest.raises(error, match=says):
        run_with(loss=loss)


@pytest.fixture
def run():
    return run_with()


@pytest.mark.parametrize(
    ("measure", "error", "says"),
    [
        (lambda m: cases.loss(m, *cases.data()).mean(), ValueError, r"\(\).*reshape\(1\)"),
        (lambda m: m(cases.data()[0]), ValueError, r"\(40, 3\)"),
        (
            lambda m: (m(cases.data()[0]).argmax(1) == 0).double(),
            magic.NotDifferentiable,
            "^measure does not.*argmax",
        ),
        (lambda m: cases.loss(m, *cases.data()) / 0, magic.NonFinite, "measure returned inf"),
        (lambda m: cases.loss(m, *cases.data())[:0], ValueError, r"K >= 1"),
    ],
)
def test_measure(run, measure, error, says):
    with pytest.raises(error, match=says):
        magic.attribute(run, measure, progress=False)


def optimizer_of(model, kind):
    p = list(model.parameters())
    if kind == "other":
        return torch.optim.SGD(cases.mlp().parameters(), 0.1)
    if kind == "stepped":
        optimizer = torch.optim.Adam(p)
        cases.loss(model, *cases.data()).mean().backward()
        optimizer.step()
        return optimizer
    if kind == "hooks":
        optimizer = torch.optim.SGD(p, 0.1)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer
    return {
        "adadelta": lambda: torch.optim.Adadelta(p),
        "fused": lambda: torch.optim.AdamW(p, fused=True),
        "foreach": lambda: torch.optim.SGD(p, 0.1, foreach=True),
        "capturable": lambda: torch.optim.Adam(p, capturable=True),
        "differentiable": lambda: torch.optim.SGD(p, 0.1, differentiable=True),
        "tensor-rate": lambda: torch.optim.SGD(p, torch.tensor(0.1)),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("other", ValueError, "not a parameter of the model"),
        ("stepped", ValueError, "already been stepped"),
        ("hooks", ValueError, "hooks"),
        ("adadelta", TypeError, "Adadelta.*AdamW"),
        ("fused", ValueError, "fused=True"),
        ("foreach", ValueError, "foreach=True"),
        ("capturable", ValueError, "capturable=True"),
        ("differentiable", ValueError, "differentiable=True"),
        ("tensor-rate", ValueError, "lr is a tensor"),
    ],
)
def test_optimizer(kind, error, says):
    model = cases.mlp().double()
    optimizer = optimizer_of(model, kind)
    with pytest.raises(error, match=says):
        run_with(model, optimizer)


def test_scheduler():
    s = torch.optim.lr_scheduler
    model = cases.mlp().double()
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="ReduceLROnPlateau reads a metric"):
        run_with(model, optimizer, scheduler=s.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="another optimizer"):
        run_with(model, optimizer, scheduler=s.StepLR(other, 3))
    with pytest.raises(ValueError, match="ends after 6 steps and the run has 16"):
        run_with(model, optimizer, scheduler=s.OneCycleLR(optimizer, 0.1, total_steps=5))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (torch.ones(39), r"\(39,\).*\(40,\)"),
        (torch.full((40,), float("nan")), "not finite"),
        (-torch.ones(40), "allow_negative=True"),
    ],
)
def test_weights(run, weights, says):
    with pytest.raises(ValueError, match=says):
        run.train(weights, progress=False)
    with pytest.raises(ValueError, match=says):
        magic.attribute(run, cases.measure_on(*run.data), at=weights, progress=False)


def test_negative_weights_knowingly(run):
    assert run.train(-0.01, progress=False, allow_negative=True).step == run.steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    with pytest.raises(TypeError, match="derivative of such a run is invalid"):
        run_with(cases.mlp().to(dtype))


def test_a_compiled_model():
    class Compiled(nn.Module):  # what torch.compile returns, without compiling
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    with pytest.raises(TypeError, match="pass the original module"):
        run_with(nn.Sequential(Compiled(cases.mlp())).double())


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_scripted_model():
    with pytest.raises(TypeError, match=r"module '0' is scripted.* before torch.jit.script"):
        run_with(nn.Sequential(torch.jit.script(cases.mlp())).double())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Body(nn.Module):
    """Linear, something in the middle, linear."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 6), nn.Linear(6, 3), middle

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (Once.apply, "step 15.*differentiated twice.*OnceBackward"),
        (
            lambda h: F.embedding_bag(torch.arange(2 * len(h)).view(-1, 2) % len(h), h, mode="max"),
            "_embedding_bag_backward",
        ),
        (lambda h: F.gelu(h) * torch.tensor(h.mean().item()), "step 15.*item"),
    ],
    ids=["once-differentiable", "embedding-bag", "item"],
)
def test_a_model_without_the_second_derivative(middle, says):
    run = run_with(Body(middle).double())
    run.train(progress=False)  # it trains; only its derivative cannot be had
    with pytest.raises(magic.NotDifferentiable, match=says):
        magic.attribute(run, cases.measure_on(*run.data), progress=False)


class Secretly(nn.Module):
    """A moving average that autograd does not see, and magic does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x):
        h = self.a(x)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.b(F.gelu(h - self.centre))


@pytest.mark.parametrize("build", [Secretly, lambda: Body(lambda h: F.gelu(h) * h.detach())])
def test_what_is_hidden_from_autograd_is_exact(build):
    run = run_with(build().double())
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    assert relative_error(run, measure, scores) < 1e-7


class Clamps(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Linear(8, 3), how

    def forward(self, x):
        if self.how == "data":
            self.a.weight.data.clamp_(-0.1, 0.1)
        else:
            with torch.no_grad():
                self.a.weight.mul_(0.99)
        return self.a(x)


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_parameters_changed_in_place(how):
    with pytest.raises(ValueError, match="changes its parameters or buffers in place"):
        run_with(Clamps(how).double())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.calls = nn.Linear(8, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.a(x) * (1 + 0.1 * (self.calls // 5))


def test_an_attribute_that_counts():
    with pytest.raises(magic.NotDeterministic, match="attribute 'calls' of module '' changes"):
        run_with(Counts().double())


class Sometimes(nn.Module):
    """Does something to its hidden layer in those batches whose first feature sums to more than 3."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.what = nn.Linear(8, 6), nn.Linear(6, 3), what

    def forward(self, x):
        h = F.gelu(self.a(x))
        return self.b(self.what(self, h) if x[:, 0].sum() > 3 else h)


def test_parameters_changed_in_place_in_a_later_step():
    def shrink(model, h):
        with torch.no_grad():
            model.b.weight.mul_(0.9)
        return h

    run = run_with(Sometimes(shrink).double())
    with pytest.raises(ValueError, match=r"in place, behind autograd's back: 'b\.weight'"):
        run.train(progress=False)


def test_part_of_the_loss_from_outside():
    outside = cases.mlp().double()
    optimizer = torch.optim.SGD(outside.parameters(), 0.1)

    def penalised(model, x, y):
        return cases.loss(model, x, y) + 0.1 * sum(p.square().sum() for p in outside.parameters())

    with pytest.raises(ValueError, match="of the model outside"):
        run_with(outside, optimizer, loss=penalised)
    run = run_with(outside, optimizer)

    def partly(model):
        return cases.measure_on(*run.data)(model) + outside[0].weight.sum()

    with pytest.raises(ValueError, match=r"measure uses '0\.weight' of the model outside"):
        magic.attribute(run, partly, progress=False)


def test_autocast():
    def in_low_precision(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cases.loss(model, x, y)

    model = cases.mlp()
    with pytest.raises(TypeError, match=r"linear returns torch.bfloat16"):
        run_with(model, data=cases.data(torch.float32), loss=in_low_precision)
    run = run_with(model, data=cases.data(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast is on"):
        run.train(progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_measure_that_hides_a_part(dtype):
    x, y = cases.data(dtype)
    model = cases.mlp().to(dtype)
    run = run_with(model, data=(x, y))

    def hiding(model):
        p = model(x[:3]).softmax(1)
        return p[:, 0].log() + (1 - torch.tensor(p[:, 0].tolist(), dtype=dtype)).log() * p[:, 1]

    with pytest.raises(magic.NotDifferentiable, match=r"measure: .*leaves PyTorch"):
        magic.attribute(run, hiding, progress=False)


def test_a_measure_cannot_change_the_run():
    run = run_with()
    before = run.train(progress=False).fingerprint()

    def rude(model):
        out = cases.measure_on(*run.data)(model)
        model[1] = nn.Identity()
        return out

    magic.attribute(run, rude, progress=False)
    assert run.train(progress=False).fingerprint() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": torch.tanh}, "pass a torch.nn.Module"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "loss must be a function"),
        ({"data": dict(zip("xy", cases.data(), strict=True))}, "data is a dict"),
        ({"batches": 10}, "batches is a int"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"scheduler": []}, "ChainedScheduler"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, says):
    model = cases.mlp().double()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "data": cases.data()}
    given |= {"loss": cases.loss, "batches": cases.order()} | arguments
    with pytest.raises(TypeError, match=says):
        magic.Run(**given)


def test_randomness_that_is_not_torchs():
    import random

    with pytest.raises(magic.NotDeterministic, match="torch's"):
        run_with(Body(lambda h: h * random.random()).double())


def test_an_operation_without_a_deterministic_form():
    def scatter(h):
        return h * torch.zeros(6, dtype=h.dtype).put_(torch.tensor([0, 0, 1]), torch.ones(3, dtype=h.dtype))

    with pytest.raises(magic.NotDeterministic, match="put_"):
        run_with(Body(scatter).double())


def test_sparse_gradients():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3, sparse=True)

        def forward(self, x):
            return self.embed(x[:, 0].abs().long().clamp(max=4))

    with pytest.raises(TypeError, match="sparse=False"):
        run_with(Sparse().double())


def test_gradient_hooks():
    model = cases.mlp().double()
    model[0].weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(ValueError, match="gradient hooks"):
        run_with(model)


def test_a_model_from_outside():
    """The classic slip: the function uses a model from outside instead of the one it is given."""
    outside = cases.mlp().double()
    with pytest.raises(ValueError, match="must call its first argument"):
        run_with(loss=lambda model, x, y: cases.loss(outside, x, y))
    run = run_with()
    with pytest.raises(magic.NotDifferentiable, match="must call its argument"):
        magic.attribute(run, lambda model: cases.measure_on(*run.data)(outside), progress=False)


def test_divergence_names_step_and_tensor():
    model = cases.mlp().double()
    run = run_with(model, torch.optim.SGD(model.parameters(), 1e200))
    with pytest.raises(magic.NonFinite, match=r"step 1: .*largest is \d.*e\+19\d.*learning rate"):
        run.train(progress=False)


def test_a_batch_without_weight():
    run = run_with(normalize="weights")
    weights = torch.ones(cases.N)
    weights[cases.order()[0]] = 0
    with pytest.raises(magic.NonFinite, match="every example of its batch has weight 0"):
        run.train(weights, progress=False)


def test_normalize():
    with pytest.raises(ValueError, match=r"normalize='sum'.*batch"):
        run_with(normalize="sum")


def test_memory(run):
    measure = cases.measure_on(*run.data)
    with pytest.raises(ValueError, match=r"too little for this run; the least that works is [0-9,]+ bytes"):
        magic.attribute(run, measure, memory="100B", progress=False)
    with pytest.raises(ValueError, match="write a number of bytes"):
        magic.attribute(run, measure, memory="lots", progress=False)
    with pytest.raises(TypeError, match=r"states=2\.5"):
        magic.plan(run, states=2.5)
    with pytest.raises(ValueError, match="states=0"):
        magic.plan(run, states=0)


def test_removal_effect(run):
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    with pytest.raises(IndexError, match="example 40 does not exist; the data has 0 … 39"):
        scores.removal_effect([1, 40])
    with pytest.raises(IndexError, match="example -1"):
        scores.removal_effect([-1])
    with pytest.raises(ValueError, match="example 7 is named twice"):
        scores.removal_effect([7, 3, 7])
    with pytest.raises(TypeError, match="integer"):
        scores.removal_effect([0.5])
    with pytest.raises(TypeError, match="integer"):
        scores.removal_effect("12")
    with pytest.raises(ValueError, match=r"\(40,\) or \(S, 40\)"):
        scores.predict(torch.ones(1))
    with pytest.raises(ValueError, match="k=-1"):
        scores.top(0, k=-1)
    with pytest.raises(IndexError, match="example 99"):
        magic.retrain(run, without=[99], progress=False)
    with pytest.raises(IndexError, match="target=3"):
        scores.top(3)


def test_lds(run):
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    with pytest.raises(ValueError, match="at least 3"):
        magic.lds(scores, subsets=2, progress=False)
    with pytest.raises(ValueError, match="rounds to 0"):
        magic.lds(scores, drop=0.001, progress=False)
    with pytest.raises(ValueError, match="rounds to 40"):
        magic.lds(scores, drop=1.0, progress=False)
    scores.measure = lambda model: torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="target 0 is the same"):
        magic.lds(scores, drop=0.1, subsets=3, progress=False)
    scores.measure, scores.values = cases.measure_on(*run.data), torch.zeros_like(scores.values)
    with pytest.raises(ValueError, match="predicted output of target 0"):
        magic.lds(scores, drop=0.1, subsets=3, progress=False)
    scores.run = None
    with pytest.raises(ValueError, match="know no run"):
        magic.lds(scores, progress=False)


def test_a_changed_row_is_caught():
    """The data is the user's tensor: if a row changes after training, the replay is of another run."""
    x, y = cases.data()
    run = run_with(data=(x, y))
    run.train(progress=False)
    x[cases.order()[0][0]] += 1e-9
    with pytest.raises(magic.ReplayMismatch, match=r"step 0: the total loss is .* and was"):
        magic.attribute(run, cases.measure_on(x, y), progress=False)
