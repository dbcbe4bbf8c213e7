"""What an optimizer's rule and its adjoint are, and what all of them share.

A rule is one update of one parameter, `rule(param, grad, slots, hyper) -> (param, slots)`. It repeats, out
of place, the very operations of PyTorch's single-tensor implementation in their order, so that a step gives
the bits that `optimizer.step()` gives. `slots` is the optimizer state of the parameter, by PyTorch's names;
it is empty before the first update.

`adjoint(param, grad, slots, hyper, after)` returns

    pull(cotangent, hypers) -> grad_cotangent

which takes the cotangents of what the update returns, {"param": (K, *shape), name: (K, *shape)} for K
targets, turns them in place into those of what it took, and returns the gradient's. `after` is the optimizer
state after the update, or None where that is not known. What the update created has no value before it;
what the pull leaves in the place of its cotangent means nothing and is discarded.

Autograd finds an adjoint for any rule (`differentiated.py`). Where an update is elementwise, as that of SGD,
Adam and RMSprop is, so is its adjoint: a handful of multiplications by vectors that all targets share. For
these it is written by hand, which is faster: derived line by line from the rule, which stands above it. The
tests compare it with autograd of the rule.

`hypers` are derivatives by hyper-parameters, {name: (K,)}, which a pull by hand adds to (`by_hypers.py`); one
by autograd leaves them as they are. `Update.hypers` says of which optimizers they are found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Slots = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, Slots]]
Pull = Callable[..., Tensor]
Hypers = dict[str, Tensor]


def moments(param: Tensor) -> Slots:
    """The slots of Adam and its kin before the first update: a count of steps and two moments, all 0."""
    zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
    count = torch.zeros((), dtype=torch.int64, device="cpu")
    return {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros}


def inverse(root: Tensor) -> Tensor:
    """1/x, and 0 where x is 0; NaN stays NaN. Ten times faster than torch.where, which reads a mask."""
    return root.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)


def pull_decay_and_sign(to_param: Tensor, to_grad: Tensor, hyper: dict) -> Tensor:
    """The pull through the gradient that a rule sees, g = ±grad + weight_decay · param.

    `to_grad` is the cotangent of g; `to_param` is added to in place. Returns the cotangent of grad.
    """
    if hyper["weight_decay"] != 0:
        to_param.add_(to_grad, alpha=hyper["weight_decay"])
    return to_grad.neg_() if hyper["maximize"] else to_grad
