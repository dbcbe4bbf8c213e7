"""attribute: how much does each training example move each measured output of the trained model?

    τ_ki = ∂φ_k(f(w)) / ∂w_i,      predicted effect of removing a set D:  −Σ_{i∈D} τ_ki

MAGIC (Ilyas & Engstrom 2025, arXiv 2504.16430), section 3. The derivative is exact; the prediction
is its first-order use, and `magic.lds` says how well that holds.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import saved
from .engine.health import Health
from .engine.measuring import measured_outputs, try_measure
from .engine.planning import Plan, one_way, plan_within
from .engine.replay import Replay
from .engine.resume import Trusted
from .engine.search import parse_bytes
from .engine.verdict import Verification
from .identity import fingerprints, parts
from .points import Points, describe, points_of
from .shares import Split, replays, shares_of
from .show import Table, needs, warn_of_old
from .training.examples import check_indices
from .training.run import Run
from .training.variants import tail


@dataclass(eq=False, repr=False)
class Attribution(Table):
    """Scores of n training examples for K measured outputs, and what they predict.

    values   (K, n): ∂φ_k/∂w_i, or its mean over several points, in the unit of output k for one whole
             example. Where it is negative, more of example i makes output k smaller. Where each token has a
             weight they are (K, n, L), and `per_example()` has their sums over L
    outputs  (K,): φ at `at`; of a mean over subsets, the mean of φ
    at       (n,) or (n, L): the data weights that predictions start from
    run, measure   what was attributed; None after `load` unless given there
    plan     what the replay kept and repeated
    health   how far the scores can be trusted
    run_fingerprint   the run's, which `save` keeps
    point    where the derivative was taken, in words
    tangent  whether it was taken at `at` itself, and is no mean over points
    run_parts, measure_parts   the identity of run and measure when the scores were made, part by part
    made     when that was
    verification   what `magic.verify` found, if it was asked
    """

    values: Tensor
    outputs: Tensor
    at: Tensor
    run: Run | None = None
    measure: Callable | None = None
    plan: Plan | None = None
    health: Health | None = None
    run_fingerprint: str | None = None
    point: str | None = None
    tangent: bool = True
    run_parts: dict[str, str] | None = None
    measure_parts: dict[str, str] | None = None
    made: str | None = None
    verification: Verification | None = None

    def __post_init__(self):
        if self.run is not None and self.run_parts is None:
            self.run_parts = self.run.identity()
            self.run_fingerprint = fingerprints.digest(repr(self.run_parts))
        if self.measure is not None and self.measure_parts is None:
            self.measure_parts = parts.of_callable(self.measure, "measure").parts
        self.made = self.made or time.strftime("%Y-%m-%d %H:%M")
        shape = self.values.shape
        if len(shape) not in (2, 3) or self.outputs.shape != shape[:1] or self.at.shape != shape[1:]:
            raise ValueError(
                "values must be (K, n) or (K, n, L), outputs (K,) and at (n,) or (n, L); they are "
                f"{tuple(shape)}, {tuple(self.outputs.shape)} and {tuple(self.at.shape)}"
            )

    @property
    def where(self) -> str | None:
        """The old name of `point`."""
        warn_of_old("Attribution.where", "Attribution.point")
        return self.point

    def removal_effect(self, without: Iterable[int]) -> Tensor:
        """(K,): predicted change of each measured output when these training examples are removed.

        That is predict(without them) − predict(with all), wherever the derivative was taken: −Σ τ.
        Raises IndexError for an index out of range and ValueError for one given twice.
        """
        indices = check_indices(without, self.values.shape[1])
        return -self.values[:, indices.to(self.values.device)].flatten(1).sum(dim=1)

    def per_example(self) -> Attribution:
        """Scores of whole examples, (K, n): sums over the tokens of each. Others are returned as they are.

        That is the derivative in a weight that all tokens of an example have in common. Raises ValueError
        where the derivative was taken at a point at which they have none.
        """
        if self.at.dim() == 1:
            return self
        if (self.at != self.at[:, :1]).any():
            raise ValueError("the scores were taken where tokens of one example have different weights")
        return dataclasses.replace(self, values=self.values.sum(2), at=self.at[:, 0], verification=None)

    def effect(self, weights: Tensor) -> Tensor:
        """(K,), or (S, K) for weights (S, n): predicted change against w = 1, predict(weights) − predict(1).

        Doubling example i is weight 2 there; adding one that was trained on with weight 0 is weight 1.
        """
        return self.predict(weights) - self.predict(torch.ones_like(self.at))

    def predict(self, weights: Tensor) -> Tensor:
        """(K,), or (S, K) for weights (S, n): predicted outputs at these data weights, to first order.

        Scores of tokens take weights (n, L) or (S, n, L), too; of weights (n,) all tokens of an example have
        the same. Raises ValueError for weights of another shape.
        """
        weights, shape = torch.as_tensor(weights).to(self.values), tuple(self.at.shape)
        if len(shape) == 2 and weights.shape != shape and weights.shape[-1:] == shape[:1]:
            weights = weights.unsqueeze(-1).expand(*weights.shape, shape[1])
        if weights.dim() - len(shape) not in (0, 1) or weights.shape[-len(shape) :] != shape:
            told = ", ".join(map(str, shape))
            one = f"({told},)" if len(shape) == 1 else f"({told})"
            raise ValueError(f"weights have shape {tuple(weights.shape)}; they must be {one} or (S, {told})")
        moved = (weights - self.at.to(self.values)).flatten(-len(shape))
        return self.outputs + moved @ self.values.flatten(1).T

    def cosine(self, other: Attribution) -> Tensor:
        """(K,): cosine of these scores with other ones, after each has been freed of its mean.

        It is the correlation of their predictions over random sets of one size.
        """
        a, b = (x.values.double().flatten(1) for x in (self, other))
        return torch.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))

    def like(self, values: Tensor) -> Attribution:
        """Other scores, (K, n), for the same run and outputs, such as those of another method.

        Plan, health and verification are not taken along: they are not known of other numbers. Raises
        ValueError for values of another shape.
        """
        values = torch.as_tensor(values).to(self.values)
        if values.shape != self.values.shape:
            raise ValueError(
                f"values must be {tuple(self.values.shape)}, (K, n); they are {tuple(values.shape)}"
            )
        return dataclasses.replace(self, values=values, plan=None, health=None, verification=None)

    def top(self, target: int = 0, k: int = 5):
        """The k most helpful and the k most harmful examples for one output, read as a loss.

        Helpful examples have negative scores: removing them makes the loss larger. There may be fewer
        than k of a kind. Returns a pandas DataFrame with the example's role, its index, its score and the
        predicted effect of removing it.

        Raises IndexError for a target that there is not, ValueError for k < 1, and ImportError without
        pandas (of the extra "notebooks").
        """
        if not -len(self.values) <= target < len(self.values):
            raise IndexError(f"target={target}: there are {len(self.values)} measured outputs")
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one example")
        pd = needs("pandas", "notebooks")
        scores = self.per_example().values[target].detach().cpu()
        order = scores.argsort(stable=True).tolist()
        chosen = [("helpful", i) for i in order[:k] if scores[i] < 0]
        chosen += [("harmful", i) for i in order[::-1][:k] if scores[i] > 0]
        rows = [(role, i, scores[i].item(), -scores[i].item()) for role, i in chosen]
        return pd.DataFrame(rows, columns=["role", "index", "score", "removal_effect"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores into a NumPy .npz without pickle, whole or not at all.

        It keeps the numbers, their health and verification, and the identity of run and measure, but not
        these themselves. Raises OSError where it cannot be written.
        """
        saved.write(path, {name: getattr(self, name) for name in saved.FIELDS})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        run: Run | None = None,
        measure: Callable | None = None,
        trust: bool | Iterable[str] = False,
    ) -> Attribution:
        """Read what `save` wrote. With `run` or `measure` given, refuse scores made from another one.

        trust  names of changed parts that the reader vouches for; True for all code, and for all that
               cannot be known

        Raises FileNotFoundError, or ValueError for any other file and for scores of another run or measure.
        """
        with saved.only_ours(path):
            fields = saved.read(path)
            found = cls(**fields)
        saved.check_serves(path, fields, run, measure, trust)
        found.run, found.measure = run, measure
        return found

    def rows(self) -> list[tuple[str, str]]:
        """The table: sizes, the point, the range of the scores, and cost and health where they are known."""
        k, n, *tokens = self.values.shape
        low, high = self.values.min().item(), self.values.max().item()
        rows = [
            ("measured outputs K", f"{k:,}"),
            ("training examples n", f"{n:,}"),
            *(("tokens of each L", f"{length:,}") for length in tokens),
            ("derivative taken at", self.point or describe(self.at)),
            ("scores from … to", f"{low:.3g} … {high:.3g}"),
        ]
        if self.plan is not None:
            rows.append(("cost", str(self.plan)))
        if self.health is not None:
            rows.append(("health", "; ".join(self.health.problems) or "no problem seen"))
        return rows


