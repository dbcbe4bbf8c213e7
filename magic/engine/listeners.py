"""Who listens to the way down and back: each does one thing of its own, and knows nothing of the others.

The loop (`magic.engine.replay.reverse`) calls

    stepped(state)                        after a step of training, with the state it led to
    pulling(traced, cotangent)            before the cotangent is pulled back through a step
    pulled(traced, cotangent, rows)       after it, with the cotangent before that step and what the step adds
                                          by its examples

A listener changes neither the states nor the cotangent. A cotangent that it keeps holds its values until the
next pull only, which is made in place; for longer it needs a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..kernels.escapes import FUNCTION
from ..training.finite import NonFinite
from ..training.optim import unrounded
from ..training.record import Passed
from ..training.run import Run
from ..training.state import Cotangent, State
from . import health
from .adjoint import Rows, traced_vjp
from .resume import Directory, Progress
from .rounding import check_batching, warn_of_underflow
from .tracing import Traced
from .witness import check_step


class Listener:
    """One that hears nothing: each listener says what it wants to hear."""

    def stepped(self, state: State) -> None:
        pass

    def pulling(self, traced: Traced, cotangent: Cotangent) -> None:
        pass

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        pass


class Several(Listener):
    """Several listeners as one, told in their order."""

    def __init__(self, listeners: Sequence[Listener]):
        self.listeners = listeners

    def stepped(self, state: State) -> None:
        for listener in self.listeners:
            listener.stepped(state)

    def pulling(self, traced: Traced, cotangent: Cotangent) -> None:
        for listener in self.listeners:
            listener.pulling(traced, cotangent)

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        for listener in self.listeners:
            listener.pulled(traced, cotangent, rows)


class Bar(Listener):
    """Moves a progress bar by one at each step, on the way down and on the way back."""

    def __init__(self, shown):
        self.shown = shown

    def stepped(self, state: State) -> None:
        self.shown.update()

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        self.shown.update()


class Scores(Listener):
    """Adds up the scores: an example that several steps have seen has a score from each of them.

    Raises NonFinite for the first step whose scores are not finite.
    """

    def __init__(self, run: Run, found: Progress):
        self.run, self.found = run, found

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        t, values, scores = traced.state.step, self.found.values, rows.scores
        assert values is not None, "outputs are measured before the first pull"
        check_finite(scores, cotangent, t)
        indices = self.run.batches[t].to(values.device)
        values[self.found.rows].index_add_(1, indices, scores.to(values.dtype))


class Sizes(Listener):
    """Keeps the norm of each target's ∂φ/∂params at some steps, at most `health.SAMPLES` of the run."""

    def __init__(self, steps: int, sizes: dict[int, list[float]]):
        self.every, self.sizes = -(-steps // health.SAMPLES), sizes

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        if traced.state.step % self.every == 0:
            squares = sum(c.reshape(len(c), -1).square().sum(1) for c in cotangent.params.values())
            assert isinstance(squares, Tensor), "a run trains at least one parameter"
            self.sizes.setdefault(traced.state.step, []).extend(squares.sqrt().tolist())


class Clipped(Listener):
    """Notes at which steps gradients were clipped."""

    def __init__(self, run: Run, steps: set[int]):
        self.clip, self.steps = run.clip, steps

    def pulling(self, traced: Traced, cotangent: Cotangent) -> None:
        if self.clip is not None and self.clip.on(traced.grads):
            self.steps.add(traced.state.step)


class Notes(Listener):
    """Notes in a folder, now and then, how far the work is: a state on the way down, the cotangent and all
    that was found on the way back.

    `found.cotangent` is None while the work is on its way down. After the first pull no state of training is
    noted any more: the steps that are done again then are those of a training that is already finished.
    """

    def __init__(self, folder: Directory, passed: Passed, found: Progress):
        self.folder, self.passed, self.found = folder, passed, found

    def stepped(self, state: State) -> None:
        if self.found.cotangent is None:
            self.folder.note_training(state, self.passed)

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        self.found.t, self.found.cotangent = traced.state.step, cotangent
        self.found.verified = self.passed.verified
        if traced.state.step:
            self.folder.note(self.found, self.passed)


class Witness(Listener):
    """Compares the derivative of some steps with finite differences, and what several targets get together
    with what the last of them gets alone.

    Looked at are the last step of the run (by `ask`, when the way down ends), two steps on the way, and every
    step where a number that depends on the parameters may have left the graph. `found` keeps what was found:
    step -> relative difference. With `data`, a step is also looked at as a function of its inputs.
    """

    def __init__(
        self, run: Run, weights: Tensor, chunk: int, found: dict[int, float | None], data: bool = False
    ):
        self.run, self.weights, self.chunk, self.found, self.data = run, weights, chunk, found, data
        self.known: set[str] = set()
        self.alone: tuple[Cotangent, Rows] | None = None

    def ask(self, traced: Traced, directions: int = 1) -> None:
        """Compare this step, and warn of gradients whose squares are lost in the optimizer's slots."""
        self.found[traced.state.step] = check_step(
            self.run, traced.state, self.weights, directions, self.data
        )
        warn_of_underflow(self.run, traced.state, traced.grads)

    def pulling(self, traced: Traced, cotangent: Cotangent) -> None:
        t, T = traced.state.step, self.run.steps
        if t not in self.found and (t in (T // 3, 2 * T // 3) or self.suspect(traced)):
            self.ask(traced)
        if t in self.found and cotangent.targets > 1 and self.chunk > 1:
            last = cotangent.map(lambda x: x[-1:].clone())  # a copy, since the pull is made in place
            self.alone = traced_vjp(self.run, traced, last, chunk=1)

    def pulled(self, traced: Traced, cotangent: Cotangent, rows: Rows) -> None:
        if self.alone is not None:
            check_batching(self.alone, (cotangent, rows), traced)
            self.alone = None

    def suspect(self, traced: Traced) -> bool:
        """Whether something may be hidden in this step. An autograd Function of the user's is the same at
        every step, so it is asked about once."""
        fresh = [why for why in traced.escaped if why not in self.known]
        self.known |= {why for why in fresh if why.startswith(FUNCTION)}
        return bool(fresh)


def check_finite(scores: Tensor, cotangent: Cotangent, t: int) -> None:
    """Raise NonFinite if the scores of step t are not finite, with the first tensor that is not.

    The cotangent itself need not be looked at: what is not finite in it shows in the scores of the next pull.
    """
    if scores.isfinite().all():
        return
    tensors = cotangent.flatten() | {"scores": scores}
    name = next(name for name, x in tensors.items() if not x.isfinite().all())
    raise NonFinite(
        f"the derivative became infinite or NaN at step {t}, first in {name!r}: the training is "
        "chaotic there. Lower the learning rate, or warm it up"
    )


def health_seen(run: Run, found: Progress, verified: int, start: Tensor) -> health.Health:
    """The health of a finished replay. `verified` states were compared; `start` is the untrained model's."""
    assert found.values is not None and found.outputs is not None, "every sweep measures its outputs"
    return health.Health(
        run.steps,
        tuple((t, tuple(row)) for t, row in sorted(found.sizes.items(), reverse=True)),
        verified,
        found.witnessed,
        clipped=None if run.clip is None else len(found.clipped),
        moves=health.moved(found.values, found.outputs, start),
        unrounded=unrounded(run.updates, run.group_of),
    )
