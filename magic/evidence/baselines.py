"""Other people's estimates of the same scores, each returned as the same Attribution.

    values[k, i] ≈ ∂φ_k(f(w)) / ∂w_i  at w = 1,      φ_k the loss of test example k, in eval mode

They look at the trained model, or at a few states on the way to it, and not at the training between
them: from there they take one step of gradient descent (gradient similarity, TracIn) or of Newton's
method (TRAK, EK-FAC). All take per-example gradients in eval mode and know nothing of momentum, of
Adam or of `normalize`. They are scaled to be estimates of the derivative; `magic.lds` judges their
order alone.

All take a run whose data are tensors, and `test`, tensors of the same kinds with K examples first;
`batch_size` examples are taken together. Values are (K, n). Arguments that do not fit raise ValueError or
TypeError, and a missing library ImportError. TRAK and EK-FAC, computed by their authors' libraries,
have modules of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attribution import Attribution
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .ekfac import ekfac
from .estimates import Tensors, checked, estimate, in_batches, losses_of
from .trak import trak

__all__ = ["ekfac", "gradient_similarity", "tracin", "trak"]


def gradient_similarity(run: Run, test: Tensors, state: State, *, cosine=False, batch_size=64) -> Attribution:
    """Minus the dot product of a test and a training example's gradients, over n; or minus their cosine.

    state   where the gradients are taken, such as the trained one
    cosine  the cosine instead of the product; it is 0 where either gradient is 0

    This is one step of gradient descent on the mean loss with rate 1, so the size has no meaning.
    2 · batch_size gradients are held at once. Source: Charpiat et al. 2019, arXiv 2102.05262.
    """
    test, (state,) = checked(run, test, [state], batch_size)
    products = _products(run, test, state, batch_size, cosine=cosine)
    return estimate(run, test, state, -products if cosine else -products / run.n)


def tracin(run: Run, test: Tensors, states: list[State], *, batch_size=64) -> Attribution:
    """TracInCP: products of gradients, summed over states of the run with their learning rates.

    When a step of SGD with rate η has example i in its batch of B, w_i moves the loss of test example k
    by −(η/B) g_k·g_i, and i is in a batch with frequency B/n. Each of m states stands for T/m steps:

        values[k, i] = −T/(m n) Σ_states η g_k·g_i

    with η the rate of the step that led to the state, for each parameter that of its group. The states
    should be spread evenly over the run; outputs are those of the last. 2 · batch_size gradients are
    held at once. Raises ValueError for an empty list, or for states of another run.
    Source: Pruthi et al. 2020, arXiv 2002.08484, section 3.
    """
    test, states = checked(run, test, states, batch_size)
    total = torch.zeros((), dtype=run.dtype, device=run.device)
    for state in states:
        groups = run.hypers[max(state.step - 1, 0)]
        rates = {name: groups[run.group_of[name]]["lr"] for name in state.params}
        total = total + _products(run, test, state, batch_size, rates=rates)
    return estimate(run, test, states[-1], -run.steps / (len(states) * run.n) * total)


def _gradients(run: Run, state: State, examples: Tensors, size: int) -> Iterator[Tensor]:
    """Yield the gradients of the examples' losses, in eval mode: (at most `size`, parameters) at a time.

    They are taken together by vmap, or one by one, with a warning, where an operation cannot be batched.
    """

    def loss(params, *example):
        one = [x.unsqueeze(0) for x in example]
        return run.measured(lambda model: losses_of(run, model, tuple(one)), params, state.buffers)[0]

    def flat(*example):
        return torch.cat([g.flatten() for g in torch.func.grad(loss)(state.params, *example).values()])

    for batch in in_batches(run, examples, size):
        try:
            gradients = torch.vmap(flat, randomness="different")(*batch)
        except RuntimeError as error:
            warnings.warn(f"examples are differentiated one by one, which is slower: {error}", stacklevel=4)
            gradients = torch.stack([flat(*example) for example in zip(*batch, strict=True)])
        yield gradients


def _products(run: Run, test: Tensors, state: State, size: int, *, rates=None, cosine=False) -> Tensor:
    """(K, n): g_k·g_i over test and training examples, with each parameter's part times its rate.

    rates    parameter -> its rate; None for 1
    cosine   the cosine instead, which is 0 where either gradient is 0
    """
    rates = rates or dict.fromkeys(state.params, 1.0)
    scale = torch.cat([torch.full_like(p, rates[name]).flatten() for name, p in state.params.items()])
    unit, rows = F.normalize if cosine else nn.Identity(), []
    with determinism.alone():
        for left in _gradients(run, state, test, size):
            left = unit(left * scale)
            row = [left @ unit(right).T for right in _gradients(run, state, run.data, size)]
            rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
