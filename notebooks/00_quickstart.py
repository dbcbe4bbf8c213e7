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
# # 00 · Quickstart
#
# **Question.** A model looks at an image and is badly wrong. *Which training images made it say that?*
# And what would it have said without them?
#
# In this chapter we train a small network on handwritten digits and differentiate the **whole training run** with respect to
# the weight of every training image. From the derivative we predict what happens when images are removed. Then we do what one usually
# cannot afford: we train again without them, and compare.
#
# | word | in code | meaning |
# |---|---|---|
# | data weights $w \in \mathbb{R}^n$ | `weights` | one for each training image; 1 = present, 0 = removed |
# | trained model $f(w)$ | `run.train(weights)` | the model in which training with these weights ends |
# | measured outputs $\varphi(f(w)) \in \mathbb{R}^K$ | `measure` | $K$ numbers read off a trained model, here losses of test images |
# | scores $\tau_{ki} = \partial \varphi_k(f(w)) / \partial w_i$ | `scores.values` | how fast output $k$ moves with the weight of training image $i$ |
#
# About ten minutes to read, and less than a minute to run on two CPU cores. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()

# %% [markdown]
# ## 1 · A run
#
# There are 1,200 images to train on and 500 to test on. The network has one hidden layer, and everything is plain PyTorch.
# `magic.Run` takes what one has anyway: the model, its optimizer, the data, a loss that gives **one number
# for each example**, and the order of the batches. With all of these fixed, training is a function: the same weights
# in, the same model out, to the last bit. ([Chapter 01](01_the_same_run_twice.ipynb) shows what that takes.)

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=1200, test=500))
torch.manual_seed(0)
model = models.MLP((64, 128, 10)).to(device)
order, rate = magic.batches(len(x), size=100, epochs=20, seed=0), 0.1


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


run = magic.Run(
    model,
    torch.optim.SGD(model.parameters(), lr=rate),
    data=(x, y),
    loss=loss,
    batches=order,
)

# %% [markdown]
# `run.train()` runs the usual loop, step for step, and `run.model` puts the final state into an ordinary
# module.

# %%
final = run.train(progress=False)
trained = run.model(final)
accuracy = (trained(x_test).argmax(1) == y_test).float().mean().item()
claim("accuracy on 500 test images", accuracy, at_least=0.93)

# %% [markdown]
# ## 2 · An image it gets wrong
#
# We take the test image with the largest loss of all, which is the one that the network is most confidently wrong about. On its
# right is the training image of the same digit that looks most like it, by the angle between their vectors of pixels.

# %% tags=["nbval-ignore-output"]
test_losses = loss(trained, x_test, y_test).detach()
hardest = test_losses.argmax().item()
said = trained(x_test[hardest : hardest + 1]).softmax(1)[0]
label = y_test[hardest]
likeness = F.cosine_similarity(x.flatten(1), x_test[hardest].flatten()[None])
twin = likeness.where(y == label, -1).argmax().item()
titles = [
    f"a {label}, read as {said.argmax()}\nP({label}) = {said[label]:.2f}",
    f"a {y[twin]},\ntraining image {twin}",
]
plot.images(torch.stack([x_test[hardest], x[twin]]), titles);

# %% [markdown]
# ## 3 · A weight is a dial
#
# Did that training image matter? In training, the loss of example $i$ is multiplied by its weight $w_i$, so the weight is a dial: at
# 1 the image is there as usual, at 0 it is gone, at $\tfrac12$ it counts half. We turn it, train a network at each position,
# and note the loss of our test image.


# %%
def measure_hardest(model):
    return loss(model, x_test[hardest : hardest + 1], y_test[hardest : hardest + 1])


def turned(i, weight):
    weights = torch.ones(len(x), device=device)
    weights[i] = weight
    return measure_hardest(run.model(run.train(weights, progress=False))).item()


dial = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
curve = [turned(twin, weight) for weight in dial]
slope = (curve[5] - curve[3]) / 0.5

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5, 3.2))[1]
tangent = [curve[4] + slope * (weight - 1) for weight in dial]
ax.plot(dial, tangent, "--", color="black", linewidth=1, label="tangent at 1")
ax.plot(dial, curve, "o-", color=plot.HELPFUL, label="trained")
ax.axvline(1, color=plot.NEUTRAL, linewidth=1)
ax.set(xlabel=f"weight of training image {twin}", ylabel="loss of the test image")
ax.set_title(f"Seven trainings; the slope at 1 is {slope:+.2f}".replace("-", "−"))
ax.legend();

# %% [markdown]
# The curve is smooth, and it falls: the more this image counts, the smaller the loss. The dashed **tangent** touches the curve at weight 1,
# where our model is. Its slope is the **score** of the image. Followed down to weight 0, the tangent predicts what removal does: the loss rises, by nearly as much as the curve does.
#
# Here the slope came from trainings at either side. For 1,200 images that would be 2,400 trainings. There is a better way.

