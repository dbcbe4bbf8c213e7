"""verify: the whole derivative against real trainings, along one random direction of the data weights.

The other checks look at parts of a replay: a state, a step, a measure. This one looks at the whole. For a
random direction v of ±1 it compares Σᵢ τ_ki vᵢ with the slope of φ_k(f(w + εv)) at ε = 0, by central
differences at three or more step sizes. An error anywhere on the way back, in a cotangent or in a sum,
shows. Two sizes would not be enough: Adam's first step is nearly a step along the gradient's sign, and two
differences that both straddle the kink can agree by chance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attribution import Attribution
from ..engine.health import Verification
from ..training.run import Run
from .outputs import outputs

LADDER = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (4e-2, 1e-2, 2.5e-3, 6e-4)}


def verify(
    scores: Attribution, *, step: float | None = None, seed: int = 0, progress: bool = True
) -> Verification:
    """Compare the scores with trainings at w ± εv, for three step sizes ε or more, v random of ±1.

    A weight below the largest ε is left unchanged, since weights must not be negative. A target is decided
    once three successive step sizes agree to a twentieth of the slope. Smaller ones are tried while a target
    is undecided: at most ten trainings in float64, eight in float32.

    step   the largest ε, in data weights; by default .001 in float64 and .04 in float32
    returns a Verification; it is kept as `scores.verification`

    Raises ValueError for scores without run and measure, or whose derivative is a mean over several points.
    """
    run, measure = scores.run, scores.measure
    if run is None or measure is None:
        raise ValueError("these scores know no run and measure; give them to Attribution.load")
    if not scores.tangent:
        raise ValueError("these scores are a mean over several points; verify a derivative at one point")
    ladder = LADDER[run.dtype]
    largest = ladder[0] if step is None else float(step)
    if not 0 < largest < 1:
        raise ValueError(f"step={step}: weights are moved by a number between 0 and 1")
    steps = [largest * rung / ladder[0] for rung in ladder]
    dice = torch.Generator().manual_seed(seed)
    at = scores.at.detach().cpu().to(run.dtype)
    v = (torch.randint(2, at.shape, generator=dice, device="cpu") * 2 - 1).to(at)
    v = torch.where(at < largest, 0.0, v)
    if not v.any():
        raise ValueError("every data weight is near 0, where it cannot be moved both ways")
    predicted = scores.values.double().cpu().flatten(1) @ v.double().flatten()
    slopes, rounding = _slopes(run, measure, at, v, steps[:3], progress)
    result = _judge(predicted, slopes, rounding, steps)
    for h in steps[3:]:
        if result.resolved.all():
            break
        more = _slopes(run, measure, at, v, [h], progress)
        slopes, rounding = torch.cat([slopes, more[0]]), torch.cat([rounding, more[1]])
        result = _judge(predicted, slopes, rounding, steps)
    scores.verification = result
    return result


def _slopes(
    run: Run, measure: Callable, at: Tensor, v: Tensor, steps: list[float], progress: bool
) -> tuple[Tensor, Tensor]:
    """(len(steps), K) each: central differences along v, and how much rounding may have changed them.

    Each of T steps rounds an output by about the precision of its type, and errors add up like √T. Four times
    that is a safe bound for a difference of two outputs.
    """
    points = torch.stack([at + sign * h * v for h in steps for sign in (1, -1)])
    found = outputs(run, measure, points, progress=progress).double().cpu()
    h = torch.tensor(steps, dtype=torch.float64)[:, None]
    rounding = 4 * torch.finfo(run.dtype).eps * run.steps**0.5 * found.abs().amax(0) / h
    return (found[::2] - found[1::2]) / (2 * h), rounding


def _judge(predicted: Tensor, slopes: Tensor, rounding: Tensor, steps: list[float]) -> Verification:
    """For each target the three neighbouring step sizes that agree best, and twice how far they differ."""
    spread = torch.stack(
        [slopes[i : i + 3].amax(0) - slopes[i : i + 3].amin(0) for i in range(len(slopes) - 2)]
    )
    doubt, best = (2 * spread + rounding[2:]).min(0)
    true = slopes[2:].gather(0, best[None])[0]
    return Verification(predicted, true, doubt, tuple(steps[: len(slopes)]))
