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
# **Question.** Press *train* twice. Do you get the same model? And if you do not, what does "the effect of removing
# an example" even mean?
#
# "What would *this* model have predicted without image 42?" compares two trainings that differ in one thing. If they
# also differ in ten others, the effect of that one thing cannot be seen. So before we differentiate anything, training
# has to be repeatable: the same data in, the same model out, to the last bit.
#
# | word | in code | meaning |
# |---|---|---|
# | fingerprint | `magic.fingerprint(model)` | 16 hex digits, computed from every bit of a model |
# | smooth, rough | | a training in which small changes stay small, or grow into another model |
# | run | `magic.Run` | a training with everything fixed but the data weights |
# | data weight $w_i$ | `weights` | how much example $i$ counts: 1 = present, 0 = removed |
#
# We look for what makes two runs differ, remove the causes one by one, and measure how far apart they drive two
# models. About twenty minutes to read; half a minute to run.

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
# ## 1 · An ordinary training loop
#
# Three things in this loop are random: the parameters at the start, the order of the examples, and the units that
# dropout switches off. Each has a seed. With `None` in place of a seed, the random numbers start anywhere, as they
# do in a loop without seeds.


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
# We train it twice with all seeds set, and twice for each of the three causes with that one left to chance. Then we
# compare what a computer sees, the bits of the parameters, and what a user sees, the predictions.


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
moved = table["largest change of a probability"]
claim("with every seed set, two runs give the same bits", table["same bits"].iloc[0])
least = moved.iloc[1:].min()
claim("any of the three, left to chance, moves a probability by", least, at_least=0.01)

# %% [markdown]
# So three seeds, and we are done? On one machine, in one process, with these operations, we are. In general we are not.
#
# ## 2 · The order of a sum
#
# Floating-point addition rounds after each step, so it is not associative: the same numbers, added in another
# **order**, give another result. Three numbers are enough:

# %%
a, b, c = (torch.tensor(v) for v in (1e8, -1e8, 1.0))
print("(a + b) + c =", ((a + b) + c).item())
print("a + (b + c) =", (a + (b + c)).item())

# %% [markdown]
# A matrix product consists of very many sums. How they are divided depends on the number of threads, and on the
# algorithm that a library chooses; cuDNN may try several and take the one that was fastest *this time*. Where
# several threads add into the same place, the order depends on thread timing, which nobody controls. Numbers of similar size
# do less harm than our three, but some. Here are ten thousand, added from front to back and from back to front:

# %%
many = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
forward = backward = torch.zeros(())
for i in range(len(many)):
    forward, backward = forward + many[i], backward + many[-1 - i]
difference = abs(forward / backward - 1).item()
claim("relative difference of the two sums", difference, at_least=1e-8, at_most=1e-4)

# %% [markdown]
# ## 3 · One bit, some hundred steps later
#
# Does the last bit matter? We change one: a single parameter, at the start, becomes the next larger floating-point
# number. (It belongs to a pixel in the middle of the image; those on the border are always blank.) Then we train both
# networks side by side, once at a small rate and once at a large one, and watch the distance between them.


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
    for batch in magic.batches(len(x), size=100, epochs=epochs):
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

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5.6, 3.4))[1]
for (rate, distances), dashes in zip(gap.items(), ("-", "--"), strict=True):
    ax.plot(distances, dashes, label=f"rate {rate}")
ax.set(yscale="log", xlabel="step", ylabel="distance of the parameters")
ax.set_title("Two runs that began one bit apart")
ax.legend(fontsize=9);

# %%
worst = min(right for _, right in found.values())
claim("share of test images read right by each of the four networks", worst, at_least=0.95)
claim("distance after 360 steps at rate 0.01", gap[0.01][-1], at_most=1e-4)
claim("distance after 360 steps at rate 0.3", gap[0.3][-1], at_least=1)

# %% [markdown]
# Both trainings work, and by accuracy nobody could tell them apart. Call the first one **smooth**: a small change of
# what goes in makes a small change of what comes out. The second is **rough**: it amplifies one bit into a different
# model. Removing an example is a small change, too, and is amplified as strongly. A rough training does have a derivative,
# but it holds only for changes too small to be of interest. Chapter 00 chose a smooth training, and
# [chapter 08](08_is_the_derivative_useful.ipynb) measures the difference.
#
# ## 4 · Fixing the arithmetic
#
# `magic.determinism.fix` switches PyTorch to deterministic algorithms in one call, prints what it changed, and puts
# everything back at the end. An operation that PyTorch cannot make deterministic then raises an error that names it.

