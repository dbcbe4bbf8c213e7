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
# **Question.** What must a training state contain? And what goes wrong when something is left out?
#
# A checkpoint of the parameters is enough to *use* a model. It is not enough to go on training it, and not
# enough to differentiate its training: optimizers remember, and so do some layers. What they remember moves
# with the data weights like everything else, and a derivative that forgets it is wrong, without any error.
#
# | word | in code | meaning |
# |---|---|---|
# | state $s_t$ | `State(params, buffers, slots, step)` | everything that step $t$ reads, besides its batch and the weights |
# | slots | `state.slots` | what the optimizer remembers of each parameter |
# | cotangent $\Delta_t$ | `cotangent` | $\partial\varphi/\partial s_t$, for all $K$ measured outputs |
# | scores $\tau$ | `scores` | $\partial\varphi_k(f(w))/\partial w_i$ |
#
# We leave out one thing at a time, first when a state is restored, then in the derivative, and compare each
# time with the truth. Adam's update is differentiated by hand on the way.
# About twenty-five minutes to read, one to run; all of it in float64.

# %%
import dataclasses

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim
from magic.engine.adjoint import measure_vjp, step_vjp

device = "cuda" if torch.cuda.is_available() else "cpu"
plot.style()
x, y, x_test, y_test = (part.to(device) for part in data.digits(train=300))
x, x_test = x.double(), x_test.double()
order = magic.batches(len(x), size=50, epochs=10, seed=0)

# %% [markdown]
# ## 1 · Who remembers what
#
# | | remembers from step to step | where it lives | has a derivative |
# |---|---|---|---|
# | SGD with momentum | $b$, a sum of past gradients | slots | yes |
# | Adam | $m$ and $v$, averages of past gradients and of their squares | slots | yes |
# | | $t$, how many steps it has done | slots | no, an integer |
# | BatchNorm | averages of the batches' means and variances | buffers | yes |
# | | how many batches it has seen | buffers | no, an integer |
# | dropout | nothing, if its random numbers are a function of $(\text{seed}, t)$ | | |
# | learning-rate schedule | nothing, if the rate is a function of $t$ | | |
#
# Four runs, the same 300 digits in the same 60 batches; each has another memory.


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


def normed(**options):
    norm = nn.BatchNorm1d(32, **options)
    return [nn.Linear(64, 32, bias=False), norm, nn.GELU(), nn.Linear(32, 10)]


def dropped():
    return [nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10)]


# %%
RATE, EPS = 3e-3, 1e-4
momentum, adam = (
    {"lr": 0.05, "momentum": 0.9},
    {"optimizer": torch.optim.Adam, "lr": RATE, "eps": EPS},
)
runs = {
    "momentum": run_of(plain, **momentum),
    "Adam": run_of(plain, **adam),
    "BatchNorm": run_of(normed, **momentum),
    "dropout": run_of(dropped, **adam),
}

# %% [markdown]
# (PyTorch's default is $\varepsilon = 10^{-8}$, and Adam's first steps are then nearly the *sign* of the gradient.
# That has a derivative, but where a gradient is near 0 it holds for very small changes only, smaller than a finite
# difference can resolve. Section 6 returns to it.)
#
# `state.flatten()` gives every tensor of a state a name. Here is one with all memories in it, BatchNorm's and
# Adam's; tensors of one role are counted together.


# %%
def role(name):
    kind, *rest = name.split("/")
    return kind if kind == "params" else f"{kind}/…{rest[-1].rpartition('.')[2]}"


run = run_of(normed, **adam)
state = run.step(run.initial, run.weights())
flat = state.flatten()
rows = [
    (role(name), str(v.dtype), 1, v.numel(), v.numel() * v.element_size())
    for name, v in flat.items()
]
table = pd.DataFrame(rows, columns=["role", "dtype", "tensors", "numbers", "bytes"])
table.groupby(["role", "dtype"], sort=False).sum()

# %%
print(*[name for name in flat if "1.weight" in name], sep="\n")
parameters = sum(v.nbytes for v in state.params.values())
claim(
    "the state takes more than three times the bytes of its parameters",
    3 < state.nbytes / parameters < 3.1,
)

# %% [markdown]
# ## 2 · Restoring half a state
#
# Stop after 30 of the 60 steps. Put the state back, once whole and once with a part missing, and train on: the
# batches are the same, so any difference comes from what is missing. Missing slots mean what they mean in a
# loop that loads the parameters and makes a new optimizer: it begins with none. A missing count means that
# $m$ and $v$ were restored and the number of steps was not.


# %%
def states_of(run, state=None, weights=None):
    """This state (or the first one) and all that follow."""
    states, weights = [state or run.initial], run.weights(weights)
    with magic.determinism.fix():
        while states[-1].step < run.steps:
            states.append(run.step(states[-1], weights))
    return states


