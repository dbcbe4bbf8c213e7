"""Exercises of chapter 06: what a schedule takes, the best split, Revolve, and steps of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate, islice
from typing import Any

import torch

from .judging import Cases, Wrong, exercise, number

# -- 06.1 --------------------------------------------------------------------------------------------


@exercise("06.1", "a function that counts the states kept at once and the extra steps of a schedule")
def count(answer: Any) -> None:
    from magic import schedule

    cases = Cases({})
    for name, T, actions in (
        ("a schedule that keeps every state", 9, schedule.store_all(9)),
        ("one that keeps the start only", 9, schedule.binomial(9, 1)),
        ("a tree", 50, schedule.kary(50, 3)),
        ("an optimal schedule", 60, schedule.binomial(60, 5)),
    ):
        listed = list(actions)
        got = cases.call(name, answer, listed, T)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Wrong(f"for {name} came {got!r}, and asked for is a pair: states kept, extra steps.")
        took = schedule.cost(listed, T)
        saves, advances = took.saves, sum(isinstance(a, schedule.Advance) for a in listed)
        cases.same(
            f"the states that {name} keeps",
            got[0],
            number(took.peak_states),
            {
                "that is how many are saved in all, whether they are dropped in between or not": number(
                    saves
                ),
                "the start is kept, too, and counts": number(took.peak_states - 1),
                "that is how many are kept at the end": number(0),
            },
        )
        cases.same(
            f"the extra steps of {name}",
            got[1],
            number(took.extra),
            {
                "those of the training are among them": number(took.advanced),
                "the training advances T − 1 steps, not T": number(took.advanced - T),
                "an Advance may be many steps, to − t of them": number(advances),
                "an Advance may be many steps (to − t), of which you count one": number(advances - T + 1),
            },
        )


# -- 06.2 --------------------------------------------------------------------------------------------


@exercise("06.2", "a function that splits a run where Revolve does, fast")
def split(answer: Any) -> None:
    cases = Cases({})
    sizes = [(2, 2), (3, 2), (10, 2), (10, 10), (24, 3), (100, 3), (100, 7), (57, 4), (1000, 10)]
    for T, c in [*sizes, (10**6, 20)]:
        case = f"{T:,} steps and {c} states"
        _judge_split(cases, case, cases.call(case, answer, T, c), T, c)


def _judge_split(cases: Cases, case: str, m: Any, T: int, c: int) -> None:
    from magic.engine.costs import advanced

    def through(m: int) -> int:
        return m + advanced(T - m, c - 1) + advanced(m, c)

    if not isinstance(m, int) or isinstance(m, bool):
        raise Wrong(f"for {case} came {m!r}, and asked for is an int.")
    cases.true(case, 0 < m < T, f"m = {m} leaves nothing on one side; it is between 1 and T − 1")
    best = advanced(T, c)
    if through(m) == best:
        cases.right[-1] = case
        return
    cases.right.pop()
    why = ""
    if through(T - m) == best:
        why = ": that is the length of the right part, and asked for is how far to advance first"
    elif m == T // 2 or m == (T + 1) // 2:
        why = ": halves are not the best, since the left part is reversed with more states free"
    raise Wrong(
        f"{cases._so_far()}wrong for {case}: with m = {m:,} the whole takes {through(m):,} steps, "
        f"and {best:,} are possible{why}."
    )


# -- 06.3 --------------------------------------------------------------------------------------------


@exercise("06.3", "a generator that reverses a segment with the fewest extra steps")
def reverse(answer: Any) -> None:
    cases = Cases({})
    for a, b, c in ((0, 1, 1), (0, 6, 6), (0, 7, 1), (0, 24, 3), (5, 29, 3), (0, 100, 7), (3, 90, 5)):
        case = f"steps {a} … {b - 1} with {c} state{'s' * (c > 1)}"
        most = 50 * (b - a) ** 2
        actions = cases.call(case, lambda: _listed(answer, a, b, c, most))  # noqa: B023
        if len(actions) == most:
            raise Wrong(
                f"{cases._so_far()}for {case} it yields more than {most:,} actions. Does the recursion "
                "never end?"
            )
        _judge_actions(cases, case, [_moved(action, -a) for action in actions], b - a, c)


def _listed(answer: Callable, a: int, b: int, c: int, most: int) -> list:
    made = answer(a, b, c)
    if not isinstance(made, Iterable):
        raise Wrong(f"your function returned {made!r}; asked for is a generator of actions: use `yield`.")
    return list(islice(made, most))


def _moved(action: Any, by: int) -> Any:
    """The action, in a run that begins `by` steps later."""
    from magic.engine.schedule import Action, Advance, Trace

    if not isinstance(action, Action):
        raise Wrong(f"it yields {action!r}, which is no action: Save(t), Load(t), Advance(t, to), …")
    if isinstance(action, Advance | Trace):
        return type(action)(action.t + by, action.to + by)
    return type(action)(action.t + by)


def _judge_actions(cases: Cases, case: str, actions: list, T: int, c: int) -> None:
    from magic.engine.costs import advanced
    from magic.engine.schedule import check

    try:
        took = check(actions, T, kept=[0])
    except ValueError as error:
        hint = ""
        if "ends with 0 steps" in str(error):
            hint = " Is each state dropped when its part is done, s_a at the end?"
        if "Save(t=0)" in str(error):
            hint = " s_a is kept already, and need not be saved."
        raise Wrong(
            f"{cases._so_far()}wrong for {case}: counted from a, {error}.{hint}",
        ) from None
    cases.true(case, took.peak_states <= c, f"{took.peak_states} states are kept at once, and c = {c} may be")
    cases.right.pop()
    halves = _advanced_by_halves(T, c)
    more = (
        ", as halving takes. Is the cut the best one" if took.advanced == halves else ". Is each cut the best"
    )
    cases.true(
        case,
        took.advanced == advanced(T, c),
        f"it advances {took.advanced:,} steps, and {advanced(T, c):,} are enough{more}, and are slots "
        "that became free used again",
    )


@cache
def _advanced_by_halves(T: int, c: int) -> int:
    if T == 1 or c == 1:
        return T * (T - 1) // 2
    return T // 2 + _advanced_by_halves(T - T // 2, c - 1) + _advanced_by_halves(T // 2, c)


# -- 06.4 --------------------------------------------------------------------------------------------


@exercise("06.4", "a function that gives the least time to reverse steps of unequal length")
def least_time(answer: Any) -> None:
    from magic.engine.costs import advanced

    dice = torch.Generator().manual_seed(6)
    cases = Cases({})
    growing = [1.0 + t for t in range(16)]
    uneven = (0.5 + torch.rand(20, generator=dice, dtype=torch.float64)).tolist()
    for case, times, c in (
        ("one step", [2.0], 1),
        ("12 steps of 1 s with 3 states", [1.0] * 12, 3),
        ("steps of 1, 2, 3, … s with every state kept", growing, 16),
        ("steps of 1, 2, 3, … s with the start only", growing, 1),
        ("steps of 1, 2, 3, … s with 3 states", growing, 3),
        ("20 uneven steps with 4 states", uneven, 4),
    ):
        got = cases.call(case, answer, times, c)
        best, mean = _least(times, c), sum(times) / len(times)
        suspects = {
            "all steps are taken to be equally long": number(advanced(len(times), c) * mean),
            "that counts steps, not seconds": number(advanced(len(times), c)),
            "the adjoints, one a step, are counted, too": number(best + sum(times)),
            "the times are read from the wrong end of the run": number(_least(times[::-1], c)),
            "it cuts in the middle, which is not the best": number(_least(times, c, halves=True)),
        }
        # where a mistake makes no difference, it is no suspect
        suspects = {why: x for why, x in suspects.items() if abs(x - best) > 1e-6}
        cases.same(case, got, number(best), suspects)


def _least(times: list[float], c: int, halves: bool = False) -> float:
    """The least time to reverse the steps, by dynamic programming over segments."""
    until = [0.0, *accumulate(times)]

    @cache
    def least(a: int, b: int, c: int) -> float:
        if b - a == 1:
            return 0.0
        if c == 1:
            return sum(until[t] - until[a] for t in range(a + 1, b))
        cuts = [(a + b) // 2] if halves else range(a + 1, b)
        return min(until[m] - until[a] + least(m, b, c - 1) + least(a, m, c) for m in cuts)

    return least(0, len(times), c)
