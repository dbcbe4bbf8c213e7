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
# # 05 · Optimizers with memory
#
# **Question.** What must a training state contain, and what goes wrong when something is left out?
#
# The parameters of a model are enough to *use* it. They are not enough to go on training it, and not enough
# to differentiate its training. Optimizers remember past gradients, and some layers remember past batches.
# These memories depend on the data weights just as the parameters do. A derivative that ignores them
# is wrong, and nothing reports an error.
#
# [Chapter 04](04_one_step_backwards.ipynb) took a cotangent back through one step of SGD, momentum and Adam.
# Here we leave out one part of the state at a time, first when a state is restored, then on the way back, and
# measure the error.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State` | everything that step $t$ reads, apart from its batch and the data weights |
# | optimizer state | `state.slots` | what the optimizer remembers about each parameter |
# | cotangent $\Delta_t$ | `cotangent` | $\partial\varphi/\partial s_t$, for all $K$ measured outputs |
# | scores $\tau_{ki}$ | `scores` | $\partial\varphi_k/\partial w_i$ |
#
# As in chapter 04, a prime means "after the step". About 40 minutes, without the exercises. Everything is in float64, because we
# compare derivatives.

# %%
import dataclasses
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim
from magic.engine.adjoint import measure_vjp, step_vjp

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()
fixed = magic.determinism.fix()  # the same bits each time, as in chapter 01
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=300))
x, x_test = x.double(), x_test.double()
order = magic.batches(len(x), size=50, epochs=10, seed=0)

# %% [markdown]
# ## 1 · Who remembers what
#
# | | remembers from step to step | where | has a derivative |
# |---|---|---|---|
# | SGD with momentum | $m$, a decaying sum of past gradients | optimizer state | yes |
# | Adam | $m$ and $v$, averages of past gradients and of their squares | optimizer state | yes |
# | | the number of updates it has done | optimizer state | no, it is an integer |
# | BatchNorm | running averages of the batches' means and variances | buffers of the model | yes |
# | | the number of batches it has seen | buffers of the model | no, it is an integer |
# | dropout | nothing, if its random numbers are a function of (seed, $t$) | | |
# | learning-rate schedule | nothing, if the rate is a function of $t$ | | |
#
# We train four networks on the same 300 digits in the same 60 batches. They differ in what is
# remembered.


# %%
def loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def measure(model):
    return loss(model, x_test[:8], y_test[:8])


def run_of(layers, optimizer=torch.optim.SGD, seed=0, **options):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), *layers()).to(device).double()
    return magic.Run(net, optimizer(net.parameters(), **options), (x, y), loss, order, seed=seed)


def plain():
    return [models.MLP((64, 32, 10))]


def normed():
    return [nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10)]


def dropped():
    return [nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10)]


# %%
rate, mu = 0.05, 0.9
lr, beta1, beta2, eps = 3e-3, 0.9, 0.999, 1e-4
momentum = {"optimizer": torch.optim.SGD, "lr": rate, "momentum": mu}
adam = {"optimizer": torch.optim.Adam, "lr": lr, "betas": (beta1, beta2), "eps": eps}
runs = {
    "momentum": run_of(plain, **momentum),
    "Adam": run_of(plain, **adam),
    "BatchNorm": run_of(normed, **momentum),
    "dropout": run_of(dropped, **adam),
}

# %% [markdown]
# PyTorch's default for Adam is $\varepsilon = 10^{-8}$. Its first updates are then nearly the sign of the
# gradient, and a sign has no useful derivative near 0. Section 5 comes back to this.
#
# Here is what the state of a network with BatchNorm, trained by Adam, holds of the BatchNorm layer after one step.

# %%
run = run_of(normed, **adam)
state = run.step(run.initial, run.weights())
for name, tensor in state.flatten().items():
    if "/2." in name:  # the layer that nn.Sequential calls "2"
        print(f"{name:<32} {tensor.dtype!s:<15} {tuple(tensor.shape)}")

# %% [markdown]
# ## 2 · Restoring half a state
#
# We stop the momentum run and the Adam run after 30 of their 60 steps, restore the state, once whole and once with a
# part missing, and train on with the same batches. Any difference then comes from the missing part. A loop that loads the
# parameters and creates a new optimizer restores no optimizer state at all. A loop that saves $m$ and $v$ and
# forgets the number of updates is wrong in a less obvious way: Adam divides $m$ by $1 - \beta_1^t$ and $v$
# by $1 - \beta_2^t$, and starts again at $t = 1$.


