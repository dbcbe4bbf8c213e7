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
# # 03 · Differentiate the whole run
#
# **Question.** A trained network is a function $f(w)$ of its data weights. What is its *derivative* in the weight
# of one training example? And in all of them?
#
# Training is a long computation, and PyTorch differentiates computations. So there is an obvious way, and this
# chapter takes it: record the whole run and go backward through the record. It is exact, and for a run of any
# length worth having it does not fit into memory. Why it does not fit tells us what to do instead.
#
# | word | in code | meaning |
# |---|---|---|
# | data weights $w \in \mathbb{R}^n$ | `weights` | one per training example; 1 = present, 0 = removed |
# | parameters $\theta_t$ | `params` | of the network after $t$ steps |
# | measured output $\varphi$ | `measure` | a number read off the trained model, here the loss of one test image |
# | score $\tau_i = \partial \varphi(f(w)) / \partial w_i$ | `scores` | how fast the output moves with example $i$'s weight |
# | unroll | | one autograd graph over all $T$ steps |
#
# About fifteen minutes to read, one to run.

# %%
import weakref
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()

# %% [markdown]
# ## 1 · A weight is a dial
#
# A short run: 400 digits, a network with one hidden layer, 40 steps of SGD in batches of 50, so each image is seen
# five times. Everything is in `float64`, because we are going to compare derivatives to many digits.
#
# The training below is the plain loop with three changes: the loss of example $i$ is multiplied by $w_i$, the
# parameters are handed to the model by `functional_call` instead of being written into it, and the update makes
# **new** tensors instead of changing the old ones. Nothing is overwritten, so nothing is forgotten. (What
# `create_graph=True` is for comes in section 2.)

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=400, test=500))
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 32, 10)).double().to(device)
order, rate = magic.batches(len(x), size=50, epochs=5, seed=0), 0.3


def losses(params, x, y):
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


def step(params, batch, weights):
    objective = (weights[batch] * losses(params, x[batch], y[batch])).sum() / len(batch)
    gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
    return {name: p - rate * g for (name, p), g in zip(params.items(), gradient, strict=True)}


def train(weights, order=order):
    params = dict(model.named_parameters())
    for batch in order:
        params = step(params, batch, weights)
    return params


# %% [markdown]
# We measure the loss of one test image: the one that the trained network gets most wrong. `measure` is a function
# of the trained parameters, and `measure(train(weights))` is a number that depends on 400 numbers.

# %%
ones = torch.ones(len(x), dtype=x.dtype, device=device)
trained = train(ones)
accuracy = (functional_call(model, trained, (x_test,)).argmax(1) == y_test).double().mean().item()
hardest = losses(trained, x_test, y_test).argmax().item()


def measure(params):
    return losses(params, x_test[hardest : hardest + 1], y_test[hardest : hardest + 1]).sum()


claim("the network reads at least 90 % of the test images right", accuracy >= 0.9)
claim("this one it gets badly wrong", measure(trained) > 2)


# %% [markdown]
# Now turn one dial: give training image 87 the weights $0, \tfrac14, \dots, 2$, train nine networks, and plot
# $\varphi$ for each.


# %%
def retrained(i, weight):
    weights = ones.clone()
    weights[i] = weight
    return measure(train(weights)).item()


dial = [k / 4 for k in range(9)]
curve = [retrained(87, weight) for weight in dial]
pictures, titles = torch.stack([x_test[hardest], x[87]]), ["the test image", "training image 87"]

# %% tags=["nbval-ignore-output"]
plot.images(pictures, titles)
ax = plt.subplots(figsize=(5, 3))[1]
sns.lineplot(x=dial, y=curve, marker="o", ax=ax)
ax.axvline(1, color=plot.NEUTRAL, linewidth=1)
ax.set(
    xlabel="weight of training image 87", ylabel="loss of the test image", title="Nine trainings"
);

