"""How far can the scores be trusted? What a replay saw on its way back.

The derivative is exact wherever the replay did not stop. Whether it predicts is another question, and
the size of the cotangent along the run gives a first answer: where ∂φ/∂params grows or shrinks by many
powers of ten between the end of training and its start, examples of some steps count as nothing beside
those of others, a small change at one step is amplified at every later one, and float32 carries little.
The size of the scores gives a second: where they would have an output moved by more than its own size when
a hundredth of the data is left out, they are slopes of a function that turns long before that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..show import Table

DECADES = (
    6.0  # powers of ten that a cotangent may range over without a warning; float32 carries about seven digits
)
SMALL = 0.05  # the share of the data that a tangent should at least be able to rank removals of
LEFT_OUT = 0.01  # the share of the data whose random removal the sizes of scores are judged by
TOO_FAR = 1.0  # how far that may move an output, in its own size
HEALTHY = 0.8  # the LDS that should be expected, at least
SAMPLES = 64  # steps of a run at which the cotangent's size is measured, at most
GROWS = (
    "growing on the way back: a small change at an early step is amplified at every later one, and the "
    "prediction is likely to fail. A lower or warmed-up rate, larger batches or a smoother network help"
)
ROUGH = (
    "no training does that: they are slopes of a function that wriggles, and predict no such removal. "
    "Measure it with magic.smoothness; a lower or warmed-up rate, larger initial weights, larger batches or "
    "eps_root make a training smoother"
)
UNROUNDED = (
    "of {} of {} parameters, whose steps Muon computes in bfloat16: they are off by 1 to 2 %, by 4 to 20 % "
    "for an ill-conditioned matrix"
)
SHRINKS = (
    "shrinking on the way back: the training forgets its first steps, so examples seen only there count as "
    "nothing. In a training that converges this is as it should be"
)


class Expected(NamedTuple):
    """The LDS to be expected over random removals of a share `drop`, with its 95 % interval."""

    drop: float
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}] over removals of {self.drop:.3g}"


@dataclass(frozen=True, repr=False)
class Health(Table):
    """What a replay saw.

    sizes      (t, K norms of ∂φ/∂params_t), last step first
    verified   how many recomputed states were compared with training's
    trusted    the largest share of the data whose random removal the scores may still rank, by the forecast
               of `magic.curvature`; None if it was not asked. An upper bound: the ranking may fail before
    sized      the same for sizes: the largest share up to which R² may be at least one half
    witnessed  step -> relative difference between the derivative of the step and a finite difference of
               it; None where none was steady. The measure's is under the key T
    clipped    at how many steps gradients were clipped; None for a run without clipping. Where removing
               examples would turn it on or off at a step, that step has a kink in between
    moves      (K,): how far leaving out a hundredth of the data at random moves each output by the scores, a
               standard deviation in the output's own size; see `moved`. Empty in older files
    unrounded  (some, all): of how many trained parameters the derivative is that of the update without a
               rounding that training has; None where of none
    expected   the LDS that `magic.forecast` expects; None if it was not asked
    """

    steps: int
    sizes: tuple[tuple[int, tuple[float, ...]], ...]
    verified: int
    witnessed: dict[int, float | None]
    trusted: float | None = None
    sized: float | None = None
    clipped: int | None = None
    moves: tuple[float, ...] = ()
    unrounded: tuple[int, int] | None = None
    expected: Expected | None = None

    def note(self) -> dict:
        """What JSON can keep of it; `of` reads it."""
        return vars(self) | {"witnessed": list(self.witnessed.items())}

    @classmethod
    def of(cls, note: dict) -> Health:
        """What `note` kept. Raises ValueError, TypeError or KeyError for anything else."""
        sizes = tuple((int(t), tuple(map(float, row))) for t, row in note["sizes"])
        witnessed = {int(t): None if d is None else float(d) for t, d in note["witnessed"]}
        shares = (note["trusted"], note.get("sized"))  # older files have no `sized`
        trusted, sized = (None if share is None else float(share) for share in shares)
        clipped = note.get("clipped")
        clipped = None if clipped is None else int(clipped)
        moves, unrounded = tuple(map(float, note.get("moves", ()))), note.get("unrounded")
        unrounded = None if unrounded is None else (int(unrounded[0]), int(unrounded[1]))
        steps, verified = int(note["steps"]), int(note["verified"])
        expected = Expected(*map(float, note["expected"])) if note.get("expected") else None
        return cls(steps, sizes, verified, witnessed, trusted, sized, clipped, moves, unrounded, expected)

    @property
    def decades(self) -> tuple[float, ...]:
        """(K,): powers of ten between the largest and the smallest cotangent along the run."""
        columns = zip(*(row for _, row in self.sizes), strict=True)
        return tuple(math.log10(max(c) / min(c)) if min(c) > 0 else math.inf for c in columns)

    @property
    def wide(self) -> list[int]:
        """The targets whose cotangent ranges over more than `DECADES` powers of ten."""
        return [k for k, d in enumerate(self.decades) if d > DECADES]

    @property
    def rough(self) -> list[int]:
        """The targets that the scores would have moved by more than their own size."""
        return [k for k, far in enumerate(self.moves) if not far <= TOO_FAR]

    @property
    def problems(self) -> list[str]:
        """What speaks against these scores, in sentences; empty if nothing does."""
        found = self._ranges + self._moved
        unsteady = [t for t, difference in self.witnessed.items() if difference is None]
        if unsteady:
            found.append(f"no finite difference could check {', '.join(map(self._where, unsteady))}")
        if self.trusted is not None and self.trusted < SMALL:
            found.append(
                f"the derivative turns so fast that it can rank removals of {self.trusted:.1%} of "
                'the data at most; take it at the centre (at="centre", drop=...) or train more smoothly'
            )
        if self.expected is not None and not self.expected.mean >= HEALTHY:
            found.append(f"an LDS of {self.expected} of the data is to be expected; train more smoothly")
        return found

    @property
    def ok(self) -> bool | None:
        """Whether nothing speaks against the scores; None where nothing was checked."""
        if self.problems:
            return False
        return True if self.verified or any(d is not None for d in self.witnessed.values()) else None

    def warn(self) -> None:
        """Warn of a cotangent that ranges over many decades, and of scores that are too large; what could not
        be checked has been warned of."""
        if found := self._ranges + self._moved:
            warnings.warn("; ".join(found), stacklevel=4)

    def plot(self, targets: int | Sequence[int] | None = None, ax=None):
        """Size of the cotangent along the run, a line for each target; returns the axes. Needs seaborn."""
        from ..book.plot import cotangent_sizes

        return cotangent_sizes(self, targets, ax)

    @property
    def _ranges(self) -> list[str]:
        """What it means that cotangents grow by many decades on the way back, or that they shrink."""
        found = []
        for grows, meaning in ((True, GROWS), (False, SHRINKS)):
            these = [k for k in self.wide if (self.sizes[-1][1][k] > self.sizes[0][1][k]) == grows]
            if these:
                worst = max(self.decades[k] for k in these)
                wide = "vanishes" if math.isinf(worst) else f"ranges over {worst:.0f} powers of ten"
                found.append(
                    f"the derivative of {len(these)} of {len(self.decades)} targets, the first {these[0]}, "
                    f"{wide} along the run, {meaning}"
                )
        return found

    @property
    def _moved(self) -> list[str]:
        """What it means that scores are too large."""
        if not self.rough:
            return []
        worst = max(self.rough, key=lambda k: self.moves[k])
        return [
            f"by the scores, leaving out {LEFT_OUT:.0%} of the data at random (or one example) would move "
            f"{len(self.rough)} of {len(self.moves)} outputs by more than their own size, output {worst} by "
            f"{self.moves[worst]:.3g} times it; {ROUGH}"
        ]

    @property
    def _reach(self) -> list[tuple[str, str]]:
        """How large a random removal may be for its rank and for its size, as far as a forecast can say."""
        reaches = (("may rank removals", self.trusted), ("may size removals", self.sized))
        return [
            (what, f"at best up to {share:.1%} of the data, by a forecast; only retraining can confirm it")
            for what, share in reaches
            if share is not None
        ]

    def _where(self, t: int) -> str:
        return "the measure" if t == self.steps else f"step {t}"

    def rows(self) -> list[tuple[str, str]]:
        """A table: what was looked at, and what was seen."""
        known = [(t, d) for t, d in self.witnessed.items() if d is not None]
        worst = max(known, key=lambda pair: pair[1], default=None)
        ranges = self.decades
        return [
            (
                "range of the cotangent",
                f"{min(ranges):.1f} … {max(ranges):.1f} powers of ten along the run"
                if ranges
                else "not measured",
            ),
            (
                "states compared",
                f"{self.verified:,} recomputed states had training's bits"
                if self.verified
                else "none: no state that training noted was computed a second time",
            ),
            (
                "derivatives compared",
                f"{len(known)} with finite differences"
                + (f"; the largest difference, {worst[1]:.0e}, at {self._where(worst[0])}" if worst else ""),
            ),
            *(
                [("gradients clipped", f"in {self.clipped:,} of {self.steps:,} steps")]
                if self.clipped is not None
                else []
            ),
            *([("derivative unrounded", UNROUNDED.format(*self.unrounded))] if self.unrounded else []),
            *self._reach,
            *([("LDS to be expected", f"{self.expected} of the data")] if self.expected else []),
            ("problems", "; ".join(self.problems) or "none seen"),
        ]


def moved(values: Tensor, outputs: Tensor, start: Tensor) -> tuple[float, ...]:
    """(K,): how far leaving out a hundredth of the data at random would move each output, in its own size.

    values   (K, n) or (K, n, L): the scores
    outputs  (K,): of the trained model
    start    (K,): of the untrained one

    How far is a standard deviation: of the sum of m = n/100 scores (one, at least) drawn without replacement,
    √(m (1 − m/n)) times the scores' own. An output's size is the larger of what it is before and after
    training or, where it happens to be small in both, the median of the outputs' sizes.
    """
    scores = values.detach().double().flatten(2).sum(2) if values.dim() == 3 else values.detach().double()
    n = scores.shape[1]
    m = max(1, round(LEFT_OUT * n))
    deviation = math.sqrt(m * (1 - m / n)) * scores.std(1, correction=0)
    size = torch.stack([outputs, start]).detach().double().abs().nan_to_num(0, 0, 0).amax(0)
    size = size.maximum(size.median())
    return tuple(torch.where(deviation > 0, deviation / size, deviation).tolist())
