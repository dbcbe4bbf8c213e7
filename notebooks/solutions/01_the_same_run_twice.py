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
# # Solutions · 01 · The same run twice
#
# To the exercises of [chapter 01](../01_the_same_run_twice.ipynb). Try them first.

# %%
import copy

import torch
import torch.nn.functional as F

import magic
from magic.book import check, data, models
from magic.book.checks import claim

x, y, x_test, y_test = data.digits()


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


# %% [markdown]
# ## 01.1 · Threads
#
# Does a sum depend on the number of threads, and does the fingerprint of a run?
#
# If each thread takes some of the *terms*, the partial sums are added in another order than before, and the bits change. If each
# thread takes some of the *sums*, every sum stays whole and nothing changes. A long sum has to be divided in the first way. A
# matrix product can be divided in the second, and a small one is not divided at all, so a network may well have one
# fingerprint for both. There is no promise: it depends on the sizes, the library and the processor. So these
# cells are not compared between machines.


# %%
def fingerprint(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models.MLP((64, 128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = magic.batches(len(x), size=100, epochs=2)
    final = magic.Run(model, optimizer, (x, y), loss, batches).train(progress=False)
    torch.set_num_threads(before)
    return final.fingerprint()


def long_sum(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    numbers = torch.rand(10_000_000, generator=torch.Generator().manual_seed(0))
    total = numbers.sum().item()
    torch.set_num_threads(before)
    return total


# %% tags=["nbval-ignore-output"]
print("the sum with one thread and with two:", long_sum(threads=1), long_sum(threads=2))
same = fingerprint(threads=1) == fingerprint(threads=2)
print("one fingerprint for both" if same else "two fingerprints")

# %% [markdown]
# ## 01.2 · Dropout that can be done again
#
# Dropout as a function of the pair (seed, step).
#
# A generator of one's own leaves the global one alone. The pair becomes one seed by a multiplication with a number larger than
# any step, so that two pairs never meet. (`magic.determinism.seed_step` mixes the bits as well, since simple generators
# give related numbers for neighbouring seeds.)


# %%
def step_dropout(x, p, seed, t):
    generator = torch.Generator().manual_seed(1_000_003 * seed + t)
    stays = torch.rand(x.shape, generator=generator) >= p
    return x * stays / (1 - p)


check("01.2", step_dropout)

# %% [markdown]
# ## 01.3 · From smooth to rough
#
# At which rate does the smooth training turn into the rough one, and does momentum move it?
#
# We call a training rough when the two networks end a thousand times further apart than at rate 0.01. The search halves
# the interval on a log scale, until its ends are a factor of two apart. Without momentum the rate can be about ten times as large:
# momentum 0.9 adds up about ten gradients, so a step is effectively $\eta/(1-\mu)$ long.


# %%
def distance_after_one_bit(rate, momentum, epochs=15):
    torch.manual_seed(0)
    one = models.MLP((64, 128, 128, 10))
    two = copy.deepcopy(one)
    with torch.no_grad():
        weight = two[1].weight[0, 30]
        weight.copy_(torch.nextafter(weight, weight + 1))
    for net in (one, two):
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
        for batch in magic.batches(len(x), size=100, epochs=epochs):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return sum((p - q).square().sum() for p, q in pairs).sqrt().item()


# %%
def turning_point(momentum, low, high, rough):
    """The rate at which the distance passes `rough`, to a factor of two."""
    while high / low > 2:
        middle = (low * high) ** 0.5
        is_rough = distance_after_one_bit(middle, momentum) > rough
        low, high = (low, middle) if is_rough else (middle, high)
    return (low * high) ** 0.5


with magic.determinism.fix():
    rough = 1000 * distance_after_one_bit(0.01, momentum=0.9)
    with_momentum = turning_point(momentum=0.9, low=0.01, high=0.3, rough=rough)
    without = turning_point(momentum=0.0, low=0.1, high=3.0, rough=rough)

# %% tags=["nbval-ignore-output"]
print(f"with momentum 0.9 about {with_momentum:.2g}, without momentum about {without:.2g}")

# %%
ratio = without / with_momentum
claim("without momentum, the rate can be larger by a factor of", ratio, at_least=2)

# %% [markdown]
# ## 01.4 · Where did they part?
#
# The first of $T$ steps after which two runs differ, in about $\log_2 T$ looks.
#
# First the end: if the runs agree there, they never parted. Then keep an interval from a $t$ at which they agree (0, where both
# begin) to one at which they differ, and halve it. This is how one finds the operation that made a training differ: search for
# the step, then do the same inside the step, over the layers.


# %%
def first_difference(same, steps):
    if same(steps):
        return None
    agree, differ = 0, steps
    while differ - agree > 1:
        middle = (agree + differ) // 2
        if same(middle):
            agree = middle
        else:
            differ = middle
    return differ


check("01.4", first_difference)

# %% [markdown]
# ## 01.5 · A hidden memory
#
# A model that counts its forward passes in an attribute, and one that counts them in a buffer.
#
# `magic.Run` does its first step more than once, from the same state. The attribute has changed in between, so the step is
# no function of the state, and the run is refused with an error that names the attribute. A buffer is part of the
# state: it starts each try at zero and goes on from step to step, and the run is accepted.


# %%
class Counting(torch.nn.Module):
    def __init__(self, as_buffer):
        super().__init__()
        self.layers = models.MLP((64, 32, 10))
        if as_buffer:
            self.register_buffer("count", torch.zeros(()))
        else:
            self.count = 0

    def forward(self, x):
        self.count += 1
        return self.layers(x) * (1 + 0.01 * self.count)


def made(as_buffer):
    torch.manual_seed(0)
    model = Counting(as_buffer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return magic.Run(model, optimizer, (x, y), loss, magic.batches(len(x), size=100, epochs=2))


# %% tags=["nbval-ignore-output"]
try:
    made(as_buffer=False)
    refused = False
except Exception as error:
    refused = True
    print(type(error).__name__, error, sep=": ")

# %%
claim("the attribute is refused", refused)
run = made(as_buffer=True)
final = run.train(progress=False)
claim("the buffer is accepted, and has counted the steps", final.buffers["count"] == run.steps)
