"""The verdict of a few trainings on a whole derivative: what `magic.verify` finds, and scores keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..show import Table

SURE = 0.1  # a finite difference is sharp enough to judge by if its doubt is a tenth of the slope, or less


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Table):
    """What trainings along one random direction say of the scores.

    predicted, true  (K,): the slope of each output by the scores, and by finite differences
    doubt            (K,): how far curvature and rounding may have moved the finite difference
    steps            every ε that was tried, the largest first; each is a pair of trainings
    """

    predicted: Tensor
    true: Tensor
    doubt: Tensor
    steps: tuple[float, ...]

    def note(self) -> dict:
        """What JSON can keep of it; `of` reads it."""
        return {
            name: list(map(float, getattr(self, name))) for name in ("predicted", "true", "doubt", "steps")
        }

    @classmethod
    def of(cls, note: dict) -> Verification:
        """What `note` kept. Raises ValueError, TypeError or KeyError for anything else."""
        names = ("predicted", "true", "doubt")
        predicted, true, doubt = (torch.tensor(note[name], dtype=torch.float64) for name in names)
        if not predicted.shape == true.shape == doubt.shape or predicted.dim() != 1:
            raise ValueError("its verification has unequal lengths")
        return cls(predicted, true, doubt, tuple(map(float, note["steps"])))

    @property
    def resolved(self) -> Tensor:
        """(K,): whether the finite difference is sharp enough to judge this target."""
        return self.doubt <= SURE * torch.maximum(self.true.abs(), self.predicted.abs())

    @property
    def agree(self) -> Tensor:
        """(K,): whether scores and trainings differ by no more than the doubt, or cannot be told apart."""
        return ((self.predicted - self.true).abs() <= self.doubt) | ~self.resolved

    @property
    def ok(self) -> bool | None:
        """Whether every target that can be judged agrees; None where there is none."""
        if not self.agree.all():
            return False
        return True if self.resolved.any() else None

    @property
    def caption(self) -> str:
        return f"The whole derivative against {2 * len(self.steps)} trainings"

    def rows(self) -> list[tuple[str, str]]:
        known = self.resolved
        moved = ", ".join(f"±{step:g}" for step in self.steps)
        gap = (self.predicted - self.true).abs() / self.true.abs().clamp_min(1e-300)
        worst = f"{gap[known].max().item():.0e}" if known.any() else "not known"
        return [
            ("targets judged", f"{int(known.sum())} of {len(known)}; weights moved by {moved}"),
            ("largest difference", f"{worst}, relative to the slope"),
            ("verdict", {True: "agrees", False: "DIFFERS", None: "cannot tell"}[self.ok]),
        ]
