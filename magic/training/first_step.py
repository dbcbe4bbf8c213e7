"""What a Run tries when it is made: its first step, three times, before anything long starts.

Most ways in which a model fails to be a function of its state show in one step: random numbers that are not
torch's, attributes that count calls, parameters written in place, a second model used on the side. Each is
refused here, by name.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..identity import fingerprints
from ..kernels import checkpointing
from ..kernels.graph import uses
from . import determinism, hidden_state
from .state import State

LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Watching(TorchFunctionMode):
    """Notes which functions return tensors of low precision, and whether one uses a tensor from outside.

    What is made of tensors of low precision alone is a constant, since all that is trained is of a higher
    one: frozen weights may lie in low precision, and be cut and looked up in, until they are cast up.

    low   function -> the precision of what it returned, where it took a tensor of a higher one
    used  the name of the first tensor from `outside`, an id -> name, whose values were used
    """

    def __init__(self, outside: dict[int, str]):
        super().__init__()
        self.low: dict[str, torch.dtype] = {}
        self.outside = outside
        self.used: str | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if (
            isinstance(out, Tensor)
            and out.dtype in LOW_PRECISION
            and _takes_higher((*args, *kwargs.values()))
        ):
            self.low[name] = out.dtype
        # Values come out as tensors, or as tuples or lists of them. A shape is a tuple, too, but no value.
        tells = isinstance(out, (Tensor, tuple, list)) and not isinstance(out, torch.Size)
        if self.used is None and (tells or name in ("item", "tolist")):
            for x in (*args, *kwargs.values()):
                for part in x if isinstance(x, (tuple, list)) else (x,):
                    self.used = self.used or self.outside.get(id(part))
        return out


def _takes_higher(arguments) -> bool:
    """Whether there is a tensor of more than low precision among the arguments of a function."""
    return any(
        isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.dtype not in LOW_PRECISION
        for argument in arguments
        for x in (argument if isinstance(argument, (tuple, list)) else (argument,))
    )


def first_step(run, model: nn.Module) -> None:
    """Try the first step of `run`; `model` is the user's own, which it must not reach.

    Raises ValueError, TypeError or NotDeterministic, naming what makes the run not a function.
    """
    start, before = run.initial, (run.initial.fingerprint(), fingerprints.fingerprint(run.network.module))
    with (
        determinism.alone(),
        determinism.refusing_nondeterminism(),
        checkpointing.refusing_reentrant(),
    ):
        states = _three_times(run, model)
    if before != (start.fingerprint(), fingerprints.fingerprint(run.network.module)):
        raise ValueError(
            "the model changes its parameters or buffers in place, behind autograd's back, during the "
            "forward pass; return the new value, or do it in the optimizer"
        )
    for a, b in itertools.pairwise(states):
        if name := _first_difference(a, b):
            raise determinism.NotDeterministic(
                f"the same step gave two values of {name!r}: it uses random numbers that are not torch's "
                "(numpy's, Python's, the clock), which cannot be replayed, or remembers earlier calls"
            )


def _three_times(run, model: nn.Module) -> tuple[State, State, State]:
    """The state after the first step, by three tries of it.

    The first try begins with what the modules kept when the run was made, the other two with what the try
    before has left. So a module that remembers shows either between the first two or between the last two.
    """
    start, weights = run.initial, run.weights()
    modes, attributes = _modes(run.network.module), hidden_state.attributes(run.network.module)
    outside = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad(), _Watching(outside) as watch:
        leaves = {name: p.detach().requires_grad_() for name, p in start.params.items()}
        weight = weights[run.batches[0].to(weights.device)]
        gradient = run.gradient(leaves, start.buffers, weight, 0)
    if watch.low:
        name, dtype = next(iter(watch.low.items()))
        raise TypeError(
            f"step 0: {name} returns {dtype}, from autocast or a cast in the model: the derivative of "
            "such a run is invalid. Leave it in float32"
        )
    if used := watch.used or uses(gradient.total, dict(model.named_parameters())):
        raise ValueError(
            f"step 0: the losses use {used!r} of the model outside, which does not train; loss must "
            "use the model it is given, and a teacher must be a copy (copy.deepcopy)"
        )
    _check_modes(modes, _modes(run.network.module))
    after = _hidden_state(run)
    for name, value in after.items():  # of a container, the first call may fill what later ones only read
        if isinstance(value, (int, float, complex, str)) and attributes.get(name, value) != value:
            raise _remembers(name)
    first = run.moved_on(start, weight, gradient)
    second, third = run.step(start, weights), run.step(start, weights)
    for name, value in _hidden_state(run).items():
        if after.get(name, value) != value:
            raise _remembers(name)
    return first, second, third


def _hidden_state(run) -> dict[str, object]:
    """What the run's model, loss and collate hold now that could carry something from step to step."""
    functions = hidden_state.held(run.loss) | hidden_state.held(run.collate, "collate")
    return hidden_state.attributes(run.network.module) | functions


def _remembers(name: str) -> determinism.NotDeterministic:
    return determinism.NotDeterministic(
        f"{name} changes with each forward pass, and a step must not remember the ones before it; keep what "
        "it needs in a registered buffer, and take notes and counts out of it"
    )


def _modes(model: nn.Module) -> dict[str, bool]:
    """Which modules are in training mode, by name."""
    return {name: module.training for name, module in model.named_modules()}


def _check_modes(before: dict[str, bool], after: dict[str, bool]) -> None:
    """Raise ValueError if a step leaves a module in another mode than it found it in."""
    for name, training in after.items():
        if before.get(name, training) != training:
            raise ValueError(
                f"step 0: the loss leaves module {name!r} in {'training' if training else 'eval'} mode, in "
                "which a plain loop would do its next step; set the mode before the Run is made, or set it "
                "back at the end of the loss"
            )


def _first_difference(a: State, b: State) -> str | None:
    """The name of a tensor whose bits differ between two states, if there is one."""
    digests, others = fingerprints.fingerprints(a.flatten()), fingerprints.fingerprints(b.flatten())
    return next((name for name in digests if digests[name] != others.get(name)), None)
