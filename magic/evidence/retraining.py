"""What would really have happened: train again without the examples.

A retraining is the same run at other data weights. Under `normalize="weights"`, weight 0 has the same effect
as leaving the row out of its batch, except with BatchNorm, whose statistics a row of weight 0 still moves;
under `normalize="batch"` the divisor remains the batch's size. `how="rows"` really leaves the rows out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from .. import subsets
from ..engine.measuring import measured_outputs
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .together import trained_together


def retrain(run: Run, without: Iterable[int], *, how: str = "weight", progress: bool = True) -> State:
    """The final state of the same run without these training examples.

    without   indices of training examples
    how   "weight": their data weights are 0; "rows": they are left out of their batches, whose losses
          are averaged over the rows that stay. Dropout then draws other numbers than in the full batch.

    Raises IndexError for an index out of range, ValueError for an index given twice, for another `how`, or
    for a batch of which no row is left.
    """
    (weights,) = subsets.without(run.n, [without])
    return _train(run, run.weights(weights), how, progress)


def without_rows(run: Run, weights: Tensor) -> Run:
    """The same run with the examples of weight 0 left out of their batches; `weights` are of the run's shape.

    It shares model and data with `run`. Raises ValueError for a batch of which no row is left, and where
    batches are divided into parts or only some tokens of an example have weight 0.
    """
    present = weights.cpu() != 0
    if run.tokens:
        if (present != present[:, :1]).any():
            raise ValueError('a token cannot be left out of its batch alone; use how="weight"')
        present = present[:, 0]
    if run.accumulate > 1:
        raise ValueError(
            f'accumulate={run.accumulate} divides each batch into parts of one length, which how="rows" '
            'would make unequal; use how="weight"'
        )
    smaller = copy.copy(run)
    smaller.batches = [indices[present[indices.cpu()].to(indices.device)] for indices in run.batches]
    for t, indices in enumerate(smaller.batches):
        if len(indices) == 0:
            raise ValueError(
                f'step {t}: all examples of its batch are removed; use how="weight", or larger batches'
            )
    return smaller


def retrained(run: Run, measure: Callable, weights: Tensor, how: str = "weight") -> Tensor:
    """(K,) measured outputs of the model trained with these data weights, (n,), on the run's device."""
    with determinism.alone():
        return measured_outputs(run, _train(run, run.weights(weights), how, False), measure)


def retrained_together(run: Run, measure: Callable, weights: Tensor) -> Iterator[Tensor]:
    """(K,) measured outputs for each row of weights, (R, n), trained at once (`magic.evidence.together`)."""
    for state in trained_together(run, weights):
        yield measured_outputs(run, state, measure)


def _train(run: Run, weights: Tensor, how: str, progress: bool) -> State:
    """The final state at these (n,) weights, removed as `how` says."""
    if how == "weight":
        return run.train(weights, progress=progress)
    if how == "rows":
        return without_rows(run, weights).train(weights, progress=progress)
    if how == "together":
        return next(trained_together(run, weights[None]))
    raise ValueError(
        f'how={how!r}: choose "weight" (data weight 0) or "rows" (left out of the batches); "together" is '
        "that of a bank for trainings that are made many at once"
    )
