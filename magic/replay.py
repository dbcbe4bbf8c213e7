"""REPLAY: differentiate a whole training run. Here schedule, store, step and adjoint meet.

Engstrom et al. 2025, arXiv 2503.13751, section 3. The metagradient ∂φ(f(w))/∂w is computed exactly:
states are recomputed from the few that are kept, last step first, and the cotangent ∂φ/∂s is pulled
back through each. All K measured outputs go back together, so the recomputation is paid once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import determinism, schedule
from .adjoint import measure_vjp, step_vjp
from .progress import bar
from .run import NonFinite, Run
from .state import State
from .store import Memory
from .witness import check_measure, check_step

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(memory: float | str) -> int:
    """2_000_000_000 from "2GB", 2e9 or 2_000_000_000."""
    if isinstance(memory, (int, float)):
        return int(memory)
    text = str(memory).strip().upper()
    for unit in sorted(UNITS, key=len, reverse=True):
        if text.endswith(unit):
            try:
                return int(float(text[: -len(unit)]) * UNITS[unit])
            except ValueError:
                break
    raise ValueError(f'memory={memory!r}: write a number of bytes, or a string such as "500MB" or "2GB"')


@dataclass(frozen=True)
class Plan:
    """What a replay will keep and repeat, known before it starts."""

    steps: int
    states: int
    state_bytes: int
    extra: int

    def actions(self):
        """The schedule itself."""
        if self.states >= self.steps:
            return schedule.store_all(self.steps)
        return schedule.binomial(self.steps, self.states)

    def __str__(self) -> str:
        size = self.states * self.state_bytes / 1e6
        return (
            f"replay of {self.steps:,} steps: {self.states:,} states kept ({size:,.1f} MB), "
            f"{self.extra:,} steps done again ({self.extra / self.steps:.2f} per step)"
        )


def plan(run: Run, states: int | None = None, memory: float | str = "1GB") -> Plan:
    """How many states to keep: `states` if given (s_0 counts), else as many as fit into `memory`.

    `memory` bounds the states kept; the state being advanced, the K cotangents and the trace of one
    step come on top.
    """
    # An optimizer's slots fill in the first step, so s_1 tells the size.
    with determinism.fix():
        shared = {id(x) for x in run.initial.buffers.values()}
        first = run.step(run.initial, run.weights()).flatten().values()
        state_bytes = sum(x.numel() * x.element_size() for x in first if id(x) not in shared)
    if states is not None and not isinstance(states, int):
        raise TypeError(f"states={states!r}: the number of states to keep is an integer")
    if states is None:
        states = parse_bytes(memory) // state_bytes
        if states < 1:
            raise ValueError(
                f"memory={memory!r} holds not one state; the least that works is {state_bytes:,} bytes"
            )
    states = min(states, run.steps)
    draft = Plan(run.steps, states, state_bytes, 0)
    return Plan(run.steps, states, state_bytes, schedule.cost(draft.actions(), run.steps).extra)


@dataclass(frozen=True)
class Replay:
    """What a replay found, and what it took.

    values   (K, n), ∂φ_k(f(w))/∂w_i
    outputs  (K,), φ(f(w))
    """

    values: Tensor
    outputs: Tensor
    plan: Plan
    peak_states: int
    peak_bytes: int


def metagradient(
    run: Run, measure: Callable, weights: Tensor, planned: Plan, progress: bool = True
) -> Replay:
    """The exact derivative of measure(trained model) with respect to every data weight, at `weights`."""
    store, state, cotangent = Memory(), run.initial, None
    values = outputs = None
    witnessed = {run.steps // 3, 2 * run.steps // 3} - {run.steps - 1}
    measured_outputs(run, run.initial, measure, finite=False)  # a mistake in measure is told before training
    total = 2 * run.steps + planned.extra
    with determinism.fix(), bar(total, "differentiate", progress) as shown:
        for action in planned.actions():
            match action:
                case schedule.Save(t):
                    store.save(t, state)
                case schedule.Load(t):
                    state = store.load(t)
                case schedule.Drop(t):
                    store.drop(t)
                case schedule.Advance(_, to):
                    state = run.advance(state, to, weights, shown)
                case schedule.Adjoint(t):
                    if cotangent is None:  # the end of the first way down: one more step to s_T
                        final = run.advance(state, t + 1, weights, shown)
                        check_step(run, state, weights)
                        outputs = measured_outputs(run, final, measure)
                        cotangent = measure_vjp(run, final, measure)
                        check_measure(run, final, measure, cotangent)
                        values = outputs.new_zeros(len(outputs), run.n)
                    if t in witnessed:
                        check_step(run, state, weights, directions=1)
                    cotangent, scores = step_vjp(run, state, cotangent, weights)
                    _check_finite(scores, cotangent, t)
                    values.index_add_(1, run.batches[t].to(values.device), scores.to(values.dtype))
                    shown.update()
    return Replay(values, outputs, planned, store.peak_states, store.peak_bytes)


def measured_outputs(run: Run, state: State, measure: Callable, finite: bool = True) -> Tensor:
    """φ at this state, (K,), computed as a user would: with PyTorch's own operations."""
    with torch.no_grad(), determinism.fix():
        outputs = run.measured(measure, state.params, state.buffers)
    if finite and not outputs.isfinite().all():
        raise NonFinite(f"measure returned {outputs[~outputs.isfinite()][0].item()} for the trained model")
    return outputs


def _check_finite(scores: Tensor, cotangent: State, t: int) -> None:
    # What is not finite in the cotangent shows in the scores of the step before it.
    if scores.isfinite().all():
        return
    tensors = cotangent.flatten() | {"scores": scores}
    name = next(name for name, x in tensors.items() if not x.isfinite().all())
    raise NonFinite(
        f"the derivative became infinite or NaN at step {t}, first in {name!r}: the training is "
        "chaotic there. Lower the learning rate, or warm it up"
    )
