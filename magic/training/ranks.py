"""One run on several processes: each rank of torch.distributed does its share of every batch.

A batch is done in parts, as under `Run(accumulate=)`, and a rank does some of them. What a step needs of the
others is one sum over the ranks, of the gradient; its adjoint needs one too, of what is pulled back to the
parameters. Every rank holds the whole state, and so the same cotangent, and ends with the same scores.

The result is that of a run with as many parts on one process, up to the order in which sums are rounded, and
the number of ranks is part of the run's identity.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import determinism, examples
from .gradient import Gradient
from .run import Run


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those of a group of torch.distributed."""

    rank: int
    world: int
    backend: str
    group: Any = None

    def own(self, parts: int) -> range:
        """The parts of a batch that are done here."""
        return range(self.rank, parts, self.world)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for x in tensors:
            by_type.setdefault(x.dtype, []).append(x)
        for some in by_type.values():
            flat = torch.cat([x.reshape(-1) for x in some])
            dist.all_reduce(flat, group=self.group)
            for x, part in zip(some, flat.split([x.numel() for x in some]), strict=True):
                x.copy_(part.view_as(x))

    def whole(self, own: Gradient, params: dict[str, Tensor]) -> Gradient:
        """The gradient of the batch, from that of the parts that each rank has done."""
        like, names = own.total, list(own.by_name)
        # what is used, and a way by which a number may have left the graph, is known to all if to one
        told = [*(g is not None for g in own.by_name.values()), bool(own.escaped)]
        seen = torch.tensor(told, dtype=like.dtype, device=like.device)
        zeros = {name: torch.zeros_like(params[name]) for name in names}
        grads = {name: zeros[name] if g is None else g.detach().clone() for name, g in own.by_name.items()}
        total = like.detach().clone()
        self.sum([seen, total, *grads.values()])
        *used, escaped = seen.tolist()
        by_name = {name: grads[name] if count else None for name, count in zip(names, used, strict=True)}
        ways = own.escaped or (("something on another rank",) if escaped else ())
        return replace(own, total=total, by_name=by_name, escaped=ways)

    def agreed(self, thing: Any) -> Any:
        """What rank 0 has, for all."""
        found = [thing]
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        return found[0]


def distributed(run: Run, group=None) -> Run:
    """The same run with each batch shared between the processes of a group of torch.distributed.

    Call it in every process, with the same run, and then call what you would call with one: `train`,
    `magic.attribute`, `magic.lds`. The batch is done in as many parts as there are ranks, or as
    `Run(accumulate=)` says.

    Raises RuntimeError where torch.distributed is not initialised, and ValueError for batches that do not
    divide, for a model whose training writes buffers (BatchNorm's statistics would be each rank's own), and
    if the ranks have different runs.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "distributed: torch.distributed is not initialised; start the processes with torchrun and call "
            'torch.distributed.init_process_group("gloo"), or "nccl" on GPUs, first'
        )
    ranks = Ranks(dist.get_rank(group), dist.get_world_size(group), str(dist.get_backend(group)), group)
    if run.accumulate % ranks.world and run.accumulate != 1:
        raise ValueError(f"accumulate={run.accumulate} parts cannot be shared by {ranks.world} ranks alike")
    first = run.step(run.initial, run.weights())
    if first.moved:
        raise ValueError(
            f"distributed: training writes the buffer {sorted(first.moved)[0]!r}, and each rank would have "
            "its own; use a normalisation that does not look at the batch, such as GroupNorm"
        )
    prints: list = [None] * ranks.world
    dist.all_gather_object(prints, run.fingerprint(), group=group)
    if len(set(prints)) > 1:
        raise ValueError("distributed: the ranks have different runs; use the same seeds and data")
    other = copy.copy(run)
    other.accumulate = max(run.accumulate, ranks.world)
    examples.check_accumulate(other.accumulate, run.batches)
    other.ranks = ranks
    with determinism.alone():
        other.step(other.initial, other.weights())
    return other
