"""Checkers of chapter 14, what the derivative is for: steps on counts, on a schedule's numbers, on poison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .judging import Cases, exercise


def _normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64, always the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@exercise("14.1", "a step of sign descent on the counts of a part of the examples")
def count_step(answer) -> None:
    cases = Cases({})
    few, many = torch.tensor([1.0, 2.0, 3.0, 2.0]).double(), (_normal(1, 30).abs() * 2).round()
    for case, counts, gradient, moved in (
        ("counts of which all are moved", few, torch.tensor([0.3, -2.0, 0.01, -0.5]).double(), few > 0),
        ("a gradient of which an entry is 0", few, torch.tensor([0.3, 0.0, 0.01, -0.5]).double(), few > 0),
        ("counts of which some are moved", few, _normal(2, 4), few == 2),
        ("counts of which some are 0", many, _normal(3, 30), _normal(4, 30) > 0),
    ):
        sign, mask = gradient.sign(), moved.double()
        want = (counts - sign * mask).clamp(min=0)
        got = cases.call(case, answer, counts, gradient, moved)
        cases.same(case, got, want, {
            "this climbs: φ is a loss, and a count goes against the sign of its derivative":
                (counts + sign * mask).clamp(min=0),
            "every count is moved, and only those in `moved` should be": (counts - sign).clamp(min=0),
            "the others are moved, and those in `moved` stay": (counts - sign * (1 - mask)).clamp(min=0),
            "counts that are not moved have become 0": ((counts - sign) * mask).clamp(min=0),
            "a count is negative, and no example can be seen less than never": counts - sign * mask,
            "this is a step of the gradient; asked for is one of its sign, by a whole example":
                (counts - gradient * mask).clamp(min=0),
            "at most one is left of each: a count may be 2 or 3": want.clamp(max=1),
            "where the derivative is 0 a count stays": (counts - torch.where(gradient < 0, -1.0, 1.0) * mask)
            .clamp(min=0),
            "where the derivative is 0 a count stays ":
                (counts - torch.where(gradient > 0, 1.0, -1.0) * mask).clamp(min=0),
        })  # fmt: skip


@exercise("14.2", "the derivative by the few numbers that a schedule is made from")
def through_schedule(answer) -> None:
    cases, steps = Cases({}), 12
    t = torch.arange(steps, dtype=torch.float64)

    def constant(numbers: Tensor) -> Tensor:
        return numbers[0].exp() * torch.ones_like(t)

    def line(numbers: Tensor) -> Tensor:
        return numbers[0] + numbers[1] * t / steps

    def bump(numbers: Tensor) -> Tensor:
        peak, place, width = numbers
        return peak * torch.exp(-(((t / steps - place) / width) ** 2))

    for case, schedule, numbers in (
        ("a constant rate, given by its logarithm", constant, torch.tensor([-2.0])),
        ("a line", line, torch.tensor([0.1, -0.05])),
        ("a peak with a place and a width", bump, torch.tensor([0.2, 0.3, 0.4])),
    ):
        numbers, by_step = numbers.double(), _normal(5, steps)
        jacobian = torch.func.jacrev(schedule)(numbers)  # (T, P)
        want = by_step @ jacobian
        got = cases.call(case, answer, schedule, numbers, by_step)
        cases.same(case, got, want, {
            "the derivatives by the steps are averaged; one number moves all steps, and their effects add up":
                want / steps,
            "this is how the rates move with the numbers; how φ moves with the rates is left out":
                jacobian.sum(0),
            "this is how φ moves with the rates; how these move with the numbers is left out":
                by_step.sum().expand(len(numbers)),
            "each derivative is multiplied by the rate itself": (by_step * schedule(numbers)) @ jacobian,
            "each derivative is multiplied by the number itself": want * numbers,
        })  # fmt: skip


class _Attack(NamedTuple):
    """The arguments of 14.3: images x, where they started, the derivative, and three numbers."""

    x: Tensor
    start: Tensor
    gradient: Tensor
    step: float
    bound: float
    low: float
    high: float


@exercise("14.3", "a step of a poisoner, who stays within his bound and among images")
def poison_step(answer) -> None:
    cases, start = Cases({}), _normal(6, 3, 1, 4, 4).clamp(-1, 1)
    gradient = _normal(7, 3, 1, 4, 4)
    on_the_way = start + 0.2 * _normal(8, *start.shape).clamp(-1, 1)
    for case, attack in (
        ("a first short step", _Attack(start, start, gradient, 0.05, 0.2, -9.0, 9.0)),
        ("a step that is longer than the bound", _Attack(start, start, gradient, 0.5, 0.2, -9.0, 9.0)),
        ("a later step", _Attack(on_the_way, start, gradient, 0.25, 0.2, -9.0, 9.0)),
        ("pixels that are nearly black or white", _Attack(on_the_way, start, gradient, 0.25, 0.2, -1.0, 1.0)),
    ):
        got = cases.call(case, answer, *attack)
        cases.same(case, got, _poisoned(attack), _wrong_poison(attack))


def _poisoned(a: _Attack) -> Tensor:
    """What 14.3 asks for."""
    moved = a.x + a.step * a.gradient.sign()
    return (a.start + (moved - a.start).clamp(-a.bound, a.bound)).clamp(a.low, a.high)


def _wrong_poison(a: _Attack) -> dict[str, Tensor]:
    """Wrong answers to 14.3, by what is wrong with them."""
    moved = a.x + a.step * a.gradient.sign()
    far = (moved - a.start).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    in_ball = a.start + (moved - a.start) * (a.bound / far).clamp(max=1)
    around_x = a._replace(start=a.x)
    return {
        "this descends: a poisoner wants the loss to rise": _poisoned(a._replace(gradient=-a.gradient)),
        "this is a step of the gradient; asked for is one of its sign":
            (a.start + (a.x + a.step * a.gradient - a.start).clamp(-a.bound, a.bound)).clamp(a.low, a.high),
        "the bound is forgotten": moved.clamp(a.low, a.high),
        "the bound is around the images as they are now; it must be around those at the start, else many "
        "small steps go any distance": _poisoned(around_x),
        "some pixels are darker than `low` or brighter than `high`":
            a.start + (moved - a.start).clamp(-a.bound, a.bound),
        "neither the bound nor the range of pixels is kept": moved,
        "the bound is on each pixel, and not on the length of the whole change": in_ball.clamp(a.low, a.high),
        "this is the change alone, without the image": _poisoned(a) - a.start,
        "what is bounded is the pixel itself, and it should be how far it has moved":
            moved.clamp(-a.bound, a.bound).clamp(a.low, a.high),
    }  # fmt: skip
