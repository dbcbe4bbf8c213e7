"""What a replay has to do, one way of doing it, and what that takes in bytes and in time."""

from __future__ import annotations

from dataclasses import dataclass

from . import costs
from .trial import StepCost


@dataclass(frozen=True)
class Choice:
    """One way of doing it.

    group    targets that go back in one sweep
    chunk    targets in flight at once within a step, at most `group`
    traces   traces kept
    here     states kept on the model's device, s_0 among them
    host     states kept in the host's memory
    disk     states kept in a folder
    """

    group: int
    chunk: int
    traces: int = 0
    here: int = 1
    host: int = 0
    disk: int = 0

    @property
    def states(self) -> int:
        """States kept at once, wherever they are."""
        return self.here + self.host + self.disk


@dataclass(frozen=True)
class Sweep:
    """What one sweep does beside its adjoints.

    advanced, traced   steps done by Advance and by Trace
    accesses           how often a file of a state is written, read or dropped
    """

    advanced: int
    traced: int
    accesses: int


@dataclass(frozen=True)
class Prices:
    """What a step takes, a trace, a pull of one target, and a file written or read."""

    step: float
    trace: float
    pull: float
    access: float


# The prices in plain training steps, as they usually compare. Counted in forward passes, a step takes three,
# one forward and two for the way back; a trace takes the same three, and pulling through it another six
# (chapter 07, section 6). That is 1 and 2, and a fifth is added to the trace for autograd's book-keeping.
# Measured on small networks with one thread, the medians were 1.6 and 1.9. A file is taken to cost a step.
USUAL = Prices(step=1.0, trace=1.2, pull=2.0, access=1.0)


@dataclass(frozen=True)
class Work:
    """What is to be done, and what its pieces take.

    steps, targets  T and K
    step            one step, measured
    row_bytes       a target's row of scores
    measure_bytes   what differentiating one output of the measure holds; 0 where it is not known yet
    """

    steps: int
    targets: int
    step: StepCost
    row_bytes: int
    measure_bytes: int = 0

    def sweeps(self, group: int) -> int:
        """How many sweeps are made if so many targets go back in one."""
        return -(-self.targets // group)

    def nbytes(self, choice: Choice) -> int:
        """Bytes held at the peak on the model's device, beyond the plain loop.

        s_0 is the run's own and needs no room; the states before and after the step in work come on top.
        """
        one = self.step
        kept = (choice.here - 1 + 2) * one.state_bytes + max(choice.traces, 1) * one.trace_bytes
        # Three things come one after another, so that the largest of them counts.
        flight = max(choice.chunk * one.pull_bytes, choice.chunk * self.measure_bytes, one.check_bytes)
        return kept + choice.group * one.target_bytes + flight + self.targets * self.row_bytes

    def sweep(self, choice: Choice) -> Sweep:
        """What one sweep does, in closed form."""
        kept = self.steps, choice.states, choice.traces
        accesses = costs.least_used(*kept, choice.disk) if choice.disk else 0
        return Sweep(costs.advanced(*kept), self.steps if choice.traces else 0, accesses)

    def time(self, sweeps: int, sweep: Sweep, prices: Prices) -> float:
        """What it all takes, training included.

        Each step is traced once in every sweep, by a Trace or by its adjoint. Where a trace does not give
        training's bits, the step is done as well.
        """
        again = 0 if self.step.same_bits else sweep.traced
        one = (
            (sweep.advanced + again) * prices.step
            + self.steps * prices.trace
            + sweep.accesses * prices.access
        )
        return sweeps * one + self.steps * self.targets * prices.pull

    @property
    def measured(self) -> Prices:
        """The prices in seconds, as they were measured; a state was written and read, two accesses."""
        one = self.step
        return Prices(one.step_seconds, one.trace_seconds, one.pull_seconds, one.disk_seconds / 2)
