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
# # 01 · The same run twice
#
# **Question.** Press *train* twice. Do you get the same model? And if not: what does "the effect of removing
# an example" even mean?
#
# "What would *this* model have predicted without image 42" compares two trainings that differ in one thing.
# If they also differ in ten others, the answer drowns. So before anything is differentiated, training has to
# become a **function**: same weights in, same model out, to the last bit.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State` | everything training carries from one step to the next |
# | step $h_t$ | `run.step` | $s_{t+1} = h_t(s_t, \text{batch}_t, w)$, and nothing else is read |
# | fingerprint | `state.fingerprint()` | 16 hex digits of every bit of a state |
#
# You will see what makes two runs differ, take the causes away one by one, and measure how far apart they drive
# two models.
# About fifteen minutes to read, one to run.

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()
x, y, x_test, y_test = (part.to(device) for part in data.digits())

# %% [markdown]
# ## 1 · A loop that everybody writes
#
# Three things in it are random: where the parameters start, in which order the examples come, and which
# units dropout switches off. Each has a seed here; `None` means "whatever the generator happens to be at",
# which is what a loop without seeds does.


# %%
def seeded(seed):
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def plain_training(start=0, order=0, drop=0, epochs=10, rate=0.1):
    torch.manual_seed(seeded(start).initial_seed())
    model = torch.nn.Sequential(
        models.MLP((64, 128)), torch.nn.GELU(), torch.nn.Dropout(0.2), models.MLP((128, 10))
    )
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    shuffle = seeded(order)
    torch.manual_seed(seeded(drop).initial_seed())
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=shuffle).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


# %% [markdown]
# Now train it twice, with one of the three left to chance each time, and see how much of the model survives.
# We look at the parameters' bits, and at what a user sees: the predictions.


# %%
def answers(model):
    return model(x_test).detach().softmax(1)


def differences(**chance):
    a, b = plain_training(**chance), plain_training(**chance)
    p, q = answers(a), answers(b)
    return {
        "same bits": magic.fingerprint(a) == magic.fingerprint(b),
        "other answers": (p.argmax(1) != q.argmax(1)).sum().item(),
        "largest change of a probability": (p - q).abs().max().item(),
    }


causes = {
    "nothing": {},
    "the start": {"start": None},
    "the order": {"order": None},
    "dropout": {"drop": None},
}
with magic.determinism.fix():
    table = pd.DataFrame(
        {f"{name} left to chance": differences(**chance) for name, chance in causes.items()}
    ).T

# %% tags=["nbval-ignore-output"]
table

# %%
claim("with every seed set, two runs give the same bits", table["same bits"].iloc[0])
claim("each of the three, left to chance, changes the model", not table["same bits"].iloc[1:].any())
claim("and what it says", (table["largest change of a probability"].iloc[1:] > 0.01).all())

# %% [markdown]
# Three seeds, then, and we are done? On one machine, in one process, with these operations: yes. It does not
# stay so.
#
# ## 2 · Sums have an order
#
# Floating-point addition rounds after each step, so it is not associative. Whoever changes the **order** of a
# sum changes its last bits:

# %%
a, b, c = (torch.tensor(v) for v in (1e8, -1e8, 1.0))
print("(a + b) + c =", ((a + b) + c).item())
print("a + (b + c) =", (a + (b + c)).item())
claim("the same three numbers, two sums", (a + b) + c != a + (b + c))

# %% [markdown]
# A matrix product is a great many sums. How they are cut up depends on the number of threads, on the kernel a
# library picks (cuDNN tries several and takes the fastest *this time*), and, where threads add into one place
# as they finish, on nothing one could name. Here is one sum, of numbers that are all of a size, in two orders:

# %%
many = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
forward = backward = torch.zeros(())
for i in range(len(many)):
    forward, backward = forward + many[i], backward + many[-1 - i]
claim("front to back and back to front differ", forward != backward)
claim("by less than a thousandth", abs(forward / backward - 1) < 1e-3)

# %% [markdown]
# ## 3 · One bit, some hundred steps later
#
# Does the last bit matter? Let us change one: a single parameter, at the start, to the next floating-point
# number (one that reads a pixel in the middle; those on the border are always blank). Then train both on, side
# by side, once at a small rate and once at a large one, and watch the distance between them.


