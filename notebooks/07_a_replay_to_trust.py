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
# # 07 · A replay to trust
#
# **Question.** When may you believe a gradient that took an hour and that nobody can check by hand?
#
# A wrong gradient does not look wrong. It has the right shape and a plausible size, and no loss curve rises to
# warn you. [Chapter 06](06_remember_forget_replay.ipynb) showed how to compute the gradient of a long run. This chapter is
# about the grounds on which you may believe it. There are four questions, and each has its own evidence.
#
# 1. Can the work be finished at all, within the memory there is and in spite of interruptions? (sections 1, 2)
# 2. Are the recomputed states those of the training? (section 3)
# 3. Is each pull the derivative of its step? (section 4)
# 4. Does the result carry enough digits to mean something? (section 5)
#
# | word | meaning |
# |---|---|
# | trace | what autograd keeps of one step so that it can be pulled back; larger than a state |
# | budget | the bytes that a replay may hold beyond those of the plain training loop |
# | record | what a training notes of itself as it runs: fingerprints of some states, the loss of every step |
# | fingerprint | a number computed from all bits of a tensor; if one bit changes, so does the number |
# | witness | a second computation of the same derivative by other means |
# | range (of a cotangent) | the powers of ten between its largest and its smallest norm along the run |
#
# About thirty-five minutes, less than one of them to run. The capstone at the end takes an evening.

# %%
import tempfile
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import magic
from magic import schedule
from magic.book import data, models, plot
from magic.book.checks import claim
from magic.engine.adjoint import measure_vjp, step_vjp
from magic.engine.footprint import measured
from magic.engine.timeline import draw

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
plot.style()
# PyTorch's own warning, at the first use of forward mode
warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)

x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1000, test=300))
order = magic.batches(len(x), size=100, epochs=6, seed=0).to(device)
torch.manual_seed(0)
model = models.MLP((64, 128, 128, 10)).to(device)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:2], y_test[:2])


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
run = magic.Run(model, optimizer, (x, y), loss, order)

# %% [markdown]
# Our run is small, so that everything can be looked at: 1,000 digits, 60 steps of AdamW, and the losses of two test
# images as targets.
#
# ## 1 · A budget in bytes
#
# Chapter 06 counted states. What you actually have is a number of bytes, and states are not the only thing that may be
# kept. Before a step can be pulled back it must be traced: its forward and backward pass are done with the
# graph that leads from the gradient to the parameters. But to trace a step is to do it, since the next state comes out
# of the same operations. So the last steps of a piece need not be advanced first and traced afterwards. A sixth action
# says so: `Trace(t, to)` steps from $t$ to `to`, and keeps the trace of each step until its adjoint.

# %%
print(draw(schedule.binomial(16, 3, traces=4), 16))

# %% [markdown]
# Traced steps are drawn as ═. With three states, chapter 06's optimum for 16 steps took 18 extra steps. With room for four
# traces besides, there are none. A trace takes more room than a state, because it holds the activations of a batch, but
# it saves a whole step, where a state saves only repetitions. How best to divide a budget depends on the sizes
# and speeds at hand. `magic` therefore does one step as a trial, measures what a state, a trace and a pull take, and
# chooses the fastest schedule that fits.
#
# A budget is a promise, so we check it from outside. `measured` does a piece of work and counts every byte that is
# allocated and not yet freed, as chapter 03's `Meter` did. Three budgets:

# %%
rows = []
for memory in ("6MB", "10MB", "1GB"):
    plan = magic.plan(run, targets=2, memory=memory)
    scores, _, peak = measured(
        lambda memory=memory: magic.attribute(run, measure, memory=memory, progress=False),
        run.device,
    )
    kept = {"states": plan.states, "traces": plan.traces, "extra steps": plan.extra}
    rows.append({"budget, MB": plan.room / 1e6, "peak, MB": peak / 1e6, **kept})

budgets = pd.DataFrame(rows)
used = (budgets["peak, MB"] / budgets["budget, MB"]).max()
claim("largest peak of the three, as a share of its budget", used, at_most=1)

