"""How many bytes of tensors a piece of work holds beyond those that were there before."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def measured(work: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """Do `work`. Returns its result, the bytes held with it, and the bytes held at the peak.

    On CUDA PyTorch's allocator counts; on a CPU every operation is watched, which takes about twice
    the time and may count a little too much.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return result, now - before, peak - before
    with _Watch() as watch:
        result = work()
    return result, watch.now, watch.peak


class _Watch(TorchDispatchMode):
    """Counts each storage that an operation makes, from then until it is freed; those seen before count 0."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._note([*args, *kwargs.values()], new=False)
        out = func(*args, **kwargs)
        self._note([out], new=True)
        return out

    def _note(self, values, new: bool) -> None:
        """The tensors among these, which may lie in lists: so deep and no deeper nests what ATen takes."""
        for x in values:
            if isinstance(x, (list, tuple)):
                self._note(x, new)
            elif isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if new else 0
                if key not in self._alive:
                    self._alive[key] = size, weakref.ref(storage, functools.partial(self._freed, key))
                    self.now += size
                    self.peak = max(self.peak, self.now)

    def _freed(self, key: int, _) -> None:
        self.now -= self._alive.pop(key)[0]
