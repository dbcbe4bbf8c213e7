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
# # 15 · At the scale of the papers: solutions
#
# To the exercises of [chapter 15](../15_at_the_scale_of_the_papers.ipynb).

# %%
from math import ceil

import pandas as pd
import torch

from magic.book import check
from magic.book.checks import claim

# %% [markdown]
# ## 15.1 · Sweeps on many machines
#
# *The time, in plain trainings, until all targets are pulled back.*
#
# We round up twice. The busiest machine has a whole number of targets, and its last sweep, full or not, is a whole sweep. The machines work at the same time, so the time of the busiest is the time of all.


# %%
def sweeps_cost(targets, machines, group, fixed, each):
    own = ceil(targets / machines)
    return ceil(own / group) * fixed + own * each


check("15.1", sweeps_cost)

# %% [markdown]
# Take 500 targets, of which 39 fit into one sweep (exercise 15.3 says where the 39 comes from). Let a sweep cost two plain trainings before its first target: the training itself, and its steps once more from kept states, with their traces.
# A target adds 2, as in section 3.

# %%
costs = {"group": 39, "fixed": 2, "each": 2}
alone = sweeps_cost(500, 1, **costs)
rows = []
for machines in (1, 8, 64, 500):
    own, time = ceil(500 / machines), sweeps_cost(500, machines, **costs)
    sizes = {"machines": machines, "targets of one": own, "sweeps of one": ceil(own / 39)}
    rows.append(sizes | {"time": time, "times as fast": f"{alone / time:.1f}"})
pd.DataFrame(rows).set_index("machines")

# %%
claim("64 machines: times as fast as one", alone / sweeps_cost(500, 64, **costs), at_most=58)
claim("with one machine for each target", alone / sweeps_cost(500, 500, **costs), at_most=257)

# %% [markdown]
# Sixty-four machines are 57 times as fast as one and not 64 times, for two reasons. Each of them trains for itself: together they make 64 sweeps, where one machine makes 13, so that 128 trainings in place of 26 go into what all targets share.
# And 500 is no multiple of 64, so that the busiest machine has 8 targets where the mean is 7.8. The first reason is the limit, too. However many machines there are, the time never falls below that of one sweep for one target, which is 4 trainings.
#
# ## 15.2 · A batch on several ranks
#
# *The adjoint of a step whose batch is shared between ranks.*
#
# The whole step is $\theta' = \theta - \eta \sum_r \nabla L_r(\theta, w_r)$, and its adjoint is $\Delta = \Delta' - \eta \sum_r H_r \Delta'$. The sum over the ranks stands before the Hessian product only. The cotangent $\Delta'$ itself is whole on every rank, and summing it would count it once for each.
# An example's weight occurs in one $L_r$, so its score, $-\eta\,\partial(\nabla L_r\cdot\Delta')/\partial w_i$, needs nothing of the other ranks.


# %%
def pull(local, params, weights, cotangent, rate, all_reduce):
    params, weights = params.requires_grad_(), weights.requires_grad_()
    (gradient,) = torch.autograd.grad(local(params, weights), params, create_graph=True)
    product, slopes = torch.autograd.grad(gradient @ cotangent, (params, weights))
    return cotangent - rate * all_reduce(product), -rate * slopes


check("15.2", pull)

# %% [markdown]
# So the way back needs what the way forward needs: one sum over the ranks in every step, of as many numbers as there are parameters. It is such a sum for each target, so $K$ targets send $K$ times as much as the training does.
# The gradient itself is not summed here, since the adjoint of plain SGD does not read it. Adam's does: its Jacobian depends on the gradient of the whole batch, so a rank needs that sum as well.
#
# If the sum is forgotten, no error is raised. Every rank has a cotangent of the right shape, goes back with it to the start of the training, and ends with scores of the right shape. On one rank they are even right. Only a comparison of several ranks with a single process shows the mistake.
#
# ## 15.3 · How many targets at once?
#
# *How many cotangents fit beside what a sweep holds anyway.*
#
# A cotangent has a number for each number of the state that training changes. The state of a trained parameter is itself and its slots, $1 + s$ numbers, and a frozen parameter is no part of it.


# %%
def targets_at_once(memory, parameters, trained, slots, trace, bytes=4):
    state = bytes * trained * (1 + slots)
    frozen = bytes * (parameters - trained)
    return max(0, (memory - frozen - state - trace) // state)


check("15.3", targets_at_once)

# %% [markdown]
# On a GPU with 80 GB, with AdamW and a trace that we suppose to take 20 GB: GPT-2 small with its 124 million parameters, and a model of 8 billion, of which either LoRA trains 7 million or everything is trained.

# %%
GB = 10**9
models = {
    "GPT-2 small": (124 * 10**6, 124 * 10**6),
    "8 billion, LoRA": (8 * 10**9, 7 * 10**6),
    "8 billion, all trained": (8 * 10**9, 8 * 10**9),
}
rows, fitting = {}, {}
for name, (parameters, trained) in models.items():
    fitting[name] = targets_at_once(80 * GB, parameters, trained, 2, 20 * GB)
    frozen, each = 4 * (parameters - trained) / GB, 4 * 3 * trained / GB
    rows[name] = {"frozen, GB": f"{frozen:.1f}", "a cotangent, GB": f"{each:.3f}"}
    rows[name]["targets at once"] = fitting[name]
pd.DataFrame(rows).T

# %%
one, some, many = (
    sweeps_cost(500, 1, group, fixed=2, each=2)
    for group in (1, fitting["GPT-2 small"], fitting["8 billion, LoRA"])
)
claim("500 targets: one at a time, over 39 at once", one / some, at_least=1.9)
claim("500 targets: 39 at once, over 332 at once", some / many, at_most=1.03)

# %% [markdown]
# GPT-2 small leaves room for 39 targets. With LoRA the frozen model takes 32 GB, but it takes them once, and a cotangent is 84 MB: 332 targets fit. If all 8 billion parameters are trained, the state alone has 96 GB, and nothing fits.
# What the pulls themselves hold on their way is left out here, so the true numbers are smaller.
#
# How much is a larger group worth, at the prices of 15.1? Pulling 39 targets back at once takes little more than half of what one after the other takes. From 39 to 332, if nothing else changed, the price would fall by 2 % only: what the targets share is paid twice in place of 13 times, but 1,000 of the 1,026 trainings are the pulls themselves.
#
# ## 15.4 · On a GPU
#
# Start with `python -m tests.gpu`, which runs everything that only a GPU can tell and writes what it finds, line by line, to `results.jsonl` in a folder of its own. Compare the time of a sweep, in plain trainings, for 1, 4, 16 and 64 targets with `fixed + K * each`, and the memory at its peak with the count of exercise 15.3.
