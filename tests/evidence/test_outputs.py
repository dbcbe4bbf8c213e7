"""Many retrainings: the subsets, the bank, the workers; killed, shared, and of another run."""

import os
import sqlite3
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch

import magic
from magic import subsets, workers
from magic.evidence import bank, retraining, rows
from magic.evidence import outputs as many
from tests.support import cases, processes

ROOT = Path(__file__).parents[2]


def small(seed=0, **options):
    """A run of 16 steps over 40 examples, float64, and its measure of 3 outputs."""
    torch.manual_seed(seed)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order(), **options)
    return run, cases.measure_on(*run.data)


# --- subsets


def test_random():
    weights = subsets.random(n=200, drop=0.05, subsets=7, seed=1)
    assert weights.shape == (7, 200)
    assert ((weights == 0).sum(1) == 10).all() and ((weights == 1).sum(1) == 190).all()
    assert len({tuple(row.tolist()) for row in weights}) == 7
    assert torch.equal(weights, subsets.random(200, 0.05, 7, seed=1))
    assert not torch.equal(weights, subsets.random(200, 0.05, 7, seed=2))
    for drop, count in ((0.001, 0), (1.0, 200)):
        with pytest.raises(ValueError, match=f"rounds to {count}; a subset drops between 1 and 199"):
            subsets.random(200, drop, 3)
    with pytest.raises(ValueError, match="subsets=0"):
        subsets.random(200, 0.1, 0)


def test_single_top_and_groups():
    assert [row.tolist() for row in subsets.single(4, [2, 0])] == [[1, 1, 0, 1], [0, 1, 1, 1]]
    values = torch.tensor([0.5, -2.0, -1.0, 3.0])
    assert [row.tolist() for row in subsets.top(values, [1, 2])] == [[1, 0, 1, 1], [1, 0, 0, 1]]
    assert subsets.top(values, [2], helpful=False).tolist() == [[0, 1, 1, 0]]
    by_class = subsets.groups(torch.tensor([1, 0, 1, 7]))
    assert {k: w.tolist() for k, w in by_class.items()} == {0: [1, 0, 1, 1], 1: [0, 1, 0, 1], 7: [1, 1, 1, 0]}
    with pytest.raises(ValueError, match="each is at least 1 and less than n=4"):
        subsets.top(values, [4])
    with pytest.raises(ValueError, match="one group"):
        subsets.groups(torch.zeros(4))
    with pytest.raises(IndexError, match="example 4"):
        subsets.single(4, [4])


# --- two ways to remove


def test_removed_by_weight_or_by_row_agree_under_a_weighted_mean():
    """Exactly in mathematics, to rounding in float64; not under the fixed denominator."""
    without = {3, 17, 31}
    run, _ = small(normalize="weights")
    by_weight = magic.retrain(run, without, progress=False)
    by_row = magic.retrain(run, without, progress=False, how="rows")
    for name in by_row.params:
        torch.testing.assert_close(by_weight.params[name], by_row.params[name], rtol=1e-12, atol=1e-13)
    fixed, _ = small(normalize="batch")
    other = magic.retrain(fixed, without, progress=False)
    assert torch.equal(
        magic.retrain(fixed, without, progress=False, how="rows").params["0.weight"],
        by_row.params["0.weight"],
    )
    assert (other.params["0.weight"] - by_row.params["0.weight"]).abs().max() > 1e-4


def test_a_row_of_weight_0_still_moves_batch_norm():
    torch.manual_seed(0)
    model = cases.batch_norm_mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order(), normalize="weights")
    by_weight = magic.retrain(run, [3, 17], progress=False)
    by_row = magic.retrain(run, [3, 17], progress=False, how="rows")
    difference = (by_weight.params["0.weight"] - by_row.params["0.weight"]).abs().max()
    assert difference > 1e-3


def test_by_row_is_the_plain_loop_without_them():
    run, _ = small()
    torch.manual_seed(0)
    model = cases.mlp().double()
    optimizer, (x, y) = cases.sgd()(model), run.data
    with magic.determinism.fix():
        for indices in cases.order():
            kept = indices[(indices != 5) & (indices != 20)]
            optimizer.zero_grad()
            cases.loss(model, x[kept], y[kept]).mean().backward()
            optimizer.step()
    state = magic.retrain(run, [5, 20], progress=False, how="rows")
    for name, p in model.named_parameters():
        assert torch.equal(state.params[name], p.detach())


