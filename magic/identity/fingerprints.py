"""The bits of tensors, and of texts, as short strings that can be printed and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

PART = 1 << 26  # bytes that are copied at once


def fingerprints(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A digest (BLAKE2b, 64 bits) of each tensor's dtype, shape and bytes."""
    digests = {}
    for name, tensor in tensors.items():
        h = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
        for part in _bytes(tensor):
            h.update(part)
        digests[name] = h.hexdigest()
    return digests


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some at a time.

    NumPy might write, so PyTorch gives it a copy of what is shared until someone writes (torch._lazy_clone),
    and keeps the copy. Here a copy is made of a part, and forgotten.
    """
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    shared = getattr(torch._C, "_is_cow_tensor", None)
    if shared is None or not shared(raw):
        yield raw.numpy().data
    else:
        yield from (part.clone().numpy().data for part in raw.split(PART))


def fingerprint(thing) -> str:
    """16 hex digits (BLAKE2b) of every bit of a State, module, tensor or dict of tensors.

    They are equal for equal bits, and different for different ones but for a chance of 2⁻⁶⁴.
    """
    if isinstance(thing, Tensor):
        thing = {"": thing}
    elif isinstance(thing, nn.Module):
        thing = _values(thing.state_dict())
    elif hasattr(thing, "flatten"):
        thing = thing.flatten()
    parts = "".join(f"{name}={digest};" for name, digest in fingerprints(thing).items())
    return digest(parts)


def _values(state: dict) -> dict[str, Tensor]:
    """The tensors of a state_dict. What a module adds by get_extra_state counts by its text, as bytes."""
    return {
        name: x if isinstance(x, Tensor) else torch.from_numpy(np.array(list(repr(x).encode()), np.uint8))
        for name, x in state.items()
    }


def digest(text: str) -> str:
    """16 hex digits (BLAKE2b) of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
