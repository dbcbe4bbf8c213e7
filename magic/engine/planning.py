"""What a replay will keep, repeat and cost, settled before it starts from a budget in bytes.

One step is tried and measured: what a state takes, what a trace takes, what a target takes on its way
back, and how long each is. Then the plans that fit are compared by the time they are expected to take:
how many targets go back in one sweep, how many states and traces are kept, and where.

`memory` is a bound on everything that a replay holds beyond the plain training loop, on the model's
device. States that do not fit are recomputed, kept in the host's memory (of a GPU's run), or put into
a folder. The slots used most often stay nearest (Stumm & Walther 2009, "MultiStage approaches").
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..show import Table
from ..training.run import Run
from . import costs, schedule, timeline
from .files import writable
from .trial import Trial, try_step
from .vjp import CHUNK

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
CACHE = 40e6  # bytes of traces that targets in flight may work on, on a CPU: about an L3 cache
SHORT = 3e5  # bytes of a trace whose operations are too short for a CPU one target at a time
PLACES = ("memory", "host memory", "disk")


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


@dataclass(frozen=True, repr=False)
class Plan(Table):
    """A replay, settled. `print` it for what it costs, `timeline()` for what it does when.

    steps, targets   T and K
    group            targets that go back in one sweep; ⌈K / group⌉ sweeps are made
    chunk            targets in flight at once within a step, at most
    traces           traces kept
    tier_of          the place of each slot for a state: 0 the model's device, 1 the host, 2 the disk
    nbytes           what is held at the peak on the model's device, as expected; `room` is the budget
    seconds          what it takes, as expected; training included
    """

    steps: int
    targets: int
    group: int
    chunk: int
    traces: int
    tier_of: tuple[int, ...]
    trial: Trial
    room: int | None
    values_bytes: int
    measuring: int = 0
    given: tuple[schedule.Action, ...] | None = None

    @property
    def states(self) -> int:
        """States kept at once, s_0 among them."""
        return len(self.tier_of)

    def of(self, targets: int, steps: int) -> Plan:
        """This plan for a measure of so many targets; ValueError for one whose budget is for others."""
        if steps != self.steps or (self.room is not None and targets != self.targets):
            raise ValueError(
                f"the plan is for {self.targets} targets and {self.steps} steps; measure returns {targets}, "
                f"the run has {steps}: magic.plan(run, targets={targets}, ...)"
            )
        group = targets if self.room is None else self.group
        return replace(self, targets=targets, group=group)

    def regrouped(self, group: int, chunk: int) -> Plan:
        """This plan with targets grouped so, which rounding depends on, and as many states and traces as
        its budget then holds; ValueError, with the least that works, for a budget too small for that."""
        plan = replace(self, group=group, chunk=chunk)
        if plan.room is None or plan.nbytes <= plan.room:
            return plan
        plan = replace(plan, traces=0, tier_of=(0,))
        if plan.nbytes > plan.room:
            raise ValueError(
                f"this folder's work began with {group} targets a sweep, which its rounding depends on; with "
                f"them memory={plan.room:,} bytes is too little, and the least that works is "
                f"{plan.nbytes:,}. Give as much, or another folder"
            )
        further = self.tier_of.count(1), self.tier_of.count(2)
        return min(_kept(plan, further), key=lambda p: p.seconds)

    @property
    def sweeps(self) -> int:
        return -(-self.targets // self.group)

    def policy(self, steps: int) -> Iterable[schedule.Action]:
        """The actions for a run of so many steps."""
        if self.given is not None and steps == self.steps:
            return self.given
        if self.states >= steps and not self.traces:
            return schedule.store_all(steps)
        return schedule.binomial(steps, self.states, self.traces)

    def actions(
        self, kept: Iterable[int] | None = None, steps: int | None = None
    ) -> Iterator[schedule.Action]:
        """The schedule of a sweep; with `kept`, of one that goes on from these states on disk."""
        if kept is None:
            return iter(self.policy(self.steps))
        return schedule.resumed(kept, self.steps if steps is None else steps, self.policy)

    @cached_property
    def cost(self) -> schedule.Cost:
        """What one sweep takes."""
        if self.given is None:
            return costs.binomial(self.steps, self.states, self.traces)
        return schedule.check(self.actions(), self.steps)

    @property
    def extra(self) -> int:
        """Steps done again in one sweep, beyond the training's and the one that each adjoint needs."""
        return self.cost.extra

    @cached_property
    def disk_accesses(self) -> int:
        if 2 not in self.tier_of:
            return 0
        uses = costs.uses(self.steps, self.states, self.traces)
        return sum(count for tier, count in zip(self.tier_of, uses, strict=False) if tier == 2)

    @cached_property
    def seconds(self) -> float:
        one = self.trial
        return self._time(one.step_seconds, one.trace_seconds, one.pull_seconds, one.disk_seconds / 2)

    @property
    def effort(self) -> float:
        """The time in plain training steps, as they usually compare."""
        return self._time(1.0, 1.2, 2.0, 1.0)

    def _time(self, step: float, trace: float, pull: float, disk: float) -> float:
        again = 0 if self.trial.same_bits else self.cost.traced
        sweep = (self.cost.advanced + again) * step + self.steps * trace + self.disk_accesses * disk
        return self.sweeps * sweep + self.steps * self.targets * pull

    @property
    def nbytes(self) -> int:
        here, chunk = self.tier_of.count(0), min(self.chunk, self.group)
        return _needs(self.trial, self.group, chunk, here, self.traces, self.values_bytes, self.measuring)

    def timeline(self, width: int = 64) -> str:
        """A picture in text of one sweep: training steps from left to right, time from top to bottom."""
        return timeline.draw(self.actions(), self.steps, width)

    @property
    def caption(self) -> str:
        return f"Replay of {self.steps:,} steps"

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table: what, and how much."""
        one, flight = self.trial, min(self.chunk, self.group)
        where = Counter(self.tier_of)
        kept = [f"{where[i]:,} in {PLACES[i]}" for i in sorted(where)]
        rows = [("states kept", f"{', '.join(kept)}; {one.state_bytes / 1e6:,.2f} MB each")]
        if self.traces:
            rows.append(("traced steps kept", f"{self.traces:,}; {one.trace_bytes / 1e6:,.2f} MB each"))
        rows += [
            (
                "targets",
                f"{self.targets:,} in {self.sweeps} sweep{'s' * (self.sweeps > 1)}, {flight} in flight",
            ),
            ("steps done again", f"{self.extra:,} a sweep ({self.extra / self.steps:.2f} per step)"),
            (
                "memory",
                f"{self.nbytes / 1e6:,.1f} MB" + (f" of {self.room / 1e6:,.1f} MB" if self.room else ""),
            ),
            ("time", f"about {self.seconds:.2g} s, training included"),
        ]
        if not one.batched:
            rows.append(("slow", "an operation of this model cannot be batched: targets go back one by one"))
        return rows

    def __str__(self) -> str:
        where = Counter(self.tier_of)
        kept = f"{self.states:,} state{'s' * (self.states > 1)} kept"
        kept += f" ({where[2]:,} on disk)" if where[2] else f" ({where[1]:,} on the host)" if where[1] else ""
        kept += f" and {self.traces:,} traced steps" if self.traces else ""
        size = f"{self.nbytes / 1e6:,.1f} MB" + (f" of {self.room / 1e6:,.1f}" if self.room else "")
        again = f"{self.extra:,} steps done again ({self.extra / self.steps:.2f} per step)"
        sweeps = f"; {self.sweeps} sweeps of {self.group} targets" if self.sweeps > 1 else ""
        return f"replay of {self.steps:,} steps: {kept}, {size}; {again}{sweeps}"


def _needs(one: Trial, group: int, chunk: int, states: int, traces: int, values: int, measuring: int) -> int:
    """Bytes held at the peak: s_0 is the run's own; the state before and after a step come on top."""
    kept = (states - 1 + 2) * one.state_bytes + max(traces, 1) * one.trace_bytes
    flight = max(chunk * one.pull_bytes, chunk * measuring, one.check_bytes)
    return kept + group * one.target_bytes + flight + values