# %% [markdown]
# A curve, without noise or jumps, and it falls: the more training image 87 counts, the smaller the loss.
# At weight 1, where our model is, it has a slope. That slope is the score $\tau_{87}$.
#
# One could get it from two more trainings, as a central difference
#
# $$\tau_i \approx \frac{\varphi(f(w + \varepsilon e_i)) - \varphi(f(w - \varepsilon e_i))}{2\varepsilon},$$
#
# with $e_i$ one at $i$ and zero elsewhere. For all $n$ examples these are $2n$ trainings. We keep them as the judge.


# %%
def finite_difference(i, epsilon=1e-4):
    return (retrained(i, 1 + epsilon) - retrained(i, 1 - epsilon)) / (2 * epsilon)


claim("more of training image 87, less loss: the slope is negative", finite_difference(87) < 0)
claim("and the curve falls all the way", all(b < a for a, b in pairwise(curve)))

# %% [markdown]
# ## 2 · All slopes at once
#
# Write the run as what it is, a composition. With $g_t$ the gradient of step $t$,
#
# $$\theta_{t+1} = \theta_t - \eta\, g_t(\theta_t, w), \qquad
#   g_t(\theta, w) = \frac{1}{B} \sum_{i \in \text{batch}_t} w_i \nabla \ell_i(\theta), \qquad t = 0, \dots, T-1,$$
#
# and $f(w) = \theta_T$. A derivative of $\varphi(f(w))$ has to go through every $g_t$, and $g_t$ is itself a
# derivative, computed by a backward pass. `create_graph=True` makes PyTorch record that backward pass as
# well, operation by operation, as it records a forward pass. After the last step the record reaches from $\varphi$
# back to `weights`, and one call goes through it: backward through forty forward *and* backward passes.

# %%
weights = ones.clone().requires_grad_()
output = measure(train(weights))
(scores,) = torch.autograd.grad(output, weights)
claim("one call, one score for each of the 400 training images", scores.shape == (400,))
claim("none is exactly zero: each image had a say", (scores != 0).all().item())

# %% [markdown]
# Is it right? First the judge: six images, two trainings each.

# %%
some = [87, 0, 1, 2, 3, 4]
differences = torch.tensor([finite_difference(i) for i in some], dtype=x.dtype, device=device)
agree("unroll, finite differences", scores[some], differences)

# %% [markdown]
# Second, `magic`, which is given the same model, optimizer, data and order, and never builds this graph. Its
# `measure` takes the trained module; otherwise nothing is new since [chapter 00](00_quickstart.ipynb).


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure_model(model):
    return loss(model, x_test[hardest : hardest + 1], y_test[hardest : hardest + 1])


def run_over(order):
    return magic.Run(model, torch.optim.SGD(model.parameters(), lr=rate), (x, y), loss, order)


def close(mine, reference):
    """Equal to nine digits, relative to the largest."""
    return bool((mine - reference).abs().max() <= 1e-9 * reference.abs().max())


run = run_over(order)
attribution = magic.attribute(run, measure_model, progress=False)
claim(
    "magic's scores are those of the unroll, to nine digits", close(attribution.values[0], scores)
)

# %% [markdown]
# Three independent ways, one answer. The finite differences agree to six digits, which is what a difference can
# give; the two derivatives to nine and more.
#
# ## 3 · What the number says
#
# The score is a **rate**: $\tau_i$ is the change of $\varphi$ per unit of weight. Removing example $i$ takes one
# unit away, so the tangent predicts a change of $-\tau_i$.
#
# - *Sign.* $\tau_i < 0$: weight on $i$ lowers the loss; the example **helps**. $\tau_i > 0$: it **harms**.
# - *Size.* Twice the score, twice the predicted effect.
#
# We take the image with the most negative score (we had looked it up for section 1), the one with the most
# positive, and one whose score is in the middle, and turn their dials all the way to 0, which is a real training
# without them.

