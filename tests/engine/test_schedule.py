"""Schedules are legal, within their room, and as short as any can be."""

import heapq
import sys
from functools import cache
from math import comb

import pytest
from checkpoint_schedules import Forward, MultistageCheckpointSchedule
from hypothesis import given, settings
from hypothesis import strategies as st

from magic.engine.schedule import (
    Adjoint,
    Advance,
    Cost,
    Drop,
    Load,
    Save,
    Trace,
    binomial,
    binomial_split,
    check,
    cost,
    kary,
    repeats_of,
    reverse,
    store_all,
)  # fmt: skip
from magic.engine.timeline import draw


@cache
def best_split(steps, states, traces):
    """Fewest steps advanced to reverse `steps` steps, by trying every first split and every piece."""
    if steps <= traces:
        return 0
    if states == 1:
        return min(steps - p + best_split(steps - p, 1, traces) for p in range(1, traces + 1))
    return min(
        m + best_split(steps - m, states - 1, traces) + best_split(m, states, traces) for m in range(1, steps)
    )


def best_of_all(steps, states, traces):
    """Fewest steps advanced by any legal sequence of actions, by search (Dijkstra) through the positions.

    A position is (current, steps to reverse, states kept, traces held).
    """
    start = (0, steps, frozenset(), frozenset())
    found, heap = {start: 0}, [(0, 0, start)]
    while heap:
        advanced, _, position = heapq.heappop(heap)
        current, todo, kept, held = position
        if todo == 0:
            return advanced
        if advanced > found[position]:
            continue
        after = [(0, (t, todo, kept, held)) for t in kept]
        after += [(0, (current, todo, kept - {t}, held)) for t in kept]
        if current not in kept and len(kept) < states:
            after.append((0, (current, todo, kept | {current}, held)))
        if current < todo - 1:
            after.append((1, (current + 1, todo, kept, held)))
        if current < todo and current not in held and len(held) < traces:
            after.append((0, (current + 1, todo, kept, held | {current})))
        if todo - 1 in held or (todo - 1 == current and len(held) < traces):
            after.append((0, (current, todo - 1, kept, held - {todo - 1})))
        for price, there in after:
            if advanced + price < found.get(there, sys.maxsize):
                found[there] = advanced + price
                heapq.heappush(heap, (advanced + price, len(found), there))
    raise AssertionError("no schedule was found")


def closed_form(steps, states):
    """The proven optimum (Griewank & Walther 2000, with β(s, r) = comb(s + r, s)): rT − β(s + 1, r − 1).

    r is the smallest number of repetitions with β(s, r) ≥ T, and s counts s_0.
    """
    r = next(r for r in range(steps) if comb(states + r, states) >= steps)
    return r * steps - comb(states + r, states + 1)


def is_the_training_run(actions, steps):
    """The first way down starts at s_0 and goes on where it stopped, to the last step."""
    at, before = 0, None
    for action in actions:
        if isinstance(action, Advance | Trace):
            if action.t != at:
                return False
            at = action.to
        elif isinstance(action, Adjoint):
            return at == (steps if isinstance(before, Trace) else steps - 1)
        before = action
    return False


# --- the fewest steps


@pytest.mark.parametrize("traces", range(6))
@pytest.mark.parametrize("states", range(1, 7))
def test_binomial_is_the_best_of_all_splits(states, traces):
    for steps in range(1, 80):
        found = check(binomial(steps, states, traces), steps, states, traces)
        assert found.advanced == best_split(steps, states, max(traces, 1)), (steps, states, traces)


@pytest.mark.parametrize("traces", range(1, 4))
@pytest.mark.parametrize("states", range(1, 4))
def test_binomial_is_the_best_of_all_schedules(states, traces):
    for steps in range(1, 8):
        found = check(binomial(steps, states, traces), steps, states, traces)
        assert found.advanced == best_of_all(steps, states, traces), (steps, states, traces)


def test_the_best_splits_are_those_within_the_bounds():
    """The invariant of `binomial_split`: all splits within its bounds are best, and no others."""

    def reach(slots, repeats):
        return comb(slots + 1 + repeats, slots + 1) if repeats >= 0 else 0

    for steps in range(2, 50):
        for slots in range(1, 7):
            r = repeats_of(steps, slots)
            taken = {
                m: m + best_split(steps - m, slots, 1) + best_split(m, slots + 1, 1) for m in range(1, steps)
            }
            best = {m for m, advanced in taken.items() if advanced == min(taken.values())}
            within = {
                m
                for m in range(1, steps)
                if reach(slots, r - 2) <= m <= reach(slots, r - 1)
                and reach(slots - 1, r - 1) <= steps - m <= reach(slots - 1, r)
            }
            assert best == within and binomial_split(steps, slots) == max(best), (steps, slots)