# %%
true, predicted = curve[0] - curve[4], -slope
claim("without the image, the loss rises by", true, at_least=0.05)
claim("predicted by the tangent over true", predicted / true, at_least=0.7, at_most=1.3)

# %% [markdown]
# ## 4 · How all slopes can be computed at once
#
# Training is a chain. Each step takes a state $s_t$ (here the network's parameters after $t$ steps) and the weights of its batch, and makes the next state, $s_{t+1}$. The last
# state gives the output $\varphi$.

# %% tags=["nbval-ignore-output", "hide-input"]
plot.chain();

# %% [markdown]
# With few outputs and many weights, a derivative is taken through such a chain from its end. Let $\Delta_t = \partial \varphi / \partial s_t$ say how the output moves with the state after
# $t$ steps; it is called the **cotangent** at $s_t$. The chain rule turns $\Delta_{t+1}$ into $\Delta_t$, one step at a time (orange), and at each step
# what flows down into the weights of the batch is that step's part of their scores. One way back gives the scores of *all* training images.
#
# PyTorch's autograd can do it, if the training is written so that nothing is overwritten. It takes a dozen lines.


# %%
def losses(params, x, y):
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


def train(weights):
    params = dict(model.named_parameters())
    for batch in order:
        objective = (weights[batch] * losses(params, x[batch], y[batch])).sum() / len(batch)
        gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
        params = {k: p - rate * g for (k, p), g in zip(params.items(), gradient, strict=True)}
    return params


weights = torch.ones(len(x), device=device, requires_grad=True)
output = losses(train(weights), x_test[hardest : hardest + 1], y_test[hardest : hardest + 1])
(naive,) = torch.autograd.grad(output.sum(), weights)
ratio = naive[twin].item() / slope
claim("its slope for the image above, over that of the curve", ratio, at_least=0.9, at_most=1.1)

# %% [markdown]
# That is the whole idea, and for a run this small it is enough. For a larger one it is not: autograd keeps every intermediate result of every step,
# which for 2,000 steps of a ResNet-9 is four terabytes ([chapter 03](03_differentiate_the_whole_run.ipynb)).
#
# `magic` keeps a few states instead, and trains again from them to reach the others as the way back needs them. Because training is
# deterministic, the states that come out are those that training passed through, to the bit. This is called **REPLAY**. It takes several outputs back at once, as many as fit into memory; ours are the losses of the hardest image and of nine others.

# %%
asked = [hardest, *(i for i in range(10) if i != hardest)][:10]


def measure(model):
    return loss(model, x_test[asked], y_test[asked])


scores = magic.attribute(run, measure, progress=False)
agree("1,200 scores of the hardest image", scores.values[0], naive, tolerance=1e-4)

# %% [markdown]
# Neither is an estimate. Both are the derivative, to within the rounding of `float32`.
#
# ## 5 · Who is responsible?
#
# A **negative** score means that more weight on this training image makes the loss smaller: the image helps. Images with the most positive scores harm: with more weight on them, the loss grows.

# %% tags=["nbval-ignore-output"]
top = scores.top(target=0, k=6)
titles = [
    f"{role}\na {y[i]}, τ = {score:+.2f}".replace("-", "−")
    for role, i, score, _ in top.itertuples(index=False)
]
colors = [plot.HELPFUL if role == "helpful" else plot.HARMFUL for role in top["role"]]
plot.images(x[top["index"].tolist()], titles, columns=6, colors=colors);

# %% [markdown]
# The first helpful image is the one whose dial we turned. All six carry the right label. Most of
# the harmful ones carry the label that the network was led to. An image of the right class can do harm as well, when it
# teaches the network a look that this one does not have.

# %%
labels = y[top["index"].tolist()].tolist()
right = y_test[hardest].item()
claim("the image of section 3 is the most helpful of 1,200", top["index"].iloc[0] == twin)
claim("helpful images with the right label, of six", labels[:6].count(right), at_least=6)
mistaken = said.argmax().item()
claim("harmful images with the label it was read as", labels[6:].count(mistaken), at_least=4)

# %% [markdown]
# ## 6 · Remove them, and look
#
# The predicted effect of removing a set $D$ follows the tangent: it is $-\sum_{i \in D} \tau_i$. The true effect
# costs a training: `magic.retrain` runs the same run again with those weights at 0. We try the most
# helpful image, the five most helpful, and, to have something to compare with, five at random.

# %%
helpful = top["index"].tolist()[:6]
random_five = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:5].tolist()


def predicted_and_true(without):
    again = run.model(magic.retrain(run, without=without, progress=False))
    true = measure(again).detach() - scores.outputs
    return scores.removal_effect(without)[0].item(), true[0].item()


sets = {
    "the most helpful image": helpful[:1],
    "the five most helpful": helpful[:5],
    "five at random": random_five,
}
effects = {name: predicted_and_true(without) for name, without in sets.items()}

# %% tags=["nbval-ignore-output"]
print(f"the loss was {scores.outputs[0]:.2f}; without …")
for name, (predicted, true) in effects.items():
    print(f"  {name:<24} predicted {predicted:+.3f}   true {true:+.3f}")

