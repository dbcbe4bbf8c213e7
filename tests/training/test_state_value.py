"""A state is a value: a copy of it, made in whatever way and kept wherever, is the same state.

Over every kind of state: what is computed from a copy has the bits of what is computed from the state
itself. With MAGIC_MANY=1 set, over every case.
"""

import copy
import io
import os
import pickle

import pytest
import torch

import magic
from magic.engine import places, store
from magic.engine.adjoint import measure_vjp, step_vjp
from tests.kernels import test_stop_gradients as test_stopgradients
from tests.support import cases
from tests.support.drawn import CHOICES, Draw, measure_on

MANY = bool(os.environ.get("MAGIC_MANY"))
KINDS = [  # without those whose states are of the same kind
    "sgd-nesterov-decay", "adamw-amsgrad", "two-groups-onecycle", "batchnorm-conv", "batchnorm-now-and-then",
    "weightnorm", "dropout", "attention", "tied-embedding", "untouched-embedding", "frozen-and-unused",
]  # fmt: skip
BUFFERS = ["average", "average-through-data", "average-now-and-then", "distilled"]  # these write buffers
ALL = [*(cases.CASES if MANY else KINDS), *BUFFERS, "queue"]


def queued():
    draw = Draw(
        **{part: choices[0] for part, choices in CHOICES.items()} | {"keeps": "queue", "base": "taught"}
    )
    run = draw.build()[0]
    return run, measure_on(run, draw.keeps)


def build(name):
    if name == "queue":
        return queued()
    if name in BUFFERS:
        run, *_, measure = test_stopgradients.build(name)
        return run, measure
    run, *_ = cases.build(name)
    return run, cases.measure_on(*run.data)


def pickled(state):
    return pickle.loads(pickle.dumps(state))


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def refreshed(state):
    """Out of a dictionary of tensors and back."""
    flat = {name: x.clone() for name, x in state.flatten().items()}
    return magic.State.unflatten(flat, state.step, moved=state.moved)


def kept(place):
    def through(state):
        place.save(state.step, state)
        return place.load(state.step)

    return through


def ways(run, folder):
    """Everything that may happen to a state between two steps."""
    return {
        "cloned": lambda state: state.map(torch.clone),
        "moved": lambda state: state.map(lambda x: x.to("cpu", copy=True)),
        "deepcopied": copy.deepcopy,
        "pickled": pickled,
        "saved": saved,
        "flattened": refreshed,
        "in memory": kept(store.Memory()),
        "on the host": kept(places.Host(run.device, run.initial)),
        "on disk": kept(places.Disk(folder, run.initial)),
        "on disk, of a copy": kept(places.Disk(folder, run.initial.map(torch.clone), "copy")),
    }


def all_states(run, weights):
    states = [run.initial]
    for _ in range(run.steps):
        states.append(run.step(states[-1], weights))
    return states


@pytest.mark.parametrize("name", ALL)
def test_a_copied_state_is_the_same_state(name, tmp_path):
    run, measure = build(name)
    weights = run.weights(0.9)
    states, final = all_states(run, weights), run.train(0.9, progress=False)
    assert final.fingerprint() == states[-1].fingerprint()
    outputs = magic.engine.replay.measured_outputs(run, final, measure)
    model = magic.fingerprint(run.model(final))
    for way, through in ways(run, tmp_path).items():
        for t in (1, run.steps // 2, run.steps):
            state = through(states[t])
            assert (state.step, state.moved) == (t, states[t].moved), way
            assert state.fingerprint() == states[t].fingerprint(), way
            assert run.moved(state) == run.moved(states[t]), way
            if t < run.steps:
                assert run.step(state, weights).fingerprint() == states[t + 1].fingerprint(), way
        state = through(states[-1])
        assert torch.equal(magic.engine.replay.measured_outputs(run, state, measure), outputs), way
        assert magic.fingerprint(run.model(state)) == model, way


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("name", ALL)
def test_scores_do_not_depend_on_where_states_have_been(name, tmp_path, monkeypatch):
    """Each state of a replay is another copy, made in another way; a third of them lie on disk."""
    run, measure = build(name)
    expected = magic.attribute(run, measure, at=0.9, progress=False)
    run, measure = build(name)
    (tmp_path / "copies").mkdir()
    copies = list(ways(run, tmp_path / "copies").values())
    moved_on, seen = magic.Run.moved_on, []

    def copied(self, *args, **kwargs):
        state = moved_on(self, *args, **kwargs)
        if self is not run:  # the witness's shadow, whose steps are others
            return state
        seen.append(state.step)
        return copies[len(seen) % len(copies)](state)

    monkeypatch.setattr(magic.Run, "moved_on", copied)
    plan = magic.plan(run, len(expected.outputs), states=3)
    plan = type(plan)(**{**vars(plan), "tier_of": (0, 2, 2)})
    found = magic.attribute(run, measure, at=0.9, plan=plan, disk=tmp_path / "work", progress=False)
    assert len(seen) > 2 * run.steps, "degenerate: nothing was copied"
    assert torch.equal(found.values, expected.values) and torch.equal(found.outputs, expected.outputs)


@pytest.mark.parametrize("name", ["batchnorm-adamw", "average", "queue"])
def test_a_pull_changes_no_state_and_no_cotangent(name):
    run, measure = build(name)
    weights = run.weights()
    states = all_states(run, weights)
    before = [state.fingerprint() for state in states]
    last = measure_vjp(run, states[-1], measure)
    kept = last.fingerprint()
    first, scores = step_vjp(run, states[-2], last, weights)
    again, same = step_vjp(run, states[-2].map(torch.clone), last.map(torch.clone), weights)
    assert torch.equal(scores, same) and first.fingerprint() == again.fingerprint()
    assert last.fingerprint() == kept and [state.fingerprint() for state in states] == before
    assert not isinstance(last, magic.State)