@pytest.mark.parametrize("states", [1, 2, 3, 4, 6, 9, 14])
def test_binomial_takes_as_many_steps_as_checkpoint_schedules(states):
    """Its snapshots count the one of s_0, and its Forward also does a step's trace."""
    for steps in range(1, 61):
        theirs = list(MultistageCheckpointSchedule(steps, states, 0))
        forward = sum(len(action) for action in theirs if isinstance(action, Forward))
        assert check(binomial(steps, states), steps, states).forward == forward >= steps, (steps, states)


@pytest.mark.parametrize(("steps", "states"), [(10_000, 32), (10_000, 3), (1, 1), (2, 1), (729, 5)])
def test_binomial_equals_the_closed_form(steps, states):
    assert check(binomial(steps, states), steps, states).advanced == closed_form(steps, states)


def test_a_hundred_thousand_steps():
    found = check(binomial(100_000, 10_000), 100_000, 10_000)
    assert found.advanced == closed_form(100_000, 10_000)
    assert found.peak_states == 10_000


def test_store_all_repeats_nothing():
    found = check(store_all(3000), 3000)  # deeper than Python nests calls
    assert found == Cost(
        3000, peak_states=3000, peak_traces=1, trained=2999, advanced=2999, traced=0, saves=3000, loads=5999
    )
    assert (found.extra, found.forward) == (0, 5999)
    assert check(binomial(3000, 3000), 3000) == found
    tree = check(kary(3000, 3000), 3000)
    assert (tree.extra, tree.peak_states, tree.loads) == (0, 3000, 3001)  # all are saved in one go


def test_all_traced_does_each_step_once():
    found = check(binomial(50, 1, traces=50), 50, states=1, traces=50)
    assert found == Cost(
        50, peak_states=1, peak_traces=50, trained=0, advanced=0, traced=50, saves=1, loads=1
    )
    assert (found.extra, found.forward) == (0, 50)


def test_cost_of_a_schedule_with_traces():
    found = cost(binomial(7, 2, traces=2), 7)  # blocks [0, 1), [1, 3), [3, 5), [5, 7)
    assert found.advanced == best_split(7, 2, 2) == 6
    assert (found.trained, found.extra) == (5, 1)  # training traces its last two steps
    assert (found.traced, found.peak_traces, found.forward) == (7, 2, 13)


# --- the actions, one by one


def test_a_golden_trace():
    assert list(binomial(4, 2)) == [
        Save(0),
        Load(0), Advance(0, 2), Save(2),
        Load(2), Advance(2, 3), Adjoint(3), Load(2), Adjoint(2), Drop(2),
        Load(0), Advance(0, 1), Save(1),
        Load(1), Adjoint(1), Drop(1),
        Load(0), Adjoint(0), Drop(0),
    ]  # fmt: skip


def test_a_golden_trace_with_traces():
    assert list(binomial(5, 2, traces=2)) == [
        Save(0),
        Load(0), Advance(0, 1), Save(1),
        Load(1), Advance(1, 3), Trace(3, 5), Adjoint(4), Adjoint(3),
        Load(1), Trace(1, 3), Adjoint(2), Adjoint(1), Drop(1),
        Load(0), Trace(0, 1), Adjoint(0), Drop(0),
    ]  # fmt: skip
    assert list(binomial(3, 7, traces=3)) == [
        Save(0), Load(0), Trace(0, 3), Adjoint(2), Adjoint(1), Adjoint(0), Drop(0)
    ]  # fmt: skip


def test_a_golden_trace_of_the_tree():
    assert list(kary(8, 2)) == [
        Save(0),
        Load(0), Advance(0, 4), Save(4),
        Load(4), Advance(4, 6), Save(6),
        Load(6), Advance(6, 7), Save(7),
        Load(7), Adjoint(7), Drop(7), Load(6), Adjoint(6), Drop(6),
        Load(4), Advance(4, 5), Save(5),
        Load(5), Adjoint(5), Drop(5), Load(4), Adjoint(4), Drop(4),
        Load(0), Advance(0, 2), Save(2),
        Load(2), Advance(2, 3), Save(3),
        Load(3), Adjoint(3), Drop(3), Load(2), Adjoint(2), Drop(2),
        Load(0), Advance(0, 1), Save(1),
        Load(1), Adjoint(1), Drop(1), Load(0), Adjoint(0), Drop(0),
    ]  # fmt: skip
    assert list(kary(9, 3))[:11] == [
        Save(0),
        Load(0), Advance(0, 3), Save(3), Advance(3, 6), Save(6),
        Load(6), Advance(6, 7), Save(7), Advance(7, 8), Save(8),
    ]  # fmt: skip


