"""How an exercise is judged: the reader's function meets cases, and the first that fails is explained.

A checker is a function of one answer, registered by `exercise`. It goes through named cases in order of
difficulty; in each it calls the answer and compares what comes back with an oracle: a finite difference,
autograd, or the package. What it says of a wrong answer is what a teacher would say: which cases were
right, which is the first that is not, and, where the numbers show it, what was forgotten.
"""

from __future__ import annotations

import copy
import functools
import importlib
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SECONDS = 30.0


class Wrong(Exception):
    """What is wrong with an answer, in words for the reader. Checkers raise it; `judge` catches it."""


class Verdict(NamedTuple):
    """ok: whether the answer is right; text: what the reader is told."""

    ok: bool
    text: str


class Exercise(NamedTuple):
    """asks: what the reader was asked to write; checker: raises Wrong for an answer that is not it."""

    asks: str
    checker: Callable[[Any], None]


EXERCISES: dict[str, Exercise] = {}


def number(x: float) -> Tensor:
    """A number as the tensor that `Cases.same` compares."""
    return torch.tensor(float(x), dtype=torch.float64)


def exercise(number: str, asks: str) -> Callable:
    """Register a checker as that of an exercise such as "04.2": chapter 04, second exercise."""

    def register(checker: Callable[[Any], None]) -> Callable[[Any], None]:
        EXERCISES[number] = Exercise(asks, checker)
        return checker

    return register


def check(number: str, answer: Any) -> None:
    """Print what is right or wrong about an answer to an exercise, such as check("04.2", pull_nesterov).

    answer   the function, or the value, that the exercise asks for

    Nothing is raised for a wrong answer: whatever it does, the reply is a sentence. ValueError for a number
    that is no exercise's.
    """
    print(judge(number, answer).text)


def judge(number: str, answer: Any, seconds: float = SECONDS) -> Verdict:
    """The verdict that `check` prints. An answer that takes longer than `seconds` is stopped."""
    asks, checker = _find(number)
    if answer is None or answer is ...:
        return Verdict(False, f"✗ {number}: there is no answer yet. Asked for is {asks}.")
    _warm_up()
    try:
        with _at_most(seconds):
            checker(answer)
    except Wrong as wrong:
        return Verdict(False, f"✗ {number}: {wrong}")
    except _TooLong:
        return Verdict(False, f"✗ {number}: no answer after {seconds:g} seconds. Does a loop never end?")
    return Verdict(True, f"✓ {number}: right. You wrote {asks}.")


def _find(number: str) -> Exercise:
    try:
        importlib.import_module(f"{__package__}.chapter_{number[:2]}")
        return EXERCISES[number]
    except (ModuleNotFoundError, KeyError):
        known = sorted(n for n in EXERCISES if n[:2] == number[:2])
        hint = f"chapter {number[:2]} has {', '.join(known)}" if known else 'write it like "04.2"'
        raise ValueError(f"no exercise has the number {number!r}: {hint}") from None


@functools.cache
def _warm_up() -> None:
    """Import what PyTorch imports at its first derivative and its first optimizer.

    It takes seconds, more than many answers, and an import that is interrupted leaves half a module behind.
    """
    importlib.import_module("torch._dynamo")
    one = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about torch.jit
        torch.func.jvp(torch.sin, (one,), (one,))
        torch.func.vjp(torch.sin, one)


class _TooLong(BaseException):
    """Raised in the thread that judges. A BaseException, since answers may catch every Exception."""


