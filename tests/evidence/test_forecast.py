"""The forecast of the LDS: its numbers by their formulas, what it says of smooth runs and of kinks."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import subsets
from magic.book import data
from magic.evidence import forecast
from tests.support import cases

pytestmark = pytest.mark.usefixtures("unwitnessed")


def attributed(name="sgd-momentum", **options):
    run, *_ = cases.build(name)
    return magic.attribute(run, cases.measure_on(*run.data), progress=False, **options)


def centred(values):
    return values - values.mean(-1, keepdim=True)


def test_the_numbers_are_those_of_the_formulas():
    scores = attributed()
    found = magic.forecast(scores, drop=0.2, sets=3, jitters=4, seed=5, progress=False)
    run, measure = scores.run, scores.measure
    there = [
        magic.attribute(run, measure, at=w, progress=False).values
        for w in subsets.random(run.n, 0.2, 3, seed=5)
    ]
    cosines = [torch.cosine_similarity(centred(x), centred(scores.values)) for x in there]
    torch.testing.assert_close(found.agreement, torch.stack(cosines), rtol=1e-9, atol=1e-12)
    # ‖E∇f‖² as the mean of the products of different sets
    own, others = centred(scores.values), [centred(x) for x in there]
    pairs = [(others[i] * others[j]).sum(1) for i, j in ((0, 1), (0, 2), (1, 2))]
    size, along = torch.stack(pairs).mean(0), (own * sum(others) / 3).sum(1)
    at_most = along / own.norm(dim=1) / size.sqrt()
    assert ((at_most > 0.5) & (at_most < 1)).any(), "degenerate: every bound is 1"
    torch.testing.assert_close(found.at_most, at_most.clamp(max=1), rtol=1e-9, atol=1e-12)
    near = 1 + 0.01 * torch.randn(4, run.n, generator=torch.Generator().manual_seed(5))
    true = magic.outputs(run, measure, near, progress=False) - scores.outputs
    told = (near.double() - 1) @ scores.values.T
    jagged = ((true - told) ** 2).sum(0) / (told**2).sum(0)
    assert jagged.min() > 1e-9, "degenerate: outputs are linear in the weights"
    torch.testing.assert_close(found.jaggedness, jagged, rtol=1e-5, atol=1e-9)


def digits(activation, rate):
    x, y, x_test, y_test = data.digits(train=300, test=100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), activation(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss(model, x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    run = magic.Run(model, optimizer, (x.double(), y), loss, magic.batches(300, 50, 8))

    def measure(model):
        return loss(model, x_test[:6].double(), y_test[:6])

    return magic.attribute(run, measure, progress=False)


def test_what_it_expects_comes_true():
    expected, true = [], []
    for rate in (0.1, 1.0):
        scores = digits(nn.Tanh, rate)
        found = magic.forecast(scores, drop=0.1, progress=False)
        expected.append(found.expected)
        true.append(magic.lds(scores, drop=0.1, subsets=40, together=40, progress=False).mean)
        assert found.jaggedness.max() < 0.05
    for figure, lds in zip(expected, true, strict=True):
        assert figure.low <= lds <= figure.high
    assert expected[0].low > expected[1].high and true[0] > 0.97


def test_kinks_are_seen_by_the_jitter_and_not_by_the_agreement():
    smooth, kinked = (
        magic.forecast(digits(unit, 0.2), drop=0.05, jitters=6, progress=False) for unit in (nn.GELU, nn.ReLU)
    )
    assert kinked.agreement.mean() > 0.95
    assert kinked.jaggedness.median() > 100 * smooth.jaggedness.median()
    assert kinked.expected.mean < smooth.expected.mean


def test_what_is_expected_is_kept_with_the_scores(tmp_path):
    scores = attributed()
    assert scores.health.expected is None
    found = magic.forecast(scores, drop=0.1, sets=1, jitters=0, progress=False)
    assert scores.health.expected == (0.1, *found.expected) and not found.jaggedness.any()
    assert f"{found.expected.mean:.2f}" in repr(scores.health) and "LDS to be expected" in repr(found)
    scores.save(tmp_path / "scores.npz")
    assert magic.Attribution.load(tmp_path / "scores.npz").health == scores.health
    older = {name: value for name, value in scores.health.note().items() if name != "expected"}
    assert magic.Health.of(older).expected is None


def test_little_expected_is_a_problem():
    health = attributed().health
    poor, good = (
        dataclasses.replace(health, expected=type(health).of({**health.note(), "expected": told}).expected)
        for told in ((0.05, 0.4, 0.1, 0.6), (0.05, 0.9, 0.8, 0.95))
    )
    assert health.ok and good.ok and poor.ok is False
    assert "an LDS of 0.40 [0.10, 0.60] over removals of 0.05" in poor.problems[0]


def test_less_agreement_or_more_jaggedness_promise_less():
    def told(agreement, jaggedness):
        return forecast.Forecast(
            0.05, torch.full((3, 2), agreement), torch.ones(2), torch.full((2,), jaggedness)
        ).expected

    means = [told(a, 0.0).mean for a in (-0.2, 0.1, 0.5, 0.9, 0.99, 1.0)]
    assert means == sorted(means) and means[-1] < 1 and means[0] < 0.2
    assert told(0.9, 20.0).mean < told(0.9, 1.0).mean < told(0.9, 0.0).mean
    assert told(0.9, 0.0).low < told(0.9, 0.0).mean < told(0.9, 0.0).high


@pytest.mark.parametrize(
    "options, told",
    [({"sets": 0}, "at least one set"), ({"jitters": -1}, "no negative"), ({"drop": 1.5}, "drop=1.5")],
)
def test_bad_arguments(options, told):
    with pytest.raises(ValueError, match=told):
        magic.forecast(attributed(), progress=False, **options)


def test_scores_it_cannot_take():
    scores = attributed()
    with pytest.raises(ValueError, match="a forecast belongs to one point"):
        magic.forecast(dataclasses.replace(scores, tangent=False), progress=False)
    with pytest.raises(ValueError, match="know no run and measure"):
        magic.forecast(dataclasses.replace(scores, run=None), progress=False)
