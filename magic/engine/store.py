"""The slots of a schedule, each in a place; and the nearest place, the memory of the model's device.

A place has `save(t, state)`, `load(t)`, `drop(t)`; the places further away are in `magic.engine.places`.
What a place gives back has the bits that were stored, or it raises: a state in memory is compared with its
checksum, a file with its fingerprint. Neither places nor slots know of policy or of numerics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from ..training.record import ReplayMismatch, check_stored, checksums
from ..training.state import State


class Memory:
    """States kept where they are, on the model's device.

    A state never changes, so keeping it copies nothing. Should something write into its tensors all the same,
    its checksum tells.
    """

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
        """What is kept of a state: here the state itself."""
        return state

    def give_back(self, state: State) -> State:
        """The state, of what was kept of it."""
        return state


class Store:
    """The slots of a schedule, each in one of several places; counts what each place holds at most.

    tier_of   the place of each slot, as an index into `places`
    kept      states that the last place, a Disk, holds from the start; they take no slot

    Invariant: a state that is saved takes the lowest slot that is free, and frees it when it is dropped.
    A plan relies on it (`search.places`): it puts the busiest slots nearest, knowing before the work begins
    which state will be in which slot.
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
