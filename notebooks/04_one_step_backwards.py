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
# time. At each step it needs two products: one carries the cotangent to the state before, the other gives the scores
# of the batch. There, PyTorch computed them. Here we derive them, for SGD, for momentum and for Adam, and find
# the same pattern each time: some elementwise arithmetic, **one Hessian-vector product**, and one
# directional derivative per example.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `state` | a tuple: the parameters $\theta$, and what the optimizer remembers |
# | step $h_t$ | `..._step` | $s_{t+1} = h_t(s_t, w)$ |
# | cotangent $\Delta_t = \partial \varphi / \partial s_t$ | `cotangent` | how the output changes with the state after $t$ steps; a tuple like the state, with a row for each output (in chapter 03 it was a column) |
# | scores $\tau_i = \partial \varphi / \partial w_i$ | `scores` | filled in on the way back, batch by batch |
# | to pull back | `pull_...` | $\Delta_{t+1} \mapsto \Delta_t$, and what step $t$ adds to $\tau$ |
#
# A prime marks what belongs to the time after the step: $\theta'$ is made from $\theta$, and $\Delta$ from $\Delta'$.
# About forty minutes with the derivations. In the version that `uv run python -m magic.book.fill_in`
# makes in `fill_in/`, the five functions that go back are yours to write.

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()
# PyTorch's own warning, at the first use of forward mode
warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)

# %% tags=["nbval-ignore-output"]
ax = plot.chain()
ax.axvspan(1.66, 3.34, color=plot.NEUTRAL, alpha=0.15, linewidth=0)
ax.text(2.5, 0.95, "this chapter", ha="center", fontsize=11);

# %% [markdown]
# Grey arrows are training: a step takes a state and the weights of its batch, and makes the next state. Orange arrows
# are the way back: a step takes the cotangent of the state after it, makes that of the state before it, and leaves
# its part of the scores with the weights. This chapter is about one link of the chain.
#
# ## 1 · A step to go back through
#
# 400 digits, a small network, and 40 steps, in `float64`. So that code and formulas look alike, all 910 parameters
# are one vector `theta`, and `losses` gives the losses of a batch as a function of it. The data weights are not 1 but
# random numbers around 1, so that a forgotten weight shows.

# %%
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=400, test=500))
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 12, 10)).double().to(device)
order = magic.batches(len(x), size=50, epochs=5, seed=0).to(device)
chance = torch.Generator().manual_seed(1)
weights = (0.5 + torch.rand(len(x), generator=chance, dtype=x.dtype)).to(device)
shapes = {name: p.shape for name, p in model.named_parameters()}
start = torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(theta, x, y):
    pieces = theta.split([shape.numel() for shape in shapes.values()])
    params = {name: p.view(shape) for p, (name, shape) in zip(pieces, shapes.items(), strict=True)}
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


# %% [markdown]
# The **objective** of step $t$ is the weighted loss of its batch,
#
# $$L(\theta, w) = \frac1B \sum_{i \in \text{batch}_t} w_i\, \ell_i(\theta), \qquad g(\theta, w) = \nabla_\theta\, L(\theta, w).$$
#
# In code, `weight` holds the $B$ weights of the batch. `torch.func.grad` turns the function $L$ into the function
# $g$. Plain SGD, our first optimizer, uses it like this; its state has one part, $\theta$.


# %%
def objective(theta, weight, t):
    return (weight * losses(theta, x[order[t]], y[order[t]])).sum() / len(order[t])


gradient = grad(objective)  # (theta, weight, t) -> g, a vector like theta
eta, mu = 0.1, 0.8


def sgd_step(state, weight, t):
    (theta,) = state
    return (theta - eta * gradient(theta, weight, t),)


def train(step, state):
    """All states of the run, [s_0, …, s_T], by one of this chapter's step functions."""
    states = [state]
    for t in range(len(order)):
        states.append(step(states[-1], weights[order[t]], t))
    return states


