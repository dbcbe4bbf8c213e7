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
# # Solutions · 09 · Which examples mattered?
#
# [The chapter](../09_which_examples_mattered.ipynb). The functions are general. What is asked of them we ask of a
# smaller network here, which reads digits and trains in a second.

# %%
import torch
import torch.nn.functional as F

import magic
from magic import subsets
from magic.book import check, data, models
from magic.book.checks import claim

torch.set_num_threads(1)
x, y, x_test, y_test = data.digits(train=600, test=300)
torch.manual_seed(0)
model = models.MLP((64, 32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
batches = magic.batches(len(x), size=100, epochs=12)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


scheduler = models.triangle(optimizer, len(batches))
run = magic.Run(model, optimizer, (x, y), loss, batches, scheduler=scheduler)
trained = run.model(run.train(progress=False)).eval()

# %% [markdown]
# ## 09.1 · The effect of a set
#
# *What does the removal of a set do to every output, predicted from the scores?*
#
# Removing image $i$ takes $w_i$ from 1 to 0, a change of −1; to first order the effects add up.


# %%
def effect(scores, removed):
    return -scores[:, removed].sum(dim=1)


check("09.1", effect)

# %% [markdown]
# ## 09.2 · Helpers
#
# *The numbers of the $k$ most helpful images of every output, the most helpful first.*
#
# A helpful image has a negative score: the smallest scores come first.


# %%
def helpers(scores, k):
    return scores.argsort(dim=1)[:, :k]


check("09.2", helpers)

# %% [markdown]
# ## 09.3 · A fair control
#
# *As many images of each label as were removed, at random, none of them among the removed.*


# %%
def control(labels, removed, seed):
    dice = torch.Generator().manual_seed(seed)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[removed] = False
    chosen = []
    for label in labels[removed].unique():
        others = (free & (labels == label)).nonzero()[:, 0]
        count = int((labels[removed] == label).sum())
        chosen.append(others[torch.randperm(len(others), generator=dice)[:count]])
    return torch.cat(chosen)


check("09.3", control)

# %% [markdown]
# ## 09.4 · How many until the network changes its mind?
#
# *Measure the margin in place of the loss: the logit of the right label minus the largest of the others. Predict how many
# helpers must go until it is negative; then train without them.*
#
# A margin is helped by *positive* scores, so its helpers are those with the largest ones. We take the test
# image that is read right by the smallest margin above 1.


# %%
def margin(logits, labels):
    right = logits.gather(1, labels[:, None])[:, 0]
    return right - logits.scatter(1, labels[:, None], -torch.inf).max(1).values


with torch.no_grad():
    margins = margin(trained(x_test), y_test)
close = torch.where(margins > 1, margins, torch.inf).argmin().item()


def measure(model):
    return margin(model(x_test[[close]]), y_test[[close]])


scores = magic.attribute(run, measure, progress=False)
order = scores.values[0].argsort(descending=True)
told = scores.outputs[0] - scores.values[0][order].cumsum(0)
predicted = int((told < 0).nonzero()[0]) + 1

# %%
without = subsets.top(scores.values[0], range(1, predicted + 1), helpful=False)
true = magic.outputs(run, measure, without, progress=False)[:, 0]
needed = int((true < 0).nonzero()[0]) + 1
claim("helpers that must go, over those predicted", needed / predicted, at_least=0.5, at_most=1)

# %% tags=["nbval-ignore-output"]
print(f"test image {close}, margin {scores.outputs[0]:.2f}: predicted {predicted}, true {needed}")

# %% [markdown]
# The tangent counts each helper as if the others stayed, so it asks for too many: the true number is never larger here.
#
# ## 09.5 · Forty in four rounds
#
# *Remove 40 helpers in four rounds of ten, and take the derivative again after each round. How much of the true change does
# the sum of the four predictions explain?*
#
# Each round starts where the last one ended, at data weights in which the removed images have weight 0. This
# is how one follows a curve by short pieces of tangents (Euler's method).


# %%
def measure(model):
    return loss(model, x_test[[close]], y_test[[close]])


def best(scores, weights, count):
    """Weights without the `count` images of those present that help most."""
    present = torch.where(weights > 0, scores.values[0], torch.inf)
    weights = weights.clone()
    weights[present.argsort()[:count]] = 0
    return weights


def follow(rounds, count=40):
    """(prediction summed over the rounds, the weights reached)."""
    weights, total = torch.ones(len(x)), 0.0
    for _ in range(rounds):
        scores = magic.attribute(run, measure, at=weights, progress=False)
        after = best(scores, weights, count // rounds)
        total += (scores.predict(after) - scores.predict(weights)).item()
        weights = after
    return total, weights


# %%
start = magic.outputs(run, measure, torch.ones(len(x))).item()
share, said = {}, []
for rounds in (1, 4):
    told, weights = follow(rounds)
    true = magic.outputs(run, measure, weights).item() - start
    share[rounds] = told / true
    said.append(f"{rounds} round(s): predicted {told:+.3f}, true {true:+.3f}")
claim("share of the true change that one round predicts", share[1], at_most=0.7)
claim("share that four rounds predict", share[4], at_least=0.6)

# %% tags=["nbval-ignore-output"]
print("\n".join(said))

# %% [markdown]
# Four rounds see most of what one round misses. More rounds would see more: in the limit the sum of the predictions is the
# true change, since it is the integral of the derivative along the way.
