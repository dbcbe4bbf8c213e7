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
# # 11 · How near is near-optimal?
#
# **Question.** What is the best that any linear prediction can do?
#
# [Chapter 10](10_is_it_right.ipynb) found an LDS of .99. Is that near the best possible value, and what is the best possible value? Scores that are added up, one
# for each removed example, are a *linear* function of the data weights, and training is not linear. So even the best scores must miss something. In this
# chapter we measure how much the best scores would miss, without finding them, and see how far MAGIC is from them. The paper calls itself
# "near-optimal" ([Ilyas & Engstrom 2025](https://arxiv.org/abs/2504.16430)); here that becomes a number with an interval. Then we ask the
# same for large removals, where the tangent at $w = 1$ turns out to be the wrong one, and a better one costs nothing.
#
# | word | in code | meaning |
# |---|---|---|
# | $p$ | `drop` | the fraction of the data that is removed, at random, in sets of one size |
# | affine prediction | `scores.predict` | $\varphi(f(c)) + \tau_c\cdot(w-c)$, where $\tau_c$ are the scores taken at the weights $c$ |
# | best linear predictor | | the affine function of $w$ with the smallest mean squared error over those sets |
# | ceiling | `.best_correlation` | the (Pearson's) correlation of the best linear predictor with the truth |
# | optimality gap | `.gap` | the ceiling, minus the correlation that a prediction reaches |
# | centre | `at="centre"` | $c = 1-p$ for every example, the mean of the sets' weights |
#
# About thirty minutes to read; one to run.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import magic
from magic import subsets
from magic.book import data, models, plot
from magic.book.banks import shipped_bank
from magic.book.checks import agree, claim
from magic.evidence.optimality import ridge

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
plot.style()

# %% [markdown]
# ## 1 · One dial, two lines
#
# Three trainings serve us, all of the same network on 1,200 digits, with ten test losses as outputs. *Ours* is the training of chapter 10. *Smooth* has half its rate
# and half its epochs; *rough* has twice its rate and half as many epochs again.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1200, test=500))


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:10], y_test[:10])


def run_with(rate, epochs, normalize="batch"):
    torch.manual_seed(0)
    model = models.MLP((64, 128, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches = magic.batches(len(x), size=100, epochs=epochs, seed=0)
    return magic.Run(model, optimizer, (x, y), loss, batches, normalize=normalize)


runs = {
    "smooth": run_with(rate=0.05, epochs=10),
    "ours": run_with(rate=0.1, epochs=20),
    "rough": run_with(rate=0.2, epochs=30),
}
full = {name: magic.attribute(run, measure, progress=False) for name, run in runs.items()}

# %% [markdown]
# The truth comes from some 1,500 retrainings, kept in a bank that is shipped with the chapter (as in [chapter 10](10_is_it_right.ipynb)).

# %%
def bank_of(run, name, measure=measure):
    return shipped_bank("11_how_near_is_near_optimal", run, measure, name=name)


banks = {name: bank_of(run, name) for name, run in runs.items()}

# %% [markdown]
# Before 1,200 weights, look at one. Give 600 of the training images, drawn at random, a common weight $u$, and turn it from 1 (present) to 0 (removed). The output
# as a function of $u$ is a curve, drawn from eleven trainings. A linear prediction of it is a straight line. Which line is best?

# %%
shown = 9  # of the ten outputs
group = subsets.random(len(x), drop=0.5, subsets=1, seed=7)[0] == 0
dial = torch.linspace(0, 1, 11)
rows = torch.ones(len(dial), len(x))
rows[:, group] = dial[:, None]
curves = magic.outputs(runs["ours"], measure, rows, bank=banks["ours"], progress=False)

curve = curves[:, shown].double().numpy()
best = np.polyval(np.polyfit(dial, curve, deg=1), dial)
tangent = full["ours"].predict(rows).cpu()[:, shown].double().numpy()
errors = {"tangent": ((curve - tangent) ** 2).mean(), "best": ((curve - best) ** 2).mean()}
claim(
    "squared error of the tangent at 1, over that of the best line",
    errors["tangent"] / errors["best"],
    at_least=5,
)

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5.2, 3.4))[1]
ax.fill_between(dial, best, curve, color=plot.NEUTRAL, alpha=0.3, label="what no line can have")
ax.plot(dial, curve, "o-", color="black", markersize=4, label="true, by retraining")
ax.plot(dial, best, color=plot.HELPFUL, label="best line on [0, 1]")
ax.plot(dial, tangent, "--", color=plot.HARMFUL, label="tangent at $u=1$")
ax.set(xlabel="weight $u$ of 600 images", ylabel=f"loss of test image {shown}")
ax.legend(fontsize=9);

