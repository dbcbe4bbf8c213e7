"""Does the tangent turn? The second derivative of training along a direction, and what follows from it.

    H d = d/dε ∇f(w + ε d)      (K, n): how the scores themselves change as the weights go along d

by central differences of exact metagradients, whose error is O(ε²), or with `order=4` (Richardson 1911)
O(ε⁴). Along d = −1, all examples leaving together, it tells what a random drop of a share p meets: the
scores there are about τ + p·H d. So the tangent at w = 1 can rank as well as the two correlate, and is
off by ½ p² dᵀH d on average. That is known before anything is retrained.

Over random sets with a share p removed, w = 1 + p·d + D, the second-order expansion of f has four parts:

    f(1) + τ·(p·d + D)      the tangent at 1
    ½ p² dᵀH d              a level, the same for all sets: it spoils sizes, and no ranking
    p·(H d)·D               a turn of the slope: it spoils rankings, too
    ½ DᵀH D                 what is curved among the sets: no linear predictor has it, and it is unknown

So the two forecasts, `correlation` and `r2`, leave the last part out and are upper bounds in that sense.
R² fails long before the ranking does: the level alone is enough to spoil it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..attribution import Attribution
from ..engine.planning import Plan
from ..engine.planning import plan as plan_of
from ..engine.replay import metagradient
from ..show import Table
from ..training.run import Run

# ε, of a direction whose largest entry is 1: small enough for Adam, whose first step is the sign of the
# gradient but for eps; large enough that rounding does not show
STEP = {torch.float32: 0.02, torch.float64: 1e-6}
UNSTEADY = 0.1  # differences over ε and 2ε that differ by more than this share of themselves are warned of
TRUSTED = 0.95  # the correlation down to which a ranking is trusted
SIZED = 0.5  # the R² down to which sizes are


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Table):
    """How the derivative changes along `direction`, from `scores.at`.

    scores     where it starts from
    direction  (n,): d, in data weights
    values     (K, n): H d
    slope      (K,): dᵀ∇f
    second     (K,): dᵀH d
    """

    scores: Attribution
    direction: Tensor
    values: Tensor

    @property
    def slope(self) -> Tensor:
        """(K,): dᵀ∇f, the first derivative of each output along d."""
        return self.scores.values @ self.direction

    @property
    def second(self) -> Tensor:
        """(K,): dᵀH d, the second."""
        return self.values @ self.direction

    def predict(self, distance: float) -> Tensor:
        """(K,): outputs at at + distance·d, to second order."""
        return self.scores.outputs + distance * self.slope + 0.5 * distance**2 * self.second

    def correlation(self, drop: float) -> Tensor:
        """(K,): how the scores here correlate with those at the centre of random sets, to this order.

        drop   the share of the data that the sets leave out

        The tangent's prediction correlates with the truth by about as much at most: what is curved among the
        sets comes on top.
        """
        return self.scores.cosine(self.scores.like(self.scores.values + drop * self.values))

    def r2(self, drop: float) -> Tensor:
        """(K,): the R² of the tangent's prediction over random sets, to this order.

        drop   the share of the data that the sets leave out

        A level that is the same for all sets and a turn of the slope count as errors, against the variance of
        outputs that are linear in w about the centre of the sets. What is curved among them comes on top.
        """
        n = self.values.shape[1]
        spread = drop * (1 - drop) * n / (n - 1)
        slope, turn = (about_mean(x) for x in (self.scores.values + drop * self.values, drop * self.values))
        level = 0.5 * drop**2 * self.second.double()
        return 1 - (level.square() + spread * turn.square().sum(1)) / (spread * slope.square().sum(1))

    def trusted(self, correlation: float = TRUSTED) -> float:
        """The largest share, up to one half, below which the tangent's turning allows this correlation.

        The correlation is the mean over targets. Beyond the share no ranking is to be expected; before it,
        none is promised.
        """
        return _reach(self.correlation, correlation)

    def sized(self, r2: float = SIZED) -> float:
        """The largest share, up to one half, below which the forecast of R², a mean over targets, is this."""
        return _reach(self.r2, r2)

    def rows(self) -> list[tuple[str, str]]:
        """The table: how correlation and R² fall with the share that is removed."""
        K, n = self.values.shape
        shown = (0.01, 0.05, 0.2, 0.5)
        falls = ((self.correlation, ".3f"), (self.r2, ".2f"))
        ranks, sizes = (
            ", ".join(f"{format(forecast(p).mean().item(), spec)} at {p:.0%}" for p in shown)
            for forecast, spec in falls
        )
        return [
            ("targets, examples", f"{K:,}, {n:,}"),
            ("correlation, at most", ranks),
            ("R², at most", sizes),
            (f"correlation at least {TRUSTED:g}", f"at best up to {self.trusted():.1%} removed"),
            (f"R² at least {SIZED:g}", f"at best up to {self.sized():.1%} removed"),
        ]


def of_one_point(scores: Attribution, what: str) -> tuple[Run, Callable, Plan]:
    """Run, measure and plan of scores that can be compared with those elsewhere; ValueError for others.

    Scores from a file have no plan, and get the default one. Those of another method have no health either.
    """
    if scores.run is None or scores.measure is None or not (scores.plan or scores.health):
        raise ValueError(
            "these scores are of no replay, or know no run and measure: give what magic.attribute returned, "
            "or Attribution.load(path, run, measure)"
        )
    if not scores.tangent:
        raise ValueError(f"{what} belongs to one point; these scores are {scores.point}")
    if scores.at.dim() > 1:
        raise ValueError(f"{what} is that of scores of examples; these are scores of tokens")
    return scores.run, scores.measure, scores.plan or plan_of(scores.run, targets=len(scores.values))


def about_mean(x: Tensor) -> Tensor:
    """(K, n): each row less its mean, which no choice between sets of one size depends on."""
    return x.double() - x.double().mean(1, keepdim=True)


def _reach(forecast: Callable[[float], Tensor], bound: float) -> float:
    """The largest share, up to one half, below which the mean of a forecast stays at or above a bound."""
    shares = np.linspace(0, 0.5, 101)
    good = [forecast(share).mean().item() >= bound for share in shares[1:]]
    return float(shares[good.index(False)]) if False in good else 0.5


def curvature(
    scores: Attribution,
    direction: Tensor | None = None,
    *,
    step: float | None = None,
    order: int = 4,
    progress: bool = True,
) -> Curvature:
    """H d: how the scores change along a direction, by differences of metagradients.

    direction  (n,); by default −1, all weights down
    step       the ε of the differences, in data weights; by default .02 in float32 and 1e-6 in float64, for a
               direction whose largest entry is 1
    order      how many metagradients are taken, 2 or 4, and the power of ε by which the error falls. Of order
               4, differences that are unsteady are warned of

    In float64 the differences agree with autograd through the whole run to 1e-6 (Adam, whose derivative has
    kinks as narrow as its eps) or 1e-8; in float32 to about a hundredth.

    What is found out about scores is kept with them, so that they are shown and saved with it: along the
    default direction `scores.health` is replaced by one that knows beyond which shares the forecasts spoil
    ranking and sizes, and has a problem to report if a ranking is not to be had of 5 %.

    Raises ValueError for scores that are means over several points, or without a run.
    """
    run, measure, plan = of_one_point(scores, "the curvature")
    if order not in (2, 4):
        raise ValueError(f"order={order}: 2 or 4")
    down = direction is None
    direction = -torch.ones_like(scores.at) if down else torch.as_tensor(direction).to(scores.at)
    if direction.shape != scores.at.shape or not direction.isfinite().all() or not direction.any():
        raise ValueError(f"direction must be ({run.n},), finite and not 0; it is {tuple(direction.shape)}")
    step = step or STEP[run.dtype] / direction.abs().max().item()

    def central(h: float) -> Tensor:
        ends = [run.weights(scores.at + s * h * direction, allow_negative=True) for s in (1, -1)]
        ahead, behind = (metagradient(run, measure, w, plan, progress=progress).values for w in ends)
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
        scores.health = replace(scores.health, trusted=found.trusted(), sized=found.sized())
    return found