# %% tags=["nbval-ignore-output"]
before = torch.are_deterministic_algorithms_enabled(), magic.fingerprint(torch.get_rng_state())
with magic.determinism.fix(seed=0) as settings:
    print(settings)

# %%
after = torch.are_deterministic_algorithms_enabled(), magic.fingerprint(torch.get_rng_state())
claim("afterwards PyTorch's switch and its random numbers are where they were", before == after)

# %% [markdown]
# The number of threads is only *recorded*. It is yours to choose, and it changes the bits, so fingerprints can be compared
# only between runs with the same number.
#
# ## 5 · A run
#
# `magic.Run` takes a model, an optimizer, the data, a loss and the order of the batches, and makes a training that can be
# repeated. With one more idea it can also be repeated *from the middle*: **randomness is computed, not remembered.** A loop with one
# seed at the start would have to draw the random numbers of 136 steps before it could do step 137 again. Here the random
# numbers of step $t$ are seeded from the pair $(\text{seed}, t)$, and are the same whenever that step is done.
#
# What a training carries from step to step, and how it becomes a function one can differentiate, is the
# subject of the next chapter. Here we only ask whether the promise is kept.


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


torch.manual_seed(0)
model = torch.nn.Sequential(
    models.MLP((64, 128)), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(128, 10)
).to(device)
order = magic.batches(len(x), size=100, epochs=5)
run = magic.Run(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    data=(x, y),
    loss=loss,
    batches=order,
    seed=7,
)
first, second = run.train(progress=False), run.train(progress=False)
claim("the same run twice: the same bits", first.fingerprint() == second.fingerprint())

# %% [markdown]
# Is it still *your* training, and not one that `magic` likes better? Here is the plain loop, with dropout seeded in the same way.
# (`foreach=False` matters on CUDA only, where PyTorch's optimizers otherwise choose fused kernels with other bits.)

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
# The *same bits*, in every parameter. Repeatable does not mean insensitive. The one thing that we leave open is the data
# weights, 1 for each example unless we say otherwise, and the run reacts to the smallest change of them. Let one
# example count a millionth less:

# %%
weights = run.weights()
weights[42] -= 1e-6
nearly = run.train(weights, progress=False)
pairs = zip(nearly.params.values(), first.params.values(), strict=True)
largest = max((p - q).abs().max().item() for p, q in pairs)
claim("largest change of a parameter", largest, at_least=1e-9, at_most=1e-2)

# %% [markdown]
# ## 6 · Why the question needs a single model
#
# Now we can say what a *single model* is: what training makes of the data weights $w$ when everything else is fixed. We write
# it $f(w)$. The alternative is "models like this one", an average over seeds; but the effect of a few examples is
# small beside the differences between seeds. How small? We train eight models that differ only in their start. Then we train
# the first of them again without 1 % of the data, everything else being equal. For forty test images we compare
# the standard deviation of the loss over the eight starts with the size of its change without the 1 %.


