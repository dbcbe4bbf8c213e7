"""What a Run tries before it believes: its first step, several times, before anything long starts.

Most ways in which a model is not a function of its state show in one step: numbers drawn elsewhere,
attributes that count, parameters written in place, a second model used on the side. Each is refused
here, by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import determinism
from .inputs import uses
from .state import State

LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Watch(TorchFunctionMode):
    """Notes the functions that return low-precision tensors."""

    def __init__(self):
        super().__init__()
        self.low: dict[str, torch.dtype] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in LOW_PRECISION:
            self.low[getattr(func, "__name__", str(func))] = out.dtype
        return out


def first_step(run, model: nn.Module) -> None:
    """Try the first step of `run`; `model` is the user's own, which it must not reach.

    Raises ValueError, TypeError or NotDeterministic, naming what makes the run not a function.
    """
    start, weights = run.initial, run.weights()
    before, frozen, attributes = (
        start.fingerprint(),
        determinism.fingerprint(run._model),
        _attributes(run._model),
    )
    with determinism.fix(), determinism.refusing():
        with torch.enable_grad(), _Watch() as watch:
            leaves = {name: p.detach().requires_grad_() for name, p in start.params.items()}
            weight = weights[run.batches[0].to(weights.device)]
            total = run.gradient(leaves, start.buffers, weight, 0).total
        if watch.low:
            name, dtype = next(iter(watch.low.items()))
            raise TypeError(
                f"step 0: {name} returns {dtype}, from autocast or a cast in the model: the derivative of "
                "such a run is invalid. Leave it in float32"
            )
        if name := uses(total, dict(model.named_parameters())):
            raise ValueError(
                f"step 0: the losses use {name!r} of the model outside, which does not train; loss must "
                "use the model it is given"
            )
        for (owner, name), value in _attributes(run._model).items():
            if attributes.get((owner, name), value) != value:
                raise determinism.NotDeterministic(
                    f"attribute {name!r} of module {owner!r} changes with each forward pass, and a step must "
                    "not remember the ones before it; keep it in a registered buffer"
                )
        first, second = run.step(start, weights), run.step(start, weights)
    if start.fingerprint() != before or determinism.fingerprint(run._model) != frozen:
        raise ValueError(
            "the model changes its parameters or buffers in place, behind autograd's back, during the "
            "forward pass; return the new value, or do it in the optimizer"
        )
    if (name := _first_difference(first, second)) is not None:
        raise determinism.NotDeterministic(
            f"the same step gave two values of {name!r}: it uses random numbers that are not torch's "
            "(numpy's, Python's, the clock), which cannot be replayed, or remembers earlier calls"
        )


def _attributes(model: nn.Module) -> dict[tuple[str, str], object]:
    """The plain numbers and strings that the model's modules hold."""
    return {
        (owner, name): value
        for owner, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, complex, str)) and name != "training"
    }


def _first_difference(a: State, b: State) -> str | None:
    digests, others = determinism.fingerprints(a.flatten()), determinism.fingerprints(b.flatten())
    return next((name for name in digests if digests[name] != others.get(name)), None)
