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
# # 04 · One step backwards
#
# **Question.** How does a cotangent go back through one training step?
#
# [Chapter 03](03_differentiate_the_whole_run.ipynb) ended with a loop that goes back through a run one step at a
# time. At each step it needs two products: one carries the cotangent to the state before, one gives the scores of the
# batch. There, PyTorch made them. Here we make them by hand, for SGD, for momentum and for Adam, and find
# that they are three times the same thing: some elementwise arithmetic, **one Hessian-vector product**, and one
# directional derivative per example.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State` | parameters $\theta$, and what the optimizer remembers |
# | step $h_t$ | `run.step` | $s_{t+1} = h_t(s_t, w)$ |
# | cotangent $\Delta_t = \partial \varphi / \partial s_t$ | `cotangent` | how the output moves with the state after $t$ steps; as large as a state |
# | scores $\tau_i = \partial \varphi / \partial w_i$ | `scores` | filled batch by batch, on the way back |
# | pullback | `step_vjp` | $\Delta_{t+1} \mapsto \Delta_t$, and what step $t$ adds to $\tau$ |
#
# About twenty minutes to read, one to run.

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim
from magic.engine.adjoint import measure_vjp, step_vjp

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()
warnings.filterwarnings(
    "ignore", ".*torch.jit", FutureWarning
)  # PyTorch's own, at the first use of forward mode

# %% tags=["nbval-ignore-output"]
figure, ax = plt.subplots(figsize=(7.8, 2.3))
ax.set(xlim=(-0.4, 6.3), ylim=(-1.2, 1.1))
ax.axis("off")
ax.axvspan(1.66, 3.34, color=plot.NEUTRAL, alpha=0.15, linewidth=0)


def arrow(start, end, color, bend=0.0):
    shape = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**shape, "color": color, "linewidth": 1.4})


for k, name in enumerate(["s_0", r"\cdots", "s_t", "s_{t+1}", r"\cdots", "s_T", r"\varphi"]):
    ax.text(k, 0, f"${name}$", ha="center", va="center", fontsize=14)
    if k:
        arrow((k - 0.72, 0), (k - 0.3, 0), plot.NEUTRAL)
        arrow((k - 0.12, 0.22), (k - 0.88, 0.22), plot.HARMFUL, bend=0.35)
    if 0 < k < 6:
        arrow((k - 0.42, -0.78), (k - 0.42, -0.12), plot.NEUTRAL)
        arrow((k - 0.58, -0.12), (k - 0.58, -0.78), plot.HARMFUL)
        ax.text(k - 0.5, -1, "$w$", ha="center", va="center", fontsize=13)
for k, name in enumerate([r"\Delta_t", r"\Delta_{t+1}", None, r"\Delta_T"], start=2):
    if name:
        ax.text(k, 0.5, f"${name}$", ha="center", color=plot.HARMFUL, fontsize=12)
ax.text(2.5, 0.88, "this chapter", ha="center", fontsize=9);

# %% [markdown]
# Grey arrows: training. Each step takes a state and the weights of its batch, and makes the next state. Orange: the
# way back. Each step takes the cotangent of the state after it, makes that of the state before it, and leaves a part of
# the scores with the weights. This chapter is about one link of the chain.
#
# ## 1 · A step to go back through
#
# 400 digits, a small network, and a run of 40 steps; `float64`, since we compare derivatives. To make the formulas and
# the code look alike, all 910 parameters are one vector `theta`, and `losses` gives the batch's losses as a
# function of it. The data weights are not 1 but random numbers around it, so that a lost weight would show.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=400, test=500))
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 12, 10)).double().to(device)
order = magic.batches(len(x), size=50, epochs=5, seed=0).to(device)
weights = 0.5 + torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(
    device
)


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def flat(tensors, axis=0):
    return torch.cat([tensor.flatten(axis) for tensor in tensors.values()], dim=axis)


def losses(theta, x, y):
    named = dict(model.named_parameters())
    pieces = theta.split([p.numel() for p in named.values()])
    params = {
        name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)
    }
    return loss(lambda x: functional_call(model, params, (x,)), x, y)


# %% [markdown]
# The run itself uses momentum, which section 4 needs. Its states are all kept, so that we can go to any of them.

# %%
rate, mu = 0.05, 0.9
run = magic.Run(
    model, torch.optim.SGD(model.parameters(), lr=rate, momentum=mu), (x, y), loss, order
)
states = [run.initial]
while states[-1].step < run.steps:
    states.append(run.step(states[-1], weights))

