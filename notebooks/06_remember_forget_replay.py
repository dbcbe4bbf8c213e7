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
# # 06 · Remember, forget, replay
#
# **Question.** To go back through a run we need its states, the last one first. Which of them should we keep?
#
# [Chapter 03](03_differentiate_the_whole_run.ipynb) kept the trace of every step, and its memory grew with the
# length of the run. [Chapter 04](04_one_step_backwards.ipynb) kept every state instead, and made the trace of one
# step at a time. A state is small beside a trace, but a run has thousands of states, and each state of a language
# model takes gigabytes. Fortunately a state need not be stored: training is deterministic
# ([chapter 01](01_the_same_run_twice.ipynb)), so any state can be recomputed, to the bit, from any earlier one.
# Recomputing costs time and saves memory. How much time buys how much memory is a question with an exact answer.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State` | everything that training carries after $t$ steps: parameters and optimizer state |
# | step | `run.step` | $s_t \mapsto s_{t+1}$ |
# | trace | | what autograd keeps of one step so that it can be pulled back |
# | adjoint of a step | `step_vjp` | takes the cotangent from $s_{t+1}$ to $s_t$; it needs $s_t$, and makes the step's trace |
# | action, schedule | `Save(t)`, … | an item of a plan, and the plan: what to keep, what to recompute, and when |
# | kept state | `Save(t)` … `Drop(t)` | a state that stays in memory, in a *slot*; the literature says *checkpoint* |
# | extra steps | `cost(...).extra` | steps done in addition to those of the training |
#
# About thirty-five minutes, half a minute of them to run. In the version that `uv run python -m magic.book.fill_in`
# makes in `fill_in/`, five cells are marked "your turn": you write them yourself.

# %%
import time
import warnings
from functools import cache
from itertools import pairwise
from math import comb

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F

import magic
from magic import schedule
from magic.book import data, models, plot
from magic.book.checks import claim
from magic.engine.adjoint import measure_vjp, step_vjp
from magic.engine.schedule import Adjoint, Advance, Drop, Load, Save, cost
from magic.engine.timeline import draw

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
plot.style()
# PyTorch's own warning, at the first use of forward mode
warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)

# %% [markdown]
# ## 1 · Five actions
#
# Imagine that you have to show a film backwards, and your projector runs only forwards. All you can do is put a
# bookmark on some frames, wind back to a bookmark, and play forwards from there until you reach the frame that is
# wanted next. With many bookmarks little is played twice. With one, every frame is reached from the start.
#
# Our frames are states, and five actions are enough.
#
# | action | meaning |
# |---|---|
# | `Save(t)` | keep the current state, $s_t$ |
# | `Load(t)` | make the kept $s_t$ the current state |
# | `Advance(t, to)` | step the current state from $t$ to `to` |
# | `Adjoint(t)` | pull the cotangent back through step $t$; the current state must be $s_t$ |
# | `Drop(t)` | forget $s_t$ |
#
# A **schedule** is a sequence of actions in which the adjoints come in the order $T-1, \dots, 1, 0$. The simplest
# schedule keeps everything. We write schedules as generators, and let `draw` make a picture of one, for a run of
# 12 steps.


# %%
def keep_everything(T):
    yield Save(0)
    for t in range(T - 1):
        yield Load(t)
        yield Advance(t, t + 1)
        yield Save(t + 1)
    for t in reversed(range(T)):
        yield Load(t)
        yield Adjoint(t)
        yield Drop(t)


print(draw(keep_everything(12), 12))

# %% [markdown]
# The steps of the training run from left to right, and time runs from top to bottom. The first row is the training,
# with every state kept (●), and the first adjoint (◄) at its end. Below it the cotangent walks back, one row for each
# adjoint. (A dot is a step that still waits for its adjoint. The sign ═ is for chapter 07.) The column on the right
# counts the steps advanced in each row: after the training there are none.
#
# The other extreme keeps nothing but the start, which we always have.


# %%
def keep_nothing(T):
    yield Save(0)
    for t in reversed(range(T)):
        yield Load(0)
        if t > 0:
            yield Advance(0, t)
        yield Adjoint(t)
    yield Drop(0)


print(draw(keep_nothing(12), 12))

# %% [markdown]
# Now each adjoint is preceded by a training of its own. `cost` walks through a schedule, checks on the way that it
# is legal (no state is loaded that is not kept, and no adjoint comes out of order), and counts.

