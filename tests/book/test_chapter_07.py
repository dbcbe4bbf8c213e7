"""The checkers of chapter 07, capstone included, say what is wrong with what readers really write."""

from itertools import count
from math import comb

import pytest
import torch

from magic.book.exercises import capstone
from magic.book.exercises.judging import judge
from magic.book.exercises.small_run import small_run, states_of
from tests.support.answers import fails, passes

# -- the capstone, with a switch for each mistake -----------------------------------------------------


class Rebuilt:
    """REPLAY as a reader writes it; `wrong` names the mistakes that are made."""

    def __init__(self, *wrong):
        self.wrong = set(wrong)

    def __call__(self, run, phi, slots):
        wrong, T = self.wrong, len(run.order)
        self.run, self.slots = run, T if "keeps all" in wrong else slots + ("one too many" in wrong)
        self.kept = {0: (run.theta, torch.zeros_like(run.theta))}
        self.scores, self.cotangent, self.phi = torch.zeros_like(run.weights), None, phi
        if "never ends" in wrong:
            while True:
                pass
        if "recomputes for ever" in wrong:
            while True:
                self.advance(0, 1)
        self.reverse(0, T, self.slots)
        if "NaN" in wrong:
            self.scores[3] = float("nan")
        return -self.scores if "sign" in wrong else self.scores

    def gradient(self, theta, weight, t, graph=False):
        rows = self.run.order[t]
        total = (weight * self.run.losses(theta, rows)).sum()
        total = total if "sum" in self.wrong else total / len(rows)
        return torch.autograd.grad(total, theta, create_graph=graph)[0]

    def step(self, state, t):
        (theta, m), run, wrong = state, self.run, self.wrong
        if "wrong order" in wrong and self.cotangent is not None:
            t = len(run.order) - 2 - t
        weight = run.weights[run.order[t]]
        weight = torch.ones_like(weight) if "unweighted" in wrong else weight
        g = self.gradient(theta.detach().requires_grad_(), weight, t)
        if "in place" in wrong:
            m.mul_(run.mu).add_(g)
            return theta.sub_(run.rate * m), m
        m = run.mu * m + g
        return theta + (run.rate if "uphill" in wrong else -run.rate) * m, m

    def advance(self, a, b):
        theta, m = self.kept[a]
        if "buffer not kept" in self.wrong:
            m = torch.zeros_like(m)
        state = (theta, m) if "in place" in self.wrong and a else (theta.clone(), m.clone())
        for t in range(a, b):
            state = self.step(state, t)
        return state

    def pull(self, state, t):
        run, wrong, rows = self.run, self.wrong, self.run.order[t]
        if self.cotangent is None:
            end = self.step((state[0].clone(), state[1].clone()), t)[0].detach().requires_grad_()
            self.cotangent = torch.autograd.grad(self.phi(end), end)[0], torch.zeros_like(end)
        if "after the step" in wrong:
            state = self.step(state, t)
        to_theta, to_m = self.cotangent
        to_gradient = to_m - run.rate * to_theta
        theta, weight = state[0].detach().requires_grad_(), run.weights[rows].requires_grad_()
        used = weight * 0 + 1 + (weight - weight.detach()) if "pull unweighted" in wrong else weight
        g = self.gradient(theta, used, t, graph=True)
        curved, part = torch.autograd.grad(g, (theta, weight), to_gradient)
        part = part * len(rows) if "no 1/B in the scores" in wrong else part
        skip = 0 if "first" in wrong else len(run.order) - 1 if "last" in wrong else None
        if t != skip:
            if "overwrites" in wrong:
                self.scores[rows] = part
            elif "once a batch" in wrong:
                self.scores[rows] += part
            else:
                self.scores.index_add_(0, rows, part)
        buffer = torch.zeros_like(to_m) if "no buffer back" in wrong else run.mu * to_gradient
        self.cotangent = to_theta + curved, buffer

    def reverse(self, a, b, c):
        if b - a == 1 or c == 1:
            for t in reversed(range(a, b)):
                self.pull(self.advance(a, t), t)
            if "keeps none too few" not in self.wrong:
                del self.kept[a]
            return
        m = a + self.split(b - a, c)
        self.kept[m] = self.advance(a, m)
        self.reverse(m, b, c - 1)
        self.reverse(a, m, c - 1 if "wastes a place" in self.wrong else c)

    def split(self, T, c):
        if "halves" in self.wrong:
            return T // 2
        r = 0
        while comb(c + r, c) < T:
            r += 1
        return min(comb(c + r - 1, c), T - comb(c + r - 2, c - 1))


def test_the_capstone_can_be_solved():
    ok, text = judge("07.9", Rebuilt())
    assert ok and text == "✓ 07.9: right. You wrote REPLAY, in your own words.", text


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("keeps all", ["right for", "20 steps with 3 states: the scores are right", "slots is 3"]),
        ("one too many", ["the scores are right, but", "4 states are in memory at once, and slots is 3"]),
        ("halves", ["the scores are right, but run.losses is called", "calls are enough"]),
        ("wastes a place", ["the scores are right, but run.losses is called", "one more to the end"]),
        ("buffer not kept", ["momentum buffer was zero", "parameters and buffer"]),
        ("no buffer back", ["right for two steps without momentum", "cotangent of the momentum buffer"]),
        ("unweighted", ["done without the data weights"]),
        ("pull unweighted", ["the pull takes all data weights as 1"]),
        ("sign", ["the sign is the other way round"]),
        ("uphill", ["goes uphill"]),
        ("first", ["the first step, t = 0, is missing"]),
        ("last", ["the last step, t = T − 1, is missing"]),
        ("after the step", ["the state after the step", "is at s_t"]),
        ("wrong order", ["own batches, in their own order"]),
        ("overwrites", ["overwritten where an example comes again"]),
        ("once a batch", ["right for two steps without", "use index_add_"]),
        ("sum", ["1/B is missing"]),
        ("no 1/B in the scores", ["off by a factor of 4, everywhere: the mean's 1/B is missing"]),
        ("in place", ["changed in place"]),
        ("NaN", ["not finite"]),
        ("recomputes for ever", ["Does the schedule ever end?"]),
    ],
)  # fmt: skip
def test_the_capstone_can_be_failed(mistake, words):
    fails("07.9", Rebuilt(mistake), words)


