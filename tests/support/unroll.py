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


TEXTBOOK = {
    torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam, torch.optim.RMSprop: rmsprop,
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


def unroll(
    model, optimizer, scheduler, data, loss, batches, measure, weights, seed=0, normalize="batch", along=None,
    clip=None, accumulate=1,
):  # fmt: skip
    """(K, n): the metagradient, by autograd through every step at once; with `along`, (n,), its derivative
    in that direction, by autograd through that."""
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    group_of = {k: groups[id(p)] for k, p in model.named_parameters() if p.requires_grad}
    bound = Bound(differentiable(model))
    params = {f"model.{k}": p.clone() for k, p in model.named_parameters() if p.requires_grad}
    buffers = {f"model.{k}": b.clone() for k, b in model.named_buffers()}
    memory = dict.fromkeys(params)
    update = next(rule for kind, rule in TEXTBOOK.items() if isinstance(optimizer, kind))
    weights = weights.clone().requires_grad_()
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
                h = optimizer.param_groups[group_of[k.removeprefix("model.")]]
                params[k], memory[k] = update(params[k], g, memory[k], h)
        if scheduler is not None:
            optimizer.step()  # without gradients it does nothing but silence a warning
            scheduler.step()
    bound.eval()
    outputs = functional_call(bound, {**params, **buffers}, (measure,))
    twice = along is not None
    found = [torch.autograd.grad(y, weights, retain_graph=True, create_graph=twice)[0] for y in outputs]
    if twice:
        found = [torch.autograd.grad(g @ along, weights, retain_graph=True)[0] for g in found]
    return torch.stack(found)
