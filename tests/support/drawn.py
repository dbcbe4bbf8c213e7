"""Small training runs drawn at random, and the three truths that each is held against.

A draw says for each part of a run which one it is; `build` makes the run, and what a plain loop needs.
Every part is an ordinary one, and most bugs of a derivative of training lie where two of them meet.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import magic
from magic.engine.measuring import measured_outputs
from magic.training.determinism import seed_step

N, FEATURES, WIDTH, CLASSES, TARGETS = 11, 8, 4, 3, 3

# -- nets ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two tokens of 4 numbers look at each other."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12, bias=False)

    def forward(self, x):
        q, k, v = self.project(x.view(-1, 1, 2, 4)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1)


class Image(nn.Module):
    """The numbers as a picture of 2 × 4, through a convolution."""

    def __init__(self, pool: bool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 2, 3, padding=1, bias=False), pool

    def forward(self, x):
        h = self.conv(x.view(-1, 1, 2, 4))
        return (F.avg_pool2d(h, 2) if self.pool else h[:, :, :, :2]).flatten(1)


class Words(nn.Module):
    """The first two numbers as words, of which some are in no batch; the others as they are."""

    def __init__(self):
        super().__init__()
        self.embed, self.rest = nn.Embedding(12, WIDTH), nn.Linear(FEATURES - 2, WIDTH, bias=False)

    def forward(self, x):
        words = (x[:, :2].detach().abs() * 3).long().clamp(max=9)
        return self.embed(words).mean(1) + self.rest(x[:, 2:])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, WIDTH, batch_first=True)

    def forward(self, x):
        return self.gru(x.view(-1, 4, 2))[0][:, -1]


class Scaled(nn.Module):
    """Divides by the root mean square, times a gain (RMSNorm written out)."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, h):
        return self.gain * h * (h.square().mean(-1, keepdim=True) + 1e-3).rsqrt()


INPUTS = {
    "linear": (lambda: nn.Linear(FEATURES, WIDTH, bias=False), WIDTH),
    "conv": (lambda: Image(pool=True), WIDTH),
    "conv-wide": (lambda: Image(pool=False), 8),
    "attention": (Attention, 8),
    "words": (Words, WIDTH),
    "gru": (Recurrent, WIDTH),
}
NORMS = {
    "none": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "batch-slow": lambda width: nn.BatchNorm1d(width, momentum=None, affine=False),
    "group": lambda width: nn.GroupNorm(2, width),
    "rms": Scaled,
}
ACTS = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class Net(nn.Module):
    """input, norm, activation, dropout, a residual layer, a head; and what it keeps in buffers."""

    def __init__(self, source: str, norm: str, act: str, dropout: float, keeps: str):
        super().__init__()
        make, width = INPUTS[source]
        self.body = nn.Sequential(make(), NORMS[norm](width), ACTS[act](), nn.Dropout(dropout))
        self.deeper, self.act = nn.Linear(width, width), ACTS[act]()
        self.head = nn.Linear(width, CLASSES)
        self.keeps, self.means = keeps, {}
        if keeps.startswith("average"):
            for i, (name, p) in enumerate(list(self.named_parameters())):
                self.register_buffer(f"mean{i}", p.detach().clone())
                self.means[name] = f"mean{i}"
        if keeps.startswith("queue"):
            self.register_buffer("queue", torch.ones(5, width))
            self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def features(self, x):
        h = self.body(x)
        return h + self.act(self.deeper(h))

    def forward(self, x):
        h = self.features(x)
        if self.training:
            self.remember(h)
        return self.head(h)

    @torch.no_grad()
    def remember(self, h):
        """Move the average, or put two features into the queue, in one of the ways that people write."""
        parameters = dict(self.named_parameters())
        for name, mean in self.means.items():
            if self.keeps == "average":
                getattr(self, mean).lerp_(parameters[name], 0.2)
            elif self.keeps == "average-data":
                getattr(self, mean).data.mul_(0.8).add_(parameters[name].data, alpha=0.2)
            else:
                setattr(self, mean, 0.8 * getattr(self, mean) + 0.2 * parameters[name].detach())
        if self.keeps in ("queue", "queue-view"):
            at = int(self.place)
            if self.keeps == "queue":
                self.queue[at : at + 2] = h[:2]
            else:
                self.queue.narrow(0, at, 2).lerp_(h[:2], 0.7)
            self.place.fill_((at + 2) % 4)
        elif self.keeps == "queue-rolled":
            self.queue.copy_(torch.cat([h[:2].detach(), self.queue[:-2]]))

    def target(self, x):
        """What it says with what it keeps: by its average's head, or from features mixed out of the queue."""
        h = self.body(x)
        if "queue" in self._buffers:
            h = (h @ self.queue.T).softmax(1) @ self.queue
        if not self.means:
            return self.head(h)
        held = {name: getattr(self, self.means[f"head.{name}"]) for name in ("weight", "bias")}
        return functional_call(self.head, held, (h,))


