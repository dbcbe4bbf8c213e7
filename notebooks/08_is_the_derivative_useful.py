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
# # 08 · Is the derivative useful?
#
# **Question.** The derivative of a training is exact. When does it also predict what happens if we leave out
# training images?
#
# A derivative describes infinitely small changes, and leaving out an image is not one of them. Whether the first
# says anything about the second depends on the shape of $f$ between the two, and that shape depends on how we train:
# on the rate, the activation, the pooling. In this chapter we look at the shape, find out what makes it rough, put
# a number on it, and then change one thing at a time and measure how well the derivative predicts.
#
# | word | in code | meaning |
# |---|---|---|
# | $f(w)$ | `run.train(weights)` | training, as a function of its data weights |
# | recipe | `recipe(...)` | everything about a training that we choose: network, optimizer, rate, number of steps |
# | direction $v$ | `smoothness.directions` | a way to go in $w$; here $-1$ on a random 1 % of the images, 0 elsewhere |
# | metasmoothness $\hat S_{h,v}$ | `smoothness.metasmoothness` | do the trained parameters go on changing as they began to? 1 if all do |
# | LDS | `magic.lds` | for one test image, Spearman's rank correlation between predicted and true losses over random sets that are left out; we report the mean over test images |
#
# About thirty minutes.

# %%
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import smoothness
from magic.book import data, models, plot
from magic.book.banks import shipped_bank, shipped_scores
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
# some of the recipes below are rough on purpose, and `magic` warns of them
warnings.filterwarnings("ignore", message=".*powers of ten.*|.*could not be checked.*")
plot.style()

# %% [markdown]
# ## 1 · A recipe with knobs
#
# A small convolutional network learns to read 800 digits of 8×8 pixels. Everything about it that may matter is an
# argument. We compute in double precision, so that on another processor, which rounds differently, even a rough
# training ends at the same place.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=800, test=500))
x, x_test = x.double(), x_test.double()


class Net(nn.Sequential):
    """Two convolutions, a linear layer. `norm`: "before" the activation, "after" it, or "none"."""

    def __init__(self, width=8, activation=nn.GELU, norm="before", pool=nn.AvgPool2d, scale=1.0):
        layers = []
        for inputs, outputs in ((1, width), (width, 2 * width)):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm != "before")
            block = [conv, activation()]
            if norm != "none":
                block.insert(1 if norm == "before" else 2, nn.BatchNorm2d(outputs))
            layers += [*block, pool(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * width, 10))
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def recipe(rate=0.05, momentum=0.9, epochs=8, falls=True, eps=None, eps_root=0.0, **net):
    """SGD, or AdamW if `eps` is given; a rate that rises and falls to zero, or a constant one."""
    torch.manual_seed(0)
    model = Net(**net).double().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    if eps is not None:
        group = {"params": list(model.parameters()), "eps_root": eps_root}
        optimizer = torch.optim.AdamW([group], lr=rate, eps=eps)
    batches = magic.batches(len(x), size=100, epochs=epochs)
    scheduler = models.triangle(optimizer, len(batches)) if falls else None
    return magic.Run(model, optimizer, (x, y), loss, batches, scheduler=scheduler)


print(recipe())

# %% [markdown]
# ## 2 · Two shapes of $f$
#
# Take a random percent of the images, eight of them, and turn their weight down from 1 to 0 in twenty steps, with a
# training at each. We follow the loss of a test image, once for our recipe, which has GELU and average pooling, and once with
# maximum pooling. The dashed line is the tangent at weight 1: all that the derivative knows.
#
# Retrainings take long, so those of this chapter come with it in a **bank**, a file that remembers what trainings
# gave ([chapter 10](10_is_it_right.ipynb) explains it).

# %%
way = smoothness.directions(len(x), drop=0.01, count=1)[0]


def measure(model):
    return loss(model, x_test[:4], y_test[:4])


def bank_of(name):
    return shipped_bank("08_is_the_derivative_useful", runs[name], measure, name=name)


# %%
runs = {"our recipe": recipe(), "maximum pooling": recipe(pool=nn.MaxPool2d)}
lengths = torch.linspace(0, 1, 21)
steps = 1 + lengths[:, None] * way
scores, paths = {}, {}
for name, run in runs.items():
    scores[name] = magic.attribute(run, measure, progress=False)
    paths[name] = magic.outputs(run, measure, steps, bank=bank_of(name), progress=False)

