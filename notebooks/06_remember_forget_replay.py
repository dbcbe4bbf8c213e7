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
# **Question.** The way back through a run needs its states, the last one first. Which of them should we keep?
#
# [Chapter 03](03_differentiate_the_whole_run.ipynb) kept the record of every step, and ran out of memory.
# [Chapter 04](04_one_step_backwards.ipynb) kept every state and needed one step's record at a time. A state is small beside a
# record, but a run has thousands of them, and those of a language model take gigabytes each. Fortunately a state need
# not be kept to be had: training is deterministic, so any state can be computed again from any earlier one, to the bit.
# Memory can be paid for with time. How much time for how much memory is a question with an exact answer.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State` | everything training carries after $t$ steps |
# | step | `run.step` | $s_t \mapsto s_{t+1}$ |
# | adjoint | `step_vjp` | needs $s_t$; takes the cotangent back through step $t$ |
# | schedule | an iterator of actions | what to keep, what to compute again, and when |
# | extra steps | `cost(...).extra` | steps beyond those of the training |
#
# About thirty minutes to read, two to run.

# %%
import tempfile
import time
import warnings
from functools import cache
from itertools import pairwise
from math import comb
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic import schedule
from magic.book import data, models, plot
from magic.book.checks import agree, claim
from magic.engine.adjoint import measure_vjp, step_vjp
from magic.engine.schedule import Adjoint, Advance, Drop, Load, Save, cost
from magic.engine.timeline import draw

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
plot.style()
warnings.filterwarnings(
    "ignore", ".*torch.jit", FutureWarning
)  # PyTorch's own, at the first use of forward mode

# %% [markdown]
# ## 1 · Five words
#
# A film that is to be shown backwards, on a projector that runs only forwards: this is our problem. The projector
# understands five commands.
#
# | action | meaning |
# |---|---|
# | `Save(t)` | keep the current state, $s_t$ |
# | `Load(t)` | make the kept $s_t$ current |
# | `Advance(t, to)` | step the current state from $t$ to `to` |
# | `Adjoint(t)` | take the cotangent back through step $t$; $s_t$ must be current |
# | `Drop(t)` | forget $s_t$ |
#
# A **schedule** is a sequence of them in which the adjoints come in the order $T-1, \dots, 1, 0$. The first that comes
# to mind keeps everything. Here it is, and a picture of it for a run of 12 steps.


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
# From left to right the steps of training, from top to bottom time. The first row is the training, every state kept
# (●), and the first adjoint (◄) at its end. Then the cotangent walks back, one row for each adjoint. Nothing is computed twice.
#
# The other end is to keep nothing but the start, which we always have:


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
# Each adjoint asks for a training of its own. `cost` walks through a schedule, proves on the way that it is legal
# (no state is loaded that is not kept, no adjoint comes out of order), and counts.

# %%
for make in (keep_everything, keep_nothing):
    took = cost(make(200), 200)
    kept = f"{make.__name__:<16} states kept {took.peak_states:>4}"
    print(f"{kept}   steps advanced {took.advanced:>7,}   extra {took.extra:>7,}")

claim(
    "to keep nothing takes (T−1)(T−2)/2 extra steps",
    cost(keep_nothing(200), 200).extra == 199 * 198 // 2,
)

# %% [markdown]
# Two hundred states and no extra step, or one state and about twenty thousand. Everything interesting is in between.
#
# ## 2 · Twenty lines that run any of them
#
# First, something to run: 1,500 digits, a network with two hidden layers of 256, AdamW, 200 steps in batches of 128.
# We measure the losses of four test images.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1500, test=297))
torch.manual_seed(0)
model = models.MLP((64, 256, 256, 10)).to(device)
order = magic.batches(len(x), size=128, epochs=19, seed=0)[:200].to(device)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:4], y_test[:4])


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = magic.Run(model, optimizer, (x, y), loss, order)
trained = run.model(run.train(progress=False))
accuracy = (trained(x_test).argmax(1) == y_test).double().mean().item()
claim("the network reads at least 95 % of the test images right", accuracy >= 0.95)


