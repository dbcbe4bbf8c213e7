"""Which states to keep: a schedule is an iterator of actions, plain data that knows no numerics.

To pull a cotangent back through T steps, the state before each step is needed, in reverse order.
Keeping all T takes too much memory, so some are kept and the others are recomputed from them. To reverse
the steps [a, b) from the state s_a:

    advance from a to the split m and save s_m; reverse [m, b) and drop s_m; then reverse [a, m).

`binomial` and `store_all` are this recursion and differ only in where they split; `kary` splits into k
parts at once. The first way down is the training run itself.

The adjoint of a step also needs the step's trace (its autograd graph), which is larger than a state.
One trace is made at a time, by the adjoint itself, unless the schedule says Trace: then as many are kept
as there is room for, and the adjoints that follow use them up.

The commands are in `actions`; what proves a schedule legal and counts what it takes is in `walk`. Both are
importable from here, so that `magic.schedule` has everything about schedules.

Sources: Griewank & Walther 2000, "Revolve", ACM TOMS 26(1) (the binomial split is optimal);
Engstrom et al. 2025, arXiv 2503.13751, section 3 (REPLAY, the lazy k-ary tree).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import comb

from .actions import Action, Adjoint, Advance, Drop, Load, Save, Trace
from .walk import Cost, check, cost, walk

__all__ = [
    "Action", "Adjoint", "Advance", "Cost", "Drop", "Load", "Save", "Trace",
    "binomial", "check", "cost", "kary", "resumed", "reverse", "store_all", "walk",
]  # fmt: skip


def reverse(
    steps: int, states: int, split: Callable[[int, int, int], int], traces: int = 0
) -> Iterator[Action]:
    """Reverse `steps` steps with at most `states` states kept, s_0 among them, and `traces` traces.

    This is the recursion of the module's docstring. Its calls are kept on a list, since a run may keep
    more states than Python can nest calls. split(a, b, slots) says where to save next in [a, b), when
    `slots` more states may be kept. A segment is split no further when its traces fit or no slot is left.
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
            yield from _pieces(a, b, traces)
            yield Drop(a)


def _pieces(a: int, b: int, traces: int) -> Iterator[Action]:
    """Reverse [a, b) from s_a alone: from the right end, piece by piece, each so long that its traces fit."""
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
    """How often `binomial` advances through a block at most, with `slots` states beside the first.

    It is the smallest r with comb(slots + 1 + r, slots + 1) ≥ blocks. The first block is the one that is
    passed so often.
    """
    if slots == 0:
        return blocks - 1
    repeats, reach = 0, 1
    while reach < blocks:
        repeats += 1
        reach = reach * (slots + 1 + repeats) // repeats
    return repeats


def binomial_split(steps: int, slots: int, repeats: int | None = None) -> int:
    """How many of `steps` steps Revolve passes before it saves; provably, no choice makes fewer extra steps.

    To understand a replay you need not follow the proof. It goes like this.
    Let reach(s, r) = comb(s + 1 + r, s + 1). So many steps can be reversed with s states beside the first
    when none is advanced through more than r times. It is so by induction: the left part of a split is
    passed once to get to it, so r − 1 times are left for it, and in the right part one state fewer is free;
    and reach(s, r − 1) + reach(s − 1, r) = reach(s, r), which is Pascal's rule.

    The invariant: for the smallest r with steps ≤ reach(slots, r), the left part has reach(slots, r − 2) to
    reach(slots, r − 1) steps and the right part reach(slots − 1, r − 1) to reach(slots − 1, r). Within the
    upper bounds no step is advanced through more than r times; below a lower bound, one part would have
    times to spare for which the other pays. All splits within the bounds are equally good. This is the last
    of them, so one of the two parts always has a length that is a reach: `costs` relies on that. `repeats` is
    r, where it is known already.
    """
    repeats = repeats_of(steps, slots) if repeats is None else repeats
    most_left = comb(slots + repeats, slots + 1)  # reach(slots, repeats − 1)
    least_right = comb(slots + repeats - 1, slots)  # reach(slots − 1, repeats − 1)
    return min(most_left, steps - least_right)


def binomial(steps: int, states: int, traces: int = 0) -> Iterator[Action]:
    """The schedule with the fewest extra steps for `states` kept states, s_0 among them.

    With `traces` it is Revolve over blocks of that many steps. The blocks are aligned at the end of the
    run, so that the block that falls short is the first one, which is passed most often. For traces = 0 or
    1 the optimum is proven. For more it is not proven, but the tests find it equal to the best of all
    splits in every case tried, and to the best of all legal schedules in the cases small enough to search.
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


def resumed(kept: Iterable[int], steps: int, policy: Callable[[int], Iterable[Action]]) -> Iterator[Action]:
    """Reverse `steps` steps from states that are kept already, s_0 among them.

    They cut the run into pieces. The last piece is reversed first, and each is reversed as `policy`
    reverses a run of that many steps, moved to where the piece begins. The state there is kept already,
    so the policy's Save(0) is left out; its Drop(0) stays and forgets that state.
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