trained = run.model(states[-1])
asked = loss(trained, x_test, y_test).argsort(descending=True)[:4]
accuracy = (trained(x_test).argmax(1) == y_test).double().mean().item()
claim("the network reads at least 85 % of the test images right", accuracy >= 0.85)

# %% [markdown]
# What we measure are the losses of the four test images that it gets most wrong: $K = 4$ numbers $\varphi_k$. The step
# that we go back through is step 20.


# %%
def phi(theta):
    return losses(theta, x_test[asked], y_test[asked])


def close(mine, reference):
    """Equal to nine digits, relative to the largest."""
    return bool((mine - reference).abs().max() <= 1e-9 * reference.abs().max())


t = 20
batch, weight = order[t], weights[order[t]].requires_grad_()
theta = flat(states[t].params).requires_grad_()

# %% [markdown]
# ## 2 · Plain SGD: back to the parameters
#
# A step does two things: it takes a gradient, and it hands it to the optimizer. The gradient is
#
# $$g(\theta, w) = \nabla_\theta\, L(\theta, w), \qquad
#   L(\theta, w) = \frac1B \sum_{i \in \text{batch}} w_i\, \ell_i(\theta),$$
#
# and plain SGD makes of it (a prime means: after the step)
#
# $$\theta' = \theta - \eta\, g(\theta, w).$$
#
# Move $\theta$ a little, by $d$. Then $\theta'$ moves by $d - \eta H d$, where $H = \partial g / \partial \theta =
# \nabla^2_\theta L$ is the **Hessian** of the batch's weighted loss: the gradient of a gradient. So the Jacobian
# of the step is $I - \eta H$. The cotangent goes back through its transpose, and $H$ is symmetric:
#
# $$\boxed{\;\Delta = (I - \eta H)^\top \Delta' = \Delta' - \eta\, H \Delta'\;}$$
#
# $H$ has $910^2$ entries here and $10^{12}$ or more in a network of use. But nobody asked for $H$. We need one product $H
# \Delta'$, and that is a gradient of something we can compute: since $\Delta'$ is a constant,
#
# $$H \Delta' = \nabla_\theta \big( g(\theta, w) \cdot \Delta' \big).$$
#
# Compute $g$ with a backward pass, keep its record (`create_graph=True`), and go backward through *that*. This
# is **double backward**; it costs a few gradients and never builds a matrix. `torch.autograd.grad(g, theta, v)` is
# the gradient of $g \cdot v$.


# %%
def objective(theta, weight, batch):
    return (weight * losses(theta, x[batch], y[batch])).sum() / len(batch)


def gradient(theta, weight, batch, create_graph=False):
    return torch.autograd.grad(objective(theta, weight, batch), theta, create_graph=create_graph)[0]


g = gradient(theta, weight, batch, create_graph=True)
theta_after = (theta - rate * g).detach().requires_grad_()
after = torch.autograd.grad(phi(theta_after)[0], theta_after)[
    0
]  # Δ', as if training ended with this step
(product,) = torch.autograd.grad(g, theta, after, retain_graph=True)
before = after - rate * product  # Δ

# %% [markdown]
# The judge builds the matrices we avoid: the Hessian, and the Jacobian of the whole step in all 910 parameters and
# in the 50 weights of its batch, by **forward** mode, one column for each input.


# %%
def sgd_step(theta, weight):
    return theta - rate * torch.func.grad(objective)(theta, weight, batch)


def hessian_at(theta):
    return torch.autograd.functional.hessian(
        lambda theta: objective(theta, weight.detach(), batch), theta.detach()
    )


hessian = hessian_at(theta)
J, W = torch.func.jacfwd(sgd_step, argnums=(0, 1))(theta.detach(), weight.detach())
identity = torch.eye(len(theta), dtype=x.dtype, device=device)
agree("H Δ', explicit Hessian", product, hessian @ after, tolerance=1e-9)
agree("I − ηH, Jacobian of the step", identity - rate * hessian, J, tolerance=1e-9)
agree("Δ, Jacobian transposed times Δ'", before, J.T @ after, tolerance=1e-9)

# %% [markdown]
# What does $I - \eta H$ do to a cotangent? In a direction in which the loss has curvature $\lambda$ it multiplies by
# $1 - \eta\lambda$. Here is that factor for all 910 directions, at the start of training and at its end.

# %%
factors = {}
for name, state in {"at the start": states[0], "at the end": states[-1]}.items():
    factors[name] = 1 - rate * torch.linalg.eigvalsh(hessian_at(flat(state.params))).flip(0).cpu()

