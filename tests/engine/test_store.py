"""What a place gives back has the bits that were stored, or it raises; a file is whole or not there."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

import magic
from magic.engine import files, resume
from magic.engine.places import Disk, Host
from magic.engine.store import Memory, Store
from tests.engine.test_record import flip_a_bit
from tests.support import cases, processes


@pytest.fixture(params=["sgd-momentum", "adamw-amsgrad", "batchnorm-now-and-then"])
def states(request):
    """A run and its first states; slots fill at the first step, and buffers change now and then."""
    run, *_ = cases.build(request.param, torch.float32)
    found, weights = [run.initial], run.weights()
    for _ in range(4):
        found.append(run.step(found[-1], weights))
    return run, found


def places(run, folder):
    return {"memory": Memory(), "host": Host(run.device, run.initial), "disk": Disk(folder, run.initial)}


@pytest.mark.parametrize("where", ["memory", "host", "disk"])
def test_the_same_state_comes_back(states, where, tmp_path):
    run, found = states
    place, weights = places(run, tmp_path)[where], run.weights()
    for state in found:
        place.save(state.step, state)
    for state in reversed(found):
        back = place.load(state.step)
        assert back.step == state.step
        assert list(back.flatten()) == list(state.flatten())
        for name, x in state.flatten().items():
            assert torch.equal(x, back.flatten()[name]) and x.dtype == back.flatten()[name].dtype
            assert x.device == back.flatten()[name].device
        assert run.moved(back) == run.moved(state), "a buffer that training has not changed stays that buffer"
        assert all(x.data_ptr() % 64 == 0 for x in back.flatten().values()), "sums depend on the alignment"
        assert run.step(back, weights).fingerprint() == run.step(state, weights).fingerprint()
        place.drop(state.step)
        with pytest.raises(KeyError):
            place.load(state.step)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_slots_and_peaks(states, tmp_path):
    run, found = states
    here, there = Memory(), Disk(tmp_path, run.initial)
    store = Store([here, there], tier_of=(0, 1, 0))
    for t in (0, 1, 2):
        store.save(t, found[t])
    assert there.steps() == [1]
    with pytest.raises(IndexError):
        store.save(3, found[3])  # there is no slot left
    store.drop(1)
    store.save(3, found[3])  # in the slot that is free, which is on disk
    assert there.steps() == [3]
    assert store.peak_states == [2, 1]
    assert store.peak_bytes == [found[0].nbytes + found[2].nbytes, found[1].nbytes]
    assert store.load(3).fingerprint() == found[3].fingerprint()


@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "nothing", "something else"])
def test_a_damaged_file(states, damage, tmp_path):
    run, found = states
    place = Disk(tmp_path, run.initial)
    place.save(2, found[2])
    place.save(3, found[3])
    raw = bytearray(place.path(3).read_bytes())
    match damage:
        case "a flipped bit":
            raw[-5] ^= 4
        case "half of it":
            raw = raw[: len(raw) // 2]
        case "nothing":
            raw = b""
        case "something else":
            raw = b"not a file of tensors" * 100
    place.path(3).write_bytes(raw)
    with pytest.raises(magic.ReplayMismatch, match=r"state-000000003.*is damaged"):
        place.load(3)
    assert place.kept() == [2]
    assert place.steps() == [2], "a damaged state is removed, and computed again"


def test_what_a_kill_leaves_behind_is_removed(states, tmp_path):
    run, found = states
    place = Disk(tmp_path, run.initial)
    place.save(1, found[1])
    (tmp_path / ".magic-0123.part").write_bytes(b"begun")
    assert place.kept() == [1]
    (tmp_path / "download.part").write_bytes(b"somebody else's")
    assert place.kept() == [1]
    assert {p.name for p in tmp_path.iterdir()} == {"state-000000001.safetensors", "download.part"}


def test_a_file_can_be_read_by_others(states, tmp_path):
    from safetensors import safe_open

    run, found = states
    Disk(tmp_path, run.initial).save(3, found[3])
    with safe_open(tmp_path / "state-000000003.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["magic"])
        expected = {"step", "kind", "run", "moved", "order", "fingerprint", "on_cpu", "strides"}
        assert meta["step"] == 3 and set(meta) == expected
        name = next(iter(found[3].params))
        assert torch.equal(file.get_tensor(f"params/{name}"), found[3].params[name])


def test_what_a_file_says_of_itself_is_protected(states, tmp_path):
    run, found = states
    place = Disk(tmp_path, run.initial)
    place.save(2, found[2])
    raw = place.path(2).read_bytes()
    assert raw.count(b'\\"step\\": 2') == 1
    place.path(2).write_bytes(raw.replace(b'\\"step\\": 2', b'\\"step\\": 3'))
    place.path(2).rename(place.path(3))
    with pytest.raises(magic.ReplayMismatch, match="does not hold the bits"):
        place.load(3)


def test_a_state_that_is_gone(states, tmp_path):
    run, found = states
    store = Store([Disk(tmp_path, run.initial)], tier_of=(0, 0))
    store.save(2, found[2])
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(magic.ReplayMismatch, match="step 2: its state is gone from disk"):
        store.load(2)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    import os

    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append("sync") or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    files.write(tmp_path / "x.safetensors", {"x": torch.zeros(3)}, {})
    files.write_json(tmp_path / "x.json", {"x": 1})
    assert done == ["sync", "replace", "sync"] * 2


def test_a_bit_in_host_memory(states):
    run, found = states
    place = Host(run.device, run.initial)
    place.save(2, found[2])
    flip_a_bit(next(iter(place._states[2][0].params.values())))
    with pytest.raises(magic.ReplayMismatch, match="stored in host memory"):
        place.load(2)


def limit_files(size):
    """Within this process, in which nobody else writes: a limit on file sizes stands in for a full disk."""
    import resource  # there is none on Windows

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_until_the_disk_is_full(folder):
    """What is told when the sixth file cannot be written."""
    run, *_ = cases.build("sgd-momentum")
    resume.Directory._due = lambda self: True
    made = []

    def after(path, tensors, meta, write=files.write):
        made.append(path.name)
        if len(made) == 6:
            limit_files(10)
        write(path, tensors, meta)

    magic.engine.places.write = after
    try:
        magic.train(run, disk=folder, progress=False)
    except OSError as error:
        return str(error)


def test_a_disk_that_is_full_in_mid_run(tmp_path):
    """What was noted before is kept, and goes on."""
    said = processes.returned(train_until_the_disk_is_full, tmp_path)
    assert "could not be written" in said
    assert "make room, or give another folder, and call again" in said
    assert not list(tmp_path.rglob("*.part"))
    (kept,) = (tmp_path / "training").iterdir()
    assert kept.name == "state-000000005.safetensors"
    run, *_ = cases.build("sgd-momentum")
    taken, step = [], run.step
    run.step = lambda state, *rest: taken.append(state.step) or step(state, *rest)
    state = magic.train(run, disk=tmp_path, progress=False)
    assert taken[1:] == list(range(5, run.steps)), "after the first, which tells whose folder it is"
    assert state.fingerprint() == run.train(progress=False).fingerprint()


def keep_on_a_full_disk(folder):
    """What is told of scores and of retrainings that cannot be kept, and how many rows the bank has then."""
    run, *_ = cases.build("sgd-momentum")
    scores, told = magic.attribute(run, cases.measure_on(*run.data), progress=False), []
    bank, sets = magic.Bank(folder / "bank.sqlite", run, scores.measure), torch.rand(9, run.n)
    magic.outputs(run, scores.measure, sets[:2], bank=bank, progress=False)
    limit_files(10)
    for write in (
        lambda: scores.save(folder / "scores.npz"),
        lambda: magic.outputs(run, scores.measure, sets, bank=bank, progress=False),
    ):
        try:
            write()
        except OSError as error:
            told.append(str(error))
    limit_files(None)
    return *told, len(bank)


def test_scores_and_banks_on_a_full_disk(tmp_path):
    scores, bank, rows = processes.returned(keep_on_a_full_disk, tmp_path)
    assert "scores.npz could not be written" in scores and "make room" in scores
    assert "cannot be used as a bank" in bank
    assert rows == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bank.sqlite"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run, *_ = cases.build("sgd-momentum")
    measure = cases.measure_on(*run.data)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file.* not a folder that can be written .*give another"):
            magic.attribute(run, measure, disk=path, progress=False)
        with pytest.raises(OSError, match=r"file.* not a folder that can be written .*give another"):
            magic.train(run, disk=path, progress=False)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'magic-attribution\[disk\]'"):
        files.write(tmp_path / "x.safetensors", {"x": torch.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_told():
    with pytest.raises(magic.ReplayMismatch, match="is damaged, or was not written by magic"):
        files.read(Path("nowhere.safetensors"), torch.device("cpu"))
