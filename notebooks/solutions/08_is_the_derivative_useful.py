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
# # Solutions · 08 · Is the derivative useful?
#
# [The chapter](../08_is_the_derivative_useful.ipynb)

# %%
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import smoothness
from magic.book import check, data, models
from magic.book.checks import claim

torch.set_num_threads(1)

# %% [markdown]
# ## 08.1 · Metasmoothness of any three vectors
#
# *Write the formula of section 4 for three vectors, and apply it to the outputs in place of the parameters.*
#
# The first change sets the weights and the first signs; the second change starts where the first one ended.


# %%
def metasmoothness(start, once, twice):
    first, second = once - start, twice - once
    share = first.abs() / first.abs().sum()
    return (share * first.sign() * second.sign()).sum()


check("08.1", metasmoothness)

# %% [markdown]
# On outputs it needs no change. Three quarters of the movement goes on here, and a quarter turns back: 3/4 − 1/4.

# %%
outputs = torch.tensor([[1.0, 0.0], [1.3, 0.1], [1.4, 0.0]])
claim("metasmoothness of the outputs", metasmoothness(*outputs), at_least=0.499, at_most=0.501)

# %% [markdown]
# ## 08.2 · Two slopes
#
# *The trained θ of section 3, for very many kinks spread evenly over [0, 1]: which slope dθ/dw does autograd find,
# and which one holds?*
#
# Between two kinks the gradient of the twelve does not depend on θ. So each step adds η·w/2 to θ and, for
# autograd, nothing else that depends on $w$: after $T$ steps the slope is ηT/2.
#
# Across very many kinks the staircase is the line $g(\theta) = \theta$, and a step is
# $\theta' = (1-\eta)\,\theta + \eta w/2$. Summed from θ = 0 that is $\theta_T = \frac w2 (1 - (1-\eta)^T)$.


# %%
def two_slopes(rate, steps):
    return rate * steps / 2, (1 - (1 - rate) ** steps) / 2


check("08.2", two_slopes)
print("autograd {:.3f}, across many kinks {:.3f}".format(*two_slopes(0.1, 20)))

# %% [markdown]
# The first grows without bound as training goes on; the second tends to 1/2, where θ has settled. The longer
# a training with kinks runs, the worse its tangent.
#
# ## 08.3 · The edge
#
# *Up to which rate does SGD with momentum settle on $\frac12\lambda\theta^2$?*
#
# A step maps $(\theta, m)$ to $m' = \mu m + \lambda\theta$, $\theta' = \theta - \eta m'$. Its matrix
# has the trace $1 - \eta\lambda + \mu$ and the determinant $\mu$. With growing η the first eigenvalue to leave
# the unit circle does so at $-1$, where $1 + \text{trace} + \text{determinant} = 0$:
# $2 - \eta\lambda + 2\mu = 0$.


# %%
def edge(curvature, momentum):
    return 2 * (1 + momentum) / curvature


check("08.3", edge)
effective = edge(1.0, 0.9) / (1 - 0.9)
print(f"effective rate at the edge: {edge(1.0, 0.0):.0f} without momentum, {effective:.0f} with .9")

# %% [markdown]
# At one *effective* rate η/(1 − μ), plain SGD is 19 times nearer to its edge than SGD with momentum .9. That is why
# dropping momentum and raising the rate tenfold made training rough.
#
# ## 08.4 · How long is a tangent useful?
#
# *The upper figure of section 2, at ten times the rate.*
#
# We need the network once more. The error of the prediction, over the largest change of
# the loss on the way, for four test images together:

# %%
x, y, x_test, y_test = data.digits(train=800, test=500)
x, x_test = x.double(), x_test.double()


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def block(inputs, outputs):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.GELU(), nn.AvgPool2d(2)


def recipe(rate, falls=True):
    torch.manual_seed(0)
    model = nn.Sequential(*block(1, 8), *block(8, 16), nn.Flatten(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    batches = magic.batches(len(x), size=100, epochs=8)
    scheduler = models.triangle(optimizer, len(batches)) if falls else None
    return magic.Run(model, optimizer, (x, y), loss, batches, scheduler=scheduler)


# %%
way = smoothness.directions(len(x), drop=0.01, count=1)[0]
def measure(model):
    return loss(model, x_test[:4], y_test[:4])


lengths = torch.tensor([0, 0.1, 0.25, 0.5, 1.0])
weights = 1 + lengths[:, None] * way
error = {}
for rate in (0.05, 0.5):
    run = recipe(rate)
    told = magic.attribute(run, measure, progress=False).predict(weights)
    true = torch.stack([magic.outputs(run, measure, w) for w in weights])
    error[rate] = (told - true).abs().sum(1) / (true - true[0]).abs().max(0).values.sum()
    print(f"rate {rate:g}:", ", ".join(f"{e:.2f}" for e in error[rate]))
claim("error at weight 0, at rate × 10 over ours", error[0.5][-1] / error[0.05][-1], at_least=4)

# %% [markdown]
# At the chapter's rate the error is a twentieth of the largest change when the images are gone. At ten times the rate it is more than
# that before a quarter of the way, and a third of it at the half.
#
# ## 08.5 · Where does a jump come from?
#
# *Find a jump of the trained θ of section 3 by halving an interval, and compare both sides, step by step.*
#
# At each step we note how many of the twelve thresholds θ has passed, since that is all that the gradient knows of θ.

# %%
thresholds = torch.linspace(0, 1, 12, dtype=torch.float64)


def train_one(w, steps=20, rate=0.1):
    theta, passed = torch.zeros((), dtype=torch.float64), []
    for _ in range(steps):
        passed.append(int((theta > thresholds).sum()))
        theta = theta - rate * (passed[-1] / 12 - w / 2)
    return theta.item(), passed


def misfit(low, high):
    """How far the change is from the tooth's slope, which is 1."""
    return abs(train_one(high)[0] - train_one(low)[0] - (high - low))


low, high = 0.84, 0.85
for _ in range(30):
    middle = (low + high) / 2
    low, high = (low, middle) if misfit(low, middle) > misfit(middle, high) else (middle, high)
claim("the interval's length", high - low, at_most=1e-10)
claim("the jump across it", misfit(low, high), at_least=0.005)

# %%
sides = train_one(low)[1], train_one(high)[1]
differ = [t for t, (a, b) in enumerate(zip(*sides, strict=True)) if a != b]
for t in differ:
    print(f"step {t}: {sides[0][t]} thresholds passed below the jump, {sides[1][t]} above it")

# %% [markdown]
# At one step, on one side, θ has just passed one more threshold. So one gradient is larger by 1/12, and θ falls by
# a finite step, η/12 = .0083, although $w$ has changed by less than $10^{-10}$.