# %% tags=["nbval-ignore-output"]
budgets.round(1)

# %% [markdown]
# With the smallest budget a few states fit and no spare trace, and there are more extra steps than steps. With a
# gigabyte all 60 traces are kept, and nothing is repeated. A budget that is too small is refused before the work starts,
# and the error says how much is needed.


# %%
def complaint(error, work):
    """The message of the error that `work` must raise."""
    try:
        work()
    except error as raised:
        return str(raised)
    raise AssertionError("nothing was raised")


said = complaint(ValueError, lambda: magic.plan(run, targets=2, memory="1MB"))
claim("a budget that is too small is refused", "the least that works is" in said)

# %% tags=["nbval-ignore-output"]
print(said)

# %% [markdown]
# ## 2 · A folder
#
# A replay that takes days will be interrupted. It also has to put its states somewhere, and a disk is larger than
# memory. One folder, `disk=`, serves both purposes.
#
# *Two tiers.* Which states should lie on the slower tier? Those that are used least. The early states of a run are
# visited a few times, and those near the end of each piece again and again, and the schedule says in advance how often
# (Stumm and Walther 2009, *MultiStage approaches for optimal offline checkpointing*).
#
# *Resuming.* Every ten seconds or so the replay notes how far it is: on the way down the state, on the way back the
# cotangents and the scores found so far. (The notes take at most a fiftieth of the time.) Each file is written whole or
# not at all. We build a run whose machine fails after 100 batches, and call `attribute` until it succeeds.


# %%
class Failing(magic.Run):
    """A run on a machine that fails when it has read a number of batches."""

    read, fails_at = 0, 100

    def batch(self, t):
        Failing.read += 1
        if Failing.read == self.fails_at:
            raise KeyboardInterrupt
        return super().batch(t)


# %%
failing = Failing(model, optimizer, (x, y), loss, order)
folder, read, resumed = tempfile.mkdtemp(), [], None
while resumed is None:
    Failing.read = 0
    try:
        resumed = magic.attribute(failing, measure, progress=False, disk=folder, memory="6MB")
    except KeyboardInterrupt:
        failing.fails_at = None
    read.append(Failing.read)

elsewhere = tempfile.mkdtemp()
whole = magic.attribute(run, measure, progress=False, plan=resumed.plan, disk=elsewhere)
claim("it was interrupted once", len(read) == 2)
claim("same bits as a replay that was not interrupted", torch.equal(resumed.values, whole.values))

# %% [markdown]
# "Same bits" is worth insisting on. If a resumed replay were only *nearly* equal, you could not tell a rounding
# difference from a state that was lost and replaced by a wrong one. The folder also knows whose it is: a run with another
# learning rate, other data or edited code is refused by name.

# %%
other = torch.optim.AdamW(model.parameters(), lr=1e-3)
stranger = magic.Run(model, other, (x, y), loss, order)
said = complaint(
    ValueError, lambda: magic.attribute(stranger, measure, progress=False, disk=folder)
)
claim("another rate is refused by name", "the optimizer or its hyper-parameters" in said)

# %% [markdown]
# ## 3 · Are these the states of the training?
#
# Everything rests on one sentence: *the recomputed state is the state of the training*. Suppose it is not. Somebody
# trains, and then runs a cell that makes all images one per cent brighter, in place. The states were kept, so they
# are right, but every step is pulled back with other data than it was made with. Here is a replay without any check, before
# and after that cell.


# %%
def all_states(run):
    states = [run.initial]
    while states[-1].step < run.steps:
        states.append(run.step(states[-1], run.weights()))
    return states


def unchecked(run, measure, states):
    """Chapter 06's loop where every state is kept."""
    cotangent, weights = measure_vjp(run, states[-1], measure), run.weights()
    values = torch.zeros(cotangent.targets, run.n, dtype=run.dtype, device=device)
    for t in reversed(range(run.steps)):
        cotangent, part = step_vjp(run, states[t], cotangent, weights)
        values.index_add_(1, run.batches[t].to(device), part)
    return values


states, original = all_states(run), x.clone()
right = unchecked(run, measure, states)
x.mul_(1.01)
wrong = unchecked(run, measure, states)