def test_a_batch_that_nothing_is_left_of():
    run, _ = small()
    first = cases.order()[0].tolist()
    with pytest.raises(ValueError, match=r'step 0: all examples of its batch are removed; use how="weight"'):
        magic.retrain(run, first, progress=False, how="rows")
    assert magic.retrain(run, first, progress=False).step == run.steps
    with pytest.raises(ValueError, match="how='tea': choose"):
        magic.retrain(run, [1], progress=False, how="tea")


# --- workers


def test_workers_give_the_same_bits():
    run, measure = small()
    weights = subsets.random(run.n, 0.1, 6)
    serial = magic.outputs(run, measure, weights, jobs=1, progress=False)
    assert serial.shape == (6, 3) and len(serial.unique(dim=0)) == 6
    assert torch.equal(serial[2], retraining.retrained(run, measure, weights[2]))
    parallel = magic.outputs(run, measure, weights, jobs=2, progress=False)
    assert torch.equal(serial, parallel)


def test_workers_take_the_thread_count():
    def threads(model):
        return torch.full((1,), float(torch.get_num_threads())) + 0 * next(model.parameters()).sum()

    run, _ = small()
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = magic.outputs(run, threads, subsets.single(run.n, [0, 1, 2]), jobs=2, progress=False)
            assert found.tolist() == [[count]] * 3
    finally:
        torch.set_num_threads(before)


def test_as_many_processes_as_joblib_is_told(monkeypatch):
    run, measure = small()
    weights, parallel, asked = subsets.single(run.n, range(4)), joblib.Parallel, []

    def recorded(n_jobs, **options):
        asked.append(n_jobs)
        return parallel(1, **options)

    monkeypatch.setattr(joblib, "Parallel", recorded)
    monkeypatch.setattr(many, "WORTH", 0.0)
    found = magic.outputs(run, measure, weights, progress=False)
    with joblib.parallel_config(n_jobs=3):
        assert torch.equal(magic.outputs(run, measure, weights, progress=False), found)
    assert asked == [-1, 3] and len(found.unique(dim=0)) == 4


def test_processes_do_not_share_a_gpu_unless_joblib_is_told(monkeypatch):
    class OnAGpu:
        device = torch.device("cuda")

    ways = []
    monkeypatch.setattr(many, "WORTH", 0.0)
    monkeypatch.setattr(many, "retrained", lambda *_: torch.zeros(1))
    monkeypatch.setattr(many, "_in_parallel", lambda *work: ways.append(work[-1]) or iter(()))
    todo = (OnAGpu(), None, torch.ones(3, 5), [0, 1, 2], "weight", None)
    assert [s for s, _ in many._trained(*todo)] == [0, 1, 2] and not ways
    with joblib.parallel_config(n_jobs=2):
        assert [s for s, _ in many._trained(*todo)] == [0] and ways == [None]


def test_other_backends_and_a_worker_that_fails(tmp_path, monkeypatch):
    run, measure = small()
    weights = subsets.single(run.n, range(8))
    with joblib.parallel_config(backend="threading"):
        threaded = magic.outputs(run, measure, weights, progress=False)
    assert len(threaded.unique(dim=0)) == 8
    assert torch.equal(threaded, magic.outputs(run, measure, weights, jobs=1, progress=False))

    kept = magic.Bank(tmp_path / "bank.sqlite", run, measure)

    calls, train = [], retraining.retrained

    def failing(*work):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("the cluster is gone")
        return train(*work)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the cluster is gone"):
        patch.setattr(many, "retrained", failing)
        magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    assert len(kept) == 4
    assert torch.equal(kept.get(weights[3]), threaded[3])
    again = magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    assert torch.equal(again, threaded) and len(kept) == 8


def test_a_cluster():
    """The same call, the same bits, on dask's workers."""
    distributed = pytest.importorskip("distributed")
    run, measure = small()
    weights = subsets.random(run.n, 0.1, 6)
    serial = magic.outputs(run, measure, weights, jobs=1, progress=False)
    assert len(serial.unique(dim=0)) == 6
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert torch.equal(magic.outputs(run, measure, weights, progress=False), serial)