def test_a_capstone_that_never_ends_is_stopped():
    ok, text = judge("07.9", Rebuilt("never ends"), seconds=1)
    assert not ok and "no answer after 1 seconds" in text


def given_in_place(run, phi, slots):
    found = Rebuilt()(run, phi, slots)
    run.theta.zero_()
    return found


def given_in_place_at_once(run, phi, slots):
    run.theta.mul_(2)
    return Rebuilt()(run, phi, slots)


def other_rows(run, phi, slots):
    return run.losses(run.theta, torch.arange(3))


@pytest.mark.parametrize(
    "answer, words",
    [
        (given_in_place, ["the scores are right, but run.theta", "in place"]),
        (given_in_place_at_once, ["run.theta, which you were given, has been changed in place"]),
        (other_rows, ["no batch of the run"]),
        (3, ["asked for is a function"]),
        (None, ["there is no answer yet"]),
        (lambda run, phi, slots: None, ["returned None"]),
        (lambda run, phi, slots: run.theta, ["the shape is (21,), and it should be (10,)"]),
        (lambda run: None, ["raised TypeError"]),
    ],
)
def test_other_answers_to_the_capstone(answer, words):
    fails("07.9", answer, words)


def test_states_in_one_tensor_are_found():
    run = small_run(steps=6)
    watch = capstone.Watch(run, states_of(run), most=100, slots=6)
    with watch:
        thetas = torch.stack([theta for theta, _ in watch.states])
        watch.given.losses(watch.given.theta, run.order[0])
        del thetas
    assert len(watch.kept) == 5  # all but the one in work and the last


# -- the others ----------------------------------------------------------------------------------------


def optimum(T, c):
    r = 0
    while comb(c + r, c) < T:
        r += 1
    return r * T - comb(c + r, c + 1)


def extra_steps(T, budget, state, trace, up=0, training=1):
    states = (budget - trace + up) // state
    return optimum(T, min(states, T)) - (T - 1) * training if states >= 1 else None


def agrees(phi, gradient, w, epsilon=1e-5, tolerance=1e-5, directions=None, forward=False):
    for _ in range(2):
        v = torch.randn_like(w) if directions is None else directions(w, gradient)
        if forward:
            slope = (phi(w + epsilon * v) - phi(w)) / epsilon
        else:
            slope = (phi(w + epsilon * v) - phi(w - epsilon * v)) / (2 * epsilon)
        if abs(slope - (gradient @ v).item()) > tolerance * (
            gradient.norm() * v.norm() / 50**0.5 + abs(slope)
        ):
            return False
    return True


CALLS = count()


def fixed(w, gradient):
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)


def first(w, gradient):
    return torch.eye(50, dtype=w.dtype)[0]


def fingerprint(x):
    return x.view(torch.int32).sum(dtype=torch.int64).item()


@pytest.mark.parametrize("number, answer", [("07.1", extra_steps), ("07.2", agrees), ("07.3", fingerprint)])
def test_right_answers(number, answer):
    passes(number, answer)


@pytest.mark.parametrize(
    "number, answer, words",
    [
        ("07.1", lambda T, b, s, t: extra_steps(T, b, s, 0), ["the trace needs room, too"]),
        ("07.1", lambda T, b, s, t: extra_steps(T, b, s, t, up=s - 1), ["right for 10", "round down"]),
        ("07.1", lambda T, b, s, t: extra_steps(T, b, s, t, up=s), ["the start is one of the states"]),
        ("07.1", lambda T, b, s, t: extra_steps(T, b, s, t, training=0), ["those of the training"]),
        ("07.1", lambda T, b, s, t: extra_steps(T, b, s, t) or 0, ["no state", "None is asked for"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, epsilon=1e-3), ["strongly curved", "take it smaller"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, epsilon=1e-9), ["about 100,000", "take it larger"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, tolerance=0.1), ["tolerance too wide"]),
        ("07.2", lambda p, g, w: agrees(p, 2 * g, w), ["a right gradient: it was refused"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, directions=lambda w, g: g), ["along the given gradient"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, directions=lambda w, g: w * 0 + 1), ["by the same amount"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, directions=first), ["last entry"]),
        ("07.2", lambda p, g, w: agrees(p, g, w, directions=fixed), ["the same in every call"]),
        ("07.2", lambda p, g, w: 0.99, ["asked for is True or False"]),
        ("07.2", lambda p, g, w: all(p(w + 0 * i) < 1e9 for i in range(99)), ["phi was called 99 times"]),
        ("07.3", lambda x: x.sum().item(), ["asked for is an int"]),
        ("07.3", lambda x: round(x.double().sum().item() * 1e9), ["lowest bit", "rounded away"]),
        ("07.3", lambda x: hash(tuple(x.tolist())), ["sign of a zero", "as numbers"]),
        ("07.3", lambda x: next(CALLS), ["equal bits: the fingerprints differ"]),
        ("07.3", lambda x: fingerprint(x[:500]), ["leaves the fingerprint as it was"]),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_explained(number, answer, words):
    fails(number, answer, words)
