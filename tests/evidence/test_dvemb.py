"""DVEmb: the recursion of its paper with dense matrices, and exact where its assumptions hold."""

import warnings

import pytest
import torch

import magic
from magic import baselines
from tests.evidence.test_baselines import first, gradients, regression
from tests.support import cases


@pytest.mark.parametrize("name", ["regression", "two-groups-onecycle"])
def test_the_recursion_of_the_paper(name):
    """Each example's embedding at each step, which is what the paper keeps, against every test gradient."""
    run = regression() if name == "regression" else cases.build(name)[0]
    states = [run.initial]
    for _ in range(run.steps):
        states.append(run.step(states[-1], run.weights()))
    count = sum(p.numel() for p in run.initial.params.values())
    after = torch.eye(count, dtype=torch.float64)  # the product of what the later steps do
    embedded = torch.zeros(run.n, count, dtype=torch.float64)
    for t in reversed(range(run.steps)):
        batch = run.batches[t]
        own = gradients(run, states[t], tuple(x[batch] for x in run.data))
        groups = run.hypers[t]
        rates = {k: groups[g]["lr"] / (1 - groups[g].get("momentum", 0)) for k, g in run.group_of.items()}
        eta = torch.cat([torch.full_like(p, rates[k]).flatten() for k, p in run.initial.params.items()])
        embedded.index_add_(0, batch, own * eta / len(batch) @ after.T)
        after = after @ (torch.eye(count, dtype=torch.float64) - eta[:, None] * (own.T @ own) / len(batch))
    expected = -gradients(run, states[-1], first(run)) @ embedded.T
    scores = baselines.dvemb(run, first(run), batch_size=4, progress=False)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(scores.values, expected, rtol=1e-8, atol=1e-12)


def test_it_becomes_exact_as_the_rate_goes_to_zero():
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd(1e-6)(model), cases.data(), cases.loss, cases.order())
    exact = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    scores = baselines.dvemb(run, first(run), progress=False)
    assert exact.values.abs().max() > 1e-9
    torch.testing.assert_close(scores.values, exact.values, rtol=1e-4, atol=1e-12)


def test_pace_is_a_factor_on_the_rates():
    run = regression()
    one, small = (baselines.dvemb(run, first(run), pace=p, progress=False).values for p in (1.0, 1e-6))
    assert not torch.allclose(one, small / 1e-6, rtol=0.01)
    double = baselines.dvemb(run, first(run), pace=2e-6, progress=False).values
    torch.testing.assert_close(double, 2 * small, rtol=1e-4, atol=1e-16)
    with pytest.raises(ValueError, match="pace=-1: a positive factor"):
        baselines.dvemb(run, first(run), pace=-1)


def test_a_pace_that_overshoots_is_told(digits):
    run, test, *_ = digits
    with pytest.warns(UserWarning, match=r"grown .* times: at pace=1 some step overshoots"):
        baselines.dvemb(run, test, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baselines.dvemb(run, test, pace=0.3, progress=False)
