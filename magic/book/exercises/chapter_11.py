"""Checkers of chapter 11: affine predictions, ridge regression, squared lengths, and best slopes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from .judging import Cases, exercise


def _dice(seed: int) -> Callable[..., Tensor]:
    """A function that draws normal numbers of a shape, in float64, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@exercise("11.1", "affine predictions from any weights")
def affine(answer) -> None:
    n, K, S, c = 6, 3, 4, 0.8
    draw = _dice(11)
    outputs, scores = draw(K), draw(K, n)
    cases = Cases({"the centre": c, "one minus the centre": 1 - c})
    everywhere = torch.full((n,), c, dtype=torch.float64)
    uneven = everywhere + 0.1 * draw(n)
    removed = torch.ones(S, n, dtype=torch.float64)
    removed[range(S), range(S)] = 0.0
    for case, centre, weights in (
        ("the centre itself, whose outputs are known", everywhere, everywhere[None]),
        ("the full data", everywhere, torch.ones(1, n, dtype=torch.float64)),
        ("sets with one example removed", everywhere, removed),
        ("a centre whose entries differ", uneven, removed),
    ):
        want = outputs + (weights - centre) @ scores.T
        got = cases.call(case, answer, outputs, scores, centre, weights)
        suspects = {
            "the start is taken as w = 1, not as the centre": outputs + (weights - 1) @ scores.T,
            "w is used where w − c should be": outputs + weights @ scores.T,
            "the outputs at the centre are left out": want - outputs,
            "the step is c − w, which is the wrong way round": outputs - (weights - centre) @ scores.T,
        }
        cases.same(case, got, want, suspects)


@exercise("11.2", "a ridge regression in many more unknowns than equations")
def ridge(answer) -> None:
    S, n, K = 12, 30, 2
    draw = _dice(12)
    centred, shifted = draw(S, n), draw(S, n) + 3.0
    centred = centred - centred.mean(0)
    cases = Cases({"the penalty": 2.5, "the number of retrainings": S}, tolerance=1e-6)
    outputs = draw(S, K)
    for case, weights, values, penalty in (
        ("weights and outputs whose means are 0", centred, outputs - outputs.mean(0), 2.5),
        ("another penalty", centred, outputs - outputs.mean(0), 0.3),
        ("weights whose mean is not 0", shifted, outputs - outputs.mean(0), 2.5),
        ("outputs whose mean is not 0", shifted, outputs + 5.0, 2.5),
    ):
        want = _ridge(weights, values, penalty)
        raw = weights.T @ torch.linalg.solve(weights @ weights.T + penalty * torch.eye(S).to(weights), values)
        suspects = {
            "weights and outputs keep their means": raw,
            "the penalty is squared": _ridge(weights, values, penalty**2),
            "the penalty is multiplied by the number of retrainings": _ridge(weights, values, S * penalty),
            "the penalty is left out": torch.linalg.pinv(weights - weights.mean(0))
            @ (values - values.mean(0)),
        }
        cases.same(case, cases.call(case, answer, weights, values, penalty), want, suspects)


def _ridge(weights: Tensor, outputs: Tensor, penalty: float) -> Tensor:
    """(n, K): the slopes with the smallest squared error plus penalty · squared length, by the normal
    equations in n unknowns."""
    D, r = weights - weights.mean(0), outputs - outputs.mean(0)
    return torch.linalg.solve(D.T @ D + penalty * torch.eye(D.shape[1]).to(D), D.T @ r)


@exercise("11.3", "an unbiased estimate of a squared length")
def squared_length(answer) -> None:
    draw = _dice(13)
    cases = Cases({"the number of draws": 2.0})
    for case, x in (
        ("three draws in the plane", draw(3, 2)),
        ("fifty draws of one number", draw(50, 1) + 0.5),
        ("eight draws of a thousand numbers", draw(8, 1000)),
    ):
        S = len(x)
        gram = x @ x.T
        want = (gram.sum() - gram.diagonal().sum()) / (S * (S - 1))
        own = gram.diagonal().mean()
        half, rest = x[: S // 2].mean(0), x[S // 2 :].mean(0)
        suspects = {
            "this is the squared length of the mean: pairs of a draw with itself are counted": gram.mean(),
            "pairs of a draw with itself are left out, but the sum is divided by S²": want * (S - 1) / S,
            "each pair s ≠ t occurs twice, as (s, t) and (t, s): off by a factor of 2": want / 2,
            "this is the mean of the squared lengths": own,
            "right on average, but it uses only the pairs of one half with the other": half @ rest,
        }
        cases.same(case, cases.call(case, answer, x), want, suspects)


@exercise("11.4", "the slopes of the best linear predictor, as average differences")
def best_slopes(answer) -> None:
    n = 4
    sets = torch.tensor(list(product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    draw = _dice(14)
    slopes, bent, last = draw(n), draw(n, n), draw(n)

    def linear(w: Tensor) -> Tensor:
        return slopes @ w + 2

    def pairwise(w: Tensor) -> Tensor:
        return linear(w) + w @ bent @ w

    def curved(w: Tensor) -> Tensor:
        return pairwise(w) + torch.exp(last @ w)

    cases = Cases({"the fraction that stays": 0.5})
    for case, f in (
        ("a linear function", linear),
        ("products of two weights", pairwise),
        ("an exponential", curved),
    ):
        values = torch.stack([f(w) for w in sets])
        D = sets - sets.mean(0)
        want = torch.linalg.lstsq(D, values - values.mean()).solution
        at = torch.full((n,), 0.5, dtype=torch.float64)
        full = torch.ones(n, dtype=torch.float64)
        alone = torch.stack([f(row) for row in torch.eye(n, dtype=torch.float64)]) - f(0 * full)
        last_in = f(full) - torch.stack([f(full - row) for row in torch.eye(n, dtype=torch.float64)])
        present = torch.stack([values[sets[:, i] == 1].mean() for i in range(n)])
        suspects = {
            "this is the derivative at the centre, not an average difference": _slope(f, at),
            "this is what each example does when all others are there": last_in,
            "this is what each example does when it is alone": alone,
            "only outputs with the example are averaged; those without it are to be subtracted": present,
        }
        cases.same(case, cases.call(case, answer, f, sets), want, suspects)


def _slope(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(f(at), at)[0]
