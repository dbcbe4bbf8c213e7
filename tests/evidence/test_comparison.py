"""Predicted against true: what each figure says, and what is refused because it would say nothing."""

import numpy as np
import pytest
import torch

import magic
from magic import subsets
from magic.evidence import comparison
from magic.evidence import outputs as many
from tests.support import cases


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    dice = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (30, 3), generator=dice).numpy(), torch.randn(30, 3, generator=dice).numpy()
    ours = comparison.spearman(a, b)
    for k in range(3):
        assert ours[k] == pytest.approx(spearmanr(a[:, k], b[:, k]).statistic, abs=1e-12)


def test_r2_is_scikit_learns():
    from sklearn.metrics import r2_score

    true, predicted = noise(30, 4).numpy(), noise(30, 4, seed=1).numpy()
    expected = r2_score(true, predicted, multioutput="raw_values")
    np.testing.assert_allclose(comparison.r2(predicted, true), expected, rtol=1e-5)


def test_perfect_random_and_reversed():
    true = noise(60, 8)
    perfect = comparison.Comparison(true**3, true, true[0])
    assert perfect.mean == pytest.approx(1) and perfect.interval == pytest.approx((1.0, 1.0))
    wrong = comparison.Comparison(noise(60, 8, seed=1), true, true[0])
    assert abs(wrong.mean) < 0.2 and wrong.interval[0] < 0 < wrong.interval[1]
    assert comparison.Comparison(-true, true, true[0]).mean == pytest.approx(-1)


def test_ranks_well_and_is_wrong_in_size():
    """Half the size: LDS and Pearson see nothing, slope and R² do."""
    true, baseline = noise(200, 5), torch.zeros(5)
    half = comparison.Comparison(0.5 * true, true, baseline)
    assert half.mean == pytest.approx(1) and half.pearson[0] == pytest.approx(1)
    assert half.slope == pytest.approx((2, 2, 2)) and half.r2[0] == pytest.approx(0.75, abs=0.02)
    shifted = comparison.Comparison(true + 3, true, baseline)
    assert shifted.mean == pytest.approx(1) and shifted.slope[0] == pytest.approx(1) and shifted.r2[0] < -5


def test_the_interval_covers():
    """Of 40 draws of 60 subsets and 20 targets, about 95 % of the intervals hold the true correlation."""
    covered = 0
    for seed in range(40):
        truth = noise(60, 20, seed=seed)
        seen = truth + noise(60, 20, seed=1000 + seed)
        low, high = comparison.Comparison(seen, truth, torch.zeros(20)).pearson[1:]
        covered += low < 0.5**0.5 < high
    assert 34 <= covered <= 40


def test_shown(capsys):
    result = comparison.Comparison(
        noise(10, 2), noise(10, 2, seed=1), torch.zeros(2), "trainings without 5 % of the data"
    )
    text = repr(result)
    assert text.startswith("Predicted against true: 10 trainings without 5 % of the data, 2 targets")
    assert all(word in text for word in ("Spearman (LDS)", "Pearson", "R²", "slope")) and text.count("[") == 4
    assert "<table>" in result._repr_html_()
    frame = result.frame()
    assert list(frame.columns) == ["retraining", "target", "predicted", "true"] and len(frame) == 20
    assert frame["true"].tolist() == result.true.flatten().double().tolist()


def test_degenerate():
    true = noise(5, 2)
    with pytest.raises(ValueError, match="true output of target 1 is the same"):
        comparison.Comparison(true, torch.stack([true[:, 0], torch.ones(5)], 1), true[0])
    with pytest.raises(ValueError, match="predicted output of target 0 is the same"):
        comparison.Comparison(torch.zeros(5, 2), true, true[0])
    with pytest.raises(ValueError, match="2 retrainings: a rank correlation needs at least 3"):
        comparison.Comparison(true[:2], true[:2], true[0])
    with pytest.raises(ValueError, match=r"both are \(S, K\)"):
        comparison.Comparison(true, true[:, :1], true[0])


@pytest.fixture(scope="module")
def scores():
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order())
    return magic.attribute(run, cases.measure_on(*run.data), progress=False)


def test_lds_leave_one_out_and_top(scores):
    result = magic.lds(scores, drop=0.05, subsets=12, progress=False)
    assert (
        "12 trainings without 5 % of the data" in repr(result)
        and result.drop == 0.05
        and result.predicted.shape == (12, 3)
        and result.mean > 0.9
    )
    single = magic.leave_one_out(scores, examples=30, progress=False)
    assert single.true.shape == (30, 3) and single.mean > 0.97 and abs(single.slope[0] - 1) < 0.05
    assert "30 trainings without one example" in repr(single)
    some = magic.leave_one_out(scores, examples=[3, 5, 9], progress=False)
    expected = scores.measure(scores.run.model(magic.retrain(scores.run, [5], progress=False)))
    assert torch.equal(some.true[1], expected)
    assert torch.equal(some.predicted[1], scores.outputs + scores.removal_effect([5]))
    top = magic.compare(scores, subsets.top(scores.values[0], [1, 2, 4]), progress=False)
    rise = (top.true - top.baseline)[:, 0]
    assert rise[0] > 0 and rise[2] > rise[1] > rise[0], "without the most helpful the loss rises"
    with pytest.raises(ValueError, match="examples=2: between 3 and n=40"):
        magic.leave_one_out(scores, examples=2)


def test_a_bank_serves_every_method(scores, tmp_path, monkeypatch):
    """The retrainings are made once; other scores of the same outputs are judged by them."""
    bank = magic.Bank(tmp_path / "bank.sqlite", scores.run, scores.measure)
    exact = magic.lds(scores, drop=0.05, subsets=12, bank=bank, progress=False)
    assert len(bank) == 13
    monkeypatch.setattr(many, "retrained", None)
    own = scores.like(scores.values + noise(3, 40).double() * scores.values.std())
    mine = magic.lds(own, drop=0.05, subsets=12, bank=bank, progress=False)
    assert torch.equal(mine.true, exact.true) and mine.mean < exact.mean
    assert own.run is scores.run and own.plan is None and own.health is None
    with pytest.raises(ValueError, match="values must be"):
        scores.like(torch.zeros(40, 3))


def test_a_bank_for_another_measure(scores, tmp_path):
    other = cases.measure_on(*scores.run.data, targets=2)
    bank = magic.Bank(tmp_path / "bank.sqlite", scores.run, other)
    with pytest.raises(ValueError, match="the bank is of another run or measure"):
        magic.lds(scores, drop=0.05, subsets=5, bank=bank, progress=False)


def test_subsets_are_not_the_order_of_the_batches():
    """randperm with the same seed is the same order: a set would be the first examples of an epoch."""
    n, size = 1200, 60
    for seed in range(3):
        epochs = magic.batches(n, n, 8, seed)
        for row, epoch in zip(subsets.random(n, size / n, 8, seed), epochs, strict=True):
            first = (row[epoch[:size]] == 0).sum().item()
            assert first < 15, (
                f"{first} of {size} removed examples are the first of the epoch; 3 are expected"
            )