# %%
def run_with(start):
    torch.manual_seed(start)
    model = models.MLP((64, 128, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return magic.Run(model, optimizer, (x, y), loss, magic.batches(len(x), size=100, epochs=10))


def test_losses(run, state):
    return loss(run.model(state), x_test[:40], y_test[:40]).detach()


runs = [run_with(start) for start in range(8)]
by_seed = torch.stack([test_losses(r, r.train(progress=False)) for r in runs])
same = runs[0]
without = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:12]
effect = test_losses(same, magic.retrain(same, without=without, progress=False)) - by_seed[0]

# %% tags=["nbval-ignore-output", "hide-input"]
scale = {"std over\n8 starts": by_seed.std(0), "|change|\nwithout 1 %": effect.abs()}
frame = pd.DataFrame({name: value.cpu() for name, value in scale.items()}).melt(
    var_name="", value_name="test loss, one dot per image"
)
ax = plt.subplots(figsize=(5.6, 2.6))[1]
sns.stripplot(
    frame, x="test loss, one dot per image", y="", hue="", palette="colorblind", size=4, ax=ax
)
ax.set(xscale="log", title="What the seed does, and what the data do");

# %%
ratio = (by_seed.std(0).median() / effect.abs().median()).item()
claim("median effect of the start over that of 1 % of the data", ratio, at_least=8)
again = test_losses(same, magic.retrain(same, without=without, progress=False)) - by_seed[0]
agree("effect of removing 1 %, twice", again, effect)

# %% [markdown]
# Across seeds the effect is lost in the noise, unless one averages over very many trainings. Within one run
# there is no noise: the effect is a definite number, the same each time. That is what makes it computable.
#
# ## What we claim
#
# - Seeds alone do not make training repeatable; the order of every sum has to be fixed as well.
# - One changed bit can stay one bit or become another model. Which of the two happens depends on the training recipe.
# - A run with its seeds, its order and its arithmetic fixed gives the same bits each time, those of the plain loop. What
#   it makes of the data weights is a single model, $f(w)$.
#
# ## What we ignored
#
# - **Other machines.** Bits change with the processor, the number of threads and the version of PyTorch. `fix` reports the
#   last two, and `magic` compares fingerprints only within one process. What the chapters *claim* does not depend on the
#   bits of one machine.
# - **Data that change.** A `Dataset` whose items use random numbers other than torch's cannot be repeated;
#   `magic.Run` tries its first step more than once and says so.
# - **Speed.** Deterministic kernels can be slower on CUDA. We did not measure by how much.
#
# ## Exercises
#
# **01.1** ●○○ (5 min) *Threads.* Sum ten million random numbers with one thread and with two (`torch.set_num_threads`). Then
# train a new `Run` of the network above with each. Does a sum depend on the number of threads? Does the fingerprint?
#
# <details><summary>Hint</summary>Work can be divided among threads in two ways: each thread takes some of the *sums*, or
# each takes some of the *terms* of one sum. Which of the two changes bits?</details>
#
# **01.2** ●○○ (10 min) *Dropout that can be done again.* Write dropout as a function of the pair (seed, step): it drops each entry of
# `x` with probability `p`, divides what stays by $1 - p$, and drops the same entries whenever it is called with
# the same pair. Leave torch's global generator as it was.
#
# <details><summary>Hint</summary>`seeded` in section 1 makes a generator of its own, and `torch.rand` takes one. How can two
# integers become one seed without (3, 5) and (4, 4) becoming the same?</details>


# %%
def step_dropout(x, p, seed, t):
    """x with a share p of its entries 0 and the others divided by 1 − p."""
    ...


# from magic.book import check
# check("01.2", step_dropout)

# %% [markdown]
# **01.3** ●●○ (15 min) *From smooth to rough.* At which rate, to a factor of two, does the smooth picture of section 3
# turn into the rough one? Does momentum move it?
#
# <details><summary>Hint</summary>Halve the interval from 0.01 to 0.3 on a log scale, and say first what counts
# as rough.</details>
#
# **01.4** ●●○ (10 min) *Where did they part?* Two runs should have been the same and are not. `same(t)` says whether their states
# after $t$ steps are equal, which is costly, since both have to be trained up to there. States that differ once
# differ ever after. Find the first $t$ from 0 to `steps` at which they differ, or None, with as few calls as
# possible.
#
# <details><summary>Hint</summary>Keep one $t$ at which they are known to be equal and one at which they differ, and look in
# the middle.</details>


# %%
def first_difference(same, steps):
    """The first t in 0 … steps with not same(t), or None."""
    ...


# check("01.4", first_difference)

# %% [markdown]
# **01.5** ●●○ (10 min) *A hidden memory.* Write a model that is no function: an attribute counts its forward passes, and the
# output is scaled by the count. What does `magic.Run` say? Then make the count a buffer
# (`register_buffer`), and try again.
#
# <details><summary>Hint</summary>`magic.Run` tries the first step more than once, each time from the same state. A buffer is
# part of that state, an attribute is not.</details>
#
# **Next:** [02 · Training is a function](02_training_is_a_function.ipynb)