# %% tags=["nbval-ignore-output"]
ax = plt.subplots(figsize=(5.6, 3))[1]
for name, values in factors.items():
    sns.lineplot(x=range(1, len(values) + 1), y=values, label=name, errorbar=None, ax=ax)
ax.axhline(1, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.set(
    xscale="log",
    xlabel="direction, the most curved first",
    ylabel="factor 1 − ηλ",
    title="What one step does to a cotangent",
)
ax.set_xticks([1, 10, 100, 910], ["1", "10", "100", "910"]);

# %%
start, end = factors.values()
claim(
    "at the end, more than half of the directions keep within 1 % of 1",
    ((end - 1).abs() < 0.01).double().mean() > 0.5,
)
claim("the most curved one shrinks by more than a fifth", end[0] < 0.8)
claim("at the start there are directions that grow", start[-1] > 1.02)

# %% [markdown]
# In most directions a cotangent passes a step nearly unchanged. In the few curved ones it shrinks: what an early step
# did there, later steps undo, since they pull the parameters back into the valley. Where the loss curves downward,
# $\lambda < 0$, it grows: later steps carry a push there further. With $\eta\lambda > 2$ the factor would be below $-1$,
# and grow with every step back: one way to get the rough training of [chapter
# 01](01_the_same_run_twice.ipynb).
#
# ## 3 · Plain SGD: to the weights
#
# The weights stand in $g$ alone, and linearly: $\partial g / \partial w_i = \nabla \ell_i / B$. So
#
# $$\boxed{\;\frac{\partial \varphi}{\partial w_i} = -\frac{\eta}{B}\, \nabla \ell_i(\theta) \cdot \Delta'
#   \qquad (i \in \text{batch})\;}$$
#
# In words: with a little more weight, example $i$ pushes the parameters a little more along $-\eta \nabla \ell_i / B$.
# $\Delta'$ says what $\varphi$ thinks of a push. Their product is the example's score from this step.
#
# It looks as if we needed the gradient of *each example*, $B$ vectors as large as the network. Again nobody asked for
# them. $\nabla \ell_i \cdot \Delta'$ is the **directional derivative** of $\ell_i$ along $\Delta'$: how fast the loss of
# example $i$ changes when the parameters set off in that direction. All $B$ come out of one forward pass that carries
# the direction along (a Jacobian-vector product, `jvp`). Three ways to the same 50 numbers:

# %%
each = torch.func.jacrev(lambda theta: losses(theta, x[batch], y[batch]))(
    theta.detach()
)  # (B, 910)
by_gradients = -rate * each @ after / len(batch)
_, along = torch.func.jvp(
    lambda theta: losses(theta, x[batch], y[batch]), (theta.detach(),), (after,)
)
by_direction = -rate * along / len(batch)
(in_weight,) = torch.autograd.grad(g, weight, after, retain_graph=True)
by_double_backward = -rate * in_weight
agree("one directional derivative each", by_direction, by_gradients, tolerance=1e-9)
agree("double backward", by_double_backward, by_gradients, tolerance=1e-9)
agree("Jacobian in the weights", by_double_backward, W.T @ after, tolerance=1e-9)

# %% [markdown]
# The third way is the one to keep. The double backward that gives $H\Delta'$ goes through $g$, and $w$ is an input of
# $g$ like $\theta$: asked for both, it gives both, and the record is walked once. So here is the heart of the chapter,
# in three lines: a cotangent of the gradient goes in; its parts for the parameters and for the batch's weights
# come out.


# %%
def pull_gradient(theta, weight, batch, cotangent):
    """ḡ = ∂φ/∂g  ->  H ḡ,  and  ∇ℓᵢ · ḡ / B for each example i of the batch."""
    theta, weight = theta.detach().requires_grad_(), weight.detach().requires_grad_()
    g = gradient(theta, weight, batch, create_graph=True)
    return torch.autograd.grad(g, (theta, weight), cotangent)


# %% [markdown]
# For plain SGD, $\bar g = -\eta \Delta'$, and what comes out is all there is:

# %%
curved, scores = pull_gradient(theta, weight, batch, -rate * after)
claim(
    "plain SGD: the two boxes from one call",
    close(after + curved, before) and close(scores, by_double_backward),
)

# %% [markdown]
# ## 4 · Momentum
#
# With momentum the optimizer remembers a buffer $m$, and the state has two parts, $s = (\theta, m)$:
#
# $$m' = \mu m + g(\theta, w), \qquad \theta' = \theta - \eta m' .$$
#
# Four partial derivatives, in a matrix of blocks:
#
# $$J = \begin{pmatrix} \partial\theta'/\partial\theta & \partial\theta'/\partial m \\
#                       \partial m'/\partial\theta & \partial m'/\partial m \end{pmatrix}
#     = \begin{pmatrix} I - \eta H & -\eta\mu I \\ H & \mu I \end{pmatrix}.$$
#
# Its transpose acts on $\Delta' = (\Delta'_\theta, \Delta'_m)$. Every entry that holds $H$ or $\mu$ got there through
# $m'$, so collect first what reaches $m'$, directly and by way of $\theta'$:
#
# $$\bar g = \Delta'_m - \eta \Delta'_\theta, \qquad
#   \Delta_\theta = \Delta'_\theta + H \bar g, \qquad
#   \Delta_m = \mu\, \bar g, \qquad
#   \frac{\partial \varphi}{\partial w_i} = \frac1B \nabla \ell_i \cdot \bar g .$$
#
# $\bar g$ is $\partial \varphi / \partial g$, because $g$ enters $m'$ with factor 1. One Hessian-vector product, as before.


# %%
def pull_momentum(theta, weight, batch, cotangent):
    """(Δ'_θ, Δ'_m) -> (Δ_θ, Δ_m), and the batch's scores."""
    to_params, to_buffer = cotangent
    to_gradient = to_buffer - rate * to_params
    curved, scores = pull_gradient(theta, weight, batch, to_gradient)
    return (to_params + curved, mu * to_gradient), scores


# %% [markdown]
# Both parts of the cotangent should be there when we check it. So we start one step later, from
# $\varphi(\theta_{22})$, and go back two steps: after the first, $\Delta_m$ is no longer zero. The judge is
# autograd through two steps at once.

# %%
buffers = {name: slots["momentum_buffer"] for name, slots in states[20].slots.items()}
theta_20, m_20 = theta.detach().requires_grad_(), flat(buffers).requires_grad_()
w_20, w_21 = (weights[order[k]].requires_grad_() for k in (20, 21))
m_21 = mu * m_20 + gradient(theta_20, w_20, order[20], create_graph=True)
theta_21 = theta_20 - rate * m_21
m_22 = mu * m_21 + gradient(theta_21, w_21, order[21], create_graph=True)
theta_22 = theta_21 - rate * m_22

# %%
reference = torch.autograd.grad(phi(theta_22)[0], (theta_20, m_20, w_20, w_21), retain_graph=True)
last = torch.autograd.grad(phi(theta_22)[0], theta_22)[0]
cotangent, scores_21 = pull_momentum(theta_21, w_21, order[21], (last, torch.zeros_like(last)))
cotangent, scores_20 = pull_momentum(theta_20, w_20, order[20], cotangent)
mine = *cotangent, scores_20, scores_21
names = "Δ of the parameters", "Δ of the buffer", "the scores of step 20", "the scores of step 21"
for name, by_hand, judge in zip(names, mine, reference, strict=True):
    claim(f"momentum, {name}: by hand as by autograd, to nine digits", close(by_hand, judge))

# %% [markdown]
# ## 5 · Adam
#
# The pattern is set. An optimizer is a function $U$ from the state and the gradient to the next state, and it is
# **elementwise**: parameter 17 of the next state depends on parameter 17 and on gradient 17. So each of its partial
# derivatives is a *diagonal* matrix, which is a vector, and products with it are elementwise, too.
#
# 1. **Pull through $U$**: elementwise arithmetic. Out come $\bar g$, and what reaches $s$ directly.
# 2. **Pull through $g$**: `pull_gradient`, the same for every optimizer.
#
# For AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019), with $t$ the number of updates including this one, $\alpha =
# \eta / (1 - \beta_1^t)$, $c = \sqrt{1 - \beta_2^t}$ and weight decay $\lambda$,
#
# $$m' = \beta_1 m + (1 - \beta_1)\, g, \qquad v' = \beta_2 v + (1 - \beta_2)\, g^2, \qquad
#   \theta' = (1 - \eta\lambda)\, \theta - \alpha\, \frac{m'}{r}, \quad r = \frac{\sqrt{v'}}{c} + \epsilon .$$
#
# First collect what reaches $m'$ and $v'$, then divide it up (all products elementwise):
#
# $$\bar m = \Delta'_m - \frac{\alpha}{r}\, \Delta'_\theta, \qquad
#   \bar v = \Delta'_v + \frac{\alpha\, m'}{2\, c\, r^2 \sqrt{v'}}\, \Delta'_\theta, \qquad
#   \bar g = (1 - \beta_1)\, \bar m + 2 (1 - \beta_2)\, g\, \bar v,$$
# $$\Delta_\theta = (1 - \eta\lambda)\, \Delta'_\theta + H \bar g, \qquad
#   \Delta_m = \beta_1 \bar m, \qquad \Delta_v = \beta_2 \bar v .$$


# %%
def pull_adamw(state, weight, batch, cotangent, lr, beta1, beta2, eps, decay):
    """(Δ'_θ, Δ'_m, Δ'_v) -> (Δ_θ, Δ_m, Δ_v), and the batch's scores.

    `state` is (θ, m, v, updates done).
    """
    (theta, m, v, done), (to_params, to_m, to_v) = state, cotangent
    alpha, c = lr / (1 - beta1 ** (done + 1)), (1 - beta2 ** (done + 1)) ** 0.5
    g = gradient(theta.detach().requires_grad_(), weight, batch)
    m_after, v_after = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    root = v_after.sqrt()
    r = root / c + eps
    slope = torch.where(root > 0, alpha * m_after / (2 * c * r**2 * root), 0.0)
    m_bar, v_bar = to_m - alpha / r * to_params, to_v + slope * to_params
    to_gradient = (1 - beta1) * m_bar + 2 * (1 - beta2) * g * v_bar
    curved, scores = pull_gradient(theta, weight, batch, to_gradient)
    return ((1 - lr * decay) * to_params + curved, beta1 * m_bar, beta2 * v_bar), scores


# %% [markdown]
# The line with `torch.where` steps around a division by zero: where all gradients of a parameter have been zero,
# $\sqrt{v'}$ has no slope. What the right answer is there, and other traps of Adam, are for chapter 05.
#
# ## 6 · `magic`'s step
#
# `magic.engine.adjoint.step_vjp(run, state, cotangent, weights)` is the pullback for any model and any optimizer that
# `magic.Run` takes. Its cotangent, a `Cotangent`, has the tensors of the state it belongs to, each with a leading axis $K$: the
# four outputs' cotangents go back **together**. `measure_vjp` makes the first. We take a run with AdamW, let `magic` go
# back through step 21, and then compare the next pull, through step 20, for each output.

# %%
constants = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.1}
adamw = torch.optim.AdamW(
    model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
)
adam_run = magic.Run(model, adamw, (x, y), loss, order)
adam_states = [adam_run.initial]
while adam_states[-1].step < 22:
    adam_states.append(adam_run.step(adam_states[-1], weights))


