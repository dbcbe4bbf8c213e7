"""More of what once gave a wrong number, a false alarm or a raw traceback."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import checkpoint as library
from torch.utils.checkpoint import checkpoint

import magic
from magic import determinism
from magic.engine import listeners, places
from magic.engine.measuring import measured_outputs
from magic.kernels import checkpointing
from tests.engine.test_defects import ORDER, Around, N, X, Y, loss, measure, mlp, run_of, scores


def agrees(run, measure=measure):
    found, outputs = scores(run, measure), []
    for sign in (1, -1):
        weights = torch.ones(N, dtype=torch.float64)
        weights[3] += sign * 1e-5
        outputs.append(measured_outputs(run, run.train(weights, progress=False), measure))
    torch.testing.assert_close(found[:, 3], (outputs[0] - outputs[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    assert found.abs().max() > 1e-6


def hidden(use):
    """An MLP whose hidden layer is put through `use`."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body[2](F.gelu(use(self, self.body[0](x))))

    return Hidden()


# --- activation checkpointing


def block(kind):
    def plain(self, x):
        return self.body(x)

    def stopped(self, x):
        h = self.body[0](x)
        with torch.no_grad():
            gate = h.sigmoid()
        return self.body[2](F.gelu(h) * gate * h.detach().cos())

    def dropped(self, x):
        return F.dropout(self.body(x), 0.3, self.training)

    inner = {"plain": plain, "stopped": stopped, "dropped": dropped}[kind]

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return checkpoint(lambda x: inner(self, x), x, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize("kind", ["plain", "stopped", "dropped"])
def test_checkpointed_blocks(kind):
    agrees(run_of(block(kind)))


def test_checkpoints_are_left_as_they_were():
    before = {name: getattr(library, name) for name in ("CheckpointFunction", *checkpointing._ORIGINAL)}
    run = run_of(block("plain"))
    scores(run)
    with pytest.raises(RuntimeError, match="on purpose"):
        scores(run, lambda model: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert before == {name: getattr(library, name) for name in before}
    assert library.CheckpointFunction.apply is not checkpointing._Refused.apply


def test_a_reentrant_checkpoint_is_refused_even_where_no_gradient_asks_for_it():
    """Without an input that requires a gradient it is a stop-gradient, by an accident of its making."""
    model = Around(
        lambda self, h: h + checkpoint(self.body[2], torch.ones(1, 5).double(), use_reentrant=True)
    )
    with pytest.raises(ValueError, match=r"use checkpoint\(\.\.\., use_reentrant=False\)"):
        run_of(model)
    with pytest.raises(ValueError, match=r"use checkpoint\(\.\.\., use_reentrant=False\)"):
        scores(run_of(mlp()), lambda model: checkpoint(model, X[:2], use_reentrant=True).sum(1))


# --- hooks


def under_no_grad(g):
    with torch.no_grad():
        return g / (g.norm() + 0.1)


HOOKS = {
    "scales": lambda g: 0.3 * g,
    "normalises": lambda g: g / (g.norm() + 0.1),
    "by-a-detached-norm": lambda g: g / (g.detach().norm() + 0.1),
    "under-no-grad": under_no_grad,
    "clips": lambda g: g.clamp(-0.05, 0.05),
    "looks": lambda g: None,
}


def hooked(hook):
    def use(self, h):
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return hidden(use)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_tensors(name):
    agrees(run_of(hooked(HOOKS[name])))


def test_a_hook_in_a_measure_touches_only_gradients_that_it_takes():
    def slopes(model):
        x = X[:2].clone().requires_grad_()
        return torch.autograd.grad(loss(model, x, Y[:2]).sum(), x, create_graph=True)[0].square().sum(1)

    agrees(run_of(hooked(HOOKS["scales"])), slopes)


def test_the_way_out_for_a_scaled_gradient():
    agrees(run_of(hidden(lambda self, h: -0.5 * h + (1.5 * h).detach())))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(kind):
    model = mlp()
    getattr(model[2], kind)(lambda *_: None)
    with pytest.raises(ValueError, match=r"module '2' has backward hooks.*x\.register_hook there"):
        run_of(model)


def test_backward_hooks_of_all_modules_are_refused():
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="for every module there are backward hooks"):
            run_of(mlp())
    finally:
        handle.remove()


# --- a step's bits, recorded and not


class Bare(nn.Module):
    def __init__(self, f, *layers):
        super().__init__()
        self.f, self.layers = f, nn.Sequential(*layers)

    def forward(self, x):
        return self.f(self.layers, x)


def convolved(norm, last):
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(24, 3)
    model = nn.Sequential(nn.Unflatten(1, (2, 2, 1)), nn.Conv2d(2, 4, 2, padding=1), norm, nn.ReLU(), *head)
    return model.to(memory_format=torch.channels_last) if last else model


def frozen(norm):
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return norm.eval()


def between(f, *parametrized):
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6), nn.Linear(6, 3)
    for make in parametrized:
        make(first)
    return Bare(lambda layers, x: layers[1](f(layers[0](x))), first, last)