# %%
def states_from(run, state):
    """This state and all that follow, to the end of the run."""
    states = [state]
    while states[-1].step < run.steps:
        states.append(run.step(states[-1], run.weights()))
    return states


states = {name: states_from(run, run.initial) for name, run in runs.items()}


# %% tags=["your-turn"]
def without_memory(run, state):
    """This state with the optimizer state that the run began with, `run.initial.slots`.

    Parameters, buffers and step stay. Use `dataclasses.replace(state, slots=...)`.
    """
    return dataclasses.replace(state, slots=run.initial.slots)


def without_count(run, state):
    """This state with m and v as they are, and with 0 as the number of updates done.

    `state.slots` is {parameter: {"exp_avg": m, "exp_avg_sq": v, "step": count}}, and each count
    an int64 tensor without dimensions. Make a new dictionary; change none in place.
    """
    zero = torch.zeros((), dtype=torch.int64)
    slots = {name: memory | {"step": zero} for name, memory in state.slots.items()}
    return dataclasses.replace(state, slots=slots)


# %%
half = 30


def flat(state):
    return torch.cat([p.flatten() for p in state.params.values()])


cases = {
    "momentum, no buffer": ("momentum", without_memory),
    "Adam, no m, v and count": ("Adam", without_memory),
    "Adam, no count": ("Adam", without_count),
}
gaps, accuracy = {}, {}
for case, (name, change) in cases.items():
    run, true = runs[name], states[name][half:]
    again = states_from(run, change(run, true[0]))
    way = (flat(true[-1]) - flat(true[0])).norm()
    pairs = zip(again, true, strict=True)
    gaps[case] = [((flat(a) - flat(b)).norm() / way).item() for a, b in pairs]
    answers = run.model(again[-1])(x_test).argmax(1)
    accuracy[case] = (answers == y_test).double().mean().item()

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5.2, 3.2))[1]
for case, gap in gaps.items():
    ax.plot(range(half, 61), gap, label=case)
ax.set(xlabel="step", ylabel="distance / way left to go", ylim=(0, 0.6))
ax.set_title("Resumed at step 30 with a part missing")
ax.legend(loc="upper left");


# %%
for name in ("momentum", "Adam"):
    end = states_from(runs[name], states[name][half])[-1].fingerprint()
    claim(f"{name}, whole state restored: the same bits", end == states[name][-1].fingerprint())
claim("distance without the momentum buffer", gaps["momentum, no buffer"][-1], at_least=0.3)
claim("without m, v and the count", gaps["Adam, no m, v and count"][-1], at_least=0.2)
claim("without the count alone", gaps["Adam, no count"][-1], at_least=0.1, at_most=0.2)
claim("accuracy of the worst of the three", min(accuracy.values()), at_least=0.9)

# %% [markdown]
# The accuracy shows nothing unusual. Yet these are other networks, 15 to 38 % of the remaining way from where the
# interrupted run would have ended. A replay that restored its states like this would differentiate a training that
# never took place.
#
# The count is an integer and does not move with the data weights, so it has no derivative. It must be restored
# all the same, because $m$ and $v$ are used together with it.
#
# ## 3 · The derivative needs the memory, too
#
# Now the way back. For momentum, chapter 04 found
#
# $$m' = \mu m + g, \quad \theta' = \theta - \eta m' \qquad\Longrightarrow\qquad
#   \bar g = \Delta_m' - \eta \Delta_\theta', \quad
#   \Delta_m = \mu\, \bar g, \quad \Delta_\theta = \Delta_\theta' + H \bar g .$$
#
# The scores of the batch are made from $\bar g = \partial\varphi/\partial g$, and $\bar g$ has two terms: a gradient
# influences the end through the parameters at once ($-\eta\Delta_\theta'$), and later through the buffer
# ($\Delta_m'$). How large is the second? Suppose that $\Delta_\theta$ hardly changes over many steps. Then
# $\Delta_m$ settles where $\Delta_m = \mu\,(\Delta_m - \eta\Delta_\theta)$, that is
#
# $$\Delta_m = -\frac{\mu}{1-\mu}\,\eta\Delta_\theta .$$
#
# With $\mu = 0.9$ this is nine times the direct term. A derivative that treated the buffer as a constant
# would keep a tenth of $\bar g$.
#
# To test this we need chapter 04's loop, with a place where something can be forgotten. `step_vjp` pulls a
# cotangent back through one step and returns the scores that this step adds; `forget` changes the cotangent
# before each pull.