# %%
size = wrong.norm() / right.norm()
claim("size of the wrong gradient, relative to the right one", size, at_least=0.3, at_most=3)
cosine = torch.cosine_similarity(right, wrong).max()
claim("cosine between the two, the larger of two targets", cosine, at_most=0.6)
ten, wrong_ten = (set(values[0].argsort()[:10].tolist()) for values in (right, wrong))
claim("of the ten most helpful images, the wrong gradient finds", len(ten & wrong_ten), at_most=5)

# %% [markdown]
# The shape is right, so is the order of magnitude, and no error was raised. Yet the two gradients point in quite different
# directions, and of the ten images that the wrong one calls most helpful, at least half are others. One per cent of
# brightness seems little, but each of the sixty steps adds its own error to what the later steps have passed on, and Adam
# divides small gradients by their own size, errors included.
#
# `magic` keeps a **record** of the training. At sixteen steps it notes a fingerprint of every tensor of the state: the sum of its
# bits, read as integers. A flipped bit changes one of these integers by a power of two, and so it changes their sum.
# At every step it notes the total loss of the batch, which has been computed anyway. Whoever comes
# by later, to recompute a step or to trace it, must find the same bits. The sum costs less than a per cent of the
# training, and the losses cost nothing. With the brighter images:

# %%
said = complaint(
    magic.ReplayMismatch, lambda: magic.attribute(run, measure, progress=False, memory="6MB")
)
x.copy_(original)
claim("the first step with another loss stops the replay", "the total loss is" in said)
claim("and the likely cause is named", "data, model or loss changed since" in said)

# %% tags=["nbval-ignore-output"]
print(said)

# %% [markdown]
# The losses differ in the fifth digit. A change of one pixel by a millionth would be found as well, if not by
# the loss then by the next fingerprint, since bits are compared and no tolerance has to be chosen. That is what determinism is good for
# ([chapter 01](01_the_same_run_twice.ipynb)). An edited loss function, another number of threads that adds in
# another order, or a faulty memory module shows in the same way.
#
# ## 4 · Is each pull the derivative of its step?
#
# Right states are not enough. The pull itself may be wrong, and here a comparison with autograd has a blind spot. We know three
# ways to the same number:
#
# - **Finite differences**: train twice, with data weights $w \pm \varepsilon v$ along a direction $v$, and divide. This
#   uses no derivative at all.
# - **Full unroll**: one graph over the whole run, as in chapter 03.
# - **Replay**.
#
# On a run short enough for all three, in `float64`, they ought to agree. We try two losses. One is
# cross-entropy. The other is a focal loss (Lin et al. 2017, [arXiv 1708.02002](https://arxiv.org/abs/1708.02002)): it
# multiplies the loss of an example by $(1 - p)^2$, where $p$ is the probability of the right class. Its author computed
# that factor in NumPy.

# %%
some, some_y, tests = x[:300].double(), y[:300], (x_test[:1].double(), y_test[:1])
short = magic.batches(300, size=50, epochs=5, seed=0).to(device)
torch.manual_seed(0)
small = models.MLP((64, 16, 10)).double().to(device)


def focal_by_numpy(model, x, y):
    losses = loss(model, x, y)
    p = torch.exp(-losses).detach().cpu().numpy()
    return losses * torch.as_tensor((1 - p) ** 2, device=x.device)


def output(model):
    return loss(model, *tests)


def run_with(objective):
    sgd = torch.optim.SGD(small.parameters(), lr=0.3)
    return magic.Run(small, sgd, (some, some_y), objective, short)


dice = torch.Generator().manual_seed(0)
direction = torch.randn(300, dtype=torch.float64, generator=dice).to(device)


# %%
def by_differences(objective, epsilon=1e-4):
    run, found = run_with(objective), []
    for sign in (1, -1):
        weights = run.weights() + sign * epsilon * direction
        found.append(output(run.model(run.train(weights, progress=False))).item())
    return (found[0] - found[1]) / (2 * epsilon)