OTHERS = {
    "silu": lambda: between(F.silu),
    "mish": lambda: between(F.mish),
    "cumprod": lambda: between(lambda h: h.cumprod(1)),
    "solve": lambda: between(lambda h: torch.linalg.solve(h.T @ h + torch.eye(6), h.T).T),
    "householder": lambda: between(
        torch.tanh, lambda m: parametrizations.orthogonal(m, "weight", "householder")
    ),
    "spectral": lambda: between(torch.tanh, parametrizations.spectral_norm),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 6), frozen(nn.BatchNorm1d(6)), nn.Linear(6, 3)),
    "batch-last": lambda: convolved(nn.BatchNorm2d(4), True),
    "group-last": lambda: convolved(nn.GroupNorm(2, 4), True),
    "frozen-last": lambda: convolved(frozen(nn.BatchNorm2d(4)), True),
    "group": lambda: convolved(nn.GroupNorm(2, 4), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_recorded_step_has_the_bits_it_claims(name):
    """What is recorded to be differentiated again may be computed otherwise; then `same_bits` says so."""
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = OTHERS[name](), torch.randn(N, 4)
        run = run_of(model, data=(x, Y), optimizer=torch.optim.SGD)
        state, weights = run.initial, run.weights()
        with determinism.fix():
            for t in range(run.steps):
                found = []
                for graph in (False, True):
                    leaves = {k: p.detach().requires_grad_() for k, p in state.params.items()}
                    found.append(run.gradient(leaves, state.buffers, weights[run.batches[t]], t, graph))
                plain, recorded = found
                same = all(
                    torch.equal(a, b)
                    for a, b in zip(
                        [plain.total, *plain.by_name.values(), *plain.buffers.values()],
                        [recorded.total, *recorded.by_name.values(), *recorded.buffers.values()],
                        strict=True,
                    )
                )
                assert same or not recorded.same_bits
                state = run.step(state, weights)


@pytest.mark.filterwarnings("ignore:the 2 targets are pulled back one by one")
@pytest.mark.filterwarnings("ignore:.*could not be checked")
@pytest.mark.parametrize("name", ["silu", "householder", "spectral", "frozen", "group-last"])
def test_scores_of_these(name):
    torch.set_default_dtype(torch.float64)
    try:
        agrees(run_of(OTHERS[name](), optimizer=torch.optim.SGD))
    finally:
        torch.set_default_dtype(torch.float32)


def in_the_plain_loop(model, order=ORDER):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with determinism.fix():
        for indices in order:
            optimizer.zero_grad()
            loss(model, X[indices], Y[indices]).mean().backward()
            optimizer.step()
    return dict(model.named_parameters())


def one_channel_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    return model.to(memory_format=torch.channels_last)


def transposed():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64).t())
    return model


@pytest.mark.parametrize("make", [one_channel_last, transposed])
def test_the_layout_of_parameters_in_memory(make, tmp_path):
    """It decides how sums are rounded, so it stays: in a step, on disk, and when work is resumed."""
    torch.manual_seed(0)
    model = make()
    run = run_of(model, optimizer=torch.optim.SGD)
    state = run.train(progress=False)
    for name, p in in_the_plain_loop(model).items():
        assert torch.equal(p, state.params[name]) and p.stride() == state.params[name].stride()
    on_disk = places.Disk(tmp_path, run.initial)
    on_disk.save(6, state)
    for name, p in on_disk.load(6).params.items():
        assert p.stride() == state.params[name].stride() and torch.equal(p, state.params[name])


def test_a_parameter_with_gaps_is_refused():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(5, 8, dtype=torch.float64)[:, ::2])
    with pytest.raises(ValueError, match=r"'0.weight' is a view that skips or repeats"):
        run_of(model)
    model[0].weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64).expand(5, 4))
    with pytest.raises(ValueError, match=r"'0.weight' is a view that skips or repeats"):
        run_of(model)


# --- buffers written in place, and read


