"""The loop, and each of those who listen to it, alone."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

import magic
from magic import schedule
from magic.engine import adjoint, listeners, replay
from magic.engine.adjoint import Rows
from magic.engine.listeners import Bar, Listener, Notes, Scores, Several, Sizes, Witness
from magic.engine.resume import Progress
from magic.engine.store import Memory, Store
from magic.kernels.escapes import FUNCTION
from tests.support import cases

T = 12


def traced_at(t, **fields):
    return SimpleNamespace(state=SimpleNamespace(step=t), escaped=(), grads={}, **fields)


def cotangent_of(*rows):
    """A cotangent whose one parameter has these rows, one for each target."""
    return magic.training.state.Cotangent({"p": torch.tensor(rows)}, {}, {"p": {}})


class Recording(Listener):
    """Keeps what it is told, in order."""

    def __init__(self, told, name=""):
        self.told, self.name = told, name

    def stepped(self, state):
        self.told.append((self.name + "stepped", state.step))

    def pulling(self, traced, cotangent):
        self.told.append((self.name + "pulling", traced.state.step))

    def pulled(self, traced, cotangent, scores):
        self.told.append((self.name + "pulled", traced.state.step))


# --- the loop


def reversed_by(actions, slots, listener, name="sgd-momentum"):
    """The loop over this schedule, with nothing around it; returns the run and where it turned."""
    run, *_ = cases.build(name)
    training = replay.Training(run, run.weights(), run.passed(run.weights()))
    turned = []

    def turn(last):
        turned.append(last.state.step)
        final = run.step(last.state, run.weights())
        return adjoint.measure_vjp(run, final, cases.measure_on(*run.data))

    store = Store([Memory()], (0,) * slots)
    replay.reverse(training, actions(run.steps), store, turn, listener, chunk=1)
    return run, turned


SCHEDULES = {
    "all kept": (schedule.store_all, 16),
    "all traced": (lambda steps: schedule.binomial(steps, 1, steps), 1),
    "one kept": (lambda steps: schedule.binomial(steps, 1), 1),
    "three kept, four traced": (lambda steps: schedule.binomial(steps, 3, 4), 3),
    "a tree": (lambda steps: schedule.kary(steps, 2), 5),
}


def by_hand(name):
    """Chapter 06's loop, all states kept."""
    run, *_ = cases.build(name)
    weights, states = run.weights(), [run.initial]
    for _ in range(run.steps):
        states.append(run.step(states[-1], weights))
    values = torch.zeros(3, run.n, dtype=run.dtype)
    cotangent = adjoint.measure_vjp(run, states.pop(), cases.measure_on(*run.data))
    for t in reversed(range(run.steps)):
        cotangent, scores = adjoint.step_vjp(run, states[t], cotangent, weights, chunk=1)
        values.index_add_(1, run.batches[t], scores)
    return values


@pytest.mark.parametrize("name", ["sgd-momentum", "batchnorm-adamw"])
@pytest.mark.parametrize("how", SCHEDULES)
def test_the_loop_gives_the_scores_by_any_schedule(how, name):
    run, *_ = cases.build(name)
    found = Progress(torch.zeros(3, run.n, dtype=run.dtype), None, slice(0, 3))
    _, turned = reversed_by(*SCHEDULES[how], Scores(run, found), name)
    assert turned == [run.steps - 1], "it turns once, at the last step"
    assert found.values.abs().max() > 0 and torch.equal(found.values, by_hand(name))


@pytest.mark.parametrize("how", SCHEDULES)
def test_what_the_loop_tells(how):
    told = []
    run, _ = reversed_by(*SCHEDULES[how], Recording(told))
    back = [(what, t) for what, t in told if what != "stepped"]
    expected = [(what, t) for t in reversed(range(run.steps)) for what in ("pulling", "pulled")]
    assert back == expected
    stepped = sum(what == "stepped" for what, _ in told)
    cost = schedule.cost(SCHEDULES[how][0](run.steps), run.steps)
    assert stepped == cost.advanced + cost.traced