def without_slots(run, state):
    return magic.State(state.params, state.buffers, run.initial.slots, state.step)


def without_count(run, state):
    zero = torch.zeros((), dtype=torch.int64)
    slots = {
        name: (memory | {"step": zero} if memory else memory)
        for name, memory in state.slots.items()
    }
    return magic.State(state.params, state.buffers, slots, state.step)


# %%
states = {name: states_of(run) for name, run in runs.items()}
HALF = 30


def resumed(name, change):
    """How far from the uninterrupted run, in units of the way that it still had to go."""
    run, true = (
        runs[name],
        [torch.cat([p.flatten() for p in s.params.values()]) for s in states[name][HALF:]],
    )
    again = states_of(run, change(run, states[name][HALF]))
    gaps = [
        torch.cat([p.flatten() for p in s.params.values()]) - p
        for s, p in zip(again, true, strict=True)
    ]
    way = (true[-1] - true[0]).norm()
    right = (run.model(again[-1])(x_test).argmax(1) == y_test).double().mean().item()
    return [(gap.norm() / way).item() for gap in gaps], right, again[-1].fingerprint()


# %%
found = {
    "momentum, buffer missing": resumed("momentum", without_slots),
    "Adam, m, v and count missing": resumed("Adam", without_slots),
    "Adam, only the count missing": resumed("Adam", without_count),
}
gaps = {name: gaps for name, (gaps, *_) in found.items()}

# %% tags=["nbval-ignore-output"]
frame = pd.DataFrame(gaps, index=range(HALF, 61)).melt(
    ignore_index=False, var_name="", value_name="gap"
)
ax = plt.subplots(figsize=(6, 3.2))[1]
sns.lineplot(
    frame.reset_index(), x="index", y="gap", hue="", palette="colorblind", errorbar=None, ax=ax
)
ax.set(xlabel="step", ylabel="distance / way still to go", ylim=(0, 0.7))
ax.set_title("Resumed at step 30 with a part of the state missing")
ax.legend(title=None, loc="upper left");

# %%
for name in ("momentum", "Adam"):
    *_, end = resumed(name, lambda run, state: state)
    claim(f"{name}, the whole state restored: the same bits", end == states[name][-1].fingerprint())
far = {name: gap[-1] for name, gap in gaps.items()}
claim(
    "without the momentum buffer: off by more than 30 % of the way",
    far["momentum, buffer missing"] > 0.3,
)
claim("without m, v and the count: by more than 20 %", far["Adam, m, v and count missing"] > 0.2)
claim("without the count alone: by more than 10 %", far["Adam, only the count missing"] > 0.1)
claim(
    "and all three read over 90 % of the test digits right",
    min(right for _, right, _ in found.values()) > 0.9,
)

# %% [markdown]
# By accuracy nobody would notice. But they are other networks: what was resumed is not the run that was
# interrupted. A replay that restored its states so would differentiate a training that never took place.
#
# The count is an integer. It does not move when the weights do, so it has no derivative; but the others depend
# on it, so it must be restored. BatchNorm has one, too. With `momentum=None` it averages over all batches
# seen, so batch $k$ counts $1/k$, and a forgotten $k$ throws the past away:

# %%
run = run_of(lambda: normed(momentum=None), **momentum)
true = states_of(run)
half = true[HALF]
forgotten = half.buffers | {
    "2.num_batches_tracked": torch.zeros_like(half.buffers["2.num_batches_tracked"])
}
again = states_of(run, magic.State(half.params, forgotten, half.slots, HALF))[-1]
gap = again.buffers["2.running_var"] - true[-1].buffers["2.running_var"]
same = all(torch.equal(again.params[k], p) for k, p in true[-1].params.items())
claim("the parameters end in the same bits", same)
claim(
    "the running variance is off by over 20 %",
    gap.norm() > 0.2 * true[-1].buffers["2.running_var"].norm(),
)

