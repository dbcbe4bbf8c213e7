"""Hyper-parameters: what the user's optimizer and scheduler would use at each step."""

from __future__ import annotations

import copy
import itertools
import warnings

import torch
from torch import nn

from . import hidden_state
from .optim import Optimizers


class Frozen(dict):
    """Hyper-parameters of one group at one step. They are part of the run, so nothing changes them."""

    def _refuse(self, *args, **kwargs):
        raise TypeError("the hyper-parameters of a run cannot be changed; make a new Run")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self):
        return Frozen, (dict(self),)

    def __deepcopy__(self, memo) -> Frozen:
        return self


Groups = tuple[Frozen, ...]


def hypers(optimizer: Optimizers, scheduler, steps: int) -> tuple[Groups, ...]:
    """Each step's hyper-parameters, [t][group]: what `optimizer.step(); scheduler.step()` would use.

    The scheduler is stepped once per training step, on a copy; the user's objects stay as they are. Of
    several optimizers the groups are counted through, as `optim.read` does.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return _of_one(optimizer, scheduler, steps)
    schedulers = [None] * len(optimizer) if scheduler is None else scheduler
    if not isinstance(schedulers, (list, tuple)) or len(schedulers) != len(optimizer):
        given = f"a list of {len(scheduler)}" if isinstance(scheduler, (list, tuple)) else "no list"
        raise ValueError(
            f"there are {len(optimizer)} optimizers, and scheduler is {given}; pass a list with one "
            "scheduler for each optimizer, None for one whose rate stays, or None for all"
        )
    each = [_of_one(*pair, steps) for pair in zip(optimizer, schedulers, strict=True)]
    return tuple(tuple(itertools.chain(*groups)) for groups in zip(*each, strict=True))


def _of_one(optimizer: torch.optim.Optimizer, scheduler, steps: int) -> tuple[Groups, ...]:
    if scheduler is None:
        return (_read_groups(optimizer),) * steps
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau reads a metric, so its rates are not known before the run; "
            "use a scheduler that depends on the step alone"
        )
    if isinstance(scheduler, (list, tuple)):
        raise TypeError("scheduler is a list; join them with torch.optim.lr_scheduler.ChainedScheduler")
    if getattr(scheduler, "optimizer", None) is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer; build it over this one")
    _check_scheduler(scheduler, optimizer)
    values = _rehearse(scheduler, optimizer, steps)
    if values != _rehearse(scheduler, optimizer, steps):
        raise ValueError(
            "the scheduler gave other rates when it was rehearsed again: it reads a counter, random numbers "
            "or a clock; make its rates a function of the step alone"
        )
    return tuple(values)


def _rehearse(scheduler, optimizer: torch.optim.Optimizer, steps: int) -> list[tuple[Frozen, ...]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rehearsal = copy.deepcopy(scheduler, {id(p): p for p in parameters})
    values = []
    with warnings.catch_warnings():  # it warns that the optimizer was not stepped; it must not be
        warnings.simplefilter("ignore")
        for t in range(steps):
            values.append(_read_groups(rehearsal.optimizer))
            if t + 1 < steps:
                try:
                    rehearsal.step()
                except ValueError as error:
                    raise ValueError(
                        f"the scheduler ends after {t + 1} steps and the run has {steps}: {error}"
                    ) from error
    return values


def _check_scheduler(scheduler, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for a rate that is computed from the parameters, as far as a lambda shows it."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in [scheduler, *getattr(scheduler, "_schedulers", [])]:
        for function in getattr(one, "lr_lambdas", []):
            for name, value in hidden_state.captured(function):
                tensors = value.parameters() if isinstance(value, nn.Module) else [value]
                if any(id(x) in trained for x in tensors):
                    raise ValueError(
                        f"the scheduler's function holds {name!r}, parameters that are trained: a rate that "
                        "depends on them has a derivative, which magic does not take"
                    )


def _read_groups(optimizer: torch.optim.Optimizer) -> tuple[Frozen, ...]:
    return tuple(
        Frozen({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups
    )
