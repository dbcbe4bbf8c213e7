"""The second witness: one autograd graph over the whole training run, from textbook formulas.

Nothing of magic's step, optimizers or adjoint is used. Memory grows with T, which is why REPLAY
exists; for 16 small steps it does not matter.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from magic.training.determinism import seed_step


class TextbookBatchNorm(nn.Module):
    """Ioffe & Szegedy 2015, algorithm 1, with the names of nn.BatchNorm1d and 2d."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        for name, buffer in like.named_buffers():
            self.register_buffer(name, buffer)
        self.momentum, self.eps = like.momentum, like.eps

    def forward(self, x):
        axes = [i for i in range(x.dim()) if i != 1]
        if self.training:
            variance, mean = torch.var_mean(x, axes, unbiased=False)
            unbiased = variance * x.numel() / (x.numel() - x.shape[1])
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased
        else:
            mean, variance = self.running_mean, self.running_var
        view = [1, -1] + [1] * (x.dim() - 2)
        x = (x - mean.view(view)) * torch.rsqrt(variance + self.eps).view(view)
        return self.weight.view(view) * x + self.bias.view(view)


class TextbookWeightNorm(nn.Module):
    """Salimans & Kingma 2016, equation 2, row by row."""

    def forward(self, g, v):
        return g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)


def differentiable(model):
    """The model with every BatchNorm and weight normalisation replaced by its textbook form."""
    if torch.nn.utils.parametrize.is_parametrized(model, "weight"):
        model.parametrizations.weight[0] = TextbookWeightNorm()
    for name, child in model.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            setattr(model, name, TextbookBatchNorm(child))
        else:
            differentiable(child)
    return model


def sgd(p, g, m, h):
    g = (-g if h["maximize"] else g) + h["weight_decay"] * p
    if not h["momentum"]:
        return p - h["lr"] * g, m
    b = g if m is None else h["momentum"] * m + (1 - h["dampening"]) * g
    return p - h["lr"] * (g + h["momentum"] * b if h["nesterov"] else b), b


def adam(p, g, m, h):
    (b1, b2), g = h["betas"], -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        p = p * (1 - h["lr"] * h["weight_decay"])
    else:
        g = g + h["weight_decay"] * p
    t, first, second, top = m or (0, 0.0 * g, 0.0 * g, None)
    t, first, second = t + 1, b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
    top = second if top is None or not h["amsgrad"] else torch.max(top, second)
    top_before, top = top, top + h.get("eps_root", 0.0) * (1 - b2**t)
    # The root of an exact zero has no finite slope; where the gradient is 0, so is its first moment.
    root = torch.where(top > 0, torch.where(top > 0, top, 1.0) ** 0.5, 0.0)
    step = h["lr"] * (first / (1 - b1**t)) / (root / (1 - b2**t) ** 0.5 + h["eps"])
    return p - step, (t, first, second, top_before)


def rmsprop(p, g, m, h):
    g = (-g if h["maximize"] else g) + h["weight_decay"] * p
    second, first, b = m or (0.0 * g, 0.0 * g, 0.0 * g)
    second, first = h["alpha"] * second + (1 - h["alpha"]) * g**2, h["alpha"] * first + (1 - h["alpha"]) * g
    spread = second - first**2 if h["centered"] else second
    root = torch.where(spread > 0, torch.where(spread > 0, spread, 1.0) ** 0.5, 0.0)
    b = h["momentum"] * b + g / (root + h["eps"])
    return p - h["lr"] * b, (second, first, b)


def root(x):
    return torch.where(x > 0, torch.where(x > 0, x, 1.0) ** 0.5, 0.0)


def adagrad(p, g, m, h):
    g = (-g if h["maximize"] else g) + h["weight_decay"] * p
    t, total = m or (0, h["initial_accumulator_value"] + 0.0 * g)
    total = total + g**2
    return p - h["lr"] / (1 + t * h["lr_decay"]) * g / (root(total) + h["eps"]), (t + 1, total)