# -- losses --------------------------------------------------------------------------------------------


def entropy(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def square(model, x, y):
    return (model(x) - F.one_hot(y, CLASSES)).square().sum(1)


def focal(model, x, y):
    losses = entropy(model, x, y)
    return (1 - torch.exp(-losses)).detach() ** 2 * losses


def smoothed(model, x, y):
    out = model(x)
    told = 0.8 * F.one_hot(y, CLASSES) + 0.2 * out.data.softmax(1)
    return F.cross_entropy(out, told, reduction="none")


def straight_through(model, x, y):
    h = model(x)
    return F.cross_entropy(h + (torch.tanh(3 * h) - h).detach(), y, reduction="none")


def taught(model, x, y):
    out = model(x)
    with torch.no_grad():
        told = model.target(x.flip(1)).softmax(1)
    return F.cross_entropy(out, y, reduction="none") + F.kl_div(
        out.log_softmax(1), told, reduction="none"
    ).sum(1)


def in_batch(model, x, y):
    """Contrastive: each example is told from the others of its batch."""
    out, other = model(x), model(x.roll(1, 1))
    return F.cross_entropy(out, y, reduction="none") - (out @ other.T / 3).log_softmax(1).diagonal()


def through_data(model, x, y):
    """A gain that is read off the weights, held fixed."""
    gain = model.head.weight.data.square().mean().sqrt()
    return F.cross_entropy(model(x) * (1 + gain), y, reduction="none")


BASES = {
    f.__name__: f
    for f in (entropy, square, focal, smoothed, straight_through, taught, in_batch, through_data)
}


def nothing(model, x):
    return 0.0


def alike(model, x):
    """SimSiam: two views agree, of which one is held fixed."""
    h, other = model.features(x), model.features(x + 0.1 * x.flip(1))
    return -0.5 * F.cosine_similarity(h, other.detach(), dim=1)


def penalty(model, x):
    """The size of a gradient in the input; fused attention has no second one."""
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    return 0.1 * slope.square().sum(1)


def decay(model, x):
    return 0.05 * sum(p.square().sum() for p in model.parameters()) + x.new_zeros(len(x))


def inner_step(model, x):
    """One step of first-order MAML on the head."""
    weight = model.head.weight
    (slope,) = torch.autograd.grad(model(x).square().mean(), weight)
    return 0.3 * F.linear(model.features(x), weight - 0.5 * slope).square().sum(1)


def confidence(model, x):
    """Entropy of the prediction, weighted by how sure it is; the weight is computed under no_grad."""
    log = model(x).log_softmax(1)
    with torch.no_grad():
        sure = log.exp().amax(1)
    return -0.2 * sure * (log.exp() * log).sum(1)


EXTRAS = {f.__name__: f for f in (nothing, alike, penalty, decay, inner_step, confidence)}


# -- optimizers, schedulers, batches, weights ----------------------------------------------------------


def _two_groups(kind, first, second, **options):
    def make(model):
        parameters = list(model.parameters())
        half = len(parameters) // 2
        groups = [{"params": parameters[:half], **first}, {"params": parameters[half:], **second}]
        return kind(groups, **options)

    return make


def _one_group(kind, **options):
    return lambda model: kind(model.parameters(), **options)


_SGD, _ADAM, _ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": _one_group(_SGD, lr=0.2),
    "momentum": _one_group(_SGD, lr=0.1, momentum=0.8, weight_decay=0.02),
    "nesterov": _one_group(_SGD, lr=0.1, momentum=0.7, nesterov=True),
    "dampening": _one_group(_SGD, lr=0.1, momentum=0.7, dampening=0.3, weight_decay=0.1),
    "maximize": _one_group(_SGD, lr=0.02, momentum=0.7, maximize=True),
    "adam": _one_group(_ADAM, lr=0.02, eps=1e-3),
    "adam-sharp": _one_group(_ADAM, lr=0.01, betas=(0.5, 0.9)),
    "adam-decay": _one_group(_ADAM, lr=0.02, eps=1e-3, weight_decay=0.1),
    "adamw": _one_group(_ADAMW, lr=0.02, eps=1e-3, weight_decay=0.1),
    "amsgrad": _one_group(_ADAMW, lr=0.02, eps=1e-3, amsgrad=True, betas=(0.7, 0.8)),
    "groups-sgd": _two_groups(_SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "weight_decay": 0.1}, lr=0.1),
    "groups-adam": _two_groups(
        _ADAMW, {"lr": 0.02, "weight_decay": 0.1}, {"betas": (0.8, 0.99), "amsgrad": True}, lr=0.01, eps=1e-3
    ),
}
_S = torch.optim.lr_scheduler
SCHEDULERS = {
    "none": lambda optimizer, steps: None,
    "one-cycle": lambda optimizer, steps: _S.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps + 1),
    "cosine": lambda optimizer, steps: _S.CosineAnnealingLR(optimizer, steps),
    "step": lambda optimizer, steps: _S.StepLR(optimizer, 2, 0.5),
    "lambda": lambda optimizer, steps: _S.LambdaLR(optimizer, lambda t: (t + 1) / steps),
}