def test_a_keyword_that_there_is_not():
    run, measure = small()
    with pytest.raises(TypeError, match=r"^outputs\(\) got an unexpected keyword argument 'job'"):
        magic.outputs(run, measure, subsets.single(run.n, [1]), job=2)
    scores = magic.Attribution(torch.eye(3, run.n), torch.zeros(3), torch.ones(run.n), run, measure)
    with pytest.raises(TypeError, match=r"^lds\(\) got an unexpected keyword argument 'job'"):
        magic.lds(scores, drop=0.1, subsets=3, job=2)
    with pytest.raises(TypeError, match=r"^leave_one_out\(\) got an unexpected keyword argument 'banks'"):
        magic.leave_one_out(scores, [1, 2, 3], banks=None)
    with pytest.raises(TypeError, match="positional"):
        magic.retrain(run, [1], False)


# --- the bank


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    run, measure = small()
    weights = subsets.random(run.n, 0.1, 4)
    path = tmp_path / "bank.sqlite"
    first = magic.outputs(run, measure, weights, bank=magic.Bank(path, run, measure), progress=False)
    assert len(first.unique(dim=0)) == 4
    again, measure = small()
    opened = magic.Bank(path, again, measure)
    assert len(opened) == 4
    monkeypatch.setattr(many, "retrained", None)
    assert torch.equal(magic.outputs(again, measure, weights, bank=opened, progress=False), first)
    known, outputs = opened.rows()
    assert torch.equal(known, weights) and torch.equal(outputs, first)
    frame = opened.frame()
    assert list(frame.columns) == ["bank", "training", "removed", "target", "output"]
    assert len(frame) == 12 and set(frame["removed"]) == {4}
    assert frame["output"].tolist() == first.flatten().tolist()
    assert bank.frame(path).equals(frame), "readable without the run"


@pytest.mark.parametrize("what", ["start", "data", "loss", "measure", "normalize", "how", "rate"])
def test_a_bank_of_another_run_is_not_mixed_in(tmp_path, what):
    run, measure = small()
    path, weights = tmp_path / "bank.sqlite", subsets.single(run.n, [1, 2, 3])
    magic.outputs(run, measure, weights, bank=magic.Bank(path, run, measure), progress=False)
    other, other_measure = small(seed=1 if what == "start" else 0)
    how = "weight"
    x, y = cases.data()
    model = cases.mlp().double()
    model.load_state_dict(run.model(run.initial).state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.123)
    if what == "data":
        other = magic.Run(model, cases.sgd()(model), (x + 1e-12, y), cases.loss, cases.order())
    elif what == "loss":
        other = magic.Run(model, cases.sgd()(model), (x, y), lambda *a: 2 * cases.loss(*a), cases.order())
    elif what == "measure":
        other_measure = cases.measure_on(x + 1e-9, y)
    elif what == "normalize":
        other, other_measure = small(normalize="weights")
    elif what == "how":
        how = "rows"
    elif what == "rate":
        other = magic.Run(model, optimizer, (x, y), cases.loss, cases.order())
    foreign = magic.Bank(path, other, other_measure, how=how)
    assert len(foreign) == 0 and foreign.get(weights[0]) is None
    assert len(magic.Bank(path, run, measure)) == 3


def test_a_file_that_is_no_bank(tmp_path):
    run, measure = small()
    (tmp_path / "text").write_text("this is not a database, however long one looks at it" * 30)
    with pytest.raises(ValueError, match="text is not a bank"):
        magic.Bank(tmp_path / "text", run, measure)
    with pytest.raises(OSError, match="cannot be used as a bank"):
        magic.Bank(tmp_path / "no" / "folder" / "bank.sqlite", run, measure)
    with pytest.raises(TypeError, match=r"give a magic.Bank\(path, run, measure\)"):
        magic.outputs(run, measure, run.weights()[None], bank=tmp_path / "bank.sqlite")


def test_a_locked_file(tmp_path, monkeypatch):
    run, measure = small()
    kept = magic.Bank(tmp_path / "bank.sqlite", run, measure)
    monkeypatch.setattr(rows, "PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / "bank.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TimeoutError, match=r"locked by another program for more than 0.1 s"):
        kept.put(torch.ones(run.n), torch.ones(3))
    other.rollback()
    kept.put(torch.ones(run.n), torch.ones(3))
    assert len(kept) == 1
    with pytest.raises(ValueError, match=r"this bank's are \(3,\) and \(40,\)"):
        kept.put(torch.ones(run.n), torch.ones(2))