# %% tags=["nbval-ignore-output", "hide-input"]
figure, axes = plt.subplots(2, 1, figsize=(5.6, 6), sharex=True)
for ax, (name, found) in zip(axes, paths.items(), strict=True):
    k = found.std(0).argmax()
    tangent = scores[name].predict(steps)[:, k].cpu()
    ax.plot(1 - lengths, found[:, k], "o-", markersize=4, color=plot.HELPFUL, label="trained")
    ax.plot(1 - lengths, tangent, "--", color=plot.HARMFUL, label="tangent at 1")
    ax.set(ylabel=f"loss of test image {k}", title=name)
    ax.legend()
axes[0].invert_xaxis()
axes[1].set_xlabel("weight of the eight images");


# %%
def roughness(curve):
    """Second differences over first ones: 0 for a straight line."""
    first, second = curve.diff(dim=0), curve.diff(dim=0).diff(dim=0)
    return (second.abs().mean(0) / first.abs().mean(0)).mean().item()


times = roughness(paths["maximum pooling"]) / roughness(paths["our recipe"])
claim("roughness with maximum pooling, over ours", times, at_least=10)

# %% [markdown]
# Both tangents are exact *at* 1. The upper curve follows its tangent for the whole way. The lower one leaves it before
# the second point, in jumps, and a derivative contains nothing about a jump.
#
# ## 3 · Why continuous functions make jumps
#
# ReLU is continuous, maximum pooling is continuous, and so is the loss. Then how can the trained model jump?
# Because training does not add up losses, it adds up *gradients*, and the gradient of a ReLU jumps from 0 to 1 where
# its input passes 0. A tiny change of $w$ that carries one unit's input across 0 at step 40 changes the gradient of
# step 40 by a finite amount, and with it all steps that follow.
#
# The smallest training that shows it has one parameter $\theta$. One image, of data weight $w$, pulls it up. Twelve
# others pull it down, each through a ReLU with a threshold $a_i$ of its own:
#
# $$L(\theta) = \tfrac1{12}\sum_{i=1}^{12} \mathrm{relu}(\theta - a_i) \;-\; \tfrac w2\,\theta .$$

# %%
thresholds = torch.linspace(0, 1, 12, dtype=torch.float64)


def train_one(w, unit, steps=20, rate=0.1):
    theta = torch.zeros_like(w, requires_grad=True)
    for _ in range(steps):
        total = unit(theta - thresholds).mean() - w / 2 * theta
        (gradient,) = torch.autograd.grad(total, theta, create_graph=True)
        theta = theta - rate * gradient
    return theta


def rounded(z):
    """GELU, scaled: a ReLU whose corner is rounded over about 1/20."""
    return F.gelu(20 * z) / 20


# %%
dial = torch.linspace(0.7, 1, 301, dtype=torch.float64)
told, true, ends = {}, {}, {}
for name, unit in {"ReLU": F.relu, "rounded": rounded}.items():
    w = torch.tensor(0.85, dtype=torch.float64, requires_grad=True)
    told[name] = torch.autograd.grad(train_one(w, unit), w)[0].item()
    ends[name] = torch.stack([train_one(v, unit).detach() for v in dial])
    true[name] = ((ends[name][-1] - ends[name][0]) / (dial[-1] - dial[0])).item()
claim("ReLU: slope of the tangent over the whole way's", told["ReLU"] / true["ReLU"], at_least=2)
claim("rounded: the same", told["rounded"] / true["rounded"],
      at_least=0.99, at_most=1.01)  # fmt: skip

# %% tags=["nbval-ignore-output", "hide-input"]
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.6, 6.4))
theta = torch.linspace(0, 0.5, 501, dtype=torch.float64, requires_grad=True)
colors = {"ReLU": plot.HARMFUL, "rounded": plot.HELPFUL}
for name, unit in {"ReLU": F.relu, "rounded": rounded}.items():
    total = unit(theta[:, None] - thresholds).mean(1).sum()
    (slope,) = torch.autograd.grad(total, theta)
    upper.plot(theta.detach(), slope, color=colors[name], label=name)
    lower.plot(dial, ends[name], color=colors[name], label=f"{name}: trained")
near = (dial > 0.8) & (dial < 0.9)
at = ends["ReLU"][(dial - 0.85).abs().argmin()]
lower.plot(dial[near], at + told["ReLU"] * (dial[near] - 0.85), "--", color="black",
           label="ReLU: tangent at .85")  # fmt: skip
