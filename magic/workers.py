"""Work that is done in several processes, on this machine or on a cluster, by joblib.

Where it runs is joblib's business: on all cores, or on Dask or Ray by nothing but
`with joblib.parallel_config(backend="dask"): ...`. A worker uses this process's thread count, so that it
computes the same bits, and it gets run and measure once, however many tasks it does.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .show import needs
from .training import determinism
from .training.run import Run

UNPACKED: dict[str, tuple[Run, Callable]] = {}  # in a worker: what it works on, by the call's token


def spread(
    work: Callable[[Run, Callable, Any], Any], run: Run, measure: Callable, tasks: Sequence, jobs: int
) -> Iterator[Any]:
    """Yield work(run, measure, task) of each task, in the order in which they are done.

    work   a function of a module, which a worker can import
    tasks  what can be pickled; tensors as NumPy arrays, since a row of a tensor takes the whole with it
    jobs   how many processes, as joblib counts them

    Raises ImportError without joblib.
    """
    joblib = needs("joblib", "notebooks")
    from joblib.parallel import get_active_backend

    shared = getattr(get_active_backend()[0], "supports_sharedmem", False)
    packed = (run, measure) if shared else _packed(run, measure)
    token, threads = secrets.token_hex(8), torch.get_num_threads()
    parallel = joblib.Parallel(jobs, return_as="generator_unordered")
    yield from parallel(joblib.delayed(_do)(work, packed, token, task, threads) for task in tasks)


def told() -> int | None:
    """How many processes joblib was told to use; None if nothing was said."""
    try:
        from joblib.parallel import get_active_backend
    except ImportError:
        return None
    return get_active_backend()[1]


def count(jobs: int) -> int:
    """How many processes this is, -1 being all cores. Raises ImportError without joblib."""
    return needs("joblib", "notebooks").effective_n_jobs(jobs)


def elsewhere() -> bool:
    """Whether joblib was told to use something other than this machine's processes."""
    try:
        from joblib.parallel import get_active_backend
    except ImportError:
        return False
    return type(get_active_backend()[0]).__name__ != "LokyBackend"


def _packed(run: Run, measure: Callable) -> np.ndarray:
    """Run and measure as one array of bytes, which joblib stores once for all workers to read."""
    try:
        import cloudpickle
    except ImportError:  # an older joblib brings its own
        from joblib.externals import cloudpickle

    return np.frombuffer(cloudpickle.dumps((run, measure)), np.uint8)


def _unpacked(packed, token: str) -> tuple[Run, Callable]:
    """Run and measure in a worker, unpacked at its first task."""
    if isinstance(packed, tuple):
        return packed
    if token not in UNPACKED:
        UNPACKED.clear()
        UNPACKED[token] = pickle.loads(np.ascontiguousarray(packed).data)
    return UNPACKED[token]


def _do(work: Callable, packed, token: str, task, threads: int):
    """What a worker does."""
    with determinism.TURN:
        torch.set_num_threads(threads)
        run, measure = _unpacked(packed, token)
        return work(run, measure, task)
