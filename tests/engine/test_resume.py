"""A long run survives kill -9 at any moment, and goes on to the same bits; a foreign folder is refused."""

import dataclasses
import json
import multiprocessing
import random
import time

import pytest
import torch

import magic
from magic.engine import listeners, resume
from magic.training.record import Passed
from tests.support import cases, processes


def work(what, folder, told):
    """A training or a replay that notes all it does; tells that it begins, and what came out."""
    resume.Directory._due = lambda self: True
    listeners.check_step = lambda *args: 0.0
    run, measure = slowly()
    told.send("begun")
    if what == "train":
        told.send(magic.train(run, disk=folder, progress=False).fingerprint())
    else:
        plan = magic.plan(run, targets=3, memory=what, disk=folder)
        scores = magic.attribute(run, measure, disk=folder, progress=False, plan=plan)
        told.send(magic.fingerprint(scores.values))


def slowly():
    """A run of 60 steps of a network with BatchNorm, AdamW and dropout."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64, bias=False),
        torch.nn.BatchNorm1d(64),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 3),
    )
    x, y = cases.data(torch.float32)
    order = magic.batches(cases.N, cases.BATCH, 15)
    run = magic.Run(model, torch.optim.AdamW(model.parameters(), 1e-2), (x, y), cases.loss, order)
    return run, cases.measure_on(x, y)


def killed_again_and_again(what, folder, kills, seed):
    """Start the work, kill it after a while, and again; then let it end. Returns what came out."""
    dice, did_something = random.Random(seed), 0

    def started():
        heard, told = multiprocessing.Pipe(duplex=False)
        process = processes.start(work, what, folder, told)
        assert heard.recv() == "begun"
        return process, heard

    for _ in range(kills):
        process, _ = started()
        until = time.monotonic() + 20.0
        while process.is_alive() and not any(folder.rglob("*.safetensors")) and time.monotonic() < until:
            time.sleep(0.01)  # a busy machine takes its time to begin
        time.sleep(dice.uniform(0.0, 0.5))
        process.kill()
        process.join()
        did_something += any(folder.rglob("*.safetensors"))
    assert did_something, "degenerate: it was never killed in mid-work"
    process, heard = started()
    found = heard.recv()
    process.join()
    assert process.exitcode == 0
    return found


@pytest.mark.slow
def test_a_training_that_is_killed(tmp_path):
    found = killed_again_and_again("train", tmp_path, kills=3, seed=0)
    assert found == slowly()[0].train(progress=False).fingerprint()


@pytest.mark.slow
@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("memory, little", [("184KB", True), ("10MB", False)])
def test_a_replay_that_is_killed(tmp_path, memory, little):
    """With little memory the targets go back one after the other, and states lie on disk."""
    found = killed_again_and_again(memory, tmp_path / "a", kills=3, seed=len(memory))
    run, measure = slowly()
    plan = magic.plan(run, targets=3, memory=memory, disk=tmp_path / "b")
    assert (plan.group == 1 and 2 in plan.tier_of) == little
    plan = dataclasses.replace(plan, tier_of=(0,) * plan.states)
    assert found == magic.fingerprint(magic.attribute(run, measure, progress=False, plan=plan).values)


class Stop(Exception):
    pass


def interrupted(run, measure, plan, folder, after):
    """Go on with a replay until so many notes have been made; True when it was finished before."""
    notes = []

    class Noting(resume.Directory):
        def _due(self):
            return True

        def note(self, progress, passed, now=False):
            super().note(progress, passed, now)
            notes.append(progress.t)
            if len(notes) == after:
                raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magic.engine.replay, "Directory", Noting)
        try:
            return magic.attribute(run, measure, disk=folder, plan=plan, progress=False)
        except Stop:
            return None


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize(
    "group, name",
    [(1, "batchnorm-adamw"), (2, "dropout"), (3, "two-groups-onecycle")],
)
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
        ("data", "this has changed: the data"),
        ("order", "the order of the batches"),
        ("loss", "the code of the loss"),
        ("measure", "the code of the measure"),
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
        monkeypatch.setattr(magic.engine.folder, "NUMERICS", ("training/determinism",))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=rf"belongs to something else.*{named}.*Give another folder, or remove"
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
    with pytest.raises(ValueError, match=r"identity\.json .*was not written by magic"):
        magic.train(run, disk=tmp_path, progress=False)
    for damaged in ("[]", "", "3"):
        (tmp_path / "identity.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"identity\.json .*was not written by magic"):
            magic.train(run, disk=tmp_path, progress=False)
    (tmp_path / "identity.json").write_text(json.dumps({"what is brewed": "tea"}))
    with pytest.raises(ValueError, match=r"was not written by this version of magic"):
        magic.train(run, disk=tmp_path, progress=False)


def test_two_processes_in_one_folder(tmp_path):
    run, *_ = cases.build("sgd")
    with (
        resume.Directory.open(tmp_path, run, run.weights(), "a training"),
        pytest.raises(ValueError, match="another process works in"),
    ):
        magic.train(run, disk=tmp_path, progress=False)
    magic.train(run, disk=tmp_path, progress=False)


def test_a_training_noted_elsewhere_contradicts(tmp_path):
    """What an earlier process noted is compared with, too."""
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    passed = json.loads((tmp_path / "passed.json").read_text())
    passed["noted"]["16"]["params/0.weight"] += 1
    (tmp_path / "passed.json").write_text(json.dumps(passed))
    for state in (tmp_path / "training").iterdir():
        state.unlink()
    with pytest.raises(magic.ReplayMismatch, match=r"step 16: 'params/0\.weight'"):
        magic.train(run, disk=tmp_path, progress=False)


# --- what others keep in the folder, and files in the wrong place


def theirs(folder):
    """What a user may keep in a folder that magic is given."""
    outside = folder.parent / "outside"
    outside.write_text("mine")
    (folder / "trial").mkdir(parents=True)
    (folder / "trial" / "notes.txt").write_text("years of work")
    (folder / "lock").symlink_to(outside)
    for name in ("probe.part", "download.part", "magic.txt"):
        (folder / name).write_text(name)
    return outside


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("what", ["train", "attribute", "plan"])
def test_what_is_not_ours_is_left_alone(what, tmp_path):
    run, *_ = cases.build("sgd")
    folder = tmp_path / "folder"
    outside = theirs(folder)
    before = contents(folder)
    if what == "plan":
        magic.plan(run, 2, disk=folder)
    else:
        with pytest.raises(ValueError, match=r"is not empty and not magic's.*give a new or empty folder"):
            if what == "train":
                magic.train(run, disk=folder, progress=False)
            else:
                magic.attribute(run, cases.measure_on(*run.data), disk=folder, progress=False)
    assert contents(folder) == before and outside.read_text() == "mine"


def test_what_is_put_into_our_folder_is_left_alone(tmp_path):
    run, *_ = cases.build("sgd")
    folder, measure = tmp_path / "folder", cases.measure_on(*run.data)
    first = magic.attribute(run, measure, disk=folder, progress=False)
    outside = theirs(folder)
    (folder / "states" / "download.part").write_text("theirs")
    before = contents(folder)
    again = magic.attribute(run, measure, disk=folder, progress=False)
    assert torch.equal(first.values, again.values)
    assert contents(folder) == before and outside.read_text() == "mine"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    run, *_ = cases.build("sgd")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "magic.lock").symlink_to(outside)
    with pytest.raises(OSError, match="cannot be opened as a lock"):
        magic.train(run, disk=tmp_path / "folder", progress=False)
    assert outside.read_text() == "mine"


def test_a_folder_without_its_identity(tmp_path):
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    (tmp_path / "identity.json").unlink()
    other, *_ = cases.build("adamw")
    for whose in (run, other):
        with pytest.raises(ValueError, match=r"not magic's .*no identity\.json"):
            magic.train(whose, disk=tmp_path, progress=False)


def test_a_state_under_another_step_is_refused(tmp_path):
    """A whole file of step 3, renamed to the last step, would be returned as the final state."""
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    state, weights = run.initial, run.weights()
    with resume.Directory.open(tmp_path, run, weights, "a training") as folder:
        for _ in range(3):
            state = run.step(state, weights)
        folder._training.save(3, state)
        folder._training.path(3).replace(folder._training.path(run.steps))
    with pytest.raises(magic.ReplayMismatch, match=rf"wrong place: its step is 3, not {run.steps}"):
        magic.train(run, disk=tmp_path, progress=False)


@pytest.mark.parametrize("what", ["another folder", "another kind"])
def test_a_state_of_something_else_is_refused(what, tmp_path):
    run, *_ = cases.build("sgd")
    for name in ("a", "b"):
        magic.train(run, disk=tmp_path / name, progress=False)
    (last,) = (tmp_path / "a" / "training").iterdir()
    if what == "another folder":
        last.replace(tmp_path / "b" / "training" / last.name)
    else:
        with resume.Directory.open(tmp_path / "b", run, run.weights(), "a training") as folder:
            folder.states.save(run.steps, run.train(progress=False))
            folder.states.path(run.steps).replace(folder._training.path(run.steps))
    named = "its run is" if what == "another folder" else "its kind is 'state', not 'training'"
    with pytest.raises(magic.ReplayMismatch, match=named):
        magic.train(run, disk=tmp_path / "b", progress=False)


def test_the_final_state_is_compared_with_its_checksums(tmp_path):
    """A file written whole, with another content, is not what training noted."""
    run, *_ = cases.build("sgd")
    final = magic.train(run, disk=tmp_path, progress=False)
    with resume.Directory.open(tmp_path, run, run.weights(), "a training") as folder:
        folder._training.save(run.steps, final.map(lambda x: x + 1e-9))
    again, *_ = cases.build("sgd")
    with pytest.raises(magic.ReplayMismatch, match=rf"step {run.steps}: .* is not what training noted"):
        magic.train(again, disk=tmp_path, progress=False)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"run": null}'])
def test_a_damaged_passed(content, tmp_path):
    run, *_ = cases.build("sgd")
    magic.train(run, disk=tmp_path, progress=False)
    (tmp_path / "passed.json").write_text(content)
    with pytest.raises((ValueError, magic.ReplayMismatch), match=r"passed\.json is .*[Rr]emove th"):
        magic.train(run, disk=tmp_path, progress=False)


def test_a_folder_removed_in_mid_run(tmp_path, monkeypatch):
    import shutil

    run, *_ = cases.build("sgd")
    monkeypatch.setattr(resume.Directory, "_due", lambda self: True)
    step = run.step

    def removing(state, *rest):
        if state.step == 5:
            shutil.rmtree(tmp_path / "folder")
        return step(state, *rest)

    run.step = removing
    with pytest.raises(OSError, match="There is no such folder, or not any more: make it, and call again"):
        magic.train(run, disk=tmp_path / "folder", progress=False)
    assert not (tmp_path / "folder").exists()


def test_what_cannot_be_known_is_vouched_for(tmp_path):
    """A loss that calls eval: its folder is gone on with by `trust` alone, which never covers data."""

    def build(shift=0.0):
        torch.manual_seed(0)
        model, (x, y) = cases.mlp().double(), cases.data()

        def loss(model, x, y):
            return cases.loss(model, x, y) * eval("1.0")

        return magic.Run(model, cases.sgd()(model), (x + shift, y), loss, cases.order())

    final = magic.train(build(), disk=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"the code of the loss cannot be known.*trust="):
        magic.train(build(), disk=tmp_path, progress=False)
    again = magic.train(build(), disk=tmp_path, progress=False, trust=True)
    assert again.fingerprint() == final.fingerprint()
    with pytest.raises(ValueError, match=r"this has changed: .*the data"):
        magic.train(build(1e-9), disk=tmp_path, progress=False, trust=True)


def test_a_measure_edited_where_the_start_does_not_show_it(tmp_path):
    run, *_ = cases.build("sgd")
    x, y = run.data

    def measure(model):
        return cases.loss(model, x[:3], y[:3])

    def edited(model):
        return cases.loss(model, x[:3], y[:3]).clamp(max=1e6)

    magic.attribute(run, measure, disk=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"this has changed: .*the code of the measure"):
        magic.attribute(run, edited, disk=tmp_path, progress=False)


def test_a_smaller_memory_is_kept_when_the_work_goes_on(tmp_path):
    run, measure = slowly()
    rich = magic.plan(run, targets=3, memory="100MB")
    assert interrupted(run, measure, rich, tmp_path, after=4) is None
    poor = magic.plan(run, targets=3, memory="1.5MB")
    assert (poor.traces, poor.tier_of) != (rich.traces, rich.tier_of)
    going_on = poor.regrouped(rich.group, rich.chunk)
    assert (going_on.group, going_on.chunk) == (rich.group, rich.chunk)
    assert going_on.nbytes <= going_on.room == 1_500_000
    scores = magic.attribute(run, measure, disk=tmp_path, progress=False, plan=poor)
    assert torch.equal(scores.values, magic.attribute(run, measure, progress=False, plan=rich).values)
    least = dataclasses.replace(rich, traces=0, tier_of=(0,)).nbytes
    tight = dataclasses.replace(poor, room=least - 1)
    with pytest.raises(ValueError, match=f"the least that works is {least:,}"):
        tight.regrouped(rich.group, rich.chunk)
    assert dataclasses.replace(poor, room=least).regrouped(rich.group, rich.chunk).nbytes == least


def test_what_was_witnessed_is_kept(tmp_path):
    run, *_ = cases.build("sgd")
    values = torch.zeros(2, run.n)
    noted = resume.Progress(values, values[:, 0], slice(0, 2), witnessed={15: 1e-9, 5: None}, verified=7)
    with resume.Directory.open(tmp_path, run, run.weights(), "a replay") as folder:
        folder.note(noted, Passed(run.steps), now=True)
        found = folder.progress()
    assert found.witnessed == {15: 1e-9, 5: None} and found.verified == 7
