"""One step of a run, tried and measured: what a replay's plan is made from."""

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
from .adjoint import trace, traced_vjp
from .places import Disk, written
from .witness import EXAMPLES


@dataclass(frozen=True)
class Trial:
    """One step, tried: bytes and seconds of a state, a trace, and a target pulled back.

    target_bytes   a target's cotangent, kept from step to step
    pull_bytes     what pulling one target through a step holds meanwhile
    check_bytes    what the witness holds, a step of a few examples in float64: as a rule

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


def try_step(run: Run, targets: int, disk: Path | None = None) -> Trial:
    """Measure the second step of the run (the first fills the optimizer's slots), or its only one."""
    weights = run.weights()
    with determinism.alone():
        after_first = run.step(run.initial, weights)
        state = after_first if run.steps > 1 else run.initial
        expected, step_seconds = _timed(lambda: run.step(state, weights))
        (traced, trace_bytes, _), _ = _timed(
            lambda: footprint.measured(lambda: trace(run, state, weights), run.device)
        )
        at_once = min(targets, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cotangent = _ones(traced.after, at_once)
            _, _, pull_bytes = footprint.measured(partial(traced_vjp, run, traced, cotangent), run.device)
        batched = not any("one by one" in str(w.message) for w in caught)
        convolves = any("Conv" in node.name() for node in graph_nodes(list(traced.grads.values())))
        del traced, cotangent
        again, trace_seconds = _timed(lambda: trace(run, state, weights))
        cotangent = _ones(again.after, at_once)
        _, pull_seconds = _timed(lambda: traced_vjp(run, again, cotangent))
        disk_seconds = 0.0
        if disk is not None:
            with tempfile.TemporaryDirectory(prefix=".magic-trial-", dir=disk) as folder:
                place = Disk(Path(folder), run.initial)
                _, disk_seconds = _timed(lambda: (place.save(1, after_first), place.load(1)))
    nbytes = sum(x.numel() * x.element_size() for x in written(after_first).values())
    gradient = sum(x.numel() * x.element_size() for x in run.initial.params.values())
    share = min(EXAMPLES, len(run.batches[0])) / len(run.batches[0]) * 8 / run.dtype.itemsize
    return Trial(
        state_bytes=nbytes,
        trace_bytes=trace_bytes,
        target_bytes=cotangent.nbytes // at_once + gradient,
        pull_bytes=pull_bytes // at_once,
        check_bytes=int(share * (trace_bytes + pull_bytes // at_once)) + 14 * gradient,
        step_seconds=step_seconds,
        trace_seconds=trace_seconds,
        pull_seconds=pull_seconds / at_once,
        disk_seconds=disk_seconds,
        same_bits=checksums(again.after) == checksums(expected),
        batched=batched,
        convolves=convolves,
    )


def _timed(work: Callable):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _ones(state: State, count: int) -> Cotangent:
    """A cotangent of `count` targets, to try with."""

    def like(tensors: dict) -> dict:
        return {k: x.new_ones(count, *x.shape) for k, x in tensors.items() if x.is_floating_point()}

    slots = {name: like(of) for name, of in state.slots.items()}
    return Cotangent(like(state.params), {}, slots, state.step)
