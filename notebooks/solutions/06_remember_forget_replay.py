# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solutions 06 · Remember, forget, replay
#
# The exercises are at the end of [chapter 06](../06_remember_forget_replay.ipynb).

# %%
from functools import cache
from itertools import accumulate
from math import comb

from magic import schedule
from magic.book import check
from magic.engine.schedule import Adjoint, Advance, Drop, Load, Save, cost

# %% [markdown]
# **06.1** *Count the states kept at once, and the extra steps.* The set of kept steps changes at `Save` and `Drop`,
# and its largest size is the first answer. The second is everything advanced less the training's share, $T - 1$ steps.


# %%
def count(actions, T):
    kept, most, advanced = set(), 0, 0
    for action in actions:
        match action:
            case Save(t):
                kept.add(t)
            case Drop(t):
                kept.remove(t)
            case Advance(t, to):
                advanced += to - t
        most = max(most, len(kept))
    return most, advanced - (T - 1)


check("06.1", count)

# %% [markdown]
# **06.2** *A best split.* Let $r$ be the smallest number with $R(c, r) \ge T$. With the cut at $m$, the left part has $r - 1$ repetitions
# left and $c$ states, the right part $r$ repetitions and $c - 1$ states. Both must be within their reach, so $m \le R(c, r
# - 1)$ and $T - m \le R(c - 1, r)$. Neither may be so short that one repetition less would do for it, since the other part
# would then pay for that: $m \ge R(c, r - 2)$ and $T - m \ge R(c - 1, r - 1)$. We take the largest $m$ that keeps the first and the
# last of these bounds. The other two then hold as well, because $R(c, r) \ge T > R(c, r - 1)$.


# %%
def split(T, c):
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return min(comb(c + r - 1, c), T - comb(c + r - 2, c - 1))


check("06.2", split)

# %% [markdown]
# **06.3** *The optimal schedule.* The recursion of section 5, in its order. Where no cut is possible, every adjoint starts from $s_a$.


# %%
def reverse(a, b, c):
    yield Load(a)
    if b - a > 1 and c > 1:
        m = a + split(b - a, c)
        yield Advance(a, m)
        yield Save(m)
        yield from reverse(m, b, c - 1)
        yield from reverse(a, m, c)
        return
    for t in reversed(range(a, b)):
        yield Load(a)
        if t > a:
            yield Advance(a, t)
        yield Adjoint(t)
    yield Drop(a)


check("06.3", reverse)

# %% [markdown]
# **06.4** *Steps of unequal length.* The same minimum, over segments instead of lengths: the way from $a$ to $m$ takes the sum of
# their times. There are about $T^2 c / 2$ segments and up to $T$ cuts for each, which is fine for hundreds of steps.


# %%
def least_time(times, c):
    until = [0.0, *accumulate(times)]  # until[t]: the time from s_0 to s_t

    @cache
    def least(a, b, c):
        if b - a == 1:
            return 0.0
        if c == 1:
            return sum(until[t] - until[a] for t in range(a + 1, b))
        cuts = range(a + 1, b)
        return min(until[m] - until[a] + least(m, b, c - 1) + least(a, m, c) for m in cuts)

    return least(0, len(times), c)


check("06.4", least_time)

# %% [markdown]
# **06.5** *Online: $T$ is not known.* Keep every $d$-th state, $d = 1$ at first. Whenever more than $c/2$ are kept, forget every other one
# and double $d$. So between $c/4$ and $c/2$ evenly spaced states are there at any time, and the other slots are free for the
# way back. On the way back each piece of at most $d$ steps is reversed optimally. `resumed` takes the kept states and a policy for
# the pieces.


# %%
def online(steps, c):
    """The states kept when `steps` steps are over, without having known how many they would be."""
    distance, kept = 1, [0]
    for t in range(1, steps):
        if t % distance == 0:
            kept.append(t)
        if len(kept) > c // 2:
            distance *= 2
            kept = [s for s in kept if s % distance == 0]
    return kept


def extra_online(steps, c):
    kept = online(steps, c)
    free = c - len(kept) + 1
    actions = schedule.resumed(kept, steps, lambda piece: schedule.binomial(piece, free))
    # the training is over already, so every step that is advanced now is an extra one
    return schedule.check(actions, steps, states=c, kept=kept).advanced


for steps in (100, 1000, 10_000):
    best = cost(schedule.binomial(steps, 32), steps).extra
    print(f"{steps:>6,} steps, 32 states: online {extra_online(steps, 32):>6,}, optimum {best:>6,}")

# %% [markdown]
# The price of not knowing $T$ is moderate: between a sixth and a third more extra steps here. Stumm and Walther (2010)
# do better, since they choose the state to forget in view of all that are kept.
