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
# # Solutions · 02 · Training is a function
#
# To the exercises of [chapter 02](../02_training_is_a_function.ipynb). Try them first.

# %%
import torch

import magic
from magic.book import check, data
from magic.book.checks import claim

torch.set_default_dtype(torch.float64)


def relative(mine, reference):
    return ((mine - reference).norm() / reference.norm()).item()


# %% [markdown]
# ## 02.1 · A pure step
#
# Write SGD with a warm-up and a running average of the parameters as a pure function.
#
# The rate is computed from the step's number, which is in the state, and not from a counter somewhere else. The average
# needs the *new* parameters, so they come first. The result is a new dict; the old one can be used again.


# %%
def averaged_step(state, gradient):
    rate = 0.1 * min(1, (state["step"] + 1) / 10)
    params = state["params"] - rate * gradient
    average = 0.9 * state["average"] + 0.1 * params
    return {"params": params, "average": average, "step": state["step"] + 1}


check("02.1", averaged_step)

# %% [markdown]
# ## 02.2 · The influence function with its scale
#
# The scores of a prediction of ridge regression, at any data weights.
#
# The Hessian is $H = \frac1B \sum_i w_i x_i x_i^\top + \lambda I$, and at the minimum $H \theta^* = \frac1B \sum_i w_i y_i x_i$.
# The weights are in both. They are *not* in $\nabla \ell_i = (\theta^{*\top} x_i - y_i)\, x_i$: the objective is linear in
# $w_i$, and its derivative in $w_i$ is $\ell_i / B$, whatever $w_i$ is. With $\nabla\varphi = x_\text{query}$,
# $\tau^*_i = -\frac1B\, x_\text{query}^\top H^{-1} \nabla\ell_i$.


# %%
def ridge_influence(x, y, query, decay, weights):
    n = len(x)
    hessian = (x.T * weights) @ x / n + decay * torch.eye(x.shape[1])
    theta = torch.linalg.solve(hessian, x.T @ (weights * y) / n)
    example_gradients = (x @ theta - y) * x.T
    return -query @ torch.linalg.solve(hessian, example_gradients) / n


check("02.2", ridge_influence)

# %% [markdown]
# ## 02.3 · The series
#
# $\eta \sum_{k=0}^{T-1} (I - \eta H)^k\, v$ without an inverse.
#
# Each term is the one before, minus $\eta H$ times it. Since nothing is inverted, $H$ may be singular: along a direction with
# eigenvalue 0 the sum is $\eta T$ times that part of $v$, and only its *limit* does not exist.


# %%
def neumann(hessian, vector, rate, steps):
    total, term = torch.zeros_like(vector), vector
    for _ in range(steps):
        total = total + rate * term
        term = term - rate * (hessian @ term)
    return total


check("02.3", neumann)

# %% [markdown]
# ## 02.4 · Momentum
#
# The recursion for $J = \partial\theta/\partial w$ and $M = \partial m/\partial w$ under $m' = \mu m + \nabla L(\theta)$,
# $\theta' = \theta - \eta m'$.
#
# $\nabla L$ moves with $w_i$ for two reasons: directly, by $\nabla\ell_i / B$, and because $\theta$ moves, by $H$ times
# the column $J_i$. So $M' = \mu M + H J + G / B$ and $J' = J - \eta M'$.


# %%
def momentum_tangent(jacobian, memory, hessian, gradients, rate, momentum):
    memory = momentum * memory + hessian @ jacobian + gradients / gradients.shape[1]
    return jacobian - rate * memory, memory


check("02.4", momentum_tangent)

# %% [markdown]
# *The limit from $\theta_0 = \theta^*$.* There $H$ and $G$ are constant. At a limit $J' = J$, so $M' = 0$, and $M = M' = 0$
# leaves $H J + G/B = 0$: again $J = -H^{-1} G / B$. Momentum changes the way and the speed, not the limit.

# %%
generator = torch.Generator().manual_seed(0)
root, slopes = (torch.randn(4, k, generator=generator) for k in (4, 6))
H = root @ root.T / 4 + 0.2 * torch.eye(4)
jacobian, memory = torch.zeros(4, 6), torch.zeros(4, 6)
for _ in range(2000):
    jacobian, memory = momentum_tangent(jacobian, memory, H, slopes, rate=0.1, momentum=0.9)
limit = -torch.linalg.solve(H, slopes) / 6
difference = relative(jacobian, limit)
claim("J after 2,000 steps with momentum and −H⁻¹G/B differ by", difference, at_most=1e-9)

# %% [markdown]
# ## 02.5 · Minibatches
#
# Do the scores still go to the influence function in minibatches at a constant rate?
#
# No. Every batch has a minimum of its own, so $\theta_t$ never comes to rest. It circles around $\theta^*$, and $H_t$ and
# $G_t$ change from batch to batch. What is left of the difference does not shrink with $T$. It does shrink with the
# rate: here half the rate leaves about a third. (More than in proportion, since an epoch visits each batch once, and much of
# what the batches do differently cancels within it.) With a rate that goes to zero slowly enough, the influence
# function is the limit again.
#
# The recursion of section 4, with each batch's own Hessian and gradients, gives the scores of every length in one run.

