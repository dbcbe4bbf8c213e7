"""Targets shared between processes: the same bits, a folder that survives, and what cannot be shared."""

import pytest
import torch

import magic
from tests.support import cases


@pytest.fixture
def made():
    run, *_ = cases.build("batchnorm-adamw")
    measure = cases.measure_on(*run.data, targets=5)
    return run, measure, magic.attribute(run, measure, progress=False)


def test_two_processes_have_the_bits_of_one(made, tmp_path, capsys):
    run, measure, alone = made
    shared = magic.attribute(run, measure, jobs=2, disk=tmp_path)
    assert "2 times: replay of 16 steps" in capsys.readouterr().out
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["targets 0 to 1", "targets 2 to 4"]
    for rows in (slice(0, 2), slice(2, 5)):  # one process that groups its targets in this way
        own = magic.attribute(run, lambda model, rows=rows: measure(model)[rows], progress=False)
        assert torch.equal(shared.values[rows], own.values)
    assert torch.equal(shared.outputs, alone.outputs)
    assert (shared.values - alone.values).norm() <= 1e-12 * alone.values.norm()
    assert shared.health.sizes[0][0] == alone.health.sizes[0][0] and len(shared.health.decades) == 5
    assert shared.health.witnessed.keys() == alone.health.witnessed.keys()
    assert magic.verify(shared, progress=False).ok
    again = magic.attribute(run, measure, jobs=2, disk=tmp_path, progress=False)
    assert torch.equal(again.values, shared.values), "read from the folders"


def test_a_mean_over_points_is_shared_too(made):
    run, measure, _ = made
    alone = magic.attribute(run, measure, "path", drop=0.2, progress=False)
    shared = magic.attribute(run, measure, "path", drop=0.2, jobs=2, progress=False)
    assert (shared.values - alone.values).norm() <= 1e-12 * alone.values.norm()
    assert torch.equal(shared.outputs, alone.outputs) and shared.point == alone.point


def test_what_cannot_be_shared(made):
    run, measure, _ = made
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="jobs="):
            magic.attribute(run, measure, jobs=wrong, progress=False)
    with pytest.raises(ValueError, match="each process plans for its part"):
        magic.attribute(run, measure, jobs=2, plan=magic.plan(run, 5), progress=False)
    one = magic.attribute(run, lambda model: measure(model)[:1], jobs=2, progress=False)
    assert len(one.values) == 1, "one target is for one process"
