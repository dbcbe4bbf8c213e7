"""Who finds, on the way back, what was asked for beside the scores (`magic.engine.asked`).

Each is a listener, and what it finds is a tensor with a leading axis of the K targets. They lie under flat
names in `Progress.more`, so that a note of the work in a folder has them, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.run import Run
from ..training.state import Cotangent
from .adjoint import Rows, update_inputs
from .asked import Asked
from .listeners import Listener, check_finite
from .resume import Progress
from .tracing import Traced


def finders(run: Run, asked: Asked, found: Progress) -> list[Listener]:
    """Those who find what is asked for."""
    heard: list[Listener] = []
    if asked.start:
        heard.append(OfStart(found))
    if asked.hypers:
        heard.append(OfHypers(run, asked.hypers, found))
    if asked.examples is not None:
        heard.append(OfData(run, asked.examples, found))
    return heard


class OfStart(Listener):
    """Keeps the cotangent of s_0."""

    def __init__(self, found: Progress):
        self.found = found

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        if traced.state.step == 0:
            for name, c in cotangent.flatten().items():
                check_finite(c, cotangent, 0)
                self.found.rows_of(f"start/{name}", c)[:] = c


class OfHypers(Listener):
    """Adds up, over the parameters of each group, how they and their slots move with its hyper-parameters."""

    def __init__(self, run: Run, names: tuple[str, ...], found: Progress):
        self.run, self.names, self.found = run, names, found

    def pulling(self, traced: Traced, cotangent: Cotangent) -> None:
        """A tensor that stands in the terms of several hyper-parameters is multiplied once."""
        run, t = self.run, traced.state.step
        shape = (cotangent.targets, len(run.updates), len(self.names))
        found = next(iter(cotangent.params.values())).new_zeros(shape)
        for name, given in update_inputs(run, traced):
            group = run.group_of[name]
            slopes_of = run.updates[group].slopes
            slopes = slopes_of(*given) if slopes_of is not None else {}
            after = {"param": cotangent.params[name], **cotangent.slots[name]}
            products: dict[tuple[str, int], Tensor] = {}
            for place, hyper in enumerate(self.names):
                for what, factor, x in slopes.get(hyper, []):
                    term = (what, id(x))
                    if term not in products:
                        products[term] = after[what].flatten(1) @ x.flatten()
                    found[:, group, place].add_(products[term], alpha=factor)
        check_finite(found, cotangent, t)
        for hyper, x in zip(self.names, found.unbind(-1), strict=True):
            self.found.rows_of(f"hypers/{hyper}", x[:, None].expand(-1, run.steps, -1))[:, t] = x


class OfData(Listener):
    """Adds up what each step hands on to the inputs of its batch, for the examples that were asked for.

    Raises NonFinite for the first step at which that is not finite.
    """

    def __init__(self, run: Run, examples: Tensor, found: Progress):
        self.run, self.found, self.count = run, found, len(examples)
        self.place = torch.full((run.n,), -1, device="cpu")
        self.place[examples] = torch.arange(len(examples), device="cpu")

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        to = self.place[self.run.batches[traced.state.step].cpu()]
        here = to >= 0
        for i, x in rows.data.items():
            check_finite(x, cotangent, traced.state.step)
            like = x.new_zeros(1).expand(len(x), self.count, *x.shape[2:])
            into = self.found.rows_of(f"data/{i}", like)
            into.index_add_(1, to[here].to(x.device), x[:, here.to(x.device)])
