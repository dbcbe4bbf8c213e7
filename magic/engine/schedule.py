"""Which states to keep: a schedule is an iterator of actions, plain data that knows no numerics.

To pull a cotangent back through T steps, the state before each step is needed, in reverse order.
Keeping all T takes too much memory, so some are kept and the others are recomputed from them:

    reverse [a, b): advance from a to the split m, save s_m; reverse [m, b), drop s_m; reverse [a, m).

`binomial` and `store_all` are this recursion and differ only in where they split; `kary` splits into k
parts at once. The first way down is the training run itself.

The adjoint of a step also needs the step's trace (its autograd graph), which is larger than a state.
One is made at a time unless a schedule says Trace: then as many as there is room for.

Sources: Griewank & Walther 2000, "Revolve", ACM TOMS 26(1) (the binomial split is optimal);
Engstrom et al. 2025, arXiv 2503.13751, section 3 (REPLAY, the lazy k-ary tree).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import comb


@dataclass(frozen=True, slots=True)
class Load:
    """Take s_t out of the store as the current state."""

    t: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Step the current state from t to `to`."""

    t: int
    to: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Step the current state from t to `to` and keep the trace of each step until its Adjoint."""

    t: int
    to: int


@dataclass(frozen=True, slots=True)
class Save:
    """Put the current state, s_t, into the store."""

    t: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget s_t."""

    t: int


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Pull the cotangent back through step t: by its kept trace, released here, or from the current s_t."""

    t: int


Action = Load | Advance | Trace | Save | Drop | Adjoint


def reverse(
    steps: int, states: int, split: Callable[[int, int, int], int], traces: int = 0
) -> Iterator[Action]:
    """Reverse `steps` steps with at most `states` states kept, s_0 among them, and `traces` traces.

    The recursion of the module's docstring, with its calls on a list: a run may keep more states
    than Python may nest calls. split(a, b, slots) says where to save next in [a, b), with room for
    `slots` more states. A segment is split no further when its traces fit or when no slot is left.
    """
    if steps < 1 or states < 1 or traces < 0:
        raise ValueError(
            f"steps={steps}, states={states}, traces={traces}: "
            "steps and states are at least 1 (s_0 is always kept), traces at least 0"
        )
    yield Save(0)
    todo = [(0, steps, states - 1)]
    while todo:
        a, b, slots = todo.pop()
        if b - a > max(traces, 1) and slots > 0:
            m = split(a, b, slots)
            yield Load(a)
            yield Advance(a, m)
            yield Save(m)
            todo += [(a, m, slots), (m, b, slots - 1)]  # the later part is reversed first
        else:
            yield from pieces(a, b, traces)
            yield Drop(a)


def pieces(a: int, b: int, traces: int) -> Iterator[Action]:
    """Reverse [a, b) from s_a alone, from its right end, in pieces whose traces fit."""
    length = max(traces, 1)
    for end in range(b, a, -length):
        start = max(a, end - length)
        yield Load(a)
        if start > a:
            yield Advance(a, start)
        if traces:
            yield Trace(start, end)
        yield from map(Adjoint, reversed(range(start, end)))


def repeats_of(blocks: int, slots: int) -> int:
    """The smallest r with comb(slots + 1 + r, slots + 1) ≥ blocks: each step is repeated at most r times."""
    repeats, reach = 0, 1
    while reach < blocks:
        repeats += 1
        reach = reach * (slots + 1 + repeats) // repeats
    return repeats


def binomial_split(steps: int, slots: int) -> int:
    """How many of `steps` steps Revolve passes before it saves: this makes the fewest extra, provably.

    With s states beside the first and every step repeated at most r times, comb(s + r, s) steps can
    be reversed. The split leaves each side no longer than its share of the smallest such r allows.
    Of the many best splits it takes the last one; `binomial` relies on that.
    """
    repeats = repeats_of(steps, slots)
    # Left of the split one repetition less is left; right of it, one state less.
    most_left = comb(slots + repeats, slots + 1)
    least_right = comb(slots + repeats - 1, slots)
    return min(most_left, steps - least_right)


def binomial(steps: int, states: int, traces: int = 0) -> Iterator[Action]:
    """The schedule with the fewest extra steps for `states` kept states, s_0 among them.

    With `traces` it is Revolve over blocks of that many steps, aligned at the end of the run, so that
    the block that falls short is the first, which is passed most often. For traces = 0 or 1 the
    optimum is proven; for more it is found, not proven: equal to the best of all splits in every
    case tried (tests), and of all legal schedules in those small enough to search.
    """
    block = max(traces, 1)

    def split(a: int, b: int, slots: int) -> int:
        blocks = -(-(b - a) // block)
        return b - (blocks - binomial_split(blocks, slots)) * block

    return reverse(steps, states, split, traces)


def store_all(steps: int) -> Iterator[Action]:
    """Keep every state: T of them, and no step is advanced twice."""
    return reverse(steps, steps, lambda a, b, slots: a + 1)


def kary(steps: int, k: int) -> Iterator[Action]:
    """The lazy k-ary tree of REPLAY (Engstrom et al. 2025, section 3).

    The T states are the leaves, visited last to first. A node's k children are saved while stepping
    through it once, and each is dropped after its visit; the first is the node's own state. Keeps at
    most (k − 1)⌈log_k T⌉ + 1 states and advances at most T⌈log_k T⌉(k − 1)/k steps.
    """
    if steps < 1 or k < 2:
        raise ValueError(
            f"steps={steps}, k={k}: at least 1 step and 2 children; "
            "k=2 keeps the fewest states, k=steps keeps all, binomial(steps, 1) keeps s_0 only"
        )
    yield Save(0)
    todo = [(0, steps)]
    while todo:
        a, b = todo.pop()
        yield Load(a)
        if b - a == 1:
            yield Adjoint(a)
            yield Drop(a)
            continue
        parts = min(k, b - a)
        children = list(pairwise(a + (b - a) * i // parts for i in range(parts + 1)))
        for start, end in children[:-1]:
            yield Advance(start, end)
            yield Save(end)
        todo += children  # the last is visited first


@dataclass(frozen=True)
class Cost:
    """What a schedule takes.

    peak_states   states kept at once, at most
    peak_traces   traces held at once, at most; the one an Adjoint makes for itself counts, so 1 or more
    trained       steps the training itself has to advance: those not traced on the first way down
    advanced      steps done by Advance
    traced        steps done by Trace
    saves, loads  states written to and read from the store, the current one too if a Load names it
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
        """Steps advanced that training does not need: 0 if all states or all traces fit."""
        return self.advanced - self.trained

    @property
    def forward(self) -> int:
        """All steps done: every step once for its adjoint, by Trace or at the leaf, and the advanced ones."""
        return self.steps + self.advanced

    @property
    def again(self) -> int:
        """Steps done again, forward − T: T − 1 if all states are kept, 0 if all steps are traced."""
        return self.forward - self.steps


