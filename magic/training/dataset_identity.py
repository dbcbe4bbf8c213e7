"""The identity of a user's Dataset: a digest of its items, which are read once for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..identity import fingerprints
from ..identity.content import Content
from ..identity.parts import UNKNOWN, Identity
from ..show import bar
from . import determinism, examples

CHUNK = 1024  # items that are read and hashed together


def of_dataset(dataset, n: int, progress: bool = True) -> Identity:
    """The identity of the n items of a map-style Dataset: tensors, arrays, numbers, texts, or nested ones.

    Every item is read once. What items draw at random is drawn from one fixed seed here. A TensorDataset, or
    a Subset of one, is identified by its tensors.
    """
    name = "the items of the data set"
    tensors = _tensors(dataset)
    if tensors is not None:
        return Identity({name: fingerprints.digest(repr([fingerprints.fingerprint(x) for x in tensors]))})
    whole, content = hashlib.blake2b(digest_size=8), Content()
    unknown: list[str] = []  # why an item cannot be read whole
    with determinism.alone(seed=0), bar(n, "data set", progress) as shown:
        for items in _chunks(dataset, n):
            for column in _columns(items):
                _hash(column, whole, content, unknown)
            shown.update(len(items))
    digest = whole.hexdigest()
    reasons = "; ".join(dict.fromkeys(unknown))
    return Identity({name: UNKNOWN + digest if unknown else digest}, {name: reasons} if unknown else {})


def _tensors(dataset) -> list[Tensor] | None:
    """All the data of a Dataset that is nothing but tensors; None for another Dataset."""
    if type(dataset) is torch.utils.data.TensorDataset:
        return list(dataset.tensors)
    if type(dataset) is torch.utils.data.Subset:
        inner = _tensors(dataset.dataset)
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        return None if inner is None else [x[indices.to(x.device)] for x in inner]
    return None


def _chunks(dataset, n: int) -> Iterator[list]:
    """The items, some at a time."""
    for first in range(0, n, CHUNK):
        yield examples.items(dataset, list(range(first, min(first + CHUNK, n))))


def _columns(items: list) -> Iterator[list]:
    """The items' fields, each as a list over the items, if all items have the same; else the items whole.

    Fields of one kind can be hashed together, which is much quicker than item by item.
    """
    # a mapping that is no dict, such as a tokenizer's BatchEncoding, counts as one
    items = [dict(x) if isinstance(x, Mapping) and not isinstance(x, dict) else x for x in items]
    first = items[0]
    alike = type(first) in (tuple, list) and all(
        type(x) is type(first) and len(x) == len(first) for x in items
    )
    if alike and len(first):
        for column in zip(*items, strict=True):
            yield from _columns(list(column))
    elif type(first) is dict and all(type(x) is dict and list(x) == list(first) for x in items):
        yield list(first)
        for key in first:
            yield from _columns([x[key] for x in items])
    else:
        yield items


def _hash(column: list, whole, content: Content, unknown: list[str]) -> None:
    """Update the digest `whole` by a column, and note in `unknown` why it cannot be read, if it cannot."""
    first = column[0]
    if isinstance(first, Tensor) and all(
        type(x) is type(first) and x.shape == first.shape and x.dtype == first.dtype for x in column
    ):
        stacked = torch.stack([x.detach() for x in column])
        whole.update(fingerprints.fingerprint(stacked).encode())
    elif type(first) is np.ndarray and all(
        type(x) is np.ndarray and x.shape == first.shape and x.dtype == first.dtype for x in column
    ):
        whole.update(content.digest(np.stack(column)).encode())
        unknown += content.unknown
    else:
        whole.update(content.digest(list(column)).encode())
        unknown += content.unknown
