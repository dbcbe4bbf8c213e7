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
# # Solutions to chapter 10
#
# The questions are at the end of [chapter 10](../10_is_it_right.ipynb).

# %%
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import rankdata

import magic
from magic import subsets
from magic.book import check, data, models
from magic.book.checks import claim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)

# %% [markdown]
# **10.1 · The LDS from two matrices.** Rank each column, which takes scale and shape away, and correlate the ranks. The mean is over the
# columns, the targets: ranks of different targets have nothing to do with each other.


# %%
def pearson(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def my_lds(predicted, true):
    ranks = [torch.as_tensor(rankdata(x.numpy(), axis=0)) for x in (predicted, true)]
    return pearson(*ranks).mean()


check("10.1", my_lds)

# %% [markdown]
# **10.2 · Slope and R².** The slope divides by the variance of the *predicted* outputs. $R^2$ compares the squared errors with those
# of a prediction that is always the mean.


# %%
def slope_and_r2(predicted, true):
    a, b = predicted - predicted.mean(), true - true.mean()
    slope = (a * b).sum() / (a * a).sum()
    r2 = 1 - ((true - predicted) ** 2).sum() / (b * b).sum()
    return slope, r2


check("10.2", slope_and_r2)

# %% [markdown]
# The best prediction of the form $a + b\cdot\text{predicted}$ has the mean of the true outputs and the slope above, $b = \sum ab/\sum a^2$ (with the letters of the
# function on the right). Its squared errors are
# $\sum (b_s - b\,a_s)^2 = \sum b_s^2 - (\sum a_s b_s)^2/\sum a_s^2$, and divided by $\sum b_s^2$ that is $1 - \text{Pearson}^2$. So its $R^2$ is Pearson's
# correlation squared: whoever allows a prediction the best line asks no more than Pearson's correlation does.

# %%
torch.manual_seed(0)
true = torch.randn(50, dtype=torch.float64)
predicted = 3 * true + torch.randn(50, dtype=torch.float64) + 7
slope, _ = slope_and_r2(predicted, true)
fitted = true.mean() + slope * (predicted - predicted.mean())
difference = slope_and_r2(fitted, true)[1] - pearson(predicted, true) ** 2
claim("R² of the best line, minus Pearson squared", difference.abs(), at_most=1e-12)

# %% [markdown]
# **10.3 · A paired bootstrap.** All three matrices are resampled with the same rows, so that what makes one resample easy or hard makes it so for both
# methods, and cancels in the difference.


# %%
def paired_bootstrap(a, b, true, draws):
    differences = [my_lds(a[rows], true[rows]) - my_lds(b[rows], true[rows]) for rows in draws]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.quantile(torch.stack(differences), ends)


check("10.3", paired_bootstrap)

# %% [markdown]
# **10.4 · More than chance?** The chosen set is counted among the R + 1. With 3 random sets, as in section 7, the smallest possible
# p-value is 1/4: three are enough to show what is usual, and too few for a test.


# %%
def against_random(chosen, random):
    return (1 + (random >= chosen).sum()) / (1 + len(random))


check("10.4", against_random)

# %% [markdown]
# **10.5 · A method of your own.** The run of the chapter, its bank, and labels in place of gradients.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1200, test=500))
targets = x_test[:10], y_test[:10]


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, *targets)


torch.manual_seed(0)
model = models.MLP((64, 128, 10)).to(device)
batches = magic.batches(len(x), size=100, epochs=20, seed=0)
run = magic.Run(model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), loss, batches)
exact = magic.attribute(run, measure, progress=False)
folder = Path(tempfile.mkdtemp())
shutil.copy("../banks/10_is_it_right.sqlite", folder)
bank = magic.Bank(folder / "10_is_it_right.sqlite", run, measure, name="ours")
if len(bank) == 0:
    bank.adopt()

# %%
def judged(values):
    return magic.lds(exact.like(values), drop=0.05, subsets=60, bank=bank, progress=False)


same = targets[1][:, None] == y[None, :]
distance = torch.cdist(targets[0].flatten(1), x.flatten(1))
near = torch.where(same, -1.0, 0.3) * torch.exp(-distance / 2)
claim("LDS of labels alone", judged(-same.double()).spearman, at_least=0.25, at_most=0.4)
claim("LDS of labels and nearness", judged(near).spearman, at_least=0.35, at_most=0.5)

# %% [markdown]
# Labels alone reach .31. All images of a class have the same score, so the prediction only counts how many of them are
# removed, and still the order is right more often than not. If near images of the class count for more, and near images of other classes harm a little, the LDS is .40: about that of
# the cosine of gradients (.37), and half of what the derivative of the training has to offer.
#
# **10.6 · A whole class.** One row of data weights for each class.

# %%
without = subsets.groups(y)
result = magic.compare(exact, torch.stack([*without.values()]), bank=bank, progress=False)
predicted, true = result.predicted - result.baseline, result.true - result.baseline
own = torch.tensor(list(without))[:, None] == targets[1].cpu()[None, :]
claim("own class gone: predicted rise, mean", predicted[own].mean(), at_most=0.06)
claim("true rise, mean", true[own].mean(), at_least=8)
spread = [part[~own].abs().quantile(0.5) for part in (predicted, true)]
claim("another class gone: predicted over true size", spread[0] / spread[1], at_most=0.6)
order = pearson(*(torch.as_tensor(rankdata(part[~own].numpy())) for part in (predicted, true)))
claim("another class gone: rank correlation", order, at_least=0.3, at_most=0.6)

# %% [markdown]
# Without its own class a test image cannot be read any more, and its loss rises to 9. The tangent says .04: it describes the
# first missing image, not the last. This is section 7 at its extreme: all helpers are gone at once. For the images of other classes the changes are small; the tangent
# says less than half of them, and its order is only partly right. So a tangent at $w = 1$ is no guide to the removal of a class.
