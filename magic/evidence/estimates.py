"""What all baselines share: checked arguments, batches, and an Attribution of their estimates."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..attribution import Attribution
from ..engine.measuring import measured_outputs
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
    if any(group.get("maximize") for group in run.hypers[0]):
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
        return losses_of(run, model, test)

    outputs = measured_outputs(run, state, measure)
    return Attribution(values.to(outputs), outputs, run.weights().flatten()[: run.n], run, measure)


def losses_of(run: Run, model, examples: Tensors) -> Tensor:
    """One loss for each example; where the run's loss gives one for each token, their sum."""
    return run.loss(model, *examples).flatten(1).sum(1) if run.tokens else run.loss(model, *examples)


def in_batches(run: Run, examples: Tensors, size: int) -> Iterator[Tensors]:
    """The examples, at most `size` at a time, on the run's device."""
    for batch in zip(*(x.split(size) for x in examples), strict=True):
        yield tuple(x.to(run.device) for x in batch)


def gradients(run: Run, state: State, examples: Tensors, size: int) -> Iterator[Tensor]:
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


def times(run: Run) -> list[list[float]]:
    """For each step and parameter group, how far a steady gradient moves a parameter: the rate, and with
    SGD's momentum μ and dampening δ, which add up to a longer step, the rate times (1 − δ)/(1 − μ)."""

    def time(group: dict) -> float:
        return group["lr"] * (1 - group.get("dampening", 0.0)) / (1 - group.get("momentum", 0.0))

    return [[time(group) for group in groups] for groups in run.hypers]


@contextlib.contextmanager
def quietly() -> Iterator[str]:
    """A temporary folder, and no progress bar, warning, or log handler left behind.

    kronfluence collects garbage some fifteen times a call, and each time Python searches all objects that
    there are, half a second long where transformers has been imported. Those that are there already are
    therefore left out of it (`gc.freeze`), unless some have been frozen before.
    """
    handlers, frozen = logging.root.handlers[:], gc.get_freeze_count()
    try:
        if not frozen:
            gc.freeze()
        hidden, silent = contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore")
        with tempfile.TemporaryDirectory() as folder, hidden, silent:
            yield folder
    finally:
        logging.root.handlers[:] = handlers
        if not frozen:
            gc.unfreeze()
