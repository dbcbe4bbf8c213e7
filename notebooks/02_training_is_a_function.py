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
# # 02 · Training is a function
#
# **Question.** [Chapter 01](01_the_same_run_twice.ipynb) made training repeatable. What, then, is training a
# function *of*, and what does its derivative mean? Statistics has had a derivative of a fitted model in the weight
# of an example since the 1970s, the *influence function*. Why not use that one?
#
# We write training as a pure function in forty lines of PyTorch and draw it for a problem with two data weights. Then we
# put the influence function beside its derivative. For a convex model that has converged they are the same numbers;
# before that they are not; and for the smallest deep network they stay different. Each time we retrain to see which one
# was right.
#
# | word | in code | meaning |
# |---|---|---|
# | data weight $w_i$ | `weights` | how much example $i$ counts in the loss: 1 = present, 0 = removed |
# | state $s_t$ | `State` | everything that training carries from one step to the next |
# | step $h_t$ | `run.step` | $s_{t+1} = h_t(s_t, w)$; it reads nothing else, and it changes nothing |
# | trained model $f(w) = s_T$ | `run.train(weights)` | the state after the last step |
# | measure $\varphi$ | `measure` | a number read off a trained model |
# | score $\tau_i$ | `scores` | $\partial \varphi(f(w)) / \partial w_i$; removing example $i$ changes $\varphi$ by about $-\tau_i$ |
# | Hessian $H$ | `hessian` | second derivatives of the training loss in the parameters |
#
# About thirty-five minutes to read; half a minute to run.

# %%
import copy
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call

import magic
from magic.book import data, models, plot
from magic.book.checks import agree, claim

torch.set_default_dtype(torch.float64)
plot.style()

# %% [markdown]
# ## 1 · A state, a step, a run
#
# A training loop in PyTorch keeps what it knows in several places:
#
# - the **parameters** are in the model, and `optimizer.step()` overwrites them;
# - **buffers** are in the model, too: BatchNorm keeps a running mean and variance there, and changes them in
#   every forward pass;
# - the **optimizer state** is in the optimizer: SGD with momentum remembers a running sum of past gradients;
# - the **position** in the data is in the loader, and the random numbers of dropout are in a generator.
#
# If a step is to be a function, then all of this must be its argument, and what it changes must be its value.
# So we collect it in one object. Positions and random numbers need only the step's number: the batches are a fixed
# list, and chapter 01 seeds dropout in step $t$ from the seed and $t$.


# %%
@dataclass(frozen=True)
class State:
    """Everything that the next step reads, apart from the data weights."""

    params: dict  # what is trained
    buffers: dict  # what layers remember, such as BatchNorm's running mean
    momentum: dict  # the optimizer state: for each parameter, what SGD remembers
    step: int = 0  # says which batch is next and which random numbers are drawn


# %% [markdown]
# The gradient of one step is that of the weighted loss, with $B$ the size of the batch:
#
# $$g_t(\theta, w) = \nabla_\theta\, \frac{1}{B} \sum_{i \in \text{batch}_t} w_i\, \ell_i(\theta).$$
#
# `functional_call` evaluates a model with parameters and buffers that we hand to it. BatchNorm writes into its
# buffers, so we hand it copies and return them. `create_graph` asks PyTorch to remember how the gradient itself was
# computed; that is needed only where we want to differentiate through the step.


# %%
def gradient(run, state, weights):
    """g_t by name, and the buffers after the forward pass."""
    magic.determinism.seed_step(run.seed, state.step)
    batch = run.batches[state.step]
    leaf = {k: p.clone().requires_grad_() for k, p in state.params.items() if not p.requires_grad}
    params = {**state.params, **leaf}
    buffers = {k: b.clone() for k, b in state.buffers.items()}

    def model(x):
        return functional_call(run.model, (params, buffers), (x,))

    losses = run.loss(model, *(part[batch] for part in run.data))
    objective = (weights[batch] * losses).sum() / len(batch)
    leaves, again = list(params.values()), weights.requires_grad
    found = torch.autograd.grad(objective, leaves, create_graph=again)
    return dict(zip(params, found, strict=True)), buffers


# %% [markdown]
# The rest is SGD with momentum $\mu$ and weight decay $\lambda$, written so that it makes new tensors:
# $m' = \mu m + g + \lambda\theta$ and $\theta' = \theta - \eta m'$. (`torch.add(p, m, alpha=-rate)` is
# $\theta - \eta m$ rounded once, as PyTorch's optimizer does it; we want its bits.)


# %%
class Run:
    """Training by SGD as a function of the data weights: run.train(weights) is f(w)."""

    def __init__(self, model, loss, data, batches, rate, momentum=0.0, decay=0.0, seed=0):
        self.model, self.loss, self.data, self.batches = copy.deepcopy(model), loss, data, batches
        self.rate, self.momentum, self.decay, self.seed = rate, momentum, decay, seed
        params = {k: p.detach().clone() for k, p in model.named_parameters()}
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        self.initial = State(params, buffers, {k: torch.zeros_like(p) for k, p in params.items()})

    def step(self, s, weights):
        g, buffers = gradient(self, s, weights)
        g = {k: torch.add(g[k], p, alpha=self.decay) for k, p in s.params.items()}
        momentum = {k: self.momentum * m + g[k] for k, m in s.momentum.items()}
        params = {k: torch.add(p, momentum[k], alpha=-self.rate) for k, p in s.params.items()}
        return State(params, buffers, momentum, s.step + 1)

    def train(self, weights, state=None):
        state = state or self.initial
        while state.step < len(self.batches):
            state = self.step(state, weights)
        return state


