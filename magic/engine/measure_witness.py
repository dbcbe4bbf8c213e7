"""The witness of what is measured: is the cotangent ∂φ/∂s_T how the measure moves with the final state?

All is done in float64, since a small loss or a small margin is a difference of larger numbers: in float32 a
finite difference of it would be rounding. Where a measure does not run in float64, it is compared in the
run's own precision, at larger steps and with more tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.precision import InDouble
from ..training import determinism
from ..training.run import Run
from ..training.state import Cotangent, State
from .adjoint import measure_vjp
from .finite_difference import DIRECTIONS, Slope, in_double, random_like, steady, warn
from .refusals import NotDifferentiable

TOLERANCE = 1e-3  # relative, between K derivatives taken together and that of their sum
DROWNED = 0.05  # the share of a derivative that rounding may make up


@dataclass(frozen=True)
class _Precision:
    """How finite differences are taken in one precision: step sizes, the relative tolerance, and a step so
    small that it shows rounding alone."""

    steps: tuple[float, ...]
    tolerance: float
    rounding: float


DOUBLE = _Precision((1e-6, 1e-4), 1e-3, 1e-9)
SINGLE = _Precision((3e-4, 3e-3, 3e-2), 2e-2, 1e-6)


@dataclass(frozen=True, eq=False)
class _Claim:
    """To be checked: at this state, `cotangent` is the derivative of the outputs `some` of measure."""

    run: Run
    state: State
    measure: Callable
    cotangent: Cotangent
    some: slice

    def factors(self, dice: torch.Generator) -> Tensor:
        """(K,): a random factor for each target."""
        first = next(iter(self.cotangent.params.values()))
        return random_like(first.new_empty(self.cotangent.targets), dice)

    def added(self, rows: Tensor) -> Callable:
        """The outputs, added up with the factors `rows`: a measure of one number."""
        return lambda model: (rows * self.measure(model)[self.some]).sum().reshape(1)


def check_measure(
    run: Run, state: State, measure: Callable, cotangent: Cotangent, targets: slice | None = None
) -> float | None:
    """Raise NotDifferentiable if `cotangent`, ∂φ/∂s_T, is not how measure moves with the final state.

    `targets` are the outputs that the cotangent is of. Returns the relative difference found, or None, with
    a warning, where no finite difference is steady, or where float32 holds little of it but noise.
    """
    claim = _Claim(run, state, measure, cotangent, targets or slice(None))
    _check_together(claim)
    if run.dtype == torch.float64:
        with InDouble():
            return _check_slopes(claim, DOUBLE)
    try:
        with determinism.alone(), InDouble():
            found, least, lone = _measure_in_double(claim)
    except NotDifferentiable:
        raise
    except Exception:  # it may insist on float32
        return _check_slopes(claim, SINGLE)
    return None if _drowned(claim, lone, least) else found


def _check_together(claim: _Claim) -> None:
    """Raise NotDifferentiable unless K derivatives taken together add up to that of the sum.

    Both are made from one forward pass, so what rounding did there does not matter.
    """
    rows = claim.factors(torch.Generator().manual_seed(1))
    alone = measure_vjp(claim.run, claim.state, claim.added(rows), chunk=1)
    found = claim.cotangent.flatten()
    pairs = {k: (x[0], torch.tensordot(rows, found[k], 1)) for k, x in alone.flatten().items()}
    largest = max((x.norm().item() for x, _ in pairs.values()), default=0.0)
    for name, (x, y) in pairs.items():
        if not (x - y).norm().item() <= TOLERANCE * (x.norm().item() + TOLERANCE * largest):
            raise NotDifferentiable(
                f"measure: the derivatives of {len(rows)} outputs in {name}, taken together, do not add up "
                "to that of their sum. An operation in it has a wrong batched derivative in PyTorch: measure "
                "one output at a time, or write the operation out"
            )


def _measure_in_double(claim: _Claim) -> tuple[float | None, int, Cotangent]:
    """The relative difference found in float64; the output nearest to 0, and its derivative in float64.

    One number is differentiated, the outputs added up with random factors, so that K derivatives in
    float64 need no room.
    """
    run, state = claim.run, claim.state
    exact = State(
        {name: in_double(p) for name, p in state.params.items()},
        {name: in_double(b) for name, b in state.buffers.items()},
        {name: {} for name in state.params},
        state.step,
        moved=state.moved,
    )
    with torch.no_grad():
        outputs = run.measured(claim.measure, exact.params, exact.buffers)[claim.some]
    together = claim.added(random_like(outputs, torch.Generator().manual_seed(1)))
    pulled = measure_vjp(run, exact, together, chunk=1)
    found = _check_slopes(_Claim(run, exact, together, pulled, slice(None)), DOUBLE)
    del pulled
    least = outputs.abs().argmin().item()
    lone = claim.added(torch.eye(len(outputs), dtype=outputs.dtype)[least].to(outputs.device))
    return found, least, measure_vjp(run, exact, lone, chunk=1)


def _drowned(claim: _Claim, exact: Cotangent, least: int) -> bool:
    """Warn, and say so, if rounding makes up much of the derivative of the output that is nearest to 0."""
    pairs = [(x.double()[least], exact.params[name][0]) for name, x in claim.cotangent.params.items()]
    far, size = sum((x - y).square().sum() for x, y in pairs), sum(y.square().sum() for _, y in pairs)
    assert isinstance(size, Tensor), "a run trains at least one parameter"
    off = (far / size.clamp_min(1e-300)).sqrt().item()
    if off > DROWNED:
        warn(
            f"in the run's precision {off:.0%} of the derivative of output {(claim.some.start or 0) + least} "
            "of measure is rounding: it is nearly 0, as the loss of an example is that is predicted well. "
            "Measure a logit or a margin, or train in float64"
        )
    return off > DROWNED


def _check_slopes(claim: _Claim, precision: _Precision) -> float | None:
    """Raise NotDifferentiable if the claim is wrong along most of some random directions.

    Returns the largest relative difference where it is right, or None, with a warning, if nothing is steady.
    """
    dice = torch.Generator().manual_seed(0)
    right: list[tuple[float, Slope]] = []
    wrong: list[tuple[float, Slope]] = []
    for _ in range(DIRECTIONS):
        seen, slope, moves = _compare(claim, precision, dice)
        if not moves:
            raise NotDifferentiable(
                "measure does not move with the model that it is given; it must call its argument, not a "
                "model from outside"
            )
        if slope is not None:
            (right if slope.agrees(seen, 2 * slope.tolerance) else wrong).append((seen, slope))
        if len(right) > len(wrong):
            return max(slope.gap(seen) for seen, slope in right)
    if not wrong:
        warn("measure could not be checked: finite differences of it are not steady")
        return None
    seen, slope = wrong[0]
    raise NotDifferentiable(
        f"measure: autograd's derivative along a random direction is {seen:.6g}, a finite difference gives "
        f"{slope.value:.6g}. Something in it leaves PyTorch: look for .item(), .numpy() or argmax, "
        "or for a cast to low precision whose rounding is as large as that"
    )


def _compare(claim: _Claim, precision: _Precision, dice) -> tuple[float, Slope | None, bool]:
    """The derivative along a random direction, by the cotangent and by differences; whether it moves."""
    run, state, cotangent = claim.run, claim.state, claim.cotangent
    point = state.params | {name: state.buffers[name] for name in cotangent.buffers}
    pulled = cotangent.params | cotangent.buffers
    rows = claim.factors(dice)
    direction = {name: random_like(x, dice) * x for name, x in point.items()}
    seen = sum((torch.tensordot(rows, pulled[name], 1) * d).sum().item() for name, d in direction.items())

    def along(epsilon: float) -> float:
        moved = {name: x + epsilon * direction[name] for name, x in point.items()}
        params = {name: moved[name] for name in state.params}
        buffers = {name: moved.get(name, b) for name, b in state.buffers.items()}
        with torch.no_grad():
            outputs = run.measured(claim.measure, params, buffers)
        return (rows.double() * outputs[claim.some].double()).sum().item()

    slope = steady(along, precision.steps, precision.tolerance, seen, precision.rounding)
    moves = seen != 0 or slope is None or slope.value != 0 or along(0.5) != along(-0.5)
    return seen, slope, moves
