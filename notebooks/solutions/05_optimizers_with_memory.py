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
# # Solutions · 05 · Optimizers with memory
#
# To the exercises of [chapter 05](../05_optimizers_with_memory.ipynb).

# %%
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.book import check, data
from magic.book.checks import claim
from magic.engine.adjoint import measure_vjp, step_vjp

# %% [markdown]
# ## 05.1 · A forgotten count
#
# *Adam is resumed with the right $m$ and $v$ and with the count at 0. Its next update is the true one times which number?*
#
# At $\varepsilon = 0$ the update is $\alpha\,c\,m'/\sqrt{v'}$ with $\alpha = \eta/(1-\beta_1^t)$ and
# $c = \sqrt{1-\beta_2^t}$. The new $m'$ and $v'$ do not depend on the count. The true $t$ is `done` + 1; the resumed
# optimizer uses $t = 1$. What remains is
#
# $$\frac{1-\beta_1^{\,t}}{1-\beta_1}\,\sqrt{\frac{1-\beta_2}{1-\beta_2^{\,t}}} .$$


# %%
def stretch(done, beta1, beta2):
    t = done + 1
    return (1 - beta1**t) / (1 - beta1) * ((1 - beta2) / (1 - beta2**t)) ** 0.5


check("05.1", stretch)
claim("after 30 updates", stretch(30, 0.9, 0.999), at_least=1.73, at_most=1.75)
claim("after very many", stretch(10**6, 0.9, 0.999), at_least=0.316, at_most=0.317)

# %% [markdown]
# After 30 updates the next step is 1.7 times too long: $m$ is taken for a tenth of an average although it is nearly
# a whole one. After very many it is $\sqrt{1-\beta_2}/(1-\beta_1) = 0.32$, less than a third of its length, because now $v$
# is taken for a thousandth of an average. Both errors fade as the count grows again, the second over about a thousand
# updates.
#
# ## 05.2 · The slope at zero
#
# *With `eps_root` under the root and $m = v = 0$ after `done` updates: $\partial\theta'/\partial g$ at $g = 0$?*
#
# From $m = v = 0$ come $m' = (1-\beta_1)\,g$ and $v' = (1-\beta_2)\,g^2$. The update is
# $\theta' = \theta - \alpha\,(1-\beta_1)\,g / r(g)$, and $r(0) = \sqrt{\rho} + \varepsilon$. The derivative of $r$ is multiplied by
# $g = 0$ and does not count. With $t$ = `done` + 1,
#
# $$\frac{\partial \theta'}{\partial g}(0) = -\frac{\eta\,(1-\beta_1)}{1-\beta_1^{\,t}}\cdot\frac{1}{\sqrt{\rho}+\varepsilon} .$$


# %%
def slope_at_zero(done, lr, beta1, beta2, eps, eps_root):
    alpha = lr / (1 - beta1 ** (done + 1))
    return -alpha * (1 - beta1) / (eps_root**0.5 + eps)


check("05.2", slope_at_zero)

# %% [markdown]
# With PyTorch's $\varepsilon = 10^{-8}$ the slope is enormous: $10^8\,\eta$. With $\rho = 10^{-8}$ it is $10^4\,\eta$,
# because $\rho$ stands under a root.
#
# ## 05.3 · Coupled weight decay
#
# *Pull back through Adam's update when weight decay adds $\lambda\theta$ to the gradient.*
#
# The update reads $\tilde g = g + \lambda\theta$ wherever Adam reads $g$, so the cotangent of $\tilde g$ is
# $\bar g = (1-\beta_1)\,\bar m + 2(1-\beta_2)\,\tilde g\,\bar v$, with $m'$ and $v'$ made of $\tilde g$. It goes to $g$
# with factor 1 and to $\theta$ with factor $\lambda$. The parameters also reach $\theta'$ directly, with factor 1:
#
# $$\Delta_\theta = \Delta_\theta' + \lambda\,\bar g .$$
#
# In a training step, $H\bar g$ is added, as always. With decoupled decay it was $(1-\eta\lambda)\,\Delta_\theta'$, and the
# memory never saw $\lambda$.


