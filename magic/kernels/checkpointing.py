"""Activation checkpointing, torch.utils.checkpoint, in a step that is differentiated.

A checkpointed block forgets its activations and computes them again in the backward pass. Training may
do that. The adjoint goes through a step's graph more than once, and with other operations inside, where
PyTorch's checkpoints fail: they hand out what they have computed again only once. So while a step is
recorded, nothing is forgotten: a block is called as it stands, which gives the same numbers. With
use_reentrant=True a block hides its graph from torch.autograd.grad altogether, and is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch.utils import checkpoint as library

_FORGETTING = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
_ORIGINAL = {name: getattr(library, name) for name in _FORGETTING if hasattr(library, name)}
_REENTRANT = library.CheckpointFunction
_lock, _depth = threading.Lock(), [0, 0]  # how many blocks of `keeping` and `refusing` are open


def _nothing(*args, **kwargs):
    """What goes around a block that is called as it stands."""
    yield


class _Refused:
    @staticmethod
    def apply(*args):
        raise ValueError(
            "activation checkpointing with use_reentrant=True has no derivative by torch.autograd.grad; use "
            "checkpoint(..., use_reentrant=False)"
        )


def _settle() -> None:
    for name, original in _ORIGINAL.items():
        setattr(library, name, _nothing if _depth[0] else original)
    library.CheckpointFunction = _Refused if _depth[1] else _REENTRANT


@contextlib.contextmanager
def refusing(keeping: bool = False) -> Iterator[None]:
    """Inside, checkpoint(..., use_reentrant=True) raises ValueError; with `keeping`, the other kind
    forgets nothing."""
    with _lock:
        _depth[0] += keeping
        _depth[1] += 1
        _settle()
    try:
        yield
    finally:
        with _lock:
            _depth[0] -= keeping
            _depth[1] -= 1
            _settle()
