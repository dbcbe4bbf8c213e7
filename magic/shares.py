"""The targets of an attribution, shared between processes: each makes the replay of its own.

Targets are independent, and so are the points of a mean over several. Each process trains for itself, so this
pays for many targets. It groups its targets as a process alone would group so many, and has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import workers
from .engine.planning import Plan
from .engine.replay import Replay, metagradient
from .engine.resume import Trusted
from .show import bar
from .training.run import Run


@dataclass(frozen=True)
class Split:
    """The targets of each process, and the folder in which each has one of its own."""

    rows: list[slice]
    disk: Trusted | None

    def folder(self, point: int, rows: slice, points: int) -> Trusted | None:
        """That of these targets at one of so many points."""
        if self.disk is None:
            return None
        path = Path(self.disk.path)
        path = path / f"point {point}" if points > 1 else path
        path = path / f"targets {rows.start} to {rows.stop - 1}" if len(self.rows) > 1 else path
        return replace(self.disk, path=path)


@dataclass(frozen=True)
class Share:
    """What one process does: the replay of some targets at one point."""

    point: int
    start: int
    stop: int
    weights: np.ndarray
    plan: Plan
    folder: Trusted | None


@dataclass(frozen=True)
class Only:
    """A measure of some of the outputs of another."""

    measure: Callable
    start: int
    stop: int

    def __call__(self, model):
        return self.measure(model)[self.start : self.stop]


def shares_of(targets: int, jobs: int, run: Run, plan: Plan | None) -> list[slice]:
    """The targets of each process.

    Raises ValueError for a number that is none, and for work that several processes cannot share.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0:
        raise ValueError(f"jobs={jobs!r}: a number of processes, or -1 for all cores")
    if jobs != 1 and run.ranks is not None:
        raise ValueError("jobs=: this run's batches are shared between ranks already; leave it out")
    count = 1 if jobs == 1 else min(workers.count(jobs), targets)
    if count > 1 and plan is not None:
        raise ValueError("plan= and jobs= contradict each other: each process plans for its part of memory=")
    if count > 1 and run.device.type != "cpu" and not workers.elsewhere():
        raise ValueError(
            "jobs= would have processes share one GPU; tell joblib of a cluster, or leave it out"
        )
    return [slice(targets * i // count, targets * (i + 1) // count) for i in range(count)]


def replays(
    run: Run, measure: Callable, points: Tensor, planned: Plan, split: Split, progress: bool
) -> list[Replay]:
    """The replay of each point, (m, n), put together from those of the shares of its targets."""
    if len(split.rows) == 1:
        folders = [split.folder(i, split.rows[0], len(points)) for i in range(len(points))]
        pairs = zip(points, folders, strict=True)
        return [metagradient(run, measure, w, planned, progress, folder) for w, folder in pairs]
    tasks = [
        Share(i, rows.start, rows.stop, w.cpu().numpy(), planned, split.folder(i, rows, len(points)))
        for i, w in enumerate(points)
        for rows in split.rows
    ]
    found: dict[tuple[int, int], Replay] = {}
    with bar(len(tasks), "differentiate", progress) as shown:
        for share, replay in workers.spread(_of_share, run, measure, tasks, len(split.rows)):
            found[share] = replay
            shown.update()
    return [_whole([found[i, rows.start] for rows in split.rows], planned) for i in range(len(points))]


def _of_share(run: Run, measure: Callable, share: Share) -> tuple[tuple[int, int], Replay]:
    """What a worker does."""
    count, plan = share.stop - share.start, share.plan
    weights = torch.from_numpy(share.weights).to(run.device)
    plan = replace(plan, work=replace(plan.work, targets=count), group=min(plan.group, count))
    own = Only(measure, share.start, share.stop)
    return (share.point, share.start), metagradient(run, own, weights, plan, False, share.folder)


def _whole(parts: list[Replay], planned: Plan) -> Replay:
    """One replay of all targets, from those of their shares."""
    healths = [part.health for part in parts]
    rows = zip(*(health.sizes for health in healths), strict=True)
    sizes = tuple((row[0][0], tuple(x for _, norms in row for x in norms)) for row in rows)
    witnessed: dict[int, float | None] = {}
    for health in healths:
        for t, far in health.witnessed.items():
            known = witnessed.get(t, 0.0)
            witnessed[t] = None if far is None or known is None else max(far, known)
    first, verified = healths[0], sum(health.verified for health in healths)
    moves = tuple(far for health in healths for far in health.moves)
    health = replace(first, sizes=sizes, verified=verified, witnessed=witnessed, moves=moves)
    values = torch.cat([part.values for part in parts])
    return Replay(values, torch.cat([part.outputs for part in parts]), planned, health)
