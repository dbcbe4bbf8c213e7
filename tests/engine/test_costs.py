"""What a schedule takes, in closed form, is what walking through it counts; and it is known at once."""

import pytest

from magic import schedule
from magic.engine import costs
from tests.support import slots


@pytest.mark.parametrize("traces", [0, 1, 2, 3, 5, 40])
def test_closed_forms_are_what_walking_counts(traces):
    for steps in (*range(1, 22), 57, 90, 131):
        for states in (*range(1, 8), 12, steps):
            actions = list(schedule.binomial(steps, states, traces))
            cost = schedule.check(actions, steps)
            assert costs.binomial(steps, states, traces) == cost
            assert costs.advanced(steps, states, traces) == cost.advanced
            walked = slots.uses(actions)
            known = costs.uses(steps, states, traces).tolist()
            assert known == [walked[slot] for slot in range(cost.peak_states)]
            for count in (1, len(known) // 2, len(known)):
                assert costs.least_used(steps, states, traces, count) == sum(sorted(known)[:count])


@pytest.mark.parametrize("states", [2, 5, 60, 1000])
def test_a_long_schedule(states):
    """Many repetitions with few states, and few with many: each has its own way to be counted."""
    actions = list(schedule.binomial(5000, states, traces=1))
    cost = schedule.check(actions, 5000)
    assert costs.binomial(5000, states, traces=1) == cost and cost.extra > 0
    walked = slots.uses(actions)
    assert costs.uses(5000, states, traces=1).tolist() == [walked[slot] for slot in range(states)]


def test_the_first_block_is_passed_as_often_as_any():
    """`costs.advanced` relies on it: a first block that is shorter is passed exactly `repeats_of` times."""
    for steps in range(2, 60):
        for states in range(1, 6):
            loads = [a.t for a in schedule.binomial(steps, states) if isinstance(a, schedule.Advance)]
            assert loads.count(0) == schedule.repeats_of(steps, states - 1)


def test_costs_of_long_runs_are_known_at_once():
    """No walk could end: with one state, 5·10⁹ steps are advanced."""
    extra = [costs.binomial(100_000, states).extra for states in (1, 2, 50, 440, 1000, 50_000, 100_000)]
    assert extra == sorted(extra, reverse=True)
    used = [costs.least_used(100_000, states, 0, states // 2) for states in (2, 50, 440, 50_000)]
    assert all(used)
    assert costs.binomial(100_000, 1).advanced == 100_000 * 99_999 // 2
    assert costs.binomial(100_000, 100_000).extra == 0
