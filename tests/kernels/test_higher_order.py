"""Losses and measures that take gradients themselves: penalties, physics-informed losses, inner steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import magic
from magic.engine import adjoint
from magic.kernels.replace import differentiable
from tests.kernels.test_replace import OPERATIONS, arguments, call


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


def small_run(model, data, loss):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return magic.Run(model, optimizer, data, loss, torch.tensor([[0, 1, 2], [3, 1, 2]]))


def against_differences(run, measure, outputs):
    """Scores of measure against central differences of outputs(trained model), weight by weight."""
    scores = magic.attribute(run, measure, progress=False)
    ones = torch.ones(run.n, dtype=torch.float64)

    def trained(weights):
        return outputs(run.model(run.train(weights=weights, progress=False)).eval()).detach()

    torch.testing.assert_close(scores.outputs.double(), trained(ones))
    for i in range(run.n):
        step = torch.zeros(run.n, dtype=torch.float64)
        step[i] = 1e-4
        slope = (trained(ones + step) - trained(ones - step)) / 2e-4
        torch.testing.assert_close(scores.values[:, i].double(), slope, rtol=1e-6, atol=1e-9)


def test_a_measure_that_takes_gradients():
    torch.manual_seed(1)
    data = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    run = small_run(network(), data, lambda model, x, y: (model(x)[:, 0] - y) ** 2)

    def slopes(model):
        x = data[0][:2].clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].norm(dim=1)

    def after_an_inner_step(model):
        return adapted(model, *data)[2:]

    against_differences(run, slopes, slopes)
    against_differences(run, after_an_inner_step, after_an_inner_step)


class Reader(nn.Module):
    """An encoder over padded sequences; it averages over all positions, padded ones included."""

    def __init__(self, nested):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 1)

    def forward(self, x, pad):
        return self.head(self.encoder(x, src_key_padding_mask=pad).sum(1))[:, 0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_padded_attention_in_a_measure(nested):
    torch.manual_seed(1)
    x, y = torch.randn(4, 4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    pad = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    run = small_run(Reader(nested).double(), (x, pad, y), lambda model, x, pad, y: (model(x, pad) - y) ** 2)

    before = torch.backends.mha.get_fastpath_enabled()
    against_differences(run, lambda model: model(x, pad), lambda model: model(x, pad))
    assert torch.backends.mha.get_fastpath_enabled() == before
