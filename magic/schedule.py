"""Which states to keep: a schedule is an iterator of actions, plain data that knows no numerics.

To pull a cotangent back through T steps, the state before each step is needed, in reverse order.
Keeping all T takes too much memory, so some are kept and the others are recomputed from them. Every
policy here is the same recursion and differs only in where it splits [a, b):

    reverse [a, b): advance from a to the split m, save s_m; reverse [m, b), drop s_m; reverse [a, m).

The first way down this recursion passes through every step once: it *is* the training run.

Sources: Griewank & Walther 2000, "Revolve", ACM TOMS 26(1) (the binomial split is optimal);
Engstrom et al. 2025, arXiv 2503.13751 (why a metagradient needs one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import comb
from typing import NamedTuple


class Load(NamedTuple):
    """Take s_t out of the store as the current state."""

    t: int


class Advance(NamedTuple):
    """Step the current state from t to `to`."""

    t: int
    to: int


class Save(NamedTuple):
    """Put the current state, s_t, into the store."""

    t: int


class Drop(NamedTuple):
    """Forget s_t."""

    t: int


class Adjoint(NamedTuple):
    """Pull the cotangent back through step t, taken at the current state s_t."""

    t: int


Action = Load | Advance | Save | Drop | Adjoint


def reverse(steps: int, states: int, split: Callable[[int, int, int], int]) -> Iterator[Action]:
    """Reverse `steps` steps with at most `states` states kept, s_0 among them.

    The recursion of the module's docstring, with its calls on a list: a run may keep more states
    than Python may nest calls.
    """
    if steps < 1 or states < 1:
        raise ValueError(f"steps={steps}, states={states}: both are at least 1 (s_0 is always kept)")
    yield Save(0)
    todo = [(0, steps, states - 1)]
    while todo:
        a, b, slots = todo.pop()
        if b - a > 1 and slots > 0:
            m = split(a, b, slots)
            yield Load(a)
            yield Advance(a, m)
            yield Save(m)
            todo += [(a, m, slots), (m, b, slots - 1)]  # the later half is reversed first
        else:
            for t in reversed(range(a, b)):
                yield Load(a)
                if t > a:
                    yield Advance(a, t)
                yield Adjoint(t)
            yield Drop(a)


def binomial_split(a: int, b: int, slots: int) -> int:
    """Where Revolve saves next: the split that makes the fewest extra steps, provably.

    With s states beside the first and every step repeated at most r times, comb(s + r, s) steps can
    be reversed. The split leaves each side no longer than its share of the smallest such r allows.
    """
    steps = b - a
    repeats = 0
    while comb(slots + 1 + repeats, slots + 1) < steps:
        repeats += 1
    # Left of the split one repetition less is left; right of it, one state less.
    most_left = comb(slots + repeats, slots + 1)
    least_right = comb(slots + repeats - 1, slots) if repeats > 1 else 1
    most_right = comb(slots + repeats, slots)
    left = max(steps - most_right, min(most_left, steps - least_right))
    return a + min(max(left, 1), steps - 1)


def binomial(steps: int, states: int) -> Iterator[Action]:
    """The schedule with the fewest extra steps for `states` kept states, s_0 among them."""
    return reverse(steps, states, binomial_split)


def store_all(steps: int) -> Iterator[Action]:
    """Keep every state: T of them, and no step is done twice."""
    return reverse(steps, steps, lambda a, b, slots: a + 1)


@dataclass(frozen=True)
class Cost:
    """What a schedule takes: states kept at most, steps advanced, and how many of them are repeats."""

    steps: int
    peak_states: int
    advanced: int

    @property
    def extra(self) -> int:
        """Steps done again: the training itself advances to s_{T-1}, T − 1 steps."""
        return self.advanced - (self.steps - 1)


def cost(actions: Iterable[Action], steps: int) -> Cost:
    """Walk through a schedule, check that every action is legal, and count.

    Raises ValueError at the first action that is not: loading what is not kept, advancing from
    another state than the current one, an adjoint out of order, or an end with steps left over.
    """
    kept: set[int] = set()
    current, todo, peak, advanced = 0, steps, 0, 0
    for action in actions:
        match action:
            case Load(t):
                legal, current = t in kept, t
            case Advance(t, to):
                legal, current, advanced = t == current < to < todo, to, advanced + to - t
            case Save(t):
                legal = t == current and t not in kept
                kept.add(t)
            case Drop(t):
                legal = t in kept
                kept.discard(t)
            case Adjoint(t):
                legal, todo = t == current == todo - 1, t
        peak = max(peak, len(kept))
        if not legal:
            raise ValueError(f"{action} is not legal: current s_{current}, {todo} steps to reverse")
    if todo or kept:
        raise ValueError(f"the schedule ends with {todo} steps not reversed and {sorted(kept)} kept")
    return Cost(steps, peak, advanced)