def measure(model):
    return loss(model, x_test[asked], y_test[asked])


coming, _ = step_vjp(
    adam_run, adam_states[21], measure_vjp(adam_run, adam_states[22], measure), weights
)
going, scores = step_vjp(adam_run, adam_states[20], coming, weights)
claim("K cotangents of 910 parameters each", flat(going.params, 1).shape == (4, 910))
claim("K scores for each of the batch's 50 examples, and no others", scores.shape == (4, 50))


# %%
def slot(state, name, axis=0):
    return flat({k: slots[name] for k, slots in state.slots.items()}, axis)


def parts(cotangent):
    return (
        flat(cotangent.params, 1),
        slot(cotangent, "exp_avg", 1),
        slot(cotangent, "exp_avg_sq", 1),
    )


at = adam_states[20]
here = flat(at.params), slot(at, "exp_avg"), slot(at, "exp_avg_sq"), 20
rows = [
    pull_adamw(here, weight, batch, [part[k] for part in parts(coming)], **constants)
    for k in range(4)
]
mine = [torch.stack(column) for column in zip(*(cotangent for cotangent, _ in rows), strict=True)]
for name, by_hand, magics in zip(
    ["Δ of the parameters", "Δ of m", "Δ of v"], mine, parts(going), strict=True
):
    agree(f"AdamW: {name}", by_hand, magics, tolerance=1e-9)
