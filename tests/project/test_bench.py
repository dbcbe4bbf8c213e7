"""The benchmark runs and prints what it says; what it times is not tested."""

import pytest
import torch

import magic
from magic.book import data, models
from tests import bench


def tiny() -> bench.Work:
    """A tiny network on digits."""
    x, y, x_test, y_test = data.digits(train=60, test=20)
    model, order = models.MLP((64, 8, 10)), magic.batches(len(x), 20, 3)
    return bench.Work("mlp", model, bench.adamw, (x, y), (x_test, y_test), bench.classify, order)


def test_the_table(monkeypatch, capsys):
    monkeypatch.setitem(bench.WORKS, "mlp", tiny)
    found = bench.table("mlp", [1, 3], rounds=1, memory="1GB", with_peers=True)
    assert found.keys() >= {"run.train() K=0", "magic.attribute K=1", "magic.attribute K=3"}
    assert found["full unroll, autograd K=1"] > 0 and min(found.values()) > 0
    said = capsys.readouterr().out
    for part in (
        "A tiny network on digits",
        "a plain loop takes",
        "per target",
        "fingerprints:",
        "K = 3: replay",
    ):
        assert part in said


def test_ratios_are_kept_with_what_they_were_measured_on(tmp_path, capsys):
    path = tmp_path / "bench.json"
    with pytest.raises(SystemExit, match="--keep makes it"):
        bench.compare({}, path)
    made = bench.provenance(threads=1, rounds=5)
    assert made["PyTorch"] == torch.__version__ and made["processor"] and made["cores"]
    bench.keep({"mlp": {"run.train() K=0": 2.0}}, made, path)
    bench.keep({"mlp": {"run.train() K=0": 1.5, "magic.attribute K=1": 4.0}}, made, path)
    bench.keep({"conv": {"run.train() K=0": 1.1}}, made, path)
    bench.compare({"mlp": {"run.train() K=0": 1.2, "magic.attribute K=16": 9.0}, "transformer": {}}, path)
    said = capsys.readouterr().out
    assert "rounds 5" in said and "K=16" not in said and "transformer: nothing is noted yet" in said
    assert ["1.50", "1.20", "0.80"] in [line.split()[-3:] for line in said.splitlines()]


def test_the_works_are_what_they_say():
    for name, steps, batch in (("mlp", 200, 128), ("transformer", 50, 32)):
        work = bench.build(name)
        assert work.order.shape == (steps, batch)
        assert work.measure(4)(work.model).shape == (4,)


def test_the_plain_loop_is_the_run_that_is_differentiated():
    torch.manual_seed(0)
    work = tiny()
    trained = bench.plain(work)
    final = work.run().train(progress=False)
    for name, p in trained.named_parameters():
        assert torch.equal(p, final.params[name])
