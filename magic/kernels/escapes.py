"""Ways on which a number may leave the graph of a step, so that its derivative misses them.

None is wrong by itself: a loss may print a number. But what left may come back, as a factor or through
NumPy, and then the derivative of the step lacks a part. So each is noted, and a step that has one is
compared with finite differences (`magic.engine.witness`). Noted are

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
# They take from a tensor only its shape and its type.
OF_ITS_SHAPE = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "expand_as",
}  # fmt: skip


class Escapes:
    """What was noted while a loss was computed; `open` until its gradient is taken."""

    def __init__(self, open: bool = True):
        self.reasons: dict[str, bool] = {}
        self.open = open
        self._stops, self._seen = [], []

    def note(self, func: Callable) -> None:
        self.reasons[getattr(func, "__name__", str(func))] = True

    def stopped(self, x: Tensor) -> Tensor:
        """x, which was stopped here."""
        if self.open:
            self._stops.append(x.grad_fn)
        return x

    def after(self, func: Callable, args: tuple, kwargs: dict, out):
        """The output of an operation, noted if the graph ends there."""
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
        """The reasons to look at a step whose loss and buffers are `ends`. Asked once.

        The nodes are let go here: some of the graph's nodes lead back to this object, and a circle that
        goes through autograd is never freed.
        """
        own, nodes = torch.autograd.function.BackwardCFunction, set(graph_nodes([*ends, *self._seen]))
        names = sorted({node.name() for node in nodes if isinstance(node, own)})
        functions = [FUNCTION + name for name in names if not name.startswith("_")]
        lost = sum(node not in nodes for node in self._stops)
        self._stops, self._seen = [], []
        if not lost:
            return (*self.reasons, *functions)
        # A Function's forward runs under no_grad, so it has some in every step: asked anew if their number
        # changes.
        return (*self.reasons, f"{FUNCTION * bool(functions)}{lost} × detach", *functions)
