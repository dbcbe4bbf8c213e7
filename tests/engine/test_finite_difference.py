"""A slope by finite differences, where it can be told and where it cannot."""

import math

import pytest
import torch

from magic.engine.finite_difference import Slope, in_double, random_like, steady

STEPS, TOLERANCE, ROUNDING = (1e-7, 1e-6, 1e-4, 1e-3, 1e-2), 1e-3, 1e-9


def asked(along, seen):
    return steady(along, STEPS, TOLERANCE, seen, ROUNDING)


def test_a_smooth_function_has_its_slope():
    slope = asked(lambda x: math.sin(1.0 + 3 * x), seen=3 * math.cos(1.0))
    assert slope.value == pytest.approx(3 * math.cos(1.0), rel=1e-6)
    assert slope.agrees(3 * math.cos(1.0), TOLERANCE) and slope.gap(3 * math.cos(1.0)) < 1e-6


def test_a_slope_that_autograd_does_not_see_is_found():
    slope = asked(lambda x: 5.0 * x, seen=2.0)
    assert slope is not None and slope.value == pytest.approx(5.0)
    assert not slope.agrees(2.0, TOLERANCE) and slope.gap(2.0) == pytest.approx(0.6)


def test_what_moves_though_autograd_sees_nothing_is_found():
    slope = asked(lambda x: 4.0 * x, seen=0.0)
    assert slope is not None and not slope.agrees(0.0, TOLERANCE)


def test_a_function_that_jumps_has_no_slope():
    """A quantity rounded to coarse steps, as low precision gives it: no step size agrees with its double."""
    assert asked(lambda x: round(x / 3e-3) * 3e-3 + (x > 0), seen=1.0) is None


def test_rounding_is_measured_and_puts_the_step_up():
    """With noise of 1e-8, a step of 1e-7 tells nothing, and one of 1e-4 does."""
    dice = torch.Generator().manual_seed(0)

    def noisy(x):
        return 2.0 * x + 1e-8 * torch.randn((), generator=dice, dtype=torch.float64).item()

    slope = asked(noisy, seen=2.0)
    assert slope is not None and slope.agrees(2.0, TOLERANCE)
    assert 0 < slope.doubt < 0.2


def test_a_slope_lost_in_rounding_is_not_told():
    dice = torch.Generator().manual_seed(0)

    def noise(x):
        return 1e-3 * x + torch.randn((), generator=dice, dtype=torch.float64).item()

    assert asked(noise, seen=1e-3) is None


def test_the_doubt_excuses_no_more_than_itself():
    slope = Slope(value=1.0, doubt=0.05, tolerance=TOLERANCE)
    assert slope.agrees(1.04, tolerance=0.0) and slope.agrees(0.96, tolerance=0.0)
    assert not slope.agrees(1.06, tolerance=0.0)
    assert slope.agrees(1.06, tolerance=0.02)


def test_random_numbers_are_those_of_the_dice():
    x = torch.zeros(3, 2, dtype=torch.float64)
    a, b = (random_like(x, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and a.dtype == x.dtype and a.std() > 0
    assert not torch.equal(a, random_like(x, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.int64, torch.int64)],
)
def test_in_double(dtype, expected):
    assert in_double(torch.ones(2, dtype=dtype)).dtype == expected
