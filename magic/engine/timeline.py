"""A picture of a schedule in text: a timeline that can be printed, compared and put into a book."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from .schedule import Action, Adjoint, Advance, Trace, check, walk

MARKS = " ·─═●◄"  # where two fall on the same place, the later one of these is shown
LEGEND = "● kept   ─ advanced   ═ traced   ◄ adjoint   · waits for its adjoint"


def draw(actions: Iterable[Action], steps: int, width: int = 64) -> str:
    """A picture of a schedule in text: training steps from left to right, time from top to bottom.

    A row is one sweep, a way forward and the adjoints after it; the number beside it is how many steps it
    advanced. A schedule that is too large for this gets a picture in which a column stands for several
    steps, and a row for several sweeps (some twenty rows are made then); such a row shows the states that
    are kept at its first adjoint.
    """
    actions = list(actions)
    took = check(actions, steps)
    columns = 2 * steps if 2 * steps <= width else min(steps, width)
    turns = [isinstance(a, Adjoint) and not isinstance(b, Adjoint) for a, b in pairwise([*actions, None])]
    sweeps = 1 if 2 * sum(turns) <= width else -(-sum(turns) // 20)
    total = (
        f"{steps:,} steps, states kept: {took.peak_states:,}, traces held: {took.peak_traces:,}, "
        f"steps advanced: {took.advanced:,}, {took.extra:,} of them extra"
    )
    scale = f"a column is {steps / columns:.3g} steps, a row {sweeps:,} sweeps"
    lines = [_ruler(steps, columns), *_rows(actions, turns, steps, columns, sweeps), LEGEND, total]
    return "\n".join(lines + [scale] * (sweeps > 1))


def _ruler(steps: int, columns: int) -> str:
    """The numbers of the steps, at a round distance at which they do not touch: 1, 2, 5, 10, 20, 50, …"""
    gaps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    gap = next(g for g in gaps if g * columns >= (len(str(steps)) + 3) * steps)
    line = ""
    for t in range(0, steps, gap):
        start = t * columns // steps
        if start + len(str(t)) <= columns:
            line = line.ljust(start) + str(t)
    return line.ljust(columns) + "  advanced"


def _rows(actions: list[Action], turns: list[bool], steps: int, columns: int, sweeps: int) -> Iterator[str]:
    """The picture's rows. `turns` says of each action whether a sweep ends with it."""
    half = columns // steps // 2  # two columns to a step: the state before it, and the step itself
    row, advanced, left = [MARKS.index("·")] * columns, 0, sum(turns)

    def column(t: int) -> int:
        return t * columns // steps

    def paint(mark: str, first: int, last: int) -> None:
        for i in range(first, last + 1):
            row[i] = max(row[i], MARKS.index(mark))

    for (action, todo, kept, _), turn in zip(walk(actions, steps), turns, strict=True):
        match action:
            case Advance(t, to):
                paint("─", column(t), column(to))
                advanced += to - t
            case Trace(t, to):
                paint("═", column(t), column(to - 1))
            case Adjoint(t):
                for s in kept if MARKS.index("◄") not in row else ():
                    paint("●", column(s), column(s))
                paint("◄", column(t) + half, column(t) + half)
        left -= turn
        if turn and left % sweeps == 0:
            yield "".join(MARKS[mark] for mark in row) + f"{advanced:10,}"
            row, advanced = [0] * columns, 0
            paint("·", 0, column(todo) - 1)