upper.set(xlabel="θ", ylabel="gradient of the twelve", title="What training adds up")
lower.set(xlabel="data weight w", ylabel="θ after training", title="What comes out")
upper.legend(), lower.legend();

# %% [markdown]
# With ReLU the gradient is a staircase, and the trained $\theta$ is a row of teeth. On every tooth its slope is exactly
# $\eta T/2 = 1$, and that is what the derivative returns, wherever we ask. The jumps between the teeth bring
# $\theta$ down again, so that over many teeth it rises less than half as fast.
#
# What is missing has a name. Between two thresholds the staircase is flat: the *curvature* of the loss, the derivative
# of its gradient, is zero there. All of its curvature sits in the steps, at single points, where autograd never looks. But
# curvature is what holds $\theta$ back, since a larger $\theta$ meets a larger gradient. The rounded unit
# spreads the same curvature over a width, where autograd finds it, and its tangent is right.
#
# Two conclusions. The derivative of a ReLU network is not wrong; it is the slope of a tooth. And it does not help to
# average derivatives over many $w$, for every one of them lacks the same term. In a real network the softmax contributes
# curvature of its own, which is smooth, so that a ReLU network loses only a part of its predictions. Maximum pooling has
# the same kind of kink, where another pixel becomes the largest. [Chapter 04](04_one_step_backwards.ipynb) has a third kind, in Adam.
#
# ## 4 · Metasmoothness
#
# Engstrom et al. 2025 (REPLAY, section 4) turn the roughness into a number that needs no derivative. Take two steps of
# length $h$ along $v$, train at each end, and look whether the trained parameters go on changing in the direction in which they began, each
# weighed by how far it moved at first:
#
# $$\hat S_{h,v} = \frac{\sum_j |\Delta_j|\,\mathrm{sign}(\Delta_j)\,\mathrm{sign}(\Delta'_j)}{\sum_j |\Delta_j|},\qquad
# \Delta = \theta(1+hv) - \theta(1),\quad \Delta' = \theta(1+2hv) - \theta(1+hv).$$
#
# It is 1 if every parameter goes on, 0 if they turn at random, −1 if all turn back. It takes three trainings and six lines:


# %%
def smooth(run, v, h=0.5):
    ends = [run.train(1 + k * h * v.to(device), progress=False).params for k in (0, 1, 2)]
    theta = [torch.cat([p.flatten() for p in params.values()]) for params in ends]
    first, second = theta[1] - theta[0], theta[2] - theta[1]
    share = first.abs() / first.abs().sum()
    return (share * first.sign() * second.sign()).sum().item()


mine = [smooth(run, way) for run in runs.values()]
theirs = [smoothness.metasmoothness(run, way) for run in runs.values()]
agree("metasmoothness", torch.tensor(mine), torch.tensor(theirs))
claim("metasmoothness of our recipe", mine[0], at_least=0.99)
claim("metasmoothness with maximum pooling", mine[1], at_most=0.5)

# %% [markdown]
# ## 5 · One knob at a time
#
# Now we turn the knobs, one after the other, with everything else as in section 1. For each recipe we ask three things: its
# accuracy on 500 test images; its metasmoothness along a random direction; and, because this is what we are after, how
# well its derivative *predicts*. For the last we leave out 60 random sets of 1 %, train again without each, and
# compute the LDS over four test images. Its interval holds 95 % of a bootstrap over sets and images. Eight of the ten
# derivatives that this takes come with the chapter, as the retrainings do.

# %%
knobs = {
    "our recipe": {},
    "rate × 2": {"rate": 0.1},
    "rate × 4": {"rate": 0.2},
    "no momentum": {"momentum": 0.0},
    "no momentum, rate × 10": {"momentum": 0.0, "rate": 0.5},
    "ReLU": {"activation": nn.ReLU},
    "maximum pooling": {"pool": nn.MaxPool2d},
    "no normalisation": {"norm": "none"},
    "logits ÷ 8, rate × 8": {"scale": 0.125, "rate": 0.4},
    "constant rate": {"falls": False},
    "AdamW": {"rate": 3e-3, "eps": 1e-8},
    "AdamW, eps 1e-3": {"rate": 3e-3, "eps": 1e-3},
}
runs = {name: runs[name] if name in runs else recipe(**knobs[name]) for name in knobs}


