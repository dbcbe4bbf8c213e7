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
# And if we had not had those images: what would it have said?
#
# We train a small network on handwritten digits, differentiate the **whole training run** with respect to
# the weight of every training image, predict what removing images does, and then do what one usually
# cannot afford: really train again without them, and look.
#
# | word | in code | meaning |
# |---|---|---|
# | data weights $w \in \mathbb{R}^n$ | `weights` | one per training image; 1 = present, 0 = removed |
# | $f(w)$ | `run.train(weights)` | the model that training with these weights ends in |
# | measured outputs $\varphi(f(w)) \in \mathbb{R}^K$ | `measure` | $K$ numbers read off a trained model, here losses of test images |
# | scores $\tau_{ki} = \partial \varphi_k(f(w)) / \partial w_i$ | `scores.values` | how much training image $i$ moves output $k$ |
#
# About five minutes to read; about a minute to run on two CPU cores. Nothing is downloaded.

# %%
import torch
import torch.nn.functional as F

import magic
from magic.book import data, models, plot
from magic.book.checks import claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()

# %% [markdown]
# ## 1 · A run
#
# 1,200 images to train on, 500 to test on; a network with one hidden layer; plain PyTorch throughout.
# `magic.Run` takes what you have anyway: the model, its optimizer, the data, a loss that gives **one number
# per example**, and the order of the batches. With these fixed, training is a function: the same weights
# in, the same model out, to the last bit ([chapter 01](01_the_same_run_twice.ipynb) is about that).

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
print(run)

# %% [markdown]
# `run.train()` runs the loop you would have written, and `run.model` puts the final state into an ordinary
# module.

# %%
final = run.train(progress=False)
trained = run.model(final)
accuracy = (trained(x_test).argmax(1) == y_test).float().mean().item()
claim("the network reads at least 93 % of the test images right", accuracy >= 0.93)

# %% [markdown]
# ## 2 · An image it gets wrong
#
# We take the test image with the largest loss of all: the one the network is most confidently wrong about.

# %% tags=["nbval-ignore-output"]
test_losses = loss(trained, x_test, y_test).detach()
hardest = test_losses.argmax().item()
said = trained(x_test[hardest : hardest + 1]).softmax(1)[0]
label = y_test[hardest]
title = f"a {label}, read as {said.argmax()}\nP({label}) = {said[label]:.2f}"
plot.images(x_test[hardest : hardest + 1], [title]);

# %% [markdown]
# ## 3 · Differentiate the training
#
# What do we measure? The losses of this image and of nine others. `magic.attribute` trains the run, then goes
# back through it step by step, and returns $\partial \varphi_k / \partial w_i$ for all ten outputs and all
# 1,200 training images at once. It is not an estimate: it is the derivative, exact to rounding. On its way back
# it also checks some of its own steps against finite differences, and refuses if they disagree.

# %%
asked = [hardest, *(i for i in range(10) if i != hardest)][:10]


def measure(model):
    return loss(model, x_test[asked], y_test[asked])


scores = magic.attribute(run, measure)
claim("one score for each measured output and training image", scores.values.shape == (10, 1200))

# %% tags=["nbval-ignore-output"]
scores

# %% [markdown]
# ## 4 · Who is responsible?
#
# A **negative** score means that more weight on this training image makes the loss smaller: it helps. Images
# with the most positive scores harm: they pull the network toward its mistake.

# %% tags=["nbval-ignore-output"]
top = scores.top(target=0, k=6)
titles = [
    f"{role}\na {y[i]}, τ = {score:+.2f}" for role, i, score, _ in top.itertuples(index=False)
]
colors = [plot.HELPFUL if role == "helpful" else plot.HARMFUL for role in top["role"]]
plot.images(x[top["index"].tolist()], titles, columns=6, colors=colors);

# %% [markdown]
# The helpful ones carry the right label and look like this image, or like the digit it is mistaken for. Most of
# the harmful ones carry the label the network was led to; an image of the right class can do harm as well, if it
# teaches the network a look that this one does not have.

# %%
labels = y[top["index"].tolist()].tolist()
right = y_test[hardest].item()
claim(
    "each of the six most helpful images has the right label",
    all(label == right for label in labels[:6]),
)
claim(
    "most of the six most harmful images have another",
    sum(label != right for label in labels[6:]) >= 4,
)

# %% [markdown]
# ## 5 · Take them away, and see
#
# The predicted effect of removing a set $D$ is the first-order one, $-\sum_{i \in D} \tau_i$. The true effect
# costs a training: `magic.retrain` runs the same run again with those weights at 0. We try the single most
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
claim(
    "without the most helpful image the loss rises, as predicted within a fifth",
    abs(one[0] / one[1] - 1) < 0.2,
)
claim("without the five most helpful it rises more than twice as much", five[1] > 2 * one[1] > 0)
claim("five random images do not matter a tenth as much", abs(at_random[1]) < 0.1 * five[1])

# %% [markdown]
# The prediction for the five is about a fifth too small. A tangent knows the slope at $w = 1$ only; as several
# influential images go together, the slope itself changes on the way. Where the tangent stops being good
# enough, and at which point to take it instead, is the subject of later chapters.
#
# ## 6 · Is that luck?
#
# One removal proves little. So: 30 random subsets, each without 1 % of the images, each really retrained. For
# every measured output we compare the 30 predicted values with the 30 true ones. Their rank correlation,
# averaged over outputs, is the **LDS** (linear datamodeling score). 1 is perfect; estimates of the same
# effect often correlate only weakly with the truth
# ([Ilyas & Engstrom 2025](https://arxiv.org/abs/2504.16430) put TRAK and EK-FAC beside MAGIC).

# %%
result = magic.lds(scores, drop=0.01, subsets=30)
claim("LDS at least .98 over ten test images", result.mean >= 0.98)

# %% tags=["nbval-ignore-output"]
print(result)
result.plot(targets=None);

# %% [markdown]
# Every network that was really trained, without 12 of its images, is ten dots here, one for each measured
# output. Left to right is what we said before training it, bottom to top is what came out.
#
# ## What we ignored
#
# - **Smoothness.** The derivative is exact; that it *predicts* is a property of this training, which is smooth
#   (GELU, a moderate rate). A rough one has a derivative, too, and it is of little use.
# - **Large removals.** 1 % is a small step in $w$. At 50 % the tangent at $w = 1$ is far from the curve.
# - **The seed.** We asked about *this* model. Another initialisation gives another model, with other scores.
#
# ## Exercises
#
# 1. ● (2 min) Which training image, removed, would *help* the hardest test image most? Predict, then retrain.
#    <details><summary>Hint</summary>The first row of <code>top</code> with role <code>harmful</code>.</details>
# 2. ●● (5 min) Repeat section 6 with `drop=0.2`. The rank correlation stays high; do the dots stay on the
#    diagonal? <details><summary>Hint</summary>Plot it. Fewer images under a fixed batch size also mean
#    smaller steps; <code>normalize="weights"</code> takes that away.</details>
# 3. ●●● (15 min) Measure a margin (the logit of the right class minus the largest other) instead of the loss.
#    What do `helpful` and `harmful` mean now?
#
# **Next:** [01 · The same run twice](01_the_same_run_twice.ipynb).