# %%
for make in (keep_everything, keep_nothing):
    took = cost(make(200), 200)
    kept = f"{make.__name__:<16} states kept {took.peak_states:>4}"
    print(f"{kept}   steps advanced {took.advanced:>7,}   extra {took.extra:>7,}")

claim(
    "to keep nothing takes (T − 1)(T − 2)/2 extra steps",
    cost(keep_nothing(200), 200).extra == 199 * 198 // 2,
)

# %% [markdown]
# Two hundred states and no extra step, or one state and about twenty thousand extra steps. This chapter is about
# what lies in between.
#
# ## 2 · Twenty lines that run any of them
#
# First we need something to run: 1,500 digits, a network with two hidden layers of 96, and AdamW for 120 steps in
# batches of 64. We measure the losses of two test images.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1500, test=297))
torch.manual_seed(0)
model = models.MLP((64, 96, 96, 10)).to(device)
order = magic.batches(len(x), size=64, epochs=6, seed=0)[:120].to(device)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:2], y_test[:2])


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
run = magic.Run(model, optimizer, (x, y), loss, order)
trained = run.model(run.train(progress=False))
accuracy = (trained(x_test).argmax(1) == y_test).double().mean().item()
claim("share of the test images that the network reads right", accuracy, at_least=0.94)

# %% [markdown]
# The actions know nothing of networks, and chapter 04's `step_vjp` knows nothing of schedules. They meet in one
# `match` over the actions, which keeps three things: a dict of the kept states, empty at first; the current state, at
# first `run.initial`; and the cotangent, `None` until the training has ended.
#
# - `Save`, `Load`, `Drop` and `Advance` do what section 1's table says. `run.step(state, weights)` does one step, and
#   `state.step` is its $t$. The data weights are `run.weights()`.
# - The first `Adjoint` meets the end of the training. `measure_vjp(run, state, measure)` makes the cotangent there, from the
#   state *after* the step.
# - Every `Adjoint` calls `step_vjp(run, state, cotangent, weights)`. It returns the cotangent before the step and the
#   step's part of the scores, `(2, B)`, to be added to the columns `order[t]` of the scores with `index_add_`.
#
# This is REPLAY:


# %% tags=["your-turn"]
def replay(actions):
    """Follow the actions, by the list above, and return the scores, (2, n)."""
    kept, state, cotangent = {}, run.initial, None
    weights, values = run.weights(), torch.zeros(2, run.n, device=device)
    for action in actions:
        match action:
            case Save(t):
                kept[t] = state
            case Load(t):
                state = kept[t]
            case Drop(t):
                del kept[t]
            case Advance(_, to):
                while state.step < to:
                    state = run.step(state, weights)
            case Adjoint(t):
                if cotangent is None:  # the training has ended
                    cotangent = measure_vjp(run, run.step(state, weights), measure)
                cotangent, part = step_vjp(run, state, cotangent, weights)
                values.index_add_(1, order[t], part)
    return values


# %%
replay(keep_everything(2))  # at the first use PyTorch loads parts of itself: not on the clock
start = time.perf_counter()
reference = replay(keep_everything(120))
seconds = {"keep everything": time.perf_counter() - start}
scores = magic.attribute(run, measure, progress=False)
gap = (reference - scores.values).abs().max() / reference.abs().max()
claim("largest difference from magic.attribute, relative", gap, at_most=1e-4)

# %% [markdown]
# (The numbers are `float32`, and `magic` may pull the two cotangents one by one, which rounds sums
# differently.)
#
# ## 3 · Every $k$-th
#
# Keep every $k$-th state on the way down. On the way back, whenever a new piece of $k$ steps is reached, go through it
# once more, keep *its* states too, and use them up.


# %% tags=["your-turn"]
def keep_every(T, k):
    """Yield the actions of a schedule for T steps that keeps the states 0, k, 2k, … < T.

    Way down: Save(0), then for each pair of neighbouring starts: Load, Advance, Save.
    Way back, last piece first: step by step through the piece (Load, Advance, Save for each of its
    states but the first), then Load, Adjoint, Drop for each of its states, last one first.
    """
    yield Save(0)
    starts = range(0, T, k)
    for a, b in pairwise(starts):
        yield Load(a)
        yield Advance(a, b)
        yield Save(b)
    for a in reversed(starts):
        inside = range(a, min(a + k, T))
        for s, t in pairwise(inside):
            yield Load(s)
            yield Advance(s, t)
            yield Save(t)
        for t in reversed(inside):
            yield Load(t)
            yield Adjoint(t)
            yield Drop(t)