# %% [markdown]
# The tangent at $u = 1$ is the best line *near* $u=1$. If all values of $u$ matter alike, the best line is the one of least squares, and its slope is not that of the tangent. The
# grey area between it and the curve is the **residual** that no line can have. For a prediction with *some* line, the residual has two parts: one that a
# better line would have removed, and one that is curvature. This chapter is about telling the two apart.
#
# With one dial, all falling lines put the outputs into the same order. With 1,200 dials the slopes also decide which set is predicted to matter more,
# so a wrong slope costs rank correlation, too.
#
# ## 2 · Fit the best predictor, and fail
#
# From now on the weights are those of random sets. Let all sets with a fraction $p$ removed be equally likely, and let the **best linear predictor** be the affine function of $w$
# with the smallest mean squared error over them. It is a regression problem: the $S$ retrainings are the data, the 1,200 weights are the inputs. The obvious attempt is
# ridge regression, with its penalty chosen by cross-validation. With $D$ the $(S, n)$ matrix of the weights less their mean, $r$ the outputs less theirs, and a penalty $\alpha$, its slopes are
#
# $$ b = D^\top (D D^\top + \alpha I)^{-1}\, r .$$
#
# We fit it to 200 sets of 1 %, once from nothing, and once to what MAGIC's prediction leaves.

# %%
def judged(scores, name, drop, sets):
    return magic.lds(scores, drop=drop, subsets=sets, bank=banks[name], progress=False)


one_percent = {name: judged(scores, name, drop=0.01, sets=200) for name, scores in full.items()}
alone = ridge(one_percent["ours"], sizes=[50, 100], prior=False)
on_top = ridge(one_percent["ours"], sizes=[50, 100])
claim("MAGIC's LDS at 1 %", one_percent["ours"].spearman, at_least=0.98)
claim("LDS of a ridge on 200 retrainings alone", alone["LDS"].iloc[-1], at_most=0.4)
moved = on_top["LDS"].iloc[-1] - one_percent["ours"].mean
claim("what it adds to MAGIC's prediction", moved, at_most=0.002)

# %% tags=["nbval-ignore-output"]
pd.DataFrame(
    {"retrainings": alone["size"], "ridge alone": alone["LDS"], "on top of MAGIC": on_top["LDS"]}
).round(3)

# %% [markdown]
# Two hundred equations do not determine 1,200 slopes. The curve still rises, and would go on rising for thousands of retrainings. Started from MAGIC's prediction, the
# ridge makes it slightly worse: it finds nothing to correct. But that may be because there is nothing, or because 200 retrainings are too few to see it. We need a sharper instrument.
#
# ## 3 · How long is a vector that we cannot find?
#
# We do not need the best slopes. We only want to know how well they would do, which is a single number.
#
# Take MAGIC's prediction, and call what it leaves the residual: $r$ = true − predicted, for each set. Let $D = w - \mathrm E\,w$ be the deviation of the set's weights from their
# mean. Each weight is 1 or 0, and they are nearly uncorrelated, with the variance $\kappa = p(1-p)$. (Sets of one size make it $p(1-p)\,\frac{n}{n-1}$, because the entries of $D$ then add up to 0; nothing else changes
# below.) A better linear predictor would add $b\cdot D$ to ours, with the slopes of least squares,
#
# $$ b = \frac{\mathrm E[D\,r]}{\kappa}, \qquad\text{and this would explain}\qquad L = \operatorname{var}(b\cdot D) = \kappa\,\lVert b\rVert^2 $$
#
# of the residual's variance. So the question is how long $b$ is.
#
# **The obvious estimate is wrong.** Replace the expectation by the mean over our $S$ retrainings, $\hat b = \frac1S \sum_s D_s r_s / \kappa$, and take
# $\kappa\lVert\hat b\rVert^2$. To test it, shuffle the residuals, so that each belongs to another set than before. Then nothing linear is left in them, and the answer should be 0.

