"""The checkers of chapter 06 praise what is right, and say what is wrong with what readers really write."""

from functools import cache
from math import comb

import pytest

from magic.book.exercises.chapter_06 import _least
from magic.engine.costs import advanced
from magic.engine.schedule import Adjoint, Advance, Drop, Load, Save
from tests.support.answers import fails, passes


def walked(actions, T, first=0, counts_start=True, all_saves=False, per_action=False, training=1):
    kept, peak, steps, saves = set(), 0, 0, 0
    for action in actions:
        match action:
            case Save(t):
                kept.add(t)
                saves += 1
            case Drop(t):
                kept.discard(t)
            case Advance(t, to):
                steps += 1 if per_action else to - t
        peak = max(peak, len(kept) - (not counts_start))
    return (saves if all_saves else peak), steps - (T - 1) * training + first


def split(T, c):
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return min(comb(c + r - 1, c), T - comb(c + r - 2, c - 1))


def reverse(a, b, c, cut=split, drops=True, saves_start=False):
    if saves_start:
        yield Save(a)
    if b - a > 1 and c > 1:
        m = a + cut(b - a, c)
        yield Load(a)
        yield Advance(a, m)
        yield Save(m)
        yield from reverse(m, b, c - 1, cut, drops)
        yield from reverse(a, m, c, cut, drops)
        return
    for t in reversed(range(a, b)):
        yield Load(a)
        if t > a:
            yield Advance(a, t)
        yield Adjoint(t)
    if drops:
        yield Drop(a)


def wastes(a, b, c):
    """The left part is reversed as if the right one's slot were still taken."""
    if b - a > 1 and c > 1:
        m = a + split(b - a, c)
        yield Load(a)
        yield Advance(a, m)
        yield Save(m)
        yield from reverse(m, b, c - 1)
        yield from reverse(a, m, c - 1)
        return
    yield from reverse(a, b, c)


def forever(a, b, c):
    while True:
        yield Load(a)


def greedy(a, b, c):
    yield from reverse(a, b, max(c, 2))


def least_time(times, c):
    @cache
    def least(a, b, c):
        if b - a == 1:
            return 0.0
        if c == 1:
            return sum(sum(times[a:t]) for t in range(a + 1, b))
        return min(sum(times[a:m]) + least(m, b, c - 1) + least(a, m, c) for m in range(a + 1, b))

    return least(0, len(times), c)


@pytest.mark.parametrize(
    "number, answer",
    [("06.1", walked), ("06.2", split), ("06.3", reverse), ("06.4", least_time)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_right_answers(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, words",
    [
        ("06.1", lambda a, T: walked(a, T, training=0), ["extra steps", "those of the training"]),
        ("06.1", lambda a, T: walked(a, T, first=-1), ["T − 1 steps, not T"]),
        ("06.1", lambda a, T: walked(a, T, counts_start=False), ["the start is kept, too"]),
        ("06.1", lambda a, T: walked(a, T, all_saves=True), ["right for", "saved in all"]),
        ("06.1", lambda a, T: walked(a, T, per_action=True), ["an Advance may be many steps"]),
        ("06.1", lambda a, T: walked(a, T)[0], ["asked for is a pair"]),
        ("06.2", lambda T, c: T // 2, ["halves are not the best", "are possible"]),
        ("06.2", lambda T, c: T - split(T, c), ["right for", "length of the right part"]),
        ("06.2", lambda T, c: 0, ["leaves nothing on one side"]),
        ("06.2", lambda T, c: split(T, c) / 1, ["asked for is an int"]),
        ("06.2", lambda T, c: 1, ["wrong for 10 steps and 2 states: with m = 1"]),
        ("06.3", lambda a, b, c: reverse(a, b, c, lambda T, c: T // 2), ["as halving takes"]),
        ("06.3", lambda a, b, c: reverse(a, b, c, drops=False), ["each state dropped"]),
        ("06.3", lambda a, b, c: reverse(a, b, c, saves_start=True), ["kept already"]),
        ("06.3", lambda a, b, c: reverse(0, b - a, c), ["right for", "steps 5 … 28", "not legal"]),
        ("06.3", greedy, ["2 states are kept at once, and c = 1 may be"]),
        ("06.3", wastes, ["are enough", "became free used again"]),
        ("06.3", forever, ["Does the recursion never end?"]),
        ("06.3", lambda a, b, c: None, ["use `yield`"]),
        ("06.3", lambda a, b, c: ["load"], ["is no action"]),
        ("06.4", lambda times, c: advanced(len(times), c), ["that counts steps, not seconds"]),
        ("06.4", lambda times, c: advanced(len(times), c) * sum(times) / len(times), ["equally long"]),
        ("06.4", lambda times, c: least_time(times, c) + sum(times), ["the adjoints"]),
        ("06.4", lambda times, c: least_time(times[::-1], c), ["wrong end of the run"]),
        ("06.4", lambda times, c: _least(times, c, halves=True), ["cuts in the middle"]),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)