# %%
print(draw(keep_every(16, 4), 16))

# %% [markdown]
# There are $T/k$ states at the starts of the pieces and $k - 1$ more inside one piece, and no step is repeated more
# than once. The sum $T/k + k - 1$ is smallest at $k = \sqrt T$. So about $2\sqrt T$ states suffice, at the price of
# less than one more training (Chen et al. 2016, [arXiv 1604.06174](https://arxiv.org/abs/1604.06174)). A run that is a
# hundred times longer needs ten times the memory.

# %%
for k in (2, 5, 14, 50, 100):
    took = cost(keep_every(200, k), 200)
    print(f"k = {k:>3}   states kept {took.peak_states:>4}   extra steps {took.extra:>4}")

fewest = min(cost(keep_every(200, k), 200).peak_states for k in range(1, 201))
claim("no k keeps fewer than 27 states, and 2√200 − 1 is 27.3", fewest == 27)

# %% [markdown]
# ## 4 · The tree
#
# Why stop at one level? Treat each piece as the whole run was treated, and cut it into pieces of its own. This is the
# lazy $k$-ary tree of REPLAY (Engstrom et al. 2025, section 3, [arXiv 2503.13751](https://arxiv.org/abs/2503.13751)).
# Its leaves are the states, visited from right to left, and a node's states are kept only while the visitor is below
# that node. A node that spans the steps from $a$ to $b$ advances through them once, saves a state at the start of
# each of its $k$ parts, and then hands over the parts, the last one first.


