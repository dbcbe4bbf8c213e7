"""A walk through a schedule: it proves that every action is legal, and counts what the whole takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .actions import Action, Adjoint, Advance, Drop, Load, Save, Trace


@dataclass(frozen=True)
class Cost:
    """What a schedule takes.

    peak_states   the most states kept at once
    peak_traces   the most traces held at once; the one that an Adjoint makes for itself counts, so 1 or more
    trained       steps that the training itself has to advance: those not traced on the first way down
    advanced      steps done by Advance
    traced        steps done by Trace
    saves, loads  states written to the store and read from it; a Load counts even if its state is current
    """

    steps: int
    peak_states: int
    peak_traces: int
    trained: int
    advanced: int
    traced: int
    saves: int
    loads: int

    @property
    def extra(self) -> int:
        """Steps done in addition to the T of the training: 0 if all states or all traces fit.

        The recording that an adjoint makes of its own step is part of the adjoint, and does not count.
        """
        return self.advanced - self.trained

    @property
    def forward(self) -> int:
        """All forward steps: each once for its adjoint, by Trace or by the adjoint, and the advanced ones."""
        return self.steps + self.advanced


def walk(
    actions: Iterable[Action], steps: int, kept: Iterable[int] = ()
) -> Iterator[tuple[Action, int, set[int], set[int]]]:
    """Each action, and after it: the steps left to reverse, the states kept and the traces held.

    `kept` are states that are kept from the start. Raises ValueError at the first action that is not legal,
    and at the end if a step is not reversed or a state is still kept.
    """
    current, todo, kept = 0, steps, set(kept)
    traces: set[int] = set()
    for action in actions:
        was, left = current, todo
        match action:
            case Load(t):
                legal, current = t in kept, t
            case Save(t):
                legal = t == current < todo and t not in kept
                kept.add(t)
            case Drop(t):
                legal = t in kept
                kept.discard(t)
            case Advance(t, to):
                legal, current = t == current < to < todo, to
            case Trace(t, to):
                legal, current = t == current < to <= todo and traces.isdisjoint(range(t, to)), to
                traces.update(range(t, to))
            case Adjoint(t):
                legal, todo = t == todo - 1 and (t == current or t in traces), t
                traces.discard(t)
            case _:
                legal = False
        if not legal:
            raise ValueError(f"{action} is not legal: current s_{was}, {left} steps to reverse")
        yield action, todo, kept, traces
    if todo or kept:
        raise ValueError(f"the schedule ends with {todo} steps not reversed and {sorted(kept)[:9]} kept")


def check(
    actions: Iterable[Action],
    steps: int,
    states: int | None = None,
    traces: int | None = None,
    kept: Iterable[int] = (),
) -> Cost:
    """Prove that a schedule is legal, by walking through it, and count what it takes.

    Raises ValueError at the first action that is not legal (loading what is not kept, stepping from
    another state than the current one, an adjoint out of order or with neither state nor trace) or
    that holds more than `states` states or `traces` traces at once (one trace is always allowed).
    `kept` are states that are kept from the start.
    """
    most_states = steps if states is None else states
    most_traces = steps if traces is None else max(traces, 1)
    done: Counter[type] = Counter()
    peak_states = peak_traces = trained = 0
    for action, todo, held, traced in walk(actions, steps, kept):
        done[type(action)] += action.to - action.t if isinstance(action, Advance | Trace) else 1
        if todo == steps - 1 and isinstance(action, Adjoint):
            trained = todo - len(traced)
        peak_states = max(peak_states, len(held))
        peak_traces = max(peak_traces, len(traced) + isinstance(action, Adjoint))
        if peak_states > most_states or peak_traces > most_traces:
            raise ValueError(
                f"{action} is too much: {peak_states} states and {peak_traces} traces are held at once, "
                f"and at most {most_states} and {most_traces} may be"
            )
    counts = {"advanced": done[Advance], "traced": done[Trace], "saves": done[Save], "loads": done[Load]}
    return Cost(steps, peak_states, peak_traces, trained, **counts)


def cost(actions: Iterable[Action], steps: int) -> Cost:
    """What a schedule takes. On the way it is proven legal, and it may keep as much as it likes."""
    return check(actions, steps)
