"""Trust, then verify: is a recomputed state the one that training passed through?

A wrong state gives a wrong derivative without any other sign. So training notes the checksums of its
state at some sixteen steps, and a state that is computed again for such a step is compared with them. A
stored state is compared with what was stored whenever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import determinism
from .state import State

NOTED = 16  # steps of a run whose state is noted; more would cost more of the training's time


class ReplayMismatch(RuntimeError):
    """A state is not the one that training passed through; its derivative would be wrong."""


def checksums(state: State) -> dict[str, int]:
    """The sum, modulo 2⁶⁴, of each tensor's bits in words of 64: any flipped bit changes it.

    A pass over memory and no more, so that it can be made often; `fingerprint` is for everything else.
    """
    return sums(state.flatten())


def sums(flat: Mapping[str, Tensor]) -> dict[str, int]:
    """`checksums` of tensors by name."""
    on: dict[torch.device, list[str]] = {}
    for name, x in flat.items():
        on.setdefault(x.device, []).append(name)
    found: dict[str, int] = {}
    for names in on.values():
        found |= zip(names, torch.stack([_sum(flat[name]) for name in names]).tolist(), strict=True)
    return {name: found[name] for name in flat}


def _sum(x: Tensor) -> Tensor:
    raw = x.detach().contiguous().reshape(-1)
    if raw.storage_offset() * raw.element_size() % 8:
        raw = raw.clone()
    size = raw.numel() * raw.element_size()
    if size % 8 == 0:
        return raw.view(torch.int64).sum()
    raw = raw.view(torch.uint8)
    return raw[: size // 8 * 8].view(torch.int64).sum() + raw[size // 8 * 8 :].sum()


class Passed:
    """What one training of a run passed through.

    noted   the checksums of its state at some steps
    totals  the total loss of every step done: a witness that costs nothing, since whoever does a step again,
            or traces it, computes it again. Equal bits say that data, labels, masks and code are still the
            same, whatever a schedule keeps
    """

    def __init__(self, steps: int, noted: dict[int, dict[str, int]] | None = None, settings=None):
        self.steps = steps
        self.noted = noted or {}
        self.settings = settings or determinism.numerics()
        self.totals: dict[int, float] = {}
        self.verified = 0

    def witness(self, t: int, total: float) -> None:
        """Note the total loss of step t, or compare it with what it was."""
        before = self.totals.setdefault(t, total)
        if before != total:
            what = f"the total loss is {total!r} and was {before!r}"
            raise ReplayMismatch(self._why(t, what))

    def notes(self, t: int) -> bool:
        """Whether step t is one of those noted."""
        return (t > 0 and t % max(1, self.steps // NOTED) == 0) or t == self.steps

    def adopt(self, noted: dict[int, dict[str, int]], totals: dict[int, float]) -> None:
        """Take over what an earlier process noted; it must not contradict what is known."""
        for t, total in totals.items():
            self.witness(t, total)
        for t, sums in noted.items():
            name = next((k for k, v in self.noted.get(t, sums).items() if sums.get(k) != v), None)
            if name is not None:
                raise ReplayMismatch(self._why(t, f"{name!r} is not what it was"))
        self.noted |= noted

    def compare(self, state: State) -> None:
        """Note this state, or compare it with what was noted when training passed here."""
        sums = checksums(state)
        known = self.noted.setdefault(state.step, sums)
        self.verified += known is not sums
        for name in sums:
            if known.get(name) != sums[name]:
                raise ReplayMismatch(self._why(state.step, f"{name!r} is not what it was"))

    def _why(self, t: int, what: str) -> str:
        now = determinism.numerics()
        changed = [f"{k} was {v}, is {now[k]}" for k, v in self.settings.items() if now[k] != v]
        likely = (
            f"Since then, {'; '.join(changed)}: restore it, or make a new Run"
            if changed
            else "Likely: an operation that is not deterministic, or data, model or loss changed since. "
            "Make a new Run, and let nothing change under it"
        )
        return f"step {t}: {what} when training passed here. {likely}"


def check_stored(state: State, stored: dict[str, int], place: str) -> None:
    """Raise ReplayMismatch unless a state that was stored in `place` is what was stored."""
    for name, total in checksums(state).items():
        if stored[name] != total:
            raise ReplayMismatch(
                f"step {state.step}: {name!r}, stored in {place}, is not what was stored: something wrote "
                "into it, or the memory is faulty. Look for in-place changes of a state's tensors"
            )