# %% [markdown]
# The commands know nothing of networks, and chapter 04's `step_vjp` knows nothing of schedules. Where they meet, one
# `match` is enough. This is REPLAY:


# %%
def replay(actions):
    kept, state, cotangent = {}, run.initial, None
    weights, values = run.weights(), torch.zeros(4, run.n, device=device)
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
                if cotangent is None:  # the end of training
                    cotangent = measure_vjp(run, run.step(state, weights), measure)
                cotangent, part = step_vjp(run, state, cotangent, weights)
                values.index_add_(1, order[t], part)
    return values


# %%
reference = replay(keep_everything(200))
scores = magic.attribute(run, measure, progress=False)
agree("replay, magic.attribute", reference, scores.values, tolerance=1e-4)

# %% [markdown]
# (`float32`, and `magic` may take the targets in other groups than our loop, which rounds sums differently.)
#
# ## 3 · Every $k$-th
#
# Keep every $k$-th state. When the way back comes to a piece of $k$ steps, go through it once more and keep all of *its*
# states, until the piece is done.


# %%
def keep_every(T, k):
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


print(draw(keep_every(24, 5), 24))

# %% [markdown]
# There are $T/k$ states at the seams and up to $k - 1$ inside a piece, and each step is repeated at most once. The sum $T/k + k$ is smallest
# at $k = \sqrt T$. So with about $2\sqrt T$ states one gets away with one training more (Chen et al. 2016,
# [arXiv 1604.06174](https://arxiv.org/abs/1604.06174)). For a hundred times the steps it asks for ten times the
# memory.

# %%
for k in (2, 5, 14, 50, 100):
    took = cost(keep_every(200, k), 200)
    print(f"k = {k:>3}   states kept {took.peak_states:>4}   extra steps {took.extra:>4}")

fewest = min(cost(keep_every(200, k), 200).peak_states for k in range(1, 201))
claim("of all k, none keeps fewer than 27 states: 2√200 − 1, rounded", fewest == 27)

# %% [markdown]
# ## 4 · The tree
#
# What was done once can be done again: treat each piece as the run was treated, with pieces of its own. This is the lazy
# $k$-ary tree of REPLAY (Engstrom et al. 2025, section 3, [arXiv 2503.13751](https://arxiv.org/abs/2503.13751)). Its leaves are the
# states, visited from right to left; a node is there only while the visitor is below it. A node that spans the
# steps from $a$ to $b$ walks through them once, leaves a state at the start of each of its $k$ parts, and hands the parts
# on, last first.


