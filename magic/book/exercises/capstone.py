"""The capstone, exercise 07.9: the reader rebuilds REPLAY, and its memory, time and care are watched.

The reader's function gets a small run whose `losses` is watched: each call says which batch was taken at
which parameters. From that, `Watch` tells which state of the true training it was, whether the batch belongs
to it, and which other states are in memory at that moment, however they are kept.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .judging import Cases, Wrong, exercise
from .small_run import SmallRun, scores_of, small_run, states_of, step

NEAR = 1e-9  # two float64 trainings that do the same in another order differ by less


class Watch(TorchDispatchMode):
    """A run whose `losses` is watched, and every block of memory that the reader's code makes."""

    def __init__(self, run: SmallRun, states: list, most: int, slots: int):
        super().__init__()
        self.true, self.states, self.most, self.slots = run, states, most, slots
        self.thetas = torch.stack([theta for theta, _ in states])
        self.given = run._replace(
            losses=self.losses, phi=self.phi, theta=run.theta.clone(), weights=run.weights.clone()
        )
        self.calls, self.kept, self.changed = 0, set[int](), set[int]()
        self.seen = WeakKeyDictionary[Any, set[int]]()  # block of memory -> the states it held
        self.watching = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out) if self.watching else ():
            if isinstance(x, Tensor):
                self.seen.setdefault(x.untyped_storage(), set())
        return out

    def losses(self, theta: Tensor, rows: Tensor) -> Tensor:
        """The losses, after a look at where the reader's replay is."""
        self.watching = False
        try:
            self._look(theta.detach(), rows)
        finally:
            self.watching = True
        return self.true.losses(theta, rows)

    def phi(self, theta: Tensor) -> Tensor:
        """The output, after a look at whether it is taken where the training ends."""
        self.watching = False
        try:
            at, last = self._state(theta.detach()), len(self.states) - 1
            if at is None:
                with torch.enable_grad():
                    raise Wrong(self._stray(theta.detach(), "phi") + self._in_place())
            if at != last:
                raise Wrong(f"phi was called at s_{at}; it is to be taken at the end, s_{last}")
        finally:
            self.watching = True
        return self.true.phi(theta)

    def _look(self, theta: Tensor, rows: Tensor) -> None:
        self.calls += 1
        if self.calls > 20 * self.most:
            raise Wrong(
                f"run.losses has been called {self.calls:,} times, and {self.most} calls are enough. "
                "Does the schedule ever end?"
            )
        if not torch.equal(self.given.theta, self.true.theta):
            raise Wrong(
                "run.theta, which you were given, has been changed in place. Make a new tensor instead"
            )
        batches = [t for t, batch in enumerate(self.true.order) if torch.equal(batch, rows)]
        if not batches:
            raise Wrong(f"run.losses was called with rows {rows.tolist()}, which are no batch of the run")
        at = self._state(theta)
        alive = self._alive(at)
        if at is None:
            with torch.enable_grad():
                raise Wrong(self._stray(theta) + self._in_place())
        if at not in batches:
            raise Wrong(self._out_of_place(at, batches[0]) + self._in_place())
        if len(alive) > self.slots >= len(self.kept):
            gc.collect()  # what a cycle of Python's holds is not kept on purpose
            alive = self._alive(at)
        self.kept = max(self.kept, alive, key=len)

    def _state(self, theta: Tensor) -> int | None:
        """The t whose parameters these are."""
        near = (self.thetas - theta).abs().amax(1) <= NEAR
        return int(near.nonzero()[0]) if near.any() else None

    def _alive(self, at: int | None) -> set[int]:
        """The states in memory, but for the one in work and the trained one."""
        size = self.thetas.shape[1]
        blocks = [b for b in list(self.seen) if b.nbytes() and b.nbytes() % (8 * size) == 0]
        rows = [torch.empty(0, dtype=torch.float64).set_(b).view(-1, size) for b in blocks]
        owner = [k for k, some in enumerate(rows) for _ in range(len(some))]
        near = (
            torch.cdist(torch.cat(rows), self.thetas, p=float("inf")) <= NEAR if rows else torch.zeros(0, 0)
        )
        held: list[set[int]] = [set() for _ in blocks]
        for row, t in near.nonzero().tolist():
            held[owner[row]].add(t)
        for block, states in zip(blocks, held, strict=True):
            self.changed |= self.seen[block] - states
            self.seen[block] = states
        return {0}.union(*held) - {at, len(self.thetas) - 1}

    def _stray(self, theta: Tensor, called: str = "run.losses") -> str:
        """What happened, where these are the parameters of no state of the training."""
        for u in range(len(self.states) - 1):
            for why, state in self._mistakes(u):
                if (state[0] - theta).abs().max() <= NEAR:
                    return why
        return (
            f"{called} was called at parameters that are no state of the training. Is the step the one "
            "with g, m' and θ' of the exercise"
        )

    def _mistakes(self, u: int) -> Iterator[tuple[str, tuple]]:
        """What readers get in place of the state that follows s_u, and by which mistake."""
        run, (theta, m), rows = self.true, self.states[u], self.true.order[u]
        if u:
            yield (
                f"the state that follows s_{u} is not the training's: the momentum buffer was zero at s_{u}. "
                "A kept state is parameters and buffer",
                step(run, (theta, 0 * m), rows),
            )
        plain = step(run, (theta, m), rows, weighted=False)
        yield f"step {u} was done without the data weights: g is that of Σ wᵢ ℓᵢ / B", plain
        uphill = step(run, (theta, m), rows, sign=-1)
        yield f"step {u} goes uphill: the sign of η m' is the other way round", uphill
        summed = step(run._replace(weights=len(rows) * run.weights), (theta, m), rows)
        yield f"step {u} sums the losses of the batch: the mean's 1/B is missing", summed
        for t, other in enumerate(run.order):
            yield f"step {u} was done with the batch of step {t}", step(run, (theta, m), other)

    def _out_of_place(self, at: int, batch: int) -> str:
        where = f"the batch of step {batch} was taken at s_{at}"
        if at == batch + 1:
            return f"{where}, the state after the step. The pull through step t, like the step, is at s_t"
        return f"{where}. Steps that are done again use their own batches, in their own order"

    def _in_place(self) -> str:
        """What else may be the cause, where tensors were changed in place."""
        changed = ", ".join(f"s_{t}" for t in sorted(self.changed)[:3])
        return f". (A tensor that held {changed} was changed in place: was it a kept one?)" if changed else ""