# %% [markdown]
# Is that a training run? We give it a network with BatchNorm and dropout, and compare its last state with that of
# `magic.Run`, which takes the same things in PyTorch's own form and which chapter 01 compared with the plain loop.


# %%
def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


x, y, x_test, y_test = data.digits(train=400, test=500)
x, x_test = x.double(), x_test.double()
torch.manual_seed(0)
net = torch.nn.Sequential(
    models.MLP((64, 32)), torch.nn.BatchNorm1d(32), torch.nn.GELU(), torch.nn.Dropout(0.2)
).append(torch.nn.Linear(32, 10))

# %%
order, rules = magic.batches(len(x), size=50, epochs=5), {"momentum": 0.9, "weight_decay": 1e-3}
sgd = torch.optim.SGD(net.parameters(), lr=0.02, **rules)
theirs = magic.Run(net, sgd, (x, y), cross_entropy, order, seed=7).train(progress=False)

run = Run(net, cross_entropy, (x, y), order, rate=0.02, momentum=0.9, decay=1e-3, seed=7)
mine = run.train(torch.ones(len(x)))
agree("first layer", mine.params["0.1.weight"], theirs.params["0.1.weight"])
agree("last layer", mine.params["4.weight"], theirs.params["4.weight"])
theirs_momentum = theirs.slots["4.weight"]["momentum_buffer"]
agree("its momentum", mine.momentum["4.weight"], theirs_momentum)
agree("BatchNorm's variance", mine.buffers["1.running_var"], theirs.buffers["1.running_var"])

# %% [markdown]
# The same bits. And because a step changes nothing, **any state is a place to start again**. We keep the state after
# 17 of the 40 steps and train on from it: first from all of it, then with one of its fields set back to what it was at
# the start. How far do the final predictions for the test images move?


# %%
def trained(run, state):
    """The trained network as a function of its inputs, in eval mode."""
    model = copy.deepcopy(run.model).eval()
    return lambda x: functional_call(model, (state.params, state.buffers), (x,))


ones = torch.ones(len(x))
kept = run.initial
for _ in range(17):
    kept = run.step(kept, ones)
answers = trained(run, mine)(x_test).softmax(1)
moved = {}
for field in ("nothing", "params", "buffers", "momentum", "step"):
    forgot = {} if field == "nothing" else {field: getattr(run.initial, field)}
    state = run.train(ones, state=replace(kept, **forgot))
    moved[field] = (trained(run, state)(x_test).softmax(1) - answers).abs().max().item()

# %% tags=["nbval-ignore-output"]
pd.Series(moved, name="largest change of a probability").rename_axis("set back").to_frame()

# %%
claim("with the whole state, the run ends in the same predictions", moved.pop("nothing") == 0)
claim("any field set back moves a probability by", min(moved.values()), at_least=1e-3)

# %% [markdown]
# So each field is part of the state, BatchNorm's buffers included: training never reads them, but the finished
# network does.
#
# With the model, the data, the order of the batches, the start and the seed fixed, what is left to vary is $w$:
#
# $$f(w) = s_T, \qquad s_{t+1} = h_t(s_t, w), \qquad t = 0, \dots, T-1 .$$
#
# Removing example $i$ means $w_i = 0$. Because $B$ stays fixed, a removed example leaves a gap in its batch; it is
# not replaced.
#
# ## 2 · A function one can see
#
# Now a problem so small that the whole function can be drawn. There are 24 points on a noisy sine, two of which are far
# off: point A lies too high, point B too low. A network with eight hidden units fits them in 40 steps. We measure its
# prediction $\varphi$ at a place between A and B.

# %%
generator = torch.Generator().manual_seed(0)
px = torch.linspace(-2.5, 2.5, 24)[:, None]
py = torch.sin(1.5 * px) + 0.2 * torch.randn(px.shape, generator=generator)
A, B = 20, 22
py[A], py[B] = 1.6, -1.3
between = (px[A : A + 1] + px[B : B + 1]) / 2


def squared_error(model, x, y):
    return (model(x) - y).square()[:, 0]


# %%
torch.manual_seed(0)
small = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
steps = magic.batches(len(px), size=12, epochs=20)
curve = Run(small, squared_error, (px, py), steps, rate=0.03, momentum=0.9)


def output(state):
    return trained(curve, state)(between)[0, 0]


def weights_of(a, b):
    """All weights 1, but those of A and B."""
    weights = torch.ones(len(px))
    weights[A], weights[B] = a, b
    return weights


# %% tags=["nbval-ignore-output", "hide-input"]
grid = torch.linspace(-2.6, 2.6, 100)[:, None]
figure, ax = plt.subplots(figsize=(5.6, 3.4))
ax.scatter(px, py, color=plot.NEUTRAL, s=22)
for i, name in ((A, "A"), (B, "B")):
    ax.scatter(px[i], py[i], color="black", s=30, zorder=3)
    ax.annotate(name, (px[i], py[i]), textcoords="offset points", xytext=(7, -4))
