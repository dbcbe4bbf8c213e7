"""Second derivatives of training: against an autograd graph over the whole run, and what they predict."""

import dataclasses

import pytest
import torch

import magic
from tests.support import cases
from tests.support.unroll import unroll


def attributed(name):
    run, *_ = cases.build(name)
    return magic.attribute(run, cases.measure_on(*run.data), progress=False)


def truth(name, direction):
    """(K, n): H d. Nothing of magic's step or adjoint is used."""
    run, model, optimizer, scheduler = cases.build(name)
    return unroll(
        model, optimizer, scheduler, run.data, cases.loss, cases.order(), cases.measure_on(*run.data),
        run.weights(), run.seed, run.normalize, along=direction,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["sgd-momentum", "adamw", "batchnorm-conv", "dropout", "sgd-onecycle", "lstm"]
)
def test_against_a_full_unroll_differentiated_twice(name):
    scores = attributed(name)
    random = torch.randn(scores.at.shape, generator=torch.Generator().manual_seed(3)).to(scores.at)
    for direction in (-torch.ones_like(scores.at), random):
        expected = truth(name, direction)
        assert expected.norm() > 1e-4, "degenerate: training is linear here"
        found = magic.curvature(scores, direction, order=4, progress=False)
        error = ((found.values - expected).norm() / expected.norm()).item()
        print(f"{name:<16} {error:.1e}")
        assert error <= 1e-5
        assert torch.allclose(found.second, expected @ direction, rtol=1e-4, atol=1e-6 * expected.norm())


def test_order_4_is_exacter_than_order_2():
    scores = attributed("sgd-momentum")
    down = -torch.ones_like(scores.at)
    expected = truth("sgd-momentum", down)
    errors = [
        (magic.curvature(scores, down, order=order, step=0.02, progress=False).values - expected).norm()
        for order in (2, 4)
    ]
    assert 0 < errors[1] < 0.1 * errors[0]


def test_a_step_wider_than_the_kinks_warns():
    """Adam's first step is the sign of the gradient, but for eps: differences across it mean nothing."""
    scores = attributed("adamw")
    random = torch.randn(scores.at.shape, generator=torch.Generator().manual_seed(3)).to(scores.at)
    with pytest.warns(UserWarning, match="disagree by"):
        magic.curvature(scores, random, step=1e-3, progress=False)


def test_to_second_order_is_nearer_than_to_first():
    scores = attributed("sgd")
    bent = magic.curvature(scores, progress=False)
    true = magic.outputs(scores.run, scores.measure, scores.run.weights(0.8))
    first = (scores.outputs + 0.2 * bent.slope - true).abs()
    second = (bent.predict(0.2) - true).abs()
    assert (second < 0.5 * first).all()


def test_health_is_told():
    scores = attributed("sgd")
    assert scores.health.trusted is None
    bent = magic.curvature(scores, progress=False)
    assert scores.health.trusted == bent.trusted() > 0
    assert bent.correlation(0.0) == pytest.approx([1.0] * 3)
    assert (bent.correlation(0.01) > bent.correlation(0.3)).all()
    assert "correlation, at most" in repr(bent) and "trusted for removals" in repr(scores.health)
    turning = dataclasses.replace(bent, values=1e3 * bent.values)
    assert turning.trusted() == 0.0
    health = dataclasses.replace(scores.health, trusted=0.0)
    assert not health.ok and "turns so fast" in health.problems[-1]


def test_refusals():
    scores = attributed("sgd")
    with pytest.raises(ValueError, match=r"direction must be \(40,\)"):
        magic.curvature(scores, torch.ones(3))
    with pytest.raises(ValueError, match="not 0"):
        magic.curvature(scores, torch.zeros(40))
    with pytest.raises(ValueError, match="order=3: 2 or 4"):
        magic.curvature(scores, order=3)
    with pytest.raises(ValueError, match="run, measure and plan"):
        magic.curvature(scores.like(scores.values))
    for where in (magic.points.path(scores.run, 0.2, 1), magic.points.average(scores.run, 0.2, 2)):
        mean = magic.attribute(scores.run, scores.measure, where, progress=False)
        with pytest.raises(ValueError, match="one point"):
            magic.curvature(mean)