@pytest.mark.parametrize("how", ["all kept", "one kept"])
def test_no_trace_outlives_its_adjoint(how):
    """Where a schedule traces nothing, the loop has at most one trace at a time."""

    class Watching(Listener):
        def __init__(self):
            self.last, self.seen = None, 0

        def pulling(self, traced, cotangent):
            assert self.last is None or self.last() is None
            self.last, self.seen = weakref.ref(traced), self.seen + 1

    watching = Watching()
    made, original = [], adjoint.trace

    def trace(*arguments, **options):
        assert not made or made[-1]() is None, "the one before is still alive while the next is made"
        traced = original(*arguments, **options)
        made.append(weakref.ref(traced))
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "trace", trace)
        run, _ = reversed_by(*SCHEDULES[how], watching)
    assert watching.seen == len(made) == run.steps


# --- the listeners


def test_several_are_told_in_their_order():
    told = []
    both = Several([Recording(told, "a "), Recording(told, "b ")])
    both.stepped(SimpleNamespace(step=1))
    both.pulling(traced_at(0), None)
    both.pulled(traced_at(0), None, None)
    events = [("stepped", 1), ("pulling", 0), ("pulled", 0)]
    assert told == [(f"{who} {what}", t) for what, t in events for who in "ab"]


def test_the_bar_moves_once_a_step_and_once_a_pull():
    moved = []
    bar = Bar(SimpleNamespace(update=lambda: moved.append(1)))
    for _ in range(T):
        bar.stepped(None)
    for t in range(T):
        bar.pulling(traced_at(t), None)
        bar.pulled(traced_at(t), None, None)
    assert len(moved) == 2 * T


