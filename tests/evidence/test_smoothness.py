"""Metasmoothness: 1 where training is linear in the weights, less where it is not, and what is refused."""

import math

import pytest
import torch

import magic
from magic import smoothness
from tests.support import cases


def one_step(lr=0.1):
    """One step of SGD: the trained parameters are linear in the weights, exactly."""
    torch.manual_seed(0)
    model = cases.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return magic.Run(model, optimizer, cases.data(), cases.loss, torch.arange(cases.N)[None])


def test_one_step_is_smooth():
    way = smoothness.directions(cases.N, 0.2, 1)[0]
    assert smoothness.metasmoothness(one_step(), way) == pytest.approx(1.0)
    measure = cases.measure_on(*cases.data())
    near = smoothness.similarity(one_step(lr=1e-3), measure, way)
    assert near.shape == (3,) and (near > 0.999).all()


def test_a_rough_run_is_rougher():
    """The paper's definition, from its words; and a large rate against a small one."""
    way = smoothness.directions(cases.N, 0.2, 1)[0]

    def run(lr):
        torch.manual_seed(0)
        model = cases.mlp().double()
        return magic.Run(
            model, torch.optim.SGD(model.parameters(), lr), cases.data(), cases.loss, cases.order()
        )

    ends = [run(2.0).train(1 + k * 0.5 * way.double(), progress=False).params for k in (0, 1, 2)]
    theta = [torch.cat([p.flatten() for p in end.values()]) for end in ends]
    first, second = theta[1] - theta[0], theta[2] - theta[1]
    share = first.abs() / first.abs().sum()
    expected = first.sign() @ torch.diag(share) @ second.sign()
    rough = smoothness.metasmoothness(run(2.0), way)
    assert rough == pytest.approx(expected.item())
    assert rough < smoothness.metasmoothness(run(0.01), way) - 0.05
    measure = cases.measure_on(*cases.data())
    assert (
        smoothness.similarity(run(2.0), measure, way).mean()
        < smoothness.similarity(run(0.01), measure, way).mean()
    )


def test_a_survey_has_a_row_for_each_run():
    def accuracy(model):
        x, y = cases.data()
        return (model(x).argmax(1) == y).double().mean()

    runs = {"calm": cases.build("sgd")[0], "mad": one_step(lr=1e200)}
    found = smoothness.survey(runs, accuracy, cases.measure_on(*cases.data()), drop=0.1, count=2)
    assert list(found.index) == ["calm", "mad"]
    calm = found.loc["calm"]
    assert calm["low"] <= calm["metasmoothness"] <= calm["high"] <= 1 and 0.5 < calm["cosine"] <= 1
    assert 0.3 < calm["accuracy"] <= 1
    assert math.isnan(found.loc["mad"]["metasmoothness"])


def test_refusals():
    with pytest.raises(ValueError, match=r"direction must be \(40,\)"):
        smoothness.metasmoothness(one_step(), torch.ones(3))
    with pytest.raises(ValueError, match="length=0"):
        smoothness.metasmoothness(one_step(), torch.ones(40), 0)
    with pytest.raises(ValueError, match="do not change"):
        smoothness.metasmoothness(one_step(), torch.full((40,), 1e-30))
