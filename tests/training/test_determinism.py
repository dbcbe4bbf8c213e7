"""fix() sets, reports and restores; bits depend on the thread count, and a changed one is caught."""

import os
import random

import numpy as np
import pytest
import torch

import magic
from magic.training.determinism import fix, seed_step
from tests.support import cases


def everything():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def test_fix_sets_reports_and_restores():
    before = everything()
    with fix(seed=3) as settings:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        first = torch.rand(1), random.random(), np.random.rand()
    assert everything() == before
    with fix(seed=3):
        assert (torch.rand(1), random.random(), np.random.rand()) == first
    report = repr(settings)
    for word in ("deterministic_algorithms", "CUBLAS_WORKSPACE_CONFIG", "fp32_precision", "threads", "seed"):
        assert word in report


def test_fix_restores_after_an_error():
    before = everything()
    with pytest.raises(ZeroDivisionError), fix():
        torch.rand(3)
        _ = 1 / 0
    assert everything() == before


def test_fix_is_all_or_nothing(monkeypatch):
    before = everything()
    monkeypatch.setattr(magic.determinism, "_attribute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fix()
    assert everything() == before


def test_either_way_of_asking_for_tf32_is_overridden_and_restored():
    matmul = torch.backends.cuda.matmul
    legacy = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        with fix():
            assert matmul.fp32_precision == "ieee"
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = legacy


def test_cublas_without_its_workspace_says_what_to_do():
    says = "import magic before the first matrix product"
    with pytest.raises(magic.NotDeterministic, match=says), magic.determinism.refusing_nondeterminism():
        raise RuntimeError("Deterministic behavior was enabled ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")


def test_settings_can_be_restored_by_hand():
    before = everything()
    settings = fix()
    assert everything() != before
    settings.restore()
    settings.restore()  # twice is once
    assert everything() == before


def test_step_seeds_do_not_collide():
    draws = set()
    for seed in range(20):
        for t in range(50):
            seed_step(seed, t)
            draws.add(tuple(torch.rand(2).tolist()))
    assert len(draws) == 1000


def test_a_changed_thread_count_is_not_mixed_in():
    """If other threads give other bits, replay says so instead of differentiating another run."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 300), torch.randint(10, (512,))
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.GELU(), torch.nn.Linear(300, 10))
    run = magic.Run(model, cases.sgd()(model), (x, y), cases.loss, magic.batches(512, 256, 3))
    one = run.train(progress=False).fingerprint()
    torch.set_num_threads(2)
    other = magic.Run(model, cases.sgd()(model), (x, y), cases.loss, magic.batches(512, 256, 3))
    if other.train(progress=False).fingerprint() == one:
        pytest.skip("on this machine one and two threads give the same bits")
    with pytest.raises(magic.ReplayMismatch, match="thread count"):
        magic.attribute(run, cases.measure_on(x, y), progress=False)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="plain"), magic.determinism.refusing_nondeterminism():
        raise RuntimeError("plain")
