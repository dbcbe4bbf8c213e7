"""Where states are kept. A store knows places, not policies and not numerics."""

from __future__ import annotations

from .state import State


class Memory:
    """States kept where they are, on the model's device. A state never changes, so nothing is copied."""

    def __init__(self):
        self._states: dict[int, State] = {}
        self._bytes = 0
        self.peak_states = 0
        self.peak_bytes = 0

    def save(self, t: int, state: State) -> None:
        """Keep s_t."""
        self._states[t] = state
        self._bytes += state.nbytes
        self.peak_states = max(self.peak_states, len(self._states))
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def load(self, t: int) -> State:
        """s_t; KeyError if it is not kept."""
        return self._states[t]

    def drop(self, t: int) -> None:
        """Forget s_t; KeyError if it is not kept."""
        self._bytes -= self._states.pop(t).nbytes
