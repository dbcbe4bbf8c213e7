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
# **Question.** The derivative of training is exact. When does it also tell what happens?
#
# A derivative is a statement about infinitely small changes. Leaving out an image is not infinitely small. Between the two stands the shape of
# $f$, and the shape is up to us: rate, width, activation, pooling. This chapter measures it, before anything is predicted, and changes one thing
# at a time.
#
# | word | in code | meaning |
# |---|---|---|
# | $f(w)$ | `run.train(weights)` | the training, as a function of its data weights |
# | direction $v$ | `smoothness.directions` | a way to go in $w$; here $-1$ on a random 1 % of the images, 0 elsewhere |
# | metasmoothness $\hat S_{h,v}$ | `smoothness.metasmoothness` | do the trained parameters go on as they set out? 1 = all of them |
# | survey | `smoothness.survey` | the same for many recipes, beside their accuracy |
#
# About fifteen minutes to read; two to run.

# %%
import warnings

import matplotlib.pyplot as plt
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import smoothness
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
warnings.filterwarnings(
    "ignore", message=".*powers of ten.*|.*could not be checked.*"
)  # of rough runs, which we make on purpose
plot.style()

# %% [markdown]
# ## 1 · A recipe with knobs
#
# A small convolutional network on 800 digits, and everything about it that may matter as an argument.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=800, test=500))


class Net(nn.Sequential):
    """Two convolutions, a linear layer. `norm`: "before" the activation, "after" it, or "none"."""

    def __init__(self, width=16, activation=nn.GELU, norm="before", pool=nn.AvgPool2d, scale=1.0):
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


def recipe(
    rate=0.05, momentum=0.9, size=100, epochs=8, falls=True, decay=0.0, eps=None, eps_root=0.0,
    **net,
):
    """SGD, or AdamW if `eps` is given; a rate that rises and falls to zero, or a constant one."""
    torch.manual_seed(0)
    model = Net(**net).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    if eps is not None:
        group = {"params": list(model.parameters()), "eps_root": eps_root}
        optimizer = torch.optim.AdamW([group], lr=rate, eps=eps)
    batches = magic.batches(len(x), size=size, epochs=epochs)
    scheduler = models.triangle(optimizer, len(batches)) if falls else None
    return magic.Run(model, optimizer, (x, y), loss, batches, scheduler=scheduler)


base, kinked = recipe(), recipe(activation=nn.ReLU, pool=nn.MaxPool2d)
print(base)

# %% [markdown]
# ## 2 · What we are up against
#
# Take one random percent of the images, eight of them, and turn their weight down from 1 to 0, slowly, in twenty-one trainings. Here is the loss of a test image as a
# function of that weight: for our recipe, and for the same with ReLU and maximum pooling. The line is the tangent at 1, all that a derivative knows.

# %%
way = smoothness.directions(len(x), drop=0.01, count=1)[0]


def measure(model):
    return loss(model, x_test[:4], y_test[:4])


def along(run, lengths):
    """(L, K): outputs of the models trained at 1 + length·way."""
    return torch.stack([magic.outputs(run, measure, 1 + s * way.to(device)) for s in lengths]).cpu()


lengths = torch.linspace(0, 1, 21)
curves = {"GELU, average pooling": base, "ReLU, maximum pooling": kinked}
scores = {name: magic.attribute(run, measure, progress=False) for name, run in curves.items()}
paths = {name: along(run, lengths) for name, run in curves.items()}

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for ax, (name, found) in zip(axes, paths.items(), strict=True):
    slope = (scores[name].values @ way.to(device)).cpu()
    k = found.std(0).argmax()
    ax.plot(1 - lengths, found[:, k], marker="o", markersize=4, color=plot.HELPFUL, label="trained")
    ax.plot(
        1 - lengths,
        found[0, k] + lengths * slope[k],
        color=plot.HARMFUL,
        linestyle="--",
        label="tangent at 1",
    )
    ax.set(xlabel="weight of the eight images", ylabel=f"loss of test image {k}", title=name)
    ax.invert_xaxis()
    ax.legend(fontsize=8)


# %%
def roughness(curve):
    """Second differences against first: 0 for a straight line."""
    return (
        (curve.diff(dim=0).diff(dim=0).abs().mean(0) / curve.diff(dim=0).abs().mean(0))
        .mean()
        .item()
    )


claim(
    "the kinked training is at least ten times as rough",
    roughness(paths["ReLU, maximum pooling"]) > 10 * roughness(paths["GELU, average pooling"]),
)