# %%
def pull_coupled(theta, g, m, v, t, to_theta, to_m, to_v, lr, beta1, beta2, eps, decay):
    alpha, c = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
    g = g + decay * theta
    m_after, v_after = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    root = v_after.sqrt()
    r = root / c + eps
    slope = torch.where(root > 0, alpha * m_after / (2 * c * r**2 * root), 0.0)
    m_bar, v_bar = to_m - alpha / r * to_theta, to_v + slope * to_theta
    to_gradient = (1 - beta1) * m_bar + 2 * (1 - beta2) * g * v_bar
    return to_gradient, to_theta + decay * to_gradient, beta1 * m_bar, beta2 * v_bar


check("05.3", pull_coupled)

# %% [markdown]
# ## 05.4 · Running statistics
#
# *Pull the cotangents of BatchNorm's running mean and variance back.*
#
# The old statistics enter with the factor $1-\kappa$. The batch's mean moves by $1/B$ when one input moves by 1. Its
# variance, $\frac{1}{B-1}\sum_i (h_i - \text{mean})^2$, moves by $2(h_j - \text{mean})/(B-1)$: the mean moves as well, but
# that part is multiplied by the sum of the deviations, which is zero.


# %%
def pull_statistics(h, to_mean, to_var, kappa):
    deviations = h - h.mean(dim=0)
    to_h = kappa * (to_mean / len(h) + 2 * deviations / (len(h) - 1) * to_var)
    return to_h, (1 - kappa) * to_mean, (1 - kappa) * to_var


check("05.4", pull_statistics)

# %% [markdown]
# Pulled back over $k$ steps, the cotangent of the statistics shrinks by $(1-\kappa)^k$. So each step gets its part, and
# those more than a few times $1/\kappa$ before the end hardly any.
#
# ## 05.5 · A memory that is declared
#
# *Rewrite the layer so that its memory is part of the state.*


# %%
class MyWarmUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (self.calls / 20).clamp(max=1.0)


check("05.5", MyWarmUp)

# %% [markdown]
# `magic.Run` hands the buffers of a state to the layer and collects what it leaves in them. A plain attribute of the
# module would still hold the count of whichever step was computed last, in training or in a replay.
#
# ## 05.6 · Does the path fade?
#
# *The BatchNorm run, four times as long, at a constant rate and at one that falls to zero: what happens to the error of
# leaving out the running statistics?*

# %%
x, y, x_test, y_test = data.digits(train=300)
x, x_test = x.double(), x_test.double()


def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:8], y_test[:8])


def normed_run(epochs, falling):
    torch.manual_seed(2)
    layers = nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10)
    net = nn.Sequential(nn.Flatten(), *layers).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    order = magic.batches(len(x), size=50, epochs=epochs, seed=0)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(order))
    return magic.Run(net, optimizer, (x, y), loss, order, scheduler=falls if falling else None)


# %%
def error(run):
    """The relative error of the scores without the path through the running statistics."""
    states = [run.initial]
    while states[-1].step < run.steps:
        states.append(run.step(states[-1], run.weights()))
    scores = []
    first = measure_vjp(run, states[-1], measure)
    for cotangent in (first, dataclasses.replace(first, buffers={})):
        total = torch.zeros(8, len(x), dtype=x.dtype)
        for state in reversed(states[:-1]):
            cotangent, part = step_vjp(run, state, cotangent, run.weights())
            total.index_add_(1, run.batches[state.step], part)
        scores.append(total)
    exact, without = scores
    return ((without - exact).norm() / exact.norm()).item()


# %%
claim("10 epochs, constant rate", error(normed_run(10, False)), at_least=0.75)
claim("40 epochs, constant rate", error(normed_run(40, False)), at_least=0.9)
claim("40 epochs, falling rate", error(normed_run(40, True)), at_least=0.9)

# %% [markdown]
# The error does not fade. Training that has settled hardly moves the parameters from step to step, but that is not the
# derivative in question. The running statistics are averages of $\text{mean}(h(\theta_t))$ over the last ten steps or so,
# and all these $\theta_t$ depend on the data weights, through the whole run before them. If $\theta$ no longer moves, the
# statistics are simply functions of the final $\theta$, and leaving them out means holding constant a part of the
# model that changes with its parameters. A falling rate makes the statistics fit the final parameters better. It does
# not make them independent of the data weights.