CASES: tuple[tuple[str, dict, int], ...] = (
    ("two steps without momentum", {"steps": 2, "mu": 0.0, "seed": 1}, 2),
    ("two steps with momentum", {"steps": 2, "seed": 2}, 2),
    ("six steps, every state kept", {"steps": 6, "seed": 3}, 6),
    ("six steps with an example twice in a batch", {"steps": 6, "seed": 4, "twice": True}, 6),
    ("20 steps with 3 states", {"steps": 20, "seed": 5}, 3),
    ("12 steps with the start only", {"steps": 12, "seed": 6}, 1),
    ("a run of one step", {"steps": 1, "seed": 7}, 1),
)


@exercise("07.9", "REPLAY, in your own words")
def capstone(answer: Any) -> None:
    cases = Cases({"the mean's 1/B": 0.25, "the rate": 0.1}, tolerance=1e-7)
    for case, made, slots in CASES:
        _judge(cases, case, answer, small_run(**made), slots)


def _judge(cases: Cases, case: str, answer: Any, run: SmallRun, slots: int) -> None:
    from magic.engine.costs import advanced

    states, T = states_of(run), len(run.order)
    most = advanced(T, slots) + T + 1
    watch = Watch(run, states, most, slots)

    def watched() -> Any:
        with watch:
            return answer(watch.given, watch.given.phi, slots)

    if not callable(answer):
        cases.call(case, answer)
    got = cases.call(case, _explained(cases, case, watched))
    want, so_far = scores_of(run, states), cases._so_far()
    right = (
        isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got.to(want), want, rtol=1e-7)
    )
    cases.same(case, got, want, {} if right else _suspects(run, states, want))
    kept = len(watch.kept)
    if not (torch.equal(watch.given.theta, run.theta) and torch.equal(watch.given.weights, run.weights)):
        why = "run.theta or run.weights was changed in place"
    elif kept > slots:
        why = f"beside the state in work {kept} states are in memory at once, and slots is {slots}"
    elif watch.calls > most:
        why = (
            f"run.losses is called {watch.calls} times, and {most} calls are enough: A(T, c) = "
            f"{advanced(T, slots)} steps, one more to the end, and {T} pulls"
        )
    else:
        return
    raise Wrong(f"{so_far}wrong for {case}: the scores are right, but {why}.")


def _explained(cases: Cases, case: str, work: Callable) -> Callable:
    """The same work, with the case named in what `Watch` says is wrong."""

    def explained() -> Any:
        try:
            return work()
        except Wrong as wrong:
            raise Wrong(f"{cases._so_far()}wrong for {case}: {wrong}.") from None

    return explained


def _suspects(run: SmallRun, states: list, want: Tensor) -> dict[str, Tensor]:
    """Wrong scores by the mistake that makes them; a mistake that makes no difference here is left out."""
    last = len(run.order) - 1
    found = {
        "the cotangent of the momentum buffer is left out": scores_of(run, states, buffer=False),
        "the pull takes all data weights as 1": scores_of(run, states, weighted=False),
        "an example that occurs twice in a batch gets one of its two parts: use index_add_": scores_of(
            run, states, add="last of a batch"
        ),
        "scores are overwritten where an example comes again: add them up": scores_of(run, states, add="no"),
        "the part of the first step, t = 0, is missing": scores_of(run, states, skip=0),
        "the part of the last step, t = T − 1, is missing": scores_of(run, states, skip=last),
    }
    return {why: x for why, x in found.items() if (x - want).abs().max() > 1e-6 * want.abs().max()}