fits = {"both": (1, 1), "without A": (0, 1), "without B": (1, 0), "without either": (0, 0)}
for (name, pair), style in zip(fits.items(), ("-", "--", "-.", ":"), strict=True):
    fit = trained(curve, curve.train(weights_of(*pair)))(grid).detach()
    ax.plot(grid, fit, style, label=name, linewidth=2)
ax.axvline(between.item(), color=plot.NEUTRAL, linewidth=1)
ax.set(xlabel="x", ylabel="y", title="Four trainings; φ is read off at the grey line")
ax.legend(fontsize=9);

# %% [markdown]
# The four curves are four values of $f$, at the corners of a square: A and B present or absent. Since weights are
# numbers, nothing keeps us from the rest of the square. A weight of ½ means that A pulls half as hard. We train
# at 81 places.

# %%
axis = torch.linspace(0, 1.25, 9)
surface = torch.tensor(
    [[output(curve.train(weights_of(a, b))).item() for a in axis.tolist()] for b in axis.tolist()]
)

# %% [markdown]
# And the derivative? $f$ is now an ordinary composition of tensor operations, none of which overwrites anything.
# So PyTorch can differentiate it like any other, in all 24 weights at once. Engstrom et al. (2025) call the result a
# *metagradient*. The last line below is the whole method; part II is about doing the same when the run does not fit into
# memory.

# %%
weights = weights_of(1.0, 1.0).requires_grad_()
phi = output(curve.train(weights))
(scores,) = torch.autograd.grad(phi, weights)

# %% [markdown]
# `magic.attribute` gives the same numbers for the same run, without keeping its graph.


# %%
def sgd_for(run):
    return torch.optim.SGD(
        run.model.parameters(), lr=run.rate, momentum=run.momentum, weight_decay=run.decay
    )


def by_magic(run, measure):
    """Scores of our Run's twin."""
    twin = magic.Run(run.model, sgd_for(run), run.data, run.loss, run.batches, seed=run.seed)
    return magic.attribute(twin, measure, progress=False).values[0]


def relative(mine, reference):
    """The distance of two vectors, relative to the length of the second."""
    return ((mine - reference).norm() / reference.norm()).item()


theirs = by_magic(curve, lambda model: model(between)[0])
claim("24 scores, difference of ours and magic's", relative(scores, theirs), at_most=1e-9)

# %% tags=["nbval-ignore-output", "hide-input"]
wa, wb = torch.meshgrid(axis, axis, indexing="xy")
plane = phi.item() + scores[A].item() * (wa - 1) + scores[B].item() * (wb - 1)
levels = [k / 20 for k in range(-2, 16)]
figure, ax = plt.subplots(figsize=(5.2, 4.6))
filled = ax.contour(wa, wb, surface, levels=levels, cmap="viridis", linewidths=2)
ax.clabel(filled, fontsize=9, levels=levels[::2])
ax.contour(wa, wb, plane, levels=levels, colors="black", linestyles="dashed", linewidths=0.8)
arrow = scores[[A, B]] / scores[[A, B]].norm() * 0.2
ax.annotate("", (1 + arrow[0], 1 + arrow[1]), (1, 1), arrowprops={"width": 1.5, "color": "black"})
ax.plot(1, 1, "o", color="black")
ax.plot([0, 0], [0, 1.25], color=plot.HARMFUL, linewidth=4, label="A removed", clip_on=False)
ax.plot([0, 1.25], [0, 0], color=plot.HELPFUL, linewidth=4, label="B removed", clip_on=False)
ax.set(xlabel="weight of A", ylabel="weight of B", aspect="equal")
ax.set_title("φ(f(w)), solid; its tangent plane at (1, 1), dashed")
ax.legend(fontsize=9, loc="upper right");

# %%
corners = {"A": (0, 1), "B": (1, 0), "both": (0, 0)}
change = {name: (output(curve.train(weights_of(*c))) - phi).item() for name, c in corners.items()}
told = {"A": -scores[A].item(), "B": -scores[B].item()}
told["both"] = told["A"] + told["B"]
table = pd.DataFrame({"predicted": told, "true": change}).rename_axis("removed")

# %% tags=["nbval-ignore-output"]
table.round(3)

# %%
ratio = (table["predicted"] / table["true"])[["A", "B"]]
claim("predicted over true change for A", ratio["A"], at_least=0.75, at_most=0.95)
claim("predicted over true change for B", ratio["B"], at_least=0.75, at_most=0.95)
others = scores.abs().sort(descending=True).indices[:2].tolist()
claim("of all 24 points, A and B have the largest scores", set(others) == {A, B})

