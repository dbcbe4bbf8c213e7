"""Processes of their own: some are killed, some share a batch, some are kernels of notebooks.

PyTorch, torchvision and seaborn take seven seconds to import. A server of `multiprocessing` imports them
once, and each process begins as a fork of it, in which these imports are done.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

# What chapters import. The first optimizer imports torch._dynamo, and that sympy; the first derivative by
# torch.func.jvp compiles what it does with operations that have none.
IMPORTS = [
    "torch", "torch._dynamo", "torch._decomp.decompositions_for_jvp", "torchvision", "seaborn",
    "sklearn.datasets", "ipykernel.kernelapp", "magic.attribution",
]  # fmt: skip


def forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


def start(work: Callable, *arguments) -> ForkServerProcess:
    """work(*arguments) in a process of its own, at one thread. `kill()` ends it as kill -9 does."""
    process = forks().Process(target=_alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def returned(work: Callable, *arguments):
    """What work(*arguments) returns, in a process of its own."""
    heard, told = multiprocessing.Pipe(duplex=False)
    process = start(_telling, told, work, *arguments)
    told.close()
    found = heard.recv()
    process.join()
    return found


def _telling(told: Connection, work: Callable, *arguments) -> None:
    told.send(work(*arguments))


def _alone(work: Callable, *arguments) -> None:
    import torch

    torch.set_num_threads(1)
    work(*arguments)
