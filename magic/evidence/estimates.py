"""What all baselines share: checked arguments, batches, and an Attribution of their estimates."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attribution import Attribution
from ..engine.measuring import measured_outputs
from ..training import determinism
from ..training.run import Run
from ..training.state import State

Tensors = tuple[Tensor, ...]


def checked(run: Run, test, states, batch_size: int) -> tuple[Tensors, list[State]]:
    """The test's tensors, on the run's device, and the states as a list, if they fit the run.

    Raises TypeError or ValueError for arguments that do not fit, and says what would.
    """
    if not isinstance(run.data, tuple):
        raise TypeError(f"the run's data is a {type(run.data).__name__}; baselines take tensors, data=(x, y)")
    if run.collate is not None:
        raise TypeError("the run has a collate function; baselines take tensors as they are, data=(x, y)")
    if any(group["maximize"] for group in run.hypers[0]):
        raise ValueError("the run maximizes its loss, and baselines minimize: negate the loss")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one example at a time")
    test = (test,) if isinstance(test, Tensor) else tuple(torch.as_tensor(x) for x in test)
    same = [(x.dim(), x.shape[1:]) for x in test] == [(x.dim(), x.shape[1:]) for x in run.data]
    if not same or len({len(x) for x in test}) != 1 or len(test[0]) == 0:
        raise ValueError(
            "test must be tensors like the run's data, with K examples first; they have shapes "
            f"{[tuple(x.shape) for x in test]}, the data {[tuple(x.shape) for x in run.data]}"
        )
    states = [states] if isinstance(states, State) else list(states)
    if not states:
        raise ValueError("states is empty: give at least one State, such as run.train() returns")
    for state in states:
        if not isinstance(state, State):
            raise TypeError(f"a {type(state).__name__} is no State, such as run.train() returns")
        if state.params.keys() != run.initial.params.keys():
            raise ValueError("a state is of another run: its parameters have other names")
    return tuple(x.to(run.device) for x in test), states


def estimate(run: Run, test: Tensors, state: State, values: Tensor) -> Attribution:
    """Values, (K, n), as an Attribution of the test examples' losses, whose outputs are those at `state`."""

    def measure(model):
        return run.loss(model, *test)

    outputs = measured_outputs(run, state, measure)
    return Attribution(values.to(outputs), outputs, run.weights(), run, measure)


def in_batches(run: Run, examples: Tensors, size: int) -> Iterator[Tensors]:
    """The examples, at most `size` at a time, on the run's device."""
    for batch in zip(*(x.split(size) for x in examples), strict=True):
        yield tuple(x.to(run.device) for x in batch)


def no_classification(run: Run, test: Tensors, state: State) -> str | None:
    """Why this is not a classification with cross-entropy; None if it is one."""
    if len(test) != 2:
        return f"the data are {len(test)} tensors"
    x, y = test
    if y.dim() != 1 or {y.dtype, run.data[1].dtype} != {torch.int64}:
        return f"data[1] is {run.data[1].dtype} and test[1] {y.dtype}, {y.dim() - 1} axes for each example"
    with torch.no_grad(), determinism.alone():
        model = run.model(state)
        losses = run.loss(model, x, y)
        try:
            same = torch.allclose(F.cross_entropy(model(x), y, reduction="none"), losses, 1e-3, 1e-5)
        except Exception as error:
            return f"the cross-entropy of model(images) raises {type(error).__name__}: {error}"
    return None if same else "the loss is not the cross-entropy of model(images)"


@contextlib.contextmanager
def quietly() -> Iterator[str]:
    """A temporary folder, and no progress bar, warning, or log handler left behind."""
    handlers = logging.root.handlers[:]
    try:
        hidden, silent = contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore")
        with tempfile.TemporaryDirectory() as folder, hidden, silent:
            yield folder
    finally:
        logging.root.handlers[:] = handlers
