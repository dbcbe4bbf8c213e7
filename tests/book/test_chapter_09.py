"""The checkers of chapter 09: right answers pass, and each usual mistake is told apart."""

import pytest
import torch

from tests.support.answers import fails, passes


def right_control(labels, removed, seed):
    dice = torch.Generator().manual_seed(seed)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[removed] = False
    chosen = []
    for label, count in zip(*labels[removed].unique(return_counts=True), strict=True):
        others = (free & (labels == label)).nonzero()[:, 0]
        chosen.append(others[torch.randperm(len(others), generator=dice)[:count]])
    return torch.cat(chosen)


def any_others(labels, removed, seed):
    free = torch.ones(len(labels), dtype=torch.bool)
    free[removed] = False
    others = free.nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return others[order[: len(removed)]]


def with_the_removed(labels, removed, seed):
    dice = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in zip(*labels[removed].unique(return_counts=True), strict=True):
        same = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(same), generator=dice)
        chosen.append(torch.cat([removed[labels[removed] == label][:1], same[order[: count - 1]]]))
    return torch.cat(chosen)


def always_the_same(labels, removed, seed):
    return right_control(labels, removed, 0)


def never_the_same(labels, removed, seed):
    return right_control(labels, removed, int(torch.randint(2**31, ())))


def with_repetitions(labels, removed, seed):
    return right_control(labels, removed, seed)[torch.zeros(len(removed), dtype=torch.int64)]


RIGHT = {
    "09.1": lambda scores, removed: -scores[:, removed].sum(dim=1),
    "09.2": lambda scores, k: scores.argsort(dim=1)[:, :k],
    "09.3": right_control,
}

WRONG = [
    ("09.1", lambda s, d: s[:, d].sum(1), ["wrong for one example", "what adding them would do"]),
    ("09.1", lambda s, d: -s[:, d].mean(1), ["right for one example", "their mean"]),
    ("09.1", lambda s, d: -s[d].sum(0), ["IndexError"]),
    ("09.1", lambda s, d: s[:, d].sum(1) - s.sum(1), ["that stay"]),
    ("09.1", lambda s, d: -s[:, d], ["the shape is (3, 1)"]),
    (
        "09.1",
        lambda s, d: -(s[d].sum(0) if len(s) == s.shape[1] else s[:, d].sum(1)),
        ["right for one example and four examples", "rows are outputs"],
    ),
    ("09.2", lambda s, k: s.argsort(dim=1, descending=True)[:, :k], ["the most harmful"]),
    ("09.2", lambda s, k: s.abs().argsort(dim=1, descending=True)[:, :k], ["of either sign"]),
    ("09.2", lambda s, k: s.argsort(dim=1)[:, :k].flip(1), ["the least helpful first"]),
    ("09.2", lambda s, k: s.sort(dim=1).values[:, :k], ["the examples' numbers"]),
    ("09.2", lambda s, k: s.sum(0).argsort()[:k], ["the shape is (1,)"]),
    ("09.3", any_others, ["as many of each label", "more frequent"]),
    ("09.3", with_the_removed, ["others", "among the removed"]),
    ("09.3", always_the_same, ["the choice is not random"]),
    ("09.3", never_the_same, ["draw from a Generator with this seed"]),
    ("09.3", with_repetitions, ["chosen twice"]),
    (
        "09.3",
        lambda y, d, seed: right_control(y, d, seed)[:-1],
        ["you chose 9 examples, and 10 were removed"],
    ),
    ("09.3", lambda y, d, seed: y[d] * 1.0, ["as integers"]),
    ("09.3", lambda y, d, seed: right_control(y, d, seed) + 1000, ["there are examples 0 … 199"]),
    ("09.3", lambda y, d, seed: "some", ["came str"]),
    ("09.3", lambda y, d, seed: None, ["came NoneType"]),
]


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_passes(number):
    passes(number, RIGHT[number])


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)