def test_actions_of_two_kinds_are_never_equal():
    assert Load(3) == Load(3)
    assert len({Load(3), Save(3), Drop(3), Adjoint(3)}) == 4
    assert Advance(0, 3) != Trace(0, 3)


# --- what holds for all


numbers = st.integers(1, 90)
exactly = settings(derandomize=True, deadline=None, max_examples=200)


def proves(actions, steps, states, traces=None):
    actions = list(actions)
    found = check(actions, steps, states, traces)
    assert [a.t for a in actions if isinstance(a, Adjoint)] == list(reversed(range(steps)))
    assert is_the_training_run(actions, steps)
    assert found.extra >= 0
    moved = sum(a.to - a.t for a in actions if isinstance(a, Advance | Trace))
    assert found.forward == moved + steps - found.traced
    return found


@exactly
@given(steps=numbers, states=st.integers(1, 12), traces=st.integers(0, 12))
def test_every_binomial_schedule_is_legal(steps, states, traces):
    found = proves(binomial(steps, states, traces), steps, states, traces)
    assert found.traced == (steps if traces else 0)
    assert found.advanced <= check(binomial(steps, states), steps).advanced


@exactly
@given(data=st.data(), steps=numbers, states=st.integers(1, 12), traces=st.integers(0, 12))
def test_every_split_is_legal_and_none_is_better(data, steps, states, traces):
    def anywhere(a, b, slots):
        return data.draw(st.integers(a + 1, b - 1))

    found = proves(reverse(steps, states, anywhere, traces), steps, states, traces)
    assert found.advanced >= check(binomial(steps, states, traces), steps).advanced


@exactly
@given(steps=numbers, k=st.integers(2, 100))
def test_the_tree_keeps_within_its_bounds(steps, k):
    depth = next(d for d in range(steps) if k**d >= steps)
    found = proves(kary(steps, k), steps, (k - 1) * depth + 1)
    assert k * found.advanced <= (k - 1) * depth * steps
    assert found.saves == steps  # every leaf is a saved state, once
    assert found.advanced >= check(binomial(steps, found.peak_states), steps).advanced


@pytest.mark.parametrize(("k", "depth"), [(2, 7), (3, 4), (10, 3)])
def test_the_bounds_of_the_tree_are_reached(k, depth):
    steps = k**depth
    found = cost(kary(steps, k), steps)
    assert found.peak_states == (k - 1) * depth + 1
    assert found.advanced == (k - 1) * depth * steps // k


def test_the_first_way_down_is_seen():
    """The helper's own test: it must be able to say no."""
    down = [Advance(0, 2), Save(2)]
    assert is_the_training_run([*down, Load(2), Advance(2, 3), Adjoint(3)], 4)
    assert not is_the_training_run([*down, Load(0), Advance(0, 3), Adjoint(3)], 4)
    assert not is_the_training_run([*down, Adjoint(2)], 4)
    assert not is_the_training_run(down, 4)


# --- what is refused


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ([Load(0)], r"Load\(t=0\) is not legal: current s_0, 2 steps"),
        ([Save(0), Load(1)], r"Load\(t=1\) is not legal: current s_0"),
        ([Save(0), Advance(1, 2)], "Advance"),
        ([Save(0), Advance(0, 0)], "Advance"),
        ([Save(0), Advance(0, 2)], "Advance"),
        ([Save(0), Save(0)], "Save"),
        ([Save(1)], "Save"),
        ([Trace(0, 2), Save(2)], r"Save\(t=2\)"),
        ([Save(0), Drop(1)], "Drop"),
        ([Save(0), Adjoint(0)], "Adjoint"),
        ([Save(0), Adjoint(1)], "Adjoint"),
        ([Save(0), Trace(0, 3)], "Trace"),
        ([Save(0), Trace(1, 2)], "Trace"),
        ([Save(0), Trace(0, 0)], "Trace"),
        ([Save(0), Trace(0, 1), Load(0), Trace(0, 2)], r"Trace\(t=0, to=2\)"),  # step 0 is traced already
        ([Save(0), Trace(0, 1), Adjoint(0)], "Adjoint"),  # out of order, though traced
        ([Save(0), Trace(0, 2), Adjoint(1), Adjoint(1)], r"Adjoint\(t=1\)"),  # its trace is released
        ([Save(0), Trace(0, 2), Adjoint(1), Load(0), Trace(0, 1)], "Trace"),  # traced already
        ([Save(0), Advance(0, 1), Adjoint(1), Load(0), Trace(0, 2)], "Trace"),  # step 1 is reversed
        ([Save(0), "rest"], "rest is not legal"),
        ([Save(0), Advance(0, 1), Adjoint(1), Load(0), Adjoint(0)], r"\[0\] kept"),
        ([Save(0), Advance(0, 1), Adjoint(1), Drop(0)], "1 steps not reversed"),
        ([Save(0), Trace(0, 2), Adjoint(1), Drop(0)], "1 steps not reversed"),
    ],
)
def test_illegal_schedules_are_refused(actions, says):
    with pytest.raises(ValueError, match=says):
        check(actions, 2)