# %% [markdown]
# We measure $K = 4$ outputs: the losses of the test images that the trained network gets most wrong. Their four
# cotangents are the rows of a $(K, 910)$ matrix, and each formula below holds row by row. For now we act as if
# training ended with step 20, the twenty-first since steps count from 0, so that $\Delta'$ is $\partial\varphi / \partial\theta_{21}$.

# %%
t, weight = 20, weights[order[20]]
sgd_states = train(sgd_step, (start,))
(theta,), (theta_after,) = sgd_states[t], sgd_states[t + 1]
hardest = losses(sgd_states[-1][0], x_test, y_test).argsort(descending=True)[:4]


def phi(theta):
    return losses(theta, x_test[hardest], y_test[hardest])


after = jacrev(phi)(theta_after)  # Δ', (4, 910)

# %% [markdown]
# ## 2 · Plain SGD: back to the parameters
#
# The step is $\theta' = \theta - \eta\, g(\theta, w)$. Move $\theta$ by a little $d$. Then $\theta'$ moves by $d - \eta H
# d$, where $H = \partial g / \partial \theta = \nabla^2_\theta L$ is the **Hessian** of the batch's weighted loss, the
# derivative of its gradient. So the Jacobian of the step is $I - \eta H$. The cotangent goes back through its
# transpose, and $H$ is symmetric:
#
# $$\boxed{\;\Delta = (I - \eta H)^\top \Delta' = \Delta' - \eta\, H \Delta'\;}$$
#
# $H$ has $910^2$ entries here, and $10^{12}$ or more in a network of practical size. But we do not need $H$. We need
# one product $H \Delta'$, and this is the gradient of something that we can compute: since $\Delta'$ does not depend on
# $\theta$,
#
# $$H \Delta' = \nabla_\theta \big( g(\theta, w) \cdot \Delta' \big).$$
#
# This gradient takes a backward pass through $g$, which was itself computed by a backward pass, and so it is called
# **double backward**. It costs a few gradients and never builds a matrix. In code, `vjp(f, a)` returns $f(a)$ and a
# function that multiplies by the transposed Jacobian of $f$ at $a$; for $f = g$ this Jacobian is $H$.

# %%
g, times_hessian = vjp(lambda theta: gradient(theta, weight, t), theta)
product = torch.stack([times_hessian(row)[0] for row in after])  # H Δ'
before = after - eta * product  # Δ

# %% [markdown]
# To check it we build the matrices that we avoid: the Hessian, and the Jacobian of the whole step in all 910 parameters
# and in the 50 weights of its batch. (With cotangents as rows, $J^\top \Delta'$ is written `after @ J`.)

# %%
H = hessian(objective)(theta, weight, t)
J, W = jacfwd(lambda theta, weight: sgd_step((theta,), weight, t)[0], argnums=(0, 1))(theta, weight)
identity = torch.eye(len(theta), dtype=x.dtype, device=device)
agree("H Δ', explicit Hessian", product, after @ H, tolerance=1e-9)
agree("I − ηH, Jacobian of the step", identity - eta * H, J, tolerance=1e-9)
agree("Δ, Jacobian transposed times Δ'", before, after @ J, tolerance=1e-9)

# %% [markdown]
# What does $I - \eta H$ do to a cotangent? In a direction in which the loss has curvature $\kappa$ (an eigenvalue of $H$),
# it multiplies by $1 - \eta\kappa$. Here is that factor in all 910 directions, at the start of training and at
# its end.

# %%
factors = {}
for name, k in {"first step": 0, "last step": len(order) - 1}.items():
    at = hessian(objective)(sgd_states[k][0], weights[order[k]], k)
    factors[name] = 1 - eta * torch.linalg.eigvalsh(at).flip(0).cpu()

# %% tags=["nbval-ignore-output"]
ax = plt.subplots(figsize=(5, 3.2))[1]
for (name, values), marker in zip(factors.items(), "os", strict=True):
    ax.plot(range(1, 911), values, marker=marker, markevery=[0, 1, 3, 9, 99, 909], label=name)