# %% tags=["your-turn"]
def backward(run, states, forget=lambda cotangent: cotangent):
    """(K, n): the scores, from the last of the states back to the first.

    Begin with `measure_vjp(run, states[-1], measure)`. For each earlier state, the latest first,
    call `step_vjp(run, state, forget(cotangent), run.weights())`. It returns the cotangent of that
    state and a (K, B) tensor, to be added to the columns `run.batches[state.step]` of the scores.
    """
    cotangent = measure_vjp(run, states[-1], measure)
    scores = torch.zeros(8, len(x), dtype=x.dtype, device=device)
    for state in reversed(states[:-1]):
        cotangent, part = step_vjp(run, state, forget(cotangent), run.weights())
        scores.index_add_(1, run.batches[state.step].to(device), part)
    return scores


# %%
def forgetting(*names):
    """A function that sets the cotangents of these parts of the optimizer state to zero."""

    def forget(cotangent):
        slots = {
            parameter: {k: 0 * d if k in names else d for k, d in memory.items()}
            for parameter, memory in cotangent.slots.items()
        }
        return dataclasses.replace(cotangent, slots=slots)

    return forget


# %% [markdown]
# The loop itself is checked by training alone, without any derivative. For three training images the data weight is
# moved up and down a little, the whole training is repeated, and the five-point formula for central differences
# is applied to the measured outputs. The error is a relative distance,
# $\lVert \tau - \tau_{\text{fd}} \rVert / \lVert \tau_{\text{fd}} \rVert$ over all outputs and the three images.

# %%
images = [0, 100, 200]


def outputs_at(run, i, moved_by):
    weights = run.weights()
    weights[i] += moved_by
    return measure(run.model(run.train(weights, progress=False))).detach()


def finite_differences(run, h=1e-4):
    columns = []
    for i in images:
        near, far = [outputs_at(run, i, k * h) - outputs_at(run, i, -k * h) for k in (1, 2)]
        columns.append((8 * near - far) / (12 * h))
    return torch.stack(columns, dim=1)


def distance(scores, reference):
    return ((scores - reference).norm() / reference.norm()).item()


# %%
exact, errors = {}, {}
for name, run in runs.items():
    exact[name] = backward(run, states[name])
    gap = distance(exact[name][:, images], finite_differences(run))
    errors[name, "nothing"] = gap
    claim(f"{name}: error, nothing left out", gap, at_most=1e-7)
by_magic = magic.attribute(runs["Adam"], measure, progress=False).values
claim("distance from magic.attribute", distance(exact["Adam"], by_magic), at_most=1e-10)

# %% [markdown]
# So with nothing left out the loop is exact, and its scores can serve as the reference for what follows, for all 300
# images. First the momentum buffer.


# %%
def error(name, left_out, scores):
    errors[name, left_out] = distance(scores, exact[name])
    return errors[name, left_out]


forgetful = backward(runs["momentum"], states["momentum"], forgetting("momentum_buffer"))
lost = error("momentum", "the buffer m", forgetful)
claim("momentum: error without the buffer's cotangent", lost, at_least=0.7, at_most=0.9)

# %% [markdown]
# The error stays below the 90 % of our estimate, which assumed that $\Delta_m$ has settled, and that forgetting it leaves
# $\Delta_\theta$ as it is. Neither holds: in the last steps the buffer has hardly any future in which to matter, so
# $\Delta_m$ is small there, and a different $\bar g$ at each step makes $\Delta_\theta$ itself different. So the forgetful loop does not return a tenth of the scores. It returns
# other scores.
#
# ## 4 · Adam: by which path does influence travel?
#
# Chapter 04 pulled a cotangent back through Adam's update. With $t$ the number of this update,
# $\alpha = \eta/(1-\beta_1^t)$, $c = \sqrt{1-\beta_2^t}$ and $r = \sqrt{v'}/c + \varepsilon$, it found
#
# $$\bar m = \Delta_m' - \frac{\alpha}{r}\,\Delta_\theta', \qquad
#   \bar v = \Delta_v' + \frac{\alpha\, m'}{2 c\, r^2 \sqrt{v'}}\,\Delta_\theta', \qquad
#   \bar g = (1-\beta_1)\,\bar m + 2(1-\beta_2)\, g\, \bar v .$$
#
# Now we sort $\bar g$ by where its terms come from. Each is one path from the gradient of this step to the
# end of training:
#
# $$\bar g \;=\; \underbrace{\Big({-(1-\beta_1)}\frac{\alpha}{r}
#   + (1-\beta_2)\,\frac{\alpha\, g\, m'}{c\, r^2 \sqrt{v'}}\Big)\,\Delta_\theta'}_{\text{parameters, at once}}
#   \;+\; \underbrace{(1-\beta_1)\,\Delta_m'}_{\text{remembered in } m}
#   \;+\; \underbrace{2(1-\beta_2)\,g\,\Delta_v'}_{\text{remembered in } v}.$$