def plan(
    run: Run,
    targets: int = 1,
    memory: float | str | None = None,
    *,
    disk: str | os.PathLike | None = None,
    states: int | None = None,
    actions: Iterable[schedule.Action] | None = None,
    measuring: int = 0,
) -> Plan:
    """How the metagradient of `targets` numbers would be computed within `memory` bytes.

    memory   bound on what the replay holds beyond the plain loop, on the model's device; None is "1GB"
    disk     a folder for states that do not fit; half of what is free there is used at most
    states   keep this many states instead, s_0 among them, and recompute the others
    actions  or follow this schedule, such as magic.schedule.kary(run.steps, 4)
    measuring  bytes that differentiating one target of the measure holds; magic.attribute tries it

    Raises ValueError, with the least that works, for a budget too small, for an illegal schedule, and for
    arguments of which one would be passed over: a number of states or a schedule leaves nothing to `memory`.
    """
    _one_way(states=states, actions=actions)
    for budget in ({"memory": memory}, {"disk": disk}):
        _one_way(**budget, states=states)
        _one_way(**budget, actions=actions)
    memory = "1GB" if memory is None else memory
    if not isinstance(targets, int) or targets < 1:
        raise ValueError(f"targets={targets!r}: the number K of measured outputs is an integer, at least 1")
    if states is not None and not isinstance(states, int):
        raise TypeError(f"states={states!r}: the number of states to keep is an integer")
    room = parse_bytes(memory) if states is None and actions is None else None
    folder = writable(disk) if disk is not None else None
    one = try_step(run, targets, folder)
    values = targets * run.n * torch.finfo(run.dtype).bits // 8
    chunk = _chunk(run, one)
    if room is None:
        given = None if actions is None else tuple(actions)
        count = schedule.check(given, run.steps).peak_states if given else min(states, run.steps)
        if count < 1:
            raise ValueError(f"states={states}: s_0 is always kept, so at least 1")
        return Plan(run.steps, targets, targets, chunk, 0, (0,) * count, one, None, values, measuring, given)
    least = _needs(one, 1, 1, 1, 0, values, measuring)
    if room < least:
        raise ValueError(
            f"memory={memory!r} is too little for this run; the least that works is {least:,} bytes"
            + ("" if targets == 1 else f", of which {values:,} are the scores of {targets:,} targets")
        )
    further = _further(run, one, folder)
    blank = Plan(run.steps, targets, 1, chunk, 0, (0,), one, room, values, measuring)
    plans = list(_fitting(blank, further))
    # How targets are grouped changes rounding, so it is chosen without a clock; the rest by measured time.
    group = min(plans, key=lambda p: (p.effort, p.sweeps)).group
    return min((p for p in plans if p.group == group), key=lambda p: p.seconds)


