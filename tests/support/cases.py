"""Training runs that every exactness test goes through, and the plain loop that is the truth.

A case is one combination of model, optimizer and schedule, small enough for finite differences. Each
tests something that a derivative of training can get wrong.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import magic
from magic.training.determinism import seed_step
from magic.training.optim import Optimizers

N, BATCH, EPOCHS, FEATURES, CLASSES = 40, 10, 4, 8, 3
STEPS = EPOCHS * (N // BATCH)


def mlp():
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, CLASSES))


def batch_norm_mlp():
    return nn.Sequential(
        nn.Linear(FEATURES, 12, bias=False), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, CLASSES)
    )


def dropout_mlp():
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def weight_norm_mlp():
    return nn.Sequential(weight_norm(nn.Linear(FEATURES, 8)), nn.GELU(), nn.Linear(8, CLASSES))


class Conv(nn.Module):
    """Rows of 8 numbers as 2×4 images, through a small ConvNet of either normalisation."""

    def __init__(self, norm: str):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.features(x.view(-1, 1, 2, 4)).flatten(1))


class NowAndThen(nn.Module):
    """A BatchNorm that some batches go through and others do not, one with momentum 0, a constant with −∞."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.norm, self.still = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=0.0)
        self.head = nn.Linear(6, CLASSES)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, float("-inf")]))

    def forward(self, x):
        h = self.b(F.gelu(self.still(self.a(x))))
        h = self.norm(h) if x[:, 0].sum() > 0 or not self.training else h
        gate = (self.mask + h[:, :3]).softmax(1)[:, :1]
        return self.head(F.gelu(gate * h))


class Checkpointed(nn.Module):
    """Runs its middle again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        def middle(h):
            return torch.tanh(self.b(h))

        h = checkpoint(middle, torch.tanh(self.a(x)), use_reentrant=False)
        return self.head(h)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x.view(-1, 4, 2))[0][:, -1])


class Attention(nn.Module):
    """A transformer layer over two tokens of 4 numbers, with dropout, both in and around attention."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 2, 4)).flatten(1))


class Words(nn.Module):
    """Three of 30 words -> a class. Most words are in no batch; the output may be tied to the input."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(30, 6)
        self.head = nn.Linear(6, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        # Words 0 … 11 occur; the other rows of the embedding are never touched.
        words = (x[:, :3].abs() * 4).long().clamp(max=11)
        return self.head(F.gelu(self.embed(words).mean(1)))[:, :CLASSES]


class Partly(nn.Module):
    """A frozen layer, and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(F.gelu(self.used(F.gelu(self.frozen(x)))))


def two_groups(model):
    half = len(list(model.parameters())) // 2
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": parameters[:half], "lr": 2e-2, "weight_decay": 0.1},
            {"params": parameters[half:], "lr": 1e-2, "betas": (0.8, 0.99)},
        ]
    )


def sgd(lr=0.1, **options):
    return lambda model: torch.optim.SGD(model.parameters(), lr, **options)


def adam(lr=1e-2, **options):
    return lambda model: torch.optim.Adam(model.parameters(), lr, **options)


def adamw(lr=1e-2, **options):
    return lambda model: torch.optim.AdamW(model.parameters(), lr, **options)


def rmsprop(lr=1e-2, **options):
    return lambda model: torch.optim.RMSprop(model.parameters(), lr, **options)


def adagrad(lr=5e-2, **options):
    return lambda model: torch.optim.Adagrad(model.parameters(), lr, **options)


def nadam(lr=1e-2, **options):
    return lambda model: torch.optim.NAdam(model.parameters(), lr, **options)


def radam(lr=1e-2, **options):
    return lambda model: torch.optim.RAdam(model.parameters(), lr, **options)


def adafactor(lr=5e-2, **options):
    return lambda model: torch.optim.Adafactor(model.parameters(), lr, **options)


def muon(lr=2e-2, **options):
    """Muon for the matrices, AdamW for the other parameters."""

    def make(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return [
            torch.optim.Muon([p for p in trained if p.dim() == 2], lr, **options),
            torch.optim.AdamW([p for p in trained if p.dim() != 2], 1e-2),
        ]

    return make


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS)


