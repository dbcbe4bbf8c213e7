"""Gradient clipping, as a plain loop does it between backward() and optimizer.step(), and its adjoint.

By norm (torch.nn.utils.clip_grad_norm_; Pascanu et al. 2013, arXiv 1211.5063): with N the norm of all
gradients as one vector, each becomes r·g, r = min(1, limit / (N + 1e-6)). By value
(torch.nn.utils.clip_grad_value_): each entry is brought between −limit and limit.

Where clipping begins, the clipped gradient has a kink: on its two sides it has two derivatives, and the one
of the side that training was on is taken. A prediction goes wrong where removing examples would turn the
clipping of a step on or off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .differentiated import laid_out_as

Grads = Mapping[str, Tensor]
EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped: `kind` is "norm" or "value", `limit` a positive number."""

    kind: str
    limit: float

    def clip(self, grads: Grads, params: Grads) -> dict[str, Tensor]:
        """The gradients as the optimizer sees them, with the bits that torch.nn.utils gives."""
        # A parameter's .grad has the parameter's strides, and a norm is summed in the order of memory.
        laid = {k: laid_out_as(g.detach(), params[k]) for k, g in grads.items()}
        if self.kind == "value":
            return {k: g.clamp(-self.limit, self.limit) for k, g in laid.items()}
        ratio = (self.limit / (_norm(laid) + EPS)).clamp(max=1.0)
        return {k: g * ratio for k, g in laid.items()}

    def clip_by_hand(self, grads: Grads) -> dict[str, Tensor]:
        """The same up to rounding, in operations that torch.func.vmap knows."""
        if self.kind == "value":
            return {k: g.clamp(-self.limit, self.limit) for k, g in grads.items()}
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        ratio = (self.limit / (norm + EPS)).clamp(max=1.0)
        return {k: g * ratio for k, g in grads.items()}

    def on(self, grads: Grads) -> bool:
        """Whether these gradients are changed."""
        if self.kind == "value":
            return any(bool((g.abs() > self.limit).any()) for g in grads.values())
        return bool(_norm(grads) + EPS > self.limit)

    def adjoint(self, grads: Grads) -> Callable[[Grads], None]:
        """The adjoint of `clip` at these gradients. What it returns turns the cotangents of the clipped
        gradients, (K, *shape) each, in place into those of the gradients.

        By norm, with r = limit/(N + 1e-6) < 1:  ḡ = r·c − r/((N + 1e-6)·N) · ⟨g, c⟩ · g,  where c is the
        cotangent and the inner product goes over all gradients.
        """
        if self.kind == "value":
            inside = {k: g.abs() <= self.limit for k, g in grads.items()}

            def by_value(cotangents: Grads) -> None:
                for k, c in cotangents.items():
                    c.mul_(inside[k])

            return by_value
        norm = _norm(grads)
        if norm + EPS <= self.limit:  # nothing was clipped
            return lambda cotangents: None
        ratio = self.limit / (norm + EPS)

        def by_norm(cotangents: Grads) -> None:
            along = sum(torch.tensordot(c, grads[k], grads[k].dim()) for k, c in cotangents.items())
            back = along * (ratio / ((norm + EPS) * norm))
            for k, c in cotangents.items():
                c.mul_(ratio).sub_(torch.tensordot(back[:, None], grads[k][None], 1))

        return by_norm


def read(clip: float | tuple[str, float] | None) -> Clipping | None:
    """What `Run(clip=...)` means. Raises ValueError or TypeError for anything else."""
    if clip is None:
        return None
    kind, limit = clip if isinstance(clip, (tuple, list)) and len(clip) == 2 else ("norm", clip)
    if kind not in ("norm", "value") or isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(
            f'clip={clip!r}: give the largest norm of all gradients together, such as 1.0, or ("value", 0.5) '
            "to bring each entry between −0.5 and 0.5"
        )
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"clip={clip!r}: a positive, finite number, or None for no clipping")
    return Clipping(kind, float(limit))


def _norm(grads: Grads) -> Tensor:
    return torch.nn.utils.get_total_norm(list(grads.values()))
