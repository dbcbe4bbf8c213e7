"""What `schedule.binomial` takes, in closed form: a plan compares many schedules and walks through none.

Griewank & Walther 2000, "Revolve", ACM TOMS 26(1). The tests compare it with walks through schedules.
"""

from __future__ import annotations

from math import comb

from .schedule import Cost, binomial_split, repeats_of


def depths(blocks: int, slots: int) -> list[int]:
    """How many states `binomial` saves at each depth, for so many blocks and states beside the first.

    A state's depth is the number of states kept when it is saved. A segment of the largest length that
    may be repeated r times, comb(slots + 1 + r, slots + 1), splits into two such, so it has
    comb(j + r − 1, j) states at depth j. Of any other segment one part is of that kind: so there is
    one chain of other parts to follow, and no schedule to walk.
    """
    found = [0] * (slots + 1)
    depth = 0
    found[0] = 1
    while blocks > 1 and slots > 0:
        repeats = repeats_of(blocks, slots)
        if repeats == 1:  # a state for each block, as far as there are slots
            more = min(blocks - 1, slots)
            found[depth + 1 : depth + 1 + more] = [x + 1 for x in found[depth + 1 : depth + 1 + more]]
            break
        left = binomial_split(blocks, slots)
        if left == comb(slots + repeats, slots + 1):  # the left part is of the largest length
            _add_full(found, depth + 1, slots, repeats - 1)
            depth, slots, blocks = depth + 1, slots - 1, blocks - left
            found[depth] += 1
        else:  # the right part is
            found[depth + 1] += 1
            _add_full(found, depth + 2, slots - 1, repeats - 1)
            blocks = left
    while len(found) > 1 and found[-1] == 0:
        found.pop()
    return found


def _add_full(found: list[int], start: int, slots: int, repeats: int) -> None:
    """Add the comb(j + repeats − 1, j) states of each depth j = 1 … slots, from `start` on."""
    count = 1
    for j in range(1, slots + 1):
        count = count * (j + repeats - 1) // j
        found[start + j - 1] += count


def uses(steps: int, states: int, traces: int = 0) -> list[int]:
    """How often each slot of `binomial` is saved to, loaded from and dropped, by slot; without walking."""
    blocks = -(-steps // max(traces, 1))
    counts = depths(blocks, states - 1)
    following = [*counts[1:], 0]
    # A state is saved and dropped once, and loaded for each split after it and for each block at its end.
    ends = list(counts)
    if len(counts) == states:  # no slot was left there, and more than one block may have been
        ends[-1] = blocks - sum(counts[:-1])
    return [2 * a + b + c for a, b, c in zip(counts, following, ends, strict=True)]


def binomial(steps: int, states: int, traces: int = 0) -> Cost:
    """`cost(binomial(steps, states, traces), steps)` in closed form (Griewank & Walther 2000)."""
    length = max(traces, 1)
    blocks = -(-steps // length)
    counts = depths(blocks, states - 1)
    repeats = repeats_of(blocks, states - 1)
    advanced = repeats * blocks - comb(states + repeats, repeats - 1) if repeats else 0
    # The first block may be shorter; it is passed whenever one goes on from s_0.
    short = blocks * length - steps
    passed = blocks - 1 if states == 1 else counts[1] if len(counts) > 1 else 0
    return Cost(
        steps=steps,
        peak_states=len(counts),
        peak_traces=min(length, steps),
        trained=steps - min(length, steps),
        advanced=length * advanced - short * passed,
        traced=steps if traces else 0,
        saves=sum(counts),
        loads=sum(counts) - 1 + blocks,
    )
