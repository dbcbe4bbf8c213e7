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
# # 15 · At the scale of the papers
#
# **Question.** *What does it take to ask this of a training that matters: 50,000 images, hundreds of targets, a language model with billions of parameters?*
#
# The trainings of this book take seconds, so that you can repeat them. Those in the papers take much longer, and need GPUs. Nothing in the method changes with the size, but the price does, and we can say how before we pay it.
# Part of the price is arithmetic, which can be counted. Part of it is memory, which decides how many targets can be pulled back at once. Both can be shared between machines, and then the machines have to send each other numbers, which can be counted, too.
#
# We begin with the training on which methods are compared, as far as two CPU cores carry it. **No figure in this chapter was measured on a GPU.** Where one belongs, the chapter says *not yet measured*; section 7 has the command that measures it.
#
# | word | in code | meaning |
# |---|---|---|
# | published recipe | `recipes.resnet9` | the ResNet-9 of Chen et al. (2026, [arXiv 2609.15044](https://arxiv.org/abs/2609.15044)): network, batches, optimizer and rates, so that results can be compared |
# | plain training | `run.train()` | the unit of all prices here: the same training without any derivative |
# | rank | `magic.distributed` | one of several processes that share each batch of one run; the rank of a matrix, as in LoRA, is another thing |
# | all-reduce | `all_reduce` | the sum over all ranks of a tensor that each of them has, given to all of them |
#
# About thirty minutes.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import magic
from magic import subsets
from magic.book import data, models, plot
from magic.book.checks import agree, claim

torch.set_num_threads(1)
plot.style()


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


# %% [markdown]
# ## 1 · The training on which methods are compared
#
# It is a ResNet-9 with BatchNorm and GELU, of 80 to 640 channels, on the 50,000 images of CIFAR-10: 20 epochs in batches of 500, SGD with momentum .85, and a rate that rises linearly and falls to 0. (The paper does not say at which step it is highest; we let it rise for a quarter of the run.) Chen et al., among them an author of MAGIC, report an LDS of .909 ± .004 for it when random 1 % of the
# images are removed and .778 ± .006 when 5 % are, over 500 targets, with one replay for each of them (300 retrainings, 10 seeds, accuracy 89.88 %). Their cheaper method, SPELL, which spends 100 replays on the same 500 targets, has .454 and .371.
#
# `recipes.resnet9` is this recipe as a `magic.Run`. Ours, on the CPU, is smaller in four ways: an eighth of the channels, 10,000 images of clothing (Fashion-MNIST) in place of the 50,000 of CIFAR-10, half of their resolution, and 10 epochs.
# `tests/experiments/resnet9_fashion.py` trained it, took the scores of eight test images at $w = 1$ and at the centre of the 5 % (chapter 11), and trained again without 30 random sets of each size. TRAK, with this one trained model and 512 dimensions (five models, as in chapter 10, would do better), and EK-FAC are judged by the same retrainings. Of
# two dampings of EK-FAC we take the one with the higher LDS on these very retrainings, which favours it.

# %%
RESNET = pd.read_csv("banks/15_at_the_scale_resnet9.csv")
here = RESNET[(RESNET.device == "cpu") & (RESNET.images == 10_000)]
judged = here[here.lds.notna()].set_index(["method", "removed"])


def figure(method, removed):
    """The LDS of a method with its 95 % interval."""
    row = judged.loc[method, removed]
    return magic.Figure(row.lds, row.low, row.high)


# %% tags=["nbval-ignore-output"]
published = {
    "MAGIC, one replay a target": (".909 ± .004", ".778 ± .006"), "SPELL": (".454", ".371")
}
rows = [("CIFAR-10, 50,000 images, published", name, *two) for name, two in published.items()]
for method in ("MAGIC, w = 1", "MAGIC, centre", "EK-FAC", "TRAK"):
    two = [str(figure(method, r)) if (method, r) in judged.index else "" for r in ("1%", "5%")]
    rows.append(("clothing, 10,000 images, CPU", method, *two))