one_by_one_scores = torch.stack([row for _, row in rows])
agree("AdamW: scores", one_by_one_scores, scores, tolerance=1e-9)

# %% [markdown]
# ### $K$ cotangents at once
#
# We went through the four outputs in a loop, and each time `pull_gradient` computed and recorded the same gradient
# anew. The record depends on the state only, not on the cotangent; and the pull is linear in the cotangent. So
# record once, and let `torch.vmap` pull all $K$ rows through it together: $K$ times the arithmetic of the pull, in
# as many operations as for one.


# %%
def pull_gradient(theta, weight, batch, cotangents):
    """As above, for K cotangents: (K, P) -> (K, P) and (K, B)."""
    theta, weight = theta.detach().requires_grad_(), weight.detach().requires_grad_()
    g = gradient(theta, weight, batch, create_graph=True)

    def pull(row):
        return torch.autograd.grad(g, (theta, weight), row, retain_graph=True)

    return torch.vmap(pull)(cotangents)


together, scores_together = pull_adamw(here, weight, batch, parts(coming), **constants)
one_by_one, at_once = [*mine, one_by_one_scores], [*together, scores_together]
claim("four at once: as one by one, to nine digits", all(map(close, at_once, one_by_one)))

# %% [markdown]
# `pull_momentum` and `pull_adamw` did not have to change: their arithmetic is elementwise, and a leading axis is
# just more elements.
#
# ### Where the scores go
#
# Step $t$ reads the weights of its own batch and no others, so for everybody else its part of $\partial \varphi /
# \partial w$ is zero: $(K, B)$ numbers, not $(K, n)$. They are *added* into the columns of the batch, since the
# same example comes again in each epoch, and its score is the sum over its visits:
#
# $$\tau_{ki} = \sum_{t\,:\,i \in \text{batch}_t} \frac{1}{B}\, \nabla \ell_i(\theta_t) \cdot \bar g_{k,t} .$$
#
# Use `index_add_` for it. `values[:, batch] += part` looks the same, and quietly keeps only one of the parts where
# an index occurs twice in a batch:

# %%
twice = torch.tensor([3, 3, 5])
added, overwritten = torch.zeros(6), torch.zeros(6)
added.index_add_(0, twice, torch.ones(3))
overwritten[twice] += torch.ones(3)
print("index_add_:", added.tolist())
print("[...] +=  :", overwritten.tolist())

# %% [markdown]
# ## 7 · The chain
#
# Now link by link. This is the whole metagradient of the momentum run, all four outputs, with nothing from
# `magic` but the states.

# %%
values = torch.zeros(len(asked), len(x), dtype=x.dtype, device=device)
visits, size = [], []
last = torch.func.jacrev(phi)(flat(states[-1].params))
cotangent = last, torch.zeros_like(last)
for t in reversed(range(run.steps)):
    batch = order[t]
    size.append(cotangent[0].norm(dim=1))
    cotangent, part = pull_momentum(flat(states[t].params), weights[batch], batch, cotangent)
    values.index_add_(1, batch, part)
    visits += [(t, i, score) for i, score in zip(batch.tolist(), part[0].tolist(), strict=True)]

# %% [markdown]
# Two judges: `magic.attribute` at these weights, and chapter 03's unroll, one graph over all forty steps, here with a
# line for momentum.

# %%
unrolled = weights.clone().requires_grad_()
params, buffer = flat(run.initial.params).requires_grad_(), 0.0
for batch in order:
    buffer = mu * buffer + gradient(params, unrolled[batch], batch, create_graph=True)
    params = params - rate * buffer
by_unroll = torch.stack(
    [torch.autograd.grad(output, unrolled, retain_graph=True)[0] for output in phi(params)]
)
attribution = magic.attribute(run, measure, at=weights, progress=False)

claim("by hand, link by link: the scores of the unroll, to nine digits", close(values, by_unroll))
claim("and those of magic.attribute", close(values, attribution.values))

# %% [markdown]
# Along the way we kept two things to look at: how large the cotangents are at each step, and what each visit of an
# example added to its score for the hardest test image.

# %% tags=["nbval-ignore-output"]
frame = pd.DataFrame(visits, columns=["step", "image", "added"])
ranked = values[0].argsort().tolist()
roles = dict.fromkeys(ranked[:3], "helpful") | dict.fromkeys(ranked[-3:], "harmful")
shown = frame[frame["image"].isin(list(roles))].assign(role=lambda f: f["image"].map(roles))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(range(run.steps, 0, -1), torch.stack(size).cpu())
left.set(
    xlabel="after step t", ylabel="size of the cotangent",
    title="Four cotangents on their way back", ylim=(0, None),
)
colors = {"helpful": plot.HELPFUL, "harmful": plot.HARMFUL}
sns.lineplot(
    shown, x="step", y="added", hue="role", hue_order=list(colors), palette=colors, units="image",
    estimator=None, marker="o", ax=right,
)
right.axhline(0, color=plot.NEUTRAL, linewidth=1, zorder=0)
right.legend(title="")
right.set(ylabel="added to the score", title="Six training images, visit by visit");