def _repeated(dice):
    """Examples come again and again, in a batch, too; the last two never come."""
    batches = []
    for size in (4, 6, 3):
        two = torch.randperm(N - 2, generator=dice)[:2]
        batches.append(torch.cat([two, torch.randint(N - 2, (size - 2,), generator=dice)]))
    return batches


def _unequal(dice):
    first, second = (torch.randperm(N, generator=dice) for _ in range(2))
    return [*first.split((4, 4, 3)), second[:5]]


BATCHES = {
    "shuffled": lambda dice: magic.batches(N - 1, 5, 2, seed=int(torch.randint(99, (), generator=dice))),
    "unequal": _unequal,
    "repeated": _repeated,
    "whole": lambda dice: torch.arange(N).expand(3, N),
}


def _one_zero(dice):
    weights = 0.3 + 1.4 * torch.rand(N, generator=dice, dtype=torch.float64)
    weights[torch.randint(N, (), generator=dice)] = 0.0
    return weights


WEIGHTS = {
    "ones": lambda dice: torch.ones(N, dtype=torch.float64),
    "random": lambda dice: 0.3 + 1.4 * torch.rand(N, generator=dice, dtype=torch.float64),
    "one-zero": _one_zero,
}

CHOICES = {
    "source": list(INPUTS),
    "norm": list(NORMS),
    "act": list(ACTS),
    "dropout": [0.0, 0.0, 0.3],
    "keeps": [
        "nothing",
        "nothing",
        "average",
        "average-data",
        "average-new",
        "queue",
        "queue-view",
        "queue-rolled",
    ],
    "base": list(BASES),
    "extra": list(EXTRAS),
    "optimizer": list(OPTIMIZERS),
    "scheduler": list(SCHEDULERS),
    "batches": list(BATCHES),
    "weights": list(WEIGHTS),
    "normalize": ["batch", "weights"],
    "plan": ["one state", "few states", "disk", "traces"],
    "seed": list(range(1000)),
}