def test_adopt_what_another_machine_computed(tmp_path):
    """Another machine's bits differ, its outputs hardly; those of another run differ much."""
    run, measure = small()
    path, weights = tmp_path / "bank.sqlite", subsets.random(run.n, 0.1, 5)
    theirs = magic.Bank(path, run, measure)
    true = magic.outputs(run, measure, weights, bank=theirs, progress=False)
    mine = magic.Bank(path, _nudged(), measure)
    assert len(mine) == 0
    assert mine.adopt(tolerance=1e-3) == 5 and len(mine) == 5
    assert torch.equal(mine.get(weights[4]), true[4])
    stranger, measure = small(seed=1)
    with pytest.raises(ValueError, match="It is of another run"):
        magic.Bank(path, stranger, measure).adopt()


def _nudged():
    """`small()` with data that differs in the last bits."""
    torch.manual_seed(0)
    model = cases.mlp().double()
    x, y = cases.data()
    return magic.Run(model, cases.sgd()(model), (x + 1e-12, y), cases.loss, cases.order())


# --- what a bank never serves


def banked(tmp_path, rows=3):
    run, measure = small()
    weights = subsets.single(run.n, range(rows))
    kept = magic.Bank(tmp_path / "bank.sqlite", run, measure)
    magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    return run, measure, weights, kept


def other_bits(path, column, change, row=2):
    with sqlite3.connect(path) as file:
        (old,) = file.execute(f"SELECT {column} FROM outputs WHERE rowid = ?", (row,)).fetchone()
        file.execute(f"UPDATE outputs SET {column} = ? WHERE rowid = ?", (change(old), row))


def flip(blob):
    return blob[:5] + bytes([blob[5] ^ 1]) + blob[6:]


@pytest.mark.parametrize(
    "column, change",
    [
        ("outputs", flip),
        ("outputs", lambda blob: blob[:8]),
        ("weights", flip),
        ("made", lambda made: "{}"),
        ("made", lambda made: ""),
        ("outputs", lambda blob: torch.full((3,), float("nan"), dtype=torch.float64).numpy().tobytes()),
    ],
)
def test_a_damaged_row(tmp_path, column, change):
    run, measure, weights, kept = banked(tmp_path)
    other_bits(kept.path, column, change)
    with pytest.raises(ValueError, match=r"row 2 is damaged: .*bank\.repair\(\)"):
        magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    with pytest.raises(ValueError, match="row 2 is damaged"):
        kept.frame()
    with pytest.raises(ValueError, match="row 2 is damaged"):
        bank.frame(kept.path)
    assert kept.repair() == 1 and len(kept) == 2
    again = magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    assert torch.equal(again[1], retraining.retrained(run, measure, weights[1])) and len(kept) == 3


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    _, _, weights, kept = banked(tmp_path)
    with pytest.raises(ValueError, match="outputs are not finite: nan"):
        kept.put(2 * weights[0], torch.tensor([1.0, float("nan"), 2.0]))


def test_one_wild_row_does_not_make_others_pass(tmp_path):
    """The rows of another run, one of them 1e12, were adopted: beside it, nothing differs."""
    _, measure, weights, kept = banked(tmp_path, rows=8)
    kept.put(2 * weights[0], torch.full((3,), 1e12, dtype=torch.float64))
    stranger, measure = small(seed=1)
    drawn = []

    def train(*work):
        drawn.append(work[2])
        return retraining.retrained(*work)

    with pytest.raises(ValueError, match="It is of another run"):
        magic.Bank(kept.path, stranger, measure).adopt(train=train)
    assert 1 <= len(drawn) <= 2


def test_adopt_refuses_what_is_not_finite(tmp_path):
    _, measure, _, kept = banked(tmp_path)
    other_bits(kept.path, "made", lambda made: "{}")
    other_bits(kept.path, "outputs", lambda blob: torch.full((3,), torch.inf).double().numpy().tobytes())
    with pytest.raises(ValueError, match="row 2 is damaged: its numbers are not finite"):
        magic.Bank(kept.path, _nudged(), measure).adopt(tolerance=1e-3)


def test_weights_that_differ_below_float32(tmp_path):
    run, _, _, kept = banked(tmp_path)
    here = torch.ones(run.n, dtype=torch.float64)
    there = here.clone()
    there[0] += 1e-12
    kept.put(here, torch.zeros(3))
    assert kept.get(there) is None and kept.get(here.float()) is not None
    kept.put(there, torch.ones(3))
    assert kept.get(here).tolist() == [0.0] * 3 and kept.get(there).tolist() == [1.0] * 3
    assert torch.equal(kept.rows()[0][-1], there) and len(kept.frame()) == 15


