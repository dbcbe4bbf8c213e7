"""A slope by finite differences, along a random direction, with the doubt that rounding leaves in it.

A finite difference has doubts of its own: rounding, which is measured on the spot, and kinks, which two
step sizes see differently. What lies within these doubts is no error of the derivative that is compared
with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = 3  # tried before a derivative is called wrong


@dataclass(frozen=True)
class Slope:
    """A slope by finite differences, and how far rounding may have moved it."""

    value: float
    doubt: float
    tolerance: float

    def gap(self, seen: float) -> float:
        """The relative difference to the slope that was seen."""
        return abs(seen - self.value) / max(abs(seen), abs(self.value), 1e-300)

    def agrees(self, seen: float, tolerance: float) -> bool:
        """Whether the slope that was seen is this one, up to the tolerance and the doubt."""
        return abs(seen - self.value) <= tolerance * max(abs(seen), abs(self.value)) + self.doubt


def steady(
    along: Callable[[float], float], steps: tuple[float, ...], tolerance: float, seen: float, rounding: float
) -> Slope | None:
    """The slope of along(ε) at 0, from the first step size at which half and whole steps agree.

    along      a number as a function of ε
    steps      the step sizes to try, the preferred ones first
    tolerance  how far half and whole steps may differ, relative to the slope
    seen       the slope as autograd gives it
    rounding   a step so small that beside `seen` nothing but rounding shows, which is measured with it:
               at four such steps, the largest distance from the straight line of slope `seen`

    None if there is no such step size. One at which rounding hides more than a tenth of the slope tells
    nothing and is passed over. So does one at which nothing moves, where `seen` would move a number by less
    than 1 has digits for: a loss log(1 + e⁻⁴³) is 0, and its derivative is not.
    """
    base = along(0.0)
    noise = max(abs(along(k * rounding) - base - k * rounding * seen) for k in (1, -1, 2, -3))
    for h in steps:
        near, far = ((along(k * h) - along(-k * h)) / (2 * k * h) for k in (1, 2))
        if near == far == 0 and 0 < abs(seen) * h <= torch.finfo(torch.float64).eps:
            continue
        doubt = 3 * noise / h
        if abs(near - far) <= tolerance * max(abs(near), abs(far)) and doubt <= 0.1 * max(
            abs(near), abs(seen)
        ):
            return Slope(near, doubt, tolerance)
    return None


def random_like(x: Tensor, dice: torch.Generator) -> Tensor:
    """Normal random numbers of the shape of `x`, the same on every device."""
    return torch.randn(x.shape, generator=dice, dtype=x.dtype, device="cpu").to(x.device)


def in_double(x: Tensor) -> Tensor:
    """`x` in float64 if it is floating-point."""
    return x.double() if x.is_floating_point() else x


def warn(why: str) -> None:
    """Warn, as from the caller of the check that calls this."""
    warnings.warn(why, stacklevel=3)