# %% [markdown]
# The point (1, 1) is the training we did; a move to the left weakens A, a move down weakens B. The black arrow is the
# gradient, $(\tau_A, \tau_B)$: more of A raises the prediction, more of B lowers it. The solid lines join trainings with
# the same $\varphi$; the dashed ones do so for the tangent plane $\varphi + \tau_A (w_A - 1) + \tau_B (w_B - 1)$. Around
# (1, 1) they run together. On the edges, where a point is removed, the plane has the right sign and is somewhat too flat,
# because the surface bends. How much one loses to this bend, and when, is the subject of part III.
#
# ## 3 · The classical answer
#
# Statistics reached the derivative by another road, on which training does not occur. Suppose that the model is
# *defined* as the minimiser of a strictly convex objective (with full batches, $B = n$),
#
# $$\theta^*(w) = \arg\min_\theta L(\theta, w), \qquad
#   L(\theta, w) = \frac1B \sum_{i=1}^{n} w_i\, \ell_i(\theta) + \frac\lambda2 \|\theta\|^2 .$$
#
# At the minimum the gradient is zero, whatever $w$ is: $\nabla_\theta L(\theta^*(w), w) = 0$. Differentiate this
# equation in $w_i$. The parameters move, and that changes the gradient by $H\, \partial\theta^*/\partial w_i$; the weight
# appears in $L$ itself, and that changes it by $\nabla\ell_i / B$. Together they must cancel:
#
# $$H\, \frac{\partial \theta^*}{\partial w_i} + \frac1B \nabla \ell_i = 0
#   \quad\Longrightarrow\quad
#   \frac{\partial \theta^*}{\partial w_i} = -\frac1B H^{-1} \nabla\ell_i, \qquad
#   \tau_i^* = -\frac1B\, \nabla\varphi^\top H^{-1} \nabla\ell_i ,$$
#
# with $H = \nabla^2_\theta L(\theta^*, w)$. This is the **influence function**. The sign is as it should be: if
# $\nabla\varphi$ and $\nabla\ell_i$ point the same way, then lowering the loss of example $i$ lowers $\varphi$, so more
# weight on $i$ means a smaller $\varphi$. Koh & Liang (2017, eq. 2) have the same formula without $1/B$, since they add
# $\varepsilon\ell_i$ to a mean of losses; their $\varepsilon$ is our change of $w_i$ divided by $n$. Taking
# $-\tau_i^*$ as a prediction for a whole *removal* is the **infinitesimal jackknife** (Jaeckel 1972); Cook & Weisberg
# (1982) use both to find the examples on which a regression depends.
#
# Our case is logistic regression with weight decay: is a digit a 3 or an 8? For $p_i = \sigma(\theta^\top x_i)$, gradient
# and Hessian have closed forms,
#
# $$\nabla \ell_i = (p_i - y_i)\, x_i, \qquad H = \frac1B \sum_i w_i\, p_i (1 - p_i)\, x_i x_i^\top + \lambda I,$$
#
# and Newton's method finds $\theta^*$ to the last digit. We measure the loss of the test image that the model gets most
# wrong.

# %%
train_pair, test_pair = (y == 3) | (y == 8), (y_test == 3) | (y_test == 8)
u, v = x[train_pair].flatten(1), (y[train_pair] == 8).double()
u_test, v_test = x_test[test_pair].flatten(1), (y_test[test_pair] == 8).double()
n, decay = len(u), 0.1


def example_gradients(theta):
    """∇ℓ_i, one column for each example."""
    return u.T * (torch.sigmoid(u @ theta) - v)


def hessian(theta, w):
    p = torch.sigmoid(u @ theta)
    return (u.T * (w * p * (1 - p))) @ u / n + decay * torch.eye(len(theta))


# %%
def optimum(w):
    """θ*(w), by Newton's method."""
    theta = torch.zeros(u.shape[1])
    for _ in range(12):
        slope = example_gradients(theta) @ w / n + decay * theta
        theta = theta - torch.linalg.solve(hessian(theta, w), slope)
    return theta


def log_loss(model, x, y):
    return F.binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")


# %%
all_ones = torch.ones(n)
best = optimum(all_ones)
test_losses = F.binary_cross_entropy_with_logits(u_test @ best, v_test, reduction="none")
hard = test_losses.argmax().item()
x_hard, y_hard = u_test[hard : hard + 1], v_test[hard : hard + 1]


def phi_of(theta):
    return F.binary_cross_entropy_with_logits(x_hard @ theta, y_hard)


def phi_gradient(theta):
    return torch.func.grad(phi_of)(theta)


def influence(theta):
    inverse_times_gradients = torch.linalg.solve(hessian(theta, all_ones), example_gradients(theta))
    return -phi_gradient(theta) @ inverse_times_gradients / n


classical = influence(best)

# %% [markdown]
# Is it right? First the derivative: we change one weight by $\pm 10^{-4}$ and minimise again. Then the removals: we leave
# out each of the examples in turn.


# %%
def moved_to(i, weight):
    w = all_ones.clone()
    w[i] = weight
    return phi_of(optimum(w)).item()


some = range(0, n, 10)
differences = torch.tensor([(moved_to(i, 1 + 1e-4) - moved_to(i, 1 - 1e-4)) / 2e-4 for i in some])
agree("influence, finite differences", classical[some], differences)
gone = torch.tensor([moved_to(i, 0.0) for i in range(n)]) - phi_of(best)
correlation = torch.corrcoef(torch.stack([-classical, gone]))[0, 1]
claim("correlation of the jackknife with true removals", correlation, at_least=0.99)

