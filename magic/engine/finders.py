"""Who finds, on the way back, what was asked for beside the scores (`magic.engine.asked`).

Each is a listener, and what it finds is a tensor with a leading axis of the K targets. They lie under flat
names in `Progress.more`, so that a note of the work in a folder has them, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.run import Run
from ..training.state import Cotangent
from ..training.update import Slopes, Slots
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
        run, t = self.run, traced.state.step
        shape = (cotangent.targets, len(run.updates), len(self.names))
        found = next(iter(cotangent.params.values())).new_zeros(shape)
        for bundle in bundles(run, traced):
            slopes = run.updates[bundle.group].slopes
            if slopes is not None:
                found[:, bundle.group] += self._products(slopes(*bundle.given()), bundle, cotangent)
        check_finite(found, cotangent, t)
        for hyper, x in zip(self.names, found.unbind(-1), strict=True):
            self.found.rows_of(f"hypers/{hyper}", x[:, None].expand(-1, run.steps, -1))[:, t] = x

    def _products(self, slopes: Slopes, bundle: Bundle, cotangent: Cotangent) -> Tensor:
        """(K, names): the sum of factor · ⟨cotangent, tensor⟩ over the terms of each hyper-parameter. A
        tensor that stands in several terms is multiplied once."""
        total = next(iter(cotangent.params.values())).new_zeros(cotangent.targets, len(self.names))
        rows: dict[str, Tensor] = {}
        products: dict[tuple[str, int], Tensor] = {}
        for place, hyper in enumerate(self.names):
            for what, factor, x in slopes.get(hyper, []):
                if what not in rows:
                    rows[what] = bundle.rows(cotangent, what)
                if (what, id(x)) not in products:
                    products[what, id(x)] = rows[what] @ x
                total[:, place].add_(products[what, id(x)], alpha=factor)
        return total


@dataclass(frozen=True, eq=False)
class Bundle:
    """Entries of parameters of one group whose optimizer has made as many steps, laid end to end.

    A hyper-parameter moves all entries by the same formula. So it is evaluated for many small parameters at
    once, and for a large one in pieces, whose memory is bounded and stays in the processor's cache.

    pieces  (name, which entries of the flattened parameter)
    inputs  for each of these what the update took: (param, grad, slots, hyper, the slots after it or None)
    """

    group: int
    pieces: list[tuple[str, slice]]
    inputs: list[tuple]

    def given(self) -> tuple:
        """The same for all of them as one vector."""
        params, grads, slots, hypers, after = zip(*self.inputs, strict=True)
        joined = None if after[0] is None else self._slots(after)
        return self._end_to_end(params), self._end_to_end(grads), self._slots(slots), hypers[0], joined

    def rows(self, cotangent: Cotangent, what: str) -> Tensor:
        """(K, entries): the cotangent of the parameters, or of their slots of that name."""
        params, slots = cotangent.params, cotangent.slots
        whole = [params[name] if what == "param" else slots[name][what] for name, _ in self.pieces]
        return _joined([x.flatten(1)[:, entries] for x, (_, entries) in zip(whole, self.pieces, strict=True)])

    def _end_to_end(self, tensors: Iterable[Tensor]) -> Tensor:
        return _joined([x.flatten()[entries] for x, (_, entries) in zip(tensors, self.pieces, strict=True)])

    def _slots(self, slots: tuple[Slots, ...]) -> Slots:
        """What counts steps is one number for all of them."""
        return {
            k: self._end_to_end(s[k] for s in slots) if x.is_floating_point() else x
            for k, x in slots[0].items()
        }


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other along the last axis; a single one is not copied."""
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def bundles(run: Run, traced: Traced, entries: int = 65_536) -> Iterator[Bundle]:
    """All entries of the parameters that the step uses, in bundles of at most so many."""
    open_ones: dict[tuple, Bundle] = {}
    filled: dict[tuple, int] = {}
    for name, given in update_inputs(run, traced):
        param, slots, group = given[0], given[2], run.group_of[name]
        kind = (group, *slots, slots["step"].item() if "step" in slots else None)
        for begin in range(0, param.numel(), entries):
            size = min(entries, param.numel() - begin)
            if filled.get(kind, 0) + size > entries:
                yield open_ones.pop(kind)
                filled[kind] = 0
            bundle = open_ones.setdefault(kind, Bundle(group, [], []))
            bundle.pieces.append((name, slice(begin, begin + size)))
            bundle.inputs.append(given)
            filled[kind] = filled.get(kind, 0) + size
    yield from open_ones.values()


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
