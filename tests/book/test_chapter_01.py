"""What the checkers of chapter 01 say of right answers, and of the mistakes that readers make."""

import pytest
import torch

from tests.support.answers import fails, passes


def dropout(x, p, seed, t, *, mix=lambda seed, t: 100_003 * seed + t, scale=lambda p: 1 - p):
    generator = torch.Generator().manual_seed(mix(seed, t))
    return x * (torch.rand(x.shape, generator=generator) >= p) / scale(p)


def with_the_global_generator(x, p, seed, t):
    torch.manual_seed(100_003 * seed + t)
    return torch.nn.functional.dropout(x, p)


def search(same, steps):
    if same(steps):
        return None
    equal, differs = 0, steps
    while differs - equal > 1:
        middle = (equal + differs) // 2
        equal, differs = (middle, differs) if same(middle) else (equal, middle)
    return differs


def one_by_one(same, steps):
    return next((t for t in range(steps + 1) if not same(t)), None)


@pytest.mark.parametrize("number, answer", [("01.2", dropout), ("01.4", search)])
def test_a_right_answer_is_right(number, answer):
    passes(number, answer)


def mixed(mix):
    return lambda x, p, seed, t: dropout(x, p, seed, t, mix=mix)


def scaled(scale):
    return lambda x, p, seed, t: dropout(x, p, seed, t, scale=scale)


WRONG = [
    ("01.2", lambda x, p, seed, t: torch.nn.functional.dropout(x, p), ["the same step", "different units"]),
    ("01.2", mixed(lambda seed, t: seed), ["wrong for another step", "the same units are dropped"]),
    ("01.2", mixed(lambda seed, t: t), ["wrong for another seed", "the same units are dropped"]),
    ("01.2", mixed(lambda seed, t: seed * t), ["seed 5 in step 3", "a sum or a product"]),
    ("01.2", mixed(lambda seed, t: seed + t), ["a sum or a product of the two"]),
    ("01.2", scaled(lambda p: 1.0), ["right for the share; wrong for the units", "not divided by 1 − p"]),
    ("01.2", scaled(lambda p: p), ["they are divided by p"]),
    ("01.2", lambda x, p, seed, t: dropout(x, 1 - p, seed, t), ["the share to drop, not to keep"]),
    ("01.2", lambda x, p, seed, t: x, ["a share of 0.00 of the units is dropped"]),
    ("01.2", with_the_global_generator, ["changes torch's global generator", "torch.Generator"]),
    ("01.2", lambda x, p, seed, t: 1.0, ["a tensor of the shape of x"]),
    ("01.4", lambda same, steps: search(same, steps) and search(same, steps) - 1, ["the last step at which"]),
    ("01.4", one_by_one, ["right for runs that part in the middle", "438 pairs", "Halving"]),
    ("01.4", lambda same, steps: 437, ["right for runs that part in the middle", "you returned 437"]),
    ("01.4", lambda same, steps: search(same, steps) or 0, ["runs that never part", "asked for is None"]),
    ("01.4", lambda same, steps: search(same, steps + 1), ["raised ValueError", "there is no state 1001"]),
]  # fmt: skip


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)