# %% [markdown]
# One model and one linear system give the effect of every example, without training again. For a convex model at its
# minimum this is the right answer. It contains neither the start nor the steps, because the minimum depends on neither.
#
# ## 4 · From the run to the formula
#
# Now *train* this model: gradient descent with full batches and rate $\eta$, for $T$ steps from $\theta_0 = 0$. The
# result is a function $f(w)$ as in section 1, and it has scores $\tau_i$ for every $T$. To see how they are
# connected with the influence function, differentiate the step
#
# $$\theta_{t+1} = \theta_t - \eta \Big( \frac1B \sum_i w_i \nabla \ell_i(\theta_t) + \lambda \theta_t \Big)$$
#
# in $w$. With $J_t = \partial\theta_t/\partial w$, a matrix with one column for each example, and $G_t$ the matrix of the
# columns $\nabla\ell_i(\theta_t)$, the chain rule gives
#
# $$J_{t+1} = (I - \eta H_t)\, J_t - \frac{\eta}{B}\, G_t, \qquad J_0 = 0, \qquad \tau = \nabla\varphi(\theta_T)^\top J_T .$$
#
# Each step adds what the weights do to its own gradient, and passes on what earlier steps have added, multiplied by
# $I - \eta H_t$.
#
# **Where it goes.** Begin the run *at* the minimum, $\theta_0 = \theta^*$. At $w = 1$ it does not move, so $H_t = H$ and
# $G_t = G$ in every step, and the recursion is a geometric series:
#
# $$J_T = -\frac1B \Big[ \eta \sum_{k=0}^{T-1} (I - \eta H)^k \Big] G
#       = -\frac1B \big[ I - (I - \eta H)^T \big] H^{-1} G .$$
#
# The first bracket is the **truncated Neumann series** of $H^{-1}$: as long as $\eta$ is below 2 over the largest
# eigenvalue of $H$, all eigenvalues of $I - \eta H$ lie between $-1$ and $1$, the power goes to zero, and what remains is
# the influence function. Along an eigenvector of $H$ with eigenvalue $h$, the part that is missing after $T$ steps is
# $(1 - \eta h)^T \approx e^{-\eta T h}$. The flattest direction comes last. No eigenvalue is below $\lambda$, so the whole
# difference shrinks at least as fast as $(1 - \eta\lambda)^T$.
#
# From any other start $H_t$ and $G_t$ change along the way. But as $\theta_t$ approaches $\theta^*$, they approach $H$ and
# $G$, and what was added early is multiplied away. So the limit is the same.


# %%
def scores_along(theta, rate, record):
    """The scores of runs of T steps of gradient descent from theta, for each T in record."""
    jacobian, found = torch.zeros(len(theta), n), {}
    for t in range(1, max(record) + 1):
        slopes = example_gradients(theta)
        jacobian = jacobian - rate * (hessian(theta, all_ones) @ jacobian + slopes / n)
        theta = theta - rate * (slopes.sum(1) / n + decay * theta)
        if t in record:
            found[t] = phi_gradient(theta) @ jacobian
    return found


rate, lengths = 0.15, [1, 2, 4, 8, 15, 30, 60, 125, 250, 500, 1000, 1500, 2000, 2500, 3000]
cold = scores_along(torch.zeros(u.shape[1]), rate, lengths)
warm = scores_along(best, rate, lengths)

# %% [markdown]
# Are these the scores of real runs? Our `Run` and `magic` are asked for two of the lengths.


# %%
def logistic(T):
    linear = torch.nn.Linear(u.shape[1], 1, bias=False)
    torch.nn.init.zeros_(linear.weight)
    return Run(linear, log_loss, (u, v), [torch.arange(n)] * T, rate=rate, decay=decay)


def unrolled(run, measure):
    weights = torch.ones(len(run.data[0])).requires_grad_()
    return torch.autograd.grad(measure(run.train(weights)), weights)[0]


def hard_loss(model):
    return log_loss(model, x_hard, y_hard)


def hard_scores(run):
    return unrolled(run, lambda state: hard_loss(trained(run, state)).sum())


# %%
for T in (30, 250):
    ours, theirs = hard_scores(logistic(T)), by_magic(logistic(T), hard_loss)
    claim(f"T = {T}: recursion and unrolled run differ by", relative(cold[T], ours), at_most=1e-9)
    claim(f"T = {T}: recursion and magic differ by", relative(cold[T], theirs), at_most=1e-9)


# %%
gap = [relative(cold[T], classical) for T in lengths]
gap_warm = [relative(warm[T], classical) for T in lengths]
H = hessian(best, all_ones)
powers = (torch.eye(len(H)) - rate * H).matrix_power(30)
missing = phi_gradient(best) @ powers @ torch.linalg.solve(H, example_gradients(best)) / n
found = relative(warm[30] - classical, missing)
claim("30 steps from θ*: what is missing, by the formula and found", found, at_most=1e-9)

# %% tags=["nbval-ignore-output", "hide-input"]
figure, ax = plt.subplots(figsize=(5.6, 3.6))
ax.plot(lengths, gap, "o-", label="trained from θ₀ = 0")
ax.plot(lengths, gap_warm, "s-", label="trained on from θ₀ = θ*")
bound = [(1 - rate * decay) ** T for T in range(1, 3001)]
ax.plot(range(1, 3001), bound, ":", color="black", label="(1 − ηλ)ᵀ")
ax.set(xscale="log", yscale="log", xlabel="number of steps T", ylim=(1e-16, 10))
ax.set_ylabel("relative difference of the scores")
ax.set_title("The scores of a run approach the influence function")
ax.legend(fontsize=9);

# %%
claim("after 3,000 steps, scores and influence function differ by", gap[-1], at_most=1e-11)
claim("after 15 steps they differ by", relative(cold[15], classical), at_least=0.3)

# %% [markdown]
# ## 5 · Which one is right?
#
# A run that has not converged is not a mistake. Networks are trained for as long as it pays, not until the gradient
# vanishes, and the model we have is the one at the end of those steps. For 15 steps, the scores of the run and the
# influence function predict different things. So we train for 15 steps without each of the examples in turn, and look.