def decayed(p, g, h):
    """Parameter and gradient after weight decay of either kind."""
    g, decay = -g if h["maximize"] else g, h["weight_decay"]
    return (p * (1 - h["lr"] * decay), g) if h["decoupled_weight_decay"] else (p, g + decay * p)


def nadam(p, g, m, h):
    (b1, b2), (p, g) = h["betas"], decayed(p, g, h)
    t, product, first, second = m or (0, 1.0, 0.0 * g, 0.0 * g)
    t, first, second = t + 1, b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
    now, then = (b1 * (1 - 0.96 ** (s * h["momentum_decay"]) / 2) for s in (t, t + 1))
    # PyTorch keeps the product in single precision
    product = (torch.tensor(product) * now).item()
    ahead = then * first / (1 - product * then) + (1 - now) * g / (1 - product)
    return p - h["lr"] * ahead / (root(second / (1 - b2**t)) + h["eps"]), (t, product, first, second)


def radam(p, g, m, h):
    (b1, b2), (p, g) = h["betas"], decayed(p, g, h)
    t, first, second = m or (0, 0.0 * g, 0.0 * g)
    t, first, second = t + 1, b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
    limit = 2 / (1 - b2) - 1
    rho, step = limit - 2 * t * b2**t / (1 - b2**t), h["lr"] * first / (1 - b1**t)
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
        step = step * r * (1 - b2**t) ** 0.5 / (root(second) + h["eps"])
    return p - step, (t, first, second)


def adafactor(p, g, m, h):
    e1, e2 = h["eps"]
    e1, g = torch.finfo(p.dtype).eps if e1 is None else e1, -g if h["maximize"] else g
    t, kept = m or (0, None)
    t = t + 1
    new = t ** h["beta2_decay"]
    squares = [g**2] if g.dim() < 2 else [(g**2).mean(-1), (g**2).mean(-2)]
    kept = [new * s + (1 - new) * k for s, k in zip(squares, kept or [0.0, 0.0], strict=False)]
    if g.dim() < 2:
        v = kept[0]
    else:
        rows, columns = kept
        v = rows[..., :, None] * columns[..., None, :] / rows.mean(-1).clamp_min(e1)[..., None, None]
    u = g / torch.where(v > e1**2, root(v), e1)
    u = u / ((u**2).mean() ** 0.5 / h["d"]).clamp_min(1.0)
    size = ((p**2).mean() ** 0.5).clamp_min(e2) * min(h["lr"], t**-0.5)
    return p * (1 - h["lr"] * h["weight_decay"]) - size * u, (t, kept)


def muon(p, g, m, h):
    """The iteration from the other side, X ← X (a + b XᵀX + c (XᵀX)²), and not in bfloat16."""
    b = (0.0 if m is None else h["momentum"] * m) + (1 - h["momentum"]) * g
    x = (1 - h["momentum"]) * g + h["momentum"] * b if h["nesterov"] else b
    x = x / (x**2).sum() ** 0.5
    for _ in range(h["ns_steps"]):
        gram = x.T @ x
        first, second, third = h["ns_coefficients"]
        x = x @ (first * torch.eye(len(gram), dtype=x.dtype) + second * gram + third * gram @ gram)
    rows, columns = p.shape
    ratio = {
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral_unclamped": (rows / columns) ** 0.5,
    }.get(h["adjust_lr_fn"], max(1, rows / columns) ** 0.5)
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * ratio * x, b


TEXTBOOK = {
    torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam, torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad, torch.optim.NAdam: nadam, torch.optim.RAdam: radam,
    torch.optim.Adafactor: adafactor, torch.optim.Muon: muon,
}  # fmt: skip


class Bound(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, f, *args):
        return f(self.model, *args)


