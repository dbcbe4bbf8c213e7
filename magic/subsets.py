"""Which examples to leave out: one row of data weights for each counterfactual training.

`random`, `single`, `top` and `without` return (S, n) float32 weights on the CPU, a row for each training:
1 = present, 0 = removed. `groups` returns such a row for each group, and `permutations` the orders from which
random sets are taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .training.examples import check_indices

# Added to a seed. PyTorch's randperm with the seed of `magic.batches` would give the order of the batches,
# so that row s of `random` were the first examples of epoch s: no random set at all.
OWN = 0x6D61676963


def permutations(n: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` random orders, (n,) indices each, independent of those of `magic.batches` with any seed."""
    generator = torch.Generator().manual_seed(OWN + seed)
    return [torch.randperm(n, generator=generator, device="cpu") for _ in range(count)]


def random(n: int, drop: float, subsets: int, seed: int = 0) -> Tensor:
    """(subsets, n): each row drops the same fraction of the examples, at random.

    Raises ValueError when the fraction rounds to no example or to all of them.
    """
    count = round(drop * n)
    if not 0 < count < n:
        raise ValueError(
            f"drop={drop} of n={n} examples rounds to {count}; a subset drops between 1 and {n - 1}: "
            f"use a fraction between {0.5 / n:.2g} and {1 - 0.5 / n:.6g}"
        )
    if subsets < 1:
        raise ValueError(f"subsets={subsets}: at least 1")
    return without(n, [order[:count] for order in permutations(n, subsets, seed)])


def single(n: int, examples: Iterable[int]) -> Tensor:
    """(S, n): each row leaves out one of these S examples.

    Raises IndexError for an example that there is not, ValueError for one given twice.
    """
    return without(n, [[i] for i in check_indices(examples, n).tolist()])


def top(values: Tensor, counts: Iterable[int], helpful: bool = True) -> Tensor:
    """(S, n): row s leaves out the counts[s] examples with the lowest scores, or with the highest.

    values   (n,), one target's row of scores. Those with the lowest help an output that is a loss.

    Raises ValueError for a count that leaves out nothing or everything.
    """
    order = values.argsort(stable=True, descending=not helpful).cpu()
    counts = list(counts)
    for count in counts:
        if not 0 < count < len(order):
            raise ValueError(f"counts={counts}: each is at least 1 and less than n={len(order)}")
    return without(len(order), [order[:count] for count in counts])


def groups(labels: Tensor) -> dict[int, Tensor]:
    """Label -> (n,) weights that leave out all examples with this label, such as a class or a source.

    labels   (n,) integers. Raises ValueError where all are the same.
    """
    labels = torch.as_tensor(labels).cpu()
    found = labels.unique().tolist()
    if len(found) < 2:
        raise ValueError("all examples are in one group; without it there is nothing to train on")
    return {label: (labels != label).to(torch.float32) for label in found}


def without(n: int, removed: Iterable) -> Tensor:
    """(S, n): row s leaves out the examples in removed[s], indices of training examples.

    Raises IndexError for an example that there is not, ValueError for one given twice.
    """
    removed = list(removed)
    weights = torch.ones(len(removed), n, device="cpu")
    for row, examples in zip(weights, removed, strict=True):
        row[check_indices(examples, n)] = 0.0
    return weights


def spans(shape: tuple[int, int], removed: Iterable[Iterable[tuple[int, int, int]]]) -> Tensor:
    """(S, n, L): row s leaves out the tokens in removed[s], for runs whose data weights are per token.

    shape     (n, L), such as `run.shape`
    removed   for each row (example, start, stop) of spans; token `stop` stays

    Raises IndexError for an example or a token that there is not, ValueError for a span without a token.
    """
    removed = [list(spans) for spans in removed]
    n, length = shape
    weights = torch.ones(len(removed), n, length, device="cpu")
    for row, spans in zip(weights, removed, strict=True):
        for example, start, stop in spans:
            if not (0 <= example < n and min(start, stop) >= 0 and max(start, stop) <= length):
                raise IndexError(
                    f"tokens {start} … {stop} of example {example}: there are {n} examples of {length} tokens"
                )
            if start >= stop:
                raise ValueError(f"({example}, {start}, {stop}) is a span without a token")
            row[example, start:stop] = 0.0
    return weights