def accuracy(model):
    return (model(x_test).argmax(1) == y_test).double().mean()


found = smoothness.survey(runs, accuracy, count=1)

# %%
def scores_of(name, kept="", **options):
    """Scores that come with the chapter; computed where those are of another run."""
    file = "08_is_the_derivative_useful_" + "".join(filter(str.isalnum, name)) + kept
    make = partial(magic.attribute, runs[name], measure, progress=False, **options)
    return shipped_scores(file, runs[name], measure, make)


predicting = [name for name in knobs if name not in ("no momentum", "AdamW, eps 1e-3")]
exact = {name: scores[name] if name in scores else scores_of(name) for name in predicting}
judged = {
    name: magic.lds(exact[name], drop=0.01, subsets=60, bank=bank_of(name), progress=False)
    for name in predicting
}
figures = {name: result.spearman for name, result in judged.items()}
for column, end in (("LDS", "mean"), ("LDS low", "low"), ("LDS high", "high")):
    found[column] = {name: getattr(figure, end) for name, figure in figures.items()}

# %% [markdown]
# One of the eight, made again here. To be quick we replay a single output, the *sum* of the four losses; its
# scores must be the sums of theirs.

# %%
def total(model):
    return measure(model).sum(dim=0, keepdim=True)


again = magic.attribute(runs["AdamW"], total, progress=False).values[0].cpu()
far = (again - exact["AdamW"].values.sum(dim=0)).norm() / again.norm()
claim("AdamW: scores of the sum, made here: relative difference", far, at_most=1e-6)

# %% tags=["nbval-ignore-output"]
found.round(3)

# %%
predicts, smoothly, right = figures, found["metasmoothness"], found["accuracy"]
claim("our recipe: LDS", predicts["our recipe"], at_least=0.99)
claim("maximum pooling: metasmoothness", smoothly["maximum pooling"], at_most=0.4)
claim("maximum pooling: LDS", predicts["maximum pooling"], at_most=0.85)
claim("ReLU: metasmoothness", smoothly["ReLU"], at_most=0.75)
claim("ReLU: LDS", predicts["ReLU"], at_most=0.96)
claim("no momentum, rate × 10: metasmoothness", smoothly["no momentum, rate × 10"], at_most=0.97)
claim("no momentum, rate × 10: LDS", predicts["no momentum, rate × 10"], at_most=0.94)
claim("rate × 4: LDS", predicts["rate × 4"], at_most=0.98)
claim("constant rate: LDS", predicts["constant rate"], at_most=0.985)
claim("rate × 2: LDS", predicts["rate × 2"], at_least=0.98)


# %% tags=["nbval-ignore-output", "hide-input"]
shown = found.dropna()
best, low, high = (1 - shown[part].clip(upper=0.9999) for part in ("LDS", "LDS low", "LDS high"))
rough = 1 - shown["metasmoothness"]
figure, ax = plt.subplots(figsize=(5.8, 5.4))
ax.errorbar(rough, best, yerr=(best - high, low - best), fmt="o", color=plot.HELPFUL, linewidth=1)
for name in shown.index:
    side, ha = (-1, "right") if name == "no normalisation" else (1, "left")
    ax.annotate(f"{name} ({right[name]:.0%})", (rough[name], best[name]), xytext=(6 * side, 4),
                textcoords="offset points", fontsize=9, ha=ha)  # fmt: skip
ax.set(xscale="log", yscale="log", xlabel="1 − metasmoothness", ylabel="1 − LDS, 95 % interval",
       title="Better is up and to the right (in brackets: read right)", xlim=(1, 2e-5))  # fmt: skip
ax.invert_yaxis();

