"""The checkers of chapter 14: right answers pass, and wrong ones are told what is wrong."""

import pytest
import torch

from tests.support.answers import fails, passes


def count_step(counts, gradient, moved):
    return torch.where(moved, counts - gradient.sign(), counts).clamp(min=0)


def through_schedule(schedule, numbers, by_step):
    numbers = numbers.clone().requires_grad_()
    return torch.autograd.grad(schedule(numbers), numbers, by_step)[0]


def by_differences(schedule, numbers, by_step):
    """The right answer once more, by central differences in each number."""
    h, found = 1e-5, []
    for i in range(len(numbers)):
        e = torch.zeros_like(numbers)
        e[i] = h
        found.append(by_step @ (schedule(numbers + e) - schedule(numbers - e)) / (2 * h))
    return torch.stack(found)


def jacobian(schedule, numbers):
    return torch.func.jacrev(schedule)(numbers)


def poison_step(x, start, gradient, step, bound, low, high):
    x = x + step * gradient.sign()
    return torch.maximum(torch.minimum(x, start + bound), start - bound).clamp(low, high)


def range_first(x, start, gradient, step, bound, low, high):
    """The right answer once more: the start is an image, so the order of the two does not matter."""
    x = (x + step * gradient.sign()).clamp(low, high)
    return start + (x - start).clamp(-bound, bound)


def attack(**changed):
    """An answer to 14.3 that was given something else for some of its arguments, as functions of all."""
    names = ("x", "start", "gradient", "step", "bound", "low", "high")

    def answer(*arguments):
        given = dict(zip(names, arguments, strict=True))
        return poison_step(**(given | {name: f(given) for name, f in changed.items()}))

    return answer


def within_a_ball(x, start, gradient, step, bound, low, high):
    change = x + step * gradient.sign() - start
    length = change.flatten(1).norm(dim=1)[:, None, None, None]
    return (start + change * (bound / length).clamp(max=1)).clamp(low, high)


@pytest.mark.parametrize(
    "number, answer",
    [
        ("14.1", count_step),
        ("14.2", through_schedule),
        ("14.2", by_differences),
        ("14.3", poison_step),
        ("14.3", range_first),
    ],
)
def test_right_answers(number, answer):
    passes(number, answer)


INFINITE = float("inf")
COUNTS = [
    (lambda c, g, m: count_step(c, -g, m), ["wrong for counts of which all", "this climbs"]),
    (lambda c, g, m: (c - g * m).clamp(min=0), ["one of its sign"]),
    (lambda c, g, m: count_step(c, g, m).clamp(max=1), ["a count may be 2 or 3"]),
    (lambda c, g, m: count_step(c, torch.where(g < 0, -1.0, 1.0), m), ["right for", "0 a count stays"]),
    (lambda c, g, m: count_step(c, torch.where(g > 0, 1.0, -1.0), m), ["right for", "0 a count stays"]),
    (lambda c, g, m: (c - g.sign()).clamp(min=0), ["right for", "every count is moved"]),
    (lambda c, g, m: count_step(c, g, ~m), ["wrong for counts of which all"]),
    (lambda c, g, m: ((c - g.sign()) * m).clamp(min=0), ["not moved have become 0"]),
    (lambda c, g, m: c - g.sign() * m, ["counts of which some are 0", "less than never"]),
]
SCHEDULES = [
    (lambda s, p, g: through_schedule(s, p, g / len(g)), ["wrong for a constant", "are averaged"]),
    (lambda s, p, g: jacobian(s, p).sum(0), ["how φ moves with the rates is left out"]),
    (lambda s, p, g: g.sum().expand(len(p)), ["with the numbers is left out"]),
    (lambda s, p, g: through_schedule(s, p, g) * p, ["multiplied by the number itself"]),
    (lambda s, p, g: through_schedule(s, p, g * s(p)), ["multiplied by the rate itself"]),
    (lambda s, p, g: -through_schedule(s, p, g), ["the sign is the other way round"]),
    (lambda s, p, g: g, ["the shape is (12,)"]),
]
POISON = [
    (attack(gradient=lambda a: -a["gradient"]), ["wrong for a first short step", "this descends"]),
    (
        lambda x, s, g, step, b, low, high: (s + (x + step * g - s).clamp(-b, b)).clamp(low, high),
        ["one of its sign"],
    ),
    (attack(bound=lambda a: INFINITE), ["longer than the bound", "the bound is forgotten"]),
    (attack(start=lambda a: a["x"]), ["wrong for a later step", "many small steps go any distance"]),
    (
        attack(low=lambda a: -INFINITE, high=lambda a: INFINITE),
        ["wrong for pixels that are nearly black", "darker than `low`"],
    ),
    (
        attack(low=lambda a: -INFINITE, high=lambda a: INFINITE, bound=lambda a: INFINITE),
        ["longer than the bound"],
    ),
    (within_a_ball, ["not on the length of the whole change"]),
    (lambda *a: poison_step(*a) - a[1], ["the change alone, without the image"]),
    (
        lambda x, s, g, step, b, low, high: (x + step * g.sign()).clamp(-b, b).clamp(low, high),
        ["how far it has moved"],
    ),
]


@pytest.mark.parametrize(
    "number, answer, words",
    [
        *(("14.1", *wrong) for wrong in COUNTS),
        *(("14.2", *wrong) for wrong in SCHEDULES),
        *(("14.3", *wrong) for wrong in POISON),
    ],
)
def test_wrong_answers_are_explained(number, answer, words):
    fails(number, answer, words)