# %% [markdown]
# The parameters are untouched, because training mode does not read running statistics. The model in eval mode
# does, and answers differently. A check on the parameters alone would have found nothing.
#
# ## 3 · The derivative needs the memory, too
#
# Let the state have two parts, $s = (p, b)$: parameters and the momentum buffer. One step of SGD with rate
# $\eta$ and momentum $\mu$ is
#
# $$b' = \mu b + g(p, w), \qquad p' = p - \eta b'.$$
#
# The cotangents come back by the chain rule, which sums over **all** paths. Write $\Delta_p', \Delta_b'$ for
# $\partial\varphi/\partial p'$ and $\partial\varphi/\partial b'$. What the gradient of this step did to the outcome is
#
# $$\bar g = \Delta_b' - \eta \Delta_p', \qquad \Delta_b = \mu \bar g, \qquad
# \Delta_p = \Delta_p' + \Big(\frac{\partial g}{\partial p}\Big)^{\!\top} \bar g, \qquad
# \frac{\partial\varphi}{\partial w_i} \mathrel{+}= \Big(\frac{\partial g}{\partial w_i}\Big)^{\!\top} \bar g .$$
#
# Two paths lead from $g$ to the end: through the parameters at once ($-\eta\Delta_p'$), and through the buffer,
# later. How much is the second one? Where $\Delta_p$ changes slowly, $\Delta_b = \mu(\Delta_b - \eta\Delta_p)$, so
#
# $$\Delta_b = -\frac{\mu}{1-\mu}\,\eta\Delta_p :$$
#
# with $\mu = 0.9$ nine times the first. A derivative that treats the buffer as a constant keeps a tenth of
# $\bar g$.
#
# To try that, here is the loop that goes back, with a place to forget something. `step_vjp` is `magic`'s
# adjoint of one step; `forget` changes the cotangent before each pull, `given` the state the step is taken at.


# %%
def backward(name, forget=lambda cotangent: cotangent, given=lambda state: state, by=None):
    """(K, n): the scores, with something forgotten on the way back."""
    run = runs[name]
    weights = run.weights()
    with magic.determinism.fix():
        cotangent = measure_vjp(run, states[name][-1], measure)
        scores = torch.zeros(8, len(x), dtype=x.dtype, device=device)
        for state in reversed(states[name][:-1]):
            cotangent, pulled = step_vjp(by or run, given(state), forget(cotangent), weights)
            scores.index_add_(1, run.batches[state.step].to(device), pulled)
    return scores


def forget_slots(*forgotten):
    def forget(cotangent):
        slots = {
            name: {
                slot: torch.zeros_like(d) if slot in forgotten else d for slot, d in memory.items()
            }
            for name, memory in cotangent.slots.items()
        }
        return dataclasses.replace(cotangent, slots=slots)

    return forget


# %% [markdown]
# The truth does not use derivatives at all: five-point finite differences. For twelve training images the
# weight is moved up and down a little, the whole training is repeated, and the outputs are measured. Error means
# $\lVert \tau - \tau_{\text{fd}} \rVert / \lVert \tau_{\text{fd}} \rVert$ over 8 outputs and 12 images.

# %%
examples = list(range(0, 300, 25))


def outputs_at(run, i, moved_by):
    weights = run.weights()
    weights[i] += moved_by
    return measure(run.model(run.train(weights, progress=False))).detach()


def finite_differences(run, h=1e-4):
    columns = []
    for i in examples:
        (a, b), (c, d) = [[outputs_at(run, i, k * h), outputs_at(run, i, -k * h)] for k in (1, 2)]
        columns.append((8 * (a - b) - (c - d)) / (12 * h))
    return torch.stack(columns, 1)


truth, errors = {name: finite_differences(run) for name, run in runs.items()}, {}


def error(name, left_out, scores):
    errors[name, left_out] = (
        (scores[:, examples] - truth[name]).norm() / truth[name].norm()
    ).item()
    return errors[name, left_out]


# %%
for name in runs:
    claim(
        f"{name}: with nothing left out, exact to 1e-7",
        error(name, "nothing", backward(name)) < 1e-7,
    )
by_magic = magic.attribute(runs["Adam"], measure, progress=False).values
gap = (backward("Adam") - by_magic).norm() / by_magic.norm()
claim("the loop gives the scores of magic.attribute, to 1e-10", gap < 1e-10)
lost = error("momentum", "the buffer b", backward("momentum", forget_slots("momentum_buffer")))
claim(
    "momentum without the buffer's cotangent: the scores are wrong by over 50 %", 0.5 < lost < 0.9
)