# %%
def tree(a, b, k):
    yield Load(a)
    if b - a == 1:
        yield Adjoint(a)
        yield Drop(a)
        return
    parts = min(k, b - a)
    seams = [a + (b - a) * i // parts for i in range(parts + 1)]
    for start, end in pairwise(seams[:-1]):
        yield Advance(start, end)
        yield Save(end)
    for start, end in reversed(list(pairwise(seams))):
        yield from tree(start, end, k)


def keep_tree(T, k):
    yield Save(0)
    yield from tree(0, T, k)


print(draw(keep_tree(24, 3), 24))

# %%
claim(
    "action for action, magic.schedule.kary's",
    list(keep_tree(200, 3)) == list(schedule.kary(200, 3)),
)
took = {k: cost(keep_tree(200, k), 200) for k in (2, 3, 6, 15, 200)}
for k, c in took.items():
    print(f"k = {k:>3}   states kept {c.peak_states:>4}   extra steps {c.extra:>4}")

# %% [markdown]
# The tree is $\lceil\log_k T\rceil$ levels deep. A level costs at most $T(k-1)/k$ steps, since the last part of each node need not be
# walked through, and keeps $k-1$ states besides the node's own:
#
# $$\text{states} \le (k-1)\,\lceil \log_k T\rceil + 1, \qquad \text{steps} \le T\,\lceil \log_k T\rceil\,\frac{k-1}{k}.$$
#
# Both grow with the logarithm of $T$. That is the step from impossible to easy: for $T = 10{,}000$ and $k = 2$, fifteen
# states.
#
# ## 5 · The optimum
#
# Is it the best one can do? Ask the question exactly: with room for $c$ states, the start among them, what is the least number
# $A(T, c)$ of steps that have to be advanced to reverse $T$ of them? The first thing to do is to go to
# some $m$ and keep $s_m$. Then comes the right part, with a place less, and, when $s_m$ is dropped, the left part
# with all the places:
#
# $$A(T, c) = \min_{0 < m < T}\; \bigl\{\, m + A(T - m,\, c - 1) + A(m,\, c) \,\bigr\}, \qquad A(1, c) = 0, \quad
#   A(T, 1) = \tfrac{T(T-1)}{2}.$$
#
# A few lines of dynamic programming.


# %%
@cache
def fewest_steps(T, c):
    if T == 1:
        return 0
    if c == 1:
        return T * (T - 1) // 2
    return min(m + fewest_steps(T - m, c - 1) + fewest_steps(m, c) for m in range(1, T))


print(
    *(f"{c:>2} states: {fewest_steps(100, c):>5,} steps" for c in (1, 2, 3, 5, 7, 10, 20, 100)),
    sep="\n",
)

# %% [markdown]
# No search is needed, as Griewank and Walther found (2000, *Revolve*): count instead how long a run can be. Let $L(c, r)$ be the
# most steps that $c$ states can reverse if no step is repeated more than $r$ times. The right part has a state less,
# the left part a repetition less:
#
# $$L(c, r) = L(c - 1, r) + L(c, r - 1), \qquad L(0, r) = L(c, 0) = 1.$$
#
# That is Pascal's triangle, so $L(c, r) = \binom{c + r}{c}$, and the split is where the two parts get their shares of it.
# `schedule.binomial` splits there.

# %%
repeats, kept = range(0, 7), [1, 2, 3, 4, 8, 16, 32]
longest = pd.DataFrame(
    [[comb(c + r, c) for r in repeats] for c in kept], index=kept, columns=repeats
)
longest.rename_axis(index="states", columns="repeats")

# %%
print(draw(schedule.binomial(24, 3), 24))

# %%
grid = [(T, c) for T in range(1, 61) for c in range(1, 12)]
optimal = all(cost(schedule.binomial(T, c), T).advanced == fewest_steps(T, c) for T, c in grid)
claim("binomial takes the fewest steps, for every T up to 60 and c up to 11", optimal)

# %% [markdown]
# ## 6 · The law of growth
#
# A run of $T$ steps with $c$ states: find the smallest $r$ with $\binom{c+r}{c} \ge T$. No step is repeated more than $r$ times,
# and the total is $A(T, c) = rT - \binom{c+r}{c+1}$.


# %%
def optimum(T, c):
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return r * T - comb(c + r, c + 1)


claim("the closed form is the minimum", all(optimum(T, c) == fewest_steps(T, c) for T, c in grid))
print(f"10,000 steps with 32 states: {optimum(10_000, 32) - 9_999:,} extra")
claim("and binomial's", cost(schedule.binomial(10_000, 32), 10_000).advanced == optimum(10_000, 32))

# %% tags=["nbval-ignore-output"]
T = 10_000


def points_of(costs):
    return [c.peak_states for c in costs], [c.extra / T for c in costs]


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
many = sorted({round(1.12**i) for i in range(12, 82)})
left.plot(many, [(optimum(T, c) - T + 1) / T for c in many], color=plot.HELPFUL, label="optimum")
trees = [cost(schedule.kary(T, k), T) for k in (2, 3, 4, 6, 10, 22, 100)]
left.plot(*points_of(trees), "o", color=plot.HARMFUL, label="tree, k = 2 … 100")
pieces = [cost(keep_every(T, k), T) for k in (10, 30, 100, 300, 1000)]
left.plot(*points_of(pieces), "s", color=plot.NEUTRAL, label="every k-th")
left.set(xscale="log", xlabel="states kept", ylabel="extra steps per step")
left.set(title=f"{T:,} steps", ylim=(0, 13))
left.legend()
lengths = [round(10 ** (i / 8)) for i in range(8, 57)]
for c, shade in ((8, 0.35), (32, 0.65), (128, 1.0)):
    extra = [(optimum(n, c) - n + 1) / n for n in lengths]
    right.plot(lengths, extra, color=plot.HELPFUL, alpha=shade, label=f"{c} states")
right.set(xscale="log", xlabel="steps", title="The optimum, longer and longer runs")
right.legend();

# %% [markdown]
# Left, a run of ten thousand steps. The tree lies above the optimum everywhere, since its parts are equal: a part that
# will be visited again and again should be shorter than one that is visited once. Every $k$-th, the grey squares, is near the
# optimum only where memory is plenty. Right: with 32 states, each of ten million steps costs less than six extra ones. Longer
# runs are no harder in kind; memory buys time at a falling price.

# %%
same = [c for c in trees if optimum(T, c.peak_states) - T + 1 < c.extra]
claim("at equal memory the optimum takes fewer steps than each of the seven trees", len(same) == 7)
claim(
    "with 32 states, ten million steps take less than six extra steps each",
    optimum(10**7, 32) < 7 * 10**7,
)

# %% [markdown]
# ## 7 · Do they really give the same?
#
# A schedule decides when a state is computed, not what it is. So the scores must not depend on it, down to the last bit.
# We run five on the network of section 2 and look at the clock as well.

# %%
choices = {
    "keep everything": list(keep_everything(200)),
    "every 14th": list(keep_every(200, 14)),
    "tree, k = 2": list(schedule.kary(200, 2)),
    "optimum, 10 states": list(schedule.binomial(200, 10)),
    "optimum, 3 states": list(schedule.binomial(200, 3)),
}
found, seconds = {}, {}
for name, actions in choices.items():
    start = time.perf_counter()
    found[name] = replay(actions)
    seconds[name] = time.perf_counter() - start
claim("five schedules, the same bits", all(torch.equal(v, reference) for v in found.values()))

# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
run.train(progress=False)
training = time.perf_counter() - start
frame = pd.DataFrame(
    {
        name: {
            "states kept": (took := cost(actions, 200)).peak_states,
            "MB": took.peak_states
            * run.initial.nbytes
            * 3
            / 1e6,  # parameters, and Adam's two moments
            "extra steps": took.extra,
            "time, trainings": seconds[name] / training,
        }
        for name, actions in choices.items()
    }
).T
frame.style.format(
    {
        "states kept": "{:,.0f}",
        "MB": "{:,.1f}",
        "extra steps": "{:,.0f}",
        "time, trainings": "{:.1f}",
    }
)

# %% [markdown]
# Most of the time is the four cotangents, which every schedule takes back once. With ten states of two hundred the
# recomputation is hardly seen.
#
# ## 8 · A trace serves twice
#
# Before an adjoint can pull, step $t$ must have been recorded: forward pass and backward pass, with the graph that leads from
# the gradient to the parameters. Chapter 03's record, of one step: a **trace**. And to record a step is to do it. So if the
# next state comes out of the recording, then the last steps of a piece need not be done first and recorded
# afterwards. The sixth word is `Trace(t, to)`: step, and keep the trace of each step until its adjoint.

# %%
print(draw(schedule.binomial(24, 3, traces=4), 24))

# %% [markdown]
# (═ is a step whose trace is kept.) A trace takes more room than a state, since it holds a batch's activations; but it saves a
# step, where a state only spares repetitions. How the budget is best divided depends on the sizes and the speeds of the
# run at hand, so `magic` tries one step, measures, and chooses. One gives it bytes.

# %% tags=["nbval-ignore-output"]
plan = magic.plan(run, targets=4, memory="25MB")
plan

# %% tags=["nbval-ignore-output"]
print(plan.timeline(width=50))

# %% [markdown]
# Of the budget, a part goes to the four cotangents (each as large as a state), to what is in flight while one
# is pulled back, and to the scores; states and traces get the rest. With too little for all the targets, they go back in
# several sweeps. With too little for anything, the error says how much is needed:


# %%
def complaint(error, work):
    """The message of the error that `work` must raise."""
    try:
        work()
    except error as raised:
        return str(raised)
    raise AssertionError("nothing was raised")


said = complaint(ValueError, lambda: magic.attribute(run, measure, memory="1MB", progress=False))
claim("too small a budget is refused, with the least that works", "the least that works is" in said)

# %% tags=["nbval-ignore-output"]
print(said)

# %% [markdown]
# A budget is a promise, so we measure it from outside: all that is allocated while `magic.attribute` runs, its own
# trial and checks included, and not freed. (The clock runs in another, unwatched call.)


# %%
def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def cost_of(targets, memory):
    def differentiate():
        some = lambda model: loss(model, x_test[:targets], y_test[:targets])  # noqa: E731
        return magic.attribute(run, some, memory=memory, progress=False)

    took, scores = timed(differentiate)
    _, _, peak = magic.engine.footprint.measured(differentiate, run.device)
    plan = scores.plan
    kept = {
        "states": plan.states, "traces": plan.traces, "sweeps": plan.sweeps,
        "extra steps": plan.extra * plan.sweeps,
    }
    return {
        "targets": targets, "budget, MB": float(memory[:-2]), "peak, MB": peak / 1e6, **kept,
        "seconds": took,
    }


# %%
def plain_loop():
    net = run.model(run.initial).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for batch in order:
        optimizer.zero_grad()
        loss(net, x[batch], y[batch]).mean().backward()
        optimizer.step()


budgets = {1: ("15MB", "25MB", "60MB", "1000MB"), 16: ("25MB", "1000MB")}
measured = pd.DataFrame([cost_of(k, memory) for k, given in budgets.items() for memory in given])
claim(
    "the peak is within the budget, all six times",
    (measured["peak, MB"] <= measured["budget, MB"]).all(),
)

# %% tags=["nbval-ignore-output"]
plain = median(timed(plain_loop)[0] for _ in range(5))
measured.assign(
    **{
        "plain loops": measured["seconds"] / plain,
        "per target": measured["seconds"] / plain / measured["targets"],
    }
).round(2)

# %% [markdown]
# The last column is the price of one exact row of scores, in plain training loops, training included. One row alone
# costs about four; among sixteen, less than two. For comparison, the arithmetic, in forward passes: a training step takes three, one
# forward and two for the way back. Its adjoint records those three again and pulls through them, another five. Together
# eleven where a plain loop has three, so 3.67; with a trace that stands for the training's step, three less.
# (`uv run python -m tests.bench` measures this table more carefully, on three networks.)
#
# ## 9 · A folder
#
# With `disk=`, states that do not fit into memory may lie in a folder. Which ones? The slots that are used least: the
# early states of a run are visited a few times, those near the end of a piece again and again (Stumm and Walther 2009,
# *MultiStage approaches*). Whether reading beats recomputing is decided by the same trial: it writes and reads one state.
#
# A folder has a second use. A replay may take days, and days do not pass without a machine being restarted. So now
# and then it notes there how far it is. Let us kill one: a run with a fuse, that burns through after some
# hundreds of batches.


# %%
class Killed(BaseException):
    pass


fuse = [10**9]


class Mortal(magic.Run):
    def batch(self, t):
        fuse[0] -= 1
        if fuse[0] < 0:
            raise Killed
        return super().batch(t)


mortal = Mortal(model, optimizer, (x, y), loss, order)
folder, deaths, done = Path(tempfile.mkdtemp()), 0, None
magic.engine.resume.EVERY = 0.1  # seconds between two notes; usually 10, more than this run takes
while done is None:
    fuse[0] = 200 + 50 * deaths
    try:
        done = magic.attribute(mortal, measure, progress=False, disk=folder, memory="60MB")
    except Killed:
        deaths += 1

# %%
whole = magic.attribute(run, measure, progress=False, plan=done.plan, disk=tempfile.mkdtemp())
claim("it died several times", deaths >= 2)
claim(
    "and the scores have the bits of a replay that did not", torch.equal(done.values, whole.values)
)

# %% [markdown]
# (The tests do it with `kill -9`, in training, on the way down and on the way back.) What lies in the folder belongs to this run.
# Another one is sent away, by name:

# %%
other = torch.optim.AdamW(model.parameters(), lr=2e-3)
stranger = magic.Run(model, other, (x, y), loss, order)
said = complaint(
    ValueError, lambda: magic.attribute(stranger, measure, progress=False, disk=folder)
)
claim("another rate, another run: refused by name", "the optimizer or its hyper-parameters" in said)

# %% [markdown]
# ## 10 · Trust, then verify
#
# All of this stands on one sentence: *the state computed again is the state of the training*. If it is not, the result is a wrong
# gradient that looks like a right one. So the sentence is checked. At sixteen steps of the training, `magic` notes a
# checksum of each tensor: the sum of its bits, read as integers. It costs less than one per cent of the training, and no
# single flipped bit escapes it. On the way back every state that is rebuilt at one of these steps is compared, and every
# state that was stored is compared with what was stored. And every step leaves a witness that costs nothing, its total loss:
# whoever does the step again, or traces it, computes it again, and its bits must be the same. Four ways to break it:
#
# **A flipped bit** in a state that lies in memory.

# %%
shelf, state = magic.engine.store.Memory(), run.step(run.initial, run.weights())
shelf.save(1, state)
name = next(iter(state.params))
state.params[name].view(torch.int32)[0, 0] ^= 1
print(complaint(magic.ReplayMismatch, lambda: shelf.load(1)))

# %% [markdown]
# **Data that changed** after the training: one pixel, by a millionth.

# %%
row = order[0][0]
original = x[row].clone()
x[row, 0, 4, 4] += 1e-6
print(complaint(magic.ReplayMismatch, lambda: magic.attribute(run, measure, progress=False)))
x[row] = original

# %% [markdown]
# **A loss that changed** after the training, as when a cell is edited and run again: a factor that it reads. (A loss that
# counts its own calls is refused when the run is made.)


# %%
factor = [1.0]


def moody_loss(model, x, y):
    return loss(model, x, y) * factor[0]


moody = magic.Run(model, optimizer, (x, y), moody_loss, order)
moody.train(progress=False)
factor[0] = 1.000001
said = complaint(magic.ReplayMismatch, lambda: magic.attribute(moody, measure, progress=False))
claim("it is noticed, and the likely cause is named", "data, model or loss changed since" in said)

# %% [markdown]
# **Another number of threads**, which adds in another order. This machine may happen to give the same bits;
# if it does not, it is noticed.

# %%
torch.set_num_threads(2)
try:
    again = magic.attribute(run, measure, progress=False)
    noticed = again.health.ok
except magic.ReplayMismatch as error:
    noticed = "the thread count was 1, is 2" in str(error)
torch.set_num_threads(1)
claim("two threads: the same bits, or a mismatch that names them", noticed)

# %% [markdown]
# What no checksum can see is a chain of exact states whose derivative is useless. For that, the replay keeps the size of
# each cotangent on its way back. If it sweeps many powers of ten, some steps of the training count for everything, others for
# nothing, and small errors grow as the cotangent does; `attribution.health` says so, and warns.

# %% tags=["nbval-ignore-output"]
ax = scores.health.plot()
scores.health

# %%
claim("this run is a healthy one", scores.health.ok)
claim("no cotangent sweeps more than two powers of ten", max(scores.health.decades) < 2)

# %% [markdown]
# ## 11 · The price of one pull
#
# With the schedule settled, what is left is the adjoint itself: chapter 04's Hessian-vector product $H\bar g$ and one directional
# derivative $\bar g \cdot \nabla\ell_i / B$ per example. There are three ways to nest two differentiations such that the
# product comes out. *Reverse over reverse* differentiates $\bar g \cdot \nabla L$ backwards. *Forward over reverse* moves
# the parameters along $\bar g$ and watches how $\nabla L$ and the losses move. *Reverse over forward* takes the
# directional derivative first, then its gradient. Here is each, in `torch.func`.


# %%
names, values = list(run.initial.params), list(run.train(progress=False).params.values())
batch = x[order[0]], y[order[0]]
weight = torch.ones(len(order[0]), device=device)
dice = torch.Generator().manual_seed(0)
direction = [torch.randn(p.shape, generator=dice).to(device) for p in values]


def objective(params, weight):
    losses = loss(
        lambda x: functional_call(model, dict(zip(names, params, strict=True)), (x,)), *batch
    )
    return (weight * losses).sum() / len(losses), losses


def total(params, weight):
    return objective(params, weight)[0]


# %%
def reverse_over_reverse(direction):
    _, pull = torch.func.vjp(torch.func.grad(total), values, weight)
    return pull(direction)


def forward_over_reverse(direction):
    gradient = torch.func.grad(objective, has_aux=True)
    _, (moved, losses) = torch.func.jvp(lambda p: gradient(p, weight), (values,), (direction,))
    return moved, losses / len(losses)


def reverse_over_forward(direction):
    def along(params, weight):
        return torch.func.jvp(lambda p: total(p, weight), (params,), (direction,))[1]

    return torch.func.grad(along, argnums=(0, 1))(values, weight)


# %% [markdown]
# And a fourth, which is what `magic` does: reverse over reverse with plain autograd. The graph of the gradient is recorded once;
# each target pulls through it.


# %%
def record():
    leaves = [p.detach().requires_grad_() for p in values]
    w = weight.clone().requires_grad_()
    return torch.autograd.grad(total(leaves, w), leaves, create_graph=True), [*leaves, w]


def by_autograd(direction, recorded=None):
    gradient, inputs = recorded or record()
    *moved, scores = torch.autograd.grad(gradient, inputs, direction, retain_graph=True)
    return moved, scores


def flat(product):
    return torch.cat([part.flatten() for part in (*product[0], product[1])])


ways = [reverse_over_reverse, forward_over_reverse, reverse_over_forward]
claim(
    "four ways, one product, to five digits",
    all(
        (flat(w(direction)) - flat(by_autograd(direction))).norm()
        < 1e-5 * flat(w(direction)).norm()
        for w in ways
    ),
)


# %% [markdown]
# Now the clock: for one target, and for sixteen, which `torch.vmap` takes together in the first three ways, and which
# in the fourth pull one after the other through one record.

# %%
many = [torch.stack([d] * 16) for d in direction]


def sixteen(way):
    return lambda: torch.vmap(lambda *d: way(list(d)))(*many)


def one_by_one():
    recorded = record()
    return [by_autograd(direction, recorded) for _ in range(16)]


def typical(work, rounds=15):
    work()
    return median(timed(work)[0] for _ in range(rounds))


def gradient():
    leaves = [p.detach().requires_grad_() for p in values]
    return torch.autograd.grad(total(leaves, weight), leaves)


# %% tags=["nbval-ignore-output"]
unit = typical(gradient)
rows = {
    w.__name__.replace("_", " "): (typical(lambda w=w: w(direction)), typical(sixteen(w), 5))
    for w in ways
}
rows["autograd, recorded once"] = typical(lambda: by_autograd(direction)), typical(one_by_one, 5)
frame = pd.DataFrame(rows, index=["1 target", "16 targets, each"]).T / unit
frame["16 targets, each"] /= 16
frame.round(2)

# %% [markdown]
# In units of one gradient, which is a forward and a backward pass. The orders hardly differ, as they should: on paper
# each is the same matrix products. For one target the transformations of `torch.func` cost more than they transform; for
# many, nothing beats the matrix products themselves. So `magic` keeps the fourth.
#
# What else was measured, on the networks of `tests/bench.py` (one thread of a two-core virtual AMD EPYC, PyTorch 2.15; ratios
# to one plain step):
#
# | tried | found | kept |
# |---|---|---|
# | the record as the training's own step (section 8) | 4.1 plain loops instead of 5.4 (MLP, one target, 200 steps) | yes |
# | the optimizer's adjoint by hand, in place (chapter 05's diagonals) | 0.28 of a step instead of 0.81 by autograd (AdamW, MLP) | yes |
# | second derivatives of batch, layer and group norm in closed form | for BatchNorm autograd's took over fifty passes over the activations, ours takes a handful | yes |
# | batching targets with `vmap` on a CPU | 5 times faster for a network of a few thousand parameters, slower for matrices of 256 and up | by size |
# | scores added by `index_add_` | a vector of $B$ numbers a step instead of $n$ | yes |
# | `torch.compile` of record and pull | record: 0.62 → 0.38, 1.4 → 0.9, 1.3 → 0.7; pull: .92 → .91, 1.4 → 1.4, 2.2 → 1.5 (MLP, conv net, transformer); compiling takes 11, 14 and 25 s | no |
# | the step compiled, too | other bits than the user's training | no |
# | matrix products of all targets in one `bmm` | nothing at 16 targets, slower at 1 | no |
# | larger pages, other allocators, fused updates | under 5 % | no |
#
# `torch.compile` helps a transformer's pull by a quarter. At 15 ms a step, it has earned its compilation after 3,000 pulls.
# It wants one graph for each shape of batch, draws other random numbers (so dropout would be differentiated at another mask), and
# rounds otherwise. For runs much longer than ours it would pay; it is not in `magic` yet. CUDA graphs need a GPU, and we had none.
#
# ## What we ignored
#
# - **States that differ in size.** Every state here is as large as any other. If buffers grew with time, the optimum would
#   be another one.
# - **The time to save and load.** In memory it is nothing: a state is handed over, not copied. For a disk `magic` counts
#   it when it chooses how many states to put there, but the split stays that of Revolve, which assumes it free.
# - **Several machines.** A replay is a chain. Its groups of targets are independent and could run side by side.
# - **A record in pieces.** Activation checkpointing does to one step's layers what this chapter did to the steps.
#   A model that uses it may; the record then grows by one layer at a time.
#
# ## Exercises
#
# 1. ● (5 min) For 1,000 steps and 20 states, what do `keep_every`, the best tree and the optimum cost? Print `cost` of
#    each. <details><summary>Hint</summary>Search over $k$: of those that keep at most 20 states, the fewest extra
#    steps. For one of the three there is no such $k$.</details>
# 2. ●● (15 min) Change `tree` so that a node's parts are not equal but shrink from right to left (say, by a constant ratio). How
#    near to the optimum can you come with one ratio for all nodes? <details><summary>Hint</summary>The leftmost part is
#    loaded from the node's own state and the most places are free when it is reached, so it may be long.</details>
# 3. ●●● (30 min) Write a generator for *online* checkpointing, where $T$ is not known while training runs: keep states as you go,
#    and when the places are full, drop one such that the others stay well spaced. Then reverse from what is kept, with
#    `schedule.resumed`. How much worse than the optimum is it? <details><summary>Hint</summary>Keep
#    every $2^j$-th state; when there are too many, double. See Stumm and Walther (2010), *New algorithms for optimal online
#    checkpointing*.</details>
#
# **Next:** [08 · Is the derivative useful?](08_is_the_derivative_useful.ipynb).