def by_unroll(objective):
    weights = torch.ones(300, dtype=torch.float64, device=device, requires_grad=True)
    params = {name: p.detach().requires_grad_() for name, p in small.named_parameters()}
    for batch in short:
        network = lambda x, p=params: functional_call(small, p, (x,))  # noqa: E731
        total = (weights[batch] * objective(network, some[batch], some_y[batch])).mean()
        gradient = torch.autograd.grad(total, list(params.values()), create_graph=True)
        named = zip(params.items(), gradient, strict=True)
        params = {name: p - 0.3 * g for (name, p), g in named}
    last = output(lambda x: functional_call(small, params, (x,))).sum()
    return (torch.autograd.grad(last, weights)[0] @ direction).item()


def by_replay(objective):
    run = run_with(objective)
    return (unchecked(run, output, all_states(run))[0] @ direction).item()


# %%
ways = {"finite differences": by_differences, "full unroll": by_unroll, "replay": by_replay}
losses = {"cross-entropy": loss, "focal loss by NumPy": focal_by_numpy}
slopes = pd.DataFrame(
    {
        name: {way: slope(objective) for way, slope in ways.items()}
        for name, objective in losses.items()
    }
)

# %% tags=["nbval-ignore-output"]
slopes.round(6)


# %%
def gap(name, one, other):
    return abs(slopes[name][one] / slopes[name][other] - 1)


for name in losses:
    distance = gap(name, "replay", "full unroll")
    claim(f"{name}: replay and unroll differ, relative, by", distance, at_most=1e-9)
distance = gap("cross-entropy", "replay", "finite differences")
claim("cross-entropy: replay and finite differences, by", distance, at_most=1e-6)
distance = gap("focal loss by NumPy", "replay", "finite differences")
claim("focal loss by NumPy: replay and finite differences, by", distance, at_least=0.5)

# %% [markdown]
# For cross-entropy all three agree. For the focal loss the unroll and the replay agree to nine digits *and are both wrong*: their slopes are nearly twice what they should be.
# The factor $(1 - p)^2$ moves when the parameters move, but autograd never saw it, and both ask autograd.
# Agreement counts as evidence only between witnesses that can fail separately. Finite differences know nothing of
# autograd, so they are the ones to ask.
#
# Asking them about every score would take $2n$ trainings. `magic` asks less, in two ways.
#
# - **In every replay**, it takes four derivatives alone: the measure, the last step, and two steps on the way. It recomputes each
#   in `float64` along a random direction, and compares it with a finite difference of the step itself. That
#   costs a few steps, however long the run, and it finds the focal loss at once.
# - **On request**, `magic.verify` compares the whole result with trainings at $w \pm \varepsilon v$, for three or more
#   sizes of $\varepsilon$. That costs six to ten trainings. Where the differences are too unsteady to judge by, as they may be in
#   `float32`, it says so: its `ok` is then `None`.

# %%
said = complaint(
    magic.NotDifferentiable,
    lambda: magic.attribute(run_with(focal_by_numpy), output, progress=False),
)
claim("the focal loss by NumPy is refused", "behind autograd's back" in said)
differences = list(scores.health.witnessed.values())
claim("four derivatives were compared in section 1's last replay", len(differences) == 4)
claim("the largest relative difference among them", max(differences), at_most=1e-5)
verified = magic.verify(magic.attribute(run_with(loss), output, progress=False), progress=False)
distance = (verified.predicted / verified.true - 1).abs().max()
claim("verify, cross-entropy: scores and trainings differ, relative, by", distance, at_most=1e-5)
claim("and its verdict is that they agree", verified.ok)

# %% [markdown]
# A finite difference has faults of its own, and exercise 07.2 is about them: if $\varepsilon$ is large, curvature spoils it, if
# $\varepsilon$ is small, rounding does, and a direction may miss an error that is orthogonal to it.
#
# ## 5 · Does the result carry enough digits?
#
# One thing no comparison can find: a chain of exact states and exact pulls whose result is useless. On the way back a
# cotangent may grow or shrink. If its size has a **range** of many powers of ten, examples of some steps count as nothing
# beside those of others, a small change at an early step is amplified by all later ones, and `float32`, with its seven
# digits, cannot hold both ends. So a replay notes the size of each cotangent as it goes. We train one network at three rates.