# %% [markdown]
# Both tangents are right, to rounding, *at* 1. The right-hand one is right on a piece of curve that ends before we see it: at some weight a ReLU turns off or
# another pixel becomes the maximum, the network takes another turn at step 40, and the loss is elsewhere. A derivative knows nothing of jumps.
#
# ## 3 · Metasmoothness
#
# Engstrom et al. 2025 make a number of this. Go two steps of length $h$ along $v$ and look whether the trained parameters keep the direction in which they
# set out, each weighed by how far it moved:
#
# $$\hat S_{h,v} = \frac{\sum_j |\Delta_j|\,\mathrm{sign}(\Delta_j)\,\mathrm{sign}(\Delta'_j)}{\sum_j |\Delta_j|},\qquad
# \Delta = \theta(1+hv) - \theta(1),\quad \Delta' = \theta(1+2hv) - \theta(1+hv).$$
#
# Three trainings, no derivative. It is six lines:


# %%
def smooth(run, v, h=0.5):
    ends = [run.train(1 + k * h * v.to(device), progress=False).params for k in (0, 1, 2)]
    theta = [torch.cat([p.flatten() for p in params.values()]).double() for params in ends]
    set_out, went_on = theta[1] - theta[0], theta[2] - theta[1]
    share = set_out.abs() / set_out.abs().sum()
    return (share * set_out.sign() * went_on.sign()).sum()


mine = torch.stack([smooth(run, way) for run in (base, kinked)]).cpu()
theirs = torch.tensor(
    [smoothness.metasmoothness(run, way) for run in (base, kinked)], dtype=torch.float64
)
agree("metasmoothness", mine, theirs)
claim("ours is above .99", mine[0] > 0.99)
claim("with kinks it is below .5", mine[1] < 0.5)

# %% [markdown]
# ## 4 · One knob at a time
#
# Now all knobs, one after the other, everything else as in section 1. For each recipe: its accuracy; its metasmoothness over two random directions; and, because that is what we
# are after, how well its derivative in fact *predicts*: the LDS over sixteen sets of 1 %, retrained, for ten of the recipes ([chapter 10](10_is_it_right.ipynb)
# is about that).

# %%
knobs = {
    "as it is": {},
    "rate × 1/5": {"rate": 0.01},
    "rate × 4": {"rate": 0.2},
    "no momentum, rate × 10": {"momentum": 0.0, "rate": 0.5},
    "batch ÷ 4": {"size": 25, "epochs": 2},
    "width ÷ 4": {"width": 4},
    "width × 2": {"width": 32},
    "ReLU": {"activation": nn.ReLU},
    "maximum pooling": {"pool": nn.MaxPool2d},
    "norm after activation": {"norm": "after"},
    "no norm": {"norm": "none"},
    "logits × 1/8": {"scale": 0.125},
    "logits × 1/8, rate × 8": {"scale": 0.125, "rate": 0.4},
    "weight decay .05": {"decay": 0.05},
    "three times as long": {"epochs": 24},
    "constant rate": {"falls": False},
    "AdamW, eps 1e-8": {"rate": 3e-3, "eps": 1e-8},
    "AdamW, eps 1e-3": {"rate": 3e-3, "eps": 1e-3},
    "AdamW, eps_root 1e-6": {"rate": 3e-3, "eps": 1e-8, "eps_root": 1e-6},
}
runs = {name: recipe(**options) for name, options in knobs.items()}


# %%
def accuracy(model):
    return (model(x_test).argmax(1) == y_test).double().mean()


found = smoothness.survey(runs, accuracy, count=2)
judged = [
    "as it is",
    "rate × 4",
    "no momentum, rate × 10",
    "width ÷ 4",
    "ReLU",
    "maximum pooling",
    "logits × 1/8, rate × 8",
]
judged += ["constant rate", "AdamW, eps 1e-8", "AdamW, eps 1e-3"]
exact = {name: magic.attribute(runs[name], measure, progress=False) for name in judged}
for name in judged:
    found.loc[name, "LDS"] = magic.lds(
        exact[name], drop=0.01, subsets=16, progress=False, jobs=1
    ).mean

# %% tags=["nbval-ignore-output"]
found.round(3)

# %% tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), width_ratios=[1.25, 1])
order = found.sort_values("metasmoothness").index
left.hlines(range(len(order)), found["low"][order], found["high"][order], color=plot.NEUTRAL)
left.scatter(found["metasmoothness"][order], range(len(order)), color=plot.HELPFUL, zorder=3, s=22)
left.set_yticks(
    range(len(order)), [f"{name}  ({found['accuracy'][name]:.0%})" for name in order], fontsize=8
)
left.set(xlabel="metasmoothness; in brackets, accuracy", title="One knob at a time")
sns.scatterplot(found.dropna(), x="metasmoothness", y="LDS", ax=right, color=plot.HELPFUL, s=40)
for name in ("as it is", "ReLU", "maximum pooling", "constant rate"):
    right.annotate(
        name,
        (found["metasmoothness"][name], found["LDS"][name]),
        xytext=(4, -10),
        textcoords="offset points",
        fontsize=8,
    )
right.set(title="What it says of predictions", xlim=(None, 1.3));

