"""Ways in which a number may escape from the graph of a step, so that the step's derivative misses it.

None of them is wrong by itself: a loss may print a number. But a number that has left the graph may come
back, as a factor or through NumPy, and then the derivative of the step lacks a part. So each way is noted,
and a step in which one was taken is compared with finite differences (`magic.engine.witness`). Noted are

- operations that make floating-point numbers without a graph out of tensors that have one;
- stopped tensors that lead nowhere: nothing of the step was made of them, as far as its graph shows;
- autograd Functions of the user's, whose backward may be another derivative than their forward's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from .graph import graph_nodes

FUNCTION = "the autograd Function "  # a reason that is checked once for each Function
# These take from a tensor its shape and type only, so nothing escapes by them.
OF_ITS_SHAPE = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "expand_as",
}  # fmt: skip


class Escapes:
    """What was noted while a loss was computed; `open` until its gradient is taken."""

    def __init__(self, open: bool = True):
        self.reasons: dict[str, bool] = {}
        self.open = open
        self._stops: list = []  # the graph's nodes at stopped tensors
        self._seen: list = []  # its nodes at tensors of which masks or indices were made

    def note(self, func: Callable) -> None:
        """A number may have escaped by this function."""
        self.reasons[getattr(func, "__name__", str(func))] = True

    def stopped(self, x: Tensor) -> Tensor:
        """x, which has just been stopped, and is looked for in the graph of the step afterwards."""
        if self.open:
            self._stops.append(x.grad_fn)
        return x

    def after(self, func: Callable, args: tuple, kwargs: dict, out):
        """The output of an operation, which is noted if the graph ends there."""
        with torch._C.DisableTorchFunction():
            if not self.open or (isinstance(out, Tensor) and out.requires_grad):
                return out
            made = [x for x in tree_iter(out) if isinstance(x, Tensor) and not x.requires_grad]
            if made:
                given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
                if not any(x.is_floating_point() or x.is_complex() for x in made):  # a mask, an index
                    self._seen += [x.grad_fn for x in given]
                elif given and getattr(func, "__name__", "") not in OF_ITS_SHAPE:
                    self.note(func)
            return out

    def found(self, ends: Iterable[Tensor]) -> tuple[str, ...]:
        """The reasons to compare a step, whose loss and buffers are `ends`, with differences. Asked once.

        Invariant: after this call, no node is held here. Some of the graph's nodes hold this object (see
        `_Stop`), and a circle that goes through autograd is never freed.
        """
        nodes: set = set(graph_nodes([*ends, *self._seen]))
        own = torch.autograd.function.BackwardCFunction
        # PyTorch's stub of this class leaves out the name that every node has
        names = sorted({node.name() for node in nodes if isinstance(node, own)})  # type: ignore[attr-defined]
        functions = [FUNCTION + name for name in names if not name.startswith("_")]
        lost = sum(node not in nodes for node in self._stops)
        self._stops, self._seen = [], []
        if not lost:
            return (*self.reasons, *functions)
        # Whatever a user's Function computes runs under no_grad, so some are lost in every step. With the
        # Function's name in front of the count, this reason is checked again only where the count changes.
        return (*self.reasons, f"{FUNCTION * bool(functions)}{lost} × detach", *functions)
