"""Vector-Jacobian products of one graph for many targets, as many at once as memory and speed allow."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # targets pulled back at once; more would hold more copies of a batch's activations
BLOCK = 4  # targets that go through the optimizer's update at once, at least: its calls are short


def pull(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: Callable[[slice], list[Tensor]],
    count: int,
    chunk: int = CHUNK,
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Vector-Jacobian products for `count` targets, at most `chunk` of them in flight at once.

    cotangents   rows of targets -> their cotangents, (rows, *output) for each output; asked for once a row
    yields       rows, and their products, (rows, *input) for each input

    Where an operation cannot be batched, warns with its name and goes on one by one.
    """
    used = {i for i, y in enumerate(outputs) if y.requires_grad}
    outputs = [y for i, y in enumerate(outputs) if i in used]

    def vjp(*rows):
        return torch.autograd.grad(
            outputs, inputs, rows, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def together(rows: slice, given: list[Tensor]):
        if rows.stop - rows.start > 1:
            try:
                with _no_slow_batching():
                    products = torch.vmap(vjp)(*given)
            except RuntimeError as error:
                if "vmap" not in str(error) and "atch" not in str(error):
                    raise
                warnings.warn(
                    f"the {count} targets are pulled back one by one, which is slower: {error}", stacklevel=4
                )
            else:
                yield rows, products
                return
        for i in range(rows.stop - rows.start):
            k = rows.start + i
            yield slice(k, k + 1), tuple(x.unsqueeze(0) for x in vjp(*(c[i] for c in given)))

    for block in _parts(0, count, max(chunk, BLOCK)):
        given = [c for i, c in enumerate(cotangents(block)) if i in used]
        for rows in _parts(block.start, block.stop, chunk):
            here = slice(rows.start - block.start, rows.stop - block.start)
            yield from together(rows, [c[here] for c in given])


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    """start … stop in pieces of about one length, at most `size`."""
    count = -(-(stop - start) // size)
    for i in range(count):
        yield slice(start + (stop - start) * i // count, start + (stop - start) * (i + 1) // count)


@contextlib.contextmanager
def _no_slow_batching():
    """An operation that vmap has no batching rule for raises, instead of being looped over in silence."""
    functorch: Any = torch._C._functorch  # PyTorch's stubs leave these functions out
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
