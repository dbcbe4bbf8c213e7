"""A batch shared between two processes: one run, the scores of one process, and what cannot be shared."""

import pickle
from pathlib import Path

import pytest
import torch

import magic
from magic.engine import listeners
from tests.support import cases, processes

NAMES = (
    "sgd-nesterov-decay",
    "adamw-onecycle",
    "dropout",
    "clip-partly",
    "frozen-and-unused",
    "groupnorm-conv",
)


def work(rank: int, folder: Path) -> None:
    """What each of the two processes does; rank 0 writes down what it found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found, refused = {}, {}
    for name in NAMES:
        run, *_ = cases.build(name)
        measure, shared = cases.measure_on(*run.data), magic.distributed(run)
        final = shared.train(progress=False)
        scores = magic.attribute(shared, measure, progress=False)
        few = magic.attribute(shared, measure, plan=magic.plan(shared, states=2), progress=False)
        found[name] = (
            final.params,
            scores.values,
            torch.equal(scores.values, few.values),
            shared.fingerprint(),
        )
        listeners.check_step = lambda *args: 0.0  # it has looked at one run, and is no matter of the others
    run, *_ = cases.build("adamw")
    shared, measure = magic.distributed(run), cases.measure_on(*run.data)
    asked = magic.metagradient(shared, measure, ("hypers", "data", "start"), progress=False)
    found["asked"] = asked.hypers, asked.data[0], asked.start.params
    scores = magic.attribute(shared, measure, progress=False)
    found["lds"] = magic.lds(scores, drop=0.2, subsets=5, progress=False).true
    found["verified"] = magic.verify(scores, progress=False).ok
    tries = {
        "BatchNorm": lambda: magic.distributed(cases.build("batchnorm-sgd")[0]),
        "parts": lambda: magic.distributed(cases.build("accumulate")[0]),
        "other seeds": lambda: magic.distributed(cases.build("sgd", seed=rank)[0]),
        "folder": lambda: magic.attribute(shared, measure, disk=folder / "work", progress=False),
        "jobs": lambda: magic.attribute(shared, measure, jobs=2, progress=False),
        "together": lambda: magic.lds(scores, subsets=5, drop=0.2, together=2, progress=False),
    }
    for what, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            refused[what] = str(error)
    (folder / f"rank{rank}").write_bytes(pickle.dumps((found, refused)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [processes.start(work, rank, folder) for rank in (0, 1)]
    for process in started:
        process.join(timeout=300)
    assert [process.exitcode for process in started] == [0, 0]
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process_with_two_parts(ranks, name):
    (found, _), (others, _) = ranks
    params, values, same, fingerprint = found[name]
    assert torch.equal(values, others[name][1]), "both ranks have the same scores, to the bit"
    assert same, "the schedule does not change the answer"
    run, *_ = cases.build(name, accumulate=2)
    alone = magic.attribute(run, cases.measure_on(*run.data), progress=False).values
    assert alone.norm() > 0 and (values - alone).norm() <= 1e-12 * alone.norm()
    final = run.train(progress=False)
    for key, p in final.params.items():
        assert (params[key] - p).norm() <= 1e-12 * p.norm()
    assert fingerprint != run.fingerprint(), "the number of ranks is part of what the run is"


def test_two_ranks_are_one_process_with_whole_batches(ranks):
    name = "adamw-onecycle"
    run, *_ = cases.build(name)
    alone = magic.attribute(run, cases.measure_on(*run.data), progress=False).values
    assert (ranks[0][0][name][1] - alone).norm() <= 1e-11 * alone.norm()


def test_what_else_is_asked_for_and_judged(ranks):
    found, _ = ranks[0]
    run, *_ = cases.build("adamw", accumulate=2)
    measure = cases.measure_on(*run.data)
    alone = magic.metagradient(run, measure, ("hypers", "data", "start"), progress=False)
    hypers, data, start = found["asked"]
    for mine, theirs in (
        (hypers, alone.hypers),
        (start, alone.start.params),
        ({"x": data}, {"x": alone.data[0]}),
    ):
        for key, x in theirs.items():
            assert (mine[key] - x).norm() <= 1e-11 * x.norm(), key
    truth = magic.lds(alone.scores, drop=0.2, subsets=5, progress=False).true
    torch.testing.assert_close(found["lds"], truth, rtol=1e-10, atol=1e-12)
    assert found["verified"]


def test_what_ranks_cannot_share(ranks):
    words = {
        "BatchNorm": "training writes the buffer '1.num_batches_tracked'", "parts": "accumulate=5 parts",
        "other seeds": "the ranks have different runs", "folder": "a folder is of one process",
        "jobs": "leave it out", "together": "leave together= out",
    }  # fmt: skip
    for _, refused in ranks:
        for what, said in words.items():
            assert said in refused[what]


def test_without_processes_it_says_how():
    with pytest.raises(RuntimeError, match="torchrun"):
        magic.distributed(cases.build("sgd")[0])
