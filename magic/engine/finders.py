"""Who finds, on the way back, what was asked for beside the scores (`magic.engine.asked`).

Each is a listener, and what it finds is a tensor with a leading axis of the K targets. They lie under flat
names in `Progress.more`, so that a note of the work in a folder has them, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.run import Run
from ..training.state import Cotangent
from .adjoint import Rows
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
        heard.append(OfHypers(run, found))
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
    """Keeps what each step finds of the hyper-parameters of its groups."""

    def __init__(self, run: Run, found: Progress):
        self.run, self.found = run, found

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        t = traced.state.step
        check_finite(torch.stack(list(rows.hypers.values())), cotangent, t)
        for name, x in rows.hypers.items():
            self.found.rows_of(f"hypers/{name}", x[:, None].expand(-1, self.run.steps, -1))[:, t] = x


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
