"""Where states are kept: on the model's device, in host memory, on disk. It knows no policy, no numerics.

A place has `save(t, state)`, `load(t)`, `drop(t)`. What a place gives back has the bits that were
stored, or it raises: a state in memory is compared with its checksum, a file with its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from pathlib import Path

import torch

from ..training.record import ReplayMismatch, check_stored, checksums
from ..training.state import State
from .files import PARTS, Misplaced, read, write


class Memory:
    """States kept where they are, on the model's device. A state never changes, so nothing is copied."""

    name = "memory"

    def __init__(self):
        self._states: dict[int, tuple[State, dict[str, int]]] = {}

    def save(self, t: int, state: State) -> None:
        """Keep s_t."""
        self._states[t] = self.keep(state), checksums(state)

    def load(self, t: int) -> State:
        """s_t; KeyError if it is not kept."""
        kept, sums = self._states[t]
        state = self.give_back(kept)
        check_stored(state, sums, self.name)
        return state

    def drop(self, t: int) -> None:
        """Forget s_t; KeyError if it is not kept."""
        del self._states[t]

    def keep(self, state: State) -> State:
        return state

    def give_back(self, state: State) -> State:
        return state


class Host(Memory):
    """States of a GPU's run, copied into the host's memory, pinned so that the copy is fast."""

    name = "host memory"

    def __init__(self, device: torch.device, constant: State):
        super().__init__()
        self._device = device
        self._constant = constant
        self._on_host: dict[int, set[str]] = {}

    def keep(self, state: State) -> State:
        self._on_host[state.step] = {k for k, x in state.flatten().items() if x.device.type == "cpu"}
        flat = {name: _pinned(x) for name, x in written(state).items()}
        return with_constants(flat, state.step, state.moved, self._constant)

    def give_back(self, state: State) -> State:
        there = self._on_host[state.step]
        flat = {k: x if k in there else x.to(self._device) for k, x in written(state).items()}
        return with_constants(flat, state.step, state.moved, self._constant)


def written(state: State) -> dict[str, torch.Tensor]:
    """The tensors of a state, flat, without the buffers that are still those of s_0."""
    constant = {f"buffers/{name}" for name in state.buffers if name not in state.moved}
    return {name: x for name, x in state.flatten().items() if name not in constant}


def with_constants(flat: dict, step: int, moved: frozenset[str], initial: State) -> State:
    """The state that `written` gives this of; its other buffers are those of s_0."""
    constant = {f"buffers/{name}": b for name, b in initial.buffers.items() if name not in moved}
    order = {f"buffers/{name}": None for name in initial.buffers}
    return State.unflatten({**order, **flat, **constant}, step, moved=moved)


def _pinned(x: torch.Tensor) -> torch.Tensor:
    there = torch.empty_like(x, device="cpu", pin_memory=torch.cuda.is_available())  # its layout, too
    return there.copy_(x)


class Disk:
    """States in safetensors files of a folder, each whole or not there at all, with its fingerprint.

    `constant` is s_0: of the buffers, those that are still its own are not written again. A file says its
    step, its kind and whose it is (`owner`), and is refused elsewhere.
    """

    name = "disk"

    def __init__(self, folder: Path, constant: State, kind: str = "state", owner: str = ""):
        self.folder, self._constant = Path(folder), constant
        self._kind, self._owner = kind, owner

    def _meta(self, t: int) -> dict:
        return {"step": t, "kind": self._kind, "run": self._owner}

    def path(self, t: int) -> Path:
        return self.folder / f"state-{t:09}.safetensors"

    def save(self, t: int, state: State) -> None:
        """Write s_t."""
        write(self.path(t), written(state), self._meta(t) | {"moved": sorted(state.moved)})

    def load(self, t: int) -> State:
        """s_t; KeyError if it is not kept, ReplayMismatch if its file is damaged."""
        if not self.path(t).exists():
            raise KeyError(t)
        flat, meta = read(self.path(t), next(iter(self._constant.params.values())).device, self._meta(t))
        return with_constants(flat, t, frozenset(meta["moved"]), self._constant)

    def drop(self, t: int) -> None:
        """Remove the file of s_t."""
        self.path(t).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps whose files are there."""
        digits = (p.stem.removeprefix("state-") for p in self.folder.glob("state-*.safetensors"))
        return sorted(int(t) for t in digits if t.isdecimal())

    def kept(self) -> list[int]:
        """The steps whose files are there and undamaged; what a kill left behind is removed.

        Raises ReplayMismatch for a whole file of something else, which is not ours to remove.
        """
        for part in self.folder.glob(PARTS):
            part.unlink(missing_ok=True)
        whole = []
        for t in self.steps():
            try:
                read(self.path(t), torch.device("cpu"), self._meta(t))
                whole.append(t)
            except Misplaced:
                raise
            except ReplayMismatch:
                self.drop(t)
        return whole


class Store:
    """The slots of a schedule, each in one of several places; counts what each place holds at most.

    tier_of   of each slot, its place: an index into `places`; slots are taken lowest first
    kept      states that the last place, a Disk, holds from the start; they take no slot
    """

    def __init__(self, places: Sequence, tier_of: Sequence[int], kept: Iterable[int] = ()):
        self._places, self._tier_of = places, tier_of
        self._free = list(range(len(tier_of)))
        self._slot_of: dict[int, int] = {}
        self._where = dict.fromkeys(kept, len(places) - 1)
        self._bytes: dict[int, int] = {}
        self._now = [[0, 0] for _ in places]
        self.peak_states = [0] * len(places)
        self.peak_bytes = [0] * len(places)

    def save(self, t: int, state: State) -> None:
        """Keep s_t."""
        slot = heappop(self._free)
        place = self._tier_of[slot]
        self._places[place].save(t, state)
        self._slot_of[t], self._where[t], self._bytes[t] = slot, place, state.nbytes
        self._count(place, 1, state.nbytes)

    def _count(self, place: int, states: int, nbytes: int) -> None:
        now = self._now[place]
        now[0], now[1] = now[0] + states, now[1] + nbytes
        self.peak_states[place] = max(self.peak_states[place], now[0])
        self.peak_bytes[place] = max(self.peak_bytes[place], now[1])

    def load(self, t: int) -> State:
        """s_t; KeyError if it is not kept."""
        place = self._places[self._where[t]]
        try:
            return place.load(t)
        except KeyError as error:
            raise ReplayMismatch(
                f"step {t}: its state is gone from {place.name}: something removed it during the work. "
                "Call again; what is left there is gone on from"
            ) from error

    def drop(self, t: int) -> None:
        """Forget s_t; KeyError if it is not kept."""
        place = self._where.pop(t)
        self._places[place].drop(t)
        if t in self._slot_of:
            heappush(self._free, self._slot_of.pop(t))
            self._count(place, -1, -self._bytes.pop(t))
