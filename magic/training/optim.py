"""The user's torch.optim object, read: which rule it follows, and for which parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .adam import adam, adam_adjoint
from .rmsprop import rmsprop, rmsprop_adjoint
from .sgd import sgd, sgd_adjoint
from .update import Pull, Rule

# CONTRIBUTING.md says how to add another one.
RULES: dict[type, Rule] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.RMSprop: rmsprop,
}
ADJOINTS: dict[Rule, Callable[..., Pull]] = {sgd: sgd_adjoint, adam: adam_adjoint, rmsprop: rmsprop_adjoint}

REFUSED = {
    "foreach": "foreach=True uses other kernels; leave it out (the bits are those of foreach=False)",
    "fused": "fused=True uses other kernels; leave it out",
    "capturable": "capturable=True does its arithmetic in another order; leave it out",
    "differentiable": "differentiable=True is not needed: magic differentiates the update itself",
}


def read(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[Rule, dict[str, int]]:
    """The update rule of a torch.optim object, and the parameter group of each trained parameter.

    Trained are the parameters of `model` that the optimizer holds and that require a gradient; the
    others are constants of the run, as they are in a plain loop. Raises TypeError or ValueError,
    naming the option, for what cannot be honoured bit for bit.
    """
    rule = _rule(type(optimizer))
    if rule is None:
        raise TypeError(
            f"{type(optimizer).__name__} is not known to magic, which differentiates "
            f"{', '.join('torch.optim.' + c.__name__ for c in RULES)}; use one of these"
        )
    if optimizer.state:
        raise ValueError(
            "the optimizer has already been stepped, and its state would have to be part of s_0; "
            "make a new one over the same parameters"
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
    names = {id(p): name for name, p in model.named_parameters()}
    group_of: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        _check_options(group)
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"group {index} of the optimizer holds a tensor of shape {tuple(p.shape)} that is "
                    "not a parameter of the model; build the optimizer from model.parameters()"
                )
            if p.requires_grad and p.numel():  # one without entries has nothing to train
                group_of[names[id(p)]] = index
    if not group_of:
        raise ValueError("the optimizer holds no parameter of the model that requires a gradient")
    return rule, group_of


def _rule(kind: type) -> Rule | None:
    """The rule of an optimizer's class, or of one that is derived from it and adds nothing."""
    for base in kind.__mro__:
        if base in RULES:
            return RULES[base]
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


def _check_options(group: dict) -> None:
    for option, reason in REFUSED.items():
        if group.get(option):
            raise ValueError(reason)
    if group.get("eps_root") and (group["eps_root"] < 0 or "betas" not in group):
        raise ValueError(f"eps_root={group['eps_root']}: a positive number, and of Adam or AdamW")
    for option in ("lr", "weight_decay", "betas", "alpha", "eps", "eps_root", "momentum", "dampening"):
        values = group.get(option, 0.0)
        if any(isinstance(v, Tensor) for v in (values if isinstance(values, tuple) else (values,))):
            raise ValueError(f"{option} is a tensor; pass a Python float")