# %%
result = one_percent["ours"]
predicted, true, D = (
    part.double().cpu().numpy() for part in (result.predicted, result.true, result.weights)
)
S, n, p = *D.shape, 0.01
D, kappa = D - (1 - p), p * (1 - p) * n / (n - 1)
predicted, true = predicted - predicted.mean(0), true - true.mean(0)
stretch = (predicted * true).sum(0) / (predicted**2).sum(0)
r = true - stretch * predicted
shuffled = np.random.default_rng(0).permutation(r)


def obvious(r):
    b = D.T @ r / S / kappa
    return kappa * (b**2).sum(0)


claim(
    "the obvious estimate of 0, over the residual's variance",
    np.mean(obvious(shuffled) / r.var(0)),
    at_least=5,
)

# %% [markdown]
# (The first lines also stretch each prediction to fit the truth best, which no correlation notices.) For residuals with no linear part at all, the obvious estimate claims several times
# *their whole variance*. Multiply out its square to see why:
#
# $$ \kappa\lVert\hat b\rVert^2 = \frac1{S^2} \sum_{s,\,t} r_s\, r_t\, \frac{D_s\cdot D_t}{\kappa}. $$
#
# The terms with $s = t$ are squares: $r_s^2\,\lVert D_s\rVert^2/\kappa \approx n\, r_s^2$. They are never negative, whatever $r$ is, and together they come to $\frac nS \operatorname{var}(r)$, which is 6 times the
# variance here. This is the noise of 1,200 estimated slopes, counted as if it were signal.
#
# **Pairs of independent sets do not have this fault.** Take two different sets, $s \ne t$. They were drawn independently, so the expectation of the product is the product of the expectations:
#
# $$ \mathrm E\Big[ r_s\, r_t\, \frac{D_s\cdot D_t}{\kappa}\Big] = \frac{\mathrm E[r D]\cdot\mathrm E[r D]}{\kappa} = \kappa\,\lVert b\rVert^2 = L. $$
#
# Every such pair is an estimate of $L$, a very noisy one, but with nothing added on average. One retraining errs in one direction, the other in another, and the two errors are
# as often of opposite as of equal sign. There are $S(S-1) = 39{,}800$ pairs; their mean is
#
# $$\boxed{\;\hat L = \frac{1}{S(S-1)} \sum_{s\neq t} r_s\, r_t\, \frac{D_s\cdot D_t}{\kappa}\;}$$
#
# In words: if two sets that have much in common also have residuals of the same sign, then something linear was left in the residuals. A mean over all pairs of independent draws is called a
# U-statistic ([Hoeffding 1948](https://doi.org/10.1214/aoms/1177730196)). Its standard error here is about $\operatorname{var}(r)\sqrt{2n}/S \approx .24\operatorname{var}(r)$. It is small because $r$ is: the better the
# prediction to begin with, the sharper the answer.

# %%
def from_pairs(r):
    together = D @ D.T / kappa
    np.fill_diagonal(together, 0)
    return (r * (together @ r)).sum(0) / (S * (S - 1))


claim(
    "from pairs, the estimate of 0, over the residual's variance",
    np.mean(from_pairs(shuffled) / r.var(0)),
    at_least=-0.2,
    at_most=0.2,
)

# %% [markdown]
# **From $L$ to the ceiling.** Of the truth's variance, our prediction leaves $\operatorname{var}(r)$ unexplained. A better linear predictor would explain $L$ of it. The rest,
# $\operatorname{var}(r) - L$, no linear predictor explains. So the best one correlates with the truth as
#
# $$ \rho_\text{best} = \sqrt{1 - \frac{\operatorname{var}(r) - L}{\operatorname{var}(\text{true})}} .$$
#
# In a training that differs from one time to the next, part of that rest would be noise, and one would call $\rho_\text{best}$ a noise ceiling. Ours repeats itself to the
# bit ([chapter 01](01_the_same_run_twice.ipynb)), so all of it is curvature. The package does the same in one call, and adds an interval by leaving out each retraining in turn.

# %%
left = (r**2).sum(0) / (S - 2) - from_pairs(r)  # a mean and a stretch were fitted: S − 2
ceiling = np.sqrt(1 - left / true.var(0, ddof=1))
gaps = {name: magic.optimality(compared) for name, compared in one_percent.items()}
off = np.abs(ceiling / gaps["ours"].per_target[1] - 1).max()
claim("the ceiling of each output, beside magic's: relative difference", off, at_most=1e-9)