def test_an_adjoint_may_leave_the_current_state_behind():
    found = check([Trace(0, 2), Adjoint(1), Adjoint(0)], 2, states=0, traces=2)
    assert (found.peak_states, found.peak_traces, found.advanced) == (0, 2, 0)


@pytest.mark.parametrize(
    ("actions", "states", "traces", "says"),
    [
        (binomial(20, 4), 3, None, r"Save\(t=\d+\) is too much: 4 states"),
        (store_all(20), 19, None, r"Save\(t=19\) is too much: 20 states"),
        (binomial(20, 4, traces=4), 4, 3, r"Trace\(t=16, to=20\) is too much: \d states and 4 traces"),
        # the trace an adjoint makes for itself is one more
        ([Trace(0, 1), Advance(1, 19), Adjoint(19)], None, 1, r"Adjoint\(t=19\) is too much.* 2 traces"),
    ],
)
def test_what_takes_too_much_is_refused(actions, states, traces, says):
    with pytest.raises(ValueError, match=says):
        check(actions, 20, states, traces)


def test_one_trace_is_always_allowed():
    assert check(binomial(20, 4), 20, traces=0) == check(binomial(20, 4), 20, traces=1)


@pytest.mark.parametrize(("steps", "states", "traces"), [(0, 1, 0), (5, 0, 0), (5, 1, -1)])
def test_counts(steps, states, traces):
    with pytest.raises(ValueError, match=f"steps={steps}, states={states}, traces={traces}.*at least"):
        cost(binomial(steps, states, traces), steps)


@pytest.mark.parametrize(("steps", "k"), [(5, 1), (5, 0), (0, 2)])
def test_counts_of_the_tree(steps, k):
    with pytest.raises(ValueError, match=f"steps={steps}, k={k}: at least 1 step and 2 children; k=2"):
        next(kary(steps, k))


# --- the picture


def test_a_golden_picture():
    assert draw(binomial(9, 3, traces=2), 9).splitlines() == [
        "0   2   4   6   8   advanced",
        "●─────●───●───═◄═◄         7",
        "●·····●···●◄═◄             0",
        "●·····●◄═◄                 0",
        "●─●◄═◄                     1",
        "●◄                         0",
        "● kept   ─ advanced   ═ traced   ◄ adjoint   · waits for its adjoint",
        "9 steps, states kept: 3, traces held: 2, steps advanced: 8, 1 of them extra",
    ]


def test_a_golden_picture_made_smaller():
    lines = draw(kary(30, 3), 30, width=10).splitlines()
    assert lines[:4] == [
        "0     20    advanced",
        "●──●──●●●◄        29",
        "●··●··●●◄◄         0",
        "●··●··●●◄          2",
    ]
    assert lines[-1] == "a column is 3 steps, a row 2 sweeps"


@exactly
@given(steps=st.integers(1, 700), states=st.integers(1, 12), traces=st.integers(0, 12))
def test_every_picture_fits_and_shows_every_step(steps, states, traces):
    found = check(binomial(steps, states, traces), steps)
    ruler, *lines = draw(binomial(steps, states, traces), steps).splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("● kept"))
    rows, total = lines[:end], lines[end + 1]
    columns = len(ruler) - len("  advanced")
    assert columns <= 64 and 1 <= len(rows) <= 32
    assert {len(row) for row in rows} == {len(ruler)}
    assert sum(int(row[columns:].replace(",", "")) for row in rows) == found.advanced
    assert f"advanced: {found.advanced:,}, {found.extra:,} of them" in total
    done = {i for row in rows for i in range(columns) if row[i] == "◄"}
    assert len(done) == min(steps, columns)  # each column was reversed
    assert rows[-1][:2].strip() in {"◄", "●◄", "◄◄"}  # and the first one last
