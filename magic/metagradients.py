"""metagradient: the exact derivative of a measured output by anything that the training was made from.

    ∂φ_k(trained model) / ∂(data weights, the start s_0, hyper-parameters of each step, training inputs)

Engstrom et al. 2025 (arXiv 2503.13751) call it so, and use it to choose data, to poison them, and to find a
schedule of rates. One replay finds all that is asked for: the cotangent that it pulls back through the run
holds everything that the result depends on. `magic.attribute` is the case of the data weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from .attribution import Attribution
from .engine import asked
from .engine.health import Health
from .engine.measuring import try_measure
from .engine.planning import Plan, one_way, plan_within
from .engine.replay import Replay
from .engine.replay import metagradient as replayed
from .engine.resume import Trusted
from .points import Points, points_of
from .show import Table
from .training.run import Run
from .training.state import Cotangent


@dataclass(frozen=True, eq=False, repr=False)
class Metagradient(Table):
    """Derivatives of K measured outputs, with a leading axis K, in units of φ per unit of what they are by.

    weights  (K, n), or (K, n, L): by the data weights; always there
    start    a Cotangent, `.params[name]` and `.buffers[name]` (K, *shape): by s_0; None if not asked for
    hypers   name -> (K, T, groups): by each step's and parameter group's; where a group has none of the
             name, 0. Of a schedule these are the derivatives by the values that it gave
    data     one entry for each tensor of the training data: (K, n, ...), with `examples` (K, m, ...), and
             None for a tensor that is not floating-point; None if not asked for
    outputs  (K,): φ at `at`
    at       (n,) or (n, L): the data weights at which it was taken
    examples  (m,): whose inputs `data` is of; None for all
    """

    weights: Tensor
    start: Cotangent | None
    hypers: dict[str, Tensor]
    data: tuple[Tensor | None, ...] | None
    outputs: Tensor
    at: Tensor
    run: Run
    measure: Callable
    plan: Plan
    health: Health
    examples: Tensor | None = None

    @property
    def scores(self) -> Attribution:
        """The derivative by the data weights as `magic.attribute` returns it."""
        given = (self.weights, self.outputs, self.at, self.run, self.measure, self.plan, self.health)
        return Attribution(*given)

    @property
    def caption(self) -> str:
        return f"Metagradient of {len(self.outputs)} outputs"

    def rows(self) -> list[tuple[str, str]]:
        """The table: what it is of, with shapes and the largest entry, and cost and health."""
        parts: dict[str, Tensor] = {"data weights": self.weights}
        if self.start is not None:
            parts |= {f"start: {name}": x for name, x in (self.start.params | self.start.buffers).items()}
        parts |= {f"hyper-parameter: {name}": x for name, x in self.hypers.items()}
        parts |= {f"data[{i}]": x for i, x in enumerate(self.data or ()) if x is not None}
        rows = [
            (name, f"{tuple(x.shape)}, the largest {x.abs().max().item():.3g}") for name, x in parts.items()
        ]
        problems = "; ".join(self.health.problems) or "no problem seen"
        return [*rows, ("cost", str(self.plan)), ("health", problems)]


def metagradient(
    run: Run,
    measure: Callable,
    of: str | Iterable[str] = ("weights", "start", "hypers"),
    at: Tensor | float | str | Points | None = None,
    *,
    drop: float | None = None,
    examples: Iterable[int] | None = None,
    progress: bool = True,
    memory: float | str | None = None,
    disk: str | os.PathLike | None = None,
    plan: Plan | None = None,
    trust: bool | Iterable[str] = False,
) -> Metagradient:
    """The exact derivative of measure(trained model) by what `of` names.

    of        any of "weights", "start" (parameters and buffers of s_0), "hypers" (all hyper-parameters of
              SGD, Adam and AdamW that the run has), one of these by its name ("lr", "weight_decay",
              "momentum", "dampening", "beta1", "beta2", "eps", "eps_root"), and "data" (training inputs)
    examples  of "data": whose inputs, as indices; None for all
    at, drop, measure, progress, memory, disk, plan, trust   as in `magic.attribute`; the derivative is taken
              at one point. A plan that is given was not made for what is asked for beside the weights

    To train with something else in their place: `magic.changed(run, hypers={"lr": ...})`. Raises what
    `attribute` raises, TypeError for the "data" of a run whose training data are integers or a Dataset, and
    ValueError for the name of something that this run has no derivative by.
    """
    one_way(plan=plan, memory=memory)
    what = asked.read(run, of, examples)
    taken = points_of(run, at, drop)
    if not taken.tangent:
        raise ValueError(f"at={at!r} is a mean over several points; a metagradient is taken at one")
    weights = taken.points[0]
    targets, measuring = try_measure(run, measure)
    planned = (
        plan.of(targets, run.steps) if plan else plan_within(run, targets, memory, disk, measuring, what)
    )
    if progress:
        print(planned)
    folder = None if disk is None else Trusted(disk, trust)
    found = replayed(run, measure, weights, planned, progress, folder, what)
    found.health.warn()
    start, hypers, data = _parts(run, what, found)
    whose = None if what.examples is None or examples is None else what.examples
    return Metagradient(
        found.values, start, hypers, data, found.outputs, weights, run, measure, planned, found.health, whose
    )


def _parts(
    run: Run, what: asked.Asked, found: Replay
) -> tuple[Cotangent | None, dict[str, Tensor], tuple[Tensor | None, ...] | None]:
    """The derivatives by the start, the hyper-parameters and the data, out of what the replay found."""

    def under(kind: str) -> dict[str, Tensor]:
        return {k.removeprefix(kind): x for k, x in found.more.items() if k.startswith(kind)}

    start = Cotangent.unflatten(under("start/"), 0) if what.start else None
    if what.examples is None:
        return start, under("hypers/"), None
    data, count = under("data/"), len(found.outputs)
    for i, x in asked.inputs_of(run):  # a tensor that no step has touched
        data.setdefault(str(i), found.values.new_zeros(count, len(what.examples), *x.shape[1:]))
    return start, under("hypers/"), tuple(data.get(str(i)) for i in range(len(run.data)))
