"""The six commands that a schedule is made of: plain data, which knows no numerics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Take s_t out of the store as the current state."""

    t: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Step the current state from t to `to`."""

    t: int
    to: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Step the current state from t to `to` and keep the trace of each step until its Adjoint."""

    t: int
    to: int


@dataclass(frozen=True, slots=True)
class Save:
    """Put the current state, s_t, into the store."""

    t: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget s_t."""

    t: int


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Pull the cotangent back through step t: by its kept trace, released here, or from the current s_t."""

    t: int


Action = Load | Advance | Trace | Save | Drop | Adjoint