@contextmanager
def _at_most(seconds: float):
    """Raise _TooLong in the block when it has run for so long, and again while it goes on.

    By the alarm signal, which Unix has and the main thread hears, where notebooks run their cells. Elsewhere
    there is no limit.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Cases:
    """The cases of one checker, in order: what was right so far is part of what is said.

    scalars   named numbers that a reader may have forgotten or used twice, such as {"the rate": 0.05};
              an answer that is off by one of them, everywhere, is told so
    """

    scalars: Mapping[str, float]
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        self.right: list[str] = []

    def call(self, case: str, answer: Any, *arguments: Any) -> Any:
        """answer(*copies of the arguments). Raises Wrong where it is no function or raises itself."""
        if not callable(answer):
            raise Wrong(f"asked for is a function, and this is of type {type(answer).__name__}.")
        try:
            return answer(*map(_copied, arguments))
        except (Wrong, KeyboardInterrupt, _TooLong):
            raise
        except BaseException as error:  # whatever it is, even SystemExit, the reader gets an answer
            line = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{line.name}: {line.line}" if line.line else line.name
            raise Wrong(
                f"{self._so_far()}your function raised {type(error).__name__} for {case}: {error}\n"
                f"    in {place}"
            ) from error

    def same(self, case: str, got: Any, want: Tensor, suspects: Mapping[str, Tensor] | None = None) -> None:
        """Raise Wrong unless got is want; say which of the suspects, wrong answers with names, it is.

        suspects   {"the momentum buffer is left out": what would come out then, …}
        """
        got = self._tensor(case, got, want)
        if _near(got, want, self.tolerance):
            self.right.append(case)
            return
        difference, scale = (got - want).abs().max().item(), want.abs().max().item()
        far = f"{difference / scale:.1g} of the largest entry" if scale else f"{difference:.3g}"
        raise Wrong(
            f"{self._so_far()}wrong for {case}: {self._why(got, want, suspects or {})}"
            f" (the largest difference is {far})."
        )

    def true(self, case: str, holds: bool, otherwise: str) -> None:
        """Raise Wrong, with what is said otherwise, unless the case holds."""
        if not holds:
            raise Wrong(f"{self._so_far()}wrong for {case}: {otherwise}.")
        self.right.append(case)

    def _tensor(self, case: str, got: Any, want: Tensor) -> Tensor:
        shape = tuple(want.shape)
        kind = "a number" if not shape else f"a tensor of shape {shape}"
        if got is None:
            raise Wrong(f"{self._so_far()}your function returned None for {case}. Is the `return` missing?")
        if not isinstance(got, (Tensor, float, int)):
            raise Wrong(f"{self._so_far()}for {case} came {type(got).__name__}, and asked for is {kind}.")
        got = torch.as_tensor(got, dtype=want.dtype).detach().to(want.device)
        if tuple(got.shape) != shape:
            raise Wrong(
                f"{self._so_far()}for {case} the shape is {tuple(got.shape)}, and it should be {shape}."
            )
        if not got.isfinite().all():
            raise Wrong(f"{self._so_far()}for {case} some entries are not finite (NaN or infinity).")
        return got

    def _why(self, got: Tensor, want: Tensor, suspects: Mapping[str, Tensor]) -> str:
        for reason, value in suspects.items():
            if _near(got, value, self.tolerance):
                return reason
        if _near(got, -want, self.tolerance):
            return "the sign is the other way round"
        if not want.abs().max() > 0 or not got.abs().max() > 0:
            return "all entries are zero" if not got.abs().max() > 0 else "all entries should be zero"
        factor = ((got * want).sum() / (want * want).sum()).item()
        if not _near(got, factor * want, self.tolerance):
            return "the numbers differ"
        for name, scalar in self.scalars.items():
            if abs(factor - scalar) <= 1e-3 * abs(scalar):
                return f"off by a factor of {scalar:.3g}, everywhere: {name} once too often"
            if abs(factor * scalar - 1) <= 1e-3:
                return f"off by a factor of {factor:.3g}, everywhere: {name} is missing"
        return f"off by a factor of {factor:.3g}, everywhere"

    def _so_far(self) -> str:
        return f"right for {_listed(list(dict.fromkeys(self.right)))}; " if self.right else ""


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())


def _copied(argument: Any) -> Any:
    """A copy, so that an answer which changes its arguments changes nobody else's."""
    if isinstance(argument, Tensor):
        return argument.detach().clone().requires_grad_(argument.requires_grad)
    return copy.deepcopy(argument) if isinstance(argument, (dict, list, tuple)) else argument