# %%
x, y, x_test, y_test = data.digits(train=400, test=500)
pair, pair_test = (y == 3) | (y == 8), (y_test == 3) | (y_test == 8)
u, v = x[pair].double().flatten(1), (y[pair] == 8).double()
u_test, v_test = x_test[pair_test].double().flatten(1), (y_test[pair_test] == 8).double()
n, decay = len(u), 0.1


def slopes_and_hessian(theta, batch):
    """∇ℓ_i of all examples, 0 for those outside the batch, and H of the batch."""
    p, inside = torch.sigmoid(u @ theta), torch.zeros(n)
    inside[batch] = 1 / len(batch)
    slopes = u.T * ((p - v) * inside)
    return slopes, (u.T * (p * (1 - p) * inside)) @ u + decay * torch.eye(len(theta))


# %%
theta, everything = torch.zeros(u.shape[1]), torch.arange(n)
for _ in range(12):
    slopes, H = slopes_and_hessian(theta, everything)
    theta = theta - torch.linalg.solve(H, slopes.sum(1) + decay * theta)
hard = torch.where(v_test == 1, -(u_test @ theta), u_test @ theta).argmax()


def d_phi(theta):
    """∇φ of the loss of the test image that θ* gets most wrong."""
    return (torch.sigmoid(u_test[hard] @ theta) - v_test[hard]) * u_test[hard]


classical = -d_phi(theta) @ torch.linalg.solve(H, slopes)


# %%
def gap(rate, epochs, over=7):
    """The relative difference from the influence function, a mean over the last epochs' ends."""
    theta, jacobian, found = torch.zeros(u.shape[1]), torch.zeros(u.shape[1], n), []
    for t, batch in enumerate(magic.batches(n, size=9, epochs=epochs), 1):
        slopes, hessian = slopes_and_hessian(theta, batch)
        jacobian = jacobian - rate * (hessian @ jacobian + slopes)
        theta = theta - rate * (slopes.sum(1) + decay * theta)
        if t % 9 == 0 and t > 9 * (epochs - over):
            found.append(relative(d_phi(theta) @ jacobian, classical))
    return sum(found) / over


once, twice, half = gap(0.04, epochs=200), gap(0.04, epochs=400), gap(0.02, epochs=400)

# %% tags=["nbval-ignore-output"]
print(f"rate 0.04: {once:.3f}, twice as long {twice:.3f}; rate 0.02: {half:.3f}")

# %%
claim("rate 0.04: gap after twice the steps over gap", twice / once, at_least=0.5)
claim("half the rate: gap over gap", half / once, at_least=0.2, at_most=0.6)

# %% [markdown]
# ## 02.6 · In the valley
#
# (a) For a function of the product $a_1 b$, the run and $H^+$ agree.
#
# The valley is the curve $a_1 b = c$. If one moves along it, a function $\psi(a_1 b)$ does not change, so its gradient
# has no part along the valley; indeed it is $\psi'(c) \cdot (b, a_1)$, and the valley's direction is $(a_1, -b)$.
# Where on the valley the run stops then makes no difference. Both answers are $\psi'(c)\, \partial c/\partial w_i$, and
# $c(w)$ is fixed by the data.
#
# (b) From $a_1 = b$ they agree for $\varphi = b$ as well.
#
# With $r$ the slope of the loss in the product, a step is $a_1' = a_1 - \eta r b$, $b' = b - \eta r a_1$. The difference obeys
# $a_1' - b' = (1 + \eta r)(a_1 - b)$, so from $a_1 = b$ it stays zero, whatever the data weights and the rate are. All these
# runs end where the line $a_1 = b$ meets the valley. There the line is at a right angle to the valley, which is
# the direction in which $H^+$ moves.


# %%
inputs = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5, 2.0])
labels = torch.tensor([0.9, 0.5, 0.8, 1.7, 1.2, 2.3])


def train(weights, a, b, rate=0.3, steps=400):
    theta = torch.tensor([a, b])
    for _ in range(steps):
        r = (weights * (theta.prod() * inputs - labels) * inputs).sum() / 6
        theta = theta - rate * r * theta.flip(0)
    return theta


# %%
def run_and_pseudo(measure, a, b):
    """The scores of the run, and those by H⁺ where it ended."""
    weights = torch.ones(6).requires_grad_()
    end = train(weights, a, b)
    scores = torch.autograd.grad(measure(end), weights)[0]
    theta = end.detach().requires_grad_()
    slope = torch.autograd.grad(measure(theta), theta)[0]
    theta = theta.detach()
    H = (inputs.square().sum() / 6) * torch.outer(theta.flip(0), theta.flip(0))
    gradients = torch.outer(theta.flip(0), (theta.prod() * inputs - labels) * inputs)
    return scores, -slope @ torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ gradients / 6


scores, pseudo = run_and_pseudo(lambda theta: theta[1], 1.5, 0.1)
claim("φ = b, from (1.5, 0.1): run and H⁺ differ by", relative(scores, pseudo), at_least=0.5)
scores, pseudo = run_and_pseudo(lambda theta: theta.prod(), 1.5, 0.1)
claim("(a) φ = a₁b: run and H⁺ differ by", relative(scores, pseudo), at_most=1e-9)
scores, pseudo = run_and_pseudo(lambda theta: theta[1], 0.8, 0.8)
claim("(b) φ = b, from (0.8, 0.8): run and H⁺ differ by", relative(scores, pseudo), at_most=1e-9)
