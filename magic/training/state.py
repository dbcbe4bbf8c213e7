"""State: everything training carries from one step to the next, as one value.

If s_{t+1} = step(s_t, batch_t, weights) is to be a function, then nothing that the next step reads
may live anywhere else: not in the module, not in the optimizer, not in a generator. A State is never
changed; a step makes a new one. So keeping a state costs no copy, and going back is a look-up. What it
means depends on its values alone, never on which object it is: a copy is the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from ..identity import fingerprints

_ALL = frozenset({"all buffers"})  # this object stands for the names of all buffers, whatever they are


@dataclass(frozen=True, eq=False)
class _Tensors:
    """The tensors of a training state, or those of its cotangent, by kind and name."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    step: int = 0

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same with f applied to every tensor."""
        return replace(
            self,
            params={name: f(x) for name, x in self.params.items()},
            buffers={name: f(x) for name, x in self.buffers.items()},
            slots={name: {slot: f(x) for slot, x in of.items()} for name, of in self.slots.items()},
        )

    def flatten(self) -> dict[str, Tensor]:
        """Every tensor under one name: 'params/0.weight', 'slots/0.weight/exp_avg', ..."""
        flat = {f"params/{name}": x for name, x in self.params.items()}
        flat |= {f"buffers/{name}": x for name, x in self.buffers.items()}
        for name, slots in self.slots.items():
            flat |= {f"slots/{name}/{slot}": x for slot, x in slots.items()}
        return flat

    @classmethod
    def unflatten(cls, flat: dict[str, Tensor], step: int, **others) -> Self:
        """That whose `flatten()` this is; `others` are its fields that hold no tensors."""
        params = {k.removeprefix("params/"): x for k, x in flat.items() if k.startswith("params/")}
        buffers = {k.removeprefix("buffers/"): x for k, x in flat.items() if k.startswith("buffers/")}
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in params}
        for key, x in flat.items():
            if key.startswith("slots/"):
                name, slot = key.removeprefix("slots/").rsplit("/", 1)
                slots[name][slot] = x
        return cls(params, buffers, slots, step, **others)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(x.numel() * x.element_size() for x in self.flatten().values())

    def fingerprint(self) -> str:
        """16 hex digits of every bit of every tensor; `step` is left out."""
        return fingerprints.fingerprint(self)


@dataclass(frozen=True, eq=False, repr=False)
class State(_Tensors):
    """s_t.

    params   name -> parameter that is trained; frozen ones are constants of the run
    buffers  name -> buffer of the model (BatchNorm's running statistics, an attention mask)
    slots    the optimizer state, name -> {its name: tensor}: what the optimizer remembers of that parameter,
             by PyTorch's names ("momentum_buffer", "exp_avg", ...); empty until the first update
    step     t, the number of steps done
    moved    the names of the buffers that training has written by now. The others are still those of
             s_0, constants that carry no derivative. Left out, it means all of them
    """

    moved: frozenset[str] = _ALL

    def __post_init__(self):
        moved = self.buffers if self.moved is _ALL else self.moved
        object.__setattr__(self, "moved", frozenset(moved))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.params.values())
        return f"State(step={self.step}, {count:,} parameters, fingerprint={self.fingerprint()})"


@dataclass(frozen=True, eq=False, repr=False)
class Cotangent(_Tensors):
    """Δ_t = ∂φ/∂s_t for K targets, where φ_k is the k-th number that the measure returns: each tensor of the
    state with a leading axis K.

    buffers  only of those that training has written by then, and that are floating-point
    slots    only of those that are floating-point
    """

    @property
    def targets(self) -> int:
        """K."""
        return len(next(iter(self.params.values())))

    def __repr__(self) -> str:
        return f"Cotangent(step={self.step}, {self.targets} targets, fingerprint={self.fingerprint()})"
