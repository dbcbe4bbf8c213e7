"""Processes that are to be killed. Each begins as a copy of one that has imported PyTorch, in no time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

import torch


def start(work: Callable, *arguments) -> ForkServerProcess:
    """work(*arguments) in a process of its own, at one thread. `kill()` ends it as kill -9 does."""
    context = multiprocessing.get_context("forkserver")
    # making an optimizer imports torch._dynamo, and that sympy
    context.set_forkserver_preload(["torch._dynamo", "magic", work.__module__])
    process = context.Process(target=_alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def _alone(work: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    work(*arguments)
