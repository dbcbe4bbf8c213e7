"""Does the tangent turn? The second derivative of training along a direction, and what follows from it.

    H d = d/dε ∇f(w + ε d)      (K, n): how the scores themselves change as the weights go along d

by central differences of exact metagradients, whose error is O(ε²), or with `order=4` (Richardson 1911)
O(ε⁴). Along d = −1, all examples leaving together, it tells what a random drop of a share p meets: the
scores there are about τ + p·H d. So the tangent at w = 1 can rank as well as the two correlate, and is
off by ½ p² dᵀH d on average. That is known before anything is retrained.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..attribution import Attribution
from ..engine.replay import metagradient
from ..show import Table

# small enough for Adam, whose first step is the sign of the gradient but for eps; large enough for rounding
STEP = {torch.float32: 0.02, torch.float64: 1e-6}
UNSTEADY = 0.1
TRUSTED = 0.95


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Table):
    """How the derivative changes along `direction`, from `scores.at`.

    values   (K, n): H d
    slope    (K,): dᵀ∇f;    second   (K,): dᵀH d
    """

    scores: Attribution
    direction: Tensor
    values: Tensor

    @property
    def slope(self) -> Tensor:
        return self.scores.values @ self.direction

    @property
    def second(self) -> Tensor:
        return self.values @ self.direction

    def predict(self, distance: float) -> Tensor:
        """(K,): outputs at at + distance·d, to second order."""
        return self.scores.outputs + distance * self.slope + 0.5 * distance**2 * self.second

    def correlation(self, drop: float) -> Tensor:
        """(K,): of the scores here with those at the centre of random sets with a share `drop` removed, to
        this order. The tangent's prediction correlates with the truth by about as much at most: what is
        curved among the sets comes on top.
        """
        return self.scores.cosine(self.scores.like(self.scores.values + drop * self.values))

    def trusted(self, correlation: float = TRUSTED) -> float:
        """The largest share, up to one half, below which the tangent's turning allows this correlation, in
        the mean over targets. Beyond it no ranking is to be expected; before it, none is promised."""
        shares = np.linspace(0, 0.5, 101)
        good = [self.correlation(share).mean().item() >= correlation for share in shares]
        return float(shares[good.index(False) - 1]) if False in good else 0.5

    def rows(self) -> list[tuple[str, str]]:
        K, n = self.values.shape
        shown = (0.01, 0.05, 0.2, 0.5)
        return [
            ("targets, examples", f"{K:,}, {n:,}"),
            (
                "correlation, at most",
                ", ".join(f"{self.correlation(p).mean():.3f} at {p:.0%}" for p in shown),
            ),
            (f"at least {TRUSTED:g}", f"up to {self.trusted():.1%} removed"),
        ]


def curvature(
    scores: Attribution,
    direction: Tensor | None = None,
    *,
    step: float | None = None,
    order: int = 4,
    progress: bool = True,
) -> Curvature:
    """H d from `order` metagradients, 2 or 4, along `direction`, (n,); by default −1, all weights down.

    Puts into `scores.health` beyond which share the turning alone spoils the ranking; health has a problem
    to report if that is less than 5 %. `step` is the ε of the differences. In float64 they agree with
    autograd through the whole run to 1e-6 (Adam, whose derivative has kinks as narrow as its eps) or 1e-8;
    in float32 to about a hundredth. Of order 4, they warn when they are unsteady.

    Raises ValueError for scores that are means over several points, or without a run.
    """
    run, measure = scores.run, scores.measure
    if run is None or measure is None or scores.plan is None:
        raise ValueError("these scores know no run, measure and plan: give what magic.attribute returned")
    if not scores.tangent:
        raise ValueError(f"the curvature belongs to one point; these scores are {scores.where}")
    if order not in (2, 4):
        raise ValueError(f"order={order}: 2 or 4")
    down = direction is None
    direction = -torch.ones_like(scores.at) if down else torch.as_tensor(direction).to(scores.at)
    if direction.shape != scores.at.shape or not direction.isfinite().all() or not direction.any():
        raise ValueError(f"direction must be ({run.n},), finite and not 0; it is {tuple(direction.shape)}")
    step = step or STEP[run.dtype] / direction.abs().max().item()

    def central(h: float) -> Tensor:
        ends = [run.weights(scores.at + s * h * direction, allow_negative=True) for s in (1, -1)]
        ahead, behind = (metagradient(run, measure, w, scores.plan, progress).values for w in ends)
        return (ahead - behind) / (2 * h)

    values = central(step)
    if order == 4:
        wider = central(2 * step)
        unsteady = ((wider - values).norm() / values.norm().clamp_min(1e-300)).item()
        if unsteady > UNSTEADY:
            warnings.warn(
                f"differences over ±{step:.1e} and twice that disagree by {unsteady:.0%}: the derivative has "
                "kinks there, or rounding is large. Take float64 and a smaller step=",
                stacklevel=2,
            )
        values = (4 * values - wider) / 3
    found = Curvature(scores, direction, values)
    if down and scores.health is not None:
        scores.health = replace(scores.health, trusted=found.trusted())
    return found
