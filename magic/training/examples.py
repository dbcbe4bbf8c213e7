"""The training examples as a user gives them: the data, the batches, and indices of examples.

What a run cannot take is refused with a message that says what is wrong, where, and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def check_data(data) -> tuple:
    """(data, n): a tuple of tensors, or the Dataset as it is, and the number of examples."""
    if isinstance(data, (Tensor, np.ndarray)):
        data = (data,)
    if isinstance(data, dict):
        raise TypeError("data is a dict; pass its tensors as a tuple, in the order that loss takes them")
    if isinstance(data, (tuple, list)):
        if len(data) == 0:
            raise ValueError("data is empty")
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
    """The batch with f applied to each tensor; it may be tuples, lists and dicts within each other."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, dict):
        return {key: each(f, x) for key, x in batch.items()}
    made = [each(f, x) for x in batch]
    return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)


def collated(data, indices: list[int]) -> tuple:
    """The items of a Dataset as one batch, by torch's default_collate: a tuple of what loss takes.

    Items that are tuples or lists give an argument for each entry. Anything else, such as a dict, is one
    argument.
    """
    items = [data[i] for i in indices]
    try:
        batch = torch.utils.data.default_collate(items)
    except (TypeError, RuntimeError, KeyError) as error:
        raise TypeError(
            f"examples {indices[:5]} of the Dataset cannot be put together: {error}. Each item must have the "
            "same keys and tensors of the same shapes: pad them, or turn them into numbers, in the Dataset"
        ) from error
    _check_tensors(batch, indices, "item")
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _check_tensors(batch, indices: list[int], where: str) -> None:
    """Raise TypeError unless the batch is made of tensors alone; `where` is the name of this part of it."""
    if isinstance(batch, Tensor):
        return
    if isinstance(batch, dict):
        parts = [(f"[{key!r}]", x) for key, x in batch.items()]
    elif isinstance(batch, (tuple, list)) and not any(isinstance(x, (str, bytes)) for x in batch):
        parts = [(f"[{i}]", x) for i, x in enumerate(batch)]
    else:
        raise TypeError(
            f"{where} of the Dataset, in example {indices[0]}, is text or an object, not numbers; turn it "
            "into a tensor in the Dataset, such as token ids"
        )
    for name, x in parts:
        _check_tensors(x, indices, where + name)


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


def checked_weights(run, weights, allow_negative: bool) -> Tensor:
    """What `Run.weights` returns. Raises ValueError for another shape, and for numbers that are not finite,
    or that are negative and not allowed to be."""
    if weights is None or isinstance(weights, (int, float)):
        value = 1.0 if weights is None else float(weights)
        weights = torch.full(run.shape, value, dtype=run.dtype, device=run.device)
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, device=run.device)
    weights = weights.detach().to(run.device, run.dtype, copy=True)
    if run.tokens and weights.shape == (run.n,):
        weights = weights[:, None].repeat(1, run.tokens)
    if weights.shape != run.shape:
        more = f"; one per token is {run.shape}" if run.tokens else ""
        raise ValueError(f"weights have shape {tuple(weights.shape)}; one per example is ({run.n},){more}")
    if not weights.isfinite().all():
        raise ValueError(f"weights{(~weights.isfinite()).nonzero()[0].tolist()} is not finite")
    if not allow_negative and (weights < 0).any():
        raise ValueError(
            f"weights{(weights < 0).nonzero()[0].tolist()} is negative, which trains away from an "
            "example; if that is meant, pass allow_negative=True to run.train"
        )
    return weights


def check_accumulate(accumulate: int, batches: Sequence[Tensor]) -> None:
    """Raise unless every batch divides into `accumulate` parts of one length."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: in how many parts each batch is done; 1 is all at once")
    for t, indices in enumerate(batches):
        if len(indices) % accumulate:
            raise ValueError(
                f"accumulate={accumulate} does not divide batches[{t}], which has {len(indices)} examples"
            )


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
