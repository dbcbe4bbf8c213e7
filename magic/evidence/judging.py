"""Several judges, several methods, the same retrainings.

A linear datamodeling score asks whether random removals are ranked right. One may also ask for the effect
of single examples, of the few that a method holds to matter most, or how many of these must go until a
prediction turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..attribution import Attribution
from ..show import Figure, Table, needs
from ..subsets import permutations, random, single, top
from ..training.run import Run
from .comparison import QUANTILES, RESAMPLES, Comparison, ready
from .outputs import outputs


@dataclass(eq=False, repr=False)
class Judgement(Table):
    """What each judge says of each method: name of the method -> a Figure.

    lds       Spearman's correlation of predicted and true outputs over random removals, mean over targets
    alone     the same over removals of single examples
    removed   how much more an output rises without the examples that, by the method, keep it low than
              without as many at random, in the unit of the measure: the mean over targets
    planted   the area under the ROC curve for finding the planted examples; empty unless they are given

    The intervals hold 95 % of 1,000 bootstrap resamples of retrainings and targets, of examples for
    `planted`.
    """

    lds: dict[str, Figure]
    alone: dict[str, Figure]
    removed: dict[str, Figure]
    planted: dict[str, Figure] = field(default_factory=dict)
    what: str = ""

    @property
    def caption(self) -> str:
        return f"LDS, leave-one-out, removal of the top{', planted' * bool(self.planted)}: {self.what}"

    def rows(self) -> list[tuple[str, str]]:
        kinds = [kind for kind in (self.lds, self.alone, self.removed, self.planted) if kind]
        return [(name, "   ".join(str(kind[name]) for kind in kinds)) for name in self.lds]

    def frame(self):
        """A DataFrame: method, judge, mean, low, high. Raises ImportError without pandas."""
        kinds = {
            "LDS": self.lds,
            "leave-one-out": self.alone,
            "removal": self.removed,
            "planted": self.planted,
        }
        rows = [(name, judge, *figure) for judge, kind in kinds.items() for name, figure in kind.items()]
        return needs("pandas", "notebooks").DataFrame(
            rows, columns=["method", "judge", "mean", "low", "high"]
        )


def judge(
    methods: Mapping[str, Attribution],
    *,
    drop: float = 0.05,
    subsets: int = 50,
    examples: int = 30,
    planted: Iterable[int] | None = None,
    seed: int = 0,
    **options,
) -> Judgement:
    """Judge several scores of the same run and measure by the same retrainings.

    methods   name -> scores
    drop      the share that is removed at random, and the share that each method removes by its scores
    subsets   random removals of it
    examples  removals of a single example
    planted   indices of examples that are known to be bad: wrong labels, say. A method's order is that of
              the sum of its scores over targets, whose measure should be a loss
    seed      of the sets, of the examples and of the bootstrap
    options   bank, jobs, together, progress, as in `magic.outputs`

    Takes 1 + subsets + examples trainings, and K for each method, minus those in `bank`. Raises ValueError
    for scores of different runs or measures, and for too few removals; ImportError without scipy or, for
    `planted`, scikit-learn. The removal of the top is what the library bergson calls query loss difference.
    """
    run, measure = _one(methods)
    n, count = run.n, len(next(iter(methods.values())).outputs)
    sets = random(n, drop, subsets, seed)
    ones = single(n, permutations(n, 1, seed)[0][:examples])
    size = n - int(sets[0].sum())
    chosen = {name: torch.cat([top(v, [size]) for v in _by_example(x)]) for name, x in methods.items()}
    rows = torch.cat([torch.ones(1, n), sets, ones, *chosen.values()])
    true = outputs(run, measure, rows, **options).cpu()
    parts = true[1:].split([subsets, len(ones), *(count for _ in chosen)])
    said = Judgement({}, {}, {}, what=f"{subsets} × {100 * drop:g} %, {len(ones)} single, {count} targets")
    for (name, scores), own in zip(methods.items(), parts[2:], strict=True):
        for kind, weights, outcome in ((said.lds, sets, parts[0]), (said.alone, ones, parts[1])):
            compared = Comparison(scores.predict(weights).cpu(), outcome, true[0], seed=seed)
            kind[name] = compared.spearman
        said.removed[name] = _more(own.diagonal(), parts[0], seed)
    if planted is not None:
        found = torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.as_tensor(list(planted)), True)
        said.planted = {name: area(found, _by_example(x).sum(0), seed) for name, x in methods.items()}
    return said


@dataclass(eq=False, repr=False)
class Brittleness(Table):
    """How many examples must go until a target's output passes a threshold.

    counts   the numbers of examples that were removed
    outputs  (C, K): each target's output without that many
    needed   (K,): the least number that was enough; inf where none was
    """

    counts: tuple[int, ...]
    outputs: Tensor
    needed: Tensor

    @property
    def caption(self) -> str:
        return f"Share of {len(self.needed)} targets that have passed the threshold"

    def rows(self) -> list[tuple[str, str]]:
        return [(f"without {c} examples", f"{(self.needed <= c).double().mean():.2f}") for c in self.counts]


def brittleness(scores: Attribution, counts: Iterable[int], threshold: float = 0.0, **options) -> Brittleness:
    """Remove more and more of the examples that, by these scores, keep an output on its side of a threshold.

    counts     numbers of examples to remove, such as (1, 5, 20, 100)
    threshold  of the measure: 0 for a margin, where the prediction turns
    options    bank, jobs, together, progress, as in `magic.outputs`

    Takes K trainings for each count, minus those in `bank`. Raises ValueError for a count that is not between
    1 and n − 1, and for scores without run and measure. Source: Ilyas et al. 2022, arXiv 2202.00622,
    section 4.
    """
    run, measure = ready(scores)
    counts = tuple(sorted(counts))
    above = (scores.outputs > threshold).cpu()
    sign = torch.where(above, -1.0, 1.0)  # lowest first are those whose removal moves it to the threshold
    rows = torch.cat([top(sign[k] * v, counts) for k, v in enumerate(_by_example(scores))])
    true = outputs(run, measure, rows, **options).cpu().view(len(above), len(counts), -1)
    own = torch.stack([true[k, :, k] for k in range(len(above))], dim=1)
    passed = (own > threshold) != above
    numbers = torch.tensor(counts, dtype=torch.float64)[:, None].expand(own.shape)
    needed = torch.where(passed, numbers, torch.inf).amin(0)
    return Brittleness(counts, own, needed)


def _one(methods: Mapping[str, Attribution]) -> tuple[Run, Callable]:
    """The run and measure that all the scores are of."""
    if not methods:
        raise ValueError("no methods: give a dict of scores, name -> Attribution")
    first, *others = methods.items()
    run, measure = ready(first[1])
    for name, scores in others:
        own, _ = ready(scores)
        if own is not run or not torch.allclose(scores.outputs, first[1].outputs):
            raise ValueError(f"{name!r} is of another run or measures something else than {first[0]!r}")
    return run, measure


def _by_example(scores: Attribution) -> Tensor:
    """(K, n), on the CPU: where tokens have scores, an example's are added up."""
    return scores.values.sum(2).cpu() if scores.values.dim() == 3 else scores.values.cpu()


def _more(own: Tensor, others: Tensor, seed: int) -> Figure:
    """The mean over targets of own, (K,), less the mean of others, (S, K), with its bootstrap interval."""
    mine, rest, dice = own.double().numpy(), others.double().numpy(), np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        targets, sets = (dice.integers(size, size=size) for size in (len(mine), len(rest)))
        found.append(mine[targets].mean() - rest[sets][:, targets].mean())
    low, high = np.quantile(found, QUANTILES)
    return Figure(float(mine.mean() - rest.mean()), float(low), float(high))


def area(planted: Tensor, order: Tensor, seed: int) -> Figure:
    """The area under the ROC curve, with its bootstrap interval over examples."""
    area = needs("sklearn.metrics", "notebooks").roc_auc_score
    truth, score, dice = planted.numpy(), order.double().numpy(), np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        draw = dice.integers(len(truth), size=len(truth))
        if truth[draw].any() and not truth[draw].all():
            found.append(area(truth[draw], score[draw]))
    low, high = np.quantile(found, QUANTILES)
    return Figure(float(area(truth, score)), float(low), float(high))
