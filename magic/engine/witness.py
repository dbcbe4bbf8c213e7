"""A finite difference as witness: does the adjoint see everything the step does?

Autograd differentiates what it is shown. A `detach()`, a `no_grad()` block, a buffer updated behind
its back or an autograd Function with a wrong second derivative changes the derivative of a training
run without any error. So while a replay goes back, some steps are compared with what they really do
when their inputs move. The optimizer's update is ours and tested; compared is the part that is the
user's: the gradient and the buffers as functions of parameters, buffers and weights, and what is measured
as a function of the final state, all of it in float64 (`magic.kernels.precision`).

A finite difference has doubts of its own: rounding, which is measured on the spot, and kinks, which two
step sizes see differently. What lies within them is no error; and a derivative is called wrong only if
it is wrong in every direction tried, for a missing path is, and a kink is not.

The directions are random and scale each number by 1 + ε, so that exact zeros stay where they are (many
are kinks) and variances stay positive. A random direction misses what is small along it: this is a
witness, not a proof.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.graph import graph_nodes
from ..kernels.precision import InDouble
from ..training import determinism, optim
from ..training.arguments import clean_copy
from ..training.examples import each
from ..training.network import Network
from ..training.run import Run
from ..training.state import Cotangent, State
from .adjoint import NotDifferentiable, Traced, measure_vjp, own_functions, pull, refusing

# Step sizes, small first: a ReLU that flips between the two ends spoils a difference. But they are a hundred
# times those that rounding is measured with (`_steady`): nearer to them, an error of the derivative would
# pass for rounding and excuse itself. The last ones are for arithmetic that is in float32 inside without a
# cast that `magic.kernels.precision` could undo.
STEPS = (1e-7, 1e-6, 1e-4, 1e-3, 1e-2)
TOLERANCE = 1e-3
DROWNED = 0.05  # the share of a derivative that rounding may make up
DIRECTIONS = 3  # tried before a derivative is called wrong
NOISE = 100  # rounding errors that a number may have gathered which is a difference of larger ones
EXAMPLES = 8  # of a batch


def check_step(run: Run, state: State, weights: Tensor, directions: int = 2) -> float | None:
    """Raise NotDifferentiable if the derivative of the step at `state` is not what the step does.

    Returns the relative difference found, or None, with a warning, where no finite difference is
    steady enough to tell (arithmetic in low precision that no cast shows).
    """
    dice = torch.Generator().manual_seed(0)
    unchecked = f"the derivative of step {state.step} could not be checked against the step itself"
    with determinism.alone():
        try:
            gradient, point = _in_double(run, state, weights, EXAMPLES)
        except Exception:  # it may insist on a whole batch
            try:
                gradient, point = _in_double(run, state, weights, len(run.batches[state.step]))
            except Exception as error:
                _warn(f"{unchecked}: it does not run in float64 ({str(error).splitlines()[0]})")
                return None
        right, wrong = [], []
        for tried in range(DIRECTIONS):
            if tried >= directions and not wrong:
                break
            direction = {name: _random(x, dice) * x for name, x in point.items()}
            with refusing(f"step {state.step}"):
                seen, slope, own = _compare(gradient, point, direction, dice)
            if slope is not None:
                (right if slope.agrees(seen, TOLERANCE) else wrong).append((seen, slope))
        if len(wrong) > len(right):
            seen, slope = wrong[0]
            raise NotDifferentiable(
                f"step {state.step}: autograd's derivative of the step along a random direction is "
                f"{seen:.6g}, a finite difference gives {slope.value:.6g}. Something in the model or loss "
                "acts behind autograd's back: look for .item(), .numpy(), activation checkpointing, or an "
                "autograd Function that cannot be differentiated twice"
                + (f" (this run has {own}). " if own else ". ")
                + "A backward that is not the derivative of its forward, as of a straight-through estimator, "
                "can be written so that both are seen: a * x + (y - a * x).detach() is y, with gradient a"
            )
        if not right:
            _warn(f"{unchecked}: finite differences are not steady. Part of it may be in low precision")
            return None
        return max(slope.gap(seen) for seen, slope in right)


def _in_double(run: Run, state: State, weights: Tensor, examples: int):
    """The step's gradient and buffers as a function of one dict of float64 tensors, and the point.

    Of the batch, the first few examples; their number does not matter to what is checked.
    """
    t = state.step
    shadow = copy.copy(run)
    shadow.network = Network(clean_copy(run.network.module).double())
    shadow.data = each(lambda x: _double(x[:examples]), run.batch(t))
    shadow.batches = [torch.arange(min(examples, len(run.batches[t])), device="cpu")]
    buffers = {name: _double(b) for name, b in state.buffers.items()}
    point = {f"params/{name}": _double(p) for name, p in state.params.items()}
    point |= {f"buffers/{name}": buffers[name] for name in run.moved(state)}
    point["weights"] = _double(weights[run.batches[t].to(weights.device)][:examples])

    def gradient(values: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        params = {name: values[f"params/{name}"] for name in state.params}
        held = {name: values.get(f"buffers/{name}", b) for name, b in buffers.items()}
        if not create_graph:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        with InDouble():
            found = shadow.gradient(params, held, values["weights"], 0, create_graph)
        after = {f"buffers/{name}": b for name, b in found.buffers.items() if b.is_floating_point()}
        return {name: g for name, g in found.by_name.items() if g is not None} | after

    with torch.enable_grad():
        gradient(point)
    return gradient, point


def check_measure(
    run: Run, state: State, measure, cotangent: Cotangent, targets: slice | None = None
) -> float | None:
    """Raise NotDifferentiable if `cotangent`, ∂φ/∂s_T, is not how measure moves with the final state.

    `targets` are the outputs that the cotangent is of. All is done in float64, and where measure does not
    run in it, in the run's own precision. Returns the relative difference found, or None, with a warning,
    where no finite difference is steady, or where float32 holds no more of the derivative than noise.
    """
    some = targets or slice(None)
    _check_together(run, state, measure, cotangent, some)
    if run.dtype == torch.float64:
        with InDouble():
            return _check_measure(run, state, measure, cotangent, some, double=True)
    try:
        with determinism.alone(), InDouble():
            found, least, lone = _measure_in_double(run, state, measure, some)
    except NotDifferentiable:
        raise
    except Exception:  # it may insist on float32
        return _check_measure(run, state, measure, cotangent, some, double=False)
    return None if _drowned(cotangent, lone, least, some.start or 0) else found


def _added(measure, some: slice, rows: Tensor):
    """The outputs in `some`, added up with the factors `rows`: a measure of one number."""
    return lambda model: (rows * measure(model)[some]).sum().reshape(1)


def _check_together(run: Run, state: State, measure, cotangent: Cotangent, some: slice) -> None:
    """Raise NotDifferentiable unless K derivatives taken together add up to that of the sum.

    Both are made from one forward pass, so what rounding did there does not matter.
    """
    rows = _factors(cotangent, torch.Generator().manual_seed(1))
    alone, found = measure_vjp(run, state, _added(measure, some, rows), chunk=1), cotangent.flatten()
    pairs = {k: (x[0], torch.tensordot(rows, found[k], 1)) for k, x in alone.flatten().items()}
    largest = max((x.norm().item() for x, _ in pairs.values()), default=0.0)
    for name, (x, y) in pairs.items():
        if not (x - y).norm().item() <= TOLERANCE * (x.norm().item() + TOLERANCE * largest):
            raise NotDifferentiable(
                f"measure: the derivatives of {len(rows)} outputs in {name}, taken together, do not add up "
                "to that of their sum. An operation in it has a wrong batched derivative in PyTorch: measure "
                "one output at a time, or write the operation out"
            )


def _measure_in_double(run: Run, state: State, measure, some: slice) -> tuple:
    """The relative difference found in float64; the output nearest to 0, and its derivative in float64.

    One number is differentiated, the outputs added up with random factors, so that K derivatives in
    float64 need no room.
    """
    exact = State(
        {name: _double(p) for name, p in state.params.items()},
        {name: _double(b) for name, b in state.buffers.items()},
        {name: {} for name in state.params},
        state.step,
        moved=state.moved,
    )
    with torch.no_grad():
        outputs = run.measured(measure, exact.params, exact.buffers)[some]
    together = _added(measure, some, _random(outputs, torch.Generator().manual_seed(1)))
    pulled, every = measure_vjp(run, exact, together, chunk=1), slice(None)
    found = _check_measure(run, exact, together, pulled, every, double=True)
    del pulled
    least = outputs.abs().argmin().item()
    lone = _added(measure, some, torch.eye(len(outputs), dtype=outputs.dtype)[least].to(outputs.device))
    return found, least, measure_vjp(run, exact, lone, chunk=1)


def _drowned(cotangent: Cotangent, exact: Cotangent, least: int, first: int) -> bool:
    """Warn, and say so, if rounding makes up much of the derivative of the output that is nearest to 0."""
    pairs = [(x.double()[least], exact.params[name][0]) for name, x in cotangent.params.items()]
    far, size = sum((x - y).square().sum() for x, y in pairs), sum(y.square().sum() for _, y in pairs)
    off = (far / size.clamp_min(1e-300)).sqrt().item()
    if off > DROWNED:
        _warn(
            f"in the run's precision {off:.0%} of the derivative of output {first + least} of measure is "
            "rounding: it is nearly 0, as the loss of an example is that is predicted well. Measure a logit "
            "or a margin, or train in float64"
        )
    return off > DROWNED


def _check_measure(run: Run, state: State, measure, cotangent, some: slice, double: bool) -> float | None:
    dice, right, wrong = torch.Generator().manual_seed(0), [], []
    for _ in range(DIRECTIONS):
        seen, slope, moves = _compare_measure(run, state, measure, cotangent, some, dice, double)
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
        _warn("measure could not be checked: finite differences of it are not steady")
        return None
    seen, slope = wrong[0]
    raise NotDifferentiable(
        f"measure: autograd's derivative along a random direction is {seen:.6g}, a finite difference gives "
        f"{slope.value:.6g}. Something in it leaves PyTorch: look for .item(), .numpy() or argmax, "
        "or for a cast to low precision whose rounding is as large as that"
    )


def check_batching(alone: tuple, together: tuple, traced: Traced) -> None:
    """Raise NotDifferentiable unless the last of several targets pulled back together is what it is alone.

    Both are (cotangent, scores). PyTorch's batched derivative of an operation may be wrong where its plain
    one is right. A tensor may differ by the root of a rounding error, relative to its largest number. And
    it may differ by the noise of numbers as large as those beside it: the bias of an attention's keys, to
    which the softmax is blind, has a cotangent that is nothing else.
    """
    (cotangent, scores), (all_cotangents, all_scores) = alone, together
    flat, eps = all_cotangents.flatten(), _rounding(traced)
    pairs = {name: (x, flat[name][-1:]) for name, x in cotangent.flatten().items() if name in flat}
    pairs = {name: pair for name, pair in pairs.items() if pair[0].numel()} | {
        "the scores": (scores, all_scores[-1:])
    }
    sizes = {name: max(x.abs().max().item() for x in pair) for name, pair in pairs.items()}
    beside: dict[str, float] = {}  # the largest of a kind: params, buffers, a slot of the optimizer
    for name, size in sizes.items():
        beside[_kind(name)] = max(size, beside.get(_kind(name), 0.0))
    for name, (one, last) in pairs.items():
        limit = eps**0.5 * sizes[name] + NOISE * eps * beside[_kind(name)]
        if not (one - last).abs().max().item() <= limit:
            raise NotDifferentiable(
                f"step {traced.state.step}: pulled back together with others, a target gets other values of "
                f"{name} than alone. An operation of the model or the loss has a wrong batched derivative in "
                "PyTorch: measure one output at a time, or write the operation out"
            )


def warn_of_noise(run: Run, traced: Traced, cotangent: Cotangent) -> None:
    """Warn of a parameter whose gradient is nothing but rounding, where Adam makes it matter.

    The bias in front of a normalisation is one. Adam divides the noise by itself, so the parameter wanders;
    where the measure sees it, as through running statistics, so do the outputs and their derivative. The
    bias of an attention's keys wanders as well, but nothing sees it: its cotangent is noise, too.
    """
    if run.rule is not optim.adam:
        return

    def sizes(tensors: dict[str, Tensor]) -> dict[str, float]:
        norms = {name: x.detach().norm().item() for name, x in tensors.items()}
        largest = max(norms.values(), default=0.0)
        return {name: norm / largest for name, norm in norms.items() if norm}

    least = 10 * torch.finfo(run.dtype).eps
    seen = sizes(cotangent.params)
    noisy = [name for name, size in sizes(traced.grads).items() if size < least < seen.get(name, 0.0)]
    if noisy:
        _warn(
            f"step {traced.state.step}: the gradient of {noisy[0]!r} is rounding noise, as that of a bias in "
            "front of a normalisation is, and Adam divides it by itself: what it does to the outputs is "
            "chance. Leave the bias out (bias=False), or do not train it"
        )


def _kind(name: str) -> str:
    """ "slots/layers.0.weight/exp_avg" is a "slots exp_avg"."""
    first, *rest = name.split("/")
    return f"{first} {rest[-1]}" if first == "slots" else first


def _rounding(traced: Traced) -> float:
    """The rounding error of the least precise arithmetic in the step: a model may cast to float32 inside."""
    grads = list(traced.grads.values())
    casts = any(node.name().startswith("ToCopyBackward") for node in graph_nodes(grads))
    return torch.finfo(torch.float32 if casts else grads[0].dtype).eps


def _compare_measure(run: Run, state: State, measure, cotangent, some: slice, dice, double: bool):
    """The derivative along a random direction, by the cotangent and by differences; whether it moves."""
    point = state.params | {name: state.buffers[name] for name in cotangent.buffers}
    pulled = cotangent.params | cotangent.buffers
    rows = _factors(cotangent, dice)
    direction = {name: _random(x, dice) * x for name, x in point.items()}
    seen = sum((torch.tensordot(rows, pulled[name], 1) * d).sum().item() for name, d in direction.items())

    def along(epsilon: float) -> float:
        moved = {name: x + epsilon * direction[name] for name, x in point.items()}
        params = {name: moved[name] for name in state.params}
        with torch.no_grad():
            outputs = run.measured(measure, params, {k: moved.get(k, b) for k, b in state.buffers.items()})
        return (rows.double() * outputs[some].double()).sum().item()

    steps, tolerance = ((1e-6, 1e-4), 1e-3) if double else ((3e-4, 3e-3, 3e-2), 2e-2)
    slope = _steady(along, steps, tolerance, seen, rounding=1e-9 if double else 1e-6)
    moves = seen != 0 or slope is None or slope.value != 0 or along(0.5) != along(-0.5)
    return seen, slope, moves


def _compare(gradient, point: dict, direction: dict, dice) -> tuple[float, _Slope | None, str]:
    """The derivative along `direction`, weighted at random: by autograd, and by differences if steady.

    With the names of the user's autograd Functions that it went through.
    """
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in point.items()}
        outputs = gradient(leaves, create_graph=True)
        outputs = {name: y for name, y in outputs.items() if y.isfinite().all()}  # a mask may hold −∞
        own = own_functions(list(outputs.values()))
        # Each output tensor counts the same, whatever its size, but one that is rounding noise not at all.
        sizes = {name: y.detach().norm().item() for name, y in outputs.items()}
        largest = max((size for name, size in sizes.items() if not name.startswith("buffers/")), default=0.0)
        told = {n: n.startswith("buffers/") or size > 1e-12 * largest for n, size in sizes.items()}
        rows = {n: _random(y, dice) * (told[n] / (sizes[n] + 1e-300)) for n, y in outputs.items()}
        cotangents = [c.unsqueeze(0) for c in rows.values()]
        ((_, pulled),) = pull(list(outputs.values()), list(leaves.values()), lambda _: cotangents, 1)
        seen = sum((g[0] * d).sum() for g, d in zip(pulled, direction.values(), strict=True)).item()

    def along(epsilon: float) -> float:
        moved = {name: x + epsilon * direction[name] for name, x in point.items()}
        with torch.enable_grad():
            outputs = gradient(moved)
        return sum((c * outputs[name].detach()).sum() for name, c in rows.items()).item()

    return seen, _steady(along, STEPS, TOLERANCE, seen, rounding=1e-9), own


@dataclass(frozen=True)
class _Slope:
    """A slope by finite differences, and how far rounding may have moved it."""

    value: float
    doubt: float
    tolerance: float

    def gap(self, seen: float) -> float:
        """The relative difference to the slope that was seen."""
        return abs(seen - self.value) / max(abs(seen), abs(self.value), 1e-300)

    def agrees(self, seen: float, tolerance: float) -> bool:
        return abs(seen - self.value) <= tolerance * max(abs(seen), abs(self.value)) + self.doubt


def _steady(along, steps: tuple[float, ...], tolerance: float, seen: float, rounding: float) -> _Slope | None:
    """The slope of along(ε) at 0 from the first step size at which half and whole steps agree.

    Steps of size `rounding` are too small for anything but rounding to show beside `seen`, so they measure
    it. A step size at which it hides more than a tenth of the slope tells nothing.
    """
    base = along(0.0)
    noise = max(abs(along(k * rounding) - base - k * rounding * seen) for k in (1, -1, 2, -3))
    for h in steps:
        near, far = ((along(k * h) - along(-k * h)) / (2 * k * h) for k in (1, 2))
        doubt = 3 * noise / h
        if abs(near - far) <= tolerance * max(abs(near), abs(far)) and doubt <= 0.1 * max(
            abs(near), abs(seen)
        ):
            return _Slope(near, doubt, tolerance)
    return None


def _factors(cotangent: Cotangent, dice: torch.Generator) -> Tensor:
    """(K,): a random factor for each target."""
    return _random(next(iter(cotangent.params.values())).new_empty(cotangent.targets), dice)


def _random(x: Tensor, dice: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=dice, dtype=x.dtype, device="cpu").to(x.device)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _warn(why: str) -> None:
    warnings.warn(why, stacklevel=3)
