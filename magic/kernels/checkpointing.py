"""Activation checkpointing (torch.utils.checkpoint) in a step that is differentiated.

These checkpoints are the user's, inside one step. The engine's, which keep states of the whole training,
are another thing (`magic.engine.schedule`).

A checkpointed block forgets its activations and computes them again in the backward pass. Training may do
that. The adjoint goes through a step's graph more than once, and PyTorch's checkpoints fail there, since
they hand out what they have computed again only once. So while a step is traced, nothing is forgotten: a
block is called like any other function, which gives the same numbers. With use_reentrant=True a block
hides its graph from torch.autograd.grad altogether, and is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as library

_FORGETTING = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
_ORIGINAL = {name: getattr(library, name) for name in _FORGETTING if hasattr(library, name)}
_REENTRANT = library.CheckpointFunction
_lock = threading.Lock()
_depth = {"keeping": 0, "refusing": 0}  # how many `with` blocks are open that ask for each


def _nothing(*args, **kwargs):
    """What PyTorch is to run before and after a block that is called like any other function."""
    yield


class _Refused:
    @staticmethod
    def apply(*args):
        raise ValueError(
            "activation checkpointing with use_reentrant=True has no derivative by torch.autograd.grad; use "
            "checkpoint(..., use_reentrant=False)"
        )


def _patch() -> None:
    """Put into PyTorch's module what the open blocks ask for, or PyTorch's own."""
    now = {name: _nothing if _depth["keeping"] else original for name, original in _ORIGINAL.items()}
    now["CheckpointFunction"] = _Refused if _depth["refusing"] else _REENTRANT
    for name, x in now.items():
        setattr(library, name, x)


@contextlib.contextmanager
def refusing_reentrant(keeping: bool = False) -> Iterator[None]:
    """Inside, checkpoint(..., use_reentrant=True) raises ValueError.

    keeping  the other kind, use_reentrant=False, forgets nothing
    """
    with _lock:
        _depth["keeping"] += keeping
        _depth["refusing"] += 1
        _patch()
    try:
        yield
    finally:
        with _lock:
            _depth["keeping"] -= keeping
            _depth["refusing"] -= 1
            _patch()


class Keeping(TorchFunctionMode):
    """A mode in which activation checkpoints forget nothing: where they would compute it again, in the
    backward pass, no mode listens."""

    def __enter__(self):
        self._checkpoints = refusing_reentrant(keeping=True)
        self._checkpoints.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._checkpoints.__exit__(*exc)
