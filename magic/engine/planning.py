"""A plan: what a replay will keep, repeat and cost, settled before it starts from a budget in bytes.

One step is done and measured (`trial`): what a state takes, what a trace takes, what a target takes on its
way back, and how long each is. Then the choices that fit are compared by the time that they are expected to
take (`search`): how many targets go back in one sweep, how many states and traces are kept, and where.

`memory` is a bound on everything that a replay holds beyond the plain training loop, on the model's
device. States that do not fit are recomputed, kept in the host's memory (of a GPU's run), or put into
a folder.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..show import Table
from ..training.run import Run
from . import costs, schedule, search, timeline
from .asked import WEIGHTS, Asked
from .files import writable
from .trial import StepCost, measure_step
from .work import USUAL, Choice, Prices, Sweep, Work

PLACES = ("memory", "host memory", "disk")


@dataclass(frozen=True, repr=False)
class Plan(Table):
    """A replay, settled. `print` it for what it costs, `timeline()` for what it does when.

    work      what is to be done: T steps, K targets, and what a step takes
    group     targets that go back in one sweep; ⌈K / group⌉ sweeps are made
    chunk     targets in flight at once within a step, at most
    traces    traces kept
    tier_of   the place of each slot for a state: 0 the model's device, 1 the host, 2 the disk
    room      the budget in bytes; None for a plan that was made from a number of states or a schedule
    given     the actions of a schedule that was given
    """

    work: Work
    group: int
    chunk: int
    traces: int
    tier_of: tuple[int, ...]
    room: int | None
    given: tuple[schedule.Action, ...] | None = None

    @property
    def steps(self) -> int:
        """T, the steps of the run."""
        return self.work.steps

    @property
    def targets(self) -> int:
        """K, the numbers that are differentiated."""
        return self.work.targets

    @property
    def trial(self) -> StepCost:
        """What one step takes, as it was measured."""
        return self.work.step

    @property
    def states(self) -> int:
        """States kept at once, s_0 among them."""
        return len(self.tier_of)

    @property
    def sweeps(self) -> int:
        """Ways down and back, one for each group of targets."""
        return self.work.sweeps(self.group)

    def of(self, targets: int, steps: int) -> Plan:
        """This plan for a measure of so many targets; ValueError for one whose budget is for others."""
        if steps != self.steps or (self.room is not None and targets != self.targets):
            raise ValueError(
                f"the plan is for {self.targets} targets and {self.steps} steps; measure returns {targets}, "
                f"the run has {steps}: magic.plan(run, targets={targets}, ...)"
            )
        group = targets if self.room is None else self.group
        return replace(self, work=replace(self.work, targets=targets), group=group)

    def regrouped(self, group: int, chunk: int) -> Plan:
        """This plan with targets grouped so, and as many states and traces as its budget then holds.

        Rounding depends on how targets are grouped, so work that was begun must go on with its own groups.
        Raises ValueError, with the least that works, for a budget too small for that.
        """
        plan = replace(self, group=group, chunk=chunk)
        if plan.room is None or plan.nbytes <= plan.room:
            return plan
        bare = Choice(group, min(chunk, group))
        least = self.work.nbytes(bare)
        if least > plan.room:
            raise ValueError(
                f"this folder's work began with {group} targets a sweep, which its rounding depends on; with "
                f"them memory={plan.room:,} bytes is too little, and the least that works is "
                f"{least:,}. Give as much, or another folder"
            )
        budget = search.Budget(plan.room, self.tier_of.count(1), self.tier_of.count(2))
        kept = search.best_kept(self.work, bare, budget)
        return replace(plan, traces=kept.traces, tier_of=search.places(self.steps, kept))

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
        """What one sweep takes. Only a schedule that was given is walked through for it."""
        if self.given is None:
            return costs.binomial(self.steps, self.states, self.traces)
        return schedule.check(self.given, self.steps)

    @property
    def extra(self) -> int:
        """Steps done in one sweep in addition to the T of the training; see `Cost.extra`."""
        return self.cost.extra

    @cached_property
    def disk_accesses(self) -> int:
        """How often one sweep writes, reads or drops a file of a state."""
        if 2 not in self.tier_of:
            return 0
        uses = costs.uses(self.steps, self.states, self.traces).tolist()
        return sum(count for tier, count in zip(self.tier_of, uses, strict=False) if tier == 2)

    @property
    def seconds(self) -> float:
        """The time that it takes, as expected; training included."""
        return self._time(self.work.measured)

    @property
    def effort(self) -> float:
        """The time in plain training steps, as they usually compare."""
        return self._time(USUAL)

    def _time(self, prices: Prices) -> float:
        one = Sweep(self.cost.advanced, self.cost.traced, self.disk_accesses)
        return self.work.time(self.sweeps, one, prices)

    @property
    def nbytes(self) -> int:
        """Bytes held at the peak on the model's device, as expected."""
        here = self.tier_of.count(0)
        return self.work.nbytes(Choice(self.group, min(self.chunk, self.group), self.traces, here))

    def timeline(self, width: int = 64) -> str:
        """A picture in text of one sweep: training steps from left to right, time from top to bottom."""
        return timeline.draw(self.actions(), self.steps, width)

    @property
    def caption(self) -> str:
        return f"Replay of {self.steps:,} steps"

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table: what, and how much."""
        return [(what, full) for what, full, _ in self._facts()]

    def __str__(self) -> str:
        return f"replay of {self.steps:,} steps: " + "".join(short for *_, short in self._facts())

    def _facts(self) -> list[tuple[str, str, str]]:
        """What is told of a plan: a name, how much in full, and the same as a part of one sentence."""
        one, states, sweeps = self.trial, self.states, self.sweeps
        where = Counter(self.tier_of)
        places = ", ".join(f"{where[i]:,} in {PLACES[i]}" for i in sorted(where))
        far = f" ({where[2]:,} on disk)" if where[2] else f" ({where[1]:,} on the host)" if where[1] else ""
        kept = f"{states:,} state{'s' * (states > 1)} kept{far}"
        facts = [("states kept", f"{places}; {one.state_bytes / 1e6:,.2f} MB each", kept)]
        if self.traces:
            each = f"{self.traces:,}; {one.trace_bytes / 1e6:,.2f} MB each"
            facts.append(("traced steps kept", each, f" and {self.traces:,} traced steps"))
        memory = f"{self.nbytes / 1e6:,.1f} MB"
        budget = f" of {self.room / 1e6:,.1f}" if self.room else ""
        facts.append(("memory", f"{memory}{budget}{' MB' if budget else ''}", f", {memory}{budget}"))
        rate = f"({self.extra / self.steps:.2f} per step)"
        extra = f"{self.extra:,} extra steps {rate}"
        facts.append(("extra steps", f"{self.extra:,} a sweep {rate}", f"; {extra}"))
        grouped = f"; {sweeps} sweeps of {self.group} targets" if sweeps > 1 else ""
        flight = f"{min(self.chunk, self.group)} in flight"
        many = f"{self.targets:,} in {sweeps} sweep{'s' * (sweeps > 1)}, {flight}"
        facts += [("targets", many, grouped), ("time", f"about {self.seconds:.2g} s, training included", "")]
        if not one.batched:
            why = "an operation of this model cannot be batched: targets go back one by one"
            facts.append(("slow", why, ""))
        return facts


def plan(
    run: Run,
    targets: int = 1,
    memory: float | str | None = None,
    *,
    disk: str | os.PathLike | None = None,
    states: int | None = None,
    actions: Iterable[schedule.Action] | None = None,
) -> Plan:
    """How the metagradient of `targets` numbers would be computed within `memory` bytes.

    memory   bound on what the replay holds beyond the plain loop, on the model's device; None is "1GB"
    disk     a folder for states that do not fit; half of what is free there is used at most
    states   keep this many states instead, s_0 among them, and recompute the others
    actions  or follow this schedule, such as magic.schedule.kary(run.steps, 4)

    Raises ValueError, with the least that works, for a budget too small, for an illegal schedule, and for
    arguments of which one would be passed over: a number of states or a schedule leaves nothing to `memory`.
    """
    one_way(states=states, actions=actions)
    for budget in ({"memory": memory}, {"disk": disk}):
        one_way(**budget, states=states)
        one_way(**budget, actions=actions)
    if states is None and actions is None:
        return plan_within(run, targets, memory, disk)
    _check_targets(targets)
    given = None if actions is None else tuple(actions)
    if given is None:
        count, traces = min(_checked_states(states), run.steps), 0
    else:
        took = schedule.check(given, run.steps)
        count, traces = max(1, took.peak_states), took.peak_traces if took.traced else 0
    work = _work(run, targets, measure_step(run, targets))
    return Plan(work, targets, search.chunk_of(run, work.step), traces, (0,) * count, None, given)


def plan_within(
    run: Run,
    targets: int,
    memory: float | str | None = None,
    disk: str | os.PathLike | None = None,
    measure_bytes: int = 0,
    asked: Asked = WEIGHTS,
) -> Plan:
    """The fastest plan within a budget. Differentiating one output of the measure holds `measure_bytes`.

    Room is left for what is `asked` for beside the scores. Raises ValueError, with the least that works, for
    a budget too small.
    """
    _check_targets(targets)
    memory = "1GB" if memory is None else memory
    room = search.parse_bytes(memory)
    folder = writable(disk) if disk is not None else None
    step = measure_step(run, targets, folder, asked.examples is not None)
    work = _work(run, targets, step, measure_bytes, asked)
    budget = search.budget_of(run, room, work.step, folder)
    choice = search.best(work, budget, search.chunk_of(run, work.step))
    if choice is None:
        least, scores = work.nbytes(Choice(1, 1)), targets * work.row_bytes
        raise ValueError(
            f"memory={memory!r} is too little for this run; the least that works is {least:,} bytes"
            + ("" if targets == 1 else f", of which {scores:,} are the results of {targets:,} targets")
        )
    tier_of = search.places(run.steps, choice)
    made = Plan(work, choice.group, choice.chunk, choice.traces, tier_of, room)
    return made if run.ranks is None else run.ranks.agreed(made)  # clocks differ


def _work(run: Run, targets: int, step: StepCost, measure_bytes: int = 0, asked: Asked = WEIGHTS) -> Work:
    row_bytes = math.prod(run.shape) * run.dtype.itemsize + asked.row_bytes(run)
    return Work(run.steps, targets, step, row_bytes, measure_bytes)


def _check_targets(targets: int) -> None:
    if not isinstance(targets, int) or targets < 1:
        raise ValueError(f"targets={targets!r}: the number K of measured outputs is an integer, at least 1")


def _checked_states(states: object) -> int:
    if not isinstance(states, int):
        raise TypeError(f"states={states!r}: the number of states to keep is an integer")
    if states < 1:
        raise ValueError(f"states={states}: s_0 is always kept, so at least 1")
    return states


def one_way(**given) -> None:
    """Raise ValueError if more than one of these is given."""
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} contradict each other: give one of them")