# %%
def adam_update(theta, g, m, v, t, root=torch.sqrt):
    """(θ', m', v'): Adam's update number t."""
    alpha, c = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return theta - alpha * m / (root(v) / c + eps), m, v


# %% tags=["your-turn"]
def adam_paths(g, m, v, t, to_theta, to_m, to_v):
    """The three terms of ḡ for Adam's update number t: {"parameters": …, "m": …, "v": …}.

    g, m and v are those before the update; to_theta, to_m, to_v are Δ'_θ, Δ'_m, Δ'_v. The rates lr,
    beta1, beta2 and eps are the chapter's. Where v' = 0, the fraction with √v' counts as 0.
    """
    alpha, c = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
    _, m_after, v_after = adam_update(0.0, g, m, v, t)
    root = v_after.sqrt()
    r = root / c + eps
    slope = torch.where(root > 0, alpha * m_after / (2 * c * r**2 * root), 0.0)
    at_once = -(1 - beta1) * alpha / r + 2 * (1 - beta2) * g * slope
    return {
        "parameters": at_once * to_theta,
        "m": (1 - beta1) * to_m,
        "v": 2 * (1 - beta2) * g * to_v,
    }


# %%
dice = torch.Generator().manual_seed(0)
g, m, v, *cotangents = torch.randn(6, 1000, dtype=torch.float64, generator=dice)
v = v.square()
g.requires_grad_()
after = adam_update(torch.zeros_like(g), g, m, v, t=7)
for (path, mine), new, cotangent in zip(
    adam_paths(g, m, v, 7, *cotangents).items(), after, cotangents, strict=True
):
    (by_autograd,) = torch.autograd.grad(new, g, cotangent, retain_graph=True)
    agree(f"path through {path}", mine, by_autograd, tolerance=1e-12)

# %% [markdown]
# All three terms are derivatives with respect to the same $g$, so their sizes can be compared. We go back
# through the Adam run and note the size of each term at each step, for the weights of the first layer. Their gradient
# can be read off the states: $g = (m' - \beta_1 m)/(1-\beta_1)$.


# %%
def memory(state):
    """m and v, or their cotangents, of the first layer's weights; 0 before the first update."""
    kept = state.slots["1.1.weight"]
    zero = torch.zeros_like(state.params["1.1.weight"])
    return kept.get("exp_avg", zero), kept.get("exp_avg_sq", zero)


run, true, sizes = runs["Adam"], states["Adam"], {}
cotangent = measure_vjp(run, true[-1], measure)
for before, after in reversed(list(pairwise(true))):
    (m, v), (m_after, _) = memory(before), memory(after)
    g = (m_after - beta1 * m) / (1 - beta1)
    cotangents = cotangent.params["1.1.weight"], *memory(cotangent)
    terms = adam_paths(g, m, v, before.step + 1, *cotangents)
    sizes[before.step] = {path: term.norm().item() for path, term in terms.items()}
    cotangent, _ = step_vjp(run, before, cotangent, run.weights())

# %% tags=["nbval-ignore-output", "hide-input"]
ax = plt.subplots(figsize=(5.2, 3.4))[1]
for path in ("parameters", "m", "v"):
    size = [sizes[t][path] or float("nan") for t in range(60)]  # 0 has no place on a log axis
    ax.plot(size, label=path)
ax.set(yscale="log", ylim=(0.01, 30), xlabel="step", ylabel="size of the term in ḡ")
ax.set_title("Adam: the three paths, step by step")
ax.legend(title="path through", ncols=3, loc="upper right");

# %%
middle = sizes[half]
claim("step 30: m against parameters", middle["m"] / middle["parameters"], at_least=8, at_most=10)
claim("step 30: v against parameters", middle["v"] / middle["parameters"], at_least=2.5)