# %% [markdown]
# What we see:
#
# - **Kinks cost the most.** With ReLU the LDS falls from .999 to .94, with maximum pooling to .75. Are kinks better at reading?
#   ReLU is not: it gets 89 % right, GELU 90 %. Maximum pooling gets 94 %, four points more than the
#   average; on 500 images a difference has a standard error of about two points, so that is at the edge of what they can
#   tell, but it may well learn faster in so short a training.
# - **Then the rate.** Four times the rate reads better (95 %) and predicts worse (.96). Letting the rate rise and fall may
#   help: *rate × 2* takes steps of the same total length as *constant rate*, and predicts at .99 against .98, with nearly the same
#   accuracy. But the intervals overlap, so here this is a suggestion and not a result.
# - **Momentum smooths, at the same effective rate.** A gradient moves the parameters by $\eta/(1-\mu)$ in
#   the end, so .05 with momentum .9 corresponds to .5 without. The plain run at .5 is far rougher, with an LDS
#   of .90 against .999, and gains two points of accuracy; *rate × 4*, which keeps the momentum, gains five and keeps .96. The reason is stability. Where
#   the loss has curvature $\lambda$, plain SGD diverges at rates above $2/\lambda$, and with momentum above
#   $2(1+\mu)/\lambda$ (exercise 08.3); at one effective rate, plain SGD is 19 times nearer to its edge. But
#   dropping momentum *at the same rate* also makes training smoother, since it then takes a tenth of the step, and learns little: 63 % right.
# - **Small logits gain nothing here.** Engstrom et al. advise them. With an eighth of the logits and eight times the rate this
#   network reads 86 %, and predicts no better than ours, which reads 90 %.
# - **AdamW** divides by $\sqrt v + \epsilon$, so its first step is nearly the *sign* of the gradient, which is a kink too
#   (chapter 04). A larger $\epsilon$ rounds it, and so does the REPLAY paper's `eps_root`, inside the root. Metasmoothness shows it;
#   for the LDS there is nothing left to gain, it is .998 without.
#
# ## 6 · What metasmoothness cannot tell
#
# **Whether the network has learned anything.** Without normalisation this recipe reads 28 % of the test images. No other
# has a higher metasmoothness or a higher LDS: the derivative predicts the losses of a useless network perfectly. A
# training that hardly moves is smooth. Never look at either number without the accuracy.

# %%
claim("no normalisation: share read right", right["no normalisation"], at_most=0.4)
claim("no normalisation: metasmoothness", smoothly["no normalisation"], at_least=0.999)
claim("no normalisation: LDS", predicts["no normalisation"], at_least=0.99)

# %% [markdown]
# **Which of two smooth recipes predicts better.** AdamW and *rate × 4* have nearly the same metasmoothness, .98 and .97, and the intervals of
# their LDS do not touch (AdamW has also learned less, 81 % against 95 %). AdamW even predicts better than the constant rate, which is much smoother. And further down, ReLU
# is rougher than *no momentum, rate × 10* by far, and predicts no worse. Others found the same
# at scale: in EleutherAI's study of GPT-2 fine-tuning, ten recipes with a metasmoothness between .990 and .996 have an LDS anywhere between .77 and .94;
# the eleventh, at .90, has .30; and the rank correlation of the two numbers over all eleven is −.05 (github.com/EleutherAI/metasmoothness,
# note of 24 August 2026). So
# it is an alarm, not a ranking. Far below 1 it is right to ring; close to 1 it has nothing more to say.

# %%
claim("AdamW: metasmoothness, over that of rate × 4", smoothly["AdamW"] / smoothly["rate × 4"],
      at_least=0.98, at_most=1.02)  # fmt: skip
claim("AdamW: LDS at least, by its interval", predicts["AdamW"].low, at_least=0.985)
claim("rate × 4: LDS at most, by its interval", predicts["rate × 4"].high, at_most=0.985)
claim("AdamW is rougher than the constant rate, by", smoothly["constant rate"] - smoothly["AdamW"],
      at_least=0.005)  # fmt: skip

# %% [markdown]
# **Could we have looked at the scores instead?** If the derivative turns quickly with $w$, scores at $w=1$ and at a nearby $w$
# should point in different directions, and their cosine says by how much. It takes one more replay. And it is blind
# to kinks, for the reason that section 3 found: the tangents on the two sides of a jump are parallel, and the jump is in neither.

# %%
cosine = {}
for name in ("ReLU", "rate × 4"):
    nearby = scores_of(name, "_near", at=1 + way)
    cosine[name] = exact[name].cosine(nearby).mean().item()
claim("ReLU: cosine of the scores", cosine["ReLU"], at_least=0.98)
claim("rate × 4: cosine of the scores", cosine["rate × 4"], at_most=0.98)
claim("yet ReLU predicts no better: its LDS over that of rate × 4",
      predicts["ReLU"].mean / predicts["rate × 4"].mean, at_most=1.0)  # fmt: skip

