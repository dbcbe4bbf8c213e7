"""What is measured: the outputs φ at a state, and what differentiating them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..training import determinism
from ..training.finite import NonFinite
from ..training.run import Run
from ..training.state import State
from . import footprint
from .adjoint import measure_vjp
from .refusals import refusing


def measured_outputs(run: Run, state: State, measure: Callable, finite: bool = True) -> Tensor:
    """φ at this state, (K,), computed as a user would: with PyTorch's own operations."""
    with torch.no_grad(), determinism.alone(), refusing("measure"):
        outputs = run.measured(measure, state.params, state.buffers).detach()
    if finite and not outputs.isfinite().all():
        raise NonFinite(f"measure returned {outputs[~outputs.isfinite()][0].item()} for the trained model")
    return outputs


def try_measure(run: Run, measure: Callable) -> tuple[int, int]:
    """K, and the bytes that differentiating one of the K outputs holds.

    It is tried at the start, so that a mistake in the measure is told before the training. The start is
    taken as a state of which training has written every buffer, since the measure may depend on the model
    by nothing but the buffers that training will write.
    """
    targets = len(measured_outputs(run, run.initial, measure, finite=False))
    anywhere = replace(run.initial, moved=frozenset(run.initial.buffers))
    with determinism.alone():
        _, _, peak = footprint.measured(lambda: measure_vjp(run, anywhere, measure, slice(0, 1)), run.device)
    return targets, peak