# %% [markdown]
# In the last step the optimizer state does not matter, since nothing reads it afterwards. Ten steps before the end,
# most of what a batch does to the outcome is already done by being *remembered*. Half-way through the run
# the ratio of $m$ to the parameters is near the 9 of section 3, since $\beta_1 = \mu = 0.9$. In the first steps all terms are larger: $\alpha$ is ten times $\eta$ at the first update, and where the few gradients seen so far were small, $r$ is small, and everything is divided by it.
#
# What happens if we forget $m$, or $v$, or both, or restore the states without the count?

# %%
counted = [without_count(run, s) if s.step else s for s in true]
without = {
    "m": backward(run, true, forgetting("exp_avg")),
    "v": backward(run, true, forgetting("exp_avg_sq")),
    "m and v": backward(run, true, forgetting("exp_avg", "exp_avg_sq")),
    "the count": backward(run, counted),
}
lost = {what: error("Adam", what, scores) for what, scores in without.items()}
claim("Adam: error without m", lost["m"], at_least=1.8)
claim("error without v", lost["v"], at_least=0.45)
claim("error without both", lost["m and v"], at_least=0.6, at_most=0.75)
claim("error with the count forgotten in each state", lost["the count"], at_least=0.7)

# %% [markdown]
# Forgetting $m$ alone is worse than forgetting both. The reason lies in Adam's formula. Multiply all
# gradients of the run by a constant: $m'$ and $\sqrt{v'}$ grow by the same factor and, apart from $\varepsilon$,
# $\theta'$ stays where it is. The derivative of $\theta'$ in that constant is therefore zero at $\varepsilon = 0$:
#
# $$m'\,\frac{\partial \theta'}{\partial m'} + 2v'\,\frac{\partial \theta'}{\partial v'} = 0 ,$$
#
# which the two partial derivatives $-\alpha/r$ and $\alpha m'/(2cr^2\sqrt{v'})$ confirm. In this direction the paths
# through $m$ and $v$ cancel, and dropping $m$ alone leaves the path through $v$ uncancelled.
#
# ## 5 · Where no gradient has been
#
# The formulas above divide by $\sqrt{v'}$, and there are parameters whose gradient has always been exactly zero. The
# commonest example is the embedding of a word that no batch has contained. Here is a text of twelve
# sentences, half about the weather and half about cooking, with four more to test on.

# %%
weather = [
    "rain fell on the hills all night",
    "snow fell and the wind rose",
    "the wind drove rain over the sea",
    "fog lay on the sea all morning",
    "the sun rose over the snow",
    "clouds and rain came over the hills",
    "thunder and rain all night",
    "hail fell on the sea",
]
cooking = [
    "stir the soup and add salt",
    "bake the bread all morning",
    "add butter and salt to the bread",
    "boil the rice with salt",
    "serve the soup with bread and butter",
    "chop an onion and fry the rice",
    "fry the fish with butter",
    "bake a cake and serve it",
]
text, test = weather[:6] + cooking[:6], weather[6:] + cooking[6:]
vocabulary = sorted({word for line in text + test for word in line.split()})

# %% [markdown]
# A sentence becomes a vector of word counts. The model gives each word an embedding of two numbers, one for each
# topic, and adds up those of a sentence: it multiplies the counts by the table of all embeddings.


# %%
def counts(lines):
    rows = [[line.split().count(word) for word in vocabulary] for line in lines]
    return torch.tensor(rows, dtype=torch.float64, device=device)


bags, bags_test = counts(text), counts(test)
topic, topic_test = (torch.tensor([0, 1], device=device).repeat_interleave(k) for k in (6, 2))
torch.manual_seed(0)
table = nn.Linear(len(vocabulary), 2, bias=False).to(device).double()
shuffled = magic.batches(len(text), size=4, epochs=10, seed=0)
optimizer = torch.optim.Adam(table.parameters(), lr=lr, eps=eps)
run = magic.Run(table, optimizer, (bags, topic), loss, shuffled)
v = run.train(progress=False).slots["weight"]["exp_avg_sq"]
never = bags.sum(0) == 0
print("in no training sentence:", [vocabulary[j] for j in never.nonzero()[:, 0]])
claim("their v is exactly 0, and no other word's", ((v == 0).all(0) == never).all().item())

# %% [markdown]
# We differentiate these 30 steps by autograd, one graph over the whole run, through Adam's formula exactly as it
# stands. Only the square root can be exchanged.


