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
# # Solutions 07 · A replay to trust
#
# The exercises are at the end of [chapter 07](../07_a_replay_to_trust.ipynb).

# %%
from math import comb

import torch

from magic.book import check

# %% [markdown]
# **07.1** *What a budget buys.* One trace has to fit, and beside it as many whole states as possible, but no more than $T$. Then
# chapter 06's closed form says how many steps are advanced, of which the training's $T - 1$ are not extra.


# %%
def extra_steps(T, budget, state, trace):
    c = min((budget - trace) // state, T)
    if c < 1:
        return None
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return r * T - comb(c + r, c + 1) - (T - 1)


check("07.1", extra_steps)

# %% [markdown]
# **07.2** *A witness.* The central difference has an error of about $\varepsilon^2$ times the third derivative, and rounding adds about
# $10^{-16} |\varphi| / \varepsilon$. The sum is smallest near $\varepsilon = 10^{-5}$, where both are far below the asked-for four
# digits. The direction is drawn anew in each call. Its entries all have the same size, so that no entry of the gradient is
# overlooked. The difference is compared with what a random direction usually makes of a gradient of this size, $\|g\|$, and not with the
# slope itself, which may happen to be near zero.


# %%
def agrees(phi, gradient, w, epsilon=1e-5, tolerance=1e-4):
    for _ in range(3):
        v = torch.sign(torch.randn_like(w))
        slope = (phi(w + epsilon * v) - phi(w - epsilon * v)) / (2 * epsilon)
        if abs(slope - (gradient @ v).item()) > tolerance * (gradient.norm().item() + abs(slope)):
            return False
    return True


check("07.2", agrees)

# %% [markdown]
# **07.3** *A fingerprint.* Seen as an integer, a flipped bit changes an entry by a power of two. In a sum of 64-bit
# integers that power of two arrives whole, whatever the other entries are.


# %%
def fingerprint(x):
    return x.view(torch.int32).sum(dtype=torch.int64).item()


check("07.3", fingerprint)

# %% [markdown]
# **07.4** *All checks pass, and the prediction for half of the data is far off.* The first four lines of the table are excluded: if the states,
# the pulls or their sum were wrong, `verify` would not agree with trainings to five digits. Digits are excluded for the same reason, at
# least along the direction that was tried. What is left is the last line. Five digits of *slope* at $w = 1$ say nothing of $w$
# with half of its entries zero, which is a long way off, and the function bends. So measure the bend: retrain without random
# sets of 1 %, 5 %, 20 % and 50 % of the data, and see where the prediction begins to fail. Chapters 08 and 12 do that.
#
# **07.9** *The capstone.* Three parts: the run and its pull from chapter 04, the split from exercise 06.2, and a
# loop. A state is a pair $(\theta, m)$. No generator is needed: the recursion does what it would have yielded.
# The kept states are those that the calls of `reverse` hold, at most `slots` of them at once.


# %%
def gradient(run, theta, weight, rows, create_graph=False):
    total = (weight * run.losses(theta, rows)).sum() / len(rows)
    return torch.autograd.grad(total, theta, create_graph=create_graph)[0]


def step(run, state, t):
    """s_t -> s_{t+1}."""
    (theta, m), rows = state, run.order[t]
    g = gradient(run, theta.detach().requires_grad_(), run.weights[rows], rows)
    m = run.mu * m + g
    return theta - run.rate * m, m


def pull(run, state, t, cotangent):
    """(Δ'_θ, Δ'_m) -> (Δ_θ, Δ_m), and the batch's part of the scores."""
    (to_theta, to_m), rows = cotangent, run.order[t]
    to_gradient = to_m - run.rate * to_theta
    theta = state[0].detach().requires_grad_()
    weight = run.weights[rows].requires_grad_()
    g = gradient(run, theta, weight, rows, create_graph=True)
    curved, part = torch.autograd.grad(g, (theta, weight), to_gradient)
    return (to_theta + curved, run.mu * to_gradient), part


# %%
def advance(run, state, a, b):
    for t in range(a, b):
        state = step(run, state, t)
    return state


def split(T, c):
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return min(comb(c + r - 1, c), T - comb(c + r - 2, c - 1))


# %%
def replay(run, phi, slots):
    scores, cotangent = torch.zeros_like(run.weights), None

    def adjoint(state, t):
        nonlocal cotangent
        if cotangent is None:  # the training has ended
            theta = step(run, state, t)[0].requires_grad_()
            cotangent = torch.autograd.grad(phi(theta), theta)[0], torch.zeros_like(theta)
        cotangent, part = pull(run, state, t, cotangent)
        scores.index_add_(0, run.order[t], part)

    def reverse(start, a, b, c):
        if b - a > 1 and c > 1:
            m = a + split(b - a, c)
            reverse(advance(run, start, a, m), m, b, c - 1)
            reverse(start, a, m, c)
            return
        for t in reversed(range(a, b)):
            adjoint(advance(run, start, a, t), t)

    reverse((run.theta, torch.zeros_like(run.theta)), 0, len(run.order), slots)
    return scores


check("07.9", replay)

# %% [markdown]
# Where the rules are kept: the state at the split is an argument of the inner call only, so it is forgotten when that call
# returns (memory). Each step is traced once, by its pull, and the last step is done once more for $\varphi$ (time). Every
# operation makes a new tensor (care).
