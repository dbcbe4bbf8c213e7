"""Which way to do a replay within a budget: a bounded number of choices, each priced in closed form."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..training.run import Run
from . import costs
from .adjoint import CHUNK
from .trial import StepCost
from .work import USUAL, Choice, Prices, Work

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
CACHE = 40e6  # bytes of traces that targets in flight may work on, on a CPU: about an L3 cache
SHORT = 3e5  # bytes of a trace whose operations are too short for a CPU one target at a time
SWEEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)  # how many are tried, and one for each target


@dataclass(frozen=True)
class Budget:
    """What may be held.

    nbytes  on the model's device, beyond the plain loop
    host    states that fit into the host's memory, for a run on a GPU
    disk    states that fit into the folder
    """

    nbytes: int
    host: int = 0
    disk: int = 0


def parse_bytes(memory: float | str) -> int:
    """2_000_000_000 from "2GB", 2e9 or 2_000_000_000."""
    if isinstance(memory, (int, float)):
        return int(memory)
    text = str(memory).strip().upper()
    for unit in sorted(UNITS, key=len, reverse=True):
        if text.endswith(unit):
            try:
                return int(float(text[: -len(unit)]) * UNITS[unit])
            except ValueError:
                break
    raise ValueError(f'memory={memory!r}: write a number of bytes, or a string such as "500MB" or "2GB"')


def budget_of(run: Run, nbytes: int, step: StepCost, folder: Path | None) -> Budget:
    """So many bytes, and half of what is free on the host and in the folder now: others may need the rest."""
    host = disk = 0
    if run.device.type != "cpu" and hasattr(os, "sysconf"):
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2 // step.state_bytes
    if folder is not None:
        disk = shutil.disk_usage(folder).free // 2 // step.state_bytes
    return Budget(nbytes, host, disk)


def chunk_of(run: Run, step: StepCost) -> int:
    """Targets in flight at once, at most.

    A GPU takes as many as there is room for. On a CPU batching pays for calls that are too short and
    for convolutions of few channels, and costs where it leaves the cache; that was measured with one thread.
    It is settled by sizes, not by a clock, since it changes how sums are rounded.
    """
    if not step.batched:
        return 1
    if run.device.type != "cpu":
        return CHUNK
    if step.trace_bytes > SHORT and not step.convolves:
        return 1
    return min(CHUNK, max(1, int(CACHE / step.trace_bytes)))


def best(work: Work, budget: Budget, chunk: int) -> Choice | None:
    """The choice that takes the least time of those that fit; None if none does.

    How targets are grouped changes how sums are rounded, so it is chosen without a clock, by the usual
    prices; the rest is chosen by the measured ones.
    """
    choices = list(_fitting(work, budget, chunk))
    if not choices:
        return None
    group = min(choices, key=lambda c: (_time(work, c, USUAL), work.sweeps(c.group))).group
    return min((c for c in choices if c.group == group), key=lambda c: _time(work, c, work.measured))


def best_kept(work: Work, bare: Choice, budget: Budget) -> Choice:
    """What to keep for targets that are grouped as in `bare`, which keeps nothing and fits."""
    return min(_keeping(work, bare, budget), key=lambda c: _time(work, c, work.measured))


def _time(work: Work, choice: Choice, prices: Prices) -> float:
    return work.time(work.sweeps(choice.group), work.sweep(choice), prices)


def _fitting(work: Work, budget: Budget, chunk: int) -> Iterator[Choice]:
    """Choices that fit into the budget: more and more sweeps, each with fewer targets."""
    groups = {-(-work.targets // count) for count in (*SWEEPS, work.targets)}
    for group in sorted(groups, reverse=True):
        bare = Choice(group, min(chunk, group))
        while bare.chunk > 1 and work.nbytes(bare) > budget.nbytes:
            bare = replace(bare, chunk=bare.chunk // 2)
        if work.nbytes(bare) <= budget.nbytes:
            yield from _keeping(work, bare, budget)


def _keeping(work: Work, bare: Choice, budget: Budget) -> Iterator[Choice]:
    """`bare`, which keeps nothing, with what fits besides.

    Nothing, half or all of what is free goes to traces, and what is then left to states. Of the states
    that do not fit there, as many as it takes go to the host, and none, some or all of the rest to the disk.
    """
    one, steps, free = work.step, work.steps, budget.nbytes - work.nbytes(bare)
    traces = {0}
    if one.same_bits:
        traces |= {min(steps, 1 + int(share * free / one.trace_bytes)) for share in (0.5, 1)}
    for kept in sorted(traces - {1}):  # one trace at a time is made in any case
        left = free - max(kept - 1, 0) * one.trace_bytes
        needed = -(-steps // max(kept, 1))  # states: more would not save a step
        here = min(1 + left // one.state_bytes, needed)
        host = min(budget.host, needed - here)
        disk = min(budget.disk, needed - here - host)
        for on_disk in sorted({0, disk // 16, disk // 4, disk}):
            yield replace(bare, traces=kept, here=here, host=host, disk=on_disk)


def places(steps: int, choice: Choice) -> tuple[int, ...]:
    """The place of each slot for a state: 0 the model's device, 1 the host, 2 the disk.

    The invariant: no slot is used more often than one that is nearer. For given numbers of states in each
    place nothing makes fewer accesses to what is further away: exchange the places of two slots that
    violate it, and there are fewer. How often a slot is used is known before the replay, since it holds
    the states of one depth of the recursion (`costs.uses`). Stumm & Walther 2009, "MultiStage approaches".
    """
    if choice.states == choice.here:
        return (0,) * choice.here
    uses = np.zeros(choice.states, dtype=np.int64)
    known = costs.uses(steps, choice.states, choice.traces)
    uses[: len(known)] = known
    busiest_first = np.argsort(-uses, kind="stable")
    place = np.full(choice.states, 2)
    place[busiest_first[: choice.here + choice.host]] = 1
    place[busiest_first[: choice.here]] = 0
    return tuple(place.tolist())
