"""State: everything training carries from one step to the next, as one value.

If s_{t+1} = step(s_t, batch_t, weights) is to be a function, then nothing that the next step reads
may live anywhere else: not in the module, not in the optimizer, not in a generator. A State is never
changed; a step makes a new one. So keeping a state costs no copy, and going back is a look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import determinism


@dataclass(frozen=True, eq=False)
class State:
    """s_t.

    params   name -> parameter that is trained; frozen ones are constants of the run
    buffers  name -> buffer that training changes (BatchNorm's running statistics)
    slots    name -> {slot: tensor}, what the optimizer remembers of that parameter, under PyTorch's
             own names ("momentum_buffer", "exp_avg", ...); empty until the first update
    step     t, the number of steps done

    The adjoint uses the same class for a cotangent: each tensor then has a leading axis K.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    step: int = 0

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """The state with f applied to every tensor."""
        return State(
            {name: f(x) for name, x in self.params.items()},
            {name: f(x) for name, x in self.buffers.items()},
            {name: {slot: f(x) for slot, x in slots.items()} for name, slots in self.slots.items()},
            self.step,
        )

    def flatten(self) -> dict[str, Tensor]:
        """Every tensor under one name: 'params/0.weight', 'slots/0.weight/exp_avg', ..."""
        flat = {f"params/{name}": x for name, x in self.params.items()}
        flat |= {f"buffers/{name}": x for name, x in self.buffers.items()}
        for name, slots in self.slots.items():
            flat |= {f"slots/{name}/{slot}": x for slot, x in slots.items()}
        return flat

    @classmethod
    def unflatten(cls, flat: dict[str, Tensor], step: int) -> State:
        """The state whose `flatten()` this is."""
        params = {k.removeprefix("params/"): x for k, x in flat.items() if k.startswith("params/")}
        buffers = {k.removeprefix("buffers/"): x for k, x in flat.items() if k.startswith("buffers/")}
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in params}
        for key, x in flat.items():
            if key.startswith("slots/"):
                name, slot = key.removeprefix("slots/").rsplit("/", 1)
                slots[name][slot] = x
        return cls(params, buffers, slots, step)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(x.numel() * x.element_size() for x in self.flatten().values())

    def fingerprint(self) -> str:
        """16 hex digits of every bit of every tensor; `step` is left out."""
        return determinism.fingerprint(self)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.params.values())
        return f"State(step={self.step}, {count:,} parameters, fingerprint={self.fingerprint()})"