@dataclass(frozen=True)
class Draw:
    source: str
    norm: str
    act: str
    dropout: float
    keeps: str
    base: str
    extra: str
    optimizer: str
    scheduler: str
    batches: str
    weights: str
    normalize: str
    plan: str
    seed: int

    def build(self):
        """The run, the model, optimizer and scheduler of a plain loop, and the loss of it."""
        dice = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Net(self.source, self.norm, self.act, self.dropout, self.keeps).double()
        x = torch.randn(N, FEATURES, generator=dice, dtype=torch.float64)
        y = torch.randint(CLASSES, (N,), generator=dice)
        order = BATCHES[self.batches](dice)
        optimizer = OPTIMIZERS[self.optimizer](model)
        scheduler = SCHEDULERS[self.scheduler](optimizer, len(order))
        loss = functools.partial(total_loss, BASES[self.base], EXTRAS[self.extra])
        run = magic.Run(
            model, optimizer, (x, y), loss, order, scheduler, normalize=self.normalize, seed=self.seed
        )
        return run, model, optimizer, scheduler, WEIGHTS[self.weights](dice)

    def other_plan(self, run):
        """A plan that repeats steps, or puts states on disk."""
        plan = functools.partial(magic.plan, run, TARGETS)
        return {
            "one state": lambda: plan(states=1),
            "few states": lambda: plan(states=3),
            "disk": lambda: dataclasses.replace(plan(states=3), tier_of=(0, 2, 2)),
            "traces": lambda: dataclasses.replace(plan(states=2), traces=2),
        }[self.plan]()


def total_loss(base, extra, model, x, y):
    return base(model, x, y) + extra(model, x)


def measure_on(run, keeps: str = "nothing"):
    """The losses of the first examples, and, where the net keeps something, one that reads it."""
    x, y = (part[:TARGETS].clone() for part in run.data)

    def measure(model):
        losses = entropy(model, x, y)
        if keeps != "nothing":
            told = F.cross_entropy(model.target(x), y, reduction="none")
            losses = torch.cat([losses[:-1], told[-1:]])
        return losses

    return measure


def plain_loop(run, model, optimizer, scheduler):
    """What a user would write; the values that come out."""
    for group in optimizer.param_groups:
        group["foreach"] = False
    model = copy.copy(model)
    x, y = run.data
    for t, indices in enumerate(run.batches):
        seed_step(run.seed, t)
        optimizer.zero_grad()
        run.loss(model, x[indices], y[indices]).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model.state_dict()


# -- a finite difference that knows its doubt ----------------------------------------------------------

FIRST, MOST = 4e-2, 16  # the first step size, which is halved so often at most


def slope(run, measure, at, direction, scale, enough):
    """(K,): dφ/dε at w + ε·direction; and how far it may be off, the most over targets, relative to `scale`.

    Ridders 1982: central differences at step sizes that are halved, extrapolated to size 0 in a table. An
    entry is doubted by its gaps to the two that it was made of: truncation, kinks and rounding all show
    there. Stops at a doubt that is `enough`.
    """

    def f(change):
        final = run.train(at + change * direction, progress=False, allow_negative=True)
        return measured_outputs(run, final, measure)

    best, doubt, row = (
        torch.zeros_like(scale),
        float("inf"),
        [],
    )  # of a training that diverges, nothing is known
    for i in range(MOST):
        h = FIRST / 2**i
        above, row = row, [(f(h) - f(-h)) / (2 * h)]
        for j, coarser in enumerate(above):
            finer = row[j]
            row.append(finer + (finer - coarser) / (4 ** (j + 1) - 1))
            gap = torch.maximum((row[-1] - finer).abs(), (row[-1] - coarser).abs())
            gap = (gap / scale).max().item()
            if gap < doubt:
                best, doubt = row[-1], gap
        if doubt <= enough:
            break
    return best, doubt
