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
# # 14 · What the derivative is for: solutions
#
# To the exercises of [chapter 14](../14_what_the_derivative_is_for.ipynb).

# %%
import torch
import torch.nn.functional as F

import magic
from magic.book import check, data, models
from magic.book.checks import claim

torch.set_num_threads(1)

# %% [markdown]
# ## 14.1 · Counts
#
# *A step of sign descent on the counts of a part of the examples.*
#
# The sign says in which direction a count goes, and the mask whether it goes at all. Both are factors. The projection onto what is allowed comes last.


# %%
def count_step(counts, gradient, moved):
    return (counts - gradient.sign() * moved).clamp(min=0)


check("14.1", count_step)

# %% [markdown]
# ## 14.2 · Through a schedule
#
# *The derivative by the few numbers that a schedule is made from.*
#
# One number moves the rates of all steps, and each rate moves $\varphi$; the effects add up. That is the product of `by_step` with the Jacobian $(T, P)$ of the schedule, and pulling `by_step` back computes it without the Jacobian.


# %%
def through_schedule(schedule, numbers, by_step):
    return torch.func.vjp(schedule, numbers)[1](by_step)[0]


check("14.2", through_schedule)

# %% [markdown]
# ## 14.3 · A poisoner's step
#
# *Up along the sign, and back to where the bound and the range of pixels allow.*
#
# Both limits are intervals for each pixel, so that the projection is two clamps. Since the start lies within the range, their order does not matter.


# %%
def poison_step(x, start, gradient, step, bound, low, high):
    change = (x + step * gradient.sign() - start).clamp(-bound, bound)
    return (start + change).clamp(low, high)


check("14.3", poison_step)


# %% [markdown]
# ## 14.4 · A better start
#
# *Descend the initial parameters. What happens to the test loss, and with another order of the batches?*
#
# A round moves each tensor against its derivative by a hundredth of its length.


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def training(x, y, seed, rate=0.05, order=None):
    torch.manual_seed(seed)
    model = models.MLP((64, 64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    batches = magic.batches(len(x), size=100, epochs=10, seed=seed if order is None else order)
    triangle = models.triangle(optimizer, len(batches))
    return magic.Run(model, optimizer, (x, y), loss, batches, scheduler=triangle)


# %%
def model_of(run, weights=None):
    return run.model(run.train(weights, progress=False)).eval()


def mean_loss(run, part):
    with torch.no_grad():
        return loss(model_of(run), *part).mean().item()


x, y, x_test, y_test = data.digits(train=1000, test=797, seed=0)
clean, test = (x_test[:300], y_test[:300]), (x_test[300:], y_test[300:])
run = training(x, y, seed=0)


def measure(model):
    return loss(model, *clean).mean()[None]


better = run
for _ in range(4):
    by = magic.metagradient(better, measure, of="start", progress=False).start.params
    start = better.initial.params
    steps = {k: 0.01 * start[k].norm() / by[k].norm() * by[k][0] for k in by}
    better = magic.changed(better, start={k: start[k] - steps[k] for k in by})

# %%
reordered = training(x, y, seed=0, order=100)
moved = magic.changed(reordered, start=better.initial)
for name, part in (("clean images", clean), ("test images", test)):
    ratio = mean_loss(better, part) / mean_loss(run, part)
    claim(f"{name}: loss, over that before", ratio, at_most=0.95)
    ratio = mean_loss(moved, part) / mean_loss(reordered, part)
    claim(f"{name}, another order: loss, over that before", ratio, at_most=0.95)

# %% [markdown]
# The loss on the clean images falls most, since it was descended. The test loss falls, too, and as much with another order of the batches: what the start has learned is not about the order. It has learned something of the clean images.
#
# A start from which a short training leads to a good model is what *learning to learn* looks for: MAML (Finn et al. 2017, [arXiv 1703.03400](https://arxiv.org/abs/1703.03400)) descends one start for many tasks, through trainings of a few steps. Here it is one task, and the whole training.
#
# ## 14.5 · A defence
#
# *Does the derivative of the defender's loss find the poison?*


# %%
theirs, ours = (clean[0][:150], clean[1][:150]), (clean[0][150:], clean[1][150:])


def mean_on(part):
    return lambda model: loss(model, *part).mean()[None]


every = magic.metagradient(run, mean_on(theirs), of="data", progress=False).data[0][0]
chosen = every.flatten(1).abs().sum(1).topk(25).indices.tolist()
low, high, poisoned = x.min(), x.max(), x.clone()
for _ in range(4):
    other = magic.changed(run, data=(poisoned, None))
    found = magic.metagradient(other, mean_on(theirs), of="data", examples=chosen, progress=False)
    step = (high - low).item() / 2
    poisoned[chosen] = poison_step(
        poisoned[chosen], x[chosen], found.data[0][0], step, 99.0, low.item(), high.item()
    )

# %%
attacked = magic.changed(run, data=(poisoned, None))
scores = magic.attribute(attacked, mean_on(ours), progress=False).values[0]
with torch.no_grad():
    losses = loss(model_of(attacked), poisoned, y)
is_poison = torch.zeros(1000, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)
kept = torch.ones(1000).index_fill(0, scores.topk(25).indices, 0.0)


def right(run, weights=None):
    with torch.no_grad():
        return (model_of(run, weights)(test[0]).argmax(1) == test[1]).double().mean()


claim("poison among the 25 highest scores", is_poison[scores.topk(25).indices].sum(), at_least=9)
claim("poison among the 25 largest losses", is_poison[losses.topk(25).indices].sum(), at_least=9)
claim("accuracy before the attack", right(run), at_least=0.93)
claim("accuracy with the poison", right(attacked), at_most=0.95)
claim("accuracy without the 25 highest scores", right(attacked, kept), at_least=0.92)

# %% [markdown]
# About half of the poison is among the 25 highest scores, where chance would find less than one; and as much is among the 25 largest losses, since pixels that may go the whole way make images that look like nothing. Removing what was found brings no accuracy back, as far as 497 test images can tell: one of them is a fifth of a percent, and half of what is removed is good data.
# So the derivative is a witness here and no cure.
#
# An attacker who knows of this defence adds it to what he climbs: he makes the loss rise, and the scores of his images, on clean images of his own, stay small. That is a derivative of a derivative, and dearer; and the defender's clean images are his secret.