def test_scores_add_up_in_their_rows():
    run = SimpleNamespace(batches=[torch.tensor([0, 2]), torch.tensor([2, 3])])
    found = Progress(torch.zeros(3, 4, dtype=torch.float64), None, slice(1, 3))
    scores, cotangent = Scores(run, found), cotangent_of([1.0], [2.0])
    scores.pulled(traced_at(1), cotangent, Rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {}, {}))
    scores.pulled(traced_at(0), cotangent, Rows(torch.tensor([[10.0, 20.0], [30.0, 40.0]]), {}, {}))
    assert found.values.tolist() == [[0, 0, 0, 0], [10, 0, 21, 2], [30, 0, 43, 4]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    run = SimpleNamespace(batches=[torch.tensor([0, 1])])
    found = Progress(torch.zeros(1, 2), None, slice(0, 1))
    scores = Rows(torch.tensor([[1.0, bad]]), {}, {})
    with pytest.raises(magic.NonFinite, match="NaN at step 0, first in 'params/p'"):
        Scores(run, found).pulled(traced_at(0), cotangent_of([bad]), scores)
    with pytest.raises(magic.NonFinite, match="NaN at step 0, first in 'scores'"):
        Scores(run, found).pulled(traced_at(0), cotangent_of([1.0]), scores)
    assert found.values.tolist() == [[0, 0]]


def test_sizes_are_taken_now_and_then():
    steps, sizes = 3 * listeners.health.SAMPLES, {}
    listener = Sizes(steps, sizes)
    for rows in ([[3.0, 4.0]], [[6.0, 8.0], [0.0, 1.0]]):  # a group of one target, and one of two
        for t in reversed(range(steps)):
            listener.pulled(traced_at(t), cotangent_of(*rows), None)
    assert sorted(sizes) == list(range(0, steps, 3))
    assert all(row == [5.0, 10.0, 1.0] for row in sizes.values())


class Folder:
    """Keeps what it was to note."""

    def __init__(self):
        self.training, self.notes = [], []

    def note_training(self, state, passed):
        self.training.append(state.step)

    def note(self, found, passed):
        self.notes.append(dataclasses.replace(found))


def test_notes_are_of_training_until_the_first_pull():
    folder, found = Folder(), Progress(None, None, slice(0, 1))
    notes = Notes(folder, SimpleNamespace(verified=7), found)
    for t in range(1, 4):
        notes.stepped(SimpleNamespace(step=t))
    for t in (2, 1, 0):
        notes.pulling(traced_at(t), None)
        notes.pulled(traced_at(t), cotangent_of([float(t)]), None)
        notes.stepped(SimpleNamespace(step=t))  # done again for the next pull
    assert folder.training == [1, 2, 3]
    assert [note.t for note in folder.notes] == [2, 1], "at step 0 the sweep is done, and is noted as done"
    assert [note.cotangent.params["p"].item() for note in folder.notes] == [2.0, 1.0]
    assert {note.verified for note in folder.notes} == {7}


def test_notes_of_a_replay_that_goes_on_are_of_no_training():
    folder, found = Folder(), Progress(None, None, slice(0, 1), t=2, cotangent=cotangent_of([1.0]))
    Notes(folder, SimpleNamespace(verified=0), found).stepped(SimpleNamespace(step=1))
    assert folder.training == []


def witness_of(monkeypatch, found, chunk=1):
    """A witness that is told what to find, and the steps that it asks about."""
    asked = []

    def check_step(run, state, weights, directions, data):
        asked.append((state.step, directions))
        return 1e-9

    monkeypatch.setattr(listeners, "check_step", check_step)
    monkeypatch.setattr(listeners, "warn_of_underflow", lambda *arguments: None)
    run = SimpleNamespace(steps=T, hypers=[()] * T, group_of={}, rule=None)
    return Witness(run, None, chunk, found), asked


def test_the_witness_asks_at_two_steps_on_the_way(monkeypatch):
    found = {}
    witness, asked = witness_of(monkeypatch, found)
    witness.ask(traced_at(T - 1), directions=2)
    for _ in range(2):  # two groups of targets come by
        for t in reversed(range(T)):
            witness.pulling(traced_at(t), cotangent_of([1.0]))
    assert asked == [(T - 1, 2), (2 * T // 3, 1), (T // 3, 1)]
    assert found == dict.fromkeys((T - 1, 2 * T // 3, T // 3), 1e-9)


def test_the_witness_asks_where_something_may_be_hidden(monkeypatch):
    witness, asked = witness_of(monkeypatch, {T // 3: None, 2 * T // 3: None})
    function, number = f"{FUNCTION}Square", "item"
    for t, escaped in ((9, (function,)), (7, (function,)), (6, (number,)), (5, (number,)), (3, ())):
        traced = traced_at(t)
        traced.escaped = escaped
        witness.pulling(traced, cotangent_of([1.0]))
    assert [t for t, _ in asked] == [9, 6, 5], "a Function once, a number at every step"


@pytest.mark.parametrize("wrong", [False, True])
def test_the_witness_compares_the_last_target_with_itself_alone(monkeypatch, wrong):
    witness, _ = witness_of(monkeypatch, {3: 1e-9}, chunk=4)

    def traced_vjp(run, traced, cotangent, chunk):
        assert chunk == 1 and cotangent.params["p"].tolist() == [[3.0, 4.0]]
        return cotangent.map(lambda x: 2 * x), Rows(torch.tensor([[5.0]]), {}, {})

    monkeypatch.setattr(listeners, "traced_vjp", traced_vjp)
    traced = traced_at(3)
    traced.last = SimpleNamespace(outputs=[torch.ones(2, requires_grad=True) * 1.0])
    before = cotangent_of([1.0, 2.0], [3.0, 4.0])
    witness.pulling(traced, before)
    assert before.params["p"].tolist() == [[1.0, 2.0], [3.0, 4.0]], "it looked at a copy"
    after, scores = before.map(lambda x: 2 * x), Rows(torch.tensor([[0.0], [5.0 + wrong]]), {}, {})
    if wrong:
        with pytest.raises(
            magic.NotDifferentiable, match="a target gets other values of the scores than alone"
        ):
            witness.pulled(traced, after, scores)
    else:
        witness.pulled(traced, after, scores)
        witness.pulling(traced_at(2), before)
        assert witness.alone is None, "it looks where the step itself was looked at, and nowhere else"


def test_one_target_has_nothing_to_be_compared_with(monkeypatch):
    for rows, chunk in (([[1.0]], 4), ([[1.0], [2.0]], 1)):
        witness, _ = witness_of(monkeypatch, {3: 1e-9}, chunk)
        witness.pulling(traced_at(3), cotangent_of(*rows))
        assert witness.alone is None