# %%
sizes, ranges, accuracy = {}, {}, {}
for rate in (0.05, 0.3, 0.5):
    torch.manual_seed(0)
    net = models.MLP((64, 64, 64, 10)).to(device)
    sgd = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    trained_at = magic.Run(net, sgd, (x, y), loss, order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # magic warns of the last one
        health = magic.attribute(trained_at, measure, progress=False).health
    sizes[rate] = [(t, norms[0]) for t, norms in health.sizes]
    ranges[rate] = health.decades[0]
    found = trained_at.model(trained_at.train(progress=False))(x_test).argmax(1)
    accuracy[rate] = (found == y_test).double().mean().item()

claim("powers of ten at rate 0.05", ranges[0.05], at_most=1)
claim("at rate 0.3", ranges[0.3], at_least=2, at_most=4.5)
claim("at rate 0.5", ranges[0.5], at_least=6)
gain = accuracy[0.3] - accuracy[0.05]
claim("share of test images read right at rate 0.3, less that at 0.05", gain, at_least=0)

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5.6, 3.6))[1]
colors = [plot.HELPFUL, plot.NEUTRAL, plot.HARMFUL]
for (rate, points), style, color in zip(sizes.items(), ("-", "--", ":"), colors, strict=True):
    label = f"rate {rate}: {accuracy[rate]:.0%} right"
    ax.plot(*zip(*points, strict=True), style, color=color, linewidth=2, label=label)
ax.set(yscale="log", xlabel="training step t", ylabel="size of the cotangent at $s_t$")
ax.set(title="First test image, network at three rates")
ax.legend(fontsize=10);

# %% [markdown]
# Read the lines from right to left, as the cotangent travels. At rate 0.05 its size hardly changes. At 0.3 the network is at
# least as accurate, but the cotangent grows about a thousandfold: nothing in the accuracy warns of it. At 0.5 the training
# has failed, and a change at the first step is amplified more than a million times. `scores.health` holds these sizes,
# and `magic` warns when the range exceeds six powers of ten. Each pull is still right to within rounding, though at rate 0.5 these roundings are amplified like everything else, but it is the
# slope of a very jagged function. Whether a slope *predicts* is the question of
# [chapter 08](08_is_the_derivative_useful.ipynb).
#
# ## 6 · What one pull costs
#
# The checks are cheap, then, and the schedule is settled. What remains is the pull itself. We count matrix products,
# which make up nearly all the work, in units of one forward pass. In a linear layer with input $a$, output $z = W a$ and
# $\delta = \partial L / \partial z$ there are
#
# - one in the forward pass: $W a$;
# - two in the backward pass: $W^\top \delta$, to go on, and the gradient $\delta a^\top$;
# - six when a cotangent $V$ of that gradient is pulled through both passes. Each of the three products has two factors, and
#   the derivative with respect to each factor is one product.
#
# So a training step costs three forward passes, its trace the same three, and the pull of one cotangent six. (The first
# layer needs fewer, since nobody wants the derivative with respect to its input: with $\ell$ equal layers the counts are $3 -
# 1/\ell$ and $6 - 4/\ell$.) PyTorch can count, and asks no clock.

# %%
deep = models.MLP((256,) * 9).to(device)  # eight equal layers
inputs = torch.randn(64, 256, device=device)
labels = torch.randint(256, (64,), device=device)
leaves = [*deep.parameters()]
along = [torch.randn_like(p) for p in leaves]


def products(work):
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


forward, losses = products(lambda: loss(deep, inputs, labels))
backward, gradient = products(
    lambda: torch.autograd.grad(losses.mean(), leaves, create_graph=True)
)
pull, _ = products(lambda: torch.autograd.grad(gradient, leaves, along))
print(f"a step {(forward + backward) / forward}, a pull {pull / forward} forward passes")
claim("a step takes 3 − 1/8 forward passes", (forward + backward) / forward == 3 - 1 / 8)
claim("a pull takes 6 − 4/8 forward passes", pull / forward == 6 - 4 / 8)

