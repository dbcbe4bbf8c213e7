"""SGD, Adam and AdamW as pure functions, read from the user's torch.optim object.

An update is `rule(param, grad, slots, hyper) -> (param, slots)`. It repeats, out of place, the very
operations of PyTorch's single-tensor implementation in their order, so that a step gives the bits
that `optimizer.step()` gives. `magic.training.optim_adjoint` has its derivative.

Source: torch/optim/sgd.py and adam.py; Kingma & Ba 2015; Loshchilov & Hutter 2019.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import hidden_state

Slots = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, Slots]]


def sgd(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.SGD: momentum, dampening, Nesterov, weight decay, maximize."""
    if hyper["maximize"]:
        grad = -grad
    if hyper["weight_decay"] != 0:
        grad = grad.add(param, alpha=hyper["weight_decay"])
    momentum = hyper["momentum"]
    if momentum != 0:
        if "momentum_buffer" in slots:
            buffer = slots["momentum_buffer"].mul(momentum).add_(grad, alpha=1 - hyper["dampening"])
        else:  # the first update is not dampened
            buffer = grad
        slots = {"momentum_buffer": buffer}
        grad = grad.add(buffer, alpha=momentum) if hyper["nesterov"] else buffer
    return param.add(grad, alpha=-hyper["lr"]), slots


def adam(param: Tensor, grad: Tensor, slots: Slots, hyper: dict) -> tuple[Tensor, Slots]:
    """One update of torch.optim.Adam or AdamW: betas, eps, weight decay, amsgrad, maximize.

    `eps_root` is added to v̂ under the root, as in optax (Engstrom et al. 2025 use it for smoothness).
    torch.optim has no such option and ignores it in a parameter group: with it, the loop is another.
    """
    lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
    if hyper["maximize"]:
        grad = -grad
    if not slots:
        zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        slots = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros}
        if hyper["amsgrad"]:
            slots["max_exp_avg_sq"] = zeros
    if hyper["weight_decay"] != 0:
        if hyper["decoupled_weight_decay"]:
            param = param.mul(1 - lr * hyper["weight_decay"])
        else:
            grad = grad.add(param, alpha=hyper["weight_decay"])
    step = slots["step"] + 1
    m = slots["exp_avg"].lerp(grad, 1 - beta1)
    v = slots["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    new = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if hyper["amsgrad"]:
        v = new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], v)
    t = step.item()
    if hyper.get("eps_root"):
        v = v + hyper["eps_root"] * (1 - beta2**t)
    denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(hyper["eps"])
    return param.addcdiv(m, denominator, value=-(lr / (1 - beta1**t))), new


RULES: dict[type, Rule] = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam}

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
            "the optimizer has already been stepped, and its memory would have to be part of s_0; "
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
        if inspect.unwrap(base.step) is inspect.unwrap(super(base, base).step):
            own.discard("step")
        if own or "__init__" in vars(base) or "__setattr__" in vars(base):
            return None
    return None


def _check_options(group: dict) -> None:
    for option, reason in REFUSED.items():
        if group.get(option):
            raise ValueError(reason)
    if group.get("eps_root") and (group["eps_root"] < 0 or "betas" not in group):
        raise ValueError(f"eps_root={group['eps_root']}: a positive number, and of Adam or AdamW")
    for option in ("lr", "weight_decay", "betas", "eps", "eps_root", "momentum", "dampening"):
        values = group.get(option, 0.0)
        if any(isinstance(v, Tensor) for v in (values if isinstance(values, tuple) else (values,))):
            raise ValueError(f"{option} is a tensor; pass a Python float")


class Frozen(dict):
    """Hyper-parameters of one group at one step. They are part of the run, so nothing changes them."""

    def _refuse(self, *args, **kwargs):
        raise TypeError("the hyper-parameters of a run cannot be changed; make a new Run")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self):
        return Frozen, (dict(self),)

    def __deepcopy__(self, memo) -> Frozen:
        return self


def hypers(optimizer: torch.optim.Optimizer, scheduler, steps: int) -> tuple[tuple[Frozen, ...], ...]:
    """Each step's hyper-parameters, [t][group]: what `optimizer.step(); scheduler.step()` would use.

    The scheduler is stepped once per training step, on a copy; the user's objects stay as they are.
    """
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
