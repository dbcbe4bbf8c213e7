"""Losses and measures that take gradients themselves: penalties, physics-informed losses, inner steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import magic
from magic import adjoint
from magic.equivalents import differentiable

from .test_equivalents import OPERATIONS, arguments, call


def descended(f, inputs, times):
    """f differentiated `times` times with respect to all inputs, each time along a fixed random direction."""
    y = call(f, inputs)
    for seed in range(times):
        direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
        found = torch.autograd.grad((y.sin() * direction).sum(), inputs, create_graph=True)
        y = 0.1 * torch.cat([x.flatten() for x in found])
    return y


@pytest.mark.parametrize("inside", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_third_and_fourth_derivatives(name, inside):
    """The gradient of a loss that holds `inside` derivatives, against finite differences of it."""
    f, inputs = arguments(name)

    def first(*inputs):
        with differentiable():
            loss = descended(f, inputs, inside).sin().sum()
        return torch.autograd.grad(loss, inputs, create_graph=True)

    assert torch.autograd.gradcheck(first, inputs, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_many_cotangents_of_a_penalty(name):
    f, inputs = arguments(name)
    with differentiable():
        loss = descended(f, inputs, 1).sin().sum()
    outputs = torch.autograd.grad(loss, inputs, create_graph=True)
    cotangents = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
    pulled = list(adjoint.pull(list(outputs), list(inputs), lambda rows: [c[rows] for c in cotangents], 3))
    together = [torch.cat(xs) for xs in zip(*(products for _, products in pulled), strict=True)]
    for k in range(3):
        alone = torch.autograd.grad(outputs, inputs, [c[k] for c in cotangents], retain_graph=True)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[k], rtol=1e-9, atol=1e-10)


def network():
    torch.manual_seed(0)
    layers = nn.Linear(2, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 1)
    return nn.Sequential(*layers).double()


def penalty(model, x, y):
    x = x.clone().requires_grad_()
    out = model(x)[:, 0]
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return (out - y) ** 2 + 0.3 * slope.square().sum(1)


def penalty_by_func(model, x, y):
    slope = vmap(grad(lambda x: model(x)[0]))(x)
    return (model(x)[:, 0] - y) ** 2 + 0.3 * slope.square().sum(1)


def curvature(model, x, y):
    """A physics-informed loss, u'' + u = y; a fourth derivative, so without LayerNorm (see below)."""
    x = x.clone().requires_grad_()
    u = model(x)[:, 0]
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
    return (bend[:, 0] + u - y) ** 2


def adapted(model, x, y):
    """One inner step of MAML on half of the batch, then the losses of all."""
    params = dict(model.named_parameters())
    inner = F.mse_loss(model(x[:2])[:, 0], y[:2])
    slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), slopes, strict=True)}
    return (functional_call(model, fast, (x,))[:, 0] - y) ** 2


LOSSES = {"penalty": penalty, "by torch.func": penalty_by_func, "curvature": curvature, "MAML": adapted}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_takes_gradients(name):
    """Scores against central differences of whole trainings; and a trace has training's bits."""
    model = network()
    if name == "curvature":
        model = nn.Sequential(model[0], model[2], model[3])
    torch.manual_seed(1)
    data = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    order = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]])
    run = magic.Run(model, optimizer, data, LOSSES[name], order)

    def measure(model):
        return model(data[0][:2])[:, 0]

    scores = magic.attribute(run, measure, progress=False).values
    ones = torch.ones(6, dtype=torch.float64)

    def outputs(weights):
        return measure(run.model(run.train(weights=weights, progress=False))).detach()

    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = 1e-4
        slope = (outputs(ones + step) - outputs(ones - step)) / 2e-4
        torch.testing.assert_close(scores[:, i].double(), slope, rtol=1e-6, atol=1e-9)

    state = run.initial
    traced = adjoint.trace(run, state, ones)
    stepped = run.step(state, ones)
    assert all(torch.equal(traced.after.params[k], p) for k, p in stepped.params.items())