# %%
one, five, at_random = effects.values()
claim("one image: predicted over true", one[0] / one[1], at_least=0.8, at_most=1.2)
claim("five images: predicted over true", five[0] / five[1], at_least=0.7, at_most=0.95)
claim("true effect of five over that of one", five[1] / one[1], at_least=2)
claim("true effect of five at random, over that", abs(at_random[1]) / five[1], at_most=0.1)

# %% [markdown]
# The prediction for the five is too small. Each of them was scored as if the other four stayed; when they
# go together, each of those left counts for more, and the slope changes on the way. How far a tangent reaches, and where it
# is better taken, are the subjects of chapters [10](10_is_it_right.ipynb) to [12](12_how_far_does_a_tangent_reach.ipynb).
#
# In a running notebook, `magic.explore` lets you choose an image, tick those to remove, see the prediction at once, and train to see the truth.
# (Where no notebook runs, as on a web page, it shows what was asked last.)

# %% tags=["nbval-ignore-output"]
explorer = magic.explore(scores, examples=(x, y), targets=(x_test[asked], y_test[asked]))
explorer.remove(helpful[:5])
explorer.train(progress=False)
explorer

# %% [markdown]
# ## 7 · Is that luck?
#
# One removal proves little. So we draw 30 random subsets, each without 1 % of the images, and train 30 networks without them. For
# each measured output we rank the 30 predicted values and the 30 true ones; Spearman's rank correlation of the two, averaged over the
# outputs, is the **LDS** (linear datamodeling score, [Park et al. 2023](https://arxiv.org/abs/2303.14186)). It is 1 if the prediction orders all
# 30 networks rightly, and 0 if it knows nothing. (With `together=30` they are trained at once, as one batch of 30 models, which is faster for small networks.)

# %%
result = magic.lds(scores, drop=0.01, subsets=30, together=30, progress=False)
claim("LDS over ten test images", result.spearman, at_least=0.98)
claim("slope of true on predicted changes", result.slope, at_least=1, at_most=1.3)

# %% tags=["nbval-ignore-output"]
result.plot(targets=None);

# %% [markdown]
# Each of the 30 networks is ten dots here, one for each measured output. Left to right is what we said before it was trained;
# bottom to top is what came out. Both are divided by the standard deviation σ of that output's true changes, so that all outputs can be seen. The dots lie near the
# diagonal. They are a little steeper, since true changes are somewhat larger than predicted ones.
#
# ## What we ignored
#
# - **Smoothness.** The derivative is exact. That it also *predicts* is a property of this training, which is smooth
#   (GELU, a moderate rate). Rough training has a derivative, too, but it is of little use ([chapter 08](08_is_the_derivative_useful.ipynb)).
# - **Large removals.** 1 % is a small step in $w$. At 50 % the tangent at $w = 1$ is far from the curve ([chapter 11](11_how_near_is_near_optimal.ipynb)).
# - **The seed.** We asked about *this* model. Another initialisation gives another model with other scores.
#
# ## Exercises
#
# Write a function in place of the dots, then let `check` judge it. Solutions are in [solutions/00_quickstart](solutions/00_quickstart.ipynb).
#
# **00.1** ●○○ (3 min) What do the scores predict for the removal of several images? `values` is (K, n).
# <details><summary>Hint</summary>Section 6 has the formula; the answer has one number for each output.</details>

# %%
def removal_effect(values, without):
    """(K,): predicted change of each output when the images in the list `without` are removed."""
    ...


# from magic.book import check
# check("00.1", removal_effect)

# %% [markdown]
# **00.2** ●●○ (5 min) Estimate one score from two trainings, at weights $1 + \varepsilon$ and $1 - \varepsilon$. `f` takes weights (n,) and returns a number.
# <details><summary>Hint</summary>Change one entry of a copy; a central difference divides by $2\varepsilon$.</details>


# %%
def one_score(f, n, i, epsilon=1e-4):
    """The derivative of f at the weights (1, …, 1), in the weight of example i."""
    ...


# check("00.2", one_score)

# %% [markdown]
# **00.3** ●●○ (8 min) Measure a **margin** instead of a loss: the logit of the right class minus the largest other logit.
# What do *helpful* and *harmful* mean then?
# <details><summary>Hint</summary>Set the right class's logit to −∞ in a copy before you take the maximum.</details>


# %%
def margins(logits, labels):
    """(B,): for logits (B, C) and labels (B,), how far the right class is ahead of the next."""
    ...


# check("00.3", margins)

# %% [markdown]
# **00.4** ●●○ (5 min) Repeat section 7 with `drop=0.2`. The rank correlation stays high. Do the dots stay on the
# diagonal? <details><summary>Hint</summary>Plot it, and print `result.slope` and `result.r2`. With a fixed batch size, fewer images also mean
# smaller steps; a run with `normalize="weights"` does not have that effect.</details>
#
# **Next:** [01 · The same run twice](01_the_same_run_twice.ipynb).
