"""Exercises of chapter 07: what a budget buys, a witness, a fingerprint, and the capstone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import capstone  # its exercise is 07.9
from .judging import Cases, Wrong, exercise, number

__all__ = ["capstone"]


# -- 07.1 --------------------------------------------------------------------------------------------


@exercise("07.1", "a function that says how many extra steps a budget leaves")
def extra_steps(answer: Any) -> None:
    from magic.engine.costs import advanced

    def extra(T: int, states: int) -> Tensor:
        return number(advanced(T, min(max(states, 1), T)) - (T - 1))

    cases = Cases({})
    for case, T, budget, state, trace in (
        ("10 states beside a trace", 200, 125, 10, 25),
        ("a budget that is not a round number of states", 200, 134, 10, 25),
        ("room for the start alone", 50, 35, 10, 25),
        ("more room than there are steps", 20, 10_000, 10, 25),
        ("a long run", 100_000, 5_000_000, 123_456, 654_321),
    ):
        got = cases.call(case, answer, T, budget, state, trace)
        fit = (budget - trace) // state
        suspects = {
            "the trace needs room, too": extra(T, budget // state),
            "a part of a state is no state: round down": extra(T, -(-(budget - trace) // state)),
            "the start is one of the states that fit": extra(T, fit + 1),
            "those of the training are among them": extra(T, fit) + T - 1,
            "the training advances T − 1 steps, not T": extra(T, fit) - 1,
        }
        want = extra(T, fit)
        cases.same(case, got, want, {why: x for why, x in suspects.items() if x != want})
    case = "a budget that holds a trace and no state"
    got = cases.call(case, answer, 50, 34, 10, 25)
    cases.true(case, got is None, f"nothing can be done with it, so None is asked for, and {got!r} came")


# -- 07.2 --------------------------------------------------------------------------------------------

CALLS = 40  # of phi; a dozen are asked for


class _Function:
    """A smooth function of 50 numbers with its gradient; notes where it is evaluated."""

    def __init__(self, bend: float = 1.0, offset: float = 0.0):
        dice = torch.Generator().manual_seed(7)
        self.a, self.w = torch.randn(2, 50, generator=dice, dtype=torch.float64)
        self.bend, self.offset, self.at = bend, offset, list[Tensor]()

    def __call__(self, w: Tensor) -> float:
        w = torch.as_tensor(w, dtype=torch.float64)
        self.at.append(w.detach().clone())
        return self.value(w).item()

    def value(self, w: Tensor) -> Tensor:
        return self.offset + torch.sin(self.bend * (self.a * w)).sum() / self.bend + (w**2).sum() / 4

    @property
    def gradient(self) -> Tensor:
        w = self.w.clone().requires_grad_()
        return torch.autograd.grad(self.value(w), w)[0]


def _orthogonal(error: Tensor, to: Tensor) -> Tensor:
    """The error without its part in the span of the rows of `to`."""
    basis = torch.linalg.svd(to, full_matrices=False)[2]
    return error - basis.T @ (basis @ error)


def _planted(g: Tensor) -> dict[str, tuple[Tensor, str]]:
    """Gradients with an error: what it is, and the mistake of a witness that does not see it."""
    last, half = g.clone(), g.clone()
    # in every entry: of two errors that cancel, one direction of ±1 in two sees nothing, by chance
    errors = torch.randn(len(g), generator=torch.Generator().manual_seed(8), dtype=g.dtype)
    last[-1] += 1
    half[:25] = 0
    return {
        "a gradient that is 1.01 times too large": (1.01 * g, "is your tolerance too wide"),
        "an error in the last entry": (last, "do you look at the first entries only"),
        "errors that cancel in the sum": (
            g + errors - errors.mean(),
            "moving all entries by the same amount misses them",
        ),
        "a gradient of which half is missing": (
            half,
            "moving along the given gradient leaves the missing half in place; take a random direction",
        ),
    }


@exercise("07.2", "a witness: a function that tells a right gradient from a wrong one")
def agrees(answer: Any) -> None:
    cases = Cases({})
    for case, function, why in (
        ("a right gradient", _Function(), "it was refused. Is the difference divided by 2ε, and is ε small"),
        (
            "a right gradient of a strongly curved function",
            _Function(bend=100.0),
            "it was refused. If ε is large, the curvature spoils the difference: take it smaller",
        ),
        (
            "a right gradient where phi is about 100,000",
            _Function(offset=1e5),
            "it was refused. If ε is small, the difference is rounding: take it larger",
        ),
    ):
        cases.true(case, _believes(cases, case, answer, function, function.gradient), why)
    for case, (gradient, why) in _planted(_Function().gradient).items():
        said = _believes(cases, case, answer, _Function(), gradient)
        cases.true(case, not said, f"it was believed: {why}")
    case, function = "an error that is planted where you looked last time", _Function()
    _believes(cases, case, answer, function, function.gradient)
    looked = torch.stack([w - function.w for w in function.at])
    noise = torch.randn(50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    planted = function.gradient + _orthogonal(noise, looked)
    said = _believes(cases, case, answer, function, planted)
    cases.true(
        case, not said, "it was believed: your directions are the same in every call, and can be fooled"
    )


def _believes(cases: Cases, case: str, answer: Callable, function: _Function, gradient: Tensor) -> bool:
    before = len(function.at)
    said = cases.call(case, answer, function, gradient, function.w)
    if len(function.at) - before > CALLS:
        raise Wrong(f"phi was called {len(function.at) - before} times for {case}, and a dozen should do.")
    if isinstance(said, Tensor) and said.numel() == 1:
        said = said.item()
    if type(said).__name__ not in ("bool", "bool_"):
        raise Wrong(f"for {case} came {said!r}, and asked for is True or False.")
    return bool(said)


# -- 07.3 --------------------------------------------------------------------------------------------


@exercise("07.3", "a fingerprint that sees every flipped bit")
def fingerprint(answer: Any) -> None:
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(1000, generator=dice) * 10 ** torch.randint(-4, 5, (1000,), generator=dice)
    x[0] = 0.0
    cases = Cases({})
    case = "two tensors with equal bits"
    first, second = (_int(cases, case, answer, y) for y in (x, x.clone()))
    cases.true(case, first == second, f"the fingerprints differ, {first} and {second}")
    smallest = int(x[1:].abs().argmin()) + 1
    places = torch.randint(1000, (30,), generator=dice).tolist()
    bits = torch.randint(32, (30,), generator=dice).tolist()
    for case, flips, why in (
        ("the lowest bit of a small entry", [(smallest, 0)], "in a sum of floats it is rounded away"),
        ("the sign of a zero", [(0, 31)], "0.0 and −0.0 are equal as numbers; look at their bits"),
        ("a high bit", [(5, 30)], "is a part of each entry left out"),
        ("30 random bits, one at a time", zip(places, bits, strict=True), "look at all bits of all entries"),
    ):
        for place, bit in flips:
            y = x.clone()
            y.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 2**bit
            same = _int(cases, case, answer, y) == first
            cases.true(case, not same, f"flipping it leaves the fingerprint as it was: {why}")
            cases.right.pop()
        cases.right.append(case)


def _int(cases: Cases, case: str, answer: Callable, x: Tensor) -> int:
    found = cases.call(case, answer, x)
    if not isinstance(found, int) or isinstance(found, bool):
        kind = type(found).__name__
        raise Wrong(f"for {case} came {kind}, and asked for is an int (of a tensor, .item() gives it).")
    return found