@pytest.mark.parametrize("how", ["copy_", "out", "new"])
def test_buffers_that_are_read_and_written_under_no_grad(how):
    """Power iterations: v is made from W and u, while u was made from v."""

    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.register_buffer("u", F.normalize(torch.ones(5, dtype=torch.float64), dim=0))
            self.register_buffer("v", F.normalize(torch.ones(4, dtype=torch.float64), dim=0))

        def iterate(self, name, x):
            if how == "copy_":
                getattr(self, name).copy_(F.normalize(x, dim=0))
            elif how == "out":
                setattr(self, name, F.normalize(x, dim=0, out=getattr(self, name)))
            else:
                setattr(self, name, F.normalize(x, dim=0))

        def forward(self, x):
            w = self.body[0].weight
            if self.training:
                with torch.no_grad():
                    self.iterate("u", torch.mv(w, self.v))
                    self.iterate("v", torch.mv(w.t(), self.u))
            u, v = self.u.clone(), self.v.clone()
            return self.body[2](F.gelu(x @ w.t() / torch.vdot(u, torch.mv(w, v))))

    torch.manual_seed(0)
    agrees(run_of(Power(), optimizer=torch.optim.SGD))


# --- the fused path of attention layers in eval mode


S = torch.randn(N, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
PAD = torch.zeros(N, 3, dtype=torch.bool)
PAD[::2, 2] = True


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1).double().eval()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x, pad=None):
        return self.head(self.encoder(x, src_key_padding_mask=pad).mean(1))


def distilled(model, x, pad, y):
    with torch.no_grad():
        target = (2 * model(x, pad)).softmax(1)
    out = model(x, pad)
    return F.cross_entropy(out, y, reduction="none") - (target * out.log_softmax(1)).sum(1)


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_an_encoder_in_eval_mode_under_no_grad_within_a_loss():
    """PyTorch takes its fused path there, or not if a mode listens: a step had two values."""
    torch.manual_seed(0)
    run = run_of(Encoder(), data=(S, PAD, Y), loss=distilled)
    agrees(run, lambda model: F.cross_entropy(model(S[:2], PAD[:2]), Y[:2], reduction="none"))