# %%
smoothest, LDS, right = found["metasmoothness"], found["LDS"], found["accuracy"]
roughest = set(smoothest.nsmallest(2).index)
claim("ReLU and maximum pooling are the two roughest", roughest == {"ReLU", "maximum pooling"})
claim("maximum pooling predicts worst of those judged", LDS.idxmin() == "maximum pooling")
rough = LDS[smoothest < 0.9].max()
claim("all judged with a metasmoothness below .9 have an LDS below .95", rough < 0.95)
falling, constant = LDS["as it is"], LDS["constant rate"]
claim("a rate that falls to zero predicts better than a constant one", falling > constant)
usual = smoothest["AdamW, eps 1e-8"]
claim("Adam with a larger eps is smoother", smoothest["AdamW, eps 1e-3"] > usual)
claim("and so it is with eps_root", smoothest["AdamW, eps_root 1e-6"] > usual)
small = right["as it is"] - right["logits × 1/8"]
claim("small logits alone cost accuracy: at least a tenth", small > 0.1)
raised = right["as it is"] - right["logits × 1/8, rate × 8"]
claim("with the rate raised it is back, to 3 %", abs(raised) < 0.03)

# %% [markdown]
# What we see:
#
# - **Kinks are the worst.** They cost next to nothing in accuracy and a good part of the prediction. GELU and averages are free.
# - **Then the rate,** and with it momentum, and how long. A rate that falls to zero is smoother than a constant one that ends at the same accuracy: the last
#   steps no longer throw the weights about.
# - **Adam** divides by $\sqrt v + \epsilon$, so its first step is the *sign* of the gradient wherever the gradient is larger than $\epsilon$, and a sign is a kink.
#   A larger $\epsilon$ rounds it off. The REPLAY paper does so inside the
#   root, with `eps_root`; `torch.optim` does not know it, and a `magic.Run` reads it from the parameter group.
# - **Scaling the logits down**, which the paper advises, is smooth since the network learns less. Compared at the same accuracy, it gains nothing here.
# - Width, batch and the place of the normalisation matter little in this small net.
#
# ## 5 · What the derivative itself cannot tell
#
# Could we have looked at the scores only? If the derivative turns quickly, so the thought goes, scores at $w=1$ and at a nearby $w$ point apart, and their
# cosine says so. It takes two replays, and it is blind to kinks:

# %%
cosine = {
    name: smoothness.similarity(runs[name], measure, way).mean().item()
    for name in ("as it is", "ReLU", "rate × 4")
}
claim("ReLU: the scores hardly turn, the cosine is above .97", cosine["ReLU"] > 0.97)
claim(
    "and yet they predict worse than those of the fourfold rate, which turn more",
    cosine["rate × 4"] < cosine["ReLU"] and found["LDS"]["ReLU"] < found["LDS"]["rate × 4"],
)

# %% [markdown]
# The tangents on the two sides of a jump are parallel, and the jump is in neither. So: metasmoothness for what is *between* the points, the cosine for how far a
# tangent reaches where there are no jumps. `magic.curvature` (chapter 11) makes the second a forecast.
#
# ## 6 · Choosing a recipe
#
# With `smoothness.survey` one looks before paying for a derivative: some trainings for each recipe, and the choice is a line through a plane.

# %%
grid = {
    f"rate {rate:g}, {epochs} epochs": recipe(rate=rate, epochs=epochs)
    for rate in (0.02, 0.05, 0.1)
    for epochs in (4, 8)
}
table = smoothness.survey(grid, accuracy, count=2).sort_values("accuracy", ascending=False)
good = table[table["metasmoothness"] > 0.99]
claim("there is a recipe above 95 % with metasmoothness above .99", good["accuracy"].max() > 0.95)

# %% tags=["nbval-ignore-output"]
table.round(3)

# %% [markdown]
# ## What we ignored
#
# - **Two directions** are few, and 1 % is one distance. Metasmoothness depends on both.
# - **It looks at parameters,** as in the paper, not at what is measured. Parameters that matter to no output count as well.
# - **One net, one data set.** The order of the knobs is not a law. The survey is there to be repeated on yours.
#
# ## Exercises
#
# 1. ● (3 min) In the left-hand figure of section 2, take the rate × 10. How long does the tangent stay useful?
#    <details><summary>Hint</summary><code>along(recipe(rate=0.5), lengths)</code></details>
# 2. ●● (10 min) Where does a jump come from? Find a weight between two of section 2's, halve the interval six times, and compare the pattern of active ReLUs in the
#    last step on both sides. <details><summary>Hint</summary>A forward hook on the activation, <code>> 0</code>.</details>
# 3. ●●● (20 min) SiLU, Softplus and GELU, all smooth. Which is the smoothest at equal accuracy?
#
# **Next:** [09 · Which examples mattered?](09_which_examples_mattered.ipynb)
