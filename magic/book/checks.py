"""What a chapter ends its derivations with: agree with a reference, and claim only what holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..show import old_names


def agree(name: str, mine: Tensor, reference: Tensor, tolerance: float = 1e-6) -> None:
    """Print whether two tensors of one shape agree: to the bit, or within a tolerance.

    tolerance   of the largest difference, relative to the largest number of the reference

    Raises AssertionError, with the difference, if they do neither, or for two shapes.
    """
    mine, reference = torch.as_tensor(mine).detach(), torch.as_tensor(reference).detach()
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


def claim(text: str, holds: bool) -> None:
    """Print a claim after asserting it, so that a stored output is a claim that held.

    Raises AssertionError for one that does not.
    """
    if not holds:
        raise AssertionError(f"does not hold: {text}")
    print(f"✓ {text}")


__getattr__ = old_names(__name__, {"compare": "agree"})
