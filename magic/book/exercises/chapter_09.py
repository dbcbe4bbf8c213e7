"""Checkers of chapter 09, which examples mattered: a removal's effect, the helpers, a fair control."""

from __future__ import annotations

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise


def _scores(seed: int, targets: int = 3, n: int = 12) -> Tensor:
    return torch.randn(targets, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@exercise("09.1", "the predicted change of every output when a set is removed")
def effect(answer) -> None:
    cases = Cases({"the number of removed examples": 4.0})
    square = _scores(2, targets=4, n=4)  # of which both axes are as long
    for case, scores, removed in (
        ("one example", _scores(0), [5]),
        ("four examples", _scores(1), [0, 3, 7, 11]),
        ("as many outputs as examples", square, [0, 2]),
    ):
        got = cases.call(case, answer, scores, removed)
        chosen = scores[:, removed]
        suspects = {
            "this is what adding them would do: a removal takes their weight from 1 to 0": chosen.sum(1),
            "the effects add up; this is their mean": -chosen.mean(1),
            "rows are outputs and columns are examples": -scores[removed].sum(0)
            if max(removed) < len(scores)
            else chosen.sum(1),
            "these are the scores of the examples that stay": chosen.sum(1) - scores.sum(1),
        }
        cases.same(case, got, -chosen.sum(1), suspects)


@exercise("09.2", "the most helpful examples of every output, the most helpful first")
def helpers(answer) -> None:
    cases = Cases({})
    some = _scores(3)
    for case, scores, k in (("the most helpful one", some, 1), ("three", some, 3), ("all", _scores(4), 12)):
        got = cases.call(case, answer, scores, k)
        if isinstance(got, Tensor) and got.is_floating_point():
            raise Wrong(f"for {case} came scores or other decimals; asked for are the examples' numbers.")
        order = scores.argsort(dim=1)
        cases.same(
            case,
            got,
            order[:, :k],
            {
                "these are the most harmful: more of a helpful example makes the loss smaller": order.flip(1)[
                    :, :k
                ],
                "these have the largest scores of either sign": scores.abs().argsort(dim=1, descending=True)[
                    :, :k
                ],
                "these are the right ones, the least helpful first": order[:, :k].flip(1),
            },
        )


def _chosen(cases: Cases, case: str, answer, labels: Tensor, removed: Tensor, seed: int) -> Tensor:
    """A control set of a reader's function, as numbers; Wrong where it is none."""
    got = cases.call(case, answer, labels, removed, seed)
    try:
        numbers = torch.as_tensor(got).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(
            f"for {case} came {type(got).__name__}, and asked for are the examples' numbers."
        ) from None
    whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
    cases.true(f"{case}, whole numbers", whole, "asked for are the numbers of the examples, as integers")
    inside = bool(((numbers >= 0) & (numbers < len(labels))).all())
    cases.true(f"{case}, examples that exist", inside, f"there are examples 0 … {len(labels) - 1}")
    return numbers


@exercise("09.3", "a fair control: other examples at random, as many of each label")
def control(answer) -> None:
    labels = torch.arange(200) % 4
    for case, removed in (
        ("ten of one label", torch.arange(0, 40, 4)),
        ("several labels", torch.tensor([0, 4, 8, 1, 5, 2, 19, 23])),
    ):
        cases = Cases({})
        numbers = _chosen(cases, case, answer, labels, removed, 0)
        twice = "an example is chosen twice: it can be removed only once"
        cases.true(f"{case}, each once", len(numbers) == len(numbers.unique()), twice)
        many = f"you chose {len(numbers)} examples, and {len(removed)} were removed"
        cases.true(f"{case}, as many", len(numbers) == len(removed), many)
        same = torch.equal(labels[numbers].bincount(minlength=4), labels[removed].bincount(minlength=4))
        counts = "some labels are more frequent than among the removed, so a difference may be the label's"
        cases.true(f"{case}, as many of each label", same, counts)
        apart = not set(numbers.tolist()) & set(removed.tolist())
        cases.true(f"{case}, others", apart, "some examples are among the removed: choose from the others")
        again = _chosen(Cases({}), case, answer, labels, removed, 0)
        fixed = "two calls with one seed chose different examples: draw from a Generator with this seed"
        cases.true(f"{case}, the same for one seed", torch.equal(numbers, again), fixed)
        sets = {
            tuple(sorted(_chosen(Cases({}), case, answer, labels, removed, s).tolist())) for s in range(8)
        }
        random = "eight seeds chose the same examples: the choice is not random"
        cases.true(f"{case}, another for another seed", len(sets) > 1, random)
