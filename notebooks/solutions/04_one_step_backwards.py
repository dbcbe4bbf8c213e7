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
# # Solutions · 04 · One step backwards
#
# To the exercises of [chapter 04](../04_one_step_backwards.ipynb). Try them first.

# %%
import time
import warnings

import torch
from torch.func import grad, jvp, vjp, vmap

from magic.book import check, models
from magic.book.checks import agree

# PyTorch's own warning, at the first use of forward mode
warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)

# %% [markdown]
# ## 04.1 · Weight decay
#
# Pull back $\theta' = \theta - \eta\,(g + \lambda\theta)$.
#
# The step has one more term, $-\eta\lambda\theta$, with Jacobian $-\eta\lambda I$. So the first box becomes $\Delta = (1 -
# \eta\lambda)\,\Delta' - \eta H \Delta'$. The second does not change: the new term does not contain the data weights,
# and $\bar g$ is still $-\eta \Delta'$.


# %%
def pull_decayed(to_theta, pull, lr, decay):
    curved, scores = pull(-lr * to_theta)
    return (1 - lr * decay) * to_theta + curved, scores


check("04.1", pull_decayed)

# %% [markdown]
# ## 04.2 · Nesterov's momentum
#
# Pull back $m' = \mu m + g$, $\;\theta' = \theta - \eta\,(g + \mu m')$.
#
# First the cotangent of $m'$. It reaches $\varphi$ directly, and by way of $\theta'$, where it stands with the factor
# $-\eta\mu$: $\bar m = \Delta'_m - \eta\mu \Delta'_\theta$. The gradient enters $m'$ with factor 1 and $\theta'$ with
# factor $-\eta$, so $\bar g = \bar m - \eta \Delta'_\theta$. The old $m$ occurs in $m'$ only: $\Delta_m = \mu \bar m$, not
# $\mu \bar g$.


# %%
def pull_nesterov(to_theta, to_m, pull, lr, mu):
    m_bar = to_m - lr * mu * to_theta
    curved, scores = pull(m_bar - lr * to_theta)
    return (to_theta + curved, mu * m_bar), scores


check("04.2", pull_nesterov)

# %% [markdown]
# ## 04.3 · Adam's diagonal
#
# Write $\partial\theta' / \partial g$ of Adam as a vector.
#
# Take $\Delta'_\theta = 1$ and $\Delta'_m = \Delta'_v = 0$ in section 5; then $\bar g$ is this diagonal:
#
# $$\frac{\partial\theta'}{\partial g} = -(1-\beta_1)\,\frac{\alpha}{r}
#   + 2(1-\beta_2)\, g\, \frac{\alpha\, m'}{2\,c\,r^2\sqrt{v'}} .$$
#
# The second term is 0 where $v'$ is 0. It has the opposite sign where $g$ and $m'$ agree in sign: a larger gradient
# also makes the denominator larger, which takes back part of the step.


# %%
def adam_diagonal(g, m, v, count, lr, beta1, beta2, eps):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    alpha, c = lr / (1 - beta1**count), (1 - beta2**count) ** 0.5
    root = v.sqrt()
    r = root / c + eps
    slope = torch.where(root > 0, alpha * m / (2 * c * r**2 * root), 0.0)
    return -(1 - beta1) * alpha / r + 2 * (1 - beta2) * g * slope


check("04.3", adam_diagonal)

# %% [markdown]
# ## 04.4 · All examples in one pass
#
# Write the directional derivatives of a whole batch.
#
# `jvp` returns the losses and, next to them, how each changes along the direction.


# %%
def directional(losses, theta, direction):
    return jvp(losses, (theta,), (direction,))[1]


check("04.4", directional)

# %% [markdown]
# ## 04.5 · A part held fixed
#
# Return $(dg/d\theta)^\top \bar g$ for a gradient that was taken with $z$ = `held(theta)` fixed.
#
# `grad(objective)` differentiates in its first argument only; whatever stands in the second is held fixed. That is
# the gradient of the step. As a function of $\theta$ alone it is `theta -> grad(objective)(theta, held(theta))`, in which
# $z$ moves, so its `vjp` has both terms.


# %%
def pull_held(objective, held, theta, cotangent):
    _, pull = vjp(lambda theta: grad(objective)(theta, held(theta)), theta)
    return pull(cotangent)[0]


check("04.5", pull_held)

# %% [markdown]
# ## 04.6 · Forward over reverse
#
# Get $H\bar g$ by `jvp` of `grad`, and the directional derivatives from the same pass.
#
# $H \bar g$ is the directional derivative of the gradient along $\bar g$. `grad` runs the losses on its way; with
# `has_aux=True` it returns them too, and `jvp` gives their directional derivatives, $\nabla\ell_i\cdot\bar g$, for free.
# We compare the two on a network like the chapter's.

# %%
torch.manual_seed(0)
model = models.MLP((64, 12, 10)).double()
shapes = {name: p.shape for name, p in model.named_parameters()}
theta = torch.cat([p.detach().flatten() for p in model.parameters()])
x, y = torch.randn(50, 64, dtype=theta.dtype), torch.randint(10, (50,))
weight = torch.rand(50, dtype=theta.dtype)
cotangents = torch.randn(4, len(theta), dtype=theta.dtype)


def objective(theta, weight):
    pieces = theta.split([shape.numel() for shape in shapes.values()])
    params = {name: p.view(shape) for p, (name, shape) in zip(pieces, shapes.items(), strict=True)}
    output = torch.func.functional_call(model, params, (x,))
    losses = torch.nn.functional.cross_entropy(output, y, reduction="none")
    return (weight * losses).sum() / len(y), losses


# %%
def reverse_over_reverse(cotangents):
    g = grad(objective, has_aux=True)
    _, pull = vjp(lambda theta, weight: g(theta, weight)[0], theta, weight)
    return vmap(pull)(cotangents)


def forward_over_reverse(cotangents):
    def along(direction):
        def gradient(theta):
            return grad(objective, has_aux=True)(theta, weight)

        curved, slopes = jvp(gradient, (theta,), (direction,))[1]
        return curved, slopes / len(y)

    return vmap(along)(cotangents)


# %%
pairs = zip(reverse_over_reverse(cotangents), forward_over_reverse(cotangents), strict=True)
for name, (one, other) in zip(["H ḡ", "∇ℓᵢ · ḡ / B"], pairs, strict=True):
    agree(name, other, one, tolerance=1e-9)


# %% tags=["nbval-ignore-output"]
def milliseconds(function, rows, repeats=20):
    function(rows)
    started = time.perf_counter()
    for _ in range(repeats):
        function(rows)
    return 1e3 * (time.perf_counter() - started) / repeats


for K in (1, 4):
    reverse = milliseconds(reverse_over_reverse, cotangents[:K])
    forward = milliseconds(forward_over_reverse, cotangents[:K])
    print(f"K = {K}: reverse over reverse {reverse:.1f} ms, forward over reverse {forward:.1f} ms")

# %% [markdown]
# The numbers are the same. On the machine that ran this page, reverse over reverse was the faster one for both $K$. On
# a network as small as this, calling the operations takes longer than the arithmetic in them, so measure again on
# a network of your own before you choose. Four cotangents together take less than twice the time of one.
