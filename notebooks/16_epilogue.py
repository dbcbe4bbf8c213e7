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
# # 16 · Epilogue
#
# **Question.** What do we know now, and what does nobody know?
#
# The book asked what a trained model would have predicted, had it been trained on other data. Here is all of its answer
# once more, small enough to be seen at once: a run, its derivative by REPLAY, and the test. Nothing is imported but PyTorch and the digits;
# `magic` appears only at the end, to be agreed with.
#
# About ten minutes to read, half a minute to run.

# %%
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.func import functional_call

import magic
from magic.book import data, models
from magic.book.checks import agree, claim

# %% [markdown]
# ## 1 · The book in forty lines
#
# A step is a pure function of the parameters and the weights (chapters 01 and 02). Plain SGD has no other state. The parameters are one vector
# `theta`, as in chapter 04.

# %%
x, y, x_test, y_test = data.digits(train=600, test=200)
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
model = models.MLP((64, 24, 10)).double()
named = dict(model.named_parameters())
start = torch.cat([p.detach().flatten() for p in named.values()])
order, rate, every = magic.batches(len(x), size=50, epochs=10, seed=0), 0.1, 12


def losses(theta, x, y):
    pieces = theta.split([p.numel() for p in named.values()])
    params = {k: v.view(p.shape) for (k, p), v in zip(named.items(), pieces, strict=True)}
    return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")


def step(theta, weights, batch):
    def objective(theta):
        return (weights[batch] * losses(theta, x[batch], y[batch])).sum() / len(batch)

    return theta - rate * torch.func.grad(objective)(theta)


# %% [markdown]
# The cotangent goes back through one step by that step's adjoint (chapters 03 to 05). Every twelfth state is kept, the others are computed again
# as the way back needs them (chapter 06): 120 steps, eleven states at a time beside those of one segment.


# %%
def train(weights, theta=start, batches=order):
    states = [theta]
    for batch in batches:
        states.append(step(states[-1], weights, batch))
    return states


def replay(weights, measure):
    kept = train(weights)[::every]
    (cotangent,) = torch.func.vjp(measure, kept[-1])[1](torch.ones((), dtype=x.dtype))
    scores = torch.zeros_like(weights)
    for k in reversed(range(len(kept) - 1)):
        segment = order[k * every : (k + 1) * every]
        states = train(weights, kept[k], segment)[:-1]
        for theta, batch in zip(reversed(states), reversed(segment), strict=True):
            _, pull = torch.func.vjp(lambda s, w, b=batch: step(s, w, b), theta, weights)
            cotangent, part = pull(cotangent)
            scores += part
    return scores


# %% [markdown]
# What we measure is the loss of one test image, the one that the trained network gets most wrong.

# %%
ones = torch.ones(len(x), dtype=x.dtype)
trained = train(ones)[-1]
hardest = losses(trained, x_test, y_test).argmax().item()


def measure(theta):
    return losses(theta, x_test[hardest : hardest + 1], y_test[hardest : hardest + 1]).sum()


scores = replay(ones, measure)

# %% [markdown]
# And the test (chapter 10): thirty trainings without a random 1 % of the images, beside what the scores said before.

# %%
generator = torch.Generator().manual_seed(0)
predicted, true = [], []
for _ in range(30):
    weights = ones.clone()
    weights[torch.randperm(len(x), generator=generator)[:6]] = 0
    predicted.append((measure(trained) + scores @ (weights - 1)).item())
    true.append(measure(train(weights)[-1]).item())
claim("rank correlation over 30 retrainings", spearmanr(predicted, true)[0], at_least=0.95)

# %% [markdown]
# What `magic` adds is everything that a real run needs: other optimizers, buffers, many targets at once, a bound on memory, a disk, and checks that stop a wrong
# gradient. The numbers are the same.

# %%
run = magic.Run(
    model,
    torch.optim.SGD(model.parameters(), lr=rate),
    data=(x, y),
    loss=lambda model, x, y: F.cross_entropy(model(x), y, reduction="none"),
    batches=order,
)
attribution = magic.attribute(
    run,
    lambda model: F.cross_entropy(model(x_test[[hardest]]), y_test[[hardest]], reduction="none"),
    progress=False,
)
agree("forty lines, and magic", scores, attribution.values[0], tolerance=1e-9)

