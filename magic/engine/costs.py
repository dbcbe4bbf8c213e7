"""What `schedule.binomial` takes, in closed form: a plan compares many schedules and walks through none.

Griewank & Walther 2000, "Revolve", ACM TOMS 26(1). The tests compare everything here with walks through
schedules. A block is as many steps as traces are kept, or one step; `slots` are states beside the first.
"""

from __future__ import annotations

from math import comb

import numpy as np

from .schedule import Cost, binomial_split, repeats_of


def advanced(steps: int, states: int, traces: int = 0) -> int:
    """Steps that `binomial(steps, states, traces)` advances: r·B − comb(states + r, r − 1) for B blocks.

    A block is passed r times at most (`repeats_of`), and most of them are; the second term counts what the
    others are passed less. The first block may be shorter than the others. It is passed exactly r times,
    whenever something is loaded from s_0: that is so because the left part of each split, which begins with
    it, may be passed exactly one time less than the whole.
    """
    length = max(traces, 1)
    blocks = -(-steps // length)
    repeats = repeats_of(blocks, states - 1)
    passed = repeats * blocks - comb(states + repeats, repeats - 1) if repeats else 0
    return length * passed - (blocks * length - steps) * repeats


def binomial(steps: int, states: int, traces: int = 0) -> Cost:
    """`cost(binomial(steps, states, traces), steps)`, without walking."""
    together = min(max(traces, 1), steps)
    blocks = -(-steps // together)
    saves = int(_depths(blocks, states - 1).sum())
    return Cost(
        steps=steps,
        peak_states=min(states, blocks),
        peak_traces=together,
        trained=steps - together,
        advanced=advanced(steps, states, traces),
        traced=steps if traces else 0,
        saves=saves,
        loads=saves
        - 1
        + blocks,  # one for each split, which saves a state, and one for each block at its end
    )


def uses(steps: int, states: int, traces: int = 0) -> np.ndarray:
    """How often each slot of `binomial` is saved to, loaded from and dropped; slots never used are left out.

    A slot holds the states of one depth: the store gives the lowest free slot to a state that is saved, and
    a state is dropped before the one that was kept when it was saved.
    """
    blocks = -(-steps // max(traces, 1))
    counts = _depths(blocks, states - 1)
    # A state is saved once and dropped once. It is loaded once for each split of the segment that it begins,
    # which saves a state of the next depth, and once for each block that is reversed from it alone.
    following = np.append(counts[1:], 0)
    ends = counts.copy()
    if len(counts) == states:  # no slot is left at this depth, so a segment may end with several blocks
        ends[-1] = blocks - counts[:-1].sum()
    return 2 * counts + following + ends


def least_used(steps: int, states: int, traces: int, count: int) -> int:
    """How often the `count` least used slots of `binomial` are used, in all."""
    every = uses(steps, states, traces)
    if count >= len(every):
        return int(every.sum())
    return int(np.partition(every, count)[:count].sum())


def _depths(blocks: int, slots: int) -> np.ndarray:
    """How many states `binomial` saves at each depth. A state's depth is how many are kept when it is saved.

    Call a segment full if no longer one can be reversed with as many repetitions r and slots s; it then has
    comb(s + 1 + r, s + 1) blocks. A full segment splits into two full ones, so the numbers of its states
    are known: comb(j + r − 1, j) at depth j below its own. Of every other segment one part is full (see
    `schedule.binomial_split`). So all that is left to follow is one chain of parts that are not full, which
    is short: at each link, either a slot is used up or a repetition.
    """
    found = np.zeros(min(slots + 1, blocks), dtype=np.int64)
    depth, found[0] = 0, 1
    repeats = repeats_of(blocks, slots)
    while blocks > 1 and slots > 0:
        if repeats == 1:  # every block but the first gets a slot, until no slot is left
            found[depth + 1 : depth + 1 + min(blocks - 1, slots)] += 1
            break
        left = binomial_split(blocks, slots, repeats)
        found[depth + 1] += 1
        if left == comb(slots + repeats, slots + 1):  # the left part is full
            _add_full(found[depth + 1 :], slots, repeats - 1)
            depth, slots, blocks = depth + 1, slots - 1, blocks - left
            repeats = repeats_of(blocks, slots)
        else:  # the right part is full
            _add_full(found[depth + 2 :], slots - 1, repeats - 1)
            blocks, repeats = left, repeats - 1
    return found


def _add_full(found: np.ndarray, slots: int, repeats: int) -> None:
    """Add the comb(j + repeats − 1, j) states of a full segment at each depth j = 1 … slots below its own."""
    if repeats < slots:
        counts = np.ones(slots, dtype=np.int64)
        for _ in range(repeats - 1):  # a column of Pascal's triangle is the running sum of the one before it
            counts = np.cumsum(counts) + 1
    else:
        counts = np.array([comb(j + repeats - 1, j) for j in range(1, slots + 1)], dtype=np.int64)
    found[:slots] += counts