# %%
def distance_after_one_bit(rate, epochs=30):
    torch.manual_seed(0)
    one = models.MLP((64, 128, 128, 10)).to(device)
    two = copy.deepcopy(one)
    with torch.no_grad():
        weight = two[1].weight[0, 30]
        weight.copy_(torch.nextafter(weight, weight + 1))
    both = [torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9) for net in (one, two)]
    distances = []
    for batch in magic.batches(len(x), 100, epochs):
        for model, optimizer in zip((one, two), both, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        gaps = [(p - q).square().sum() for p, q in pairs]
        distances.append(sum(gaps).sqrt().item())
    right = [(net(x_test).argmax(1) == y_test).float().mean().item() for net in (one, two)]
    return distances, min(right)


with magic.determinism.fix():
    found = {rate: distance_after_one_bit(rate) for rate in (0.01, 0.3)}
gap = {rate: distances for rate, (distances, _) in found.items()}

# %% tags=["nbval-ignore-output"]
frame = (
    pd.DataFrame(gap)
    .rename_axis("step")
    .melt(ignore_index=False, var_name="rate", value_name="distance")
)
ax = plt.subplots(figsize=(6, 3.4))[1]
sns.lineplot(
    frame.reset_index(),
    x="step",
    y="distance",
    hue="rate",
    palette="colorblind",
    errorbar=None,
    ax=ax,
)
ax.set(yscale="log", title="Two runs that began one bit apart", ylabel="distance of the parameters")
print({rate: f"at least {worse:.1%} right" for rate, (_, worse) in found.items()})

# %%
claim(
    "all four networks read at least 90 % of the test images right",
    min(a for _, a in found.values()) >= 0.9,
)
claim("at rate .01 the two stay within a thousandth", gap[0.01][-1] < 1e-3)
claim("at rate .3 they end a thousand times further apart", gap[0.3][-1] > 1000 * gap[0.01][-1])

# %% [markdown]
# Both trainings work, and by accuracy alone nobody would know which is which. Call the first one **smooth**: what
# goes in a little different comes out a little different. The second is **rough**: it magnifies a bit into
# another model. The removal of an example is a small change, too, and is magnified as strongly; a rough training
# has a derivative, but one that holds for changes too small to be of interest. Chapter 00 chose a smooth one, and
# a later chapter measures the difference.
#
# ## 4 · Fixing it
#
# `magic.determinism.fix` sets, in one call, what PyTorch lets one set, says what it did, and puts it back.
# An operation that PyTorch cannot make deterministic then raises, by name, instead of quietly differing.

# %% tags=["nbval-ignore-output"]
before = torch.are_deterministic_algorithms_enabled(), magic.fingerprint(torch.get_rng_state())
with magic.determinism.fix(seed=0) as settings:
    print(settings)

# %%
after = torch.are_deterministic_algorithms_enabled(), magic.fingerprint(torch.get_rng_state())
claim("afterwards PyTorch's switch and its random numbers are where they were", before == after)

# %% [markdown]
# The thread count is only *recorded*: it is yours to choose, and it changes the bits. Fingerprints are compared
# between runs that share it.
#
# ## 5 · A run is a function
#
# `magic.Run` puts the pieces together. Two ideas make it a function.
#
# - **Nothing is hidden.** The state holds parameters, BatchNorm's statistics, the optimizer's memory and the
#   step index; a step reads the state, its batch and the weights, and returns a new state.
# - **Randomness is computed, not remembered.** Dropout in step $t$ is seeded from $(\text{seed}, t)$. To do
#   step 137 again one needs $s_{137}$, and no generator's past.


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


torch.manual_seed(0)
model = torch.nn.Sequential(
    models.MLP((64, 128)), torch.nn.BatchNorm1d(128), torch.nn.GELU(), torch.nn.Dropout(0.2)
)
model = model.append(torch.nn.Linear(128, 10)).to(device)
order = magic.batches(len(x), size=100, epochs=5)
run = magic.Run(model, torch.optim.AdamW(model.parameters(), lr=1e-3), (x, y), loss, order, seed=7)
first, second = run.train(progress=False), run.train(progress=False)
claim("the same run twice: the same bits", first.fingerprint() == second.fingerprint())

# %% [markdown]
# Is it *your* loop, or one that `magic` likes better? Here is the plain one, with dropout seeded the same way.
# (On CUDA, PyTorch's optimizers choose fused kernels unless told `foreach=False`.)

# %%
plain = copy.deepcopy(model)
optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, foreach=False)
with magic.determinism.fix():
    for t, batch in enumerate(order):
        magic.determinism.seed_step(7, t)
        optimizer.zero_grad()
        loss(plain, x[batch], y[batch]).mean().backward()
        optimizer.step()