# --- the witness in float64


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float() / 64,
        lambda x: x.to(torch.float32) / 64,
        lambda x: x.type(torch.float32) / 64,
        lambda x: x / 64,
        lambda x: x / 64 + torch.zeros(4),
    ],
    ids=["float", "to", "type", "divided", "zeros"],
)
def test_images_of_bytes_are_checked(cast):
    pixels = (X.abs() * 80).to(torch.uint8)
    run = run_of(Cast(cast), data=(pixels, Y), optimizer=torch.optim.SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = magic.attribute(run, lambda model: loss(model, pixels[:2], Y[:2]), progress=False)
    assert found.health.ok


class Cast(nn.Module):
    def __init__(self, cast):
        super().__init__()
        self.cast, self.body = cast, mlp().float()

    def forward(self, x):
        return self.body(self.cast(x))


# --- measures that copy or train the model


def test_a_measure_that_ablates_a_copy():
    def ablated(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight[0] = 0
        return loss(other, X[:2], Y[:2]) - 0.3 * loss(model, X[:2], Y[:2])

    agrees(run_of(mlp()), ablated)


def test_a_loss_with_a_copied_teacher():
    def taught(model, x, y):
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            target = (2 * teacher(x)).softmax(1)
        return -(target * model(x).log_softmax(1)).sum(1) + loss(model, x, y)

    agrees(run_of(mlp(), loss=taught))


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss(model, X[2:6], Y[2:6]).mean().backward()
    optimizer.step()
    return measure(model)


def loaded(model):
    other = mlp()
    other.load_state_dict(model.state_dict())
    return measure(other)


@pytest.mark.parametrize("measure", [step, lambda model: step(copy.deepcopy(model)), loaded])
def test_a_measure_that_writes_into_parameters_is_refused(measure):
    with pytest.raises(magic.NotDifferentiable, match=r"measure: it writes into parameters.*functional_call"):
        scores(run_of(mlp()), measure)


def test_a_measure_that_calls_backward_is_told_of_grad():
    def slopes(model):
        x = X[:2].clone().requires_grad_()
        loss(model, x, Y[:2]).sum().backward()
        return x.grad.square().sum(1)

    with pytest.raises(magic.NotDifferentiable, match=r"backward\(\) inside .* use torch\.autograd\.grad"):
        scores(run_of(mlp()), slopes)


# --- what leaves the graph at a single step, where no witness would look of itself


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * torch.sigmoid(5 * ctx.saved_tensors[0])


def in_inference_mode(h):
    with torch.inference_mode():
        gate = h.mean(0)
    return h * gate.clone()


HIDDEN = {
    "tensor": lambda h: h * torch.tensor(h.mean(), dtype=h.dtype),
    "new_tensor": lambda h: h * h.new_tensor(h.mean(0)),
    "inference": in_inference_mode,
    "aten": lambda h: h * torch.ops.aten.detach(h.mean(0)),
    "Variable": lambda h: h * torch.autograd.Variable(h.data).mean(0),
    "Parameter": lambda h: h * nn.Parameter(h.detach()).mean(0),
    "pickle": lambda h: h * pickle.loads(pickle.dumps(h.detach().mean(0))),
    "jvp": lambda h: h + torch.func.jvp(lambda v: v.sin() * v.detach(), (h,), (torch.ones_like(h),))[1],
    "grad": lambda h: h + torch.func.vmap(torch.func.grad(lambda v: (v * v.detach()).sum().sin()))(h),
    "Function": Surrogate.apply,
}


class AtOneStep(nn.Module):
    """Does something with the batch that holds the sixth step's first example in its first row."""

    def __init__(self, use):
        super().__init__()
        self.body, self.use = mlp(), use

    def forward(self, x):
        h = self.body[0](x)
        if len(ORDER) == 6 and bool((x[0] == X[ORDER[1][0]]).all()):
            h = self.use(h)
        return self.body[2](F.gelu(h))


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.filterwarnings("ignore:The given NumPy")
@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_at_one_step_is_found(name):
    run = run_of(AtOneStep(HIDDEN[name]), optimizer=torch.optim.SGD)
    assert 1 not in (run.steps - 1, run.steps // 3, 2 * run.steps // 3), "it would be looked at anyway"
    with pytest.raises(magic.NotDifferentiable, match="step 1: "):
        scores(run)


def test_a_function_that_is_right_is_asked_once(monkeypatch):
    asked = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    original = listeners.check_step
    monkeypatch.setattr(listeners, "check_step", lambda *a, **k: asked.append(a[1].step) or original(*a, **k))
    agrees(run_of(hidden(lambda self, h: Square.apply(h)), optimizer=torch.optim.SGD))
    assert len(asked) <= 4, "at three steps anyway, and at one for the Function"


def test_a_mask_made_of_stopped_numbers_is_no_escape(monkeypatch):
    asked = []
    original = listeners.check_step
    monkeypatch.setattr(listeners, "check_step", lambda *a, **k: asked.append(a[1].step) or original(*a, **k))

    def hard_ones(model, x, y):
        losses = loss(model, x, y)
        return losses * (losses >= losses.detach().median())

    agrees(run_of(mlp(), loss=hard_ones))
    assert len(asked) == 3


@pytest.mark.parametrize("how", ["rolled", "sliced"])
def test_a_queue_written_through_views_under_no_grad(how):
    class Queue(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.register_buffer("queue", torch.randn(8, 5, dtype=torch.float64))

        def forward(self, x):
            h = self.body[0](x)
            out = self.body[2](F.gelu(h)) + (h @ self.queue.clone().t()).logsumexp(1, keepdim=True) * X[0, :3]
            if self.training:
                with torch.no_grad():
                    if how == "rolled":
                        self.queue.copy_(torch.roll(self.queue, 4, 0))
                        self.queue[:4].copy_(h)
                    else:
                        rows = self.queue[2:6]
                        rows.copy_(h)
                        rows.mul_(0.5)
            return out

    torch.manual_seed(0)
    agrees(run_of(Queue(), optimizer=torch.optim.SGD))


# --- a derivative that PyTorch itself has wrong


class Physics(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = nn.Linear(1, 6), nn.Tanh(), nn.LayerNorm(6), nn.Tanh()
        self.body = nn.Sequential(*hidden, nn.Linear(6, 1)).double()

    def forward(self, x):
        return self.body(x)


def residual(model, x, y):
    """u'' = u at points x, and u small."""
    x = x[:, :1].clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend - u).square().sum(1) + u.square().sum(1)


def test_a_second_derivative_of_layer_norm_within_a_loss_is_refused():
    """Training's own gradient, a third derivative of LayerNorm, is wrong in PyTorch: the witness sees that
    the step is not what autograd differentiates."""
    torch.manual_seed(0)
    run = run_of(Physics(), loss=residual, optimizer=torch.optim.SGD)
    with pytest.raises(magic.NotDifferentiable, match="a finite difference gives"):
        scores(run, lambda model: model(X[:2, :1])[:, 0])