# %% [markdown]
# Less than the 90 % of the estimate, which assumed that $\Delta_p$ changes slowly. In the last steps of a run the
# buffer has hardly any future in which to matter; and with another $\bar g$ in each step, $\Delta_p$ itself comes back
# as another one. The forgetful loop does not give a tenth of the scores, it gives other scores.
#
# ## 4 · Adam, as diagonals
#
# Adam has more memory, but its update is elementwise: output element $j$ depends on input element $j$ only.
# So its Jacobian is a handful of diagonals, each as large as the parameters. With $t$ the number of this step,
# $c_1 = 1 - \beta_1^t$ and $c_2 = \sqrt{1 - \beta_2^t}$:
#
# $$m' = \beta_1 m + (1-\beta_1) g, \quad v' = \beta_2 v + (1-\beta_2) g^2, \quad
# r = \frac{\sqrt{v'}}{c_2} + \varepsilon, \quad p' = p - \frac{\eta}{c_1}\frac{m'}{r}.$$
#
# First the two that matter, with respect to the *new* memory:
#
# $$A := \frac{\partial p'}{\partial m'} = -\frac{\eta}{c_1 r}, \qquad
# B := \frac{\partial p'}{\partial v'} = \frac{\eta\, m'}{c_1 r^2} \cdot \frac{1}{2 c_2 \sqrt{v'}} .$$
#
# The others are products of these with constants:
#
# $$\frac{\partial p'}{\partial m} = \beta_1 A, \qquad \frac{\partial p'}{\partial v} = \beta_2 B, \qquad
# \frac{\partial p'}{\partial g} = (1-\beta_1) A + 2(1-\beta_2)\, g B .$$


# %%
B1, B2 = 0.9, 0.999


def adam_update(p, g, m, v, t, root=torch.sqrt):
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    return p - RATE / (1 - B1**t) * m / (root(v) / (1 - B2**t) ** 0.5 + EPS), m, v


def diagonals(g, m, v, t):
    """∂p'/∂m' and ∂p'/∂v', and from them ∂p'/∂g, ∂p'/∂m, ∂p'/∂v: each as large as p."""
    c1, c2 = 1 - B1**t, (1 - B2**t) ** 0.5
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    r = v.sqrt() / c2 + EPS
    A = -RATE / (c1 * r)
    B = torch.where(v > 0, RATE * m / (2 * c1 * c2 * r**2 * v.sqrt()), 0.0)  # at v = 0: section 6
    return {"m'": A, "v'": B, "g": (1 - B1) * A + 2 * (1 - B2) * g * B, "m": B1 * A, "v": B2 * B}