def attribute(
    run: Run,
    measure: Callable,
    at: Tensor | float | str | Points | None = None,
    *,
    drop: float | None = None,
    last: int | None = None,
    jobs: int = 1,
    progress: bool = True,
    memory: float | str | None = None,
    disk: str | os.PathLike | None = None,
    plan: Plan | None = None,
    trust: bool | Iterable[str] = False,
) -> Attribution:
    """The exact derivative of measure(trained model) with respect to every data weight.

    measure  trained model -> (K,) numbers, for example each test example's loss. It sees the model in
             eval mode. Of the K, as many are differentiated together as `memory` allows
    at       where to differentiate: None for w = 1, a number for all examples, an (n,) or (n, L) tensor, or
             "full", "centre", "path", "average" of `magic.points`, the last three for sets of a share
             `drop`. For large sets "centre" predicts far better, at the same cost
    last     only through so many steps at the end, the weights being 1 before: it takes less time, and may
             predict better where a whole run is rough. The scores are those of the run that starts there,
             `scores.run` (`magic.tail`), and so are retrainings
    jobs     how many processes share the targets, here or where joblib.parallel_config says; -1 for all
             cores. Each trains for itself, in its part of `memory` and of the folder `disk`. Call
             torch.set_num_threads(1) first, or they compete for the cores
    progress prints what the replay will keep and repeat before it starts, and shows a bar
    memory   bound on the bytes that the replay holds beyond the plain loop, on the model's device; None is
             "1GB"
    plan     what `magic.plan` returned, in place of `memory`
    disk     a folder: for states that do not fit, and so that a replay that was killed goes on to the
             same bits; one that is finished is read from it
    trust    of a folder made before: names of changed parts that the reader vouches for; True for all code,
             and for all that cannot be known

    Raises NotDifferentiable, NonFinite or ReplayMismatch when one of its checks finds the derivative
    wrong, ValueError for arguments that contradict each other or a folder of something else, and warns when a
    check could not be made or the scores are not to be trusted (`.health`).
    """
    one_way(plan=plan, memory=memory)
    if last is not None:
        run = tail(run, last)
    taken = points_of(run, at, drop)
    targets, measuring = try_measure(run, measure)
    shares = shares_of(targets, jobs, run, plan)
    if len(shares) > 1:
        memory = parse_bytes("1GB" if memory is None else memory) // len(shares)
    most = -(-targets // len(shares))
    planned = plan.of(targets, run.steps) if plan else plan_within(run, most, memory, disk, measuring)
    if progress:
        count = len(taken.points) * len(shares)
        print(f"{count} times: {planned}" if count > 1 else planned)
    split = Split(shares, None if disk is None else Trusted(disk, trust))
    found = replays(run, measure, taken.points, planned, split, progress)
    worst = max((replay.health for replay in found), key=lambda health: len(health.problems))
    worst.warn()
    at, outputs = _start(run, measure, taken, found)
    values = taken.mean([replay.values for replay in found])
    label = taken.label if last is None else f"{taken.label}, through the last {run.steps:,} steps"
    return Attribution(values, outputs, at, run, measure, planned, worst, point=label, tangent=taken.tangent)


def _start(run: Run, measure: Callable, taken: Points, found: list[Replay]) -> tuple[Tensor, Tensor]:
    """The weights (n,) that predictions start from, and the outputs (K,) there."""
    if taken.from_full:
        return run.weights(), measured_outputs(run, run.train(progress=False), measure)
    if len(found) == 1:
        return taken.points[0], found[0].outputs
    return taken.mean(taken.points), taken.mean([replay.outputs for replay in found])
