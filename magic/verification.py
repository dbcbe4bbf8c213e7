"""verify: the whole derivative against real trainings, along one random direction of the data weights.

The other checks look at parts of a replay: a state, a step, a measure. This one looks at all of it at once.
With a random direction v of ±1 it compares Σᵢ τ_ki vᵢ with the slope of φ_k(f(w + εv)) at ε = 0, by central
differences at two step sizes. A number flipped anywhere on the way back, in a cotangent or in a sum, shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attribution import Attribution
from .counterfactual import outputs
from .show import Table

STEPS = {torch.float64: 1e-3, torch.float32: 2e-2}
SURE = 0.1  # a slope that is known to a tenth of itself can be told from a wrong one


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Table):
    """What trainings along one random direction say of the scores.

    predicted, true  (K,): the slope of each output by the scores, and by finite differences
    doubt            (K,): how far curvature and rounding may have moved the finite difference
    step             ε, of the nearer pair of trainings
    """

    predicted: Tensor
    true: Tensor
    doubt: Tensor
    step: float

    @property
    def resolved(self) -> Tensor:
        """(K,): whether the finite difference is sharp enough to judge this target."""
        return self.doubt <= SURE * torch.maximum(self.true.abs(), self.predicted.abs())

    @property
    def agree(self) -> Tensor:
        """(K,): whether scores and trainings differ by no more than the doubt."""
        return (self.predicted - self.true).abs() <= self.doubt

    @property
    def ok(self) -> bool | None:
        """Whether every target agrees; None where not one of them could be judged."""
        if not self.agree.all():
            return False
        return True if self.resolved.any() else None

    @property
    def caption(self) -> str:
        return "The whole derivative against four trainings"

    def rows(self) -> list[tuple[str, str]]:
        known = self.resolved
        gap = (self.predicted - self.true).abs() / self.true.abs().clamp_min(1e-300)
        worst = f"{gap[known].max().item():.0e}" if known.any() else "not known"
        return [
            ("targets judged", f"{int(known.sum())} of {len(known)}; weights moved by ±{self.step:g}"),
            ("largest difference", f"{worst}, relative to the slope"),
            ("verdict", {True: "agrees", False: "DIFFERS", None: "cannot tell"}[self.ok]),
        ]


def verify(
    scores: Attribution, *, step: float | None = None, seed: int = 0, progress: bool = True
) -> Verification:
    """Compare the scores with four trainings at w ± εv and w ± 2εv, v a random direction of ±1.

    A weight below 2ε stays where it is, since weights are not negative.

    step   ε; by default .001 in float64 and .02 in float32. The doubt is the difference between
           the two pairs, which curvature makes, and rounding: four times the run's precision
           times the output, over ε
    returns a Verification; it is kept as `scores.verification`

    Raises ValueError for scores without run and measure, or whose derivative is a mean over several points.
    """
    run = scores.run
    if run is None or scores.measure is None:
        raise ValueError("these scores know no run and measure; give them to Attribution.load")
    if not scores.tangent:
        raise ValueError("these scores are a mean over several points; verify a derivative at one point")
    h = STEPS[run.dtype] if step is None else float(step)
    if not 0 < h < 1:
        raise ValueError(f"step={step}: weights are moved by a number between 0 and 1")
    dice = torch.Generator().manual_seed(seed)
    at = scores.at.detach().cpu().to(run.dtype)
    v = (torch.randint(2, (run.n,), generator=dice, device="cpu") * 2 - 1).to(at)
    v = torch.where(at < 2 * h, 0.0, v)
    if not v.any():
        raise ValueError("every data weight is near 0, where it cannot be moved both ways")
    points = torch.stack([at + k * h * v for k in (1, -1, 2, -2)])
    found = outputs(run, scores.measure, points, progress=progress).double().cpu()
    values = scores.values.double().cpu()
    near, far = (found[0] - found[1]) / (2 * h), (found[2] - found[3]) / (4 * h)
    true = (4 * near - far) / 3
    rounding = torch.finfo(run.dtype).eps * found.abs().amax(0) * run.steps**0.5 / h
    result = Verification(values @ v.double(), true, (near - far).abs() + 4 * rounding, h)
    scores.verification = result
    return result
