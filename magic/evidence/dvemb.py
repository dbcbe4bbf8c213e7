"""DVEmb, data value embedding: the training unrolled, with gradients in the place of second derivatives.

Source: Wang et al. 2024, arXiv 2412.09538, sections 3 and 4.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..attribution import Attribution
from ..show import bar
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .estimates import Tensors, checked, estimate, gradients, times

GROWTH = 100  # of what is pulled back: the training itself shrinks it, or leaves it as it is


def dvemb(run: Run, test: Tensors, *, pace: float = 1.0, batch_size=64, progress: bool = True) -> Attribution:
    """Data value embedding: what each step does to the test loss, pulled back through the steps after it.

        values[k, i] = −Σ_t (η_t/B) q_t · g_i(θ_t) over the steps t with example i in the batch,
        q_{t-1} = q_t − (η_t/B) Σ_j (q_t · g_j(θ_t)) g_j(θ_t) over the batch,

    with q_T the gradient of the test example. It is REPLAY for plain gradient descent, with the mean of g gᵀ
    over the batch in the place of its Hessian matrix. The paper keeps an embedding of every example at every
    step, so that test examples may come later; here the K test gradients go back instead, which gives the
    same numbers and takes K gradients and the states of the run.

    pace      a factor on the rates, to be tuned for an optimizer that is not gradient descent: with momentum
              μ, SGD's rates are taken as η/(1 − μ), those of others as they are
    progress  whether a bar is shown

    All T states of the run are held. Warns where the recursion grows beyond bounds, as it does if the rates
    are too large for the curvature that the gradients stand for. Raises ValueError unless pace > 0.
    """
    if not pace > 0:
        raise ValueError(f"pace={pace!r}: a positive factor on the rates")
    states = [run.initial]
    with determinism.alone():
        weights = run.weights()
        for _ in range(run.steps):
            states.append(run.step(states[-1], weights))
    test, (final,) = checked(run, test, [states.pop()], batch_size)
    with determinism.alone(), bar(run.steps, "embed", progress) as shown:
        pulled = torch.cat(list(gradients(run, final, test, batch_size)))
        size = pulled.norm().item()
        values = torch.zeros(len(pulled), run.n, dtype=run.dtype, device=run.device)
        rates = times(run)
        while states:
            state = states.pop()
            by_group = [pace * rate for rate in rates[state.step]]
            _pull(run, state, pulled, values, by_group, batch_size)
            shown.update()
    grown = pulled.norm().item() / (size + 1e-300)
    if not grown <= GROWTH:
        warnings.warn(
            f"what DVEmb pulls back has grown {grown:.0e} times: at pace={pace:g} some step overshoots along "
            "the gradients of its batch, and the values mean nothing. Lower the pace",
            stacklevel=2,
        )
    return estimate(run, test, final, values)


def _pull(run: Run, state: State, pulled: Tensor, values: Tensor, rates: list[float], size: int) -> None:
    """Through the step at `state`: adds to the values, and changes what is pulled back, in place."""
    batch = run.batches[state.step].to(run.device)
    eta = [torch.full_like(p, rates[run.group_of[name]]).flatten() for name, p in state.params.items()]
    scaled, back, done = pulled * torch.cat(eta) / len(batch), torch.zeros_like(pulled), 0
    for own in gradients(run, state, tuple(x[batch.to(x.device)] for x in run.data), size):
        products = scaled @ own.T
        values.index_add_(1, batch[done : done + len(own)], -products)
        back.addmm_(products, own)
        done += len(own)
    pulled.sub_(back)
