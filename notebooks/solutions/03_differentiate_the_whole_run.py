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
# # Solutions · 03 · Differentiate the whole run
#
# To the exercises of [chapter 03](../03_differentiate_the_whole_run.ipynb). Try them first.

# %%
import warnings

import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic.book import check, data, models
from magic.book.checks import agree, claim

# PyTorch's own warning, at the first use of forward mode
warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
device = "cuda" if torch.cuda.is_available() else "cpu"
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=400, test=500))
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 32, 10)).double().to(device)
order, rate = magic.batches(len(x), size=50, epochs=5, seed=0).to(device), 0.3

# %% [markdown]
# The functions of the chapter:


# %%
def losses(params, x, y):
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


def step(params, batch, weights):
    objective = (weights[batch] * losses(params, x[batch], y[batch])).sum() / len(batch)
    gradient = torch.autograd.grad(objective, list(params.values()), create_graph=True)
    return {name: p - rate * g for (name, p), g in zip(params.items(), gradient, strict=True)}


def train(weights):
    params = dict(model.named_parameters())
    for batch in order:
        params = step(params, batch, weights)
    return params


# %%
weights = torch.ones(len(x), dtype=x.dtype, device=device).requires_grad_()
trained = train(weights)
hardest = losses(trained, x_test, y_test).argmax().item()


def measure(params):
    return losses(params, x_test[hardest : hardest + 1], y_test[hardest : hardest + 1]).sum()


(scores,) = torch.autograd.grad(measure(trained), weights)

# %% [markdown]
# ## 03.1 · All scores from two trainings
#
# Write the derivative along a direction $u$ as a central difference, and say what it must equal.
#
# The chapter's formula has $e_i$ in two places; put $u$ there. By the chain rule the derivative along $u$ is
# $\sum_i u_i \tau_i$. So two trainings check all 400 scores at once: if one of them is wrong, this sum is wrong too,
# unless $u_i$ happens to be 0.


# %%
def slope(f, w, u, epsilon=1e-4):
    return (f(w + epsilon * u) - f(w - epsilon * u)) / (2 * epsilon)


check("03.1", slope)

# %%
chance = torch.Generator().manual_seed(0)
u = torch.randn(len(x), generator=chance, dtype=x.dtype).to(device)
along = slope(lambda w: measure(train(w)).detach(), weights.detach(), u, epsilon=1e-5)
agree("two trainings, all scores", scores @ u, along, tolerance=1e-6)

# %% [markdown]
# ## 03.2 · Any loss, any measure
#
# Write `unroll` for a model that you know nothing of.
#
# It is section 1 in one function. The weights must require a gradient *before* the first step uses them. If `theta` does not
# require one, `torch.autograd.grad` cannot take the first gradient, so it gets one too; from the second step on,
# it is the result of operations that autograd follows, and must not be detached.


# %%
def unroll(losses, measure, theta, batches, weights, rate):
    weights = weights.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    for batch in batches:
        objective = (weights[batch] * losses(theta, batch)).sum() / len(batch)
        (gradient,) = torch.autograd.grad(objective, theta, create_graph=True)
        theta = theta - rate * gradient
    return torch.autograd.grad(measure(theta), weights)[0]


check("03.2", unroll)

# %% [markdown]
# ## 03.3 · The loop for any state
#
# Write the loop of section 4 for states that are tuples of tensors.
#
# Nothing in the loop knew what a state consists of. The inputs of one step are the parts of its state and the weights; the
# outputs are the parts of the next state; the cotangent has a part for each of them. For the first $\Delta_T$ of a run
# with momentum, the buffer's part is zero, since $\varphi$ does not read it. One step earlier it no longer is.


# %%
def go_back(step, states, batches, weights, cotangent):
    weights = weights.clone().requires_grad_()
    scores = torch.zeros_like(weights)
    for t in reversed(range(len(batches))):
        state = tuple(part.detach().requires_grad_() for part in states[t])
        after = step(state, batches[t], weights)
        *cotangent, part = torch.autograd.grad(after, (*state, weights), grad_outputs=cotangent)
        scores = scores + part
    return scores


check("03.3", go_back)

# %% [markdown]
# ## 03.4 · Forward mode
#
# Carry $\partial s_t / \partial w_i$ along with the training.
#
# Call it $C_t$. At the start $C_0 = 0$, since $s_0$ does not depend on the weights. A step has two inputs that move with
# $w_i$: its state, by $C_t$, and the weights, by $e_i$. So $C_{t+1} = J_t C_t + W_t e_i$, and this is what `jvp`
# computes. Only $s_t$ and $C_t$ are held at any time; but for all examples one would hold $n$ of them.


# %%
def carry(step, start, batches, weights, i):
    direction = torch.zeros_like(weights)
    direction[i] = 1
    state, carried = start, tuple(torch.zeros_like(part) for part in start)
    for batch in batches:

        def one_step(state, weights, batch=batch):
            return step(state, batch, weights)

        state, carried = torch.func.jvp(one_step, (state, weights), (carried, direction))
    return carried


check("03.4", carry)

# %% [markdown]
# ## 03.5 · An average
#
# Measure the mean loss over all 500 test images. How large is the largest score now?

# %%
weights = torch.ones(len(x), dtype=x.dtype, device=device).requires_grad_()
(average,) = torch.autograd.grad(losses(train(weights), x_test, y_test).mean(), weights)
ratio = scores.abs().max() / average.abs().max()
claim("largest score of the hardest image, over that of the mean", ratio, at_least=90)

# %% [markdown]
# The largest score is a hundred times smaller. We had chosen the test image with the largest loss, and it is more
# sensitive than most. An example that helps one test image may harm others, and in the mean these effects cancel. And
# an example that matters only to the few test images that resemble it is divided by all 500.
#
# ## 03.6 · Without later steps
#
# Leave the cotangent as it is at $T$. How do the scores correlate with the true ones?


# %%
def cut(params):
    return {name: p.detach().requires_grad_() for name, p in params.items()}


states = [cut(dict(model.named_parameters()))]
for batch in order:
    states.append(cut(step(states[-1], batch, weights)))
last = torch.autograd.grad(measure(states[-1]), list(states[-1].values()))
unmoved = torch.zeros_like(scores)
for t in reversed(range(len(order))):
    after = step(states[t], order[t], weights)
    inputs = [*states[t].values(), weights]
    *_, part = torch.autograd.grad(list(after.values()), inputs, grad_outputs=last)
    unmoved += part

# %%
correlation = torch.corrcoef(torch.stack([unmoved, scores]))[0, 1]
claim("correlation with the true scores", correlation, at_least=0.5, at_most=0.65)

# %% tags=["nbval-ignore-output"]
print("most helpful, true:   ", scores.argsort()[:5].tolist())
print("most helpful, unmoved:", unmoved.argsort()[:5].tolist())

# %% [markdown]
# The most helpful image is the same, and two of the five most helpful; the correlation over all 400 is .58. These scores
# count what a step did when it was done, and leave out what later steps made of it.