for name, tensor in run.model(first).state_dict().items():
    agree(name, tensor, plain.state_dict()[name])

# %% [markdown]
# *Same bits*, down to BatchNorm's running variance. Going back to any state and on from there gives them, too:

# %%
weights = run.weights()
state = run.initial
for _ in range(17):
    state = run.step(state, weights)
kept = state
while state.step < run.steps:
    state = run.step(state, weights)
claim("17 steps, and on: the same end", state.fingerprint() == first.fingerprint())
state = kept
while state.step < run.steps:
    state = run.step(state, weights)
claim("back at step 17, and on again: the same end", state.fingerprint() == first.fingerprint())

# %% [markdown]
# And a fingerprint sees small things. One weight of one example, a millionth less:

# %%
weights[42] -= 1e-6
nearly = run.train(weights, progress=False)
claim("another fingerprint", nearly.fingerprint() != first.fingerprint())

# %% [markdown]
# ## 6 · Why the question needs a single model
#
# Now we can say what a *single model* is: the value $f(w)$ of a function, all of whose other inputs are fixed.
# Its alternative, "models like this one", is an average over seeds, and the effect of a few examples is small
# beside the spread of the seeds. How small? We train eight models that differ in the start alone, and one
# that lacks 1 % of the data and differs in nothing else, and look at the losses of forty test images: their
# standard deviation over the eight starts, and the size of their change without the 1 %.


# %%
def run_with(start):
    torch.manual_seed(start)
    model = models.MLP((64, 128, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return magic.Run(model, optimizer, (x, y), loss, magic.batches(len(x), 100, 10))


def test_losses(run, state):
    return loss(run.model(state), x_test[:40], y_test[:40]).detach()


runs = [run_with(start) for start in range(8)]
by_seed = torch.stack([test_losses(r, r.train(progress=False)) for r in runs])
same = runs[0]
without = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:12]
effect = test_losses(same, magic.retrain(same, without=without, progress=False)) - by_seed[0]

# %% tags=["nbval-ignore-output"]
scale = {"std over 8 starts": by_seed.std(0), "|change| without 1 %": effect.abs()}
frame = pd.DataFrame({name: value.cpu() for name, value in scale.items()}).melt(
    var_name="", value_name="test loss, one dot per image"
)
ax = plt.subplots(figsize=(6, 2.4))[1]
sns.stripplot(
    frame, x="test loss, one dot per image", y="", hue="", palette="colorblind", size=4, ax=ax
)
ax.set(xscale="log", title="What the seed does, and what the data does");

# %%
ratio = (by_seed.std(0).median() / effect.abs().median()).item()
claim(
    "the start alone moves a test loss at least three times as much as 1 % of the data", ratio > 3
)
again = test_losses(same, magic.retrain(same, without=without, progress=False)) - by_seed[0]
agree("effect of removing 1 %, twice", again, effect)

# %% [markdown]
# Across seeds the effect is lost in the noise, unless one averages over very many trainings. Within one run
# there is no noise at all: the effect is a number, the same each time, and so it can be computed.
#
# ## What we ignored
#
# - **Other machines.** Bits change with the processor, the thread count and PyTorch's version. `fix` reports the
#   last two, and `magic` compares fingerprints within one process only; what the chapters *claim* does not
#   depend on them.
# - **Data that changes.** A `Dataset` whose items use random numbers other than torch's cannot be replayed;
#   `magic.Run` tries its first step twice and says so.
# - **Speed.** Deterministic kernels can be slower on CUDA. We did not measure by how much.
#
# ## Exercises
#
# 1. ● (3 min) Set `torch.set_num_threads` to another number, make a new `Run` and train it. Same fingerprint? With the small
#    network here perhaps yes; with `models.MLP((64, 2048, 10))`?
#    <details><summary>Hint</summary>PyTorch splits a product over threads only when it is large.</details>
# 2. ●● (10 min) In section 3, at which rate does the smooth picture turn into the rough one? Find it to a factor
#    of two. <details><summary>Hint</summary>Bisect between .01 and .3. Does momentum move it?</details>
# 3. ●● (10 min) Write a model with a hidden memory that breaks the function: an attribute that counts its own
#    forward passes and scales the output. What does `magic.Run` say?
#    <details><summary>Hint</summary>The first step is tried twice.</details>
#
# **Next:** differentiating the function we now have.
