"""attribute: how much does each training example move each measured output of the trained model?

    τ_ki = ∂φ_k(f(w)) / ∂w_i,      predicted effect of removing a set D:  −Σ_{i∈D} τ_ki

MAGIC (Ilyas & Engstrom 2025, arXiv 2504.16430), section 3. The derivative is exact; the prediction
is its first-order use, and `magic.lds` says how well that holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .engine.files import replacing
from .engine.health import Health, Verification
from .engine.measuring import measured_outputs, try_measure
from .engine.planning import Plan
from .engine.planning import plan as settle
from .engine.replay import Replay, metagradient
from .engine.resume import Trusted
from .identity import fingerprints, parts
from .points import Where, describe
from .points import settle as settle_where
from .show import Table
from .training.arguments import check_indices
from .training.run import Run

JUDGED = {"health": Health, "verification": Verification}  # how far the numbers can be trusted
KEPT = ("where", "tangent", "run_parts", "measure_parts", "made")  # in a file, besides the numbers


def _checked_meta(meta) -> dict:
    """What a file says of its scores; ValueError if `save` cannot have written it."""
    texts = {"run": str, "where": str, "made": str, "tangent": bool}
    texts |= {name: dict for name in ("run_parts", "measure_parts", *JUDGED)}
    if not isinstance(meta, dict) or "run" not in meta:
        raise ValueError("it does not say of which run it is")
    for name, kind in texts.items():
        value = meta.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"its {name} is {value!r}")
        if name.endswith("_parts") and value and not all(isinstance(x, str) for x in value.values()):
            raise ValueError(f"its {name} holds what is no digest")
    return meta


@dataclass(eq=False, repr=False)
class Attribution(Table):
    """Scores of n training examples for K measured outputs, and what they predict.

    values   (K, n): ∂φ_k/∂w_i, or its mean over several points. Negative: more of example i makes
             output k smaller
    outputs  (K,): φ at `at`; of a mean over subsets, the mean of φ
    at       (n,): the data weights that predictions start from
    where    where the derivative was taken, in words
    tangent  whether it was taken at `at` itself, and is no mean over points
    run, measure   what was attributed; None after `load` unless given there
    plan     what the replay kept and repeated
    health   how far the scores can be trusted
    run_fingerprint   the run's, which `save` keeps
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
    where: str | None = None
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
        k, n = self.values.shape if self.values.dim() == 2 else (None, None)
        if k is None or self.outputs.shape != (k,) or self.at.shape != (n,):
            raise ValueError(
                f"values must be (K, n), outputs (K,) and at (n,); they are {tuple(self.values.shape)}, "
                f"{tuple(self.outputs.shape)} and {tuple(self.at.shape)}"
            )

    def removal_effect(self, without: Iterable[int]) -> Tensor:
        """(K,): predicted change of each measured output when these training examples are removed.

        That is predict(without them) − predict(with all), wherever the derivative was taken: −Σ τ.
        Raises IndexError for an index out of range and ValueError for one given twice.
        """
        indices = check_indices(without, self.values.shape[1])
        return -self.values[:, indices.to(self.values.device)].sum(dim=1)

    def effect(self, weights: Tensor) -> Tensor:
        """(K,), or (S, K) for weights (S, n): predicted change against w = 1, predict(weights) − predict(1).

        Doubling example i is weight 2 there; adding one that was trained on with weight 0 is weight 1.
        """
        return self.predict(weights) - self.predict(torch.ones_like(self.at))

    def predict(self, weights: Tensor) -> Tensor:
        """(K,), or (S, K) for weights (S, n): predicted outputs at these data weights, to first order."""
        weights, n = torch.as_tensor(weights).to(self.values), len(self.at)
        if weights.dim() not in (1, 2) or weights.shape[-1] != n:
            raise ValueError(f"weights have shape {tuple(weights.shape)}; they must be ({n},) or (S, {n})")
        moved = weights - self.at.to(self.values)
        return self.outputs + moved @ self.values.T

    def cosine(self, other: Attribution) -> Tensor:
        """(K,): cosine of these scores with other ones, the mean of each taken off: how their predictions
        correlate over random sets of one size."""
        a, b = (x.values.double() - x.values.double().mean(1, keepdim=True) for x in (self, other))
        return torch.cosine_similarity(a, b)

    def like(self, values: Tensor) -> Attribution:
        """Other scores, (K, n), for the same run and outputs, such as those of another method."""
        values = torch.as_tensor(values).to(self.values)
        if values.shape != self.values.shape:
            raise ValueError(
                f"values must be {tuple(self.values.shape)}, (K, n); they are {tuple(values.shape)}"
            )
        return dataclasses.replace(self, values=values, plan=None, health=None, verification=None)

    def top(self, target: int = 0, k: int = 5):
        """The k most helpful and the k most harmful examples for one output, read as a loss.

        Helpful examples have negative scores: removing them makes the loss larger. There may be fewer
        than k of a kind. A pandas DataFrame when pandas is installed, else a list of dicts, with the
        example's role, its index, its score and the predicted effect of removing it.
        """
        if not -len(self.values) <= target < len(self.values):
            raise IndexError(f"target={target}: there are {len(self.values)} measured outputs")
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one example")
        scores = self.values[target].detach().cpu()
        order = scores.argsort(stable=True).tolist()
        chosen = [("helpful", i) for i in order[:k] if scores[i] < 0]
        chosen += [("harmful", i) for i in order[::-1][:k] if scores[i] > 0]
        columns = ("role", "index", "score", "removal_effect")
        rows = [
            dict(zip(columns, (role, i, scores[i].item(), -scores[i].item()), strict=True))
            for role, i in chosen
        ]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows, columns=columns)

    def save(self, path: str | os.PathLike) -> None:
        """Write the numbers, their health and verification, and the identity of run and measure but not these
        themselves, as a NumPy .npz without pickle, whole or not at all."""
        path = os.fspath(path)
        meta = {"format": 2, "run": self.run_fingerprint}
        meta |= {name: getattr(self, name) for name in KEPT}
        meta |= {name: found.note() for name in JUDGED if (found := getattr(self, name))}
        arrays = {"values": self.values, "outputs": self.outputs, "at": self.at}
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(
                file,
                meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
                **{name: x.detach().cpu().numpy() for name, x in arrays.items()},
            )

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
        """
        path = os.fspath(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = _checked_meta(json.loads(file["meta"].tobytes()))
                values, outputs, at = (torch.from_numpy(file[k]) for k in ("values", "outputs", "at"))
            kept = {name: meta[name] for name in KEPT if name in meta}
            kept |= {name: kind.of(meta[name]) for name, kind in JUDGED.items() if name in meta}
            found = cls(values, outputs, at, run_fingerprint=meta["run"], **kept)
        except FileNotFoundError:
            raise
        except Exception as error:  # a hostile file fails in zlib, in struct, in NumPy or in json
            raise ValueError(f"{path} was not written by Attribution.save: {error}") from error
        found._serves(path, run, measure, trust)
        found.run, found.measure = run, measure
        return found

    def _serves(self, path: str, run: Run | None, measure: Callable | None, trust) -> None:
        """Raise ValueError unless these scores, read from `path`, are of this run and this measure."""
        here, there, mine = parts.Identity(), {}, {}
        if run is not None and (self.run_parts or self.run_fingerprint):
            mine = run.identity()
            here |= parts.Identity(mine, run.unknown())
            there |= self.run_parts or {}
        if measure is not None and (self.measure_parts or self.run_parts or self.run_fingerprint):
            here |= parts.of_callable(measure, "measure")
            there |= self.measure_parts or {}
        if names := parts.changed(here, there, trust):
            whose = "run" if mine.keys() & set(names) else "measure"
            raise ValueError(
                parts.refusal(
                    f"{path} holds scores of another {whose}",
                    names,
                    self.made,
                    "Load without run= and measure=, or attribute what is here into another file",
                    here.unknown,
                )
            )

    def rows(self) -> list[tuple[str, str]]:
        k, n = self.values.shape
        low, high = self.values.min().item(), self.values.max().item()
        rows = [
            ("measured outputs K", f"{k:,}"),
            ("training examples n", f"{n:,}"),
            ("derivative taken at", self.where or describe(self.at)),
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
    at: Tensor | float | str | Where | None = None,
    progress: bool = True,
    *,
    drop: float | None = None,
    memory: float | str | None = None,
    disk: str | os.PathLike | None = None,
    plan: Plan | None = None,
    trust: bool | Iterable[str] = False,
) -> Attribution:
    """The exact derivative of measure(trained model) with respect to every data weight.

    measure  trained model -> (K,) numbers, for example each test example's loss. It sees the model in
             eval mode. All K are differentiated together, as many in one replay as `memory` allows
    at       where to differentiate: None for w = 1, a number for all examples, an (n,) tensor, or
             "full", "centre", "path", "average" of `magic.points`, the last three for sets of a share
             `drop`. For large sets "centre" predicts far better, at the same cost
    progress prints what the replay will keep and repeat before it starts, and shows a bar
    memory   bound on the bytes that the replay holds beyond the plain loop, on the model's device; None is
             "1GB"
    disk     a folder: for states that do not fit, and so that a replay that was killed goes on to the
             same bits; one that is finished is read from it
    plan     what `magic.plan` returned, in place of `memory`
    trust    of a folder made before: names of changed parts that the reader vouches for; True for all code,
             and for all that cannot be known

    Raises NotDifferentiable, NonFinite or ReplayMismatch when one of its checks finds the derivative
    wrong, and warns when a check could not be made or the scores are not to be trusted (`.health`).
    """
    if plan is not None and memory is not None:
        raise ValueError("plan= and memory= contradict each other: a plan was made for a budget; give one")
    where = settle_where(run, at, drop)
    targets, measuring = try_measure(run, measure)
    planned = (
        plan.of(targets, run.steps) if plan else settle(run, targets, memory, disk=disk, measuring=measuring)
    )
    many = len(where.points) > 1
    if progress:
        print(f"{len(where.points)} times: {planned}" if many else planned)
    folders = [disk and Path(disk, f"point {i}") if many else disk for i in range(len(where.points))]
    found = [
        metagradient(
            run, measure, weights, planned, progress, folder if folder is None else Trusted(folder, trust)
        )
        for weights, folder in zip(where.points, folders, strict=True)
    ]
    worst = max((replay.health for replay in found), key=lambda health: len(health.problems))
    worst.warn()
    at, outputs = _start(run, measure, where, found)
    values = sum(share * replay.values for share, replay in zip(where.shares, found, strict=True))
    return Attribution(
        values, outputs, at, run, measure, planned, worst, where=where.label, tangent=where.tangent
    )


def _start(run: Run, measure: Callable, where: Where, found: list[Replay]) -> tuple[Tensor, Tensor]:
    """The weights (n,) that predictions start from, and the outputs (K,) there."""
    if where.from_full:
        return run.weights(), measured_outputs(run, run.train(progress=False), measure)
    if len(found) == 1:
        return where.points[0], found[0].outputs
    at = sum(share * weights for share, weights in zip(where.shares, where.points, strict=True))
    return at, sum(share * replay.outputs for share, replay in zip(where.shares, found, strict=True))