def resumed(kept: Iterable[int], steps: int, policy: Callable[[int], Iterable[Action]]) -> Iterator[Action]:
    """Reverse `steps` steps from states that are kept already, s_0 among them.

    Between each two of them, last first, goes what `policy` does with so many steps.
    """
    for a, b in reversed(list(pairwise([*sorted(kept), steps]))):
        for action in policy(b - a):
            match action:
                case Advance(t, to) | Trace(t, to):
                    yield type(action)(t + a, to + a)
                case Save(0):
                    pass
                case _:
                    yield type(action)(action.t + a)


def placed(actions: Iterable[Action]) -> Iterator[tuple[Save | Load | Drop, int]]:
    """Each Save, Load and Drop with its slot: the lowest that is free when the state is saved."""
    slot_of: dict[int, int] = {}
    free: list[int] = []
    for action in actions:
        match action:
            case Save(t):
                slot_of[t] = heappop(free) if free else len(slot_of)
                yield action, slot_of[t]
            case Load(t):
                yield action, slot_of[t]
            case Drop(t):
                heappush(free, slot_of[t])
                yield action, slot_of.pop(t)


def walk(
    actions: Iterable[Action], steps: int, kept: Iterable[int] = ()
) -> Iterator[tuple[Action, int, set[int], set[int]]]:
    """Each action, and after it: the steps left to reverse, the states kept, the traces held.

    `kept` are states kept from the start. Raises ValueError at the first action that is not legal, and
    at an end with anything left over.
    """
    current, todo, kept, traces = 0, steps, set(kept), set()
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


cost = check  # what a schedule takes, when no limit is asked for
