"""The training examples as a user gives them: the data, the batches, and indices of examples.

What a run cannot take is refused with a message that says what is wrong, where, and the way out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping

import numpy as np
import torch
from torch import Tensor


def check_data(data, collate: Callable | None = None) -> tuple:
    """(data, n): a tuple of tensors, or the Dataset as it is, and the number of examples.

    A list of dicts is a Dataset, and so is any list where there is a collate function for its items.
    """
    if collate is not None and not callable(collate):
        raise TypeError(
            f"collate is a {type(collate).__name__}; pass a function that makes a batch out of a list of "
            "items"
        )
    if isinstance(data, (Tensor, np.ndarray)):
        data = (data,)
    if isinstance(data, dict):
        raise TypeError("data is a dict; pass its tensors as a tuple, in the order that loss takes them")
    if isinstance(data, (tuple, list)) and len(data) == 0:
        raise ValueError("data is empty")
    items_listed = isinstance(data, list) and (collate is not None or isinstance(data[0], Mapping))
    if isinstance(data, (tuple, list)) and not items_listed:
        data = [_from_numpy(x, i) if isinstance(x, np.ndarray) else x for i, x in enumerate(data)]
        for i, x in enumerate(data):
            if not isinstance(x, Tensor) or x.dim() == 0:
                raise TypeError(
                    f"data[{i}] is a {type(x).__name__}; each must be a tensor or a NumPy array with the n "
                    "examples first (torch.as_tensor makes one)"
                )
        lengths = [len(x) for x in data]
        if len(set(lengths)) != 1:
            raise ValueError(f"data must be tensors of one length n; these have lengths {lengths}")
        return tuple(x.clone() if x.is_inference() else x.detach() for x in data), lengths[0]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return data, len(data)
    raise TypeError(
        f"data is a {type(data).__name__}; pass a tuple of tensors or a Dataset with len() and [i] "
        "(not a DataLoader: which examples form a batch is said by `batches`)"
    )


def _from_numpy(x: np.ndarray, i: int) -> Tensor:
    """The array as a tensor; TypeError for one of texts or objects, which stands at place i of the data."""
    try:
        return torch.tensor(x, device="cpu")
    except TypeError as error:
        raise TypeError(
            f"data[{i}] is a NumPy array of {x.dtype}, which has no tensor; turn it into numbers first"
        ) from error


def each(f: Callable[[Tensor], Tensor], batch):
    """The batch with f applied to each tensor; it may be tuples, lists and mappings within each other."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        made = {key: each(f, x) for key, x in batch.items()}
        if isinstance(batch, dict) or not isinstance(batch, MutableMapping):
            return made
        fresh = copy.copy(batch)  # such as a BatchEncoding of transformers, whose entries are attributes, too
        fresh.update(made)
        return fresh
    entries = [each(f, x) for x in batch]
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)


def batch(data, collate: Callable | None, indices: Tensor, device: torch.device) -> tuple:
    """These examples as what loss takes after the model, on the device.

    A tuple or a list, from `collate` or of a Dataset's items, gives an argument for each entry; anything
    else, such as a dict, is one argument.
    """
    if isinstance(data, tuple) and collate is None:
        return each(lambda x: x[indices.to(x.device)].to(device), data)
    found = collated(data, indices.tolist(), collate)
    return tuple(each(lambda x: x.to(device), part) for part in found)


def items(data, indices: list[int]) -> list:
    """These items of a Dataset; of a tuple of tensors, the tuples that a TensorDataset has as items.

    Raises RuntimeError, which names the example, where one cannot be read.
    """
    if isinstance(data, tuple):
        return [tuple(x[i] for x in data) for i in indices]
    together = getattr(data, "__getitems__", None)
    try:
        return list(together(indices)) if together else [data[i] for i in indices]
    except Exception:
        for i in indices:
            try:
                data[i]
            except Exception as error:
                raise RuntimeError(
                    f"example {i} of the data cannot be read: {type(error).__name__}: {error}. Repair it, or "
                    "leave it out of `batches`"
                ) from error
        raise


