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
# # Solutions to chapter 00
#
# The questions are at the end of [chapter 00](../00_quickstart.ipynb).

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import magic
from magic.book import check, data, models, plot
from magic.book.checks import claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()

# %% [markdown]
# **00.1 · The predicted effect of removing several images.** A score is the change of the output per unit of weight. Removal takes one
# unit from each image in the set, so the changes are added, with a minus sign.


# %%
def removal_effect(values, without):
    return -values[:, without].sum(1)


check("00.1", removal_effect)

# %% [markdown]
# **00.2 · One score from two trainings.** The weights of all other examples stay at 1. The central difference is wrong by a term that
# shrinks with $\varepsilon^2$; a difference from one side only would be wrong by one that shrinks with $\varepsilon$.


# %%
def one_score(f, n, i, epsilon=1e-4):
    step = torch.zeros(n, dtype=torch.float64)
    step[i] = epsilon
    ones = torch.ones(n, dtype=torch.float64)
    return (f(ones + step) - f(ones - step)) / (2 * epsilon)


check("00.2", one_score)

# %% [markdown]
# **00.3 · A margin instead of a loss.** A margin is *large* when the model is right, where a loss is small. So a training image with a
# **positive** score helps now, and one with a negative score harms: the two words change places, and the images mostly do not.


# %%
def margins(logits, labels):
    rows = torch.arange(len(logits), device=logits.device)
    others = logits.clone()
    others[rows, labels] = -torch.inf
    return logits[rows, labels] - others.max(dim=1).values


check("00.3", margins)

# %% [markdown]
# To see it, we score the loss and the margin of the same image in one pass, and compare the two orders of the 1,200 training images.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1200, test=500))
torch.manual_seed(0)
model = models.MLP((64, 128, 10)).to(device)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


run = magic.Run(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    data=(x, y),
    loss=loss,
    batches=magic.batches(len(x), size=100, epochs=20, seed=0),
)
trained = run.model(run.train(progress=False))
hardest = loss(trained, x_test, y_test).argmax().item()


# %%
def measure(model):
    logits = model(x_test[hardest : hardest + 1])
    label = y_test[hardest : hardest + 1]
    return torch.cat([F.cross_entropy(logits, label)[None], margins(logits, label)])


scores = magic.attribute(run, measure, progress=False)
by_loss, by_margin = scores.values.cpu()
correlation = torch.corrcoef(torch.stack([by_loss, by_margin]))[0, 1]
claim("correlation of the scores of loss and margin", correlation, at_most=-0.9)

# %% [markdown]
# **00.4 · A fifth of the images removed.** The order of the 30 networks is still predicted well, but the dots leave the diagonal. The slope of
# true on predicted changes says how far.

# %%
asked = [hardest, *(i for i in range(10) if i != hardest)][:10]
scores = magic.attribute(
    run, lambda model: loss(model, x_test[asked], y_test[asked]), progress=False
)
result = magic.lds(scores, drop=0.2, subsets=20, together=20, progress=False)
claim("LDS with 20 % removed", result.spearman, at_least=0.9)
claim("slope of true on predicted changes", result.slope, at_least=1.1)
claim("R² of the prediction as it stands", result.r2, at_most=0.9)

# %% tags=["nbval-ignore-output"]
result.plot(targets=None)
plt.show()

# %% [markdown]
# Two things happen. A fifth of the weight of every batch is gone while the batch size $B$ in the mean stays, so every step is a fifth smaller: training is
# shorter, as it were, and all losses are higher. And the images that remain count for more than they did. A tangent at $w = 1$ sees neither.
# Chapter 11 takes the derivative at a better place.