ax.axhline(1, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.set(xscale="log", xlabel="direction, the most curved first", ylabel="factor 1 − ηκ")
ax.set_xticks([1, 10, 100, 910], ["1", "10", "100", "910"])
ax.set_title("What one step does to a cotangent")
ax.legend();

# %%
first, last = factors.values()
unchanged = ((last - 1).abs() < 0.01).double().mean()
claim("share of directions that the last step changes by less than 1 %", unchanged, at_least=0.75)
claim("the last step's factor in the most curved direction", last[0], at_most=0.5)
claim("the first step's factor in the direction that curves down most", first[-1], at_least=1.1)

# %% [markdown]
# In most directions a cotangent passes a step almost unchanged. In the few curved ones it shrinks: what an early step
# moved there, later steps undo, because they pull the parameters back toward the minimum. Where the loss
# curves downward, $\kappa < 0$, the cotangent grows: later steps carry a push further. With $\eta\kappa > 2$ the factor
# would be below $-1$, and the cotangent would grow with every step back. This is one cause of the
# unstable training that [chapter 01](01_the_same_run_twice.ipynb) shows at a large rate.
#
# ## 3 · Plain SGD: to the weights
#
# The weights occur only in $g$, and linearly: $\partial g / \partial w_i = \nabla \ell_i / B$. So
#
# $$\boxed{\;\frac{\partial \varphi}{\partial w_i} = -\frac{\eta}{B}\, \nabla \ell_i(\theta) \cdot \Delta'
#   \qquad (i \in \text{batch})\;}$$
#
# With a little more weight, example $i$ pushes the parameters a little more along $-\eta \nabla \ell_i / B$, and
# $\Delta'$ says how $\varphi$ responds to a push.
#
# It looks as if we needed the gradient of *each example*: $B$ vectors as large as the network. We do not.
# $\nabla \ell_i \cdot \Delta'$ is the **directional derivative** of $\ell_i$ along $\Delta'$: how fast the loss of
# example $i$ changes when the parameters move in that direction. One forward pass that carries the direction along, a
# Jacobian-vector product (`jvp`), gives it for all $B$ examples. Here are both ways, for the first output:


# %%
def batch_losses(theta):
    return losses(theta, x[order[t]], y[order[t]])


each = jacrev(batch_losses)(theta)  # (B, 910), the gradient of each example
along = jvp(batch_losses, (theta,), (after[0],))[1]  # (B,)
agree("directional derivatives", along, each @ after[0], tolerance=1e-9)
by_direction = -eta * along / len(order[t])
agree("scores, Jacobian in the weights", by_direction, after[0] @ W, tolerance=1e-9)

# %% [markdown]
# A third way costs almost nothing. The double backward that gives $H\Delta'$ goes back through
# $g$, and $w$ is an input of $g$ just as $\theta$ is. Asked for both, it returns both. The most important function of
# this chapter has two lines: cotangents of the gradient go in, and their parts for the parameters and for the
# weights come out.


# %% tags=["your-turn"]
def pull_gradient(theta, weight, t, cotangents):
    """Pull K cotangents ḡ = ∂φ/∂g back through g: returns the tuple (H ḡ, scores).

    theta (P,), weight (B,), t: where g is taken.    cotangents (K, P): one ḡ in each row
    H ḡ: (K, P).    scores: (K, B), whose entry for example i is ∇ℓᵢ · ḡ / B

    Use `vjp` of `gradient` as a function of theta and weight; it returns g and a function of one ḡ.
    `vmap(function)(cotangents)` applies that to all K rows at once.
    """
    _, pull = vjp(lambda theta, weight: gradient(theta, weight, t), theta, weight)
    return vmap(pull)(cotangents)


# %%
curved, at_weights = pull_gradient(theta, weight, t, after)
agree("H Δ'", curved, after @ H, tolerance=1e-9)
agree("∇ℓᵢ · Δ' / B", at_weights, after @ each.T / len(order[t]), tolerance=1e-9)

# %% [markdown]
# The trace of $g$ depends on the state only, so it is made once for all $K$ rows.
#
# For plain SGD, $g$ enters $\theta'$ with the factor $-\eta$. So $\bar g = -\eta \Delta'$, and the two boxes become:


# %% tags=["your-turn"]
def pull_sgd(state, weight, t, cotangent):
    """Pull the cotangent back through `sgd_step`: returns ((Δ_θ,), scores).

    state: (theta,).    cotangent: (Δ'_θ,), of shape (K, P)    scores: (K, B)
    """
    (theta,), (to_theta,) = state, cotangent
    curved, scores = pull_gradient(theta, weight, t, -eta * to_theta)
    return (to_theta + curved,), scores


# %%
(pulled,), scores = pull_sgd((theta,), weight, t, (after,))
agree("plain SGD: Δ", pulled, after @ J, tolerance=1e-9)
agree("plain SGD: scores", scores, after @ W, tolerance=1e-9)

# %% [markdown]
# ## 4 · Momentum
#
# With momentum the optimizer remembers a buffer $m$, and the state has two parts, $s = (\theta, m)$:
#
# $$m' = \mu m + g(\theta, w), \qquad \theta' = \theta - \eta m' .$$
#
# There are four partial derivatives. To find each, insert the first equation into the second:
#
# $$J = \begin{pmatrix} \partial\theta'/\partial\theta & \partial\theta'/\partial m \\
#                       \partial m'/\partial\theta & \partial m'/\partial m \end{pmatrix}
#     = \begin{pmatrix} I - \eta H & -\eta\mu I \\ H & \mu I \end{pmatrix}.$$
#
# Its transpose acts on $\Delta' = (\Delta'_\theta, \Delta'_m)$. Every entry with $H$ or $\mu$ in it is there because of
# $m'$. So we first collect the whole cotangent of $m'$, which reaches $\varphi$ directly and by way of $\theta'$. Since
# $g$ enters $m'$ with the factor 1, it is also $\bar g = \partial\varphi/\partial g$:
#
# $$\bar g = \Delta'_m - \eta \Delta'_\theta, \qquad
#   \Delta_\theta = \Delta'_\theta + H \bar g, \qquad
#   \Delta_m = \mu\, \bar g, \qquad
#   \frac{\partial \varphi}{\partial w_i} = \frac1B \nabla \ell_i \cdot \bar g .$$
#
# It takes one Hessian-vector product, as before.


# %%
def momentum_step(state, weight, t):
    theta, m = state
    m = mu * m + gradient(theta, weight, t)
    return theta - eta * m, m


# %% tags=["your-turn"]
def pull_momentum(state, weight, t, cotangent):
    """Pull the cotangent back through `momentum_step`: returns ((Δ_θ, Δ_m), scores).

    state: (theta, m).    cotangent: (Δ'_θ, Δ'_m), each (K, P)    scores: (K, B)
    """
    (theta, _), (to_theta, to_m) = state, cotangent
    to_gradient = to_m - eta * to_theta
    curved, scores = pull_gradient(theta, weight, t, to_gradient)
    return (to_theta + curved, mu * to_gradient), scores


# %% [markdown]
# The judge is `vjp` of the whole step. Our formulas hold for any cotangent, so we try random ones.


# %%
def judge(step, pull, state, t):
    """Compare `pull` with PyTorch's derivative of `step`, at random cotangents."""
    weight = weights[order[t]]
    cotangent = tuple(torch.randn(4, len(p), generator=chance).to(p) for p in state)
    pulled, scores = pull(state, weight, t, cotangent)
    _, whole = vjp(lambda state, weight: step(state, weight, t), state, weight)
    expected, expected_scores = vmap(whole)(cotangent)
    for name, mine, reference in zip(["θ", "m", "v"], pulled, expected, strict=False):
        agree(f"Δ of {name}", mine, reference, tolerance=1e-9)
    agree("scores", scores, expected_scores, tolerance=1e-9)


momentum_states = train(momentum_step, (start, torch.zeros_like(start)))
judge(momentum_step, pull_momentum, momentum_states[t], t)

# %% [markdown]
# ## 5 · Adam
#
# Now the pattern is clear. An optimizer is a function $U$ from the state and the gradient to the next state, and it is
# **elementwise**: number 17 of the next state depends on numbers 17 of the state and of the gradient only. So each
# partial derivative of $U$ is a *diagonal* matrix, and multiplying by it is elementwise, too.
#
# 1. **Pull through $U$**: elementwise arithmetic gives $\bar g$, and what reaches the state directly.
# 2. **Pull through $g$**: `pull_gradient`, the same for every optimizer.
#
# AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) keeps two running averages, $m$ of the gradients and $v$ of their
# squares. Let $u = t + 1$ be the number of updates including this one, $\alpha = \eta / (1 - \beta_1^u)$, $c = \sqrt{1 - \beta_2^u}$, and
# $\lambda$ be the weight decay. Then
#
# $$m' = \beta_1 m + (1 - \beta_1)\, g, \qquad v' = \beta_2 v + (1 - \beta_2)\, g^2, \qquad
#   \theta' = (1 - \eta\lambda)\, \theta - \alpha\, \frac{m'}{r}, \quad r = \frac{\sqrt{v'}}{c} + \varepsilon .$$

# %%
lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.99, 1e-4, 0.1


def adamw_step(state, weight, t):
    theta, m, v = state
    g = gradient(theta, weight, t)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    alpha, c = lr / (1 - beta1 ** (t + 1)), (1 - beta2 ** (t + 1)) ** 0.5
    return (1 - lr * decay) * theta - alpha * m / (v.sqrt() / c + eps), m, v


# %% [markdown]
# As with momentum, first collect the cotangents of $m'$ and $v'$. The derivative of
# $\theta'$ in $m'$ is $-\alpha/r$. In $v'$ it is $\alpha m' / r^2$ times $\partial r / \partial v' = 1 / (2 c \sqrt{v'})$:
#
# $$\bar m = \Delta'_m - \frac{\alpha}{r}\, \Delta'_\theta, \qquad
#   \bar v = \Delta'_v + \frac{\alpha\, m'}{2\, c\, r^2 \sqrt{v'}}\, \Delta'_\theta .$$
#
# Then hand these on to what $m'$ and $v'$ are made of:
#
# $$\bar g = (1 - \beta_1)\, \bar m + 2 (1 - \beta_2)\, g\, \bar v, \qquad
#   \Delta_\theta = (1 - \eta\lambda)\, \Delta'_\theta + H \bar g, \qquad
#   \Delta_m = \beta_1 \bar m, \qquad \Delta_v = \beta_2 \bar v .$$


# %% tags=["your-turn"]
def pull_adamw(state, weight, t, cotangent):
    """Pull the cotangent back through `adamw_step`: returns ((Δ_θ, Δ_m, Δ_v), scores).

    state: (theta, m, v), each (P,).    cotangent: (Δ'_θ, Δ'_m, Δ'_v), each (K, P)    scores: (K, B)
    The formulas need g, m' and v', so do the step's own arithmetic first; its count is t + 1.
    """
    (theta, m, v), (to_theta, to_m, to_v) = state, cotangent
    g = gradient(theta, weight, t)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    alpha, c = lr / (1 - beta1 ** (t + 1)), (1 - beta2 ** (t + 1)) ** 0.5
    root = v.sqrt()
    r = root / c + eps
    to_m, to_v = to_m - alpha / r * to_theta, to_v + alpha * m / (2 * c * r**2 * root) * to_theta
    to_gradient = (1 - beta1) * to_m + 2 * (1 - beta2) * g * to_v
    curved, scores = pull_gradient(theta, weight, t, to_gradient)
    return ((1 - lr * decay) * to_theta + curved, beta1 * to_m, beta2 * to_v), scores


# %%
adamw_states = train(adamw_step, (start, torch.zeros_like(start), torch.zeros_like(start)))
judge(adamw_step, pull_adamw, adamw_states[t], t)

# %% [markdown]
# We have divided by $\sqrt{v'}$, which is 0 for a parameter whose gradients have all been 0. Our run has none;
# [chapter 05](05_optimizers_with_memory.ipynb) shows that this second term of $\bar v$ is then to be taken as 0.
#
# ## 6 · The chain
#
# Now we link the steps. Step $t$ reads the weights of its own batch only, so its part of the scores
# is a $(K, B)$ matrix. It is *added* into the columns of the batch, because an example comes again in each epoch,
# and its score is the sum over these visits:
#
# $$\tau_{ki} = \sum_{t\,:\,i \in \text{batch}_t} \frac{1}{B}\, \nabla \ell_i(\theta_t) \cdot \bar g_{k,t} .$$


# %% tags=["your-turn"]
def backwards(pull, states, cotangent, visit=lambda t, cotangent, part: None):
    """τ, (K, n), from the states [s_0, …, s_T] and Δ_T, a tuple like a state with a leading axis K.

    Go down from t = T−1 to 0. Each time, `pull(state, weight, t, cotangent)`, with the step's state
    and the weights of its batch order[t], returns the next cotangent and the step's part (K, B).
    Call `visit(t, cotangent, part)` with the cotangent before it is replaced, Δ_{t+1}. Add the part
    into the columns order[t] by `index_add_`, which is right even if an index occurs twice.
    """
    values = torch.zeros(len(cotangent[0]), len(x), dtype=x.dtype, device=device)
    for t in reversed(range(len(states) - 1)):
        pulled, part = pull(states[t], weights[order[t]], t, cotangent)
        visit(t, cotangent, part)
        values.index_add_(1, order[t], part)
        cotangent = pulled
    return values


# %% [markdown]
# What the optimizer remembers does not occur in $\varphi$, so its part of $\Delta_T$ is 0. The judge is
# `magic.attribute` with an ordinary PyTorch optimizer; it judges our steps as well as our pulls.


# %%
def final(states):
    """Δ_T: the gradients of the four outputs in θ_T, and zeros for what the optimizer remembers."""
    theta, *memory = states[-1]
    to_theta = jacrev(phi)(theta)
    return to_theta, *(torch.zeros_like(to_theta) for _ in memory)


def by_magic(optimizer):
    def loss(model, x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def measure(model):
        return loss(model, x_test[hardest], y_test[hardest])

    run = magic.Run(model, optimizer, data=(x, y), loss=loss, batches=order)
    return magic.attribute(run, measure, at=weights, progress=False).values


# %%
sgd = torch.optim.SGD(model.parameters(), lr=eta, momentum=mu)
adamw = torch.optim.AdamW(
    model.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay
)
sizes, visits = [], []


def note(t, cotangent, part):
    sizes.append(cotangent[0].norm(dim=1))
    visits.extend((t, i, a) for i, a in zip(order[t].tolist(), part[0].tolist(), strict=True))


values = backwards(pull_momentum, momentum_states, final(momentum_states), note)
agree("momentum: forty steps by hand", values, by_magic(sgd), tolerance=1e-9)
adamw_values = backwards(pull_adamw, adamw_states, final(adamw_states))
agree("AdamW: forty steps by hand", adamw_values, by_magic(adamw), tolerance=1e-9)

# %% [markdown]
# These are the derivatives of two whole runs, from formulas that fit on one page. (In `magic` the pull is called
# `step_vjp`; it takes any model, and the optimizers that `magic.Run` accepts. The next chapters use it.)
#
# On the way back through the first run we noted how large the cotangents were, and what each visit of an example added
# to its score for the first output.

# %% tags=["nbval-ignore-output", "hide-input"]
size = torch.stack(sizes).cpu()
ax = plt.subplots(figsize=(5.4, 3.2))[1]
for k, (image, style) in enumerate(zip(hardest.tolist(), ["-", "--", "-.", ":"], strict=True)):
    ax.plot(size[:, k] / size[0, k], style, label=f"test image {image}")
ax.axhline(1, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.set(xlabel="steps back from the end of training", ylabel="size of Δ, relative to the end")
ax.set(ylim=(0, None), title="Four cotangents on their way back")
ax.legend(fontsize=9);

# %%
least = size.min(dim=0).values
claim("smallest size over size at the end, for all four", (least / size[0]).max(), at_most=0.5)
claim("size at the first step over the smallest", (size[-1] / least).min(), at_least=2)

# %% [markdown]
# On their way back the $\theta$ parts of all four cotangents shrink to less than half, and grow again over about the first
# fifteen steps of training. Section 2's reason holds with momentum as well: in curved directions, later steps undo a push; where the loss curves downward,
# they carry it further.

# %% tags=["nbval-ignore-output", "hide-input"]
frame = pd.DataFrame(visits, columns=["step", "image", "added"])
ranked = values[0].argsort().tolist()
ax = plt.subplots(figsize=(5.4, 3.4))[1]
styles = ["o-", "s--", "^:"]
for images, color, role in (
    (ranked[:3], plot.HELPFUL, "helpful"),
    (ranked[:-4:-1], plot.HARMFUL, "harmful"),
):
    for image, style in zip(images, styles, strict=True):
        line = frame[frame["image"] == image].sort_values("step")
        ax.plot(line["step"], line["added"], style, color=color, label=f"{role}: image {image}")
ax.axhline(0, color=plot.NEUTRAL, linewidth=1, zorder=0)
ax.set(xlabel="training step", ylabel="added to its score", title="Visit by visit")
ax.set_ylim(top=0.85)
ax.legend(fontsize=9, ncols=2);

# %%
signs = frame.assign(positive=frame["added"] > 0).groupby("image")["positive"].nunique()
both = (signs == 2).mean()
claim("share of images that help at one visit and harm at another", both, at_least=0.85)

# %% [markdown]
# Each line is a training image, each point a visit. A score is a sum of five terms of very different size, for nine
# images in ten with both signs among them: what an image does to the model depends on when it is shown.
#
# ## 7 · How much of it is the Hessian?
#
# The Hessian-vector product is the expensive part. What if we set $H = 0$? Every push then survives unchanged to the
# end of training.


# %%
def pull_without_hessian(state, weight, t, cotangent):
    (_, pulled_m), scores = pull_momentum(state, weight, t, cotangent)
    return (cotangent[0], pulled_m), scores


without = backwards(pull_without_hessian, momentum_states, final(momentum_states))
pairs = zip(without, values, strict=True)
correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
claim("correlation with the true scores, the best of four", correlations.max(), at_most=0.6)

# %% [markdown]
# In this run the Hessian is not a refinement: without it, the scores are different numbers. (Estimates that add up
# products of gradients along the training, such as TracIn of Pruthi et al. 2020, leave it out as well. They take other
# first derivatives than we did, so this is no measurement of them.)
#
# ## 8 · A loss that holds a part of itself fixed
#
# Some losses treat a part of themselves as a constant while the gradient is taken: a **stop-gradient**, `detach` in
# PyTorch. A focal loss (Lin et al. 2017), for example, multiplies $\ell$ by $(1-p)^2$, with $p$ the probability of the
# right class; suppose that this factor is detached. Call the detached part $z(\theta)$, and the gradient that the step
# takes $g(\theta, z)$. It depends on $\theta$ in two ways, because at other parameters $z$ has another value:
#
# $$\frac{dg}{d\theta} = \frac{\partial g}{\partial \theta} + \frac{\partial g}{\partial z}\, \frac{dz}{d\theta} .$$
#
# Double backward through `detach` finds the first term only. The path through $z$ must be cut in the first backward pass,
# which is training, and open in the second, which differentiates training. `magic` puts an operation that does so in
# the place of `detach`; exercise 04.5 needs two lines.
#
# ## What we claim
#
# - A cotangent goes back through a step in two pulls: through the optimizer, by elementwise arithmetic, and through the
#   gradient, by one double backward, which gives the Hessian-vector product and the batch's scores together.
# - Forty such steps give `magic`'s scores to nine digits, for momentum and for AdamW. Without the Hessian they do not.
#
# ## What we ignored
#
# - **Buffers of the model.** BatchNorm's running statistics are part of the state, too (chapter 05).
# - **Dividing by $\sum w_i$** instead of $B$. Each weight then also changes the size of the step.
# - **Operations without a second derivative.** Some fast kernels of PyTorch have none. `magic` goes back through an
#   equivalent expression.
# - **Memory.** We kept all forty states ([chapter 06](06_remember_forget_replay.ipynb)).
#
# ## Exercises
#
# In each, `pull` is a function of one argument: it takes $\bar g$ and returns $H\bar g$ and the batch's scores, as
# `pull_gradient` does at some state. Uncomment the last line of a cell, and the import in the first, to have it checked.
#
# **04.1** ●○○ · 10 min · *Weight decay.* Pull back $\theta' = \theta - \eta\,(g + \lambda\theta)$. Which of the two boxed
# formulas changes?
# <details><summary>Hint</summary>λθ does not depend on the data weights, and its Jacobian is λI.</details>


# %%
def pull_decayed(to_theta, pull, lr, decay):
    """Δ'_θ -> Δ_θ and the batch's scores."""
    ...


# from magic.book import check
# check("04.1", pull_decayed)

# %% [markdown]
# **04.2** ●●○ · 15 min · *Nesterov's momentum.* Pull back $m' = \mu m + g$, $\;\theta' = \theta - \eta\,(g + \mu m')$.
# <details><summary>Hint</summary>g now reaches θ' in two ways, directly and by way of m'. Collect the cotangent of m' first.</details>


# %%
def pull_nesterov(to_theta, to_m, pull, lr, mu):
    """(Δ'_θ, Δ'_m) -> (Δ_θ, Δ_m), and the batch's scores: returns ((Δ_θ, Δ_m), scores)."""
    ...


# check("04.2", pull_nesterov)

# %% [markdown]
# **04.3** ●●○ · 20 min · *Adam's diagonal.* How does a parameter react to its own gradient? Write $\partial\theta' /
# \partial g$ of Adam (AdamW with $\lambda = 0$) as a vector; `count` is the number of updates including this one.
# <details><summary>Hint</summary>The chain rule by way of m' and of v'. Every factor stands in section 5.</details>


# %%
def adam_diagonal(g, m, v, count, lr, beta1, beta2, eps):
    """∂θ'/∂g, like g. m and v are those before the step.

    Where v' is 0, only the path through m' counts.
    """
    ...


# check("04.3", adam_diagonal)

# %% [markdown]
# **04.4** ●●○ · 10 min · *All examples in one pass.* Write the directional derivatives $\nabla\ell_i \cdot d$ of a
# whole batch without the gradient of any example; `losses(theta)` gives the $B$ losses.
# <details><summary>Hint</summary>Section 3.</details>


# %%
def directional(losses, theta, direction):
    """(B,), exactly, from one call of `losses`."""
    ...


# check("04.4", directional)

# %% [markdown]
# **04.5** ●●● · 25 min · *A part held fixed.* The objective is `objective(theta, z)` with $z$ = `held(theta)`, and the
# step's gradient is taken with $z$ fixed (section 8). Return $(dg/d\theta)^\top \bar g$, both terms.
# <details><summary>Hint</summary><code>grad(objective)</code> differentiates in its first argument only. Write the
# step's gradient as a function of θ alone, and pull ḡ back through it.</details>


# %%
def pull_held(objective, held, theta, cotangent):
    """ḡ (P,) -> (dg/dθ)ᵀ ḡ, (P,)."""
    ...


# check("04.5", pull_held)

# %% [markdown]
# **04.6** ●●● · 30 min · *Forward over reverse.* `pull_gradient` is reverse over reverse. Get $H\bar g$ by forward over
# reverse instead, `jvp` of `grad`, and the directional derivatives from the same pass. Are the numbers the same? Which is
# faster, for $K = 1$ and for $K = 4$?
# <details><summary>Hint</summary>Let the differentiated function return the losses as well: <code>grad(…,
# has_aux=True)</code>. The tangent of the losses is what you want.</details>
#
# **Next:** [05 · Optimizers with memory](05_optimizers_with_memory.ipynb).