# %%
run = logistic(15)
final = run.train(all_ones)


def loss_without(i):
    w = all_ones.clone()
    w[i] = 0
    return hard_loss(trained(run, run.train(w))).item()


truth = torch.tensor([loss_without(i) for i in range(n)]) - hard_loss(trained(run, final)).item()
predicted = {
    "scores of the run": -cold[15],
    "influence function at θ*": -classical,
    "influence function at θ₁₅": -influence(final.params["weight"][0]),
}

# %% tags=["nbval-ignore-output", "hide-input"]
figure, ax = plt.subplots(figsize=(5, 4))
for name, mark in (("scores of the run", "o"), ("influence function at θ*", "^")):
    ax.plot(predicted[name], truth, mark, markersize=5, alpha=0.8, label=name)
ends = [truth.min().item(), truth.max().item()]
ax.plot(ends, ends, color="black", linewidth=1)
ax.set(xlabel="predicted change of the loss", ylabel="true change, by retraining")
ax.set_title("Each example removed from a run of 15 steps")
ax.legend(fontsize=9);

# %%
ours, at_best, at_end = (relative(values, truth) for values in predicted.values())
claim("error of the run's scores, relative to the true changes", ours, at_most=0.1)
claim("error of the influence function at the minimum", at_best, at_least=0.4)
claim("error of the influence function where training ended", at_end, at_least=0.6)

# %% [markdown]
# The circles lie on the line; what they miss near its ends is the bend of section 2. Many triangles are far off it, and
# some are on the wrong side of zero. Evaluating the formula where training has ended, as is usual, makes it worse here.
#
# So for a finite run the derivative *of the run* is the right one. The influence function answers another question, and
# section 4 says which: what if we began **at** $\theta^*$, changed the weight, and trained on forever? Bae et al. (2022)
# take the difference between this question and retraining apart for real networks. One part of it is the missing
# convergence. Another is the *warm start*: one begins at the trained parameters and not at $\theta_0$. A convex
# model forgets its start, so in the end both questions have the same answer. The next model never does.
#
# ## 6 · Where there is no inverse
#
# The influence function needs $H^{-1}$. A deep network usually does not have one, and the smallest
# example is already linear: two layers, $x \mapsto W_2 W_1 x$. For any invertible $M$, the layers $M W_1$ and $W_2 M^{-1}$ compute the same
# function, so the minimum is never a point. It is a whole valley, along which the loss is constant. Along
# the valley the loss has no curvature, so $H$ has the eigenvalue zero there.
#
# Take two inputs, one hidden unit, one output: $x \mapsto b\,(a_1 x_1 + a_2 x_2)$, three parameters, squared loss
# $\tfrac12 (\cdot - y)^2$. Our six training examples have $x_2 = 0$, like a pixel that is always blank. So $a_2$ never
# gets a gradient and stays at its start, $a_2 = 1$. The data fix the product $a_1 b = c$, and leave open where on the
# hyperbola training ends. We measure the answer to a new input, $(0, 1)$, in which the blank pixel is on:
# $\varphi = b\,a_2 = b$.

# %%
inputs = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5, 2.0])
labels = torch.tensor([0.9, 0.5, 0.8, 1.7, 1.2, 2.3])[:, None]
pixels = torch.stack([inputs, torch.zeros(6)], 1)
novel = torch.tensor([[0.0, 1.0]])


def half_square(model, x, y):
    return 0.5 * (model(x) - y).square()[:, 0]


# %%
def deep(a1, a2, b, T=80, rate=0.3):
    """A run of T steps of gradient descent from these parameters."""
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[a1, a2]]))
        net[1].weight.copy_(torch.tensor([[b]]))
    return Run(net, half_square, (pixels, labels), [torch.arange(6)] * T, rate=rate)


def answer(run, state):
    return trained(run, state)(novel)[0, 0]


# %%
run = deep(1.5, 1.0, 0.1)
final = run.train(torch.ones(6))
theta = torch.cat([p.detach().flatten() for p in final.params.values()])
left, _ = gradient(run, replace(final, step=0), torch.ones(6))
largest = max(g.abs().max().item() for g in left.values())
claim("largest entry of the gradient after training", largest, at_most=1e-13)

# %% [markdown]
# Training has converged as far as numbers can. We compute the Hessian there, and, since it has no inverse, what is done
# in practice: add a **damping** $\delta$ to its diagonal, $-\nabla\varphi^\top (H + \delta I)^{-1} \nabla\ell_i / B$. For
# $\delta \to 0$ this goes to the pseudo-inverse $H^+$, which leaves the valley out.


# %%
def deep_losses(theta):
    a, b = theta[:2], theta[2]
    return 0.5 * (b * (pixels @ a) - labels[:, 0]).square()


H = torch.autograd.functional.hessian(lambda theta: deep_losses(theta).sum() / 6, theta)
slopes = torch.func.jacrev(deep_losses)(theta).T  # one column for each example
d_phi = torch.stack([torch.zeros(()), theta[2], theta[1]])  # of φ = b·a₂ in (a₁, a₂, b)


def damped(delta):
    return -d_phi @ torch.linalg.solve(H + delta * torch.eye(3), slopes) / 6


pseudo = -d_phi @ torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ slopes / 6
eigenvalues = torch.linalg.eigvalsh(H).abs()
claim("largest eigenvalue of H", eigenvalues[2], at_least=4)
claim("second largest", eigenvalues[1], at_most=1e-12)