def falling_momentum(optimizer):
    """Momentum .9, 0 when the rate is highest, and .9 again."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=STEPS, base_momentum=0.0, max_momentum=0.9
    )


def one_cycle_and_none(optimizers):
    return [one_cycle(optimizers[0]), None]


def warm_then_cosine(optimizer):
    s = torch.optim.lr_scheduler
    return s.SequentialLR(
        optimizer, [s.LinearLR(optimizer, 0.2, total_iters=4), s.CosineAnnealingLR(optimizer, 12)], [4]
    )


@dataclass
class Case:
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizers]
    scheduler: Callable | None = None
    options: dict = field(default_factory=dict)


CASES = {
    "sgd": Case(mlp, sgd()),
    "sgd-momentum": Case(mlp, sgd(momentum=0.9)),
    "sgd-nesterov-decay": Case(mlp, sgd(momentum=0.9, nesterov=True, weight_decay=0.01)),
    "sgd-dampening": Case(mlp, sgd(momentum=0.8, dampening=0.3)),
    "sgd-maximize": Case(mlp, sgd(1e-2, momentum=0.5, maximize=True)),
    "adam": Case(mlp, adam()),
    "adam-decay": Case(mlp, adam(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)),
    "adamw": Case(mlp, adamw(weight_decay=0.1)),
    "adamw-amsgrad": Case(mlp, adamw(amsgrad=True)),
    "adamw-maximize": Case(mlp, adamw(1e-3, maximize=True)),
    "rmsprop": Case(mlp, rmsprop(weight_decay=0.01)),
    "rmsprop-centered": Case(mlp, rmsprop(centered=True, momentum=0.9, alpha=0.9, eps=1e-4)),
    "rmsprop-onecycle": Case(mlp, rmsprop(momentum=0.9), falling_momentum),
    "adagrad-sequential": Case(lambda: Words(tied=False), adagrad(lr_decay=0.1), warm_then_cosine),
    "nadam-onecycle": Case(
        mlp, nadam(weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.1), one_cycle
    ),
    "radam-onecycle": Case(lambda: Words(tied=False), radam(betas=(0.8, 0.95)), one_cycle),
    "adafactor-conv": Case(
        lambda: Conv("group"), adafactor(weight_decay=0.1, beta2_decay=-0.5, eps=(1e-5, 1e-2), d=1.2)
    ),
    "muon-and-adamw": Case(Partly, muon(adjust_lr_fn="spectral_unclamped"), one_cycle_and_none),
    "sgd-onecycle": Case(mlp, sgd(momentum=0.9), one_cycle),
    "adamw-onecycle": Case(mlp, adamw(), one_cycle),
    "adam-sequential": Case(mlp, adam(), warm_then_cosine),
    "two-groups": Case(mlp, two_groups),
    "two-groups-onecycle": Case(mlp, two_groups, one_cycle),
    "batchnorm-sgd": Case(batch_norm_mlp, sgd(momentum=0.9)),
    "batchnorm-adamw": Case(batch_norm_mlp, adamw()),
    "batchnorm-conv": Case(lambda: Conv("batch"), sgd(momentum=0.9, nesterov=True)),
    "batchnorm-now-and-then": Case(NowAndThen, sgd(momentum=0.9)),
    "weightnorm": Case(weight_norm_mlp, sgd(momentum=0.9)),
    "groupnorm-conv": Case(lambda: Conv("group"), adamw()),
    "dropout": Case(dropout_mlp, adamw(), options={"seed": 5}),
    "lstm": Case(Recurrent, sgd(momentum=0.9)),
    "attention": Case(Attention, adamw(1e-3)),
    "tied-embedding": Case(lambda: Words(tied=True), adam()),
    "untouched-embedding": Case(lambda: Words(tied=False), adamw()),
    "frozen-and-unused": Case(Partly, adam(weight_decay=0.1)),
    # of the 16 steps, gradients are clipped in some
    "clip-partly": Case(mlp, sgd(momentum=0.9), options={"clip": 0.55}),
    "clip-always": Case(mlp, adamw(), one_cycle, options={"clip": 0.1}),
    "clip-value": Case(mlp, sgd(), options={"clip": ("value", 0.05)}),
    "clip-unused": Case(Partly, adam(weight_decay=0.1), options={"clip": 0.3}),
    "accumulate": Case(dropout_mlp, adamw(), options={"accumulate": 5, "seed": 5}),
    "accumulate-batchnorm": Case(batch_norm_mlp, sgd(momentum=0.9), options={"accumulate": 2}),
    "accumulate-now-and-then": Case(NowAndThen, sgd(momentum=0.9), options={"accumulate": 2, "clip": 0.5}),
}


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def data(dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, FEATURES, generator=g), torch.randint(CLASSES, (N,), generator=g)
    return x.to(device, dtype), y.to(device)


def measure_on(x, y, targets=3):
    """The losses of the first few examples, measured in eval mode."""
    return lambda model: loss(model, x[:targets], y[:targets])


def order():
    return magic.batches(N, BATCH, EPOCHS, seed=2)


def build(name, dtype=torch.float64, device="cpu", **options):
    """The case's run, and the model, optimizer and scheduler that a plain loop would use."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model().to(device, dtype)
    optimizer = case.optimizer(model)
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    run = magic.Run(
        model, optimizer, data(dtype, device), loss, order(), scheduler, **{**case.options, **options}
    )
    return run, model, optimizer, scheduler


def listed(x):
    """What a run takes as one or as a list, as a list."""
    return x if isinstance(x, list) else [x]


def clip(run, model):
    """What a user would write between backward() and optimizer.step()."""
    if run.clip is not None and run.clip.kind == "norm":
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip.limit)
    elif run.clip is not None:
        torch.nn.utils.clip_grad_value_(model.parameters(), run.clip.limit)


def plain_loop(run, model, optimizer, scheduler):
    """What a user would write; the model that comes out is the truth.

    On CUDA there is no loop with bits of its own before PyTorch is made deterministic.
    """
    with magic.determinism.fix() if run.device.type == "cuda" else contextlib.nullcontext():
        return _plain_loop(run, model, optimizer, scheduler)


def _plain_loop(run, model, optimizer, scheduler):
    for group in (group for one in listed(optimizer) for group in one.param_groups):
        group["foreach"] = False  # on CUDA PyTorch would choose other kernels
    x, y = run.data
    for t, indices in enumerate(order()):
        model.zero_grad()
        for part, some in enumerate(indices.to(x.device).chunk(run.accumulate)):
            seed_step(run.seed, t, part)
            (loss(model, x[some], y[some]).mean() / run.accumulate).backward()
        clip(run, model)
        for one in listed(optimizer):
            one.step()
        for one in listed(scheduler):
            if one is not None:
                one.step()
    return copy.deepcopy(model).eval()


def states_of(run, every):
    """The states of a run after every so many steps."""
    state, weights, states = run.initial, run.weights(), []
    while state.step < run.steps:
        state = run.step(state, weights)
        states += [state] if state.step % every == 0 else []
    return states