full = RESNET[(RESNET.device != "cpu") & (RESNET.images >= 50_000) & RESNET.lds.notna()]
for row in full.itertuples():
    place = f"clothing, {row.images:,} images, {row.device}"
    rows.append((place, f"{row.method}, {row.removed}", f"{row.lds:.3f}", ""))
if full.empty:
    rows.append(("clothing, 60,000 images, GPU", "MAGIC", *["not yet measured"] * 2))
table = pd.DataFrame(rows, columns=["training", "method", "LDS, 1 %", "LDS, 5 %"])
table.set_index(["training", "method"])

# %%
made = here.iloc[0]
print(f"{made.parameters:,} parameters, {made.steps} steps, accuracy {made.accuracy:.3f}")
print(f"{made.targets} targets, {made.sets} sets; {made.date}, torch {made.torch}, CPU")
at_1 = figure("MAGIC, w = 1", "1%")
rival = max((figure(name, "1%") for name in ("EK-FAC", "TRAK")), key=lambda one: one.mean)
claim("LDS at 1 %", at_1, at_least=0.93)
claim("LDS at 1 % of the better rival", rival, at_most=0.5)
claim("how far the lower end of the first is above the upper end of the second",
      at_1.low - rival.high, at_least=0.2)  # fmt: skip
claim("LDS at 5 %, from w = 1", figure("MAGIC, w = 1", "5%"), at_least=0.88)
claim("LDS at 5 %, from the centre", figure("MAGIC, centre", "5%"), at_least=0.9)
r2 = judged.r2[["MAGIC, w = 1", "MAGIC, centre"]].xs("5%", level="removed")
claim("R² at 5 %, from w = 1", r2["MAGIC, w = 1"], at_least=0.75)
claim("R² at 5 %, from the centre", r2["MAGIC, centre"], at_least=0.8)

# %% [markdown]
# For our smaller training the derivative at $w = 1$ ranks both kinds of removals well: the LDS is .968 at 1 % and .926 at 5 %. At the centre of the 5 % it is .937, which is not distinguishable from .926 with 30 sets, and the sizes come out a little better, with an $R^2$ of .86 in place of .82. EK-FAC and TRAK, on the same retrainings, stay below one half.
# That our figures are higher than the published ones means little: our training is shorter and smaller, and has other images. What the recipe gives at its own size, with the centre, is *not yet measured*.

# %% tags=["nbval-ignore-output", "hide-input"]
POINTS = pd.read_csv("banks/15_at_the_scale_resnet9_points.csv")
POINTS = POINTS[(POINTS.device == "cpu") & (POINTS.images == 10_000)]
shown = POINTS[POINTS.removed == "5%"]
methods = ["MAGIC, w = 1", "MAGIC, centre", "EK-FAC", "TRAK"]
fig, axes = plt.subplots(1, 4, figsize=(10.5, 2.9), sharey=True)
for ax, method in zip(axes, methods, strict=True):
    own = shown[shown.method == method]
    across, up = own.predicted - own.before, own.true - own.before
    colors = [f"C{k}" for k in own.target]
    ax.scatter(across, up, s=9, color=colors, linewidth=0)
    ax.set(title=method, xlabel="predicted change")
axes[0].set(ylabel="true change");

# %% [markdown]
# *Thirty trainings without random 5 % of the images; a dot for each of eight test images, and a colour for each image. The scale across belongs to each panel, since the rivals' sizes mean little; their order is what is judged.*
#
# ## 2 · Image 42 once more
#
# Chapter 09 asked whether the loss on test image 7 would have gone up without training image 42, and had 2,000 images. Of 10,000 an image counts for less. The prediction is $-\tau_{7,42}$, and the truth one more training:

# %% tags=["nbval-ignore-output", "hide-input"]
x, y, x_test, y_test = data.fashion_mnist(train=4000, test=1000, size=14)
names = data.FASHION_CLASSES
titles = [f"training image 42\n{names[y[42]]}", f"test image 7\n{names[y_test[7]]}"]
plot.images(torch.stack([x[42], x_test[7]]), titles);

# %%
alone = POINTS[POINTS.removed == "image 42"].set_index("target")
predicted, true = alone.predicted - alone.before, alone.true - alone.before
print(f"test image 7 has a loss of {alone.before[7]:.5f}; without image 42 it changes "
      f"by {true[7]:+.2e}, predicted {predicted[7]:+.2e}")  # fmt: skip