# %% [markdown]
# Against this we put the derivative of the run, checked by finite differences of trainings, and the true removals.

# %%
scores = unrolled(run, lambda state: answer(run, state))


def answer_with(run, i, weight):
    w = torch.ones(6)
    w[i] = weight
    return answer(run, run.train(w)).item()


e = 1e-5
differences = [
    (answer_with(run, i, 1 + e) - answer_with(run, i, 1 - e)) / (2 * e) for i in range(6)
]
agree("unroll, finite differences", scores, torch.tensor(differences))
theirs = by_magic(run, lambda model: model(novel)[0])
claim("unroll and magic differ by", relative(scores, theirs), at_most=1e-9)
base = answer(run, final).item()
truth = torch.tensor([answer_with(run, i, 0.0) for i in range(6)]) - base
columns = {"δ = 10": damped(10.0), "δ = 1": damped(1.0), "δ → 0": pseudo, "the run": scores}
table = pd.DataFrame({name: -values for name, values in columns.items()}).assign(true=truth)

# %% tags=["nbval-ignore-output"]
table.rename_axis("removed").round(3)

# %%
error = {name: relative(-values, truth) for name, values in columns.items()}
claim("error of the run's scores, relative to the true changes", error.pop("the run"), at_most=0.3)
claim("smallest error of any damping", min(error.values()), at_least=0.5)

# %% [markdown]
# The run has a definite derivative, and retraining confirms it: to six digits for small changes of a weight, and with an
# error of about a sixth for whole removals. The formula has a family of answers, one for each $\delta$, and none of them
# is near: for the last example it predicts at most a third of what happens. No damping can repair that, since what is
# missing is not in $H$. The Hessian says where the valley is, not where in it the run will stop.
#
# The picture shows both questions. Removing the last example shifts the valley from the solid to the dashed line. Two runs
# from the same start, with and without the example, take different ways and end at different places along it. A run
# that begins at $\theta^*$ instead goes to the dashed line by nearly the shortest way, and its $b$ falls only half as far.

# %% tags=["hide-input"]
without_last = torch.tensor([1.0, 1, 1, 1, 1, 0])


def path(run, w):
    """(a₁, b) after each step."""
    states = [run.initial]
    while states[-1].step < len(run.batches):
        states.append(run.step(states[-1], w))
    both = [torch.stack([s.params["0.weight"][0, 0], s.params["1.weight"][0, 0]]) for s in states]
    return torch.stack(both).detach()


again = deep(*theta.tolist())
paths = {
    "all examples": path(run, torch.ones(6)),
    "without the last": path(run, without_last),
    "without the last, from θ*": path(again, without_last),
}

# %% tags=["nbval-ignore-output", "hide-input"]
figure, ax = plt.subplots(figsize=(4.6, 5.6))
for w, dashes in ((torch.ones(6), "-"), (without_last, "--")):
    c = (w * inputs * labels[:, 0]).sum() / (w * inputs.square()).sum()
    along = torch.linspace(1.1, 2.0, 50)
    ax.plot(along, c / along, dashes, color="black", linewidth=1)
for (name, points), mark in zip(paths.items(), ("o-", "^-", "s-"), strict=True):
    ax.plot(*points.T, mark, markersize=4, linewidth=0.8, label=name)
    ax.plot(*points[-1], mark[0], markersize=9, color=ax.lines[-1].get_color())
ax.plot(1.5, 0.1, "o", color="black", markersize=6)
ax.annotate("start", (1.5, 0.1), textcoords="offset points", xytext=(8, -4))
ax.set(xlabel="a₁", ylabel="b, the measured answer", xlim=(1.2, 1.9), ylim=(0, 1.0))
ax.set_aspect("equal")
ax.set_title("Three runs, two valleys")
ax.legend(fontsize=9, loc="upper right");

# %% [markdown]
# So the damped formula is not wrong either. It is the exact answer to the other question, and this, too, can be
# confirmed by training: begin at $\theta^*$, and differentiate *that* run.

# %%
from_best = unrolled(again, lambda state: answer(again, state))
claim("scores of a run from θ* and H⁺ differ by", relative(from_best, pseudo), at_most=1e-9)
differences = [
    (answer_with(again, i, 1 + e) - answer_with(again, i, 1 - e)) / (2 * e) for i in range(6)
]
agree("finite differences from θ*, H⁺", torch.tensor(differences), pseudo)

