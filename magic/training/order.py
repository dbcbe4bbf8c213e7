"""The order of training: which examples form the batch of each step."""

from __future__ import annotations

import torch
from torch import Tensor


def batches(n: int, size: int, epochs: int, seed: int = 0) -> Tensor:
    """The order of training: a (T, B) tensor of indices into n examples, T = epochs · (n // size).

    Each epoch is a new permutation. The n % size examples left over at its end are skipped, so that every
    batch has the same size; in each epoch they are others. The order depends on `seed` alone.
    """
    if not 1 <= size <= n:
        raise ValueError(f"size={size}: a batch holds between 1 and n={n} examples")
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least one epoch is needed")
    generator = torch.Generator().manual_seed(seed)
    per_epoch = n // size
    orders = [torch.randperm(n, generator=generator, device="cpu")[: per_epoch * size] for _ in range(epochs)]
    return torch.stack(orders).reshape(epochs * per_epoch, size)
