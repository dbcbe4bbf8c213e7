"""Properties that every training run has, tested on runs drawn at random (tests/support/drawn.py).

By default a few draws, the same ones each time; with a number, so many new ones:

    MAGIC_MANY=500 pytest tests/engine/test_properties.py
"""

import dataclasses
import os
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import magic
from tests.support import drawn

MANY = int(os.environ.get("MAGIC_MANY", 0))
BOUND, SHARP, BATCHED = 1e-7, 1e-8, 1e-10


def examine(draw, folder):
    """Raise AssertionError where this run breaks a property."""
    run, model, optimizer, scheduler, at = draw.build()
    measure = drawn.measure_on(run, draw.keeps)
    final = run.train(progress=False)
    plain = drawn.plain_loop(run, model, optimizer, scheduler)
    ours = {**final.params, **final.buffers}
    different = [name for name, x in plain.items() if not torch.equal(x, ours[name])]
    assert different == [], "other bits than the plain loop's"

    scores = magic.attribute(run, measure, at=at, progress=False)
    size = scores.values.norm(dim=1)
    assert scores.values.isfinite().all()
    disk = folder if draw.plan == "disk" else None
    with mock.patch("magic.engine.listeners.check_step", return_value=0.0):  # done above
        other = magic.attribute(run, measure, at=at, plan=draw.other_plan(run), disk=disk, progress=False)
        alone = magic.attribute(run, lambda model: measure(model)[1:2], at=at, progress=False).values[0]
    assert torch.equal(other.values, scores.values), "another plan, other bits"
    gap = (alone - scores.values[1]).norm() / size[1].clamp_min(1e-12)
    assert gap <= BATCHED, f"batched differs from single by {gap:.1e}"
    return against_differences(run, measure, scores, draw.seed)


def against_differences(run, measure, scores, seed):
    """Compare the scores along a random direction v with finite differences; how far these are to be doubted.

    An error counts relative to the slope, or to what a target's scores come to along a direction like v,
    ‖τ_k‖ ‖v‖ / √n, where that is larger: large scores may cancel by chance. Finite differences that doubt
    themselves cannot judge to the bound, but the scores must lie within what they allow.
    """
    v = torch.randn(run.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    predicted = scores.values @ v
    scale = torch.maximum(predicted.abs(), scores.values.norm(dim=1) * v.norm() / run.n**0.5).clamp_min(
        1e-300
    )
    true, doubt = drawn.slope(run, measure, scores.at, v, scale, BOUND / 100)
    error = ((predicted - true).abs() / scale).max().item()
    assert error <= (BOUND if doubt <= SHARP else 10 * doubt), (
        f"scores {predicted}, finite differences {true}, relative {error:.1e}, doubt {doubt:.1e}"
    )
    return error, doubt


FIRST = drawn.Draw(**{part: choices[0] for part, choices in drawn.CHOICES.items()})
WERE_WRONG = {
    # one more step gave the update's adjoint other bits than the trace did
    "bits of a plan": {"source": "words", "norm": "batch-slow", "act": "gelu", "base": "smoothed"}
    | {"extra": "penalty", "optimizer": "amsgrad", "batches": "repeated", "weights": "random", "seed": 690},
    # the second forward pass writes the buffers that the first one's graph holds
    "a buffer written after it was read": {"act": "gelu", "base": "taught", "extra": "penalty"}
    | {"keeps": "average", "optimizer": "adam"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WERE_WRONG)
def test_what_once_was_wrong(name, tmp_path):
    examine(dataclasses.replace(FIRST, **WERE_WRONG[name]), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_runs_drawn_at_random(tmp_path):
    """Of three in four draws at least, finite differences must be sharp enough to judge to the bound."""
    found = []

    @settings(
        max_examples=MANY or 10,
        derandomize=not MANY,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink] if MANY else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.builds(drawn.Draw, **{part: st.sampled_from(of) for part, of in drawn.CHOICES.items()}))
    def examined(draw):
        found.append((examine(draw, tmp_path / str(len(found))), draw))

    examined()
    blunt = [draw for (_, doubt), draw in found if doubt > SHARP]
    largest = max(error for (error, doubt), _ in found if doubt <= SHARP)
    print(f"{len(found)} draws, {len(blunt)} not sharp; largest error of the others {largest:.1e}")
    assert len(found) >= (MANY or 10) * 0.8 and len(blunt) <= len(found) // 4, blunt
    for part in drawn.CHOICES.keys() - {"seed"}:
        assert len({getattr(draw, part) for _, draw in found}) > 1, f"always the same {part}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_error_above_the_bound_is_seen(optimizer):
    """A part in 10⁶ of one example's score, in one target."""
    draw = dataclasses.replace(FIRST, optimizer=optimizer)
    run, *_, at = draw.build()
    scores = magic.attribute(run, drawn.measure_on(run), at=at, progress=False)
    against_differences(run, scores.measure, scores, 0)
    scores.values[1, scores.values[1].abs().argmax()] *= 1 + 1e-6
    with pytest.raises(AssertionError, match="finite differences"):
        against_differences(run, scores.measure, scores, 0)
