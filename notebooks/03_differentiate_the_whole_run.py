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
# **Question.** A trained network is a function $f(w)$ of its data weights. What is the derivative of its output in
# the weight of one training example? And in the weights of all of them?
#
# A training run is a long computation, and PyTorch can differentiate computations. So there is an obvious method: let
# autograd follow the whole run, and ask it for the derivative. [Chapter 00](00_quickstart.ipynb) did so in a dozen lines;
# here we look at each of them, check the answer by training again, and ask what the numbers mean. The method is exact, but
# for realistic runs it does not fit in memory. The reason why it does not fit will show us what to do instead.
#
# | word | in code | meaning |
# |---|---|---|
# | data weights $w \in \mathbb{R}^n$ | `weights` | one per training example; 1 = present, 0 = removed |
# | parameters $\theta_t$ | `params` | of the network after $t$ steps |
# | measured output $\varphi$ | `measure` | a number read off the trained model, here the loss of one test image |
# | score $\tau_i = \partial \varphi(f(w)) / \partial w_i$ | `scores` | how fast the output changes with example $i$'s weight |
# | trace | | what autograd keeps of a computation so that it can be differentiated |
#
# About thirty minutes, with the code and the derivation in section 4. If you would rather write the functions yourself, `uv run python -m magic.book.fill_in`
# makes a version of this chapter for you in `fill_in/`: the text is the same, six functions are yours, and the cells after
# them tell you whether they are right.

# %%
import copy
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()

# %% [markdown]
# ## 1 · Fifteen lines
#
# Our run is short: 400 digits, a network with one hidden layer, and 40 steps of SGD in batches of 50, so that each image
# is seen five times. We use `float64` because we want to compare derivatives to many digits.
#
# `losses` gives the loss of each example as a function of the parameters: `functional_call` runs the model with the
# parameters that it is handed, instead of the model's own.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=400, test=500))
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 32, 10)).double().to(device)
order, rate = magic.batches(len(x), size=50, epochs=5, seed=0).to(device), 0.3


def losses(params, x, y):
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


# %% [markdown]
# The usual training loop overwrites its parameters, and nothing can be differentiated through numbers that are gone.
# Our step differs from it in three ways. The loss of example $i$ is multiplied by its weight $w_i$. The update makes **new**
# tensors and changes none. And the gradient is taken with `create_graph=True`: autograd then follows the backward
# pass as well, operation by operation, so that the gradient itself can be differentiated.


# %% tags=["your-turn"]
def step(params, batch, weights):
    """One step of SGD, in operations that autograd can follow; returns the new parameters.

    params   {name: tensor}. They are not changed: the new ones are new tensors under the same names
    batch    (B,) indices of training examples
    weights  (n,) data weights, of which those at `batch` are used

    The objective is Σ wᵢ ℓᵢ / B over the batch, with ℓᵢ from `losses`. Take its gradient by
    `torch.autograd.grad` with create_graph=True; each new parameter is p − rate · (its gradient).
    """
    objective = (weights[batch] * losses(params, x[batch], y[batch])).sum() / len(batch)
    gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
    return {name: p - rate * g for (name, p), g in zip(params.items(), gradient, strict=True)}


def train(weights, order=order):
    """f(w): the parameters {name: tensor} after one `step` for each batch of `order`.

    Start from `dict(model.named_parameters())`.
    """
    params = dict(model.named_parameters())
    for batch in order:
        params = step(params, batch, weights)
    return params


# %% [markdown]
# With all weights at 1, `train` should end where the usual loop ends.

# %%
ones = torch.ones(len(x), dtype=x.dtype, device=device)
trained = train(ones)
usual = copy.deepcopy(model)
optimizer = torch.optim.SGD(usual.parameters(), lr=rate)
for batch in order:
    optimizer.zero_grad()
    F.cross_entropy(usual(x[batch]), y[batch]).backward()
    optimizer.step()
for name, p in usual.named_parameters():
    agree(f"{name}, the usual loop", trained[name], p, tolerance=1e-9)

# %% [markdown]
# We measure the loss of one test image: the one that the trained network gets most wrong.

