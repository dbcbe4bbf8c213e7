"""The checkers of chapter 05: right answers pass, and each common mistake is named."""

import pytest
import torch
from torch import nn

from tests.support.answers import fails, passes


def stretch(done, b1, b2, t=None, power=0.5):
    t = done + 1 if t is None else t(done)
    return (1 - b1**t) / (1 - b1) / ((1 - b2**t) / (1 - b2)) ** power


def test_stretch():
    passes("05.1", stretch)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda *a: 1 / stretch(*a), ["right for nothing done yet", "the other way round"]),
        (lambda *a: stretch(*a, power=1), ["the square root over v's correction is missing"]),
        (lambda *a: stretch(*a, power=0), ["the factor c, is left out"]),
        (lambda *a: stretch(*a, power=-0.5), ["multiply here"]),
        (
            lambda *a: 1.0 if not a[0] else stretch(*a, t=lambda done: done),
            ["wrong for 1 update done", "the number done + 1, not done"],
        ),
        (lambda done, b1, b2: ((1 - b2) / (1 - b2 ** (done + 1))) ** 0.5, ["m's correction, in α"]),
        (lambda done, b1, b2: 1.74, ["factor of 1.74"]),
        (lambda done: 1.0, ["raised TypeError"]),
    ],
)
def test_stretch_explains(answer, words):
    fails("05.1", answer, words)


def slope(done, lr, b1, b2, eps, root):
    return -lr * (1 - b1) / (1 - b1 ** (done + 1)) / (root**0.5 + eps)


def test_slope_at_zero():
    passes("05.2", slope)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda done, lr, *a: -lr / (a[3] ** 0.5 + a[2]), ["wrong for a later update", "first update"]),
        (lambda *a: slope(*a[:5], 0.0), ["right for", "with eps_root", "eps_root is left out"]),
        (
            lambda done, lr, b1, b2, eps, root: slope(done, lr, b1, b2, eps + root, 0.0),
            ["stands under the root"],
        ),
        (lambda *a: slope(*a) / 0.1, ["the factor 1 − β₁ is missing"]),
        (lambda *a: slope(*a) * (1 - 0.9 ** (a[0] + 1)), ["division by 1 − β₁ᵗ is left out"]),
        (lambda *a: slope(max(a[0] - 1, 0), *a[1:]), ["the number done + 1, not done"]),
        (
            lambda done, lr, b1, b2, eps, root: slope(
                done, lr, b1, b2, eps, root / (1 - b2 ** (done + 1))
            ),
            ["c does not divide it"],
        ),
        (lambda *a: -slope(*a), ["the sign is the other way round"]),
    ],
)  # fmt: skip
def test_slope_at_zero_explains(answer, words):
    fails("05.2", answer, words)


def coupled(theta, g, m, v, t, to_theta, to_m, to_v, lr, b1, b2, eps, decay, *, wrong=""):
    whole = g + decay * theta
    used = g if wrong in ("memory", "all") else whole
    factor = g if wrong in ("factor", "all") else whole
    alpha, c = lr / (1 - b1**t), (1 - b2**t) ** 0.5
    m, v = b1 * m + (1 - b1) * used, b2 * v + (1 - b2) * used**2
    r = v.sqrt() / c + eps
    m_bar = to_m - alpha / r * to_theta
    v_bar = to_v + alpha * m / (2 * c * r**2 * v.sqrt()) * to_theta
    to_g = (1 - b1) * m_bar + 2 * (1 - b2) * factor * v_bar
    before = to_theta + decay * to_g
    if wrong == "decoupled":
        before = (1 - lr * decay) * to_theta
    if wrong == "no path":
        before = to_theta
    if wrong == "not times decay":
        before = to_theta + to_g
    if wrong == "both":
        before = (1 - lr * decay) * to_theta + decay * to_g
    if wrong == "pair":
        return to_g, before
    return to_g, before, b1 * m_bar, b2 * v_bar


def test_pull_coupled():
    passes("05.3", coupled)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("no path", ["right for no weight decay and ḡ", "wrong for Δ_θ", "a second path"]),
        ("not times decay", ["Δ_θ (no weight decay)"]),
        ("both", ["with the decoupled factor as well"]),
        ("factor", ["right for no weight decay and weight decay, Δ'_m alone", "ḡ", "2(1 − β₂)g̃"]),
        ("all", ["λθ is left out"]),
        ("memory", ["m' and v' are made of g̃"]),
        ("pair", ["asked for are 4 tensors, ḡ, Δ_θ, Δ_m, Δ_v; for no weight decay came 2 values"]),
    ],
)
def test_pull_coupled_explains(wrong, words):
    fails("05.3", lambda *a: coupled(*a, wrong=wrong), words)


def test_decoupled_decay_is_told_from_coupled_where_only_the_parameters_matter():
    def decoupled(*a):
        return coupled(*a, wrong="decoupled" if a[5].any() and a[-1] else "")

    fails("05.3", decoupled, ["this is decoupled decay"])


def statistics(h, to_mean, to_var, kappa, less=1, center=True):
    from_var = 2 * (h - h.mean(0) if center else h) * to_var / (len(h) - less)
    return kappa * (to_mean / len(h) + from_var), (1 - kappa) * to_mean, (1 - kappa) * to_var


def test_pull_statistics():
    passes("05.4", statistics)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda *a: statistics(*a, less=0), ["right for the mean alone; wrong for Δ of h", "here by B"]),
        (lambda *a: statistics(*a, center=False), ["from the batch's mean"]),
        (lambda h, m, v, k: (statistics(h, m, v, k)[0] / k, *statistics(h, m, v, k)[1:]), ["κ is missing"]),
        (lambda h, m, v, k: (statistics(h, m, v, k)[0], m, v), ["Δ of the old mean", "factor 1 − κ"]),
        (lambda h, m, v, k: statistics(h, m, v, 1 - k), ["κ and 1 − κ are exchanged"]),
        (lambda h, m, v, k: (statistics(h, m, v, k)[0][0], m, v), ["shape is (3,)", "(5, 3)"]),
        (lambda h, m, v, k: statistics(h, m, v, k)[0], ["asked for are 3 tensors", "came Tensor"]),
    ],
)
def test_pull_statistics_explains(answer, words):
    fails("05.4", answer, words)


class Right(nn.Module):
    late = False

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        grown = (self.calls / 20).clamp(max=1.0)
        if self.training:
            self.calls += 1
        return x * (grown if self.late else (self.calls / 20).clamp(max=1.0))


class Late(Right):
    late = True


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * min(1.0, self.calls / 20)


class CountsInEval(Right):
    def forward(self, x):
        self.calls += 1
        return x * (self.calls / 20).clamp(max=1.0)


class ForgetsInEval(Right):
    def forward(self, x):
        return super().forward(x) if self.training else x


def test_warm_up():
    passes("05.5", Right)


@pytest.mark.parametrize(
    "answer, words",
    [
        (Plain, ["right for 25 training steps", "magic.Run refuses the layer", "'calls'"]),
        (Late, ["wrong for training step 1", "one behind"]),
        (CountsInEval, ["right for 25 training steps", "a call in eval mode counts as well"]),
        (ForgetsInEval, ["forgets how far it has grown"]),
        (Right(), ["the class of a layer"]),
        (lambda x: x, ["the class of a layer"]),
    ],
)
def test_warm_up_explains(answer, words):
    fails("05.5", answer, words)
