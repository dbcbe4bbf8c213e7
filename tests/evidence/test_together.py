"""Many retrainings at once: those made one by one, up to rounding, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.evidence.together import trained_together
from tests.support import cases

REFUSED = {"adafactor-conv": "Adafactor", "muon-and-adamw": "Muon", "attention": "draws other random numbers"}


def some_weights(run, count=3):
    return 0.5 + torch.rand(count, run.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(cases.CASES.keys() - REFUSED.keys()))
def test_the_same_states_up_to_rounding(name):
    run, *_ = cases.build(name)
    weights = some_weights(run)
    for w, state in zip(weights, trained_together(run, weights), strict=True):
        alone = run.train(w, progress=False)
        assert state.params.keys() == alone.params.keys() and state.step == run.steps
        for mine, theirs in ((state.params, alone.params), (state.buffers, alone.buffers)):
            for key, x in theirs.items():
                torch.testing.assert_close(mine[key], x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_together_is_refused(name):
    run, *_ = cases.build(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        list(trained_together(run, some_weights(run)))


def test_a_loss_that_cannot_be_batched_is_refused():
    def with_a_branch(model, x, y):
        losses = cases.loss(model, x, y)
        return losses if losses.sum() > 0 else -losses

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), with_a_branch, cases.order())
    with pytest.raises(ValueError, match=r"together: torch.func.vmap cannot run this model or loss"):
        magic.outputs(run, cases.measure_on(*run.data), some_weights(run), together=3, progress=False)


def test_lds_and_its_bank(tmp_path):
    run, *_ = cases.build("adamw")
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    alone = magic.lds(scores, drop=0.2, subsets=7, progress=False)
    together = magic.lds(scores, drop=0.2, subsets=7, together=3, progress=False)
    torch.testing.assert_close(together.true, alone.true, rtol=1e-10, atol=1e-12)
    assert abs(together.mean - alone.mean) < 1e-9 and alone.true.std(0).min() > 0
    path = tmp_path / "bank.sqlite"
    one_by_one, at_once = (magic.Bank(path, run, measure, how=how) for how in ("weight", "together"))
    magic.lds(scores, drop=0.2, subsets=7, together=3, bank=at_once, progress=False)
    assert len(at_once) == 8 and len(one_by_one) == 0, "kept apart"
    again = magic.lds(scores, drop=0.2, subsets=7, together=5, bank=at_once, progress=False)
    assert torch.equal(again.true, together.true), "read from the bank"
    with pytest.raises(ValueError, match="this bank is of trainings made one by one"):
        magic.lds(scores, drop=0.2, subsets=7, together=3, bank=one_by_one, progress=False)
    with pytest.raises(ValueError, match="give together= as well"):
        magic.lds(scores, drop=0.2, subsets=7, bank=at_once, progress=False)


def test_arguments_that_contradict():
    run, *_ = cases.build("sgd")
    measure, weights = cases.measure_on(*run.data), torch.ones(2, 40)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="how many models"):
            magic.outputs(run, measure, weights, together=wrong, progress=False)
    for options in ({"jobs": 2}, {"how": "rows"}):
        with pytest.raises(ValueError, match="leave out jobs="):
            magic.outputs(run, measure, weights, together=2, progress=False, **options)


def test_one_that_diverges_says_where():
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), 1e200)
    run = magic.Run(
        model,
        optimizer,
        cases.data(),
        lambda m, x, y: F.mse_loss(m(x)[:, 0], y.double(), reduction="none"),
        cases.order(),
    )
    with pytest.raises(magic.NonFinite, match="step"):
        list(trained_together(run, torch.ones(2, run.n)))
