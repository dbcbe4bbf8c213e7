"""One step of a run, done and measured: what a replay's plan is made from."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..kernels.graph import graph_nodes
from ..training import determinism
from ..training.record import checksums
from ..training.run import Run
from ..training.state import Cotangent, State
from . import footprint
from .adjoint import traced_vjp
from .places import Disk, written
from .tracing import trace
from .witness import examples_of

# What the witness (`check_step`) holds at its peak beside activations: the model's copy, the point, the
# direction, the gradient, its random weights and the derivative, and up to three more while autograd is at
# work. Each is as large as the parameters in float64. Measured on MLPs of 64 to 1,024 units: 8.1 to 9.9 such
# copies, nearer to nine for the larger ones, where it matters.
WITNESS_COPIES = 9
# The witness's activations, beside a trace and a pull of as many examples in float64. Measured on
# convolutional nets, where activations are all that counts: 1.03 to 1.05; an MLP and a transformer take less.
WITNESS_ACTIVATIONS = 1.1


@dataclass(frozen=True)
class StepCost:
    """What one step takes, in bytes and seconds: a state, a trace, and a target pulled back.

    state_bytes    a state, as it is kept
    trace_bytes    a trace: the next state, the gradient, and the graph that they were computed by
    target_bytes   a target's cotangent, kept from step to step, and a gradient that is added to it
    pull_bytes     what pulling one target through a step holds meanwhile
    check_bytes    what the witness holds while it checks a step, by a rule (`_witness_bytes`)
    disk_seconds   a state written and read again; 0 without a folder

    same_bits  a traced step gives training's bits, so that a trace may stand for a step
    batched    targets can be pulled back together
    convolves  there is a convolution in the model
    """

    state_bytes: int
    trace_bytes: int
    target_bytes: int
    pull_bytes: int
    check_bytes: int
    step_seconds: float
    trace_seconds: float
    pull_seconds: float
    disk_seconds: float
    same_bits: bool
    batched: bool
    convolves: bool


def measure_step(run: Run, targets: int, disk: Path | None = None, data: bool = False) -> StepCost:
    """Measure the second step of the run, or its only one: the first makes the optimizer's slots.

    With `data`, the step is pulled back to the inputs of its batch as well.

    The step is traced and pulled through twice. The first time bytes are counted, which is slow, and what
    PyTorch sets up at a first call is set up; the second time the clock runs.
    """
    weights, together = run.weights(), min(targets, 2)
    with determinism.alone():
        after_first = run.step(run.initial, weights)
        state = after_first if run.steps > 1 else run.initial
        after, step_seconds = _timed(lambda: run.step(state, weights))
        held = _held(run, state, together, data)
        traced, trace_seconds = _timed(lambda: trace(run, state, weights, data=data))
        cotangent = _ones(traced.after, together)
        _, pull_seconds = _timed(lambda: traced_vjp(run, traced, cotangent))
        disk_seconds = 0.0 if disk is None else _disk_seconds(run, after_first, disk)
    state_bytes = _nbytes(written(after_first))
    gradient_bytes = _nbytes(run.initial.params)
    return StepCost(
        state_bytes=state_bytes,
        trace_bytes=held.trace,
        target_bytes=cotangent.nbytes // together + gradient_bytes,
        pull_bytes=held.pull,
        check_bytes=_witness_bytes(run, held.trace + held.pull, state_bytes, gradient_bytes),
        step_seconds=step_seconds,
        trace_seconds=trace_seconds,
        pull_seconds=pull_seconds / together,
        disk_seconds=disk_seconds,
        same_bits=checksums(traced.after) == checksums(after),
        batched=held.batched,
        convolves=held.convolves,
    )


@dataclass(frozen=True)
class _Held:
    """Bytes that a trace holds, and that a pull of one target holds beside it; and what was seen there."""

    trace: int
    pull: int
    batched: bool
    convolves: bool


def _held(run: Run, state: State, together: int, data: bool) -> _Held:
    weights = run.weights()
    traced, trace_bytes, _ = footprint.measured(lambda: trace(run, state, weights, data=data), run.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pull = partial(traced_vjp, run, traced, _ones(traced.after, together))
        _, _, pull_bytes = footprint.measured(pull, run.device)
    batched = not any("one by one" in str(w.message) for w in caught)
    convolves = any("Conv" in node.name() for node in graph_nodes(traced.last.outputs))
    return _Held(trace_bytes, pull_bytes // together, batched, convolves)


def _witness_bytes(run: Run, traced_and_pulled: int, state: int, gradient: int) -> int:
    """What `check_step` holds at its peak.

    It does in float64 what a trace and a pull do, but on a few examples of the batch only. So of the bytes
    of these two it takes the part that grows with the batch, in proportion. What does not grow are a state
    and a gradient in the trace, and a cotangent, as large as a state, and about two gradients in the pull:
    they are taken off, and the witness's own copies are put in their place, and its copy of what is frozen.
    """
    wider = 8 / run.dtype.itemsize  # a number in float64, beside one of the run's
    share = min(examples_of(run), len(run.batches[0])) / len(run.batches[0])
    activations = max(0, traced_and_pulled - 2 * state - 3 * gradient)
    frozen = 8 * sum(p.numel() for p in run.network.frozen.values())
    return int(wider * (WITNESS_ACTIVATIONS * share * activations + WITNESS_COPIES * gradient)) + frozen


def _disk_seconds(run: Run, state: State, disk: Path) -> float:
    with tempfile.TemporaryDirectory(prefix=".magic-trial-", dir=disk) as folder:
        place = Disk(Path(folder), run.initial)

        def there_and_back() -> State:
            place.save(1, state)
            return place.load(1)

        return _timed(there_and_back)[1]


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _timed(work: Callable):
    """The result, and the seconds that it took. A GPU works on its own, so it is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _ones(state: State, count: int) -> Cotangent:
    """A cotangent of `count` targets to try a pull with; its numbers do not matter."""

    def like(tensors: dict) -> dict:
        return {k: x.new_ones(count, *x.shape) for k, x in tensors.items() if x.is_floating_point()}

    slots = {name: like(of) for name, of in state.slots.items()}
    return Cotangent(like(state.params), {}, slots, state.step)