# %% [markdown]
# Where training is smooth the cosine is useful. [Chapter 12](12_how_far_does_a_tangent_reach.ipynb) takes it at random sets, adds a second
# number that sees kinks, and forecasts the LDS of thirty recipes with the two.
#
# ## 7 · Choosing a recipe
#
# Smoothness and accuracy pull against each other, so choose in this order:
#
# 1. No kinks: GELU, average pooling, normalisation before the activation, a rounded Adam.
# 2. A rate that rises and then falls to zero.
# 3. Raise the rate, with momentum, for as long as metasmoothness stays near 1, and look at the accuracy at each.
#    `smoothness.survey` makes the table for any set of runs.
# 4. Ask `magic.forecast` for the LDS to be expected, at the price of a few replays ([chapter 12](12_how_far_does_a_tangent_reach.ipynb)). Then measure it, with intervals.
#
# ## What we claim
#
# - A derivative can be exact and useless. What decides is how smooth training is in $w$, and we choose that.
# - Kinks are the worst, since autograd never sees the curvature that sits in them. Then comes the effective rate, measured against the edge of stability.
# - Metasmoothness is an alarm that costs three trainings. It neither ranks smooth recipes nor knows whether anything was learned.
#
# ## What we ignored
#
# - **Two directions** and 1 % of the data: metasmoothness depends on both.
# - **Parameters, not outputs.** Metasmoothness counts parameters that matter to no output (exercise 08.1).
# - **One network, one data set, one seed.** The order of the knobs is not a law. The survey is there to be repeated on yours.
# - **500 test images** tell accuracies apart to about two points.
#
# ## Exercises
#
# A `check` runs your function on cases of its own and says what is wrong. Worked answers are in
# [solutions/08](solutions/08_is_the_derivative_useful.ipynb).
#
# **08.1** · ●○○ · 5 min. Metasmoothness looks at parameters, but we measure outputs. Write section 4's formula for
# any three vectors, those that belong to $w$, $w + hv$ and $w + 2hv$, so that it takes outputs as well as parameters.
#
# <details><summary>Hint</summary>Two changes, the second from where the first ended. Only the first one weighs.</details>

# %%
def metasmoothness(start, once, twice):
    """The metasmoothness of three vectors, those at w, w + hv and w + 2hv."""
    ...


# check("08.1", metasmoothness)

# %% [markdown]
# **08.2** · ●●○ · 15 min. Take section 3's training with very many thresholds, spread evenly over [0, 1], for $T$ steps at rate
# $\eta$ from $\theta = 0$. Which slope $d\theta/dw$ does autograd find, and which one holds across many
# thresholds? Return both, as functions of $\eta$ and $T$.
#
# <details><summary>Hint</summary>Between two thresholds the gradient of the ReLUs does not depend on θ at all. Across very many, the
# staircase is the line g(θ) = θ: write down one step, θ′ = …, and apply it T times.</details>

# %%
def two_slopes(rate, steps):
    """(what autograd finds, what holds across many kinks) of dθ/dw."""
    ...


# check("08.2", two_slopes)

# %% [markdown]
# **08.3** · ●●○ · 15 min. SGD with momentum, $m' = \mu m + \lambda\theta$ and $\theta' = \theta - \eta m'$, on the parabola
# $\frac12\lambda\theta^2$. Up to which rate $\eta$ does $\theta$ settle at 0? What does that say of *no momentum, rate × 10*?
#
# <details><summary>Hint</summary>One step is a 2×2 matrix on (θ, m). It stops contracting where an eigenvalue is −1, which is where
# 1 + trace + determinant = 0.</details>

# %%
def edge(curvature, momentum):
    """The largest rate at which θ settles."""
    ...


# check("08.3", edge)

# %% [markdown]
# **08.4** · ●○○ · 5 min. Draw the upper figure of section 2 at ten times the rate. How far does the tangent hold?
#
# <details><summary>Hint</summary>As in section 2, with <code>recipe(rate=0.5)</code>: <code>magic.attribute</code> for the tangent, <code>magic.outputs</code> for the truth.</details>
#
# **08.5** · ●●○ · 15 min. Where does a jump come from? Find one jump of the trained $\theta$ in section 3 by halving an interval of $w$
# thirty times, and compare, step by step, which thresholds $\theta$ has passed on either side.
#
# <details><summary>Hint</summary>On a tooth, θ changes by exactly as much as w. Keep the half in which that holds less.</details>
#
# **Next:** [09 · Which examples mattered?](09_which_examples_mattered.ipynb)