# %% [markdown]
# Hence the price of a metagradient, in plain trainings. Each step is done (3), traced (3) and pulled for each of $K$
# targets ($6K$), against 3 in the plain loop: $2 + 2K$ trainings, and more if steps are repeated. If every trace is kept, the trace *is* the
# training's step, and $1 + 2K$ remain: three trainings for one target, and for many targets two trainings each.
#
# Is that the floor? Nearly. Of the nine products of trace and pull, one is the gradient $\delta a^\top$ itself, which plain
# SGD's pull does not need. An implementation by hand gets by with **eight forward passes to a step's three**, for a step
# whose state is given. Adam's pull reads the gradient, and so does whoever trains with the trace.
#
# Measured times come close to these counts for large matrices. For small networks the bookkeeping of autograd
# dominates. The [appendix on costs](appendix_costs.md) has measurements, also of other ways to nest the two derivatives and of
# optimisations that did not pay.
#
# ## 7 · When may you believe it?
#
# | doubt | evidence | cost |
# |---|---|---|
# | a state is not the training's | fingerprints at sixteen steps, the total loss at every step | under 1 % |
# | a stored state was damaged | fingerprint of each stored tensor, compared at each load | one pass over it |
# | autograd does not see all that a step does | finite differences of three steps and of the measure, in `float64` | a few steps |
# | anything else on the way back | `magic.verify`: the whole gradient along one random direction | 6 to 10 trainings |
# | the numbers have no digits left | the range of each cotangent's size | nothing |
# | the derivative is right and useless | retraining without the examples (chapter 08) | a training each |
#
# You may believe the gradient when each line has been asked by something that could have said no. The first three and
# the fifth are asked in every replay, and a replay that fails one of the first three raises an error rather than
# returning a number. The fourth is worth its ten trainings before you publish. None of them answers the last.
#
# ## What we claim
#
# - A budget in bytes is kept, and an interrupted replay resumes to the same bits.
# - A wrong gradient can look right: one per cent of brightness turned ours by more than fifty degrees. Comparing bits with the
#   training's record finds it.
# - Two methods that share autograd share its blind spots. Finite differences do not.
# - One pull costs six forward passes beside the three of its trace.
#
# ## What we ignored
#
# - **A direction is a sample.** One random direction finds an error with probability one in theory, and in practice only if the
#   error is large along it.
# - **Checks of the checker.** The fingerprint is a sum: it misses two bits that flip in opposite directions in
#   the same position. Such things do not happen by accident; it is no protection against malice.
# - **Traces in pieces.** Activation checkpointing does to the layers of one step what chapter 06 did to the steps. A model
#   that uses it may, and its traces then take less room.
#
# ## Exercises
#
# Solutions are in [solutions/07](solutions/07_a_replay_to_trust.ipynb).

# %% [markdown]
# **07.1** ●○○ (10 min) A budget of `budget` bytes has to hold one trace, and states of `state` bytes each, $s_0$ among them. Write
# `extra_steps(T, budget, state, trace)`: how many extra steps does the best schedule of chapter 06 take for a run of
# $T$ steps? Return `None` if the budget is too small for any schedule.
#
# <details><summary>Hint</summary>How many states fit beside the trace? More than T are of no use. Chapter 06 has A(T, c) in closed
# form; of these steps the training advances T − 1.</details>


# %%
def extra_steps(T, budget, state, trace):
    """Extra steps of the optimum with as many states as fit beside one trace; None if none fits."""
    ...


# from magic.book import check
# check("07.1", extra_steps)

# %% [markdown]
# **07.2** ●●○ (20 min) Write a witness: `agrees(phi, gradient, w)` is `True` if `gradient`, a tensor, is the gradient of the function
# `phi` at `w`, in `float64`, to about four digits, and `False` if not. It may call `phi` a dozen times, so it cannot go
# through all entries. The checker hands it right gradients, some of strongly curved functions, and gradients with planted errors.
#
# <details><summary>Hint</summary>A central difference along a random direction. Which ε makes both the curvature's error, about ε²,
# and the rounding's, about 1e-16 / ε, small? Two or three directions are better than one, and a direction that is the
# same in every call can be fooled.</details>