# %%
accuracy = (usual(x_test).argmax(1) == y_test).double().mean().item()
hardest = losses(trained, x_test, y_test).argmax().item()
asked = slice(hardest, hardest + 1)


def measure(params):
    return losses(params, x_test[asked], y_test[asked]).sum()


claim("share of the test images read right", accuracy, at_least=0.9)
output = measure(trained).item()
claim("loss of the hardest test image", output, at_least=4)

# %% [markdown]
# `measure(train(weights))` is now one number, computed from 400 numbers. We ask for its derivative.

# %%
weights = ones.clone().requires_grad_()
(scores,) = torch.autograd.grad(measure(train(weights)), weights)

# %% [markdown]
# That is all. Without comments, `losses`, `step`, `train`, `measure` and these two lines are fifteen, and `scores` holds
# $\partial\varphi / \partial w_i$ for each of the 400 training images. Autograd has gone back through forty updates, each
# of them made of a forward *and* a backward pass.
#
# Is it right? The first judge is the definition of a derivative. With $e_i$ the vector that is 1 at $i$ and 0 elsewhere,
#
# $$\tau_i \approx \frac{\varphi(f(w + \varepsilon e_i)) - \varphi(f(w - \varepsilon e_i))}{2\varepsilon} .$$
#
# This takes two trainings for one example, and would take 800 for all. We check six.


# %% tags=["your-turn"]
def retrained(i, weight):
    """φ, as a float, of the network trained with weight `weight` on example i and 1 on all others.

    Change a copy of `ones`, never `ones` itself.
    """
    weights = ones.clone()
    weights[i] = weight
    return measure(train(weights)).item()


def finite_difference(i, epsilon=1e-4):
    """The formula above, from `retrained` at the weights 1 + ε and 1 − ε of example i."""
    return (retrained(i, 1 + epsilon) - retrained(i, 1 - epsilon)) / (2 * epsilon)


# %%
ranked = scores.argsort().tolist()
some = [ranked[0], ranked[-1], 0, 1, 2, 3]
differences = torch.tensor([finite_difference(i) for i in some], dtype=x.dtype, device=device)
agree("autograd, finite differences", scores[some], differences, tolerance=1e-6)

# %% [markdown]
# The second judge is `magic`. It is given the same model, optimizer, data and order, and finds the same derivative in
# another way, without ever holding the trace of the whole run.


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


run = magic.Run(
    model,
    torch.optim.SGD(model.parameters(), lr=rate),
    data=(x, y),
    loss=loss,
    batches=order,
)
attribution = magic.attribute(
    run, lambda model: loss(model, x_test[asked], y_test[asked]), progress=False
)
agree("autograd, magic.attribute", scores, attribution.values[0], tolerance=1e-9)

# %% [markdown]
# Three ways lead to one answer. The finite differences agree with autograd to six digits, which is as good as such a
# difference gets; autograd and `magic` agree to nine.
#
# ## 2 · A weight is a dial
#
# What do these numbers mean? Above, `argsort` has ranked the images by their scores. The first of them has the most
# negative score of all: more weight on it lowers the loss of our test image the fastest.