# %%
ranked = scores.argsort().tolist()
chosen = {
    "most helpful": ranked[0],
    "in the middle": ranked[len(x) // 2],
    "most harmful": ranked[-1],
}
down = [0, 0.25, 0.5, 0.75, 1, 1.25]
turned = {name: [retrained(i, weight) for weight in down] for name, i in chosen.items()}

# %% tags=["nbval-ignore-output"]
colors = [plot.HELPFUL, plot.NEUTRAL, plot.HARMFUL]
figure, axes = plt.subplots(1, 3, figsize=(8.4, 3), sharey=True)
for ax, (name, i), color in zip(axes, chosen.items(), colors, strict=True):
    tangent = [output.item() + scores[i].item() * (weight - 1) for weight in down]
    ax.plot(down, tangent, color="black", linewidth=1, linestyle="--", label="tangent at 1")
    ax.plot(down, turned[name], color=color, marker="o", label="trained")
    tau = f"{scores[i]:+.3f}".replace("-", "−")
    ax.set(title=f"{name}: image {i}, a {y[i]}\nτ = {tau}", xlabel="its weight")
axes[0].set_ylabel(f"loss of the test image, a {y_test[hardest]}")
axes[0].legend(fontsize=9, loc="upper right");

# %%
removal = {name: (-scores[i].item(), turned[name][0] - output.item()) for name, i in chosen.items()}
helpful, middle, harmful = removal.values()
claim("the most helpful image is number 87", ranked[0] == 87)
claim(
    "without the most helpful image the loss rises, as predicted within a fifth",
    0.8 < helpful[0] / helpful[1] < 1.2,
)
claim(
    "without the most harmful one it falls, as predicted within a fifth",
    0.8 < harmful[0] / harmful[1] < 1.2,
)
claim(
    "without the one in the middle nothing happens that would matter",
    abs(middle[1]) < 0.01 * helpful[1],
)
claim(
    "the most helpful image has the test image's label",
    y[ranked[0]].item() == y_test[hardest].item(),
)

# %% [markdown]
# So the derivative says what removal does, with the right sign and nearly the right size. The distance between the
# dashed line and the curve at weight 0 is curvature: the tangent knows nothing of it.
#
# ## 4 · What it costs
#
# Why not stop here? `backward` needs what the recorded operations saved: inputs, activations, and the pieces of
# each step's own backward pass. A plain training step frees them when it is done. Here they all stay
# until the end.
#
# To see it we count. A `TorchDispatchMode` is shown every operation that PyTorch executes, in the forward and in the
# backward pass. Ours notes each new block of memory behind the results (a *storage*; tensors that share one count
# once), and is told when a block is freed. It counts bytes and asks no clock, so it does not matter how busy the machine
# is.


# %%
class Meter(TorchDispatchMode):
    """Bytes of all storages that operations returned and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        self.known.add(storage)
        self.change(storage.nbytes())
        weakref.finalize(storage, self.change, -storage.nbytes())

    def change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


# %% [markdown]
# We unroll runs of 10 to 80 steps under the meter, and let `magic` differentiate the same runs, under the same
# meter, with at most six states of the run kept at a time (`magic.plan(run, states=6)`; chapter 06 is about how that can be enough).


# %%
def by_unrolling(order):
    weights = ones.clone().requires_grad_()
    return torch.autograd.grad(measure(train(weights, order)), weights)[0]


def by_replay(order):
    run = run_over(order)
    return magic.attribute(
        run, measure_model, progress=False, plan=magic.plan(run, states=6)
    ).values[0]


def under_the_meter(differentiate, order):
    with Meter() as meter:
        found = differentiate(order)
    return found, meter.peak


lengths = [10, 20, 40, 80]
long = magic.batches(len(x), size=50, epochs=10, seed=0)
unrolled = {T: under_the_meter(by_unrolling, long[:T]) for T in lengths}
replayed = {T: under_the_meter(by_replay, long[:T]) for T in lengths}

# %% tags=["nbval-ignore-output"]
peaks = {"unroll": unrolled, "magic, 6 states": replayed}
frame = pd.DataFrame(
    {name: {T: peak / 1e6 for T, (_, peak) in found.items()} for name, found in peaks.items()}
)
frame = (
    frame.rename_axis("steps T")
    .melt(ignore_index=False, var_name="", value_name="peak memory, MB")
    .reset_index()
)
ax = plt.subplots(figsize=(5.4, 3.2))[1]
sns.lineplot(
    frame, x="steps T", y="peak memory, MB", hue="", style="", markers=True, dashes=False, ax=ax
)
ax.set(title="Memory to differentiate a run of T steps", ylim=(0, None));

# %%
claim(
    "the same scores, to nine digits, at each T",
    all(close(replayed[T][0], unrolled[T][0]) for T in lengths),
)
slopes = [(unrolled[b][1] - unrolled[a][1]) / (b - a) for a, b in pairwise(lengths)]
claim("unrolled, each step more costs the same, within 5 %", max(slopes) < 1.05 * min(slopes))
claim("a step's record is more than two states large", min(slopes) > 2 * run.initial.nbytes)
claim(
    "replayed, 80 steps take less than a third more than 10",
    replayed[80][1] < 1.33 * replayed[10][1],
)
claim(
    "the replay of 80 steps takes less than a quarter of their unroll",
    replayed[80][1] < unrolled[80][1] / 4,
)

# %% [markdown]
# The same scores, one from memory that grows with $T$, one from memory that does not.
#
# A straight line is only a problem if it is steep. How steep is it for a network one would use? We let PyTorch
# tell: on the `meta` device operations compute shapes and no numbers, so the meter can count one step of a ResNet-9
# on 250 CIFAR-10 images without the memory being there. This is an **estimate**: in `float32`, with PyTorch's
# plain operations, and for a training of, say, ten epochs of 50,000 images in batches of 250, which is 2,000 steps.


# %%
def record_of_one_step(net, x, y):
    """Bytes that are still held when the step is over."""
    params = dict(net.named_parameters())
    with Meter() as meter:
        objective = F.cross_entropy(functional_call(net, params, (x,)), y)
        gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
        params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), gradient, strict=True)}
        del objective, gradient
        return meter.now


net = models.ResNet9(width=64).to("meta")
images, labels = (
    torch.empty(250, 3, 32, 32, device="meta"),
    torch.zeros(250, dtype=torch.int64, device="meta"),
)
per_step = record_of_one_step(net, images, labels)
per_state = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])

# %% tags=["nbval-ignore-output"]
print(f"one step's record  {per_step / 1e9:8.1f} GB")
print(f"2,000 of them      {2000 * per_step / 1e12:8.1f} TB")
print(f"one state          {per_state / 1e6:8.1f} MB")

# %%
claim("2,000 steps of ResNet-9, unrolled: more than a terabyte", 2000 * per_step > 1e12)
claim("one of its states is less than a hundredth of one step's record", per_state < per_step / 100)

# %% [markdown]
# Terabytes, for a network whose state takes ten megabytes.
#
# ## 5 · What the backward pass really needs
#
# Look at what that one call does. Call what training carries from step to step the state $s_t$ (for plain SGD,
# just $\theta_t$), one step $s_{t+1} = h_t(s_t, w)$, and write
#
# $$J_t = \frac{\partial s_{t+1}}{\partial s_t}, \qquad
#   W_t = \frac{\partial s_{t+1}}{\partial w}, \qquad
#   \Delta_t = \left(\frac{\partial \varphi}{\partial s_t}\right)^{\!\top}.$$
#
# The weights enter at every step, each entrance moves one state, and later steps carry this on to $\varphi$:
#
# $$\tau = \sum_{t=0}^{T-1} W_t^\top\, \Delta_{t+1}, \qquad
#   \Delta_{t} = J_t^\top J_{t+1}^\top \cdots J_{T-1}^\top\, \Delta_T .$$
#
# That product can be read from either side. From the left, matrices meet matrices: $J_t$ has as many rows and
# columns as the state has numbers, millions squared for a real network. **From the right** a matrix always meets a
# vector: $\Delta_T$ first, then $\Delta_{T-1} = J_{T-1}^\top \Delta_T$, and so on down,
#
# $$\Delta_t = J_t^\top \Delta_{t+1}, \qquad \tau \mathrel{+}= W_t^\top \Delta_{t+1}, \qquad t = T-1, \dots, 0 .$$
#
# $\Delta_t$ is called the **cotangent**; it is as large as one state. To go from $\Delta_{t+1}$ to $\Delta_t$ one
# needs $J_t$ and $W_t$, and these depend on nothing but $s_t$, the batch and the weights. Not on the other $T-1$
# records. So two things are enough:
#
# 1. the states **in reverse order**, $s_{T-1}, \dots, s_0$, each for a moment;
# 2. **one step's pullback**: given $s_t$ and $\Delta_{t+1}$, the two products $J_t^\top \Delta_{t+1}$ and $W_t^\top
#    \Delta_{t+1}$.
#
# One step's record is built, used and thrown away before the next. That is all there is to it, and for our run,
# with all its states kept, it fits into one cell. PyTorch still does the second item here: `torch.autograd.grad` with
# a third argument, `grad_outputs`, multiplies by a vector, and `step` is the function from section 1.


# %%
def apart(params):
    """The same numbers, cut off from the record that made them."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


weights = ones.clone().requires_grad_()
states = [apart(dict(model.named_parameters()))]
for batch in order:
    states.append(apart(step(states[-1], batch, weights)))

cotangent = torch.autograd.grad(measure(states[-1]), list(states[-1].values()))
by_hand = torch.zeros_like(ones)
for t in reversed(range(len(order))):
    after = step(states[t], order[t], weights)
    inputs = [*states[t].values(), weights]
    *cotangent, part = torch.autograd.grad(list(after.values()), inputs, grad_outputs=cotangent)
    by_hand += part

# %%
claim("step by step, the same scores, to nine digits", close(by_hand, scores))

# %% [markdown]
# What `magic` does is this loop, with two things added: it need not keep all the states, and its single step
# is taken apart. [Chapter 04](04_one_step_backwards.ipynb) takes the step apart, chapter 06 drops the states.
#
# ## What we ignored
#
# - **Time.** We counted bytes only. Going back costs several training steps for each step, and states that were
#   not kept have to be computed again.
# - **What else training carries.** Momentum, Adam's two averages, BatchNorm's statistics: with them the state
#   is more than $\theta$, and $J_t$ has blocks. The next chapter has two.
# - **Forward mode.** Reading the product from the left need not build matrices either: carry
#   $\partial s_t / \partial w_i$ along with the training. No state has to be kept, but it takes one such companion for
#   *each* of the $n$ examples; the way back takes one cotangent for each measured output.
# - **Kinks.** A ReLU has points without a derivative. GELU, used here, has none.
#
# ## Exercises
#
# 1. ● (5 min) Measure the mean loss over all 500 test images instead of one. How large is the largest score now, and
#    why is it so much smaller? <details><summary>Hint</summary>Change <code>measure</code> only. An image that helps one
#    test image may harm another.</details>
# 2. ●● (10 min) In the last loop, leave the cotangent as it is at $T$, instead of pulling it back ($J_t = 1$ for all
#    $t$). How far are the scores from the true ones? Do they still name the same helpful images?
#    <details><summary>Hint</summary>Assign to <code>*_, part</code>. TracIn (Pruthi et al. 2020) takes the gradient
#    of the test loss at $\theta_t$ instead, and also leaves out how later steps change what earlier ones did.</details>
# 3. ●●● (20 min) Forward mode: get $\tau_{87}$ alone, without any backward pass through the run, by carrying
#    $\partial \theta_t / \partial w_{87}$ along. Compare with `scores[87]`.
#    <details><summary>Hint</summary><code>torch.func.jvp(lambda w: measure(train(w)), (ones,), (e,))</code> with $e$
#    one at 87; inside, use <code>torch.func.grad</code> in place of <code>torch.autograd.grad</code>, and start from
#    detached parameters. Under the meter, does its peak grow with $T$?</details>
#
# **Next:** [04 · One step backwards](04_one_step_backwards.ipynb).
