"""The optimality gap: on outputs whose best linear predictor is known, and what is refused."""

import numpy as np
import pytest
import torch

import magic
from magic import subsets
from magic.evidence.comparison import Comparison
from magic.evidence.optimality import ridge

N, S, K, DROP = 300, 200, 8, 0.1


def made_up(seed: int, missing: float, bent: float):
    """A comparison with its true gap. The prediction lacks a part of the slope, `missing` times as large;
    the outputs have a quadratic part of `bent` times their spread."""
    g = torch.Generator().manual_seed(seed)
    weights = subsets.random(N, DROP, S, seed).double()
    centred = weights - (1 - DROP)
    known, lacking = (torch.randn(N, K, generator=g).double() for _ in range(2))
    slope = known + missing * lacking
    u, v = (centred @ torch.randn(N, K, generator=g).double() for _ in range(2))
    quadratic = (u * v - (u * v).mean(0)) * bent * (centred @ known).std(0) / (u * v).std(0)
    true = centred @ slope + quadratic
    known, slope = (x - x.mean(0) for x in (known, slope))
    linear, rest = DROP * (1 - DROP) * slope.square().sum(0), quadratic.var(0)
    best = (linear / (linear + rest)).sqrt()
    reached = best * torch.cosine_similarity(known, slope, dim=0)
    predicted = centred @ known
    result = Comparison(predicted, true, torch.zeros(K).double(), weights=weights)
    return result, (best - reached).mean().item()


def test_it_finds_the_gap_that_is_there():
    """Unbiased over ten worlds, and its intervals hold the truth."""
    found, truth, inside = [], [], 0
    for seed in range(10):
        result, gap = made_up(seed, missing=0.25, bent=0.3)
        mean, low, high = magic.optimality(result).gap
        found.append(mean)
        truth.append(gap)
        inside += low <= gap <= high
    assert 0.02 < np.mean(truth) < 0.05
    assert abs(np.mean(found) - np.mean(truth)) < 0.003
    assert inside >= 9


def test_curvature_is_no_gap():
    """Where only the quadratic part is missing, nothing linear is: R² is far from 1 and the gap is 0."""
    result, gap = made_up(0, missing=0.0, bent=0.5)
    found = magic.optimality(result)
    assert gap < 1e-12 and found.correlation[0] < 0.93
    assert found.gap[1] <= 0 <= found.gap[2] and abs(found.gap[0]) < 0.01
    assert found.best_correlation.mean == pytest.approx(found.correlation.mean + found.gap.mean)
    with pytest.warns(DeprecationWarning, match=r"Optimality\.best is Optimality\.best_correlation now"):
        assert found.best == found.best_correlation
    assert "optimality gap" in repr(found)


def test_a_fit_gets_what_is_linear():
    result, _ = made_up(1, missing=0.5, bent=0.0)
    curve = ridge(result, [50, 100])
    assert list(curve["size"]) == [50, 100, S]
    assert curve["R2"].is_monotonic_increasing and curve["R2"].iloc[-1] > result.r2[0]
    nothing = ridge(result, [50], prior=False)
    assert nothing["LDS"].iloc[-1] < curve["LDS"].iloc[-1]


def test_refusals():
    result, _ = made_up(0, 0.1, 0.1)
    with pytest.raises(ValueError, match="does not know its weights"):
        magic.optimality(Comparison(result.predicted, result.true, result.baseline))
    mixed = torch.cat([subsets.random(N, 0.1, S // 2), subsets.random(N, 0.2, S // 2)])
    with pytest.raises(ValueError, match="of one size"):
        magic.optimality(Comparison(result.predicted, result.true, result.baseline, weights=mixed))
    few = Comparison(result.predicted[:5], result.true[:5], result.baseline, weights=result.weights[:5])
    with pytest.raises(ValueError, match="at least 10 retrainings"):
        magic.optimality(few)
    with pytest.raises(ValueError, match="3 is not between 10 and 200"):
        ridge(result, [3])