# %%
signs = frame.assign(positive=frame["added"] > 0).groupby("image")["positive"].nunique()
claim(
    "more than half of the images help at one visit and harm at another", (signs == 2).mean() > 0.5
)

# %% [markdown]
# Left, one line for each output, to be read from right to left: the cotangents shrink first and are larger again at the
# first steps. An early push has many steps after it that undo it in some directions and carry it further in others. Right: each line is an image, each
# dot a visit. A score is a sum of few terms of very different size and often of both signs; what an image is to
# the model depends on when it is shown.
#
# ## 8 · How much of it is the Hessian?
#
# It is the expensive part. Without it, $H = 0$, a push would stay what it is to the end of training, and a
# step's part of the scores would be a product of two first derivatives. So we leave it out and see.

# %%
without = torch.zeros_like(values)
cotangent = last, torch.zeros_like(last)
for t in reversed(range(run.steps)):
    (_, to_buffer), part = pull_momentum(
        flat(states[t].params), weights[order[t]], order[t], cotangent
    )
    cotangent = last, to_buffer  # Δ of the parameters stays as it was at the end
    without.index_add_(1, order[t], part)

correlations = [
    torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(without, values, strict=True)
]
claim(
    "without the Hessian no output's scores correlate more than .8 with the true ones",
    max(correlations) < 0.8,
)

# %% tags=["nbval-ignore-output"]
print("correlation, output by output:", [f"{value:+.2f}" for value in correlations])

# %% [markdown]
# In this run the Hessian is no refinement; without it the scores are other numbers. (Estimates that add up products of
# gradients along the training, such as TracIn of Pruthi et al. 2020, leave it out as well. They take other first
# derivatives than we did here, so this is no measurement of theirs.)
#
# ## 9 · A loss that holds a part of itself fixed
#
# Many losses treat a part of themselves as a constant while the gradient is taken: a **stop-gradient**, `detach` in
# PyTorch. Two of them. A focal loss (Lin et al. 2017) counts an image the less the better it is read, $(1-p)^2\, \ell$
# with $p$ the probability of the right class; here the factor is held fixed. A **straight-through estimator** (Bengio et
# al. 2013) trains weights that are used rounded: the network computes with $\theta + (\mathrm{round}(\theta) -
# \theta)$, and the bracket is held fixed, so that the gradient is passed to $\theta$ as if nothing had been rounded.
#
# Call the fixed part $x$. It is fixed within a step only; at the next step it is computed from the new $\theta$. So the
# gradient that the step takes, $g(\theta, x(\theta))$, moves with $\theta$ in two ways:
#
# $$\frac{dg}{d\theta} = \frac{\partial g}{\partial \theta} + \frac{\partial g}{\partial x}\, \frac{dx}{d\theta} .$$
#
# Double backward finds the first term only, for `detach` has cut $x$ off for good. What we need is cut in the first
# backward pass, the one that *is* training, and whole in the second, which differentiates training:


# %%
class Stop(torch.autograd.Function):
    """The identity. Its derivative is 0 while gradients are taken, and 1 while these are
    differentiated."""

    pulling = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent if Stop.pulling else None


def focal(theta, x, y, stop):
    each = losses(theta, x, y)
    return stop(1 - torch.exp(-each)) ** 2 * each


def on_a_grid(theta, x, y, stop):
    return losses(theta + stop((16 * theta).round() / 16 - theta), x, y)


# %% [markdown]
# For each of the two: the derivative of the first output in the weight of one image, by two real trainings, by an unroll
# with `detach`, by the same unroll with `Stop`, and by `magic`, which is given a plain `detach`.


# %%
def unroll(objective, stop):
    Stop.pulling, w = False, weights.clone().requires_grad_()
    theta, buffer = flat(run.initial.params).requires_grad_(), 0.0
    for batch in order:
        total = (w[batch] * objective(theta, x[batch], y[batch], stop)).sum() / len(batch)
        buffer = mu * buffer + torch.autograd.grad(total, theta, create_graph=True)[0]
        theta = theta - rate * buffer
    Stop.pulling = True
    return torch.autograd.grad(phi(theta)[0], w)[0]


def run_with(objective):
    def loss(model, x, y):
        return objective(flat(dict(model.named_parameters())), x, y, torch.Tensor.detach)

    return magic.Run(
        model, torch.optim.SGD(model.parameters(), lr=rate, momentum=mu), (x, y), loss, order
    )