def _one_way(**given) -> None:
    """Raise ValueError if more than one of these is given."""
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} contradict each other: give one of them")


def _chunk(run: Run, one: Trial) -> int:
    """Targets in flight at once, at most.

    A GPU takes as many as there is room for. On a CPU batching pays for calls that are too short and
    for convolutions of few channels, and costs where it leaves the cache; measured, with one thread.
    It is settled by sizes, not by a clock, since it changes how sums are rounded.
    """
    if not one.batched:
        return 1
    if run.device.type != "cpu":
        return CHUNK
    if one.trace_bytes > SHORT and not one.convolves:
        return 1
    return min(CHUNK, max(1, int(CACHE / one.trace_bytes)))


def _fitting(blank: Plan, further: tuple[int, int]) -> Iterator[Plan]:
    """Plans that fit into the room: more and more sweeps, without traces and with as many as fit."""
    sweeps = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, blank.targets}
    for group in sorted({-(-blank.targets // count) for count in sweeps}, reverse=True):
        plan = replace(blank, group=group, chunk=min(blank.chunk, group))
        while plan.chunk > 1 and plan.nbytes > plan.room:
            plan = replace(plan, chunk=plan.chunk // 2)
        if plan.nbytes <= plan.room:
            yield from _kept(plan, further)


def _kept(plan: Plan, further: tuple[int, int]) -> Iterator[Plan]:
    """This plan, which keeps nothing yet, without traces and with as many as fit, and with states."""
    one, steps, free = plan.trial, plan.steps, plan.room - plan.nbytes
    traces = {0}
    if one.same_bits:
        traces |= {min(steps, 1 + int(share * free / one.trace_bytes)) for share in (0.5, 1)}
    for kept in traces - {1}:
        left = free - max(kept - 1, 0) * one.trace_bytes
        here = 1 + left // one.state_bytes if kept < steps else 1
        for tiers in _tiers(steps, kept, here, further):
            yield replace(plan, traces=kept, tier_of=tiers)


def _tiers(steps: int, traces: int, here: int, further: tuple[int, int]) -> Iterator[tuple[int, ...]]:
    """Places of the slots: without and with what lies further away; the busiest slots stay nearest."""
    needed = -(-steps // max(traces, 1))
    here = min(here, needed)
    host = min(further[0], needed - here)
    disk = min(further[1], needed - here - host)
    for on_disk in {0, disk // 16, disk // 4, disk}:
        count = here + host + on_disk
        if count == here:
            yield (0,) * here
            continue
        uses = costs.uses(steps, count, traces)
        uses += [0] * (count - len(uses))
        order = sorted(range(count), key=lambda slot: (-uses[slot], slot))
        place = {slot: 0 if i < here else 1 if i < here + host else 2 for i, slot in enumerate(order)}
        yield tuple(place[slot] for slot in range(count))


def _further(run: Run, one: Trial, folder: Path | None) -> tuple[int, int]:
    """States that fit into the host's memory, for a run on a GPU, and into the folder: half of the room."""
    host = disk = 0
    if run.device.type != "cpu" and hasattr(os, "sysconf"):
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2 // one.state_bytes
    if folder is not None:
        disk = shutil.disk_usage(folder).free // 2 // one.state_bytes
    return host, disk
