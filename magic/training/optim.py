"""The optimizers that magic knows, and the user's torch.optim objects, read: which rule is whose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .adafactor import adafactor
from .adagrad import adagrad, adagrad_start
from .adam import adam, adam_adjoint
from .differentiated import Differentiated
from .muon import muon
from .nadam import nadam
from .radam import radam
from .rmsprop import rmsprop, rmsprop_adjoint
from .sgd import sgd, sgd_adjoint
from .update import Pull, Rule, Slots


@dataclass(frozen=True)
class Update:
    """What magic knows of an optimizer.

    told     its name, in messages
    rule     one update of one parameter, with training's bits; `update.py` says what it takes and returns
    by_hand  the rule's adjoint, where one is written out because that is faster
    divides  whether the rule divides a gradient by its own size, so that one of mere rounding counts
    squares  the slot that holds the squares of gradients, where ε alone keeps their root from 0
    start    start(param, hyper) -> the slots before the first update, if the optimizer makes them in its
             constructor
    elementwise  whether each entry of a parameter is updated by itself
    hypers   whether the adjoint by hand finds the derivative by the hyper-parameters as well
    rounds   whether the rule rounds on its way, and what is differentiated is the rule without that
    """

    told: str
    rule: Rule
    by_hand: Callable[..., Pull] | None = None
    divides: bool = False
    squares: str | None = None
    start: Callable[..., Slots] | None = None
    hypers: bool = False
    elementwise: bool = True
    rounds: bool = False

    @property
    def adjoint(self) -> Callable[..., Pull]:
        """The rule's adjoint: by hand or, where it is not written out, by autograd."""
        return self.by_hand or Differentiated(self.rule)


_ADAM = Update("Adam", adam, adam_adjoint, divides=True, squares="exp_avg_sq", hypers=True)
# CONTRIBUTING.md says how to add another one.
UPDATES: dict[type, Update] = {
    torch.optim.SGD: Update("SGD", sgd, sgd_adjoint, hypers=True),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: Update("RMSprop", rmsprop, rmsprop_adjoint, divides=True, squares="square_avg"),
    torch.optim.Adagrad: Update("Adagrad", adagrad, divides=True, squares="sum", start=adagrad_start),
    torch.optim.NAdam: Update("NAdam", nadam, divides=True, squares="exp_avg_sq"),
    torch.optim.RAdam: Update("RAdam", radam, divides=True, squares="exp_avg_sq"),
    torch.optim.Adafactor: Update("Adafactor", adafactor, divides=True, elementwise=False),
    torch.optim.Muon: Update("Muon", muon, divides=True, elementwise=False, rounds=True),
}

REFUSED = {
    "foreach": "foreach=True uses other kernels; leave it out (the bits are those of foreach=False)",
    "fused": "fused=True uses other kernels; leave it out",
    "capturable": "capturable=True does its arithmetic in another order; leave it out",
    "differentiable": "differentiable=True is not needed: magic differentiates the update itself",
}


Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def in_order(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, of which there may be one or several, in the order in which they step."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    if not isinstance(optimizer, (list, tuple)):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass one of torch.optim, or a list of them"
        )
    if not optimizer:
        raise ValueError("the list of optimizers is empty; pass one optimizer, or several in a list")
    return list(optimizer)


def read(optimizer: Optimizers, model: nn.Module) -> tuple[tuple[Update, ...], dict[str, int]]:
    """The update of each parameter group, and the group of each trained parameter.

    The groups are counted through, those of the first optimizer first. Trained are the parameters of
    `model` that an optimizer holds and that require a gradient; the others are constants of the run, as
    they are in a plain loop. Raises TypeError or ValueError, naming the option, for what cannot be honoured
    bit for bit, and for a parameter that two optimizers hold.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    updates: list[Update] = []
    group_of: dict[str, int] = {}
    held: dict[int, str] = {}
    for i, one in enumerate(in_order(optimizer)):
        update, first, who = _update_of(one), len(updates), f"optimizer {i}, {type(one).__name__},"
        for index, group in enumerate(one.param_groups):
            _check_options(group, update, one.defaults)
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(
                        f"group {index} of the optimizer holds a tensor of shape {tuple(p.shape)} that is "
                        "not a parameter of the model; build the optimizer from model.parameters()"
                    )
                if id(p) in held:
                    raise ValueError(
                        f"{held[id(p)]} and {who} both hold {names[id(p)]!r}; each parameter belongs to one"
                    )
                if p.requires_grad and p.numel():  # one without entries has nothing to train
                    group_of[names[id(p)]] = first + index
            updates.append(update)
        held |= {id(p): who for group in one.param_groups for p in group["params"]}
        _check_fresh(one, update)
    if not group_of:
        raise ValueError("the optimizer holds no parameter of the model that requires a gradient")
    return tuple(updates), group_of


def named(updates: Sequence[Update]) -> str:
    """The names of a run's rules: "adam", or "muon + adam"."""
    return " + ".join(dict.fromkeys(update.rule.__name__ for update in updates))


