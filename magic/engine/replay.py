"""REPLAY: differentiate a whole training run. Here schedule, store, step and adjoint meet.

Engstrom et al. 2025, arXiv 2503.13751, section 3. The metagradient ∂φ(f(w))/∂w is computed exactly:
states are recomputed from the few that are kept, last step first, and the cotangent ∂φ/∂s is pulled
back through each. Targets go back together, so the recomputation is paid once for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..identity import fingerprints
from ..kernels.escapes import FUNCTION
from ..show import bar
from ..training import determinism
from ..training.adam import warn_of_underflow
from ..training.finite import NonFinite, checked
from ..training.record import ReplayMismatch, checksums
from ..training.run import Run
from ..training.state import Cotangent, State
from . import footprint, health, schedule
from .adjoint import Traced, measure_vjp, refusing, trace, traced_vjp
from .planning import Plan
from .resume import Directory, Progress
from .store import Host, Memory, Store
from .witness import check_batching, check_measure, check_step, warn_of_noise


@dataclass(frozen=True)
class Replay:
    """What a replay found, and what it took.

    values   (K, n), ∂φ_k(f(w))/∂w_i
    outputs  (K,), φ(f(w))
    peak_states, peak_bytes   kept at once in memory, on the host and on disk
    """

    values: Tensor
    outputs: Tensor
    plan: Plan
    health: health.Health
    peak_states: tuple[int, ...] = (0, 0, 0)
    peak_bytes: tuple[int, ...] = (0, 0, 0)


def train(
    run: Run,
    weights=None,
    *,
    disk: str | os.PathLike,
    progress: bool = True,
    allow_negative: bool = False,
    trust: bool | Iterable[str] = False,
) -> State:
    """`run.train(weights)` with a folder: a training that was killed goes on where it was noted last.

    The bits are the same. A training that is finished is read from the folder. Raises ValueError for a
    folder of another run, of other data or code, or from a machine that calculates otherwise; `trust`
    names what of it the reader vouches for, or is True for all code and all that cannot be known.
    """
    weights = run.weights(weights, allow_negative=allow_negative)
    with Directory.open(disk, run, weights, "a training", trust=trust) as folder, determinism.alone():
        passed = run.passed(weights)
        passed.adopt(*folder.passed())
        state = folder.latest() or run.initial
        with bar(run.steps - state.step, "train", progress) as shown:

            def after(state: State) -> None:
                shown.update()
                folder.note_training(state, passed, now=state.step == run.steps)

            return run.advance(state, run.steps, weights, passed, after)


@determinism.in_turn
def metagradient(
    run: Run,
    measure: Callable,
    weights: Tensor,
    planned: Plan,
    progress: bool = True,
    disk: str | os.PathLike | None = None,
    trust: bool | Iterable[str] = False,
) -> Replay:
    """The exact derivative of measure(trained model) with respect to every data weight, at `weights`.

    With `disk`, states may lie there, and a replay that was killed goes on to the same bits.
    """
    start = measured_outputs(run, run.initial, measure, finite=False)  # a mistake in measure is told first
    if disk is None:
        if 2 in planned.tier_of:
            raise ValueError("the plan keeps states on disk: pass disk=, a folder for them")
        return _Sweeps(run, measure, weights, planned, None).all(progress)
    what = f"a replay of {len(start)} targets, {fingerprints.fingerprint(start)} at the start"
    with Directory.open(disk, run, weights, what, measure, trust) as folder:
        made = folder.choices({"group": planned.group, "chunk": planned.chunk})
        return _Sweeps(run, measure, weights, planned.regrouped(**made), folder).all(progress)


class _Sweeps:
    """A replay at work: one way down and back for each group of targets."""

    def __init__(self, run: Run, measure: Callable, weights: Tensor, planned: Plan, folder: Directory | None):
        self.run, self.measure, self.weights, self.plan, self.folder = run, measure, weights, planned, folder
        self.passed = run.passed(weights)
        self.values = self.outputs = None
        self.sizes: dict[int, list[float]] = {}
        self.witnessed: dict[int, float | None] = {}
        self.traced: dict[int, Traced] = {}
        self.known: set[str] = set()
        self.peaks = [(0, 0)] * 3

    def all(self, progress: bool) -> Replay:
        """Every sweep that is still to be made."""
        run, K, group = self.run, self.plan.targets, self.plan.group
        begun = self.folder.progress() if self.folder else None
        if begun is not None:
            self.values, self.outputs, self.sizes = begun.values, begun.outputs, begun.sizes
            self.witnessed, self.passed.verified = begun.witnessed, self.passed.verified + begun.verified
        if self.folder:
            self.passed.adopt(*self.folder.passed())
        first = begun.rows.start if begun else 0
        work = (2 * run.steps + self.plan.extra) * -(-(K - first) // group)
        with determinism.alone(), bar(work, "differentiate", progress) as self.shown:
            for start in range(first, K, group):
                self.rows = slice(start, min(start + group, K))
                self.sweep(begun)
                begun = None
        sizes = tuple((t, tuple(row)) for t, row in sorted(self.sizes.items(), reverse=True))
        found = health.Health(run.steps, sizes, self.passed.verified, self.witnessed)
        return Replay(self.values, self.outputs, self.plan, found, *map(tuple, zip(*self.peaks, strict=True)))

    def sweep(self, begun: Progress | None) -> None:
        """One way down and back, or the rest of one."""
        run, folder = self.run, self.folder
        self.cotangent = begun.cotangent if begun else None
        todo = run.steps if self.cotangent is None else begun.t
        kept = [0, *(t for t in folder.kept(todo) if t > 0)] if folder else None
        places = [Memory(), Host(run.device, run.initial), folder.states if folder else None]
        store = Store(places, self.plan.tier_of, kept or ())
        if kept:
            store.save(0, run.initial)
        self.state = run.initial
        for action in self.plan.actions(kept, todo):
            match action:
                case schedule.Save(t):
                    store.save(t, self.state)
                case schedule.Load(t):
                    if self.state.step != t:
                        self.state = store.load(t)
                case schedule.Drop(t):
                    store.drop(t)
                case schedule.Advance(_, to):
                    self.state = run.advance(self.state, to, self.weights, self.passed, self.after_step)
                case schedule.Trace(_, to):
                    while self.state.step < to:
                        self.trace_on()
                case schedule.Adjoint(t):
                    self.adjoint(t)
        self.peaks = [
            (max(a, b), max(c, d))
            for (a, c), b, d in zip(self.peaks, store.peak_states, store.peak_bytes, strict=True)
        ]
        if folder:
            following = slice(self.rows.stop, min(self.rows.stop + self.plan.group, self.plan.targets))
            folder.note(self.noted(following), self.passed, now=True)

    def after_step(self, state: State) -> None:
        self.shown.update()
        if self.folder and self.cotangent is None:
            self.folder.note_training(state, self.passed)

    def trace_on(self) -> None:
        """Step with the trace kept. It stands for training's step; in the middle and at the end that is
        checked, if training has not been there."""
        t, run, passed = self.state.step, self.run, self.passed
        traced = trace(run, self.state, self.weights, passed=passed)
        fresh = t + 1 in (run.steps // 2, run.steps) and t + 1 not in passed.noted
        if fresh and checksums(run.step(self.state, self.weights)) != checksums(traced.after):
            raise ReplayMismatch(
                f"step {t}: recording its graph changes the bits of its result, so that a trace cannot "
                "stand for a step of training. Give a plan with states=, which steps and traces apart"
            )
        if passed.notes(t + 1):
            passed.compare(traced.after)
        self.traced[t], self.state = traced, traced.after
        self.after_step(self.state)

    def adjoint(self, t: int) -> None:
        """Pull the cotangent back through step t."""
        run = self.run
        traced = self.traced.pop(t, None) or trace(
            run, self.state, self.weights, step=False, passed=self.passed
        )
        if self.cotangent is None:
            self.turn(traced)
        elif t not in self.witnessed and (t in (run.steps // 3, 2 * run.steps // 3) or self.suspect(traced)):
            self.witnessed[t] = check_step(run, traced.state, self.weights, directions=1)
            self.check_underflow(traced)
        alone = self.pulled_alone(traced) if t in self.witnessed else None
        self.cotangent, scores = traced_vjp(run, traced, self.cotangent, self.plan.chunk)
        if alone is not None:
            check_batching(alone, (self.cotangent, scores), traced)
        _check_finite(scores, self.cotangent, t)
        indices = run.batches[t].to(self.values.device)
        self.values[self.rows].index_add_(1, indices, scores.to(self.values.dtype))
        self.measure_size(t)
        self.shown.update()
        if self.folder and t:
            self.folder.note(self.noted(self.rows, t, self.cotangent), self.passed)

    def suspect(self, traced: Traced) -> bool:
        """Whether something may be hidden in this step; of an autograd Function, that is asked once."""
        fresh = [why for why in traced.escaped if why not in self.known]
        self.known |= {why for why in fresh if why.startswith(FUNCTION)}
        return bool(fresh)

    def noted(self, rows: slice, t: int | None = None, cotangent: Cotangent | None = None) -> Progress:
        """How far the work is."""
        seen = self.sizes, self.witnessed, self.passed.verified
        return Progress(self.values, self.outputs, rows, t, cotangent, *seen)

    def pulled_alone(self, traced: Traced) -> tuple[Cotangent, Tensor] | None:
        """The last target's pull by itself, where several go back together."""
        if self.cotangent.targets == 1 or self.plan.chunk == 1:
            return None
        last = self.cotangent.map(lambda x: x[-1:].clone())
        return traced_vjp(self.run, traced, last, chunk=1)

    def turn(self, last: Traced) -> None:
        """The end of the way down: measure the trained model, and take the cotangent of the outputs."""
        run, T = self.run, self.run.steps
        if last.after is not None:
            final = checked(last.after, run)
        else:
            final = run.advance(last.state, T, self.weights, self.passed, self.after_step)
        if T not in self.witnessed:
            self.witnessed[T - 1] = check_step(run, last.state, self.weights)
            self.check_underflow(last)
        if self.outputs is None:
            self.outputs = measured_outputs(run, final, self.measure)
            self.values = self.outputs.new_zeros(len(self.outputs), run.n)
        self.cotangent = measure_vjp(run, final, self.measure, self.rows, self.plan.chunk)
        if T not in self.witnessed:
            self.witnessed[T] = check_measure(run, final, self.measure, self.cotangent, self.rows)
            warn_of_noise(run, last, self.cotangent)

    def check_underflow(self, traced: Traced) -> None:
        hypers, group_of = self.run.hypers[traced.state.step], self.run.group_of
        hyper_of = {name: hypers[group_of[name]] for name in traced.grads}
        warn_of_underflow(self.run.rule, traced.state, traced.grads, hyper_of)

    def measure_size(self, t: int) -> None:
        """Now and then, the norm of each target's cotangent."""
        every = -(-self.run.steps // health.SAMPLES)
        if t % every == 0:
            squares = sum(c.reshape(len(c), -1).square().sum(1) for c in self.cotangent.params.values())
            self.sizes.setdefault(t, []).extend(squares.sqrt().tolist())


def try_measure(run: Run, measure: Callable) -> tuple[int, int]:
    """K, and the bytes that differentiating one of the K outputs holds. A mistake is told before training."""
    targets = len(measured_outputs(run, run.initial, measure, finite=False))
    anywhere = replace(run.initial, moved=None)  # it may read only buffers that training will write
    with determinism.alone():
        _, _, peak = footprint.measured(lambda: measure_vjp(run, anywhere, measure, slice(0, 1)), run.device)
    return targets, peak


def measured_outputs(run: Run, state: State, measure: Callable, finite: bool = True) -> Tensor:
    """φ at this state, (K,), computed as a user would: with PyTorch's own operations."""
    with torch.no_grad(), determinism.alone(), refusing("measure"):
        outputs = run.measured(measure, state.params, state.buffers).detach()
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
