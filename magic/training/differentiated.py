"""The adjoint of an optimizer's rule by autograd, and what a rule needs so that autograd can follow it.

A rule has training's bits, and so it uses the very operations of PyTorch's optimizer. Most of them autograd
differentiates as they stand. Of three kinds it needs help, and each has a function here: a square root, which
has no finite slope at 0 (`root`); a number that is read out of a tensor, to become a factor; and arithmetic
in a precision too low to be differentiated (`standing_for`, for both).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.valued import Valued
from .update import Hypers, Pull, Rule, Slots


@dataclass(frozen=True)
class Differentiated:
    """The adjoint of `rule`, with the interface of those that are written by hand (`update.py`).

    The rule is done once more with its graph recorded, when the pull begins and not before, so that the
    graph of one parameter is held at a time. K targets go through the graph together.
    """

    rule: Rule

    def __call__(
        self, param: Tensor, grad: Tensor, slots: Slots, hyper: dict, after: Slots | None = None
    ) -> Pull:
        def pull(cotangent: dict[str, Tensor], hypers: Hypers | None = None) -> Tensor:
            leaves, outputs = self.traced(param, grad, slots, hyper)
            inputs, results = list(leaves.values()), list(outputs.values())

            def vjp(*rows: Tensor) -> tuple[Tensor, ...]:
                return torch.autograd.grad(
                    results, inputs, rows, retain_graph=True, allow_unused=True, materialize_grads=True
                )

            rows = [cotangent[name] for name in outputs]
            if len(cotangent["param"]) > 1:
                products = torch.vmap(vjp)(*rows)
            else:
                products = tuple(x.unsqueeze(0) for x in vjp(*(c[0] for c in rows)))
            found = dict(zip(leaves, products, strict=True))
            to_grad = found.pop("grad")
            for name, product in found.items():
                cotangent[name].copy_(product)
            return to_grad

        return pull

    def traced(
        self, param: Tensor, grad: Tensor, slots: Slots, hyper: dict
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves of the rule's graph, and what it returns that depends on them.

        A slot that is an integer, as a count of steps is, has no derivative, and is no leaf.
        """
        given = {"param": param, "grad": grad} | {k: x for k, x in slots.items() if x.is_floating_point()}
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        held = {name: leaves.get(name, x) for name, x in slots.items()}
        with torch.enable_grad():
            new, made = self.rule(leaves["param"], leaves["grad"], held, hyper)
        return leaves, {name: x for name, x in ({"param": new} | made).items() if x.requires_grad}


def root(x: Tensor) -> Tensor:
    """√x, with derivative 0 at x = 0, where that of the root is infinite.

    There no gradient has been, or its square underflows, and what is divided by the root is proportional to
    the gradient: at 0 the update has the slope that its numerator alone gives (see `adam.adam_adjoint`).
    """
    if not x.requires_grad:
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def standing_for(bits: Tensor, exact: Callable[[], Tensor]) -> Tensor:
    """`bits`, with the derivative of exact(), which is the same up to rounding.

    exact() is called only where a graph is recorded.
    """
    return Valued.apply(exact(), bits.detach()) if bits.requires_grad else bits


def laid_out_as(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the memory layout of its parameter, which backward() gives to `param.grad`.

    A sum is rounded in the order of memory, so what an update sums needs it. Axes of length 1 do not count.
    """
    strides = zip(param.shape, grad.stride(), param.stride(), strict=True)
    if all(n == 1 or ours == theirs for n, ours, theirs in strides):
        return grad
    return torch.empty_like(param).copy_(grad)
