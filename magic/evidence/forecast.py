"""What LDS is to be expected? A forecast from a few replays at random sets, before anything is judged.

Random sets that leave out a share p of the data have weights w = c + D about their mean c. The entries of D
have mean 0 and variance κ = p(1 − p), and the sums of them that matter are nearly Gaussian. Were D Gaussian,
two identities would tell how the prediction τ·D correlates with the outputs f(w):

    Cov(f, D) = κ E ∇f(w)              Stein 1981, Annals of Statistics 9
    Var f ≤ κ E ‖∇f(w)‖²               Poincaré's inequality (Nash 1958; equality where f is linear)

    τ·E∇f / (‖τ‖ √E‖∇f‖²)  ≤  Corr(τ·D, f)  ≤  τ·E∇f / (‖τ‖ ‖E∇f‖)

(the left one where τ·E∇f ≥ 0). Both need the gradient at random sets only, which is a replay there. The left
one is, but for the weights of the sets, the mean cosine between the scores and the scores at such sets: their
agreement. A tangent predicts as well as it agrees with the tangents elsewhere.

All that is true of a function that is the integral of its derivative. Where kinks add up to jumps (ReLU,
maximum pooling, the first steps of Adam), the derivative misses them at every point alike, and the tangents
agree. So a second number is taken: by how much outputs move beyond the tangent's prediction when every
weight is jittered by a hundredth. A smooth output hardly does; a jagged one mostly does.

Chapter 12 fits the formula below to every other of thirty recipes on the digits and judges it on those
between, on a ResNet-9 and on a small GPT-2; the constants here are those of a fit to all thirty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attribution import Attribution
from ..engine.health import Expected
from ..engine.replay import metagradient
from ..show import Figure, Table
from ..subsets import random
from .curvature import about_mean, of_one_point
from .outputs import outputs

JITTER = 0.01  # the standard deviation of a jittered weight, in weights
# atanh LDS = OFFSET + SLOPE · atanh(agreement) + JAGGED · log₁₀(1 + jaggedness), and the standard deviation
# about it: fitted to 84 trainings of 30 recipes by `python -m tests.experiments.rough_tables`
OFFSET, SLOPE, JAGGED, SPREAD = 0.296, 0.81, -0.298, 0.21
MOST = 0.9999  # an agreement beyond this one counts as this one


@dataclass(frozen=True, eq=False, repr=False)
class Forecast(Table):
    """What a few replays at random sets say of a prediction.

    drop        the share of the data that the sets leave out
    agreement   (S, K): cosines of the scores with those at S sets, the means of both taken off
    at_most     (K,): the correlation of the best prediction that goes in the direction of these scores could
                not be higher, were outputs smooth; an estimate from S sets
    jaggedness  (K,): the mean square by which outputs, with all weights jittered, miss their prediction, over
                the mean square of the prediction: 0 for a line
    """

    drop: float
    agreement: Tensor
    at_most: Tensor
    jaggedness: Tensor

    @property
    def expected(self) -> Figure:
        """The LDS to be expected, with the interval that held 95 % of the recipes it was fitted to."""
        agreed = max(-MOST, min(MOST, self.agreement.mean().item()))
        rough = torch.log10(1 + self.jaggedness).mean().item()
        middle = OFFSET + SLOPE * math.atanh(agreed) + JAGGED * rough
        return Figure(*(math.tanh(middle + side * 1.96 * SPREAD) for side in (0, -1, 1)))

    @property
    def caption(self) -> str:
        return f"Forecast for sets without {self.drop:.3g} of the data, from {len(self.agreement)} of them"

    def rows(self) -> list[tuple[str, str]]:
        agreed = self.agreement.mean(0)
        return [
            ("LDS to be expected", str(self.expected)),
            ("agreement with the scores at the sets", f"{agreed.min():.3f} … {agreed.max():.3f}"),
            ("correlation at most", f"{self.at_most.min():.3f} … {self.at_most.max():.3f}"),
            ("jaggedness", f"{self.jaggedness.min():.2g} … {self.jaggedness.max():.2g}"),
        ]


def forecast(
    scores: Attribution,
    drop: float = 0.05,
    *,
    sets: int = 3,
    jitters: int = 8,
    seed: int = 1,
    progress: bool = True,
) -> Forecast:
    """The LDS that these scores will have, told from replays at a few random sets.

    drop     the share of the data that the sets leave out
    sets     how many sets; each takes a replay as long as the one that made the scores
    jitters  trainings with all weights jittered by a hundredth; 0 leaves them out, and then kinks go unseen
    seed     of the sets, which are not those of `magic.lds`, and of the jitter

    What is found is kept with the scores: `scores.health` knows what to expect, and has a problem to report
    if that is little. Raises ValueError for scores of tokens, for means over several points, for scores
    without a run, and for a share that rounds to no example or to all.
    """
    run, measure, plan = of_one_point(scores, "a forecast")
    if sets < 1 or jitters < 0:
        raise ValueError(f"sets={sets}, jitters={jitters}: at least one set, and no negative number")
    there = [
        metagradient(run, measure, run.weights(w), plan, progress=progress).values
        for w in random(run.n, drop, sets, seed)
    ]
    agreement = torch.stack([scores.cosine(scores.like(values)) for values in there])
    noise = JITTER * torch.randn(jitters, run.n, generator=torch.Generator().manual_seed(seed))
    near = scores.at.cpu() * (1 + noise)
    moved = outputs(run, measure, near, progress=False) if jitters else scores.predict(near).cpu()
    found = Forecast(drop, agreement, _at_most(scores.values, there), _jaggedness(scores, near, moved))
    if scores.health is not None:
        scores.health = replace(scores.health, expected=Expected(drop, *found.expected))
    return found


def _at_most(values: Tensor, there: list[Tensor]) -> Tensor:
    """(K,): τ·E∇f / (‖τ‖ ‖E∇f‖), at most 1; ‖E∇f‖² by products of different sets, which has no bias."""
    own, *others = (about_mean(x) for x in (values, *there))
    mean = torch.stack(others).mean(0)
    count, squares = len(others), sum(x.square().sum(1) for x in others)
    size = (count**2 * mean.square().sum(1) - squares) / max(1, count * (count - 1))
    along = (own * mean).sum(1) / own.norm(dim=1)
    return torch.where(along**2 < size, along / size.clamp_min(0).sqrt(), along.sign())


def _jaggedness(scores: Attribution, near: Tensor, true: Tensor) -> Tensor:
    """(K,): see `Forecast`; 0 where there are no jittered weights."""
    if len(near) == 0:
        return torch.zeros(len(scores.outputs), dtype=torch.float64)
    told, start = scores.predict(near).double().cpu(), scores.outputs.double().cpu()
    return (true.double() - told).square().mean(0) / (told - start).square().mean(0).clamp_min(1e-300)
