"""Many retrainings: on all cores of this machine or on a cluster, and none of them twice.

Retrainings are independent and are run by joblib: on all cores, or on a cluster, with no other change than
`with joblib.parallel_config(backend="dask"): ...`. A worker uses this process's thread count, so that it
computes the same bits. Each result is kept in a `Bank` as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import workers
from ..identity.parts import changed
from ..show import bar
from ..training.run import Run
from .bank import Bank
from .retraining import retrained, retrained_together

WORTH = 30.0  # seconds of training from which other processes, which take about ten to start, pay off
TASKS = 8  # the least number of tasks per worker, so that none waits long for the others


def outputs(
    run: Run,
    measure: Callable,
    weights: Tensor,
    *,
    how: str = "weight",
    bank: Bank | None = None,
    jobs: int | None = None,
    together: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Measured outputs of the models trained with these data weights, on the CPU, in the run's precision.

    weights  (n,), and the outputs are (K,); or (S, n) for S trainings, and the outputs are (S, K). Where
           tokens have weights, (n, L) and (S, n, L) as well
    how    "weight": an example of weight 0 is in its batch, with weight 0; "rows": it is left out of it
           (see `magic.retrain`). A bank knows its own
    bank   where outputs are looked up, and kept as soon as each training is done
    jobs   processes; None: one if that is quick enough or the run is on a GPU, which they would share;
           otherwise all cores, or what joblib.parallel_config says. The bits do not depend on it. With more
           than one process, call torch.set_num_threads(1) first, or they compete for the cores
    together   how many models are trained at once, in this process, by torch.func.vmap: faster where a step
           is short, in the memory of so many models, and equal to the others up to rounding. A bank for them
           is made with how="together"
    progress   whether a bar is shown; by default it is

    Raises ValueError for a bank of another run or measure, for a damaged row, or for a run that changed
    while it was retrained, and ImportError where more than one process is needed and joblib is missing.
    """
    how = _how(how, together, jobs, bank)
    single = weights.dim() == 1 or weights.shape == run.shape
    if single and bank is None:
        return retrained(run, measure, weights, how).cpu()
    if single:
        return outputs(
            run, measure, weights[None], bank=bank, jobs=jobs, together=together, progress=progress
        )[0]
    if bank is None:
        bank = Bank(":memory:", run, measure, how=how)
    bank.serves(run, measure)
    parts = run.identity()
    looked_up = {s: bank.get(row) for s, row in enumerate(weights)}
    if run.ranks is not None:  # all train the same rows, one after the other
        looked_up, jobs = run.ranks.agreed(looked_up), 1
    known = {s: found for s, found in looked_up.items() if found is not None}
    todo = [s for s in looked_up if s not in known]
    with bar(len(todo), "retrain", progress) as shown:
        trained = (
            _trained(run, measure, weights, todo, bank.how, jobs)
            if together is None
            else _together(run, measure, weights, todo, together)
        )
        for s, found in trained:
            known[s] = found
            bank.put(weights[s], found)
            shown.update()
    if todo and (names := changed(run.identity(), parts, trust=[*run.unknown()])):
        for s in todo:
            bank.forget(weights[s])
        raise ValueError(
            f"the run changed while it was retrained: {'; '.join(names)}. None of these retrainings was "
            "kept; make a new Run, and let nothing change under it"
        )
    return torch.stack([known[s].to(torch.float64).cpu() for s in range(len(weights))]).to(run.dtype)


def _how(how: str, together: int | None, jobs: int | None, bank: Bank | None) -> str:
    """How examples are removed. Raises ValueError for arguments that contradict each other, and TypeError for
    a bank that is none."""
    if bank is not None and not isinstance(bank, Bank):
        raise TypeError(f"bank={bank!r}: give a magic.Bank(path, run, measure)")
    if together is None:
        if bank is not None and bank.how == "together":
            raise ValueError(f"{bank.path}: this bank is of trainings made together; give together= as well")
        return how
    if isinstance(together, bool) or not isinstance(together, int) or together < 1:
        raise ValueError(f"together={together!r}: how many models are trained at once, 1 or more")
    if how == "rows" or (jobs or 1) != 1:
        raise ValueError('together= trains in this process, by data weights: leave out jobs= and how="rows"')
    if bank is not None and bank.how != "together":
        raise ValueError(
            f"{bank.path}: this bank is of trainings made one by one, which may have other last bits; make "
            'one with magic.Bank(..., how="together")'
        )
    return "together"


def _together(run: Run, measure: Callable, weights: Tensor, todo: list[int], together: int):
    """Yield the number of each row of `todo` and its outputs, trained so many at a time."""
    for i in range(0, len(todo), together):
        some = todo[i : i + together]
        yield from zip(some, retrained_together(run, measure, weights[some]), strict=True)


def _trained(run: Run, measure: Callable, weights: Tensor, todo: list[int], how: str, jobs: int | None):
    """Yield the number of each row of `todo` and its outputs, (K,), as they are done.

    Unless `jobs` is given, the first is trained here, which shows how long the others would take.
    """
    start = time.monotonic()
    if jobs is None and todo and not workers.elsewhere():
        yield todo[0], retrained(run, measure, weights[todo[0]], how)
        todo = todo[1:]
        quick = (time.monotonic() - start) * len(todo) <= WORTH
        jobs = 1 if quick or (run.device.type != "cpu" and workers.told() is None) else None
    if jobs == 1:
        for s in todo:
            yield s, retrained(run, measure, weights[s], how)
    elif todo:
        yield from _in_parallel(run, measure, weights, todo, how, jobs)


def _in_parallel(run, measure, weights, todo, how, jobs) -> Iterator[tuple[int, Tensor]]:
    """The same, in several processes. A worker gets several rows at a time."""
    if jobs is None:
        said = workers.told()
        jobs = -1 if said is None else said
    size = max(1, len(todo) // (TASKS * workers.count(jobs)))
    parts = [todo[i : i + size] for i in range(0, len(todo), size)]
    tasks = [(how, [(s, weights[s].numpy()) for s in part]) for part in parts]
    for done in workers.spread(_some, run, measure, tasks, jobs):
        yield from ((s, torch.from_numpy(found)) for s, found in done)


def _some(run: Run, measure: Callable, task: tuple[str, list]) -> list:
    """What a worker does: train for each row of weights."""
    how, rows = task
    return [(s, retrained(run, measure, torch.from_numpy(w), how).cpu().numpy()) for s, w in rows]