print(f"of the eight, test image {true.abs().idxmax()} changes most: by {true.abs().max():.4f} "
      f"of {alone.before[true.abs().idxmax()]:.2f}")  # fmt: skip
claim("test image 7: predicted over true change", predicted[7] / true[7], at_least=0.9, at_most=1.1)
off = ((predicted - true).abs() / true.abs()).max()
claim("largest relative error over the eight", off, at_most=0.1)

# %% [markdown]
# So the loss would have gone down, by three millionths, and the derivative said so to within a twentieth. Image 42 is one of 10,000. Where a seed is left to chance, two trainings on the very same images differ by far more than that (chapter 01); here the change is a number with several digits.
#
# ## 3 · What no engineering removes
#
# How much do hundreds of targets cost? Chapter 07 counted matrix products. In units of one forward pass, a step of training takes 3, and the pull of one cotangent through a step takes 6, since each product of the step has two factors and each factor its derivative. If every trace is kept,
# the trace is the training's own step, and $K$ targets cost
#
# $$1 + 2K \text{ plain trainings.}$$
#
# What is shared between targets is the 1; the $2K$ is not, because every target has its own cotangent, and each cotangent has to be multiplied by the Hessian of every step. So to pull the targets back together saves at most a third of what one replay for each would cost ($3K$), and whatever a small step wastes on bookkeeping.
# We can count it, without a clock, in a run of four equal layers; and once more with LoRA (Hu et al. 2021), which freezes the layers, that is, does not train them, and trains beside each of them the product of two narrow matrices.

# %%
WIDTH = 64


