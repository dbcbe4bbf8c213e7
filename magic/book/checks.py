"""What a chapter ends its derivations with: agree with a reference, and claim only what holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..show import Figure, old_names


def agree(name: str, mine: Tensor, reference: Tensor, tolerance: float = 1e-6) -> None:
    """Print whether two tensors of one shape agree: to the bit, or within a tolerance.

    tolerance   of the largest difference, relative to the largest number of the reference

    Raises AssertionError, with the difference, if they do neither, or for two shapes.
    """
    mine, reference = (torch.as_tensor(x).detach().cpu() for x in (mine, reference))
    if mine.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(mine.shape)}, the reference has {tuple(reference.shape)}")
    exact = mine.dtype == reference.dtype and torch.equal(_bits(mine), _bits(reference))
    scale = reference.abs().max().clamp_min(1e-300)
    close = bool((mine - reference).abs().max() <= tolerance * scale)
    print(f"{name:<34} {'same bits' if exact else f'agree to {tolerance:.0e}' if close else 'DIFFER'}")
    if not (exact or close):
        difference = ((mine - reference).abs().max() / scale).item()
        raise AssertionError(
            f"{name}: the relative difference is {difference:.2e}, more than {tolerance:.0e}"
        )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def claim(
    text: str,
    holds: bool | float | Figure | Tensor,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    digits: int = 3,
) -> None:
    """Print a claim after asserting it, so that a stored output is a claim that held.

    holds      whether the claim holds; or, with a bound, the number that it bounds: a float, a tensor of
               one element, or a Figure, whose mean has to keep the bound and whose interval is printed
    at_least, at_most
               the bounds; the number is printed beside them, "✓ LDS ≥ 0.98 (0.992 [0.978, 0.996])".
               nbval compares the claim and its bound; the number behind them may differ between machines
    digits     significant digits of the number that is printed

    Raises AssertionError, with the number, for a claim that does not hold, NaN included, and TypeError for a
    number without a bound, which would hold whatever it is.
    """
    if at_least is None and at_most is None:
        if isinstance(holds, Figure) or torch.as_tensor(holds).dtype != torch.bool:
            raise TypeError(f"{text}: {holds} is a number; say what it is at_least, or at_most")
        if not holds:
            raise AssertionError(f"does not hold: {text}")
        print(f"✓ {text}")
        return
    number = holds if isinstance(holds, Figure) else float(holds)
    value = number.mean if isinstance(number, Figure) else number
    said = f"{text} {_bounds(at_least, at_most)}"
    kept = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    if not kept:
        raise AssertionError(f"does not hold: {said}, it is {number:.{digits}g}")
    print(f"✓ {said} ({number:.{digits}g})")


def _bounds(at_least: float | None, at_most: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f"in [{at_least:g}, {at_most:g}]"
    return f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}"


__getattr__ = old_names(__name__, {"compare": "agree"})
