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
# # 11 · How near is near-optimal? Solutions
#
# To the exercises of [chapter 11](../11_how_near_is_near_optimal.ipynb).

# %%
import pandas as pd
import torch
import torch.nn.functional as F

import magic
from magic.book import check, data, models
from magic.book.banks import shipped_bank
from magic.book.checks import claim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)

# %% [markdown]
# ## 11.1 · The prediction from any point
#
# $\varphi(f(c)) + \tau_c\cdot(w - c)$, for all sets and outputs at once. The step is $w - c$ and not $w - 1$: the outputs that we start from are those at $c$.

# %%
def affine(outputs, scores, centre, weights):
    """(S, K): predicted outputs at these weights."""
    return outputs + (weights - centre) @ scores.T


check("11.1", affine)

# %% [markdown]
# ## 11.2 · Ridge regression on retrainings
#
# $b = D^\top(DD^\top + \alpha I)^{-1} r$ needs one system of $S$ equations, for all outputs together. Means come off first; without that, the penalty would also act on the level of the outputs.

# %%
def fit(weights, outputs, penalty):
    """(n, K): slopes with small squared error and small length."""
    D, r = weights - weights.mean(0), outputs - outputs.mean(0)
    return D.T @ torch.linalg.solve(D @ D.T + penalty * torch.eye(len(D)).to(D), r)


check("11.2", fit)

# %% [markdown]
# As $\alpha \to 0$ the slopes become the shortest ones that fit the $S$ retrainings exactly, whatever the outputs are, noise included: there are more unknowns than equations. That is why
# the regression has to be judged on retrainings that it has not seen.

# %%
dice = torch.Generator().manual_seed(0)
D, noise = (torch.randn(*shape, generator=dice).double() for shape in ((50, 400), (50, 1)))
fitted = (D - D.mean(0)) @ fit(D, noise, penalty=1e-6)
left = ((noise - noise.mean(0) - fitted).norm() / noise.norm()).item()
claim("pure noise, fitted: what is left of it", left, at_most=1e-6)

# %% [markdown]
# ## 11.3 · A squared length
#
# $\lVert\sum_s x_s\rVert^2$ is the sum over all pairs, those of a draw with itself included. Those are $\sum_s \lVert x_s\rVert^2$; they go, and $S(S-1)$ pairs remain.

# %%
def squared_length(x):
    """An estimate of ‖E x‖² that is right on average."""
    S = len(x)
    return (x.sum(0).square().sum() - x.square().sum()) / (S * (S - 1))


check("11.3", squared_length)

# %% [markdown]
# It can be negative. An estimate of 0 that is right on average has to be.

# %%
draws = torch.randn(2000, 20, 30, generator=dice)
estimates = torch.stack([squared_length(x) for x in draws])
error = 2 * estimates.std() / len(estimates) ** 0.5
claim("its mean over 2,000 trials with mean 0, in units of twice its standard error",
      estimates.mean().abs() / error, at_most=2)  # fmt: skip
claim("fraction of the trials in which it is negative",
      (estimates < 0).double().mean(), at_least=0.4, at_most=0.6)  # fmt: skip

# %% [markdown]
# ## 11.4 · Best slopes as average differences

# %%
def best_slopes(f, sets):
    """(n,): what each example adds to f, averaged over the sets of the others."""
    slopes = []
    for i in range(sets.shape[1]):
        present, absent = sets.clone(), sets.clone()
        present[:, i], absent[:, i] = 1.0, 0.0
        differences = [f(a) - f(b) for a, b in zip(present, absent, strict=True)]
        slopes.append(torch.stack(differences).mean())
    return torch.stack(slopes)


check("11.4", best_slopes)

# %% [markdown]
# If $f$ is linear in each weight on its own, as $w_1w_2$ and $w_1w_2w_3$ are, then a difference in $w_i$ is a derivative, and its mean over independent sets is its value at the mean weights: the derivative at the centre
# *is* the best slope. (The check's products contain squares $w_i^2$, too; at $p = ½$ their derivative at the centre, 1, happens to be their difference.) An exponential is curved in every single weight, so its derivative
# at ½ is not the difference between 1 and 0.
#
# So however strongly the weights act *together*, the centre is the optimum. Only what is curved in one weight alone parts the two, and one example among 1,200 rarely does much of that.
#
# ## 11.5 · Which point?

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1200, test=500))


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:10], y_test[:10])


torch.manual_seed(0)
model = models.MLP((64, 128, 10)).to(device)
batches = magic.batches(len(x), size=100, epochs=10, seed=0)
run = magic.Run(model, torch.optim.SGD(model.parameters(), lr=0.05), (x, y), loss, batches)
bank = shipped_bank("11_how_near_is_near_optimal", run, measure, name="smooth")

# %%
points = {".6": 0.6, ".5": 0.5}
points["mean over three sets"] = magic.points.average(run, drop=0.5, subsets=3)
results = {}
for name, at in points.items():
    scores = magic.attribute(run, measure, at=at, progress=False)
    results[name] = magic.lds(scores, drop=0.5, subsets=60, bank=bank, progress=False)
claim("R² of the tangent at .6", results[".6"].r2, at_most=0.85)
claim("R² of the tangent at .5", results[".5"].r2, at_least=0.94)
gain = results["mean over three sets"].mean - results[".5"].mean
claim("what the mean over three sets adds to its LDS", gain, at_most=0.002)

# %% tags=["nbval-ignore-output"]
pd.DataFrame(
    {name: {"LDS": str(found.spearman), "R²": str(found.r2)} for name, found in results.items()}
).T

# %% [markdown]
# The sizes need the mean of the sets, since only there the level is right. The ranks care less: .99 at .6 is still a good LDS. The mean over three sets costs three replays and ranks no better. Each slope in it belongs to one set,
# and three sets are too few for what is special about each to average out.