# %% [markdown]
# What this example does *not* show: that $H^+$ always fails. If the measured output is the same all along the valley, such as
# $\varphi = a_1 b$, the run and $H^+$ give the same scores (exercise 02.6). And the difference here comes from large steps:
# with $\eta = 0.3$ and an eigenvalue of 4.4 the run overshoots the valley, and the way it takes depends on the weights. With a
# very small rate the two nearly agree. Minibatches, momentum and Adam also make the place of the end depend on the way,
# and the valleys of a network of practical size have very many dimensions.
#
# ## What we claim
#
# - Training is a function of its data weights as soon as each step is a function of one state, and then it has a
#   derivative that PyTorch can compute.
# - For a strictly convex model, and only after convergence, this derivative is the influence function.
#   Along an eigenvector of the Hessian with eigenvalue $h$, the difference shrinks like $(1 - \eta h)^T$.
# - Before convergence, or where the Hessian is singular, they are different numbers. The derivative of the run says what
#   retraining from the start does. The influence function says what training on from the minimum would do.
#
# ## What we ignored
#
# - **The derivative through BatchNorm's running statistics.** PyTorch does not record how a forward pass changes
#   buffers, so our `Run` would leave that way out. `magic` differentiates through them.
# - **Rates that change, other optimizers, more than one loss.** Each would be one more argument of the step.
# - **Approximations of $H^{-1}\nabla\ell$** for large networks (conjugate gradients, LiSSA, K-FAC). They make the formula
#   affordable; chapter 10 measures how well it predicts then.
# - **Memory.** The unrolled run keeps all $T$ steps. The recursion for $J_t$ keeps only one, but as a matrix of parameters
#   times examples: 64 × 81 here, some $10^{11}$ numbers for a small network and CIFAR-10. Going through the
#   run in the other direction needs neither, and that is part II.
#
# *Sources.* Jaeckel (1972), *The infinitesimal jackknife*; Cook & Weisberg (1982), *Residuals and Influence in Regression*;
# Koh & Liang (2017), *Understanding black-box predictions via influence functions*, section 2; Bae et al. (2022), *If
# influence functions are the answer, then what is the question?*, section 4; Engstrom et al. (2025), *Optimizing ML training
# with metagradient descent*.
#
# ## Exercises
#
# **02.1** ●○○ (5 min) *A pure step.* The state of this training is a dict with `params` $\theta$, `average` $a$ and `step`
# $t$. A step is SGD whose rate warms up, $\eta_t = 0.1 \cdot \min(1, (t+1)/10)$, followed by a running average of the
# parameters, $a' = 0.9\,a + 0.1\,\theta'$. Write it as a pure function.
#
# <details><summary>Hint</summary>Everything that differs between two steps is in the state. The average takes in the
# parameters after the step. Nothing may be changed in place, and nothing detached.</details>


# %%
def averaged_step(state, gradient):
    """The state after one step: a new dict with params, average and step."""
    ...


# from magic.book import check
# check("02.1", averaged_step)

# %% [markdown]
# **02.2** ●●○ (15 min) *The influence function with its scale.* Ridge regression minimises
# $\frac1B \sum_i w_i \frac12 (\theta^\top x_i - y_i)^2 + \frac\lambda2 \|\theta\|^2$ over all $B = n$ examples. Return the scores
# $\tau^*_i$ of its prediction $\varphi = \theta^{*\top} x_\text{query}$ at any data weights $w$, in closed form.
#
# <details><summary>Hint</summary>First find $\theta^*(w)$. Where do the weights enter the Hessian, and do they enter
# $\nabla\ell_i$?</details>


# %%
def ridge_influence(x, y, query, decay, weights):
    """(n,) scores; x is (n, d), y and weights are (n,), query is (d,)."""
    ...


# check("02.2", ridge_influence)

# %% [markdown]
# **02.3** ●○○ (5 min) *The series.* Return $\eta \sum_{k=0}^{T-1} (I - \eta H)^k\, v$ with $T$ products of a matrix and a
# vector and without an inverse.
#
# <details><summary>Hint</summary>Keep the current term and the sum. Each term is the one before times
# $I - \eta H$.</details>


# %%
def neumann(hessian, vector, rate, steps):
    """η Σ (I − ηH)^k v over k = 0 … steps − 1."""
    ...


# check("02.3", neumann)

# %% [markdown]
# **02.4** ●●○ (15 min) *Momentum.* Gradient descent with momentum on full batches is $m' = \mu m + \nabla L(\theta)$,
# $\theta' = \theta - \eta m'$. Derive the recursion for $J = \partial\theta/\partial w$ and $M = \partial m/\partial w$, both with one
# column for each of the $B$ examples, and write one step of it. Then: what is the limit of $J_T$ if the run begins at
# $\theta^*$? Is it still the influence function?
#
# <details><summary>Hint</summary>Differentiate both lines; $\nabla L$ depends on $w$ directly and through $\theta$. At a
# limit, $J' = J$ and $M' = M$.</details>


# %%
def momentum_tangent(jacobian, memory, hessian, gradients, rate, momentum):
    """(J', M'); gradients is (d, B), a column ∇ℓ_i for each example."""
    ...


# check("02.4", momentum_tangent)

# %% [markdown]
# **02.5** ●●○ (15 min) *Minibatches.* Train the logistic regression of section 4 in minibatches of nine at a constant rate.
# Do the scores still go to the influence function as $T$ grows? What happens to the difference if you halve the rate?
#
# <details><summary>Hint</summary>`magic.batches(81, size=9, epochs=…)` and our `Run`; measure the relative difference. Where does
# $\theta_T$ go?</details>
#
# **02.6** ●●● (20 min) *In the valley.* (a) Show that for the network of section 6 the gradient of any function of the product
# $a_1 b$ is at a right angle to the valley, and check that the run and $H^+$ give the same scores for $\varphi = a_1 b$.
# (b) Start the run at $a_1 = b = 0.8$ and measure $b$ again. Why do the run and $H^+$ agree now, whatever the rate?
#
# <details><summary>Hint</summary>(a) Along the valley $a_1 b$ is constant. (b) What does a step do to the difference
# $a_1 - b$?</details>
#
# **Next:** [03 · Differentiate the whole run](03_differentiate_the_whole_run.ipynb)