# %% [markdown]
# ## 4 · The gap

# %%
claim("smooth: optimality gap at 1 %", gaps["smooth"].gap, at_most=0.001)
claim("ours: optimality gap at 1 %", gaps["ours"].gap, at_most=0.01)
claim("upper end of its interval", gaps["ours"].gap.high, at_most=0.02)
claim("rough: optimality gap at 1 %", gaps["rough"].gap, at_least=0.02)

# %% tags=["nbval-ignore-output"]
pd.DataFrame({name: dict(gap.rows()) for name, gap in gaps.items()})

# %% [markdown]
# *This* is what near-optimal means, and it is true of our training: of the correlation that any linear predictor could reach, .998, MAGIC lacks about .005. The last .002 are
# curvature, and no scores could have them.
#
# It is a property of the training, not of the method. The rough training has a ceiling of about .98, and MAGIC stays several hundredths below it. There the slope at the point $w = 1$ is no good guess of the
# slopes that serve best over whole sets, for the reason of [chapter 08](08_is_the_derivative_useful.ipynb): the curve has small waves, and the derivative sees only the one it stands on.
#
# ## 5 · Larger sets: put the tangent where the sets are
#
# A set with a fifth of the data removed is not near $w = 1$. Its weights are 0 and 1, and their mean is $1-p = .8$. In the picture of section 1, the best line over
# $[0, 1]$ is much closer to the tangent in the *middle*. So take the scores there, at the **centre** $c = 1-p$, and predict from there:
#
# $$ \varphi(f(w)) \;\approx\; \varphi(f(c)) + \tau_c \cdot (w - c). $$
#
# It is one training and one replay, as before, only that every example has the weight $c$ in it. Nothing else changes, and nothing gets dearer.

# %%
drops = [0.05, 0.2, 0.5]
taken = {("ours", drop, "full"): full["ours"] for drop in drops}
taken |= {(name, 0.5, "full"): full[name] for name in ("smooth", "rough")}
for name, drop in [("ours", 0.05), ("ours", 0.2), ("ours", 0.5), ("smooth", 0.5), ("rough", 0.5)]:
    taken[name, drop, "centre"] = magic.attribute(
        runs[name], measure, at="centre", drop=drop, progress=False
    )
results = {key: judged(scores, key[0], key[1], sets=60) for key, scores in taken.items()}

# %% [markdown]
# On the dial of section 1 the tangent in the middle needs no replay: its slope is the difference of the two trainings beside it.

# %%
slope = (curve[6] - curve[4]) / 0.2
central = curve[5] + slope * (dial.numpy() - 0.5)
claim(
    "squared error of the tangent in the middle, over that of the best line",
    ((curve - central) ** 2).mean() / errors["best"],
    at_most=3,
)

# %% tags=["nbval-ignore-output", "hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
axes[0].plot(dial, curve, "o-", color="black", markersize=4, label="true")
axes[0].plot(dial, best, color=plot.NEUTRAL, label="best line")
axes[0].plot(dial, tangent, "--", color=plot.HARMFUL, label="tangent at $u=1$")
axes[0].plot(dial, central, "--", color=plot.HELPFUL, label="tangent at $u=½$")
axes[0].set(xlabel="weight $u$ of 600 images", ylabel=f"loss of test image {shown}")
axes[0].legend(fontsize=9)
for at, color in (("full", plot.HARMFUL), ("centre", plot.HELPFUL)):
    r2 = [results["ours", drop, at].r2 for drop in drops]
    mean, low, high = (1 - np.array(part) for part in zip(*r2, strict=True))
    where = np.arange(3) + (0.05 if at == "full" else -0.05)
    label = "tangent at 1" if at == "full" else "at the centre"
    axes[1].errorbar(where, mean, (mean - high, low - mean), fmt="o-", color=color, label=label)
axes[1].axhline(1, color=plot.NEUTRAL, linewidth=1)
axes[1].text(0, 1.1, "no better than the mean", fontsize=9, color="0.4")
axes[1].set_xticks(range(3), [f"{drop:.0%}" for drop in drops])
axes[1].set(yscale="log", xlabel="removed", ylabel="error: 1 − R²", title="Ours, 60 sets each")
axes[1].legend(fontsize=9);