# %%
def unrolled(root):
    """(K, n): the scores, by one autograd graph over the whole run."""
    w = torch.ones(len(text), dtype=torch.float64, device=device, requires_grad=True)
    theta = table.weight.detach().clone().requires_grad_()
    m = v = torch.zeros_like(theta)
    for t, batch in enumerate(shuffled.to(device), start=1):
        losses = F.cross_entropy(bags[batch] @ theta.T, topic[batch], reduction="none")
        (g,) = torch.autograd.grad((w[batch] * losses).mean(), theta, create_graph=True)
        theta, m, v = adam_update(theta, g, m, v, t, root)
    outputs = F.cross_entropy(bags_test @ theta.T, topic_test, reduction="none")
    return torch.stack([torch.autograd.grad(out, w, retain_graph=True)[0] for out in outputs])


# %% tags=["your-turn"]
def root_with_slope_zero(v):
    """√v, whose derivative by autograd is 0 where v = 0, and 1/(2√v) elsewhere.

    `torch.where` differentiates both of its branches, and 0 · ∞ is NaN: the root must not be taken
    of 0 in either of them.
    """
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


# %%
naive, safe = unrolled(torch.sqrt), unrolled(root_with_slope_zero)
claim("plain root: share of scores that are NaN", naive.isnan().double().mean(), at_least=1)
scores = magic.attribute(run, lambda model: loss(model, bags_test, topic_test), progress=False)
agree("slope 0 at 0, and magic", safe, scores.values, tolerance=1e-9)

# %% [markdown]
# The slope of $\sqrt{v}$ at 0 is infinite. The chain rule multiplies it by the numerator $m' = 0$, and in floating point
# $0 \cdot \infty$ is NaN. The NaNs first stand in the columns of words that never occur. The next product with
# the counts multiplies them by zero, which is NaN again, and adds the result to everything else.
#
# Why is 0 the *right* slope, and not just a harmless one? Look at the update instead of the root. Where $m' = 0$, the
# update leaves $\theta$ where it is, whatever $v'$ is, so $\partial\theta'/\partial v' = 0$. And a gradient that
# moves $v'$ moves $m'$, too. From $m = v = 0$, the first update is
#
# $$\theta'(g) = \theta - \eta\,\frac{g}{|g| + \varepsilon}, \qquad
#   \frac{\partial \theta'}{\partial g}(0) = -\frac{\eta}{\varepsilon} .$$
#
# From afar this function seems to jump at 0, but on a scale finer than $\varepsilon$ it is smooth. Its slope at 0 is the
# one that the numerator gives alone: the denominator changes by $|g|$, and times the numerator $g$ this is of second
# order. A finite difference much narrower than $\varepsilon$ confirms it.

# %%
zero, h = torch.zeros(1, dtype=torch.float64), 1e-12
up, down = (adam_update(zero, g, zero, zero, t=1)[0] for g in (zero + h, zero - h))
terms = adam_paths(zero, zero, zero, 1, to_theta=zero + 1, to_m=zero, to_v=zero)
agree("∂θ'/∂g at g = 0", terms["parameters"], (up - down) / (2 * h), tolerance=1e-6)

# %% [markdown]
# So the derivative is exact. It is also local, and Adam makes that matter. A word that occurs in **one** training
# sentence gets its gradients from that sentence alone, and Adam divides them by their own size. The data
# weight of the sentence cancels.

# %%
word = vocabulary.index("fog")
owner = bags[:, word].nonzero().item()


def moved_at(weight):
    weights = run.weights()
    weights[owner] = weight
    end = run.train(weights, progress=False)
    return (end.params["weight"] - run.initial.params["weight"])[:, word].norm().item()


way = {weight: moved_at(weight) for weight in (1.0, 0.5, 0.1, 0.0)}
claim('"fog" moves at weight 0.5, against weight 1', way[0.5] / way[1.0], at_least=0.99)
claim("at weight 0.1", way[0.1] / way[1.0], at_least=0.95)
claim("at weight 0", way[0.0] / way[1.0], at_most=0)

# %% [markdown]
# Until the weight is nearly zero the word moves as before; at zero it does not move at all. No slope at
# $w = 1$ can predict that. A larger $\varepsilon$ rounds this corner off, and so does the constant `eps_root` under the
# root, which exercise 05.2 looks at.
#
# ## 6 · BatchNorm: a path that only the end reads
#
# In training, a BatchNorm layer normalises its inputs $h$ with the batch's own mean and variance. On the side it keeps
# a running mean $R$, and a running variance in the same way:
#
# $$R' = (1-\kappa)\,R + \kappa\;\text{mean}(h(\theta)), \qquad \kappa = 0.1 .$$
#
# No training step reads $R$. The finished model, in eval mode, does, and so the measured loss depends on the
# data weights along one more path, $w \to \theta_t \to R_T \to \varphi$. It counts for about the last
# $1/\kappa = 10$ steps, though through $\theta_t$ each of these batches depends on the whole training before it. On the way back it begins in the first cotangent, with $\partial\varphi/\partial R_T$.