# %% tags=["nbval-ignore-output"]
helpful, middle, harmful = ranked[0], ranked[len(x) // 2], ranked[-1]
pictures = torch.stack([x_test[hardest], x[helpful]])
said = usual(x_test[asked]).argmax().item()
titles = [
    f"test image {hardest}\na {y_test[hardest]}, read as {said}",
    f"training image {helpful}\na {y[helpful]}, τ = {scores[helpful]:.2f}".replace("-", "−"),
]
plot.images(pictures, titles);

# %% [markdown]
# Now turn its dial: give this image the weights $0, \tfrac14, \dots, 2$, train nine networks, and plot $\varphi$ for
# each. Then draw a straight line through the point at weight 1, with the score as its slope.

# %%
dial = [k / 4 for k in range(9)]
curve = [retrained(helpful, weight) for weight in dial]
tangent = [output + scores[helpful].item() * (weight - 1) for weight in dial]

# %% tags=["nbval-ignore-output"]
ax = plt.subplots(figsize=(5, 3.2))[1]
ax.plot(dial, curve, "o-", color=plot.HELPFUL, label="trained nine times")
ax.plot(dial, tangent, "--", color="black", linewidth=1.2, label="tangent at 1, slope τ")
ax.axvline(1, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.legend()
ax.set(xlabel=f"weight of training image {helpful}", ylabel="loss of the test image");

# %%
slopes = [(b - a) / 0.25 for a, b in pairwise(curve)]
claim("steepest over flattest piece of the curve", min(slopes) / max(slopes), at_most=1.5)
claim("distance of the tangent from the curve at 3/4", abs(tangent[3] - curve[3]), at_most=0.02)

# %% [markdown]
# The curve is smooth, and it falls: the more this image counts, the smaller the loss. The dashed line was drawn from one
# training and one score, and it touches the curve at weight 1. **A score is the slope of this curve, where our model is.**
#
# So a score is a rate: the change of $\varphi$ per unit of weight. Removing example $i$ takes one unit away, and
# the tangent predicts a change of $-\tau_i$.
#
# - *Sign.* If $\tau_i < 0$, weight on $i$ lowers the loss: the example **helps**. If $\tau_i > 0$, it **harms**.
# - *Size.* Twice the score means twice the predicted effect.
#
# Here are the image with the most negative score, the one with the most positive, and one from the middle of the ranking.
# We turn each dial down to 0, which is a training without that image.

# %%
down = [0, 0.25, 0.5, 0.75, 1, 1.25]
roles = {"the most helpful": helpful, "in the middle": middle, "the most harmful": harmful}
turned = {role: [retrained(i, weight) for weight in down] for role, i in roles.items()}

# %% tags=["nbval-ignore-output"]
ax = plt.subplots(figsize=(5.4, 3.6))[1]
for (role, i), color in zip(roles.items(), [plot.HELPFUL, "black", plot.HARMFUL], strict=True):
    line = [output + scores[i].item() * (weight - 1) for weight in down]
    ax.plot(down, line, "--", color=color, linewidth=1)
    ax.plot(down, turned[role], "o-", color=color)
    score = f"{scores[i]:+.3f}".replace("-", "−")
    height = turned[role][0] + (-0.15 if role == "the most harmful" else 0.09)
    ax.text(0.03, height, f"{role}, τ = {score}", color=color, fontsize=10)
ax.axvline(1, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.set(xlabel="weight of the training image", ylabel="loss of the test image", ylim=(3.95, 5.95))
ax.set_title("Dots: trained. Dashed: tangents at weight 1");

# %%
predicted = {role: -scores[i].item() for role, i in roles.items()}
true = {role: turned[role][0] - output for role in roles}
for role in ("the most helpful", "the most harmful"):
    ratio = predicted[role] / true[role]
    claim(f"without {role}: predicted over true", ratio, at_least=0.84, at_most=0.94)
claim("without the one in the middle: change", abs(true["in the middle"]), at_most=0.002)
claim("the most helpful image has the test image's label", (y[helpful] == y_test[hardest]).item())

# %% [markdown]
# The derivative predicts what a removal does: the sign is right, and the size is about a tenth too small. That tenth is
# curvature, the gap between dashed line and curve at weight 0, of which a tangent knows nothing.
#
# ## 3 · What it costs
#
# Why not stop here? To go back through an operation, autograd needs what went into it, and keeps it: inputs,
# activations, the pieces of each step's own backward pass. All this is the **trace** of a computation. The usual loop
# frees the trace of a step when the step is over. Here all of them stay until the end.
#
# PyTorch lets us watch: inside `saved_tensors_hooks`, it calls a function of ours for each tensor that it keeps. We count
# the bytes, those of tensors that share their memory only once.


# %%
def trace_size(compute):
    """Bytes that autograd keeps so that what `compute()` returns can be differentiated."""
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept)


lengths = [10, 20, 40, 80]
longer = magic.batches(len(x), size=50, epochs=10, seed=0).to(device)
traces = {T: trace_size(lambda T=T: train(weights, longer[:T])) for T in lengths}
state_size = sum(p.nbytes for p in model.parameters())
per_step = [(traces[b] - traces[a]) / (b - a) for a, b in pairwise(lengths)]
claim("bytes per added step, largest over smallest", max(per_step) / min(per_step), at_most=1.01)
claim("one step's trace, in sets of parameters", min(per_step) / state_size, at_least=3.5)

# %% [markdown]
# The trace grows in proportion to the number of steps. Whether that is a problem depends on the network, so we ask about a
# larger one: a ResNet-9 on batches of 250 CIFAR-10 images. PyTorch's `meta` device computes shapes and no numbers, so
# its trace can be counted on a machine that could not hold it. Say that training takes 2,000 steps: ten epochs of
# 50,000 images. (This is an estimate, in `float32` and for PyTorch's plain operations.)


# %%
net = models.ResNet9(width=64).to("meta")
images = torch.empty(250, 3, 32, 32, device="meta")
labels = torch.zeros(250, dtype=torch.int64, device="meta")


def step_of_net():
    params = dict(net.named_parameters())
    objective = F.cross_entropy(functional_call(net, params, (images,)), labels)
    gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
    return [p - 0.1 * g for p, g in zip(params.values(), gradient, strict=True)]


net_trace = trace_size(step_of_net)
net_state = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
claim("ResNet-9, trace of one step, GB", net_trace / 1e9, at_least=2)
claim("trace of 2,000 steps, TB", 2000 * net_trace / 1e12, at_least=4)
claim("parameters and statistics, MB", net_state / 1e6, at_most=10)

# %% [markdown]
# Four terabytes, for a network that takes ten megabytes.
#
# ## 4 · What the backward pass really needs
#
# Let us look at what that one call computes. Call everything that training carries from one step to the next the **state**
# $s_t$; for plain SGD it is $\theta_t$. One step is a function $s_{t+1} = h_t(s_t, w)$, and the run is a composition of $T$
# of them. Write
#
# $$J_t = \frac{\partial s_{t+1}}{\partial s_t}, \qquad
#   W_t = \frac{\partial s_{t+1}}{\partial w}, \qquad
#   \Delta_t = \left(\frac{\partial \varphi}{\partial s_t}\right)^{\!\top}.$$
#
# The weights enter at every step. What they do to $s_{t+1}$ there, $W_t$, is carried on to $\varphi$ by the steps that
# follow. Adding up all steps,
#
# $$\tau = \sum_{t=0}^{T-1} W_t^\top\, \Delta_{t+1}, \qquad
#   \Delta_{t} = J_t^\top J_{t+1}^\top \cdots J_{T-1}^\top\, \Delta_T .$$
#
# The product can be computed from either end. From the left, matrices are multiplied by matrices, and each $J_t$ has as
# many rows and columns as the state has numbers: millions, for a real network. **From the right**, a matrix is
# always multiplied by a vector. We begin with $\Delta_T$, the gradient of $\varphi$ in the final state, and go down:
#
# $$\Delta_t = J_t^\top \Delta_{t+1}, \qquad \tau \mathrel{+}= W_t^\top \Delta_{t+1}, \qquad t = T-1, \dots, 0 .$$
#
# $\Delta_t$ is called the **cotangent**. It is as large as one state, and says how $\varphi$ changes with each number of
# $s_t$. To get from $\Delta_{t+1}$ to $\Delta_t$ we need $J_t$ and $W_t$, and these depend only on $s_t$, the batch and
# the weights, not on the other $T-1$ traces. So two things are enough:
#
# 1. the states **in reverse order**, $s_{T-1}, \dots, s_0$, each for a moment;
# 2. **one step, pulled back**: given $s_t$ and $\Delta_{t+1}$, the products $J_t^\top \Delta_{t+1}$ and
#    $W_t^\top \Delta_{t+1}$.
#
# The trace of a step is built, used, and thrown away before the next. With all states kept, this takes two short functions.
# For the second item we let PyTorch do the work once more: `torch.autograd.grad(outputs, inputs, grad_outputs=v)`
# multiplies the transposed Jacobian of `outputs` in `inputs` by `v`.


# %%
def cut(params):
    """The same {name: tensor} as new leaves: detached from their trace, requiring a gradient."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


# %% tags=["your-turn"]
def forwards(weights):
    """The T + 1 states of the run, [θ_0, …, θ_T], each {name: tensor}, each `cut` from its trace.

    Start from the model's own parameters; go on from the state that was cut.
    """
    states = [cut(dict(model.named_parameters()))]
    for batch in order:
        states.append(cut(step(states[-1], batch, weights)))
    return states


# %% tags=["your-turn"]
def backwards(states, weights):
    """τ, (n,), by the loop above. `weights` (n,) requires a gradient.

    Δ_T: the gradients of `measure(states[-1])` in the tensors of states[-1].
    Then, for t = T−1, …, 0: do step t again from states[t]; get Δ_t, one tensor for each parameter,
    and the step's part of τ, from one call of `torch.autograd.grad`; add the part to the scores.
    """
    cotangent = torch.autograd.grad(measure(states[-1]), list(states[-1].values()))
    scores = torch.zeros_like(weights)
    for t in reversed(range(len(order))):
        after = step(states[t], order[t], weights)
        inputs = [*states[t].values(), weights]
        *cotangent, part = torch.autograd.grad(list(after.values()), inputs, grad_outputs=cotangent)
        scores = scores + part
    return scores


# %%
states = forwards(weights)
claim("no state holds a trace", all(p.is_leaf for state in states for p in state.values()))
by_loop = backwards(states, weights)
difference = (by_loop - scores).abs().max() / scores.abs().max()
claim("loop against one call: largest relative difference", difference, at_most=1e-9)

# %% [markdown]
# The same scores. And the memory? The loop holds the states, and the trace of one step.

# %%
one_trace = trace_size(lambda: step(states[0], order[0], weights))
table = pd.DataFrame(
    {
        "all at once": [traces[80] / 1e6, 2000 * net_trace / 1e6],
        "the loop: states": [81 * state_size / 1e6, 2001 * net_state / 1e6],
        "the loop: one trace": [one_trace / 1e6, net_trace / 1e6],
    },
    index=["MLP, 80 steps", "ResNet-9, 2,000 steps"],
)
small, large = table["all at once"] / (table["the loop: states"] + table["the loop: one trace"])
claim("MLP: the loop takes less memory, by a factor of", small, at_least=3.5)
claim("ResNet-9: by a factor of", large, at_least=190)

# %% tags=["nbval-ignore-output"]
table.style.format("{:,.1f}").set_caption("megabytes")

# %% [markdown]
# For the ResNet-9, terabytes have become 22 gigabytes, and nine tenths of these are the states. Two things remain.
# [Chapter 04](04_one_step_backwards.ipynb) takes one step apart and finds its two products by hand;
# [chapter 06](06_remember_forget_replay.ipynb) keeps a few states instead of all. Together they are what `magic.attribute`
# does.
#
# ## What we claim
#
# - The derivative of a training run in all its data weights is one call of autograd, exact to rounding.
# - A score is the slope of the output in one example's weight. Removal of the example changes the output by about
#   $-\tau_i$.
# - One call for the whole run keeps a trace that grows with its length. A loop over the steps needs their states in
#   reverse order, and the trace of one step.
#
# ## What we ignored
#
# - **Time.** We counted bytes only. Going back through a step costs as much as several training steps, and states that
#   were not kept have to be computed again.
# - **What else training carries.** With momentum, Adam's averages or BatchNorm's statistics, the state is more than
#   $\theta$. The loop stays as it is; $J_t$ gets blocks ([chapter 05](05_optimizers_with_memory.ipynb)).
# - **Forward mode.** Reading the product from the left does not require matrices either: one can carry
#   $\partial s_t / \partial w_i$ along with the training. No state has to be kept, but each of the $n$ examples needs
#   its own companion as large as a state, whereas the way back needs one cotangent for each measured output.
# - **Points without a derivative.** A ReLU has one at 0. Our network uses GELU, which has none.
#
# ## Exercises
#
# Uncomment the last line of a cell, and the import in the first, to have your answer checked.
#
# **03.1** ●○○ · 10 min · *All scores from two trainings.* Finite differences check one score at a time. Write `slope(f, w,
# u, epsilon)`: the derivative of $f$ at $w$ along a direction $u \in \mathbb{R}^n$, as a central difference. With $f(w)
# = \varphi(\text{train}(w))$ and a random $u$, what must it equal, if all 400 scores are right?
# <details><summary>Hint</summary>Two values of f, at w + εu and w − εu. By the chain rule the derivative along u is
# Σ uᵢ τᵢ.</details>

# %%
def slope(f, w, u, epsilon=1e-4):
    """f: (n,) tensor -> number. w, u: (n,). Returns the derivative of f at w along u, a number."""
    ...


# from magic.book import check
# check("03.1", slope)

# %% [markdown]
# **03.2** ●●○ · 15 min · *Any loss, any measure.* Write `unroll` for a model that you know nothing of: `losses(theta,
# batch)` gives the losses of the examples in `batch`, `measure(theta)` gives a number, and `theta` is one vector.
# <details><summary>Hint</summary>Section 1's <code>step</code>, <code>train</code> and call in one function. θ and the weights come without <code>requires_grad</code>: make new leaves of both, once, before the
# first step. After that no line may cut θ from its trace.</details>


# %%
def unroll(losses, measure, theta, batches, weights, rate):
    """τ (n,) of plain SGD, from theta (P,), over a list of index tensors, at `weights` (n,)."""
    ...


# check("03.2", unroll)

# %% [markdown]
# **03.3** ●●○ · 20 min · *The loop for any state.* Let a state be a tuple of tensors, and `step(state, batch, weights)`
# return the next one; with momentum, for example, it holds the parameters and a buffer. Write the loop of section 4 for it.
# <details><summary>Hint</summary>Let the weights and each tensor of <code>states[t]</code> require a gradient, do the step
# again, and call <code>torch.autograd.grad</code> with the cotangent as <code>grad_outputs</code>.</details>


# %%
def go_back(step, states, batches, weights, cotangent):
    """τ (n,), from states [s_0, …, s_T], T batches, and Δ_T, a tuple like a state."""
    ...


# check("03.3", go_back)

# %% [markdown]
# **03.4** ●●● · 25 min · *Forward mode.* Carry $\partial s_t / \partial w_i$ along with the training, for one example $i$,
# and return it for $t = T$. Nothing may be kept from earlier steps. (To get $\tau_i$, multiply it by $\Delta_T$.)
# <details><summary>Hint</summary><code>torch.func.jvp(f, inputs, tangents)</code> returns f(inputs) and how it changes when
# the inputs change along the tangents. At each step two inputs change: the state, along what you carry, and the
# weights, along eᵢ. It takes tuples as inputs and tangents. (To try it on a step of your own, write that with
# <code>torch.func.grad</code>: <code>jvp</code> does not go through <code>torch.autograd.grad</code>.)</details>


# %%
def carry(step, start, batches, weights, i):
    """∂s_T/∂w_i, a tuple of tensors like the state `start`; `step` as in 03.3."""
    ...


# check("03.4", carry)

# %% [markdown]
# **03.5** ●○○ · 5 min · *An average.* Measure the mean loss over all 500 test images instead of one. How large is the
# largest score now, and why is it so much smaller?
# <details><summary>Hint</summary>Change <code>measure</code> only. What helps one test image may harm
# another.</details>
#
# **03.6** ●●○ · 10 min · *Without later steps.* In `backwards`, leave the cotangent as it is at $T$ instead of pulling it
# back, as if $J_t$ were the identity. How do the scores correlate with the true ones? Do they still name the same
# most helpful image?
# <details><summary>Hint</summary>Assign to <code>*_, part</code>. TracIn (Pruthi et al. 2020) also leaves out how later
# steps change what earlier ones did; it takes the gradient of the test loss at θₜ where we take that at
# the end.</details>
#
# **Next:** [04 · One step backwards](04_one_step_backwards.ipynb).
