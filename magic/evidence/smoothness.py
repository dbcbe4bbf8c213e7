"""Is the derivative useful? How smooth a training is in its data weights, before anything is predicted.

Metasmoothness (Engstrom et al. 2025, arXiv 2503.13751, section 4): train at w, w + hv and w + 2hv, and look
whether the trained parameters go on in the direction in which they set out,

    Ŝ_{h,v} = Σ_j |Δ_j| sign(Δ_j) sign(Δ'_j) / Σ_j |Δ_j|,   Δ = θ(w + hv) − θ(w),  Δ' = θ(w + 2hv) − θ(w + hv)

1 where every parameter does, 0 where they turn at random. It takes three trainings and no derivative. Beside
it stands the cosine of the scores at w and at a nearby w, which sees how fast the derivative turns where
training is smooth, and is blind to jumps: the tangents on the two sides of one are parallel.

What it is good for: an alarm. Far below 1 the derivative predicts badly. Close to 1 it does not rank
recipes by how well theirs predicts, and it does not ask whether a model has learned anything, so `survey`
sets it beside the accuracy. Chapter 08 measures all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..attribution import attribute
from ..show import needs
from ..subsets import random
from ..training.finite import NonFinite
from ..training.run import Run
from ..training.state import State


def directions(n: int, drop: float, count: int, seed: int = 0) -> Tensor:
    """(count, n): ways to go, each of which removes a random share `drop` at length 1.

    Raises ValueError where the share rounds to no example or to all.
    """
    return random(n, drop, count, seed) - 1


def metasmoothness(run: Run, direction: Tensor, length: float = 0.5, start: State | None = None) -> float:
    """Ŝ of the trained parameters along a direction: a number of at most 1, and 1 is smooth.

    direction  (n,), in data weights
    length     of each of the two steps along it
    start      the run trained at w = 1, if that is known, which saves one of three trainings

    Buffers and optimizer state are left out, as in the paper. Raises ValueError for a direction that is 0 or
    of another shape, and for one along which the trained parameters do not change.
    """
    direction = _way(run, direction)
    if not length > 0:
        raise ValueError(f"length={length}: a positive step along the direction")
    start = start or run.train(progress=False)
    ends = [start, *(run.train(1 + k * length * direction, progress=False) for k in (1, 2))]
    theta = [torch.cat([p.flatten() for p in end.params.values()]).double() for end in ends]
    first, second = theta[1] - theta[0], theta[2] - theta[1]
    moved = first.abs().sum()
    if moved == 0:
        raise ValueError("the trained parameters do not change along this direction: take a longer one")
    return ((first * second.sign()).sum() / moved).item()


def _way(run: Run, direction: Tensor) -> Tensor:
    """The direction as weights of the run; ValueError where it is 0 or has another shape."""
    direction = torch.as_tensor(direction)
    if direction.shape not in ((run.n,), run.shape) or not direction.any():
        raise ValueError(f"direction must be ({run.n},) and not 0; it is {tuple(direction.shape)}")
    return run.weights(direction, allow_negative=True)


def similarity(run: Run, measure: Callable, direction: Tensor, length: float = 1.0, **options) -> Tensor:
    """(K,): cosine of the scores at w = 1 with those at 1 + length·direction, their means taken off.

    direction  (n,), in data weights; `directions` gives some, and length 1 goes a whole random set away
    options    those of `magic.attribute`: memory, plan
    """
    direction = _way(run, direction)
    ends = [attribute(run, measure, 1 + k * length * direction, progress=False, **options) for k in (0, 1)]
    return ends[0].cosine(ends[1])


def survey(
    runs: Mapping[str, Run] | Iterable[tuple[str, Run]],
    accuracy: Callable,
    measure: Callable | None = None,
    *,
    drop: float = 0.01,
    count: int = 3,
    seed: int = 0,
):
    """Smoothness against accuracy for several recipes: a DataFrame, a row for each run.

    runs      by name, or pairs of a name and a run
    accuracy  trained model -> a number, such as the share of validation images it gets right
    measure   if given, the cosine of its scores over a random set is computed as well, at the price of two
              replays for each run
    drop      the share of the data that each direction removes
    count     random directions; the column metasmoothness is their mean, `low` and `high` the extremes
    seed      of the directions

    A run that becomes infinite or NaN has NaN in its row. Raises ImportError without pandas.
    """
    pd = needs("pandas", "notebooks")
    rows = {}
    for name, run in dict(runs).items():
        ways = directions(run.n, drop, count, seed)
        try:
            trained = run.train(progress=False)
            found = [metasmoothness(run, way, start=trained) for way in ways]
            with torch.no_grad():
                rows[name] = {
                    "accuracy": float(accuracy(run.model(trained).eval())),
                    "metasmoothness": float(np.mean(found)),
                }
            rows[name] |= {"low": min(found), "high": max(found)}
            if measure is not None:
                rows[name]["cosine"] = similarity(run, measure, ways[0]).mean().item()
        except NonFinite:
            rows[name] = {"accuracy": float("nan"), "metasmoothness": float("nan")}
    return pd.DataFrame.from_dict(rows, orient="index")