def unrounded(updates: Sequence[Update], group_of: Mapping[str, int]) -> tuple[int, int] | None:
    """Of how many of a run's parameters the update is differentiated without its rounding, and how many there
    are; None where of none."""
    some = sum(updates[group].rounds for group in group_of.values())
    return (some, len(group_of)) if some else None


def _update_of(optimizer: torch.optim.Optimizer) -> Update:
    """What is known of an optimizer; raises TypeError or ValueError if its `step` is not that alone."""
    update = _known(type(optimizer))
    if update is None:
        raise TypeError(
            f"{type(optimizer).__name__} is not known to magic, which differentiates "
            f"{', '.join('torch.optim.' + c.__name__ for c in UPDATES)}; use one of these"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError("the optimizer has step hooks, which magic does not run; remove them")
    if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        raise ValueError(
            "hooks for every optimizer are registered (register_optimizer_step_pre_hook or _post_hook), "
            "which magic does not run; remove them"
        )
    own = vars(optimizer).get("step")  # a scheduler wraps it, to count
    if own is not None and inspect.unwrap(own) is not inspect.unwrap(type(optimizer).step):
        raise ValueError(
            "optimizer.step was replaced on the object, and magic does not run that; make a new optimizer"
        )
    return update


def _check_fresh(optimizer: torch.optim.Optimizer, update: Update) -> None:
    """Raise ValueError unless the optimizer's state is the one that it has before its first step."""
    hyper_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p, found in optimizer.state.items():
        start = update.start(p, hyper_of[id(p)]) if update.start and id(p) in hyper_of else {}
        same = found.keys() == start.keys() and all(torch.equal(found[k].to(x), x) for k, x in start.items())
        if not same:
            raise ValueError(
                "the optimizer has already been stepped, and its state would have to be part of s_0; "
                "make a new one over the same parameters"
            )


def _known(kind: type) -> Update | None:
    """The update of an optimizer's class, or of one that is derived from it and adds nothing."""
    for base in kind.__mro__:
        if base in UPDATES:
            return UPDATES[base]
        own = {name for name in vars(base) if not (name.startswith("__") and name.endswith("__"))}
        # PyTorch itself puts a profiled `step` into the class of the first optimizer that is made.
        if "step" in own and inspect.unwrap(vars(base)["step"]) in _steps(base.__mro__[1:]):
            own.discard("step")
        if own or "__init__" in vars(base) or "__setattr__" in vars(base):
            return None
    return None


def _steps(classes: tuple[type, ...]) -> list[Callable]:
    """The `step` of each class that has one of its own, as it was written."""
    return [inspect.unwrap(vars(base)["step"]) for base in classes if "step" in vars(base)]


def _check_options(group: dict, update: Update, defaults: dict) -> None:
    """Raise ValueError for an option that cannot be honoured bit for bit."""
    for option, reason in REFUSED.items():
        if group.get(option):
            raise ValueError(reason)
    if group.get("eps_root") and (group["eps_root"] < 0 or update.rule is not adam):
        raise ValueError(f"eps_root={group['eps_root']}: a positive number, and of Adam or AdamW")
    for option, values in group.items():
        if option != "params" and any(isinstance(v, Tensor) for v in _each(values)):
            raise ValueError(f"{option} is a tensor; pass a Python float")
    first = "initial_accumulator_value"
    if group.get(first) != defaults.get(first):
        raise ValueError(
            f"{first}={group[first]} of a group: torch.optim.Adagrad passes it over, and takes its own; give "
            "it to the optimizer"
        )


def _each(values) -> tuple:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)
