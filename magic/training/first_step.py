"""What a Run tries before it believes: its first step, several times, before anything long starts.

Most ways in which a model is not a function of its state show in one step: numbers drawn elsewhere,
attributes that count, parameters written in place, a second model used on the side. Each is refused
here, by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..identity import fingerprints
from ..kernels import checkpointing
from ..kernels.graph import uses
from . import determinism, memory
from .state import State

LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Watch(TorchFunctionMode):
    """Notes the functions that return low-precision tensors, and those that use tensors from outside."""

    def __init__(self, outside: dict[int, str]):
        super().__init__()
        self.low: dict[str, torch.dtype] = {}
        self.outside, self.used = outside, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if isinstance(out, Tensor) and out.dtype in LOW_PRECISION:
            self.low[name] = out.dtype
        # A shape is a tuple, too, but no value.
        tells = isinstance(out, (Tensor, tuple, list)) and not isinstance(out, torch.Size)
        if self.used is None and (tells or name in ("item", "tolist")):
            for x in (*args, *kwargs.values()):
                for part in x if isinstance(x, (tuple, list)) else (x,):
                    self.used = self.used or self.outside.get(id(part))
        return out


def first_step(run, model: nn.Module) -> None:
    """Try the first step of `run`; `model` is the user's own, which it must not reach.

    Raises ValueError, TypeError or NotDeterministic, naming what makes the run not a function.
    """
    start, weights = run.initial, run.weights()
    before, frozen, modes = start.fingerprint(), fingerprints.fingerprint(run._model), _modes(run._model)
    attributes = memory.attributes(run._model)
    outside = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    with determinism.alone(), determinism.refusing(), checkpointing.refusing():
        with torch.enable_grad(), _Watch(outside) as watch:
            leaves = {name: p.detach().requires_grad_() for name, p in start.params.items()}
            weight = weights[run.batches[0].to(weights.device)]
            gradient = run.gradient(leaves, start.buffers, weight, 0)
        if watch.low:
            name, dtype = next(iter(watch.low.items()))
            raise TypeError(
                f"step 0: {name} returns {dtype}, from autocast or a cast in the model: the derivative of "
                "such a run is invalid. Leave it in float32"
            )
        if name := watch.used or uses(gradient.total, dict(model.named_parameters())):
            raise ValueError(
                f"step 0: the losses use {name!r} of the model outside, which does not train; loss must "
                "use the model it is given, and a teacher must be a copy (copy.deepcopy)"
            )
        _check_modes(modes, _modes(run._model))
        remembered = memory.attributes(run._model) | memory.held(run.loss)
        for name, value in remembered.items():
            if isinstance(value, (int, float, complex, str)) and attributes.get(name, value) != value:
                raise _remembers(name)
        # The first try began with what the modules kept when the run was made; the next two did not.
        first = run.moved_on(start, weight, gradient)
        second, third = run.step(start, weights), run.step(start, weights)
        for name, value in (memory.attributes(run._model) | memory.held(run.loss)).items():
            if remembered.get(name, value) != value:
                raise _remembers(name)
    if start.fingerprint() != before or fingerprints.fingerprint(run._model) != frozen:
        raise ValueError(
            "the model changes its parameters or buffers in place, behind autograd's back, during the "
            "forward pass; return the new value, or do it in the optimizer"
        )
    if name := _first_difference(first, second) or _first_difference(second, third):
        raise determinism.NotDeterministic(
            f"the same step gave two values of {name!r}: it uses random numbers that are not torch's "
            "(numpy's, Python's, the clock), which cannot be replayed, or remembers earlier calls"
        )


def _remembers(name: str) -> determinism.NotDeterministic:
    return determinism.NotDeterministic(
        f"{name} changes with each forward pass, and a step must not remember the ones before it; keep what "
        "it needs in a registered buffer, and take notes and counts out of it"
    )


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _check_modes(before: dict[str, bool], after: dict[str, bool]) -> None:
    for name, training in after.items():
        if before.get(name, training) != training:
            raise ValueError(
                f"step 0: the loss leaves module {name!r} in {'training' if training else 'eval'} mode, in "
                "which a plain loop would do its next step; set the mode before the Run is made, or set it "
                "back at the end of the loss"
            )


def _first_difference(a: State, b: State) -> str | None:
    digests, others = fingerprints.fingerprints(a.flatten()), fingerprints.fingerprints(b.flatten())
    return next((name for name in digests if digests[name] != others.get(name)), None)