# %%
for drop, lowest, r2 in ((0.05, 0.985, 0.92), (0.2, 0.98, 0.88), (0.5, 0.97, 0.82)):
    there = results["ours", drop, "centre"]
    claim(f"ours, {drop:.0%}, from the centre: LDS", there.spearman, at_least=lowest)
    claim(f"ours, {drop:.0%}, from the centre: R²", there.r2, at_least=r2)
claim("ours, 50 %, from w = 1: R²", results["ours", 0.5, "full"].r2, at_most=-1)


def gain(drop):
    """What the centre adds to the LDS of each output: the mean, and twice its standard error."""
    more = (
        results["ours", drop, "centre"].per_target - results["ours", drop, "full"].per_target
    )
    return more.mean(), 2 * more.std(ddof=1) / len(more) ** 0.5


claim("the centre's gain in LDS at 5 %", gain(0.05)[0], at_most=0.005)
claim("at 20 %, less twice its standard error", gain(0.2)[0] - gain(0.2)[1], at_least=0.002)
claim("at 50 %, less twice its standard error", gain(0.5)[0] - gain(0.5)[1], at_least=0.03)

# %% tags=["nbval-ignore-output"]
table = {
    key: {"LDS": f"{result.mean:.3f}", "R²": f"{result.r2:.2f}"} for key, result in results.items()
}
pd.DataFrame(table).T.rename_axis(["training", "removed", "tangent at"])

# %% [markdown]
# At 5 % the two rank alike: a difference of .0015 is far inside the interval of either. At 20 % the centre ranks a little better, at 50 % much better. For sizes the difference is large: at 20 % the prediction from $w=1$ explains a
# third of the variance and the one from the centre nine tenths, and at 50 % the one from $w = 1$ is worse than predicting the mean. In the smooth training the centre is almost exact for half of the data. In the rough one
# it is better than the tangent at 1, and not good.
#
# How near is the centre to the optimum? With 200 sets of 20 %:

# %%
large = {
    at: magic.optimality(judged(taken["ours", 0.2, at], "ours", drop=0.2, sets=200))
    for at in ("full", "centre")
}
claim("ours, 20 %: gap of the tangent at 1", large["full"].gap, at_most=0.015)
claim("ours, 20 %: gap of the centre", large["centre"].gap, at_most=0.005)
claim("ours, 20 %: the ceiling", large["full"].best_correlation, at_most=0.985)

# %% tags=["nbval-ignore-output"]
pd.DataFrame({f"{at}, 20 %": dict(gap.rows()) for at, gap in large.items()})

# %% [markdown]
# The centre reaches the ceiling as far as 200 retrainings can tell, and the ceiling itself has come down from .998 to about .974: with a fifth of the data gone, more of the truth is curved *among* the sets, and no
# scores from anywhere can have that.
#
# **Why the centre?** There is a formula for the best slopes. If every example stays independently with probability $1-p$, least squares gives example $i$ the slope
#
# $$ b_i = \frac{\operatorname{cov}(w_i, \varphi)}{\operatorname{var}(w_i)} = \mathrm E[\varphi \mid w_i = 1] - \mathrm E[\varphi \mid w_i = 0]. $$
#
# It is the difference that example $i$ makes, averaged over random sets of the others. (With $p = \tfrac12$ this is the Banzhaf value of game theory, used for data by
# [Wang & Jia 2023](https://arxiv.org/abs/2205.15466).) The tangent at 1 takes the difference that $i$ makes when *everybody* else is there. The
# centre takes it in the middle of those sets. If training were linear in each weight on its own, however much the weights act *together*, then the scores at the
# centre would be exactly these slopes (exercise 4).
#
# ## 6 · Where does the gain come from?
#
# We have to be honest about the gain. Under the paper's weighting, $\sum_i w_i\ell_i/B$ with the batch size $B$ fixed, removing a fifth of the data makes every
# step a fifth shorter. For plain SGD, weight $c$ for everyone *is* the learning rate $c\,\eta$. The centre knows that; the tangent at $w = 1$ extrapolates from
# the full rate.