# %%
def without_statistics(cotangent):
    return dataclasses.replace(cotangent, buffers={})


run, true = runs["BatchNorm"], states["BatchNorm"]
first = measure_vjp(run, true[-1], measure)
print({name: tuple(d.shape) for name, d in first.buffers.items()})
wrong = backward(run, true, without_statistics)
lost = error("BatchNorm", "running statistics", wrong)
claim("error without the running statistics", lost, at_least=0.75)

# %% [markdown]
# This path is easily lost. PyTorch's operation updates the statistics in place, outside the graph that autograd keeps, so
# double backward never sees them. `magic` writes the layer out where it differentiates, and trains with PyTorch's
# own.
#
# ## 7 · Dropout: nothing to remember
#
# A generator of random numbers is a memory, too. Its state takes some five kilobytes on the CPU, changes with every
# draw, and belongs neither to the model nor to the optimizer. `magic` does not store it. It computes the seed
# of step $t$ from (seed, $t$), so what was drawn before does not matter.

# %%
run, true = runs["dropout"], states["dropout"]
ends = []
for past in (1, 2):
    torch.manual_seed(past)
    ends.append(run.step(true[40], run.weights()).fingerprint())
claim("whatever was drawn before: the same bits", ends[0] == ends[1])
reseeded = run_of(dropped, seed=1, **adam)
lost = error("dropout", "its random numbers", backward(reseeded, true))
claim("error with the right states and other dropout masks", lost, at_least=0.4)

# %% [markdown]
# The last line is what happens to a replay that restores parameters, buffers and optimizer state, and forgets the
# generator.
#
# ## 8 · Everything that we left out
#
# Each orange dot is one thing forgotten on the way back, or in the states and random numbers that it was given; each blue dot is a run with nothing forgotten, compared with
# finite differences.

# %% tags=["nbval-ignore-output", "hide-input"]
shown = sorted(errors.items(), key=lambda item: (item[0][1] != "nothing", item[1]))
ax = plt.subplots(figsize=(5.6, 4.2))[1]
ax.axvline(1, color=plot.NEUTRAL, linewidth=1)
for row, ((_, what), value) in enumerate(shown):
    color = plot.HELPFUL if what == "nothing" else plot.HARMFUL
    ax.scatter(value, row, s=60, color=color, zorder=3)
    if what != "nothing":
        ax.text(0.08, row, f"{value:.0%}", ha="right", va="center", backgroundcolor="white")
ax.set_yticks(range(len(shown)), [f"{name}: {what}" for (name, what), _ in shown])
ax.set(xscale="log", xlim=(1e-12, 20), ylim=(len(shown) - 0.3, -0.7))
ax.set_xlabel("relative error of the scores")
ax.set_title("Left out of the derivative");

# %% [markdown]
# None of the wrong scores raised an error, and all of them look like scores; only the NaN of section 5 shows itself. Two
# rules follow, and `magic` keeps both. The state is *one value* that holds all the memory. And before a derivative is
# believed, steps of the run are compared with finite differences.
#
# ## What we ignored
#
# - **Memory that is not declared.** A layer that counts its calls in a plain Python attribute remembers something
#   that is neither parameter, buffer nor optimizer state. Exercise 05.5 repairs one.
# - **Other memories.** A moving average of the parameters, gradients accumulated over several steps, a loss
#   scaler, the position of a data loader: each would be a part of the state. Here the batches are fixed in advance, so
#   $t$ alone gives the position.
# - **Other runs.** Each percentage belongs to its run of 60 steps. Another model, rate or length gives another, as
#   exercise 05.6 shows.
# - **The size of the memory.** With Adam a state is three times as large as the parameters, and going back
#   needs the states of all steps. The next chapter is about keeping only a few of them.
#
# ## Exercises
#
# The first five have a checker: write the answer, uncomment the last line of the cell and run it. `check` is
# imported once, in the first of these cells.
#
# **05.1 · ●○○ · 5 min.** A run is resumed after `done` updates of Adam with the right $m$ and $v$, and with the count at 0.
# With $\varepsilon = 0$, its next update is the true one times a number. Which number? What is it for `done` = 30, and
# what is it after very many updates?
#
# <details><summary>Hint</summary>The update is $\alpha\, c\, m'/\sqrt{v'}$, and $m'$ and $v'$ do not depend on the count.
# What are $\alpha$ and $c$ with the right count of this update, and with the wrong one?</details>


