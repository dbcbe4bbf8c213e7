"""magic.verify: the whole derivative against real trainings."""

import json

import numpy as np
import pytest
import torch

import magic
from tests.support import cases


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
    path = magic.attribute(run, measure, "path", drop=0.2, progress=False)
    with pytest.raises(ValueError, match="several points"):
        magic.verify(path)
    nothing = magic.attribute(run, measure, 0.0, progress=False)
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


def test_a_saved_file_keeps_what_is_known_of_its_numbers(tmp_path):
    run, *_ = cases.build("sgd")
    scores = magic.attribute(run, cases.measure_on(*cases.data()), progress=False)
    found = magic.verify(scores, progress=False)
    scores.save(tmp_path / "scores.npz")
    back = magic.Attribution.load(tmp_path / "scores.npz", run, scores.measure)
    assert back.health == scores.health and back.health.ok is True and back.health.witnessed
    assert repr(back.verification) == repr(found) and torch.equal(back.verification.true, found.true)
    back.save(tmp_path / "again.npz")
    assert repr(magic.Attribution.load(tmp_path / "again.npz").verification) == repr(found)
    other = scores.like(scores.values * 2)
    assert other.health is None and other.verification is None, "they are not known of other numbers"
    other.save(tmp_path / "other.npz")
    assert magic.Attribution.load(tmp_path / "other.npz").health is None


@pytest.mark.parametrize(
    "meta", [{"health": {"steps": 3}}, {"health": [1]}, {"verification": {"predicted": [1], "true": []}}]
)
def test_a_file_that_lies_about_its_health_is_refused(meta, tmp_path):
    numbers = {"values": np.zeros((1, 2)), "outputs": np.zeros(1), "at": np.ones(2)}
    text = json.dumps({"run": None} | meta).encode()
    np.savez(tmp_path / "x.npz", meta=np.frombuffer(text, dtype=np.uint8), **numbers)
    with pytest.raises(ValueError, match=r"not written by Attribution\.save"):
        magic.Attribution.load(tmp_path / "x.npz")
