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
from ..engine.verdict import Verification
from ..metagradients import Metagradient
from ..show import bar
from ..training.run import Run
from ..training.variants import changed, hyper
from .outputs import outputs
from .retraining import retrained

LADDER = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (4e-2, 1e-2, 2.5e-3, 6e-4)}


def verify(
    scores: Attribution | Metagradient,
    of: str = "weights",
    *,
    step: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Verification:
    """Compare the scores with trainings at w ± εv, for three step sizes ε or more, v random of ±1.

    A weight below the largest ε is left unchanged, since weights must not be negative. A target is decided
    once three successive step sizes agree to a twentieth of the slope. Smaller ones are tried while a target
    is undecided: at most ten trainings in float64, eight in float32.

    of     of a Metagradient: which of its parts, "weights", "start", "data", or a hyper-parameter. What is
           moved is moved by ε times its own size: a hyper-parameter or a buffer by ±ε of itself, a parameter
           and the inputs by ε times their root mean square, at random
    step   the largest ε, in data weights; by default .001 in float64 and .04 in float32
    returns a Verification; that of an Attribution is kept as `scores.verification`

    Raises ValueError for scores without run and measure, or whose derivative is a mean over several points;
    for a part that was not asked for; and for one that is 0 everywhere, which has no size to be moved by.
    """
    if isinstance(scores, Metagradient):
        if of != "weights":
            return _verify_part(scores, of, step, seed, progress)
        scores = scores.scores
    if of != "weights":
        raise ValueError(f"of={of!r}: these are scores of data weights; magic.metagradient finds the others")
    scores.verification = _verify_weights(scores, step, seed, progress)
    return scores.verification


def _verify_part(found: Metagradient, of: str, step: float | None, seed: int, progress: bool) -> Verification:
    predicted, moved = _part(found, of, torch.Generator().manual_seed(seed))

    def along(epsilons: list[float]) -> Tensor:
        with bar(len(epsilons), "train", progress) as shown:
            trained = []
            for epsilon in epsilons:
                trained.append(retrained(moved(epsilon), found.measure, found.at).cpu())
                shown.update()
        return torch.stack(trained)

    return _verified(found.run, predicted, along, _steps(found.run, step))


def _verify_weights(scores: Attribution, step: float | None, seed: int, progress: bool) -> Verification:
    run, measure = scores.run, scores.measure
    if run is None or measure is None:
        raise ValueError("these scores know no run and measure; give them to Attribution.load")
    if not scores.tangent:
        raise ValueError("these scores are a mean over several points; verify a derivative at one point")
    steps = _steps(run, step)
    dice = torch.Generator().manual_seed(seed)
    at = scores.at.detach().cpu().to(run.dtype)
    v = torch.where(at < steps[0], 0.0, _signs(at, dice))
    if not v.any():
        raise ValueError("every data weight is near 0, where it cannot be moved both ways")
    predicted = scores.values.double().cpu().flatten(1) @ v.double().flatten()

    def along(epsilons: list[float]) -> Tensor:
        points = torch.stack([at + epsilon * v for epsilon in epsilons])
        return outputs(run, measure, points, progress=progress)

    return _verified(run, predicted, along, steps)


def _steps(run: Run, step: float | None) -> list[float]:
    """The step sizes to try, the largest first."""
    ladder = LADDER[run.dtype]
    largest = ladder[0] if step is None else float(step)
    if not 0 < largest < 1:
        raise ValueError(f"step={step}: weights are moved by a number between 0 and 1")
    return [largest * rung / ladder[0] for rung in ladder]


def _signs(like: Tensor, dice: torch.Generator) -> Tensor:
    """Random numbers of ±1, on the CPU."""
    return (torch.randint(2, like.shape, generator=dice, device="cpu") * 2 - 1).to(like.dtype)


def _part(found: Metagradient, of: str, dice: torch.Generator) -> tuple[Tensor, Callable[[float], Run]]:
    """The slope of each output along a random direction of one part, by what was found; and the run with the
    part moved by ε along it."""
    run, pairs = found.run, _directions(found, of, dice)
    if not any(v.any() for _, _, v in pairs.values()):
        raise ValueError(f"{of!r} is 0 everywhere, so there is no size to move it by")

    def moved(epsilon: float) -> Run:
        values = {k: value + epsilon * v for k, (_, value, v) in pairs.items()}
        if of == "start":
            return changed(run, start=values)
        if of == "data":
            return changed(run, data=tuple(values.get(str(i)) for i in range(len(run.data))))
        return changed(run, hypers=values)

    whose = found.examples if of == "data" else None
    slopes = [_dot(x, v if whose is None else v[whose.to(v.device)]) for x, _, v in pairs.values()]
    return torch.stack(slopes).sum(0), moved


def _directions(
    found: Metagradient, of: str, dice: torch.Generator
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> (derivative, value, direction) of each tensor of one part; ValueError if there is none."""
    run = found.run
    if of == "start" and found.start is not None:
        params, buffers = run.initial.params, run.initial.buffers
        pairs = {k: (x, params[k], _random(params[k], dice)) for k, x in found.start.params.items()}
        for k, x in found.start.buffers.items():  # such as variances, which must stay positive
            pairs[k] = x, buffers[k], buffers[k] * _signs(buffers[k], dice).to(x)
        return pairs
    if of == "data" and found.data is not None:
        pairs = {}
        for i, derivative in enumerate(found.data):
            if derivative is not None:
                v, whose = torch.zeros_like(run.data[i]), found.examples
                rows = slice(None) if whose is None else whose.to(v.device)
                v[rows] = _random(run.data[i], dice)[rows]
                pairs[str(i)] = derivative, run.data[i], v
        return pairs
    if of in found.hypers:
        values = hyper(run, of)
        return {of: (found.hypers[of], values, values.nan_to_num() * _signs(values, dice))}
    raise ValueError(f"of={of!r}: this metagradient has no such part; ask magic.metagradient for it")


def _random(x: Tensor, dice: torch.Generator) -> Tensor:
    """Normal random numbers of the size of x, or of .1 where x is 0."""
    size = x.double().square().mean().sqrt().item() or 0.1
    return size * torch.randn(x.shape, generator=dice, dtype=x.dtype, device="cpu").to(x.device)


def _dot(x: Tensor, v: Tensor) -> Tensor:
    """(K,): ⟨x_k, v⟩."""
    return x.double().cpu().flatten(1) @ v.double().cpu().flatten()


def _verified(
    run: Run, predicted: Tensor, along: Callable[[list[float]], Tensor], steps: list[float]
) -> Verification:
    """Slopes at the first three step sizes, and at smaller ones while a target is undecided.

    along  step sizes with their signs -> the outputs there, (len, K)
    """
    slopes, rounding = _slopes(run, along, steps[:3])
    result = _judge(predicted, slopes, rounding, steps)
    for h in steps[3:]:
        if result.resolved.all():
            break
        more = _slopes(run, along, [h])
        slopes, rounding = torch.cat([slopes, more[0]]), torch.cat([rounding, more[1]])
        result = _judge(predicted, slopes, rounding, steps)
    return result


def _slopes(run: Run, along: Callable[[list[float]], Tensor], steps: list[float]) -> tuple[Tensor, Tensor]:
    """(len(steps), K) each: central differences, and how much rounding may have changed them.

    Each of T steps rounds an output by about the precision of its type, and errors add up like √T. Four times
    that is a safe bound for a difference of two outputs.
    """
    found = along([sign * h for h in steps for sign in (1, -1)]).double().cpu()
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