# %%
g, m, v, p = torch.randn(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
inputs = {"g": g, "m": m, "v": v.square()}
leaves = [value.clone().requires_grad_() for value in inputs.values()]
new, _, _ = adam_update(p, *leaves, t=7)
mine = diagonals(**inputs, t=7)
for name, reference in zip(inputs, torch.autograd.grad(new.sum(), leaves), strict=True):
    agree(f"∂p'/∂{name}", mine[name], reference, 1e-12)

# %% [markdown]
# In the run itself: the cotangent that `step_vjp` returns for $m$ and $v$ must be
# $\Delta_m = \beta_1 (\Delta_m' + A\,\Delta_p')$ and $\Delta_v = \beta_2(\Delta_v' + B\,\Delta_p')$.


# %%
def gradients(run, state):
    """The gradient that this state's step uses, by name."""
    params = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    weight = run.weights()[run.batches[state.step].to(device)]
    return run.gradient(params, state.buffers, weight, state.step).by_name


run, state, after = runs["Adam"], *states["Adam"][40:42]
dice = torch.Generator().manual_seed(1)
final = measure_vjp(run, states["Adam"][-1], measure)  # for its shapes
cotangent = final.map(lambda d: torch.randn(d.shape, dtype=d.dtype, generator=dice).to(device))
before, _ = step_vjp(run, state, cotangent, run.weights())
key = "1.1.weight"
m, v = state.slots[key]["exp_avg"], state.slots[key]["exp_avg_sq"]
d = diagonals(gradients(run, state)[key], m, v, t=41)
to_p, slots = cotangent.params[key], cotangent.slots[key]
agree("∂φ/∂m", before.slots[key]["exp_avg"], B1 * (slots["exp_avg"] + d["m'"] * to_p), 1e-10)
agree("∂φ/∂v", before.slots[key]["exp_avg_sq"], B2 * (slots["exp_avg_sq"] + d["v'"] * to_p), 1e-10)

# %% [markdown]
# So going back through Adam costs a few multiplications per parameter. What is expensive in a step's adjoint is
# the second derivative of the model, not the optimizer.
#
# ## 5 · Which way does the influence travel?
#
# The cotangent of the gradient is a sum with one term for each path, all in the same unit,
# $\partial\varphi/\partial g$:
#
# $$\bar g \;=\; \underbrace{\frac{\partial p'}{\partial g}\,\Delta_p'}_{\text{parameters, at once}}
# + \underbrace{(1-\beta_1)\,\Delta_m'}_{\text{remembered in } m}
# + \underbrace{2(1-\beta_2)\,g\,\Delta_v'}_{\text{remembered in } v}.$$
#
# We go back through two runs and note the size of each term at each step.


# %%
def parts(name, state, cotangent):
    """The terms of ∂φ/∂g, by path, for one parameter after the other."""
    for key, g in gradients(runs[name], state).items():
        to_p, to, memory = cotangent.params[key], cotangent.slots[key], state.slots[key]
        if name == "momentum":
            yield {"parameters": -0.05 * to_p, "slot b": to["momentum_buffer"]}
        else:
            m, v = (memory.get(slot, torch.zeros_like(g)) for slot in ("exp_avg", "exp_avg_sq"))
            yield {
                "parameters": diagonals(g, m, v, state.step + 1)["g"] * to_p,
                "slot m": (1 - B1) * to["exp_avg"],
                "slot v": 2 * (1 - B2) * g * to["exp_avg_sq"],
            }


# %%
def path_sizes(name):
    run, rows = runs[name], []
    cotangent = measure_vjp(run, states[name][-1], measure)
    for state in reversed(states[name][:-1]):
        terms = [
            {k: d.square().sum().item() for k, d in part.items()}
            for part in parts(name, state, cotangent)
        ]
        rows.append(pd.DataFrame(terms).sum().pow(0.5).rename(state.step))
        cotangent, _ = step_vjp(run, state, cotangent, run.weights())
    return pd.DataFrame(rows[::-1]).rename_axis("step")


with magic.determinism.fix():
    sizes = {name: path_sizes(name) for name in ("momentum", "Adam")}

# %% tags=["nbval-ignore-output"]
blue, orange, green = sns.color_palette("colorblind")[:3]
colors = {"parameters": blue, "slot b": orange, "slot m": orange, "slot v": green}
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
for ax, (name, size) in zip(axes, sizes.items(), strict=True):
    for path in size:
        shown = size[path].where(size[path] > 0)
        ax.plot(shown.index, shown, color=colors[path], label=path)
    ax.set(yscale="log", ylim=(0.01, 30), xlabel="step", title=name)
    ax.legend(loc="upper right")
axes[0].set_ylabel("size of the term in ∂φ/∂g");

# %%
last, middle = ({name: size.loc[t] for name, size in sizes.items()} for t in (59, 30))
claim(
    "in the last step nothing goes through the slots",
    all(s.drop("parameters").sum() == 0 for s in last.values()),
)
ratio = {name: s.drop("parameters").iloc[0] / s["parameters"] for name, s in middle.items()}
claim(
    "half-way, more than 6 times as much goes through b as through the parameters",
    6 < ratio["momentum"] < 9,
)
claim("and through Adam's m more than 6 times as much", 6 < ratio["Adam"] < 12)
claim(
    "through v, too, more than through the parameters",
    middle["Adam"]["slot v"] > middle["Adam"]["parameters"],
)

# %% [markdown]
# In the last step the slots do not matter, since nobody reads them afterwards. Ten steps earlier most of what a
# batch does to the outcome is done by being *remembered*, and half-way the ratio is near the 9 of section 3. In Adam's
# first steps all terms are larger: $r$ is small where the few gradients seen so far were small, down to
# $\varepsilon$, and everything is divided by it.
#
# What if we forget one, or both?

# %%
without_m = error("Adam", "m", backward("Adam", forget_slots("exp_avg")))
without_v = error("Adam", "v", backward("Adam", forget_slots("exp_avg_sq")))
without_both = error("Adam", "m and v", backward("Adam", forget_slots("exp_avg", "exp_avg_sq")))
count = error(
    "Adam", "the count t", backward("Adam", given=lambda state: without_count(runs["Adam"], state))
)
claim("without m: wrong by more than 100 %", without_m > 1)
claim("without v: by more than 30 %", without_v > 0.3)
claim(
    "without both: by more than 30 %, and less than without m alone", 0.3 < without_both < without_m
)
claim(
    "with both, but the step count of the replayed states forgotten: by more than 30 %", count > 0.3
)

# %% tags=["nbval-ignore-output"]
print(
    {
        what: f"{value:.0%}"
        for (name, what), value in errors.items()
        if name == "Adam" and what != "nothing"
    }
)

# %% [markdown]
# Forgetting $m$ alone is worse than forgetting everything. The reason is in the formula: multiply all
# gradients by a constant, and $m'$ and $\sqrt{v'}$ grow alike, so the update does not change (but for
# $\varepsilon$). By Euler's rule for such functions
#
# $$m'\,\frac{\partial p'}{\partial m'} + 2v'\,\frac{\partial p'}{\partial v'} = 0 \quad\text{at } \varepsilon = 0 :$$
#
# the two paths largely cancel, and who drops one of them is left with the uncancelled other. With $\varepsilon$, the
# fraction $\varepsilon / r$ of the first term remains:

# %%
m2, v2 = after.slots[key]["exp_avg"], after.slots[key]["exp_avg_sq"]
by_m, by_v = m2 * d["m'"], 2 * v2 * d["v'"]
r = v2.sqrt() / (1 - B2**41) ** 0.5 + EPS
agree("what does not cancel", by_m + by_v, EPS / r * by_m, 1e-10)
claim("is less than a tenth", (by_m + by_v).norm() < 0.1 * by_m.norm())

# %% [markdown]
# ## 6 · The root at zero
#
# $B$ above has $\sqrt{v'}$ in the denominator. Where every gradient has been exactly zero, $v' = 0$: the
# embedding of a word that no batch has contained. An example: let each pixel at each of its 17 grey levels be a
# "word". A digit is a bag of 64 such words, its logits are the sum of their embeddings, and many of the 1,088
# words never occur.

# %%
pixels = torch.cat([x, x_test[:8]]).flatten(1)
grey = ((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 16).round().long()
bags = F.one_hot(grey + 17 * torch.arange(64, device=device), 17 * 64).sum(1).double()
bags, bags_test = bags[: len(x)], bags[len(x) :]
torch.manual_seed(0)
words = nn.Linear(17 * 64, 10, bias=False).to(device).double()  # a bag times a table of embeddings
run = magic.Run(
    words, torch.optim.Adam(words.parameters(), lr=RATE, eps=EPS), (bags, y), loss, order[:10]
)
never, once = ((bags.sum(0) == k).nonzero()[:, 0] for k in (0, 1))
end = run.train(progress=False)
v = end.slots["weight"]["exp_avg_sq"]
claim(
    "over 200 words never occur, and their v is exactly 0",
    len(never) > 200 and (v[:, never] == 0).all(),
)

# %% [markdown]
# Differentiate the same ten steps by plain autograd, through Adam's formula as it stands. Only the square root
# can be exchanged.


# %%
def unrolled(root):
    """(K, n): the scores, by one autograd graph over ten steps written out."""
    weights = torch.ones(len(x), dtype=x.dtype, device=device, requires_grad=True)
    table = words.weight.detach().clone().requires_grad_()
    m = v = torch.zeros_like(table)
    for t, batch in enumerate(order[:10].to(device)):
        losses = F.cross_entropy(bags[batch] @ table.T, y[batch], reduction="none")
        (g,) = torch.autograd.grad((weights[batch] * losses).mean(), table, create_graph=True)
        table, m, v = adam_update(table, g, m, v, t + 1, root)
    outputs = F.cross_entropy(bags_test @ table.T, y_test[:8], reduction="none")
    return torch.stack([torch.autograd.grad(out, weights, retain_graph=True)[0] for out in outputs])


def root_with_slope_zero(v):
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


naive, safe = unrolled(torch.sqrt), unrolled(root_with_slope_zero)
claim("with the plain root every single score is NaN", naive.isnan().all())
scores = magic.attribute(run, lambda model: loss(model, bags_test, y_test[:8]), progress=False)
agree("with slope 0 at 0, and magic", safe, scores.values, 1e-9)

# %% [markdown]
# The slope of $\sqrt v$ at 0 is infinite, the chain rule multiplies it with the numerator $m' = 0$, and in
# floating point $0 \cdot \infty$ is NaN. The product of the table with a bag's zeros then carries it everywhere.
# (A look-up instead of a product keeps the NaN in those rows, where it waits for somebody to read it.)
#
# Why is 0 the *right* value, and not just a harmless one? Look at the update, not at the root. With $m' = 0$ it is
# $p' = p$, whatever $v'$ is: $\partial p'/\partial v' = 0$. And $v'$ cannot move by itself, only with a
# gradient. Starting from $m = v = 0$, for $t = 1$:
#
# $$p'(g) = p - \eta\,\frac{g}{|g| + \varepsilon}, \qquad \frac{\partial p'}{\partial g}(0) = -\frac{\eta}{\varepsilon}.$$
#
# It has a kink's look and, thanks to $\varepsilon$, a slope: the one that the numerator alone gives, $(1-\beta_1)A$.
# The denominator moves by $|g|$, which times the numerator's $g$ is of second order. A finite difference much
# narrower than $\varepsilon$ sees it:

# %%
zero, h = torch.zeros(1, dtype=torch.float64), 1e-16
up, down = (adam_update(zero, g, zero, zero, 1)[0] for g in (zero + h, zero - h))
slope = (up - down) / (2 * h)
agree("∂p'/∂g at 0, finite difference", diagonals(zero, zero, zero, 1)["g"], slope, 1e-6)

# %% [markdown]
# This is exact, and here is what it does not see. A word that occurs in **one** training image gets its gradients
# from that image alone, and Adam divides them by their own size: the image's weight cancels. The word moves
# nearly as far at weight 0.5 as at weight 1, and at weight 0 not at all. No slope at $w = 1$ knows about that.

# %%
word = once[0].item()
owner = bags[:, word].nonzero()[0, 0].item()
longer = magic.Run(
    words, torch.optim.Adam(words.parameters(), lr=RATE, eps=EPS), (bags, y), loss, order
)


def moved_at(weight):
    weights = longer.weights()
    weights[owner] = weight
    end = longer.train(weights, progress=False)
    return (end.params["weight"] - longer.initial.params["weight"])[:, word].norm().item()


way = {weight: moved_at(weight) for weight in (1.0, 0.5, 0.1, 0.0)}
claim(
    "at half its weight the image moves its word as far, within 5 %",
    abs(way[0.5] / way[1.0] - 1) < 0.05,
)
claim("at a tenth of its weight, still more than half as far", way[0.1] > 0.5 * way[1.0])
claim("at weight 0 the word does not move", way[0.0] == 0)

# %% [markdown]
# A larger $\varepsilon$ makes such corners rounder.
#
# ## 7 · BatchNorm: a path that only the end reads
#
# In training a BatchNorm layer normalises with the batch's own mean and variance. On the side it keeps
#
# $$\rho' = (1-\alpha)\,\rho + \alpha\,\text{mean}(h(p)), \qquad \alpha = 0.1,$$
#
# of its inputs $h$, and the same for their variance. No training step reads $\rho$. The model in eval mode does, so
# the measured loss depends on the weights along one more path: $w \to p_t \to \rho_T \to \varphi$, for about the
# last $1/\alpha$ steps. It begins with $\partial\varphi/\partial\rho_T$ in the first cotangent:

# %%
first = measure_vjp(runs["BatchNorm"], states["BatchNorm"][-1], measure)
print({name: tuple(d.shape) for name, d in first.buffers.items()})


def forget_buffers(cotangent):
    return dataclasses.replace(cotangent, buffers={})


lost = error("BatchNorm", "running statistics", backward("BatchNorm", forget_buffers))
claim("without the path through the running statistics: wrong by more than 50 %", lost > 0.5)

# %% tags=["nbval-ignore-output"]
exact = backward("BatchNorm")
wrong = (backward("BatchNorm", forget_buffers) - exact).norm(dim=1) / exact.norm(dim=1)
print("over all 300 images, for each of the 8 outputs:", [f"{e:.0%}" for e in wrong.tolist()])

# %% [markdown]
# The strongest other implementation that we know of drops this path; in our measurements of it the error was
# between 7 % and 54 %. It is easily lost: PyTorch's own operation has no derivative with respect to running
# statistics and updates them behind autograd's back. `magic` writes the layer out in the adjoint, while training
# keeps using PyTorch's.
#
# ## 8 · Dropout: nothing to remember
#
# A generator of random numbers is a memory, too: its state on the CPU takes some five kilobytes, changes with every
# draw, and is not in the module, nor in the optimizer. `magic` does not store it. It *computes* the seed of each step
# from $(\text{seed}, t)$, so whatever was drawn elsewhere does not matter.

# %%
run, state = runs["dropout"], states["dropout"][40]
weights = run.weights()
reseeded = run_of(dropped, seed=1, **adam)
with magic.determinism.fix():
    torch.manual_seed(1)
    one = run.step(state, weights)
    torch.manual_seed(2)
    two = run.step(state, weights)
    other = reseeded.step(state, weights)
claim("whatever the generator's past: the same bits", one.fingerprint() == two.fingerprint())
claim("another seed: another state", other.fingerprint() != one.fingerprint())
lost = error("dropout", "its random numbers", backward("dropout", by=reseeded))
claim(
    "the right states, pulled back with other dropout masks: scores wrong by more than 30 %",
    lost > 0.3,
)

# %% [markdown]
# The last line is what happens to a replay that restores parameters, buffers and slots, and forgets the generator.
#
# ## 9 · What carries no derivative
#
# The cotangent has an entry for each number of the state that moves with the weights, and none for the counters.
# They are restored, which section 2 showed to be necessary, and not differentiated.

# %%
kept, moving = states["BatchNorm"][-1].flatten(), first.flatten()
print("BatchNorm:", sorted(set(kept) - set(moving)))
kept, moving = states["Adam"][-1].flatten(), final.flatten()
print("Adam:", sorted(set(kept) - set(moving)))
counters = all(name.endswith("/step") for name in set(kept) - set(moving))
claim("they are Adam's counters, one for each parameter", counters)

# %% [markdown]
# ## 10 · A memory nobody declared
#
# All of this assumes that the memory can be found: parameters, registered buffers, the optimizer. A plain Python
# attribute is none of these. This layer warms up by counting its own calls:


# %%
class WarmUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * min(1.0, self.calls / 20)


said = "nothing"
try:
    run_of(lambda: [nn.Linear(64, 10), WarmUp()], **momentum)
except magic.NotDeterministic as refusal:
    said = str(refusal)
claim("magic.Run refuses it, and names the attribute", "'calls'" in said)

# %% tags=["nbval-ignore-output"]
print(said)

# %% [markdown]
# Its first forward pass gives it away. Do what the message says, and the count is part of the state:


# %%
class WarmUpInState(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (self.calls / 20).clamp(max=1.0)


run = run_of(lambda: [nn.Linear(64, 10), WarmUpInState()], **momentum)
true = states_of(run)
print({name: int(value) for name, value in true[5].buffers.items()})
claim(
    "restored at step 5, the same end",
    states_of(run, true[5])[-1].fingerprint() == true[-1].fingerprint(),
)

# %% [markdown]
# ## Everything that we left out
#
# One dot for each thing forgotten on the way back, and one for each run with nothing forgotten. The latter are as
# exact as finite differences can tell.

# %% tags=["nbval-ignore-output"]
shown = sorted(errors.items(), key=lambda item: (item[0][1] != "nothing", item[1]))
labels = [f"{name}: {what}" for (name, what), _ in shown] + ["Adam on words: slope 0 of √v at 0"]
ax = plt.subplots(figsize=(7, 4.2))[1]
ax.axvline(1, color=plot.NEUTRAL, linewidth=1)
beside = {
    "ha": "right",
    "va": "center",
    "fontsize": 9,
    "color": "#555555",
    "backgroundcolor": "white",
}
for row, ((_, what), value) in enumerate(shown):
    ax.scatter(
        value, row, s=60, color=plot.HELPFUL if what == "nothing" else plot.HARMFUL, zorder=3
    )
    if what != "nothing":
        ax.text(0.1, row, f"{value:.0%}", **beside)
ax.text(0.1, len(shown), "not a number", **beside)
ax.set_yticks(range(len(labels)), labels)
ax.set(xscale="log", xlim=(1e-11, 20), ylim=(len(shown) + 0.7, -0.7))
ax.set(
    xlabel="relative error of the scores (the line: 100 %)",
    title="What was left out of the derivative",
);

# %%
exact = [value for (_, what), value in errors.items() if what == "nothing"]
wrong = [value for (_, what), value in errors.items() if what != "nothing"]
claim("with nothing left out, every error is below 1e-7", max(exact) < 1e-7)
claim("with any one thing left out, above 30 %", min(wrong) > 0.3 and len(wrong) == 7)

# %% [markdown]
# None of the wrong ones raised an error; they all look like scores. (Only the NaN shows itself.) Hence two rules,
# which `magic` keeps: the state is *one value* that holds all the memory, and before a derivative is believed, steps
# of the run are compared with finite differences.
#
# ## What we ignored
#
# - **Other memories.** A moving average of the parameters, gradient accumulation over several steps, a loss scaler:
#   each is a part of the state and would have to be declared. A data loader's position is one, too; here the batches
#   are fixed in advance, so $t$ says it.
# - **Other runs.** Each percentage here belongs to its run of 60 steps. Another model, rate or length has another;
#   exercise 3 looks at one.
# - **The size of the memory.** A state with Adam's slots is three times the parameters, and a replay needs many
#   states. Which ones to keep is a question of its own.
#
# ## Exercises
#
# 1. ● (3 min) Run section 3 with momentum 0.5 and 0.99. What error does $\mu$ predict for the forgotten buffer, and
#    what do you find? <details><summary>Hint</summary>The share through the parameters is $1-\mu$, as long as
#    $\Delta_p$ changes slowly over $1/(1-\mu)$ steps. At 0.99 that is longer than the run.</details>
# 2. ●● (10 min) Derive the diagonals of Nesterov's momentum, $p' = p - \eta(g + \mu b')$, and check them against
#    `step_vjp` as in section 4. <details><summary>Hint</summary>$\bar g = \Delta_b' - \eta\mu\Delta_p' - \eta\Delta_p'$:
#    which of the three is new?</details>
# 3. ●●● (20 min) Train the BatchNorm run for four times as many epochs, and again with a rate that falls to zero
#    (`torch.optim.lr_scheduler.CosineAnnealingLR`). How does the error of `forget_buffers` change, and why does it not
#    vanish as the training settles? <details><summary>Hint</summary>The statistics are a function of the parameters,
#    and the parameters still depend on the weights, however slowly they move.</details>
#
# **Next:** the derivative is exact. [06 · Remember, forget, replay](06_remember_forget_replay.ipynb)
