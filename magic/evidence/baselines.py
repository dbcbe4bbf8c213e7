"""Other people's estimates of the same scores, each returned as the same Attribution.

    values[k, i] ≈ ∂φ_k(f(w)) / ∂w_i  at w = 1,      φ_k the loss of test example k, in eval mode

They look at the trained model, or at a few states on the way to it, and not at the training between
them: from there they take one step of gradient descent (gradient similarity, TracIn) or of Newton's
method (TRAK, EK-FAC). Two go back through the training, with something simpler in the place of its second
derivatives: SOURCE in a few segments, DVEmb step by step. All take per-example gradients in eval mode and
know nothing of Adam or of `normalize`. They are scaled to be estimates of the derivative; `magic.lds` judges
their order alone. Last come controls, which should be beaten by anything: chance, an example's own loss and
gradient, and how alike two examples are to a model (`embeddings`) or in their words (`bm25`).

All take a run whose data are tensors, and `test`, tensors of the same kinds with K examples first;
`batch_size` examples are taken together. Values are (K, n). Arguments that do not fit raise ValueError or
TypeError, and a missing library ImportError. TRAK and EK-FAC are computed by their authors' libraries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attribution import Attribution
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .controls import bm25, embeddings, gradient_norm, loss, random_scores
from .dvemb import dvemb
from .ekfac import ekfac
from .estimates import Tensors, checked, estimate, gradients
from .source import source
from .trak import trak

__all__ = [
    "bm25", "dvemb", "ekfac", "embeddings", "gradient_norm", "gradient_similarity", "loss", "random_scores",
    "source", "tracin", "trak",
]  # fmt: skip


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


def _products(run: Run, test: Tensors, state: State, size: int, *, rates=None, cosine=False) -> Tensor:
    """(K, n): g_k·g_i over test and training examples, with each parameter's part times its rate.

    rates    parameter -> its rate; None for 1
    cosine   the cosine instead, which is 0 where either gradient is 0
    """
    rates = rates or dict.fromkeys(state.params, 1.0)
    scale = torch.cat([torch.full_like(p, rates[name]).flatten() for name, p in state.params.items()])
    unit, rows = F.normalize if cosine else nn.Identity(), []
    with determinism.alone():
        for left in gradients(run, state, test, size):
            left = unit(left * scale)
            row = [left @ unit(right).T for right in gradients(run, state, run.data, size)]
            rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