# %% tags=["your-turn"]
def tree(a, b, k):
    """Yield the actions that reverse the steps a … b − 1, where s_a is kept already, and drop s_a.

    Load(a) comes first. One step needs Adjoint and Drop. A longer one has parts = min(k, b − a)
    parts, and their ends are a + (b − a) * i // parts for i = 0 … parts. Advance to the start of
    each part but the first, and Save it. Then do all parts, last one first, by tree itself.
    """
    yield Load(a)
    if b - a == 1:
        yield Adjoint(a)
        yield Drop(a)
        return
    parts = min(k, b - a)
    ends = [a + (b - a) * i // parts for i in range(parts + 1)]
    for start, end in pairwise(ends[:-1]):
        yield Advance(start, end)
        yield Save(end)
    for start, end in reversed(list(pairwise(ends))):
        yield from tree(start, end, k)


# %%
def keep_tree(T, k):
    yield Save(0)
    yield from tree(0, T, k)


print(draw(keep_tree(16, 2), 16))

# %%
for k in (2, 3, 6, 15, 200):
    took = cost(keep_tree(200, k), 200)
    print(f"k = {k:>3}   states kept {took.peak_states:>4}   extra steps {took.extra:>4}")

claim(
    "action for action, this is magic.schedule.kary",
    list(keep_tree(200, 3)) == list(schedule.kary(200, 3)),
)

# %% [markdown]
# The tree is $\lceil\log_k T\rceil$ levels deep. At each level a node's steps are advanced through once, except for
# its last part, so a level costs at most $T(k-1)/k$ steps. Below each node that is being visited, at most $k-1$
# states are kept besides the node's own. Therefore
#
# $$\text{states} \le (k-1)\,\lceil \log_k T\rceil + 1, \qquad
#   \text{steps advanced} \le T\,\lceil \log_k T\rceil\,\frac{k-1}{k}.$$
#
# Memory now grows with the logarithm of $T$, and so does the time per step. For $T = 10{,}000$ and $k = 2$ fifteen
# states are enough, where every $k$-th takes two hundred.


# %%
def levels(T, k):
    return next(depth for depth in range(64) if k**depth >= T)


walks = {(T, k): cost(keep_tree(T, k), T) for T in range(2, 200, 3) for k in (2, 3, 5, 10)}
claim(
    "most states kept, as a share of the bound",
    max(c.peak_states / ((k - 1) * levels(T, k) + 1) for (T, k), c in walks.items()),
    at_most=1,
)
claim(
    "most steps advanced, as a share of the bound",
    max(c.advanced / (T * levels(T, k) * (k - 1) / k) for (T, k), c in walks.items()),
    at_most=1,
)

# %% [markdown]
# ## 5 · The optimum
#
# Is that the best one can do? Ask the question exactly. With $c$ **slots**, places in memory for one state each, of which the
# start occupies one, what is the least number $A(T, c)$ of steps that must be advanced to reverse $T$ of them? (In this
# chapter $c$ is a number of states.)
#
# A schedule begins by going to some $m$ and saving $s_m$. Then it has to reverse the $T - m$ steps to the right of $m$.
# The start keeps its slot meanwhile, so $c - 1$ slots are left for them, one of which holds $s_m$. When they are done, $s_m$
# is dropped, and the $m$ steps to the left have all $c$ slots again:
#
# $$A(T, c) = \min_{0 < m < T}\; \bigl\{\, m + A(T - m,\, c - 1) + A(m,\, c) \,\bigr\}, \qquad A(1, c) = 0, \quad
#   A(T, 1) = \tfrac{T(T-1)}{2}.$$
#
# This is dynamic programming, and a few lines do it.


# %% tags=["your-turn"]
@cache
def fewest_steps(T, c):
    """A(T, c) by the recursion above: the fewest steps advanced to reverse T with c states."""
    if T == 1:
        return 0
    if c == 1:
        return T * (T - 1) // 2
    return min(m + fewest_steps(T - m, c - 1) + fewest_steps(m, c) for m in range(1, T))


# %%
for c in (1, 2, 3, 5, 7, 10, 20, 100):
    print(f"{c:>3} states: {fewest_steps(100, c):>5,} steps advanced to reverse 100")

# %% [markdown]
# The last line is the training itself, 99 steps. Ten states already bring the total down to less than two and a
# half times that. But trying every $m$ takes long for a long run, and it is not necessary. Griewank and Walther (2000,
# *Revolve*) turned the question round: how *long* a run can be reversed? Let the reach $R(c, r)$ be the largest number of steps
# that $c$ states can reverse if no step is advanced through more than $r$ times. Cut such a run at $m$. The right
# part has one state less. The left part has been advanced through once already, so it has one pass less:
#
# $$R(c, r) = R(c - 1, r) + R(c, r - 1), \qquad R(0, r) = R(c, 0) = 1.$$
#
# This is the rule of Pascal's triangle, so $R(c, r) = \binom{c + r}{c}$. The best cut gives each part its share of the
# sum, and `schedule.binomial` cuts there.

# %%
repeats, states = range(7), [1, 2, 3, 4, 8, 16, 32]
longest = pd.DataFrame(
    [[comb(c + r, c) for r in repeats] for c in states], index=states, columns=repeats
)
longest.rename_axis(index="c: states", columns="r: repeats")

# %% [markdown]
# Read the table along a row: with 8 states, 3,003 steps can be reversed with none of them advanced through more than six times, the training's pass included. Here is the optimum for 16 steps and 3 states.

# %%
print(draw(schedule.binomial(16, 3), 16))

# %%
grid = [(T, c) for T in range(1, 61) for c in range(1, 12)]
optimal = all(cost(schedule.binomial(T, c), T).advanced == fewest_steps(T, c) for T, c in grid)
claim("binomial takes the fewest steps, for every T up to 60 and c up to 11", optimal)

# %% [markdown]
# ## 6 · How the cost grows
#
# How many steps is that in all? At most $R(c, j)$ of the $T$ steps can do with $j$ passes or fewer. So at least
# $T - R(c, j)$ steps are advanced through more than $j$ times, for each $j = 0, 1, \dots, r - 1$, where $r$ is the
# smallest number with $R(c, r) \ge T$. A step that is advanced through $q$ times is counted for $q$ values of $j$, so
# the sum over $j$ counts every advanced step once. The optimum attains it:
#
# $$A(T, c) = \sum_{j=0}^{r-1} \left[\, T - \binom{c+j}{c} \right] = r\,T - \binom{c + r}{c + 1}.$$


# %% tags=["your-turn"]
def optimum(T, c):
    """A(T, c) in closed form: find the smallest r with comb(c + r, c) ≥ T, then use the formula."""
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return r * T - comb(c + r, c + 1)


# %%
claim("the closed form is the minimum", all(optimum(T, c) == fewest_steps(T, c) for T, c in grid))
walked = cost(schedule.binomial(10_000, 32), 10_000).advanced
claim("and what binomial takes for 10,000 steps", walked == optimum(10_000, 32))
print(f"10,000 steps with 32 states: {optimum(10_000, 32) - 9_999:,} extra steps")

# %%
T = 10_000
trees = [cost(schedule.kary(T, k), T) for k in (2, 3, 4, 6, 10, 22, 100)]
pieces = [cost(keep_every(T, k), T) for k in (10, 30, 100, 300, 1000)]
saved = [c.extra / (optimum(T, c.peak_states) - T + 1) for c in trees]
claim("none of the seven trees takes fewer extra steps than the optimum", min(saved) > 1)
claim("extra steps of the tree with k = 2, relative to the optimum", saved[0], at_least=1.5)
claim("the same for k = 100, which keeps 199 states", saved[-1], at_most=1.01)
claim(
    "extra steps for each of ten million steps, with 32 states",
    (optimum(10**7, 32) - 10**7 + 1) / 10**7,
    at_most=6,
)

# %% tags=["nbval-ignore-output", "hide-input"]
figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.8, 6.6))
many = sorted({round(1.12**i) for i in range(12, 82)})
best = [(optimum(T, c) - T + 1) / T for c in many]
top.plot(many, best, color=plot.HELPFUL, label="optimum")
for costs, mark, color, label in (
    (trees, "o", plot.HARMFUL, "tree, k = 2 … 100"),
    (pieces, "s", plot.NEUTRAL, "every k-th"),
):
    top.plot(
        [c.peak_states for c in costs], [c.extra / T for c in costs], mark, color=color, label=label
    )
