"""magic.verify: the whole derivative against real trainings."""

import pytest
import torch

import magic

from . import cases


@pytest.mark.parametrize(
    "case, dtype", [("adamw", torch.float64), ("sgd", torch.float64), ("sgd", torch.float32)]
)
def test_right_scores_agree_and_one_wrong_number_does_not(case, dtype):
    run, *_ = cases.build(case, dtype)
    scores = magic.attribute(run, cases.measure_on(*cases.data(dtype)), progress=False)
    found = magic.verify(scores, progress=False)
    assert found.ok is True and found.resolved.all()
    assert scores.verification is found and "agrees" in repr(found)
    values = scores.values.clone()
    values[1, 7] += 0.5 * values[1].abs().sum()  # as an exponent's bit flipped in a cotangent would
    wrong = magic.verify(scores.like(values), progress=False)
    assert wrong.ok is False and wrong.agree.tolist() == [True, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_what_cannot_be_judged_is_no_alarm(seed):
    """Adam's first steps are nearly steps of the sign: in float32 no step size resolves every slope."""
    run, *_ = cases.build("adamw", torch.float32)
    scores = magic.attribute(run, cases.measure_on(*cases.data(torch.float32)), progress=False)
    assert magic.verify(scores, seed=seed, progress=False).ok is not False


def test_what_cannot_be_verified_says_so():
    run, *_ = cases.build("sgd")
    measure = cases.measure_on(*cases.data())
    path = magic.attribute(run, measure, "path", False, drop=0.2)
    with pytest.raises(ValueError, match="several points"):
        magic.verify(path)
    nothing = magic.attribute(run, measure, 0.0, False)
    with pytest.raises(ValueError, match="near 0"):
        magic.verify(nothing)
    scores = magic.attribute(run, measure, progress=False)
    with pytest.raises(ValueError, match="step=2"):
        magic.verify(scores, step=2)
    scores.run = None
    with pytest.raises(ValueError, match="no run"):
        magic.verify(scores)


def test_health_is_unknown_where_nothing_was_checked():
    assert magic.Health(16, (), 0, {}).ok is None
    assert magic.Health(16, (), 3, {}).ok is True
    assert magic.Health(16, (), 3, {5: None}).ok is False
