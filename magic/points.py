"""Where to linearise: the point of the data weights at which the derivative is taken, or an average of it.

MAGIC takes the derivative at w = 1. Removing a share p of the data asks about weights around w = 1 − p:

    full      ∇f(1)                         the tangent at the whole data; right for small sets
    centre    ∇f(1 − p)                     the tangent in the middle of the sets that are asked about
    path      ∫₀¹ ∇f(1 − s·p) ds            by Gauss–Legendre; with f(1) it predicts f(1 − p) itself
    average   mean of ∇f(w), w ~ the drop   by Stein's identity (Stein 1981, Annals of Statistics 9) the
                                            slope of the best linear predictor where w is Gaussian; for
                                            large random sets the sums that matter nearly are

All predict by an affine function of w. `full` and `centre` take one replay, the others one for each point.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .show import old_names
from .subsets import random
from .training.run import Run

NAMES = ("full", "centre", "path", "average")


@dataclass(frozen=True, eq=False)
class Points:
    """Where a derivative is taken: at one point of the data weights, or as a mean over several.

    points      (m, n) data weights
    shares      of each point in the mean; they sum to 1
    label       what to call them
    from_full   predictions start from w = 1 and the outputs there, not from the points' means
    """

    points: Tensor
    shares: tuple[float, ...]
    label: str
    from_full: bool = False

    @property
    def tangent(self) -> bool:
        """Whether the derivative is that at the very point that predictions start from."""
        return len(self.points) == 1 and not self.from_full

    def mean(self, tensors: Iterable[Tensor]) -> Tensor:
        """The mean of a tensor for each point, with the share of each."""
        pairs = zip(self.shares, tensors, strict=True)
        share, x = next(pairs)
        total = share * x
        for share, x in pairs:
            total = total + share * x
        return total


def describe(weights: Tensor) -> str:
    """These weights in words."""
    first = weights.flatten()[0]
    return f"w = {first.item():g}" if (weights == first).all() else "w, a vector"


def points_of(run: Run, at: Tensor | float | str | Points | None, drop: float | None = None) -> Points:
    """What `attribute(at=, drop=)` means.

    Raises ValueError for an unknown name, a name that needs `drop` without one, or the reverse.
    """
    if isinstance(at, Points):
        return at
    if not isinstance(at, str):
        if drop is not None:
            raise ValueError(f'drop={drop} belongs to at="centre", "path" or "average"')
        weights = run.weights(at)
        return Points(weights[None], (1.0,), describe(weights))
    if at not in NAMES:
        raise ValueError(f"at={at!r}: give weights, or one of {', '.join(map(repr, NAMES))}")
    if at == "full":
        return points_of(run, None, drop)
    if drop is None:
        raise ValueError(f"at={at!r} depends on how much is to be removed: give drop=, such as drop=0.2")
    return {"centre": centre, "path": path, "average": average}[at](run, drop)


def centre(run: Run, drop: float) -> Points:
    """w = 1 − drop for every example: the mean of random sets with a share `drop` of them removed.

    Raises ValueError for a share that is not between 0 and 1.
    """
    weights = run.weights(1 - _share(drop))
    return Points(weights[None], (1.0,), f"{describe(weights)}, the centre of a {drop:.3g} drop")


def path(run: Run, drop: float, points: int = 3) -> Points:
    """The straight way from w = 1 to 1 − drop, by `points` Gauss–Legendre nodes.

    Raises ValueError for a share that is not between 0 and 1, or for fewer than one node.
    """
    if points < 1:
        raise ValueError(f"points={points}: at least one")
    nodes, shares = np.polynomial.legendre.leggauss(points)
    weights = [run.weights(1 - _share(drop) * (1 + s) / 2) for s in nodes]
    label = f"the mean along w = 1 → {1 - drop:g}, {points} points"
    return Points(torch.stack(weights), tuple((shares / 2).tolist()), label, from_full=True)


def average(run: Run, drop: float, subsets: int = 8, seed: int = 1) -> Points:
    """`subsets` random sets with a share `drop` removed.

    The default seed is not that of `magic.lds`, which would judge the prediction by sets that it was made
    from. Raises ValueError for a share that is not between 0 and 1 or that rounds to no example.
    """
    removed = random(run.n, _share(drop), subsets, seed)
    weights = [run.weights(w) for w in removed]
    label = f"the mean over {subsets} sets with {drop:.3g} removed"
    return Points(torch.stack(weights), (1 / subsets,) * subsets, label)


def _share(drop: float) -> float:
    """`drop`, if it is a share of the data; else ValueError."""
    if not 0 < drop < 1:
        raise ValueError(f"drop={drop}: the share of the data that is removed is between 0 and 1")
    return float(drop)


__getattr__ = old_names(__name__, {"Where": "Points", "settle": "points_of"})
