"""A finite difference as witness: does the adjoint see everything the step does?

Autograd differentiates what it is shown. A `detach()`, a `no_grad()` block, a buffer updated behind
its back or an autograd Function with a wrong second derivative changes the derivative of a training
run without any error. So while a replay goes back, some steps are compared with what they really do
when their inputs move. The optimizer's update is ours and tested; compared is the part that is the
user's: the gradient and the buffers as functions of parameters, buffers and weights, all of it in float64
(`magic.kernels.precision`). What is measured is compared in `magic.engine.measure_witness`.

A derivative is called wrong only if it is wrong in every direction tried, for a missing path is, and a
kink is not. The directions are random and scale each number by 1 + ε, so that exact zeros stay where they
are (many are kinks) and variances stay positive. A random direction misses what is small along it: this is
a witness, not a proof.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels.graph import graph_nodes
from ..kernels.precision import InDouble
from ..training import determinism
from ..training.arguments import sharing_copy
from ..training.examples import each
from ..training.network import Network
from ..training.run import Run
from ..training.state import State
from .finite_difference import DIRECTIONS, Slope, in_double, random_like, steady, warn
from .refusals import NotDifferentiable, refusing
from .vjp import pull

# Step sizes, small first: a ReLU that flips between the two ends spoils a difference. But they are a hundred
# times those that rounding is measured with (`steady`): nearer to them, an error of the derivative would
# pass for rounding and excuse itself. The last ones are for arithmetic that is in float32 inside without a
# cast that `magic.kernels.precision` could undo.
STEPS = (1e-7, 1e-6, 1e-4, 1e-3, 1e-2)
TOLERANCE = 1e-3  # relative; a missing path changes a derivative by far more, and a difference is this good
EXAMPLES, FEW = 8, 2  # of a batch; few in a large model, where each takes much memory and time
LARGE = 10_000_000  # parameters


def examples_of(run: Run) -> int:
    """How many examples of a batch are looked at. Their number does not matter to what is checked, except
    to a normalisation over the batch, which makes of two examples nothing but their order."""
    large = sum(p.numel() for p in run.network.module.parameters()) > LARGE
    over_batch = any(isinstance(x, nn.modules.batchnorm._NormBase) for x in run.network.module.modules())
    return FEW if large and not over_batch else EXAMPLES


def check_step(
    run: Run, state: State, weights: Tensor, directions: int = 2, data: bool = False
) -> float | None:
    """Raise NotDifferentiable if the derivative of the step at `state` is not what the step does.

    data  whether it is looked at as a function of its floating-point inputs as well

    Returns the relative difference found, or None, with a warning, where no finite difference is
    steady enough to tell (arithmetic in low precision that no cast shows).
    """
    dice = torch.Generator().manual_seed(0)
    unchecked = f"the derivative of step {state.step} could not be checked against the step itself"
    with determinism.alone():
        try:
            gradient, point = _gradient_of(run, state, weights, examples_of(run), data)
        except Exception:  # it may insist on a whole batch
            try:
                gradient, point = _gradient_of(run, state, weights, len(run.batches[state.step]), data)
            except Exception as error:
                warn(f"{unchecked}: it does not run in float64 ({str(error).splitlines()[0]})")
                return None
        right: list[tuple[float, Slope]] = []
        wrong: list[tuple[float, Slope]] = []
        for tried in range(DIRECTIONS):
            if tried >= directions and not wrong:
                break
            direction = {name: random_like(x, dice) * x for name, x in point.items()}
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
            warn(f"{unchecked}: finite differences are not steady. Part of it may be in low precision")
            return None
        return max(slope.gap(seen) for seen, slope in right)


def _gradient_of(run: Run, state: State, weights: Tensor, examples: int, data: bool = False):
    """The step's gradient and buffers as a function of one dict of float64 tensors, and the point; with
    `data`, the inputs of the batch are in it.

    Of the batch, the first few examples; their number does not matter to what is checked.
    """
    t = state.step
    shadow = copy.copy(run)
    shadow.accumulate, shadow.ranks = 1, None  # a sum of gradients has the derivative of its terms
    module = sharing_copy(run.network.module, run.network.frozen.values())
    shadow.network = Network(module.double())
    shadow.data = each(lambda x: in_double(x[:examples]), run.batch(t))
    shadow.collate = None
    shadow.batches = [torch.arange(min(examples, len(run.batches[t])), device="cpu")]
    buffers = {name: in_double(b) for name, b in state.buffers.items()}
    point = {f"params/{name}": in_double(p) for name, p in state.params.items()}
    point |= {f"buffers/{name}": buffers[name] for name in run.moved(state)}
    point["weights"] = in_double(weights[run.batches[t].to(weights.device)][:examples])
    batch = shadow.data
    if data:
        point |= {f"data/{i}": x for i, x in enumerate(batch) if x.is_floating_point()}

    def gradient(values: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        if data:
            shadow.data = tuple(values.get(f"data/{i}", x) for i, x in enumerate(batch))
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


def _compare(gradient, point: dict, direction: dict, dice) -> tuple[float, Slope | None, str]:
    """The derivative along `direction`, weighted at random: by autograd, and by differences if steady.

    With the names of the user's autograd Functions that it went through.
    """
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in point.items()}
        outputs = gradient(leaves, create_graph=True)
        outputs = {name: y for name, y in outputs.items() if y.isfinite().all()}  # a mask may hold −∞
        own = _own_functions(list(outputs.values()))
        rows = _rows(outputs, dice)
        cotangents = [c.unsqueeze(0) for c in rows.values()]
        ((_, pulled),) = pull(list(outputs.values()), list(leaves.values()), lambda _: cotangents, 1)
        seen = sum((g[0] * d).sum() for g, d in zip(pulled, direction.values(), strict=True)).item()

    def along(epsilon: float) -> float:
        moved = {name: x + epsilon * direction[name] for name, x in point.items()}
        with torch.enable_grad():
            outputs = gradient(moved)
        return sum((c * outputs[name].detach()).sum() for name, c in rows.items()).item()

    return seen, steady(along, STEPS, TOLERANCE, seen, rounding=1e-9), own


def _rows(outputs: dict[str, Tensor], dice: torch.Generator) -> dict[str, Tensor]:
    """A random factor for each number of the outputs, so that they add up to one number.

    Each tensor counts the same, whatever its size; but a gradient that is rounding noise beside the largest
    one does not count at all.
    """
    sizes = {name: y.detach().norm().item() for name, y in outputs.items()}
    largest = max((size for name, size in sizes.items() if not name.startswith("buffers/")), default=0.0)
    told = {n: n.startswith("buffers/") or size > 1e-12 * largest for n, size in sizes.items()}
    return {n: random_like(y, dice) * (told[n] / (sizes[n] + 1e-300)) for n, y in outputs.items()}


def _own_functions(tensors: list[Tensor]) -> str:
    """The names of the user's autograd Functions in the graphs of these tensors, comma-separated."""
    own = torch.autograd.function.BackwardCFunction
    names = {node.name(): True for node in graph_nodes(tensors) if isinstance(node, own)}
    return ", ".join(name for name in names if not name.startswith("_"))
