"""torch.optim.SGD: its update and the adjoint of that.

Source: torch/optim/sgd.py. Sutskever et al. 2013 for Nesterov's form.
"""

from __future__ import annotations

from torch import Tensor

from .by_hypers import of_sgd
from .update import Hypers, Pull, Slots, pull_decay_and_sign


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


def sgd_adjoint(param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None) -> Pull:
    """The adjoint of `sgd`: g = ±grad + λp, b' = μb + (1 − δ)g, p' = p − η(g + μb') with Nesterov, else
    p − ηb'; without momentum p' = p − ηg."""
    lr, momentum, nesterov = hyper["lr"], hyper["momentum"], hyper["nesterov"]
    first = "momentum_buffer" not in slots  # then b' = g

    def pull(cotangent: dict[str, Tensor], hypers: Hypers | None = None) -> Tensor:
        to_param = cotangent["param"]
        if momentum == 0:
            to_grad = to_param * -lr
        else:
            to_buffer = cotangent["momentum_buffer"]
            to_buffer.add_(to_param, alpha=-lr * (momentum if nesterov else 1.0))
            to_grad = to_buffer * (1.0 if first else 1.0 - hyper["dampening"])
            if nesterov:
                to_grad.add_(to_param, alpha=-lr)
        if hypers:
            g = (-grad if hyper["maximize"] else grad).add(param, alpha=hyper["weight_decay"])
            of_sgd(hypers, cotangent, to_grad, (param, g, slots, hyper, after))
        if momentum != 0:
            to_buffer.mul_(momentum)
        return pull_decay_and_sign(to_param, to_grad, hyper)

    return pull
