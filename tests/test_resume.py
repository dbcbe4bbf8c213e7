"""A long run survives kill -9 at any moment, and goes on to the same bits; a foreign folder is refused."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import magic
from magic import directory

from . import cases

WORK = """
import sys, torch, magic
torch.set_num_threads(1)
from tests import cases
from tests.test_resume import slowly
what, folder = sys.argv[1:3]
magic.directory.Directory._due = lambda self: True
run, measure = slowly()
print("begun", flush=True)
if what == "train":
    print(magic.train(run, disk=folder, progress=False).fingerprint(), flush=True)
else:
    plan = magic.plan(run, targets=3, memory=what, disk=folder)
    scores = magic.attribute(run, measure, disk=folder, progress=False, plan=plan)
    print(magic.fingerprint(scores.values), flush=True)
"""


def slowly():
    """A run of 120 steps of a network with BatchNorm, AdamW and dropout."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64, bias=False),
        torch.nn.BatchNorm1d(64),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 3),
    )
    x, y = cases.data(torch.float32)
    order = magic.batches(cases.N, cases.BATCH, 30)
    run = magic.Run(model, torch.optim.AdamW(model.parameters(), 1e-2), (x, y), cases.loss, order)
    return run, cases.measure_on(x, y)


def killed_again_and_again(what, folder, root, kills, seed):
    """Start the work, kill it after a while, and again; then let it end. Returns what it printed."""
    dice, did_something = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK, what, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        assert process.stdout.readline() == "begun\n"
        time.sleep(dice.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        did_something += any(folder.rglob("*.safetensors"))
    assert did_something, "degenerate: it was never killed in mid-work"
    done = subprocess.run(
        [sys.executable, "-c", WORK, what, str(folder)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
def test_a_training_that_is_killed(tmp_path, request):
    found = killed_again_and_again("train", tmp_path, request.config.rootpath, kills=3, seed=0)
    assert found == slowly()[0].train(progress=False).fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["260KB", "10MB"])
def test_a_replay_that_is_killed(tmp_path, request, memory):
    """With little memory the targets go back one after the other, and states lie on disk."""
    found = killed_again_and_again(memory, tmp_path / "a", request.config.rootpath, kills=4, seed=len(memory))
    run, measure = slowly()
    plan = magic.plan(run, targets=3, memory=memory, disk=tmp_path / "b")
    plan = dataclasses.replace(plan, tier_of=(0,) * plan.states)
    assert found == magic.fingerprint(magic.attribute(run, measure, progress=False, plan=plan).values)


class Stop(Exception):
    pass


def interrupted(run, measure, plan, folder, after):
    """Go on with a replay until so many notes have been made; True when it was finished before."""
    notes = []

    class Noting(directory.Directory):
        def _due(self):
            return True

        def note(self, progress, now=False):
            super().note(progress, now)
            notes.append(progress.t)
            if len(notes) == after:
                raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magic.replay, "Directory", Noting)
        try:
            return magic.attribute(run, measure, disk=folder, plan=plan, progress=False)
        except Stop:
            return None


@pytest.mark.parametrize("name", ["batchnorm-adamw", "dropout", "two-groups-onecycle"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_every_stop_is_survived(name, group, tmp_path):
    """Stopped after each note, the replay goes on from it; each time in a fresh Run."""

    def fresh():
        run, *_ = cases.build(name)
        return run, cases.measure_on(*run.data)

    run, measure = fresh()
    plan = dataclasses.replace(magic.plan(run, targets=3, states=3), group=group, chunk=1, room=10**9)
    plan = dataclasses.replace(plan, tier_of=(0, 2, 0))
    expected = magic.attribute(run, measure, plan=dataclasses.replace(plan, tier_of=(0,) * 3), progress=False)
    stops = 0
    while (scores := interrupted(*fresh(), plan, tmp_path, after=2)) is None:
        stops += 1
    assert stops > 6
    assert torch.equal(scores.values, expected.values) and torch.equal(scores.outputs, expected.outputs)
    assert scores.health.sizes == expected.health.sizes


def test_what_is_finished_is_read(tmp_path):
    run, *_ = cases.build("sgd-momentum")
    measure = cases.measure_on(*run.data)
    first = magic.attribute(run, measure, disk=tmp_path, progress=False)
    trained = magic.train(run, disk=tmp_path / "training", progress=False)
    again, *_ = cases.build("sgd-momentum")
    steps, step = [], again.step
    again.step = lambda state, *rest: steps.append(state.step) or step(state, *rest)
    second = magic.attribute(again, measure, disk=tmp_path, progress=False)
    assert torch.equal(first.values, second.values) and torch.equal(first.outputs, second.outputs)
    assert max(steps) <= 1, "nothing but the trial of a step"
    steps.clear()
    assert (
        magic.train(again, disk=tmp_path / "training", progress=False).fingerprint() == trained.fingerprint()
    )
    assert steps == [0], "the first step, which tells whose folder it is"
    assert list((tmp_path / "states").iterdir()) == []


def test_another_plan_goes_on_with_the_first_ones_choices(tmp_path):
    """How targets are grouped changes rounding; the folder remembers it."""
    run, *_ = cases.build("adamw")
    measure = cases.measure_on(*run.data)
    plan = dataclasses.replace(magic.plan(run, 3, states=16), group=2, chunk=2, room=10**9)
    expected = magic.attribute(run, measure, plan=plan, progress=False)
    assert interrupted(run, measure, plan, tmp_path, after=5) is None
    scores = magic.attribute(run, measure, disk=tmp_path, progress=False)
    assert torch.equal(scores.values, expected.values)


def changed(what):
    """A run that differs from cases.build("sgd-momentum") in one thing, and its measure."""
    x, y = cases.data()
    torch.manual_seed(1 if what == "start" else 0)
    model = cases.mlp().double()
    options = {"lr": 0.1, "momentum": 0.9} | ({"lr": 0.11} if what == "rate" else {})
    if what == "data":
        x[3] += 1e-9
    order = magic.batches(cases.N, cases.BATCH, cases.EPOCHS, seed=3 if what == "order" else 2)

    def loss(model, x, y):
        return cases.loss(model, x, y) * 1.0

    def another(model, x, y):
        return cases.loss(model, x, y) * 1.5

    loss = another if what == "loss" else loss
    run = magic.Run(model, torch.optim.SGD(model.parameters(), **options), (x, y), loss, order)
    measure = cases.measure_on(x, y) if what != "measure" else lambda m: cases.loss(m, x[5:8], y[5:8])
    return run, measure


@pytest.mark.parametrize(
    "what, named",
    [
        ("start", "the start s_0"),
        ("rate", "the optimizer or its hyper-parameters"),
        ("data", "the data is"),
        ("order", "the order of the batches"),
        ("loss", "the code of the loss"),
        ("measure", "what is computed"),
        ("weights", "the data weights"),
        ("code", "magic's code"),
        ("threads", "the thread count"),
        ("version", "the versions of what the model imports"),
        ("processor", "the processor's instruction set"),
    ],
)
def test_a_foreign_folder(what, named, tmp_path, monkeypatch):
    run, measure = changed("nothing")
    assert interrupted(run, measure, magic.plan(run, 3, states=4), tmp_path, after=4) is None
    run, measure = changed(what)
    if what == "threads":
        torch.set_num_threads(2)
    if what == "version":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    if what == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    if what == "code":
        monkeypatch.setattr(directory, "NUMERICS", ("determinism",))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=rf"belongs to something else: {named}.*Give another folder, or remove"
    ):
        magic.attribute(run, measure, at=0.9 if what == "weights" else None, disk=tmp_path, progress=False)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}, "it was not touched"


def test_a_training_is_no_replay(tmp_path):
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    with pytest.raises(
        ValueError, match=r"what is computed is 'a replay of 3 targets.*there it is 'a training'"
    ):
        magic.attribute(run, cases.measure_on(*run.data), disk=tmp_path, progress=False)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "identity.json").write_text("{not json")
    run, *_ = cases.build("sgd")
    with pytest.raises(ValueError, match=r"identity\.json was not written by magic"):
        magic.train(run, disk=tmp_path, progress=False)
    (tmp_path / "identity.json").write_text(json.dumps({"what is brewed": "tea"}))
    with pytest.raises(ValueError, match=r"belongs to something else: the start s_0 is .* there it is None"):
        magic.train(run, disk=tmp_path, progress=False)


def test_two_processes_in_one_folder(tmp_path):
    run, *_ = cases.build("sgd")
    with (
        directory.Directory.open(tmp_path, run, run.weights(), "a training"),
        pytest.raises(ValueError, match="another process works in"),
    ):
        magic.train(run, disk=tmp_path, progress=False)
    magic.train(run, disk=tmp_path, progress=False)


def test_a_training_noted_elsewhere_contradicts(tmp_path):
    """What an earlier process noted is compared with, too."""
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    passed = json.loads((tmp_path / "passed.json").read_text())
    passed["16"]["params/0.weight"] += 1
    (tmp_path / "passed.json").write_text(json.dumps(passed))
    for state in (tmp_path / "training").iterdir():
        state.unlink()
    with pytest.raises(magic.ReplayMismatch, match=r"step 16: 'params/0\.weight'"):
        magic.train(run, disk=tmp_path, progress=False)