# %%
at_centre = magic.outputs(runs["ours"], measure, torch.full((len(x),), 0.8))
slower = magic.outputs(run_with(rate=0.08, epochs=20), measure, torch.ones(len(x)))
agree("weight .8 for all | rate × .8", at_centre, slower, tolerance=1e-4)

# %% [markdown]
# To see what is left without it, divide by the sum of the weights instead, $\sum_i w_i\ell_i/\sum_i w_i$, which is what really leaving the rows out of a batch does. Now $f(cw) = f(w)$: a common factor changes
# nothing. Differentiate that in $w$, and in $c$ at $c = 1$:
#
# $$ c\,\nabla f(cw) = \nabla f(w), \qquad w\cdot\nabla f(w) = 0 . $$
#
# The scores at the centre are those at 1 divided by $c$, so both rank every set alike; and the scores of each output sum to 0.

# %%
by_weights = run_with(rate=0.1, epochs=20, normalize="weights")
banks["by weights"] = bank_of(by_weights, "averaged")
one = magic.attribute(by_weights, measure, progress=False)
half = magic.attribute(by_weights, measure, at="centre", drop=0.5, progress=False)
agree("scores at 1 | c × scores at the centre", one.values, 0.5 * half.values, tolerance=1e-3)
sums = one.values.sum(1).abs() / one.values.abs().sum(1)
claim("sum of the scores, over the sum of their sizes", sums.max(), at_most=1e-3)
from_one, from_half = (judged(scores, "by weights", drop=0.5, sets=60) for scores in (one, half))
claim("÷ Σw, 50 %, from w = 1: LDS", from_one.spearman, at_least=0.93)
claim("what the centre adds to it", abs(from_half.mean - from_one.mean), at_most=0.001)
claim("÷ Σw, 50 %, from w = 1: R²", from_one.r2, at_most=0.6)
claim("÷ Σw, 50 %, from the centre: R²", from_half.r2, at_least=0.65)

# %% tags=["nbval-ignore-output"]
pairs = {
    "÷ B, at 1": results["ours", 0.5, "full"], "÷ B, at the centre": results["ours", 0.5, "centre"],
    "÷ Σw, at 1": from_one, "÷ Σw, at the centre": from_half,
}
pd.DataFrame(
    {name: {"LDS": str(result.spearman), "R²": str(result.r2)} for name, result in pairs.items()}
).T

# %% [markdown]
# So for *ranking* the whole gain of the centre is the step size: where the step size does not depend on the weights, the centre and the tangent at 1 rank alike. It is a gain all the same, since under $\div B$ the
# retrained models are trained with the shorter steps. For *sizes* something remains under $\div\Sigma w$, too. The tangent at 1 predicts changes half
# as large as those of the centre: removing half of a batch doubles the influence of each example that stays, and the tangent at 1 does not know it.
#
# ## 7 · Another network
#
# One architecture proves little. Here are two convolutions with BatchNorm, Nesterov momentum, and a rate that rises and falls; four test images, sixty sets of 50 %.

# %%
torch.manual_seed(0)
net = models.ConvNet(width=8, size=x.shape[-1], norm="batch").to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)
order = magic.batches(len(x), size=100, epochs=12, seed=0)
schedule = models.triangle(optimizer, len(order))
deep = magic.Run(net, optimizer, (x, y), loss, order, scheduler=schedule)


def first_four(model):
    return loss(model, x_test[:4], y_test[:4])


deep_bank = bank_of(deep, "conv net", first_four)
conv = {
    "from w = 1": magic.attribute(deep, first_four, progress=False),
    "from the centre": magic.attribute(deep, first_four, at="centre", drop=0.5, progress=False),
}
conv = {
    at: magic.lds(scores, drop=0.5, subsets=60, bank=deep_bank, progress=False)
    for at, scores in conv.items()
}
claim("conv net, 50 %, from w = 1: LDS", conv["from w = 1"].spearman, at_most=0.95)
claim("conv net, 50 %, from w = 1: R²", conv["from w = 1"].r2, at_most=-1)
claim("conv net, 50 %, from the centre: LDS", conv["from the centre"].spearman, at_least=0.98)
claim("conv net, 50 %, from the centre: R²", conv["from the centre"].r2, at_least=0.9)

