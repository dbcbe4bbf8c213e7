"""Second derivatives of training: against an autograd graph over the whole run, and what they predict."""

import dataclasses

import pytest
import torch

import magic
from magic.evidence.curvature import Curvature
from tests.support import cases
from tests.support.unroll import unroll

pytestmark = pytest.mark.usefixtures("unwitnessed")


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
    "name, way",
    [
        ("sgd-momentum", "down"), ("sgd-momentum", "random"), ("adamw", "random"), ("batchnorm-conv", "down"),
        ("dropout", "random"), ("sgd-onecycle", "down"), ("lstm", "random"),
    ],
)  # fmt: skip
def test_against_a_full_unroll_differentiated_twice(name, way):
    scores = attributed(name)
    random = torch.randn(scores.at.shape, generator=torch.Generator().manual_seed(3)).to(scores.at)
    direction = random if way == "random" else -torch.ones_like(scores.at)
    expected = truth(name, direction)
    assert expected.norm() > 1e-4, "degenerate: training is linear here"
    found = magic.curvature(scores, direction, order=4, progress=False)
    error = ((found.values - expected).norm() / expected.norm()).item()
    print(f"{name:<16} {error:.1e}")
    assert error <= 1e-5
    assert torch.allclose(found.second, expected @ direction, rtol=1e-4, atol=1e-6 * expected.norm())


def test_scores_from_a_file(tmp_path):
    scores = attributed("adamw")
    scores.save(tmp_path / "scores.npz")
    loaded = magic.Attribution.load(tmp_path / "scores.npz", scores.run, scores.measure)
    assert loaded.plan is None
    found = magic.curvature(loaded, progress=False)
    assert torch.equal(found.values, magic.curvature(scores, progress=False).values)
    assert found.values.abs().max() > 0 and loaded.health.trusted == scores.health.trusted


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
    assert scores.health.trusted is None and scores.health.sized is None
    bent = magic.curvature(scores, progress=False)
    assert scores.health.trusted == bent.trusted() > 0
    assert bent.correlation(0.0) == pytest.approx([1.0] * 3)
    assert (bent.correlation(0.01) > bent.correlation(0.3)).all()
    assert scores.health.sized == bent.sized() > 0
    assert "correlation, at most" in repr(bent) and "R², at most" in repr(bent)
    assert "may rank removals" in repr(scores.health) and "may size removals" in repr(scores.health)
    assert "at best" in repr(scores.health) and "not to be trusted" not in repr(scores.health)
    turning = dataclasses.replace(bent, values=1e3 * bent.values)
    assert turning.trusted() == 0.0
    health = dataclasses.replace(scores.health, trusted=0.0)
    assert not health.ok and "turns so fast" in health.problems[-1]


def test_sizes_fail_before_ranks():
    """R² is told, too, and it falls below the correlation's square: a level spoils it, and no ranking."""
    bent = magic.curvature(attributed("sgd-momentum"), progress=False)
    bent = dataclasses.replace(bent, values=20 * bent.values)
    correlation, r2 = (forecast(0.3).mean().item() for forecast in (bent.correlation, bent.r2))
    assert r2 < correlation**2 < 1
    assert bent.r2(0.01) == pytest.approx(torch.ones(3), abs=0.2)
    assert 0 < bent.sized(r2=0.9) < bent.sized(r2=0.1) < 0.5


def test_r2_of_a_quadratic_function():
    """The forecast is right where nothing is curved among the sets: f = τ·w + ½ a (1·w − n)²."""
    n, drop, bend = 200, 0.2, 0.05
    g = torch.Generator().manual_seed(0)
    slope = torch.randn(1, n, generator=g, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    scores = magic.Attribution(slope, slope.sum(1), ones)
    direction, turn = -ones, torch.randn(1, n, generator=g, dtype=torch.float64)
    bent = Curvature(scores, direction, -bend * n * ones[None] + 0.3 * turn)
    sets = magic.subsets.random(n, drop, 4000).double()
    moved = sets - 1
    level = 0.5 * drop**2 * bent.second
    true = scores.predict(sets) + level + drop * (moved + drop) @ bent.values.T
    found = magic.Comparison(scores.predict(sets), true, scores.outputs)
    assert bent.r2(drop).item() == pytest.approx(found.r2.mean, rel=0.05)
    assert found.r2.mean < 0 < 0.9 < found.pearson.mean <= bent.correlation(drop).item() + 0.01


def test_an_older_health_is_read():
    health = dataclasses.replace(attributed("sgd").health, trusted=0.3, sized=0.1)
    assert type(health).of(health.note()) == health
    older = {name: value for name, value in health.note().items() if name != "sized"}
    assert type(health).of(older) == dataclasses.replace(health, sized=None)


def test_health_says_why_nothing_was_compared():
    health = attributed("sgd").health
    assert "recomputed states had" in repr(dataclasses.replace(health, verified=3))
    said = repr(dataclasses.replace(health, verified=0))
    assert (
        "none: no state that training noted was computed a second time" in said and "0 recomputed" not in said
    )


def test_refusals():
    scores = attributed("sgd")
    with pytest.raises(ValueError, match=r"direction must be \(40,\)"):
        magic.curvature(scores, torch.ones(3))
    with pytest.raises(ValueError, match="not 0"):
        magic.curvature(scores, torch.zeros(40))
    with pytest.raises(ValueError, match="order=3: 2 or 4"):
        magic.curvature(scores, order=3)
    with pytest.raises(ValueError, match="are of no replay"):
        magic.curvature(scores.like(scores.values))
    for where in (magic.points.path(scores.run, 0.2, 1), magic.points.average(scores.run, 0.2, 2)):
        mean = magic.attribute(scores.run, scores.measure, where, progress=False)
        with pytest.raises(ValueError, match="one point"):
            magic.curvature(mean)