# %% [markdown]
# ## 2 · What we know
#
# - **Training can be a function.** With every source of chance fixed, two runs agree to the bit ([01](01_the_same_run_twice.ipynb)), and then $f(w)$ has a graph that one can look at ([02](02_training_is_a_function.ipynb)).
# - **Its derivative can be had exactly**, for about the price of four trainings for one output and less for each of many, in the memory of a few states
#   ([03](03_differentiate_the_whole_run.ipynb) to [06](06_remember_forget_replay.ipynb)), and with checks that find a wrong one ([07](07_a_replay_to_trust.ipynb)).
# - **Where training is smooth, the derivative predicts.** It orders small random removals nearly perfectly, and better than the estimates that were in use before
#   ([08](08_is_the_derivative_useful.ipynb) to [10](10_is_it_right.ipynb)).
# - **What it costs is known before it is paid**: for $K$ outputs about $1 + 2K$ trainings, $1 + K$ with LoRA, and the memory of $K + 1$ states ([15](15_at_the_scale_of_the_papers.ipynb)).
# - **It can be said how near that is to the best possible** linear prediction, and where to take the derivative for larger removals ([11](11_how_near_is_near_optimal.ipynb)).
# - **It fails in known ways**: for sets that were chosen because they matter, for half of the data, and for rough training ([10](10_is_it_right.ipynb), [12](12_how_far_does_a_tangent_reach.ipynb)).
#
# ## 3 · What nobody knows
#
# - **Which recipes are smooth, before they are tried.** Metasmoothness needs trainings, and it does not always warn. A theory that says what a
#   rate, a batch size or an activation does to the curvature of $f$ is missing.
# - **How to predict targeted removals.** A tangent counts each example as if the others stayed. What is the cheapest thing that knows of redundancy?
# - **The seed.** We differentiate one run. Which part of a score is about the data, and which about the chance of this initialisation and this order?
# - **The largest runs.** No figure of this book was measured on a GPU. The papers differentiate a ResNet-9 and the finetuning of language models of up to two billion parameters. We know of no metagradient
#   through a pretraining of today's size.
# - **What should be done with it.** Choosing data, finding poison, settling who should be paid for a model's answer: each needs more than a number.
#
# ## Exercise
#
# **16.1** ●●● (60 min) Take a training script of your own. Make it a `magic.Run`, ask one question about one output, and test the answer with ten
# retrainings before you believe it. <details><summary>Hint</summary>Begin with <code>magic.plan(run)</code>, which says what it will cost. If the LDS is low, chapter 08 says what to try.</details>
#
# ## To read on
#
# - A. Ilyas and L. Engstrom, *MAGIC: Near-Optimal Data Attribution for Deep Learning*, 2025, [arXiv 2504.16430](https://arxiv.org/abs/2504.16430).
# - L. Engstrom et al., *Optimizing ML Training with Metagradient Descent*, 2025, [arXiv 2503.13751](https://arxiv.org/abs/2503.13751): REPLAY and metasmoothness.
# - P. W. Koh and P. Liang, *Understanding Black-box Predictions via Influence Functions*, 2017, [arXiv 1703.04730](https://arxiv.org/abs/1703.04730).
# - S. M. Park et al., *TRAK: Attributing Model Behavior at Scale*, 2023, [arXiv 2303.14186](https://arxiv.org/abs/2303.14186).
# - D. Maclaurin, D. Duvenaud and R. Adams, *Gradient-based Hyperparameter Optimization through Reversible Learning*, 2015, [arXiv 1502.03492](https://arxiv.org/abs/1502.03492): the first derivative through a whole training.
# - A. Griewank and A. Walther, *Evaluating Derivatives*, 2nd edition, SIAM 2008: what to keep, and what to compute again.
#
# **The map, the glossary and the notation:** [index](index.md).