# %%
def stretch(done, beta1, beta2):
    """The first update after resuming with the count at 0, divided by the true one; ε = 0."""
    ...


# from magic.book import check
# check("05.1", stretch)

# %% [markdown]
# **05.2 · ●●○ · 10 min.** To smooth Adam, Engstrom et al. (2025) add a constant $\rho$, `eps_root`, under the
# root: $r = \sqrt{v'/c^2 + \rho} + \varepsilon$. A word has not occurred in the first `done` updates, so its $m$ and $v$ are
# exactly 0. What is $\partial\theta'/\partial g$ of the next update at $g = 0$?
#
# <details><summary>Hint</summary>As in section 5, only the numerator counts. But this is not the first
# update, so $\alpha = \eta/(1-\beta_1^t)$ no longer cancels the factor $1 - \beta_1$.</details>


# %%
def slope_at_zero(done, lr, beta1, beta2, eps, eps_root):
    """∂θ'/∂g at g = 0 of the update after `done` updates with gradient 0."""
    ...


# check("05.2", slope_at_zero)

# %% [markdown]
# **05.3 · ●●○ · 15 min.** Chapter 04 pulled back through AdamW, whose weight decay is *decoupled*: it shrinks
# $\theta$ by $1 - \eta\lambda$ and leaves $m$ and $v$ alone. The weight decay of `torch.optim.Adam` is *coupled*: it adds
# $\lambda\theta$ to the gradient, and so goes into the memory. Write the pull through this update. The gradient $g$ is an
# input like the others here, so no Hessian occurs.
#
# <details><summary>Hint</summary>Call $\tilde g = g + \lambda\theta$. The update reads $\tilde g$ wherever Adam reads
# $g$. Find its cotangent first; where does it go from there?</details>


# %%
def pull_coupled(theta, g, m, v, t, to_theta, to_m, to_v, lr, beta1, beta2, eps, decay):
    """(ḡ, Δ_θ, Δ_m, Δ_v) of Adam's update number t with coupled weight decay."""
    ...


# check("05.3", pull_coupled)

# %% [markdown]
# **05.4 · ●●○ · 15 min.** BatchNorm's running statistics are part of the state. For inputs $h$ of shape (B, C) the new
# ones are $1-\kappa$ times the old ones plus $\kappa$ times the batch's mean and variance, where this variance
# divides by $B - 1$. Given the cotangents of the new ones, find those of $h$ and of the old ones.
#
# <details><summary>Hint</summary>The derivative of $\sum_i (h_i - \text{mean})^2$ in $h_j$ is $2(h_j - \text{mean})$:
# the mean moves, too, but the deviations from it add up to zero.</details>


# %%
def pull_statistics(h, to_mean, to_var, kappa):
    """(Δ of h, Δ of the old mean, Δ of the old variance): shapes (B, C), (C,), (C,)."""
    ...


# check("05.4", pull_statistics)

# %% [markdown]
# **05.5 · ●●○ · 10 min.** This layer multiplies its input by a factor that grows from 0 to 1 over its first 20 calls.
# `magic.Run` refuses it (try it): the number of calls is a memory that no state contains. Write `MyWarmUp`, with the
# same output in each training step. Its memory must be part of the state, and in eval mode it multiplies by the factor reached so far, and does not count.
#
# <details><summary>Hint</summary>`self.register_buffer("calls", torch.zeros((), dtype=torch.int64))`. Buffers are
# part of the state; PyTorch expects `self.calls += 1` to change them in place. `self.training` says which mode
# it is.</details>


# %%
class WarmUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * min(1.0, self.calls / 20)


# check("05.5", MyWarmUp)

# %% [markdown]
# **05.6 · ●●● · 20 min.** Train the BatchNorm run for four times as many epochs, at its constant rate and with a rate
# that falls to zero (`torch.optim.lr_scheduler.CosineAnnealingLR`, passed as `scheduler=` to `magic.Run`). How does the error
# of leaving out the running statistics change? Why does it not vanish when the training settles?
#
# <details><summary>Hint</summary>Compare with the scores of `backward`; no finite differences are needed. The
# statistics are a function of the parameters, and these depend on the data weights even where they
# hardly move from step to step.</details>
#
# **Next:** [06 · Remember, forget, replay](06_remember_forget_replay.ipynb)
