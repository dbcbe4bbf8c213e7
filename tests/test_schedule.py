"""Schedules are legal, within their states, and as short as any can be."""

from functools import cache

import pytest

from magic.schedule import Adjoint, Advance, Drop, Load, Save, binomial, cost, store_all


@cache
def optimum(steps, states):
    """Fewest steps advanced to reverse `steps` steps with `states` kept, by trying every first split."""
    if steps == 1:
        return 0
    if states == 1:
        return steps * (steps - 1) // 2
    return min(m + optimum(steps - m, states - 1) + optimum(m, states) for m in range(1, steps))


@pytest.mark.parametrize("states", [1, 2, 3, 4, 6, 9, 14])
def test_binomial_is_optimal(states):
    for steps in range(1, 70):
        found = cost(binomial(steps, states), steps)
        assert found.peak_states <= states
        assert found.advanced == optimum(steps, states), (steps, states)


def test_store_all_repeats_nothing():
    found = cost(store_all(3000), 3000)  # deeper than Python nests calls
    assert (found.extra, found.peak_states) == (0, 3000)
    assert cost(binomial(3000, 3000), 3000) == found


def test_a_golden_trace():
    assert list(binomial(4, 2)) == [
        Save(0),
        Load(0), Advance(0, 2), Save(2),
        Load(2), Advance(2, 3), Adjoint(3), Load(2), Adjoint(2), Drop(2),
        Load(0), Advance(0, 1), Save(1),
        Load(1), Adjoint(1), Drop(1),
        Load(0), Adjoint(0), Drop(0),
    ]  # fmt: skip


def test_the_first_way_down_is_the_training_run():
    at = 0
    for action in binomial(500, 7):
        if isinstance(action, Advance):
            assert action.t == at
            at = action.to
        elif isinstance(action, Adjoint):
            break
    assert at == 499


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ([Load(0)], "Load"),
        ([Save(0), Advance(1, 2)], "Advance"),
        ([Save(0), Save(0)], "Save"),
        ([Save(0), Drop(1)], "Drop"),
        ([Save(0), Adjoint(0)], "Adjoint"),
        ([Save(0), Advance(0, 2), Adjoint(2)], "Advance|Adjoint"),
        ([Save(0), Advance(0, 1), Adjoint(1), Load(0), Adjoint(0)], r"\[0\] kept"),
        ([Save(0), Advance(0, 1), Adjoint(1), Drop(0)], "1 steps not reversed"),
    ],
)
def test_illegal_schedules_are_refused(actions, says):
    with pytest.raises(ValueError, match=says):
        cost(actions, 2)


@pytest.mark.parametrize(("steps", "states"), [(0, 1), (5, 0)])
def test_counts(steps, states):
    with pytest.raises(ValueError, match="at least 1"):
        cost(binomial(steps, states), steps)