def test_an_edited_measure_and_what_others_there_are(tmp_path):
    """The edit shows neither at the start nor in the first step."""
    run, _, weights, kept = banked(tmp_path)
    x, y = run.data

    def edited(model):
        return cases.loss(model, x[:3], y[:3]).clamp(max=1e6)

    other = magic.Bank(kept.path, run, edited)
    assert len(other) == 0 and other.get(weights[0]) is None
    assert "3 rows since 20" in repr(other) and "the code of the measure" in repr(other)
    with pytest.raises(ValueError, match=r"of another run or measure: .*the code of the measure"):
        magic.outputs(run, edited, weights, bank=kept, jobs=1, progress=False)


@pytest.mark.parametrize("when", ["before", "during"])
def test_labels_changed_in_place(tmp_path, monkeypatch, when):
    run, measure, weights, kept = banked(tmp_path)
    train = many.retrained

    def spoil(*work):
        run.data[1][-1] = (run.data[1][-1] + 1) % 3
        return train(*work)

    if when == "before":
        run.data[1][-1] = (run.data[1][-1] + 1) % 3
    else:
        monkeypatch.setattr(many, "retrained", spoil)
    with pytest.raises(ValueError, match="the data"):
        magic.outputs(run, measure, 2 * weights[:1], bank=kept, jobs=1, progress=False)
    assert len(kept) == 3


def test_a_bank_of_what_cannot_be_known(tmp_path):
    run, measure = small()

    def opaque(model):
        return measure(model) * eval("1.0")

    with pytest.raises(ValueError, match=r"cannot see: .*cannot be known.*trust="):
        magic.Bank(tmp_path / "bank.sqlite", run, opaque)
    kept = magic.Bank(tmp_path / "bank.sqlite", run, opaque, trust=True)
    weights = subsets.single(run.n, [1])
    magic.outputs(run, opaque, weights, bank=kept, jobs=1, progress=False)
    assert len(magic.Bank(tmp_path / "bank.sqlite", run, opaque, trust=True)) == 1
    magic.outputs(run, opaque, weights, jobs=1, progress=False)


def test_the_run_is_unpacked_once_in_a_worker():
    run, measure = small()
    packed = workers._packed(run, measure)
    first = workers._unpacked(packed, "a")
    assert workers._unpacked(packed, "a") is first and first[0] is not run
    assert workers._unpacked(packed, "b") is not first and len(workers.UNPACKED) == 1
    workers.UNPACKED.clear()


@pytest.mark.parametrize("package", ["joblib", "pandas"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package):
    run, measure, weights, kept = banked(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'magic-attribution\[notebooks\]'"):
        if package == "pandas":
            kept.frame()
        else:
            magic.outputs(run, measure, weights, jobs=2, progress=False)


def sweep_into(path):
    """Sixty retrainings, into the bank."""
    run, measure = small()
    kept = magic.Bank(path, run, measure)
    magic.outputs(run, measure, subsets.random(run.n, 0.1, 60), bank=kept, jobs=1, progress=False)


def test_killed_at_random_moments(tmp_path):
    """kill -9 six times in a sweep of 60: it ends with the same frame; then two at once."""
    run, measure = small()
    weights = subsets.random(run.n, 0.1, 60)
    whole = magic.Bank(tmp_path / "whole.sqlite", run, measure)
    expected = magic.outputs(run, measure, weights, bank=whole, jobs=1, progress=False)
    assert len(expected.unique(dim=0)) == 60
    path = tmp_path / "killed.sqlite"
    kept = magic.Bank(path, run, measure)

    dice, sizes = torch.Generator().manual_seed(0), []
    for _ in range(6):
        process, before = processes.start(sweep_into, path), len(kept)
        goal = before + int(torch.randint(1, 9, (1,), generator=dice))
        while len(kept) < goal and process.is_alive():
            time.sleep(0.002 + 0.01 * torch.rand(1, generator=dice).item())
        process.kill()
        process.join()
        sizes.append(len(kept))
    assert sizes == sorted(sizes) and sizes[0] > 0 and sizes[-1] < 60, sizes
    both = [processes.start(sweep_into, path) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(kept) == 60
    again = magic.outputs(run, measure, weights, bank=kept, jobs=1, progress=False)
    assert torch.equal(again, expected)
    known, outputs = (x[x.new_tensor(_order(kept, weights)).long()] for x in kept.rows())
    assert torch.equal(known, weights) and torch.equal(outputs, expected)
    assert os.path.getsize(path) > 0


def _order(kept, weights):
    """Where each row of `weights` is in the bank."""
    known, _ = kept.rows()
    return [int((known == row).all(1).nonzero()[0]) for row in weights]
