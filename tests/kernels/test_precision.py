"""Models that compute in float32 inside, and gradients that are rounding noise: checked, and not refused.

Models of transformers are like this (tests/engine/test_transformers.py); here are the smallest that are.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import magic
from magic.kernels.precision import InDouble
from tests.kernels.test_stop_gradients import relative_error
from tests.support import cases


class InSingle(nn.Module):
    """The root-mean-square normalisation of Llama-like models: in float32, whatever comes in."""

    def __init__(self, normed=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)):
        super().__init__()
        self.scale, self.normed = nn.Parameter(torch.ones(12)), normed

    def forward(self, x):
        return self.scale * self.normed(x.to(torch.float32)).to(x.dtype)


class CutTwice(torch.autograd.Function):
    """x / rms(x), with a first derivative and without a second."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return pulled(g, *ctx.saved_tensors)


class HalfSlope(CutTwice):
    """x / rms(x), whose second derivative is one half of what it should be."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return pulled(g, 0.5 * (x + x.detach()))


def pulled(g, x):
    """The pullback of x / rms(x)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return scale * g - x * scale**3 * (g * x).mean(-1, keepdim=True)


def build(norm, dtype=torch.float64):
    torch.manual_seed(0)
    first, last = nn.Linear(cases.FEATURES, 12), nn.Linear(12, cases.CLASSES)
    model = nn.Sequential(first, norm, nn.SiLU(), last).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y = cases.data()
    run = magic.Run(model, optimizer, (x.to(dtype), y), cases.loss, cases.order())
    return run, cases.measure_on(*run.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_inside_is_checked_as_sharply_as_float64(dtype):
    run, measure = build(InSingle(), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, measure, progress=False)
    steps = {t: found for t, found in scores.health.witnessed.items() if t < run.steps}
    assert scores.health.ok and len(steps) == 3
    assert max(steps.values()) < 1e-5
    if dtype == torch.float64:
        assert scores.health.witnessed[run.steps] < 1e-5
        with InDouble():  # the same training without the casts, whose finite differences are smooth
            assert relative_error(run, measure, scores) < 1e-5


@pytest.mark.parametrize("norm", [CutTwice.apply, HalfSlope.apply])
def test_a_wrong_derivative_behind_a_cast_is_found(norm):
    run, measure = build(InSingle(norm))
    with pytest.raises(magic.NotDifferentiable, match=r"finite difference gives|differentiated twice"):
        magic.attribute(run, measure, progress=False)


@pytest.mark.parametrize("share", [0.002, 0.2])
def test_a_small_error_does_not_pass_for_rounding(share):
    """A scale that leaves PyTorch and moves the derivative of some step by little more than a thousandth."""

    def normed(x):
        square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(square + 1e-6) * (1 + share * square.mean().item())

    run, measure = build(InSingle(normed))
    with pytest.raises(magic.NotDifferentiable, match="finite difference gives"):
        magic.attribute(run, measure, progress=False, plan=magic.plan(run, 3, states=3))


def test_the_cast_that_is_undone():
    x = torch.linspace(0, 1, 7, dtype=torch.float64)
    count = torch.arange(1, 8)
    with InDouble():
        for y in (x.float(), x.half(), x.to(torch.float32), x.to(dtype=torch.bfloat16)):
            assert torch.equal(y, x) and y.dtype == torch.float64
        assert F.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(3).dtype == (count / 2).dtype == count.float().dtype == torch.float64
        assert count.to(torch.int32).dtype == torch.int32
        held = torch.ones(2, dtype=torch.float64).view(torch.int64).view(torch.float64)
        assert torch.equal(held, torch.ones(2, dtype=torch.float64))
    assert torch.zeros(3).dtype == torch.float32 and x.float().dtype == torch.float32


class Attention(nn.Module):
    """One head. Softmax is blind to the bias of the keys, whose gradient is rounding noise."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 8) for _ in range(3))
        self.out = nn.Linear(8, cases.CLASSES)

    def forward(self, x):
        x = torch.stack([x[:, :4], x[:, 4:8], x[:, :4] * x[:, 4:8]], 1)
        seen = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.out(seen.mean(1))


def gradients(model, run):
    x, y = (part[run.batches[0]] for part in run.data)
    cases.loss(model, x, y).mean().backward()
    return dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_noise_to_which_nothing_listens_is_no_reason_to_warn_or_refuse(rule, dtype):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    x, y = cases.data()
    run = magic.Run(model, getattr(cases, rule)()(model), (x.to(dtype), y), cases.loss, cases.order())
    norms = {name: p.grad.norm() for name, p in gradients(model, run).items()}
    assert norms["key.bias"] < 1e-5 * max(norms.values()), "degenerate: no noise"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    assert scores.health.ok and all(found is not None for found in scores.health.witnessed.values())