class Adapted(nn.Module):
    """A frozen layer with a trained change of rank 1 beside it: LoRA (Hu et al. 2021)."""

    def __init__(self, layer, rank=1):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(WIDTH, rank, bias=False)
        self.up = nn.Linear(rank, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


# %%
def deep(adapted):
    """A run of four layers, all of them trained or all of them adapted."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    layers = [Adapted(layer) if adapted else layer for layer in layers]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])
    inputs, labels = torch.randn(320, WIDTH), torch.randint(WIDTH, (320,))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    return magic.Run(model, optimizer, (inputs, labels), loss, magic.batches(320, 40, 1))


# %%
def products(job):
    """The floating-point operations in matrix products."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


# %%
def trainings(run, K):
    """What the scores of K targets take, in plain trainings, counted in matrix products."""
    inputs, labels = run.data
    scores = products(
        lambda: magic.attribute(
            run, lambda model: loss(model, inputs[:K], labels[:K]), progress=False
        )
    )
    return scores / products(lambda: run.train(progress=False))


COUNTED = {}
for name, adapted in (("all trained", False), ("LoRA", True)):
    run = deep(adapted)
    few, many = trainings(run, 4), trainings(run, 12)
    COUNTED[name] = (many - few) / 8
    print(f"{name}: 8 targets more take {many - few:.2f} plain trainings more")
claim("each target more, all layers trained", COUNTED["all trained"], at_least=1.8, at_most=2)
claim("each target more, LoRA", COUNTED["LoRA"], at_least=0.85, at_most=1.1)

# %% [markdown]
# Where all layers are trained, each target adds nearly two trainings: by count $(6 - 4/4)/(3 - 1/4) = 1.82$ for four layers, since nobody wants the derivative in the input of the first. With LoRA it adds about **one**. The gradient of a frozen layer's weights is not needed, so a step has two products for the layer in place of three. Of the pull's six products
# four are gone: two are the derivatives of that gradient, and two are derivatives in the frozen weights. Two products for a pull and two for a step make one training for each target. (The products inside attention have no frozen factor and still cost two.)
#
# These counts leave out what is not a matrix product. Measured on one core, in plain trainings, three small networks took this:

# %% tags=["nbval-ignore-output"]
NOTED = json.loads(Path("../tests/bench.json").read_text())
BEST = {}  # of each network the ratios with the most rounds
for one in sorted(NOTED, key=lambda one: one["rounds"]):
    BEST |= one["ratios"]
rows = []
for work, ratios in BEST.items():
    one, sixteen = ratios["magic.attribute K=1"], ratios["magic.attribute K=16"]
    each = (sixteen - one) / 15
    rows.append((work, one, sixteen, each, one - each))
costs = pd.DataFrame(rows, columns=["network", "K = 1", "K = 16", "each target more", "fixed"])
costs.set_index("network").round(2)

# %% tags=["nbval-ignore-output", "hide-input"]
K = torch.logspace(0, 2.7, 50)
fig, ax = plt.subplots(figsize=(6.2, 3.8))
ax.plot(K, 1 + 2 * K, color="black", label="1 + 2K, by count")
ax.plot(K, 1 + K, color="black", linestyle=":", label="1 + K, by count, LoRA")
ax.plot(K, 3 * K, color=plot.NEUTRAL, linestyle="--", label="3K: one replay for each target")
for (work, one, sixteen, *_), mark in zip(rows, "osD", strict=True):
    ax.plot([1, 16], [one, sixteen], mark, label=f"{work}, measured")
ax.set(xscale="log", yscale="log", xlabel="targets K", ylabel="plain trainings")
ax.legend(fontsize=8);

# %%
cost = costs.set_index("network")["each target more"]
claim("MLP: each target more, in plain trainings", cost["mlp"], at_most=1.2)
claim("conv net: each target more", cost["conv"], at_least=1.6, at_most=2.1)
claim("transformer: each target more", cost["transformer"], at_least=2.0, at_most=2.4)
claim("least fixed part", costs.fixed.min(), at_least=2.4)
claim("largest fixed part", costs.fixed.max(), at_most=3.7)

# %% [markdown]
# The fixed part is 2.5 to 3.5 trainings in place of one: traces and checks take time on networks as small as these. A further target costs the small MLP one training and not two, probably because much of its plain step is no matrix product and is not repeated for each target; the convolutional network a little less than two; and the transformer a little more, probably because its pull passes over large tensors more often than its step does.
#
# So we expect the exact scores of 100 targets to cost some 200 trainings where all layers are trained and matrix products decide, and fewer where the plain training leaves the processor idle. Methods that are much cheaper, as SPELL with its 100 replays for 500 targets, do not compute every target's derivative.
#
# ## 4 · What one device holds
#
# A replay holds a state, which is the trained parameters with what the optimizer remembers of each; for every target a cotangent, as large as a state; and the trace of one step, which a batch done in parts makes smaller. Kept states can lie in main memory or on disk (chapter 07). Frozen parameters are part of neither states nor cotangents; we count them once, although `magic` holds a second copy, and a third in 64 bits while it checks a step.
# In 32-bit numbers, with AdamW:

# %% tags=["nbval-ignore-output"]
LLAMA = 32 * (16 * (4096 + 4096) + 16 * (4096 + 1024))  # rank 16 at queries and values of 32 layers
MODELS = {  # name -> parameters, and how many of them are trained
    "GPT-2 small": (124e6, 124e6),
    "1 billion": (1e9, 1e9),
    "8 billion": (8e9, 8e9),
    "8 billion, LoRA": (8e9, LLAMA),
}


def gigabytes(numbers):
    return numbers * 4 / 1e9


rows = []
for name, (parameters, trained) in MODELS.items():
    state = 3 * trained  # AdamW: the parameters and two moments
    held = [gigabytes(parameters - trained), gigabytes(state)]
    rows.append((name, trained / 1e6, *held, *(gigabytes(K * state) for K in (1, 50, 500))))
columns = ["model", "trained, millions", "frozen, GB", "state, GB"]
columns += [f"cotangents of {K}, GB" for K in (1, 50, 500)]
pd.DataFrame(rows, columns=columns).set_index("model").round(2)

# %% [markdown]
# On a GPU with 80 GB, GPT-2 small fits with some dozens of targets, and a model of one billion with four or five. Eight billion parameters, all of them trained, take 192 GB with a single target, before there is any trace; the cotangents of 500 targets would take 48 terabytes. With LoRA they take 41 GB, beside the 32 GB of the frozen model.
# So LoRA makes scores cheaper in arithmetic (1 in place of 2) and much cheaper in memory. They are then scores of the training with LoRA, and say nothing of one that trains all parameters.
#
# Targets that do not fit at once go back in several *sweeps*: a sweep is one training and one pass back, with as many targets as fit (exercise 15.1). By the count $1 + 2K$, the training is a twentieth of a sweep with ten targets, and by $1 + K$, with LoRA, an eleventh; that is all that more memory could still save.
#
# And time? A training step takes 6 operations for each parameter and token ($2$ forward, $4$ backward), and 4 if the parameters are frozen. Suppose a fine-tuning on ten million tokens, and a GPU that does 40 trillion operations in 32 bits a second, on average over the whole run: six tenths of the 67 trillion that the data sheet of an H100 (SXM) promises.

# %% tags=["nbval-ignore-output"]
TOKENS, SPEED = 10e6, 40e12
rows = []
for name, (parameters, trained) in MODELS.items():
    each, operations = (2, 6) if trained == parameters else (1, 4)
    hours = operations * parameters * TOKENS / SPEED / 3600
    rows.append((name, hours, *((1 + each * K) * hours for K in (1, 50, 500))))
columns = ["model", "training, hours", *(f"scores of {K}, hours" for K in (1, 50, 500))]
on_paper = pd.DataFrame(rows, columns=columns).set_index("model")
on_paper.round(2)

# %% [markdown]
# These are counts on paper and not times. They leave out attention's own products and whatever is done twice: with the trace of one step only, as in the table of memory, the steps are computed again on the way back, which adds one training to each sweep, and more where few states are kept (chapter 06). If the arithmetic decides, we may expect the scores of 50 targets of GPT-2 small in some five hours,
# and of an 8-billion model with LoRA in less than five days of one GPU. Twenty-five GPUs with two targets each would take seven hours and not a twenty-fifth of five days, since each of them trains for itself.
#
# ## 5 · More than one device
#
# **Targets are independent.** `magic.attribute(..., jobs=8)` gives each process its share of the targets. Each of them trains for itself, so that the fixed part is paid by all; with many targets each, that is little.
# The scores have the bits of one process that groups its targets in the same way. Measured, on two cores that had nothing else to do:

# %%
SPEED_OF = pd.read_csv("banks/15_at_the_scale_speed.csv")
SPEED_OF = SPEED_OF[SPEED_OF.device == "cpu"]
two = SPEED_OF[SPEED_OF.what == "jobs=2"].iloc[0]
print(f"{two.network}, {two['count']} targets: {two.seconds_one:.1f} s in one process, "
      f"{two.seconds_many:.1f} s in two; {two.date}, torch {two.torch}")  # fmt: skip
claim("jobs=2: times as fast", float(two.ratio), at_least=1.6)

# %% [markdown]
# **One run on several devices.** When a training itself is shared, each rank does its part of every batch and one all-reduce sums the gradients. What does its adjoint need? The step is $\theta' = \theta - \eta\sum_r \nabla L_r(\theta)$, with the part $L_r$ of rank $r$. All ranks hold the same $\theta$, and so the same cotangent $\Delta'$. Then
#
# $$\Delta = \Delta' - \eta \sum_r \nabla^2 L_r\,\Delta', \qquad \tau_i = -\eta\,\nabla \ell_i \cdot \Delta' / B,$$
#
# so that one all-reduce for each target, of its Hessian products, is all that plain SGD needs. Adam's adjoint reads the gradient of the whole batch as well, which is one more, shared by all targets. What the step adds to an example's score is computed where the example is. Nobody has to differentiate an all-reduce; PyTorch's own data-parallel wrapper does not support differentiating twice. Here are two ranks in one process:

# %%
x, y, _, _ = data.digits(train=100, test=10)
x = x.double()
torch.manual_seed(0)
model = models.MLP((64, 16, 10)).double()
params = {name: p.detach() for name, p in model.named_parameters()}
cotangent = {name: torch.randn_like(p) for name, p in params.items()}
rate, B = 0.1, len(x)


def part(params, weights, rows):
    """The part of the objective of the rank that has these rows."""
    losses = loss(lambda x: torch.func.functional_call(model, params, (x,)), x[rows], y[rows])
    return (weights * losses).sum() / B


def pulled(rows):
    """This rank's Hessian product, by the cotangent, and the scores of its examples."""
    _, pull = torch.func.vjp(
        lambda p, w: torch.func.grad(part)(p, w, rows), params, torch.ones(len(rows)).double()
    )
    product, slopes = pull(cotangent)
    return product, -rate * slopes


# %%
ranks = [pulled(rows) for rows in (torch.arange(50), torch.arange(50, 100))]
summed = {name: sum(product[name] for product, _ in ranks) for name in params}  # the all-reduce
before = {name: cotangent[name] - rate * summed[name] for name in params}


def step(params, weights):
    gradient = torch.func.grad(part)(params, weights, torch.arange(B))
    return {name: p - rate * gradient[name] for name, p in params.items()}


_, whole = torch.func.vjp(step, params, torch.ones(B).double())
alone, scores = whole(cotangent)
agree("the cotangent", torch.cat([p.flatten() for p in before.values()]),
      torch.cat([p.flatten() for p in alone.values()]), tolerance=1e-12)  # fmt: skip
agree("the scores", torch.cat([own for _, own in ranks]), scores, tolerance=1e-12)

# %% [markdown]
# `magic.distributed(run)` is a run that does so, on the ranks of `torch.distributed`; everything that takes a run takes it. The tests compare two processes with one, in float64 and to $10^{-12}$. The number of ranks belongs to what a run *is*, since sums are rounded in another order. BatchNorm is refused: each rank would have statistics of its own.
#
# **A model that no device holds** has its parameters shared, too. This is on paper; `magic` does not do it. There are two ways.
#
# - *Shared layers* (tensor-parallel; Shoeybi et al. 2019, [arXiv 1909.08053](https://arxiv.org/abs/1909.08053)): of each pair of matrices, a device has some columns of the first and the rows of the second that belong to them, and a transformer's layer sums its activations over the devices twice in the forward and twice in the backward pass. The adjoint of a sum over devices gives its cotangent to each of them, and the adjoint of giving the same tensor to each is a sum; so pulling a cotangent back through both passes
#   takes four sums again, as many as the step. In traffic, then, a target costs **one** plain training, where it costs two in arithmetic: a training that is not held up by its network will not be held up by its adjoint.
# - *Shared storage* (FSDP): each device stores a part of the parameters and of the optimizer's memory, and collects a layer's parameters from the others when it comes to that layer. Cotangents can be stored in the same way, which divides the terabytes of section 4 by the number of devices. For each target the layer's cotangent has to be collected before the pull, and what is pulled back is summed after it.
#
# What would move, for each step and device, in gigabytes? Usually the devices form a ring, and each passes partial sums on to the next, then the finished ones. For a sum of $N$ numbers over many devices each of them sends nearly $2N$ and receives as many.

# %% tags=["nbval-ignore-output"]
BATCH = 64 * 512  # tokens in a step
LAYERS = {"GPT-2 small": (12, 768), "1 billion": (24, 2048), "8 billion": (32, 4096)}
rows = []
for name, (depth, width) in LAYERS.items():
    gradient = gigabytes(2 * MODELS[name][0])
    activations = gigabytes(2 * 4 * depth * BATCH * width)
    rows.append((name, gradient, 50 * gradient, activations, 50 * activations))
columns = ["model", "batch shared: step", "of 50 targets", "layers shared: step", "of 50 targets "]
pd.DataFrame(rows, columns=columns).set_index("model").round(1)

# %% [markdown]
# If the batch is shared, the traffic grows with the number of trained parameters; if the layers are, with the number of tokens. The pulls of fifty targets send fifty times what a step sends, and compute a hundred times what it computes. For each number sent they compute twice as much as the training does. (With LoRA and shared layers it is as much.)
#
# ## 6 · What the truth costs
#
# To judge scores one trains again 100 to 300 times, which by count costs as much as the scores of 50 to 150 targets. These trainings differ in their data weights alone, so they can be done together: the same batches, $R$ models, one `vmap` over parameters and weights (`magic.outputs(..., together=R)`, `magic.lds(..., together=R)`). Where a step is short, it pays to give the
# processor $R$ times as much to do at once.

# %%
torch.manual_seed(0)
x, y, x_test, y_test = data.digits(train=600, test=100)
small = models.MLP((64, 32, 10))
optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
run = magic.Run(small, optimizer, (x, y), loss, magic.batches(600, 50, 5))
weights = subsets.random(600, 0.05, 16, seed=0)


def measure(model):
    return loss(model, x_test[:8], y_test[:8])


apart = magic.outputs(run, measure, weights, jobs=1, progress=False)
together = magic.outputs(run, measure, weights, together=16, progress=False)
apart_by = ((together - apart).abs().max() / apart.std(0).mean()).item()
claim("largest difference, in units of what removals change", apart_by, at_most=1e-3)

# %% [markdown]
# PyTorch may multiply sixteen matrices by another kernel than one, and then the last bits differ. A difference below a thousandth of what removals change does not matter to an LDS; but the two kinds are kept in separate banks, since the rows of one bank should agree to the bit. What it saves on one core of a CPU:

# %% tags=["nbval-ignore-output"]
at_once = SPEED_OF[SPEED_OF.what == "together"].set_index("network")
at_once[["parameters", "count", "seconds_one", "seconds_many", "ratio"]]

# %%
gains = at_once.ratio
claim("small MLP: times as many retrainings a second", gains["small MLP"], at_least=3)
claim("MLP: times as many", gains["mlp"], at_least=1.2)
claim("conv net: times as many", gains["conv"], at_most=1)
claim("ResNet-9: times as many", gains["ResNet-9, width 10"], at_most=1)

# %% [markdown]
# The smallest network is nearly four times as fast, the larger MLP 1.4 times, and the two convolutional networks are slower together than one by one. One model keeps the core busy there; why sixteen together take longer, we have not measured. On a GPU, where it takes a large network to keep all of it busy, the gain should reach further; *not yet measured*.
#
# ## 7 · What has been measured, and what has not
#
# One command, `python -m tests.gpu`, asks what only a GPU can tell: whether a run repeats to the bit there, whether the chapters' claims hold, and what scores cost. `python -m tests.gpu --stages resnet9` trains the recipe of section 1 at full size, in as many calls as it takes.
# `--keep` writes what was found into the table that this cell reads, and the experiment's rows into that of section 1:

# %% tags=["nbval-ignore-output"]
FOUND = Path("banks/15_gpu.csv")
GOALS = {
    "LDS at full size, 1 % and 5 %": "resnet9",
    "scores of 100 targets, in plain trainings": "resnet9",
    "a metagradient of 1, 4, 16, 64 targets, in plain trainings": "bench",
    "GPT-2 small: bits, memory, scores of 16 targets": "gpt2",
    "the same run twice, to the bit": "determinism",
    "every chapter against its stored claims": "chapters",
}
told = pd.read_csv(FOUND) if FOUND.exists() else pd.DataFrame(columns=["stage", "GPU", "date"])
status = {}
for goal, stage in GOALS.items():
    rows = told[told.stage == stage]
    status[goal] = "not yet measured" if rows.empty else f"{rows.GPU.iloc[0]}, {rows.date.iloc[0]}"
if len(told):
    print(told.drop(columns=["driver", "CUDA", "seconds"]).to_string(index=False))
pd.DataFrame({"on a GPU": status})

# %% [markdown]
# **So, what does it take?** For a model that fits on a device, by count $1 + 2K$ trainings for $K$ targets, or $1 + K$ with LoRA, and memory for $K + 1$ states and the traces. On a CPU we measured 1.0 to 2.2 trainings for each target, and 2.5 to 3.5 that all share. This can be divided between devices by targets, with nothing to send, and by batches, with one sum for each step and target and, with Adam, one more for each step. Whether the scores predict is another
# question (chapters 08 and 12), and has to be asked again of every training.
#
# ## What we ignored
#
# - **Lower precision.** Large models are often trained in 16 bits; all counts here are of 32 bits.
# - **Disks and links.** Reading kept states, and waiting for other devices, is not in the hours.
# - **Other sizes.** One small ResNet says little about a large one, and counts say nothing of whether scores predict.
#
# ## Exercises
#
# Solutions are in [solutions/15](solutions/15_at_the_scale_of_the_papers.ipynb).
#
# **15.1** ●●○ (10 min) Write `sweeps_cost(targets, machines, group, fixed, each)`: how long it takes, in plain trainings, until all `targets` are pulled back. They are shared between the `machines` as evenly as possible, and the machines work at the same time. A machine pulls at most `group` targets back in one sweep, since no more cotangents fit into its memory. Every sweep costs `fixed` plain trainings, however many targets it has, and each target costs `each` more. How many times as fast as one machine are 64, for 500 targets, with 39 in a sweep at most, `fixed` = 2 (the training, and its steps once more for their traces) and `each` = 2?
#
# <details><summary>Hint</summary>How many targets has the busiest machine, and how many sweeps does it make? Both are whole numbers.</details>

# %%
def sweeps_cost(targets, machines, group, fixed, each):
    """The plain trainings that the busiest machine takes."""
    ...


# from magic.book import check
# check("15.1", sweeps_cost)

# %% [markdown]
# **15.2** ●●● (25 min) The batch of a step of plain SGD is shared between ranks. Write `pull(local, params, weights, cotangent, rate, all_reduce)`, the adjoint of the step as one rank computes it. `local(params, weights)` is this rank's part of the objective, $\sum_i w_i \ell_i / B$ over its own $b$ examples, where $B$ counts the examples of all ranks. `params` $(P,)$ and `cotangent` $(P,)$ are the same on every rank, and `weights` $(b,)$ are those of the rank's own examples. The step is $\theta' = \theta - \eta \sum_{\text{ranks}} \nabla \text{local}$, with the rate $\eta$. `all_reduce(x)` returns the sum over the ranks of what each of them gives; it leaves `x` as it is, and no derivative goes back through it. Return the cotangent before the step, $(P,)$, and the scores of the rank's own examples, $(b,)$.
#
# <details><summary>Hint</summary>Differentiate the number $\nabla\text{local}\cdot\Delta'$ by `params` and by `weights`. Which of the two derivatives needs the examples of the other ranks? Every rank has to call `all_reduce` the same number of times.</details>

# %%
def pull(local, params, weights, cotangent, rate, all_reduce):
    """(P,), (b,): the cotangent before the step, and the scores of this rank's examples."""
    ...


# check("15.2", pull)

# %% [markdown]
# **15.3** ●●○ (15 min) Write `targets_at_once(memory, parameters, trained, slots, trace, bytes=4)`: how many targets can be pulled back in one sweep, a whole number that is 0 if not even the model fits. Of the model's `parameters`, `trained` are trained, and the optimizer keeps `slots` numbers for each of those (AdamW two, SGD without momentum none). The `memory`, in bytes, holds the frozen parameters, one state (the trained parameters and what the optimizer keeps of them), a trace of `trace` bytes, and the cotangents of the targets. A number takes `bytes` bytes. How many targets fit into 80 GB beside a trace of 20 GB, for GPT-2 small with AdamW, and for a model of 8 billion parameters of which LoRA trains 7 million?
#
# <details><summary>Hint</summary>A cotangent has one number for each number of the state, and frozen parameters are no part of it.</details>

# %%
def targets_at_once(memory, parameters, trained, slots, trace, bytes=4):
    """How many cotangents fit beside what a sweep holds anyway."""
    ...


# check("15.3", targets_at_once)

# %% [markdown]
# **15.4** ●●● (60 min, without a checker) Do you have a GPU? Run `python -m tests.gpu`. Do the times of sweeps with 1, 4, 16 and 64 targets lie on a line, $\text{fixed} + K\cdot\text{each}$, and how many plain trainings are the two numbers on your machine? Does the memory at its peak grow with the targets as 15.3 says, and if it grows faster, what else is there for each target?
#
# <details><summary>Hint</summary>What it finds is in `results.jsonl`, a line for each part. A pull holds more on its way than the cotangent it starts from.</details>
#
# **Next:** [16 · Epilogue](16_epilogue.ipynb)