# %% [markdown]
# The order of things is the same: here, too, the tangent at 1 has lost its sizes at 50 % and some of its ranks, and the centre has kept both.
#
# ## What we claim
#
# - The correlation of the best linear predictor can be estimated without finding it, from pairs of independent retrainings.
# - For removals of 1 %, MAGIC on our training lacks about .005 of that correlation. On a rough training it lacks several hundredths.
# - For removals of 20 %, scores taken at the centre reach the ceiling of our training, at no extra cost. At 50 % they keep ranks and sizes where those from $w = 1$ have lost both.
# - All of what the centre gains in rank is the size of the step. Where the weighting takes that out, the tangent at 1 ranks as well.
#
# ## What we ignored
#
# - **The gap is one of correlations.** A prediction can be optimal in rank and off in size; R² shows that.
# - **Sets of one size, all equally likely.** About sets that were *chosen*, such as the most helpful images, averages over random sets say nothing.
#   [Chapter 10](10_is_it_right.ipynb) shows what happens there.
# - **Means of scores.** The best slopes are means over sets. Taking the mean of the scores over a few sets costs a replay for each; exercise 5 asks whether it pays.
# - **Predictions that are not linear.** The ceiling is the ceiling of scores that add up. [Chapter 12](12_how_far_does_a_tangent_reach.ipynb) tries a second-order one.
# - **One order of the data, one start.** Our question is about *this* training. If the start may vary, part of the truth is noise.
#
# ## Exercises
#
# **11.1** ●○○ (5 min) Write `affine(outputs, scores, centre, weights)`, the prediction from any point: `outputs` $(K,)$ and `scores` $(K, n)$ were taken at `centre` $(n,)$; `weights` is $(S, n)$, and the
# answer $(S, K)$.
#
# <details><summary>Hint</summary>At `weights = centre` the answer is known.</details>

# %%
def affine(outputs, scores, centre, weights):
    """(S, K): predicted outputs at these weights."""
    ...


# check("11.1", affine)

# %% [markdown]
# **11.2** ●●○ (15 min) Write `fit(weights, outputs, penalty)`, the ridge regression of section 2: the slopes $(n, K)$ for outputs $(S, K)$ at weights $(S, n)$. Do not form an $(n, n)$ matrix. What
# becomes of the slopes if $\alpha\to0$, and how well do they then fit the retrainings they were fitted to?
#
# <details><summary>Hint</summary>Both $D$ and $r$ are deviations from a mean.</details>

# %%
def fit(weights, outputs, penalty):
    """(n, K): slopes with small squared error and small length."""
    ...


# check("11.2", fit)

# %% [markdown]
# **11.3** ●●○ (15 min) Given $S$ independent draws of a random vector, $(S, n)$, write `squared_length(x)`, an unbiased estimate of the squared length of its *mean*, without an $(S, S)$ table.
#
# <details><summary>Hint</summary>The sum over all pairs is the square of a sum. Which pairs have to leave it?</details>

# %%
def squared_length(x):
    """An estimate of ‖E x‖² that is right on average."""
    ...


# check("11.3", squared_length)

# %% [markdown]
# **11.4** ●●● (25 min) The best slopes without any regression. Write `best_slopes(f, sets)`: for every example $i$, the mean over all `sets`, $(S, n)$ of zeros and ones, of $f$ with $i$ in the set minus $f$ with $i$ out of it. `f` takes
# one set, $(n,)$, and returns a number. The check compares it with least squares over all 16 sets of four examples. For a product of two weights the derivative at the centre gives the same slopes; why not for an exponential?
#
# <details><summary>Hint</summary>Two copies of a set differ in example $i$ only, whichever of them the set itself is.</details>

# %%
def best_slopes(f, sets):
    """(n,): what each example adds to f, averaged over the sets of the others."""
    ...


# check("11.4", best_slopes)

# %% [markdown]
# **11.5** ●●○ (20 min) For the smooth training and its sets of 50 %, is the centre the best point? Compare LDS and R² of the tangents at .6 and .5, and of a mean of the scores over three random sets,
# `at=magic.points.average(runs["smooth"], drop=0.5, subsets=3)`, which costs three replays.
#
# <details><summary>Hint</summary>`magic.attribute(runs["smooth"], measure, at=0.6)`, and `judged(…, "smooth", drop=0.5, sets=60)`.</details>
#
# **Next:** [12 · How far does a tangent reach?](12_how_far_does_a_tangent_reach.ipynb)