top.set(xscale="log", xlabel="states kept", ylabel="extra steps per step", ylim=(0, 13))
top.set(title=f"A run of {T:,} steps")
top.legend()
lengths = [round(10 ** (i / 8)) for i in range(8, 57)]
for c, style in ((8, ":"), (32, "-"), (128, "--")):
    extra = [(optimum(n, c) - n + 1) / n for n in lengths]
    bottom.plot(lengths, extra, style, color=plot.HELPFUL, label=f"{c} states")
bottom.set(xscale="log", xlabel="steps of the run", ylabel="extra steps per step")
bottom.set(title="The optimum, for longer and longer runs")
bottom.legend();

# %% [markdown]
# The upper panel is a run of ten thousand steps. With few states a tree takes a third to a half more extra steps than the optimum, because its parts are equal. The left part of a cut is reversed when more slots are free, so it ought to be
# longer than the right one. With 199 states there are only two levels, and then the tree, every $k$-th and the optimum
# are nearly the same. The lower panel shows how the cost grows with the length of the run: with 32 states, each of
# ten million steps costs fewer than six extra ones, and a run ten times as long costs only about one more for each
# step.
#
# ## 7 · Do they really give the same?
#
# A schedule decides *when* a state is computed, and has no influence on what it is. The scores must not depend on the
# schedule, then, down to the last bit. We run four more on the network of section 2, and time them.

# %%
choices = {
    "every 11th": keep_every(120, 11),
    "tree, k = 2": keep_tree(120, 2),
    "optimum, 8 states": schedule.binomial(120, 8),
    "optimum, 3 states": schedule.binomial(120, 3),
}
choices = {name: list(actions) for name, actions in choices.items()}
found = {}
for name, actions in choices.items():
    start = time.perf_counter()
    found[name] = replay(actions)
    seconds[name] = time.perf_counter() - start
claim("five schedules, the same bits", all(torch.equal(v, reference) for v in found.values()))

# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
last = run.train(progress=False)
training = time.perf_counter() - start
table = {}
for name, actions in {"keep everything": keep_everything(120), **choices}.items():
    took = cost(actions, 120)
    table[name] = {
        "states kept": took.peak_states,
        "MB": round(took.peak_states * last.nbytes / 1e6, 1),
        "extra steps": took.extra,
        "time, in trainings": round(seconds[name] / training, 1),
    }
pd.DataFrame(table).T