def clipped(grads, clip):
    """Pascanu et al. 2013, algorithm 1; with the 1e-6 of PyTorch. `clip` is ("norm" or "value", limit)."""
    kind, limit = clip
    if kind == "value":
        return [
            g if g is None else torch.where(g > limit, limit, torch.where(g < -limit, -limit, g))
            for g in grads
        ]
    norm = sum((g**2).sum() for g in grads if g is not None) ** 0.5
    return [g if g is None or norm + 1e-6 < limit else g * limit / (norm + 1e-6) for g in grads]


def unrolled(
    model, optimizer, scheduler, data, loss, batches, measure, weights, seed=0, normalize="batch", clip=None,
    accumulate=1, by=None,
):  # fmt: skip
    """(K,): the measured outputs as one graph of the data weights, through every step of the training.

    by  leaves in the place of what else the training is made from: "params/name", "buffers/name", "data/i",
        and "hypers/name", (T, groups), a hyper-parameter of each step
    """
    by = by or {}
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    schedulers = scheduler if isinstance(scheduler, list) else [scheduler]
    held = {
        id(p): (one, i)
        for one in optimizers
        for i, group in enumerate(one.param_groups)
        for p in group["params"]
    }
    held_by = {k: held[id(p)] for k, p in model.named_parameters() if p.requires_grad and id(p) in held}
    bound = Bound(differentiable(model))
    params = {
        f"model.{k}": by.get(f"params/{k}", p.clone()) for k, p in model.named_parameters() if k in held_by
    }
    buffers = {f"model.{k}": by.get(f"buffers/{k}", b.clone()) for k, b in model.named_buffers()}
    data = [by.get(f"data/{i}", x) for i, x in enumerate(data)]
    memory = dict.fromkeys(params)
    for t, indices in enumerate(batches):
        total, whole = 0.0, weights[indices]
        for part, some in enumerate(indices.chunk(accumulate)):
            seed_step(seed, t, part)
            held = {**params, **buffers}
            losses = functional_call(bound, held, (loss, *(x[some] for x in data)))
            buffers = {k: held[k] for k in buffers}
            total = total + (weights[some] * losses).sum() / (
                len(whole) if normalize == "batch" else whole.sum()
            )
        grads = torch.autograd.grad(total, list(params.values()), create_graph=True, allow_unused=True)
        grads = clipped(grads, clip) if clip else grads
        for k, g in zip(list(params), grads, strict=True):
            if g is not None:
                one, group = held_by[k.removeprefix("model.")]
                hyper = at_step(one.param_groups[group], by, t, group)
                params[k], memory[k] = TEXTBOOK[type(one)](params[k], g, memory[k], hyper)
        for one in filter(None, schedulers):
            one.optimizer.step()  # without gradients it does nothing but silence a warning
            one.step()
    bound.eval()
    return functional_call(bound, {**params, **buffers}, (measure,))


def at_step(group, by, t, index):
    """The hyper-parameters of a group, with leaves in the place of those that `by` names."""
    hyper = dict(group)
    betas = list(hyper.get("betas", ()))
    for key, leaf in by.items():
        name = key.removeprefix("hypers/")
        if name in ("beta1", "beta2"):
            betas[int(name[-1]) - 1] = leaf[t, index]
            hyper["betas"] = tuple(betas)
        elif name != key:
            hyper[name] = leaf[t, index]
    return hyper


def unroll(
    model, optimizer, scheduler, data, loss, batches, measure, weights, seed=0, normalize="batch", along=None,
    clip=None, accumulate=1,
):  # fmt: skip
    """(K, n): the metagradient, by autograd through every step at once; with `along`, (n,), its derivative
    in that direction, by autograd through that."""
    weights = weights.clone().requires_grad_()
    outputs = unrolled(
        model, optimizer, scheduler, data, loss, batches, measure, weights, seed, normalize, clip, accumulate
    )
    twice = along is not None
    found = [torch.autograd.grad(y, weights, retain_graph=True, create_graph=twice)[0] for y in outputs]
    if twice:
        found = [torch.autograd.grad(g @ along, weights, retain_graph=True)[0] for g in found]
    return torch.stack(found)