# %%
rows = {}
for name, objective in {"focal loss": focal, "weights on a grid": on_a_grid}.items():
    stopped = run_with(objective)
    by_magic = magic.attribute(stopped, measure, at=weights, progress=False).values[0]
    i, h = by_magic.abs().argmax(), 1e-6
    changes = torch.zeros(2, len(x), dtype=x.dtype, device=device)
    changes[:, i] = torch.tensor([h, -h])
    ends = [stopped.train(weights + change, progress=False) for change in changes]
    up, down = (measure(stopped.model(end))[0].item() for end in ends)
    by_detach, by_stop = unroll(objective, torch.Tensor.detach), unroll(objective, Stop.apply)
    found = {"unroll, detach": by_detach, "unroll, Stop": by_stop, "magic": by_magic}
    rows[name] = {"two trainings": (up - down) / (2 * h)}
    rows[name] |= {way: scores[i].item() for way, scores in found.items()}

# %%
table = pd.DataFrame(rows).T
error = table.div(table["two trainings"], axis=0).sub(1).abs()
exact = (error[["unroll, Stop", "magic"]] < 1e-6).all(axis=None)
claim("Stop and magic: what real training does, to six digits", exact)
cut = error["unroll, detach"]
claim("detach: off by more than 10 % for the focal loss", cut["focal loss"] > 0.1)
claim("detach: off by more than half on the grid", cut["weights on a grid"] > 0.5)

# %% tags=["nbval-ignore-output"]
table.round(6)

# %% [markdown]
# On the grid the truth is simple. Between its jumps, rounding does not move with $\theta$, so neither does the
# gradient: $H = 0$, and what section 8 left out is not there. Autograd puts in the Hessian of a network
# whose weights are not rounded, which is not the network that was trained.
#
# `magic` puts such a stop in the place of `detach`, of `.data` and of what is computed under `no_grad`. In a measure it
# cuts nothing, since retraining moves what is measured along every path. A number that leaves PyTorch, by `.item()` or
# through NumPy, has no derivative to be had; if it matters, `magic` refuses the run.
#
# ## What we ignored
#
# - **Buffers of the model.** BatchNorm's running statistics are part of the state, too, and a cotangent goes through
#   them. `step_vjp` does it; our network has none.
# - **Dividing by $\sum w_i$** instead of $B$. Then each weight also changes the scale of the step: one more term
#   in the scores.
# - **Operations without a second derivative.** Some of PyTorch's kernels cannot be differentiated twice. `magic` puts
#   an equivalent expression in their place, on the way back only, and refuses by name where it knows none.
# - **Nesterov, dampening, amsgrad.** Elementwise, all of them: other diagonals, the same second pull.
# - **Memory for the states.** Our loop kept all forty.
#
# ## Exercises
#
# 1. ● (5 min) Add weight decay to the SGD of section 2: $\theta' = \theta - \eta\,(g + \lambda\theta)$. Which of the two
#    boxed formulas changes? Check it with `jacfwd`.
#    <details><summary>Hint</summary>$\lambda\theta$ knows nothing of the weights, and its Jacobian is
#    $\lambda I$.</details>
# 2. ●● (15 min) Write `pull_nesterov` for $m' = \mu m + g$, $\theta' = \theta - \eta\,(g + \mu m')$. Check it as in
#    section 4, or with `step_vjp` on a run with `nesterov=True`.
#    <details><summary>Hint</summary>$g$ now reaches $\theta'$ by two ways. Collect $\bar m = \Delta'_m - \eta\mu
#    \Delta'_\theta$ first, then $\bar g = \bar m - \eta \Delta'_\theta$.</details>
# 3. ●●● (30 min) `pull_gradient` is reverse over reverse. Get $H \bar g$ by forward over reverse instead:
#    `torch.func.jvp` of `torch.func.grad`, and the examples' directional derivatives from the same pass.
#    Are the numbers the same? Which is faster, for $K = 1$ and for $K = 4$?
#    <details><summary>Hint</summary>Let the differentiated function return the losses as well:
#    <code>torch.func.grad(…, has_aux=True)</code>. The tangent of the losses is what you want.</details>
# 4. ●● (15 min) In section 9, let the two trainings lie further apart: $h = 10^{-3}$. What becomes of their difference on
#    the grid, and is the derivative wrong?
#    <details><summary>Hint</summary>Count the rounded weights that differ between the two. A derivative knows
#    the slope between the jumps, and nothing of how high they are.</details>
#
# **Next:** [05 · Optimizers with memory](05_optimizers_with_memory.ipynb).