# %% [markdown]
# The times include everything: training, recomputation, and the pulls of two cotangents, which every schedule makes
# once. By count, eight states cost 186 extra steps, about one and a half trainings, and three cost 511, more than four.
#
# ## What we claim
#
# - A schedule is a sequence of five actions, and twenty lines run any of them.
# - With $c$ states, $T$ steps can be reversed by advancing $rT - \binom{c+r}{c+1}$ steps, and with no fewer.
# - The schedule changes memory and time. It does not change a bit of the result.
#
# ## What we ignored
#
# - **Traces.** An adjoint makes the trace of its step and throws it away. If there is room, traces can be
#   kept, too. [Chapter 07](07_a_replay_to_trust.ipynb) does that.
# - **States of different size, steps of different length.** Every state here is as large as any other and every step
#   takes as long. Exercise 06.4 gives up the second.
# - **The time to save and load.** In memory it is nothing, since a state is handed over and not copied. On a disk it
#   counts.
# - **Parallel work.** A replay is a chain. But different targets are independent, and could be pulled on different
#   machines.
#
# ## Exercises
#
# Take the `#` from a cell's last line: `check` runs your function on cases and says what is wrong. Solutions are in
# [solutions/06](solutions/06_remember_forget_replay.ipynb).

# %% [markdown]
# **06.1** ●○○ (10 min) Write `count(actions, T)`. It walks through a schedule for $T$ steps and returns two numbers: the
# most states that are kept at once, and the number of extra steps. Do not use `cost`.
#
# <details><summary>Hint</summary>Hold the kept steps in a set. An <code>Advance(t, to)</code> is to − t steps. The
# training itself advances T − 1 steps: the last one is traced, not advanced.</details>


# %%
def count(actions, T):
    """(most states kept at once, extra steps) of a schedule for T steps."""
    ...


# from magic.book import check
# check("06.1", count)

# %% [markdown]
# **06.2** ●●○ (15 min) Write `split(T, c)`: a best $m$ to advance to first when $T \ge 2$ steps are to be reversed with $c \ge 2$
# states, the start among them. It must be fast enough for $T = 10^6$, so do not try them all.
#
# <details><summary>Hint</summary>Find the smallest r with R(c, r) ≥ T. With the cut at m, the left part may have at most
# R(c, r − 1) steps, and the right part at most R(c − 1, r). Neither part should be so short that it wastes a pass: the left one has at least R(c, r − 2) steps (with R(c, −1) = 0), the right one at least R(c − 1, r − 1). Any m within all four
# bounds will do.</details>


# %%
def split(T, c):
    """How far to advance before the first Save, so that the fewest steps are advanced in all."""
    ...


# check("06.2", split)

# %% [markdown]
# **06.3** ●●○ (20 min) Write `reverse(a, b, c)`, a generator of actions that reverses the steps $a, \dots, b - 1$ when $s_a$ is
# kept already, with at most $c$ states kept at once, $s_a$ among them, and with the fewest extra steps. At the end
# $s_a$ is dropped. Use your `split`, or try every $m$ with `fewest_steps`.
#
# <details><summary>Hint</summary>The recursion of section 5, with the actions in its order: load, advance, save, right part,
# left part. With one step, or one state, no cut is possible.</details>


# %%
def reverse(a, b, c):
    """Yield the actions that reverse steps a … b − 1 from the kept s_a, with at most c states."""
    ...


# check("06.3", reverse)

# %% [markdown]
# **06.4** ●●● (25 min) Batches may grow during training, and then late steps take longer than early ones. Write
# `least_time(times, c)`, where step $t$ takes `times[t]` seconds: the least time of all the advancing that reversing the
# run takes, with $c$ states, the start among them. (As in section 5, the adjoints themselves do not count.)
#
# <details><summary>Hint</summary>A segment is no longer known by its length alone: let A(a, b, c) be the least time for the
# steps a … b − 1. To advance from a to m takes times[a] + … + times[m − 1].</details>


# %%
def least_time(times, c):
    """The least time spent advancing, to reverse len(times) steps with c states."""
    ...


# check("06.4", least_time)

# %% [markdown]
# **06.5** ●●● (30 min, without a checker) Suppose that nobody knows $T$ while the training runs. Write a generator for this *online*
# case: it keeps states as the training goes on, and when the slots are full, it drops some so that the others stay
# well spaced. Then reverse the run from what is kept, with `schedule.resumed`. How many more extra steps than the
# optimum does it take?
#
# <details><summary>Hint</summary>Keep every 2ʲ-th state; when there are too many, increase j. Stumm and Walther (2010), <i>New
# algorithms for optimal online checkpointing</i>, do better.</details>
#
# **Next:** [07 · A replay to trust](07_a_replay_to_trust.ipynb)