def collated(data, indices: list[int], collate: Callable | None = None) -> tuple:
    """The items as one batch, by `collate` or else torch's default_collate: a tuple of what loss takes."""
    found = items(data, indices)
    try:
        batch = torch.utils.data.default_collate(found) if collate is None else collate(found)
    except Exception as error:
        if collate is not None:
            raise RuntimeError(
                f"collate fails for examples {indices[:5]}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(error, (TypeError, RuntimeError, KeyError)):
            raise
        raise TypeError(
            f"examples {indices[:5]} of the Dataset cannot be put together: {error}. Each item must have the "
            "same keys and tensors of the same shapes: pad them, or turn them into numbers, in the Dataset, "
            "or pass collate=, a function that does so for a list of items"
        ) from error
    if collate is None:
        _check_tensors(batch, indices, "item")
    else:
        _check_collated(batch, indices)
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _parts(batch, name: str) -> list[tuple[str, object]] | None:
    """The entries of a container, each with a name that begins with `name`; None for what is not one."""
    if isinstance(batch, Mapping):
        return [(f"{name}[{key!r}]", x) for key, x in batch.items()]
    if isinstance(batch, (tuple, list)) and not any(isinstance(x, (str, bytes)) for x in batch):
        return [(f"{name}[{i}]", x) for i, x in enumerate(batch)]
    return None


def _check_tensors(batch, indices: list[int], where: str) -> None:
    """Raise TypeError unless the batch is made of tensors alone; `where` is the name of this part of it."""
    if isinstance(batch, Tensor):
        return
    parts = _parts(batch, where)
    if parts is None:
        raise TypeError(
            f"{where} of the Dataset, in example {indices[0]}, is text or an object, not numbers; turn it "
            "into a tensor in the Dataset, such as token ids"
        )
    for name, x in parts:
        _check_tensors(x, indices, name)


def _check_collated(batch, indices: list[int], where: str = "batch") -> None:
    """Raise unless what collate returned is made of tensors alone, each with a row for each example."""
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or len(batch) != len(indices):
            raise ValueError(
                f"collate returned a {where} of shape {tuple(batch.shape)} for {len(indices)} examples; each "
                f"tensor must have an entry for each example, ({len(indices)}, …)"
            )
        return
    parts = _parts(batch, where)
    if parts is None:
        raise TypeError(
            f"collate returned a {where} that is text or an object ({type(batch).__name__}); it must return "
            "tensors, in tuples, lists or dicts if there are several"
        )
    if not parts:
        raise ValueError(
            f"collate returned an empty {where} ({type(batch).__name__}); it must return tensors"
        )
    for name, x in parts:
        _check_collated(x, indices, name)


def check_batches(batches, n: int) -> list[Tensor]:
    """The batches as T int64 tensors of indices into n examples."""
    try:
        given = [b if isinstance(b, Tensor) else torch.as_tensor(b, device="cpu") for b in batches]
        checked = [b.clone() for b in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"batches is a {type(batches).__name__}; pass a (T, B) index tensor, such as magic.batches "
            "makes, or a sequence of index tensors"
        ) from error
    if not checked:
        raise ValueError("batches is empty: a run has at least one step")
    for t, indices in enumerate(checked):
        if (
            indices.dim() != 1
            or len(indices) == 0
            or indices.is_floating_point()
            or indices.dtype == torch.bool
        ):
            raise ValueError(
                f"batches[{t}] has shape {tuple(indices.shape)} and type {indices.dtype}; "
                "each batch is a non-empty 1-d tensor of example indices"
            )
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= n:
            raise IndexError(
                f"batches[{t}] asks for example {low if low < 0 else high}; data has 0 … {n - 1}"
            )
    return [indices.to(torch.int64) for indices in checked]


def check_indices(indices: Iterable[int] | int, n: int) -> Tensor:
    """Training-example indices as a 1-d int64 tensor on the CPU; each in 0 … n−1, none twice."""
    if isinstance(indices, str):
        raise TypeError(f"examples are named by integer indices, not by {indices!r}")
    if not isinstance(indices, Iterable):
        indices = [int(indices)]
    elif getattr(indices, "ndim", 1) == 0:  # a tensor or an array that is a single number
        indices = [int(torch.as_tensor(indices))]
    given = indices if isinstance(indices, Tensor) else torch.as_tensor(list(indices), device="cpu")
    given = given.cpu().reshape(-1)
    if given.dtype == torch.bool or given.is_floating_point():
        if len(given):
            raise TypeError(f"examples are named by integer indices; these are {given.dtype}")
        given = given.to(torch.int64)
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise IndexError(f"example {outside[0].item()} does not exist; the data has 0 … {n - 1}")
    values, counts = given.unique(return_counts=True)
    if len(values) != len(given):
        twice = values[counts > 1][0].item()
        raise ValueError(f"example {twice} is named twice; it can be removed only once")
    return given.to(torch.int64)
