"""What is measured is compared with finite differences in float64, whatever the run's precision is."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import magic
from magic.engine.adjoint import measure_vjp
from magic.engine.measure_witness import check_measure
from tests.support import cases


def trained(epochs, dtype=torch.float32, seed=0):
    """A net that has learnt its examples well, and its measured losses of the first two."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).to(dtype)
    x = torch.randn(40, 8).to(dtype)
    y = x[:, :3].argmax(1)

    def loss(model, x, y):
        return cross_entropy(model(x), y, reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), loss, magic.batches(40, 20, epochs, seed=seed))
    return run, lambda model: cross_entropy(model(x[:2]), y[:2], reduction="none")


@pytest.mark.parametrize("seed", range(4))
def test_a_small_loss_is_no_alarm(seed):
    run, measure = trained(12, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, measure, progress=False)
    assert scores.outputs.min() < 0.02
    assert scores.health.witnessed[run.steps] < 1e-5, "in float32 it would be known to two digits at best"


def test_a_derivative_that_is_rounding_is_told():
    run, measure = trained(400)
    with pytest.warns(UserWarning, match="of the derivative of output [01] of measure is rounding.*a logit"):
        scores = magic.attribute(run, measure, progress=False)
    assert scores.outputs.min() < 1e-5
    assert scores.health.witnessed[run.steps] is None and scores.health.ok is False


def test_a_measure_that_insists_on_float32_is_compared_in_it():
    run, measure = trained(4)

    def insists(model):
        if next(model.parameters()).dtype != torch.float32:
            raise RuntimeError("my kernel takes float32 only")
        return measure(model)

    scores = magic.attribute(run, insists, progress=False)
    assert torch.equal(scores.values, magic.attribute(run, measure, progress=False).values)
    assert 1e-7 < scores.health.witnessed[run.steps] < 2e-2


@pytest.mark.parametrize("out", [lambda x: x.item(), lambda x: float(x.detach().numpy())])
def test_a_way_out_of_pytorch_is_found_in_any_precision(out):
    for dtype in (torch.float32, torch.float64):
        run, *_ = cases.build("sgd", dtype)
        honest = cases.measure_on(*cases.data(dtype))

        def measure(model, honest=honest):
            losses = honest(model)
            return losses * out(losses.sum())

        with pytest.raises(magic.NotDifferentiable, match="measure"):
            magic.attribute(run, measure, progress=False)


def test_a_cotangent_that_is_off_is_refused():
    """As PyTorch's batched derivative of an operation may be, where that of one output is right."""
    run, measure = trained(4)
    final = run.train(progress=False)
    right = measure_vjp(run, final, measure)
    assert check_measure(run, final, measure, right) < 1e-5
    for name in right.params:
        wrong = right.map(torch.clone)
        wrong.params[name][1] *= 1.1
        with pytest.raises(magic.NotDifferentiable, match="do not add up to that of their sum"):
            check_measure(run, final, measure, wrong)


@pytest.mark.parametrize("shape", [(), (0,)])
def test_the_first_parameter_may_have_any_shape(shape):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.ones(shape)), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(x) * (self.scale.sum() + (self.scale.numel() == 0))

    torch.manual_seed(0)
    model, (x, y) = Scaled().double(), cases.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = magic.Run(model, optimizer, (x, y), cases.loss, cases.order())
    scores = magic.attribute(run, cases.measure_on(x, y), progress=False)
    assert scores.values.abs().max() > 0 and scores.health.witnessed[run.steps] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_zero_to_the_last_digit_is_no_alarm(dtype):
    """Its derivative is e⁻⁴³, and no difference of it can be seen."""
    run, _ = trained(1, dtype)

    def measure(model):
        logits = model(torch.ones(1, 8, dtype=next(model.parameters()).dtype))
        return cross_entropy(0.01 * logits + torch.tensor([[43.0, 0, 0]]), torch.tensor([0]))[None]

    with pytest.warns(UserWarning, match="could not be checked|is rounding"):
        scores = magic.attribute(run, measure, progress=False)
    assert scores.outputs == 0 and scores.health.witnessed[run.steps] is None