# %%
def agrees(phi, gradient, w):
    """Is `gradient` the gradient of phi at w? phi: tensor (n,) -> float."""
    ...


# check("07.2", agrees)

# %% [markdown]
# **07.3** ●●○ (10 min) Write `fingerprint(x)`: an `int` that changes whenever a single bit of the `float32` tensor `x` is
# flipped, and is the same for equal bits.
#
# <details><summary>Hint</summary>A sum of floats loses small changes, and −0.0 equals 0.0. <code>x.view(torch.int32)</code> shows the same bits
# as integers. A sum of integers overflows: in 64 bits there is room.</details>


# %%
def fingerprint(x):
    """An int that no single flipped bit of x leaves as it was."""
    ...


# check("07.3", fingerprint)

# %% [markdown]
# **07.4** ●●○ (15 min, without a checker) A colleague reports: "All checks pass and `verify` agrees to five digits, but the predicted
# effect of removing half of the data is far off." Which lines of section 7's table can you exclude as the cause, and what
# do you suggest to measure?
#
# <details><summary>Hint</summary>Is half of the data a small step from w = 1? Which line was not asked?</details>
#
# **07.9 · Capstone** ●●● (an evening) Rebuild REPLAY, all of it, in about 60 lines, without importing `magic`. Write
# `replay(run, phi, slots)`, which returns the scores $\partial \varphi / \partial w_i$, a tensor of shape $(n,)$.
#
# `run` is a small training with these fields:
#
# | field | |
# |---|---|
# | `run.losses(theta, rows)` | the losses $\ell_i(\theta)$, `(B,)`, of the examples `rows`, a tensor of indices; smooth in `theta` |
# | `run.theta` | $\theta_0$, `(P,)`, `float64`. The momentum buffer starts at zero |
# | `run.weights` | the data weights $w$, `(n,)`; not all are 1 |
# | `run.order` | `(T, B)`: row $t$ has the examples of batch $t$. An example may occur twice, even in one batch |
# | `run.rate`, `run.mu` | $\eta$ and $\mu$ |
#
# Step $t$ is chapter 04's SGD with momentum, for the batch's weighted loss with a fixed $1/B$:
#
# $$g = \nabla_\theta \frac1B \sum_{i \in \text{batch}_t} w_i\, \ell_i(\theta), \qquad m' = \mu m + g, \qquad
#   \theta' = \theta - \eta m' .$$
#
# `phi(theta)` is the output, a scalar tensor, to be taken at $\theta_T$. Three rules are checked along with the scores.
#
# 1. **Memory.** Beside the state in work, at most `slots` states are kept at any moment, $s_0$ among them.
# 2. **Time.** A step calls `run.losses` once and so does a pull. With $A(T, c)$ from chapter 06 and $c$ = `slots`, `run.losses` is
#    called at most $A(T, c) + T + 1$ times in all.
# 3. **Care.** Nothing that you are given is changed in place, and every state at which `run.losses` is called is one of the
#    training's, with the batch that belongs to it.
#
# To try it, `from magic.book.exercises.small_run import small_run`, and `run = small_run(steps=12)`. Then
# `run.phi` is an output.
#
# <details><summary>Hint: where to begin</summary>Write <code>gradient</code>, <code>step</code> and <code>pull</code> first, and check them on a run of one step and of
# two (chapter 04, section 4). Then a schedule (exercise 06.3). Then the loop of chapter 06, section 2.</details>
#
# <details><summary>Hint: the count</summary>The training advances T steps, since φ is taken at the end; the optimum's A(T, c) counts T − 1
# of these. The T pulls come on top.</details>


# %%
def replay(run, phi, slots):
    """∂φ/∂w, (n,), from at most `slots` kept states."""
    ...


# check("07.9", replay)

# %% [markdown]
# **Next:** [08 · Is the derivative useful?](08_is_the_derivative_useful.ipynb)
