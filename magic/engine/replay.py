"""REPLAY: differentiate a whole training run. Here schedule, store, step and adjoint meet.

Engstrom et al. 2025, arXiv 2503.13751, section 3. The metagradient ∂φ(f(w))/∂w is computed exactly:
states are recomputed from the few that are kept, last step first, and the cotangent ∂φ/∂s is pulled
back through each. Targets go back together, so the recomputation is paid once for all of them.

The way down is training, from step 0 to T; the way back pulls the cotangents from T to 0; one of each is a
sweep. `reverse` is the loop of chapter 06, which makes one sweep. Around it, in plain order: `_Sweeps`
makes one for each group of targets, and `metagradient` opens the folder in which the work survives being
killed.

A plan (`magic.plan`) has fixed four numbers from the memory that is given: the targets that go back in one
sweep (`group`), those that are pulled through a step at once (`chunk`), and the states and the traces that
are kept. Its schedule keeps every state if all fit, and is otherwise the binomial one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..identity import fingerprints
from ..show import bar
from ..training import determinism
from ..training.finite import checked
from ..training.record import Passed, ReplayMismatch, checksums
from ..training.run import Run
from ..training.state import Cotangent, State
from . import health
from .adjoint import measure_vjp, traced_vjp
from .asked import WEIGHTS, Asked
from .finders import finders
from .listeners import Bar, Clipped, Listener, Notes, Scores, Several, Sizes, Witness, health_seen
from .measure_witness import check_measure
from .measuring import measured_outputs
from .places import Host
from .planning import Plan
from .resume import Directory, Progress, Trusted
from .rounding import warn_of_noise
from .schedule import Action, Adjoint, Advance, Drop, Load, Save, Trace
from .store import Memory, Store
from .tracing import Traced, trace


@dataclass(frozen=True)
class Replay:
    """What a replay found, and what it took.

    values   (K, n), ∂φ_k(f(w))/∂w_i
    outputs  (K,), φ(f(w))
    peak_states, peak_bytes   kept at once in memory, on the host and on disk
    more     what else was asked for, by the names of `magic.engine.asked`; (K, ...) each
    """

    values: Tensor
    outputs: Tensor
    plan: Plan
    health: health.Health
    peak_states: tuple[int, ...] = (0, 0, 0)
    peak_bytes: tuple[int, ...] = (0, 0, 0)
    more: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Training:
    """A run at one point w, the record of what its training passed through, and what is asked of it."""

    run: Run
    weights: Tensor
    passed: Passed
    asked: Asked = WEIGHTS

    @property
    def initial(self) -> State:
        """s_0, whose buffers are constants and carry no derivative, unless that of the start is asked for."""
        start = self.run.initial
        if not self.asked.start:
            return start
        moves = [k for k, b in start.buffers.items() if b.isfinite().all()]  # −∞ in a mask does not
        return replace(start, moved=frozenset(moves))

    def trace(self, state: State, step: bool) -> Traced:
        """The trace of the step at `state`; with `step`, it goes on to the next state."""
        data = self.asked.examples is not None
        return trace(self.run, state, self.weights, step, self.passed, data)

    def advance(self, state: State, to: int, after: Callable[[State], None]) -> State:
        """Step from `state` to step `to`, calling `after` with each state."""
        return self.run.advance(state, to, self.weights, self.passed, after)

    def trace_on(self, state: State) -> tuple[Traced, State]:
        """A trace that stands for training's step at `state`, and the state that it leads to.

        Invariant: `traced.after` has the bits of run.step(state). The next step starts from there, so if it
        had others, all later states would be those of another training. Wherever training has noted its
        state, that is compared. But where the trace itself is the first to come by, nothing is noted yet.
        So in the middle of the run and at its end, a step that is new is done once more without a graph,
        and the two results are compared.
        """
        run, passed, t = self.run, self.passed, state.step
        traced = self.trace(state, step=True)
        assert traced.after is not None, "a trace with its step goes on to the next state"
        fresh = t + 1 in (run.steps // 2, run.steps) and t + 1 not in passed.noted
        if fresh and checksums(run.step(state, self.weights)) != checksums(traced.after):
            raise ReplayMismatch(
                f"step {t}: recording its graph changes the bits of its result, so that a trace cannot "
                "stand for a step of training. Give a plan with states=, which steps and traces apart"
            )
        if passed.notes(t + 1):
            passed.compare(traced.after)
        return traced, traced.after


def reverse(
    training: Training,
    actions: Iterable[Action],
    store: Store,
    turn: Callable[[Traced], Cotangent],
    listener: Listener,
    chunk: int,
) -> None:
    """Follow a schedule down and back: the loop of chapter 06.

    turn      the step at which the way back begins, traced -> the cotangent that it begins with
    listener  hears of every step, and of every pull before and after it
    chunk     targets in flight at once, at most

    Invariant: before each action the current state is s_t of some t, with the bits of training. Alive are the
    states in the store, the current one, those that kept traces hold, and within an adjoint the one that its
    trace was made of. A current state that is not in the store may be lost: the schedule loads before it
    steps again. A trace is larger than a state, so one that no `Trace` asked for is let go of as soon as its
    adjoint is done, and those that were asked for are too, one by one.

    The cotangent is None until the first adjoint. That is the one of the last step, where `turn` finds the
    end of training and measures it, or the one at which a way back goes on that was noted before. From then
    on the cotangent is ∂φ/∂s_{t+1} before the adjoint of step t, and ∂φ/∂s_t after it. What a step adds to
    the scores, (K, B), goes to the listeners: `Scores` adds it to the columns batches[t] of the (K, n)
    result.
    """
    state, cotangent, traces = training.initial, None, {}
    for action in actions:
        match action:
            case Save(t):
                store.save(t, state)
            case Load(t):
                state = store.load(t) if state.step != t else state
            case Drop(t):
                store.drop(t)
            case Advance(_, to):
                state = training.advance(state, to, listener.stepped)
            case Trace(_, to):
                while state.step < to:
                    traces[state.step], state = training.trace_on(state)
                    listener.stepped(state)
            case Adjoint(t):
                traced = traces.pop(t, None) or training.trace(state, step=False)
                cotangent = turn(traced) if cotangent is None else cotangent
                listener.pulling(traced, cotangent)
                cotangent, rows = traced_vjp(training.run, traced, cotangent, chunk, training.asked.hypers)
                listener.pulled(traced, cotangent, rows)
                del traced, rows


@determinism.in_turn
def metagradient(
    run: Run,
    measure: Callable,
    weights: Tensor,
    planned: Plan,
    progress: bool = True,
    folder: Trusted | None = None,
    asked: Asked = WEIGHTS,
) -> Replay:
    """The exact derivative of measure(trained model) with respect to every data weight, at `weights`, and
    with respect to what is `asked` for besides.

    With `folder`, states may lie there, and a replay that was killed goes on to the same bits.
    """
    start = measured_outputs(run, run.initial, measure, finite=False)  # a mistake in measure is told first
    training = Training(run, weights, run.passed(weights), asked)
    if folder is None:
        if 2 in planned.tier_of:
            raise ValueError("the plan keeps states on disk: pass disk=, a folder for them")
        return _Sweeps(training, measure, planned).make_all(progress, start)
    what = f"a replay of {len(start)} targets, {fingerprints.fingerprint(start)} at the start{asked}"
    with Directory.open(folder.path, run, weights, what, measure, folder.trust) as opened:
        made = opened.choices({"group": planned.group, "chunk": planned.chunk})
        return _Sweeps(training, measure, planned.regrouped(**made), opened).make_all(progress, start)


class _Sweeps:
    """A replay at work: a sweep for each group of targets, which goes on where it was noted.

    `found` holds what is known so far: the outputs and scores, which targets are in work, and, on the way
    back, the step that was reached and the cotangent there.
    """

    def __init__(self, training: Training, measure: Callable, plan: Plan, folder: Directory | None = None):
        self.training, self.measure, self.plan, self.folder = training, measure, plan, folder
        self.run, passed = training.run, training.passed
        noted = folder.progress() if folder else None
        self.found = noted or Progress(None, None, self.group_from(0))
        passed.verified += self.found.verified
        if folder:
            passed.adopt(*folder.passed())
        data = training.asked.examples is not None
        self.witness = Witness(self.run, training.weights, plan.chunk, self.found.witnessed, data)
        self.listeners = [self.witness, Scores(self.run, self.found), Sizes(self.run.steps, self.found.sizes)]
        self.listeners.append(Clipped(self.run, self.found.clipped))
        self.listeners += finders(self.run, training.asked, self.found)
        if folder:
            self.listeners.append(Notes(folder, passed, self.found))
        self.peak_states, self.peak_bytes = [0, 0, 0], [0, 0, 0]

    def group_from(self, start: int) -> slice:
        """The targets that go back together, from this one on."""
        return slice(start, min(start + self.plan.group, self.plan.targets))

    def make_all(self, progress: bool, start: Tensor) -> Replay:
        """Every sweep that is still to be made; `start` is what the untrained model measures."""
        run, found, passed = self.run, self.found, self.training.passed
        sweeps = -(-(self.plan.targets - found.rows.start) // self.plan.group)
        work = (2 * run.steps + self.plan.extra) * sweeps
        with determinism.alone(), bar(work, "differentiate", progress) as shown:
            self.listeners.append(Bar(shown))
            while found.rows.start < self.plan.targets:
                self.make_one()
        assert found.values is not None and found.outputs is not None, "every sweep measures its outputs"
        seen = health_seen(run, found, passed.verified, start)
        peaks = tuple(self.peak_states), tuple(self.peak_bytes)
        return Replay(found.values, found.outputs, self.plan, seen, *peaks, more=found.more)

    def make_one(self) -> None:
        """One way down and back, or the rest of one.

        In a folder there may be states of a process that was killed. The schedule then goes on from them and
        from s_0, which is the run's own. Of a way back that was noted at step t, the first t steps are left.
        """
        run, found, folder = self.run, self.found, self.folder
        todo = run.steps if found.t is None else found.t
        kept = [0, *(t for t in folder.kept(todo) if t > 0)] if folder else None
        places = [Memory(), Host(run.device, run.initial), folder.states if folder else None]
        store = Store(places, self.plan.tier_of, kept or ())
        if kept:
            store.save(0, self.training.initial)
        actions = self.plan.actions(kept, todo)
        reverse(self.training, actions, store, self.turn, Several(self.listeners), self.plan.chunk)
        self.peak_states = list(map(max, self.peak_states, store.peak_states))
        self.peak_bytes = list(map(max, self.peak_bytes, store.peak_bytes))
        found.rows, found.t, found.cotangent = self.group_from(found.rows.stop), None, None
        if folder:
            found.verified = self.training.passed.verified
            folder.note(found, self.training.passed, now=True)

    def turn(self, last: Traced) -> Cotangent:
        """The cotangent that the way back begins with: the one that was noted, or ∂φ/∂s_T of the trained
        model, measured here at the end of the way down."""
        run, found, T, chunk = self.run, self.found, self.run.steps, self.plan.chunk
        if found.cotangent is not None:
            return found.cotangent
        if last.after is not None:
            final = checked(last.after, run)
        else:
            final = self.training.advance(last.state, T, Several(self.listeners).stepped)
        first = T not in found.witnessed  # the next groups of targets come by the same step and measure
        if first:
            self.witness.ask(last, directions=2)
        if found.outputs is None:
            found.outputs = measured_outputs(run, final, self.measure)
            found.values = found.outputs.new_zeros(len(found.outputs), *run.shape)
        cotangent = measure_vjp(run, final, self.measure, found.rows, chunk)
        if first:
            found.witnessed[T] = check_measure(run, final, self.measure, cotangent, found.rows)
            warn_of_noise(run, last, cotangent)
        return cotangent
