"""TRAK, by the library traker: a Newton step on randomly projected gradients.

Source: Park et al. 2023, arXiv 2303.14186, section 3.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..attribution import Attribution
from ..show import needs
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .classes import Classes, classes_of
from .estimates import Tensors, checked, estimate, in_batches, quietly


def trak(
    run: Run, test: Tensors, states: list[State], *, dim: int | None = None, seed=0, batch_size=64
) -> Attribution:
    """TRAK, by the library traker: a Newton step on randomly projected gradients of the margin.

    traker scores the margin log(p/(1−p)) of the right class, p its probability. With the loss −log p,
    ∂loss/∂margin = −(1 − p): the scores of test example k are multiplied by −(1 − p_k). So the run must
    be a classification with cross-entropy, its data (images, int64 labels), or that of a causal language
    model (`magic.text.loss`). There each token has a margin; an example's is their mean or sum, as its loss
    is, and 1 − p its mean over the tokens, as in section 5.

    states  trained states, over which traker averages; outputs and p_k are those of the last
    dim     dimension of the projection; None for traker's 2048, but at most n/4. As dim approaches n, the
            dim × dim matrix that traker inverts without a ridge becomes singular, and the scores noise
    seed    of the projection

    Computes in float32, not in traker's half precision, and leaves out traker's division of the inverse by
    the mean size of its entries, which would remove the scale of the scores. Raises ValueError for another
    kind of run or dimension, and ImportError without traker.
    Source: Park et al. 2023, arXiv 2303.14186, section 3.
    """
    test, states = checked(run, test, states, batch_size)
    classes = classes_of(run, test, states[-1])
    if isinstance(classes, str):
        raise ValueError(f"TRAK needs (images, int64 labels) or tokens, and cross-entropy: {classes}")
    dim = max(1, min(2048, run.n // 4)) if dim is None else dim
    if not 1 <= dim <= run.n:
        raise ValueError(f"dim={dim}: the projection has between 1 and n={run.n} dimensions; n/4 is a start")
    with quietly() as folder, determinism.alone():
        traker = _traker(run, classes, folder, dim, seed)
        checkpoints = [run.model(state).state_dict() for state in states]
        for number, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, number)
            for batch in in_batches(run, run.data, batch_size):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("test", checkpoint, number, len(test[0]))
            for batch in in_batches(run, test, batch_size):
                traker.score(batch, num_samples=len(batch[0]))
        scores = torch.tensor(traker.finalize_scores("test"))
    found = estimate(run, test, states[-1], scores.T)
    with torch.no_grad(), determinism.alone():
        found.values *= -_wrong(classes, run.model(states[-1]), *test).unsqueeze(1).to(found.values)
    return found


def _wrong(classes: Classes, model, *batch: Tensor) -> Tensor:
    """(B,): 1 − p, the mean over an example's targets."""
    shares = classes.shares(classes.labels(*batch))
    _, wrong = classes.margins(model, *batch)
    return (wrong * shares).sum(1) / shares.sum(1)


def _output(run: Run, classes: Classes):
    """An example's margin as traker's model output: for tokens, the sum with their shares."""
    AbstractModelOutput: Any = needs("trak.modelout_functions", "baselines", "TRAK needs").AbstractModelOutput

    class Margin(AbstractModelOutput):
        """Computed as a run computes its measure, with operations that vmap can batch."""

        def __init__(self):
            super().__init__()

        @staticmethod
        def get_output(model, weights, buffers, *example):
            batch = [x.unsqueeze(0) for x in example]

            def margin(model):
                margins, _ = classes.margins(model, *batch)
                return (margins * classes.shares(classes.labels(*batch)).to(margins)).sum(1)

            return run.measured(margin, {k: weights[k] for k in run.initial.params}, buffers)[0]

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            with torch.no_grad():
                params = {k: weights[k] for k in run.initial.params}
                return run.measured(lambda model: _wrong(classes, model, *batch), params, buffers)[:, None]

    return Margin()


def _traker(run: Run, classes: Classes, folder: str, dim: int, seed: int):
    """The library's TRAKer for this run, which writes into `folder` and keeps the scale of the scores."""
    library = needs("trak", "baselines", "TRAK needs")
    BasicScoreComputer: Any = needs("trak.score_computers", "baselines", "TRAK needs").BasicScoreComputer

    class ScoreComputer(BasicScoreComputer):
        """Leaves out the division by the mean size of the inverse's entries, and inverts in float64."""

        def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
            return grads @ torch.linalg.inv(xtx.double()).to(grads.dtype)

    traker = library.TRAKer(
        run.model(run.initial),
        _output(run, classes) if classes.tokens else "image_classification",
        run.n,
        folder,
        device=str(run.device),
        score_computer=ScoreComputer,
        proj_dim=dim,
        logging_level=logging.CRITICAL,
        use_half_precision=False,
        projector_seed=seed,
        grad_wrt=list(run.initial.params),
    )
    # traker frees the projection before it scores, and up to 100 dimensions does not make it again.
    traker.projector.free_memory = lambda: None
    return traker
