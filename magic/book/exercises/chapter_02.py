"""The exercises of chapter 02: a pure step, the influence function, and the series that leads to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise

RATE, KEEP, WARM = 0.1, 0.9, 10  # of exercise 02.1


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator(seed))


@exercise("02.1", "a pure step of SGD with a warm-up and an average of the parameters")
def pure_step(answer) -> None:
    cases = Cases({})
    theta, average, gradient = (_randn(4, seed=seed) for seed in range(3))

    def given(t: int) -> dict:
        return {"params": theta.clone(), "average": average.clone(), "step": t}

    for case, t in (("a step after the warm-up", 12), ("a step of the warm-up", 3)):
        rate = RATE * min(1, (t + 1) / WARM)
        new = theta - rate * gradient
        got = cases.call(case, answer, given(t), gradient)
        wrong = {
            "the rate is η t / 10, which is zero in step 0": theta - RATE * min(1, t / WARM) * gradient,
            "the rate is η from the start": theta - RATE * gradient,
        }
        cases.same(f"params in {case}", _field(cases, got, "params"), new, wrong if t < WARM else {})
        cases.same(
            f"average in {case}",
            _field(cases, got, "average"),
            KEEP * average + (1 - KEEP) * new,
            {
                "it takes in the parameters before the step, not those after it": KEEP * average
                + (1 - KEEP) * theta,
                "0.9 and 0.1 are the other way round": (1 - KEEP) * average + KEEP * new,
            },
        )
        _counts(cases, case, _field(cases, got, "step"), t)
    _is_pure(cases, answer, given(12), gradient)
    gradient.requires_grad_()
    new = cases.call("a derivative", lambda: answer(given(12), gradient))["params"]
    cases.true(
        "a derivative",
        new.requires_grad,
        "the new parameters have forgotten that they depend on the gradient. Is there a `detach`, a `.data` "
        "or a `no_grad`",
    )


def _field(cases: Cases, got, name: str):
    if not isinstance(got, dict) or name not in got:
        raise Wrong(f"asked for is a new state: a dict with params, average and step, but no {name!r} came.")
    return got[name]


def _counts(cases: Cases, case: str, got, t: int) -> None:
    forgot = "the step is still that of before, so the warm-up would never end"
    cases.true(f"step in {case}", got == t + 1, forgot if got == t else f"it is {got}, and should be {t + 1}")


def _is_pure(cases: Cases, answer, state: dict, gradient: Tensor) -> None:
    """Its argument stays what it was, and what comes out depends on nothing else."""
    before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    first = cases.call("the state it was given", lambda: answer(state, gradient))
    for name, value in before.items():
        cases.true(
            f"the {name} it was given",
            torch.equal(torch.as_tensor(state[name]), value),
            f"your function changes the {name} of the state it was given, so nobody can go back to it",
        )
    second = cases.call("the same call again", lambda: answer(state, gradient))
    cases.true(
        "the same call again",
        torch.equal(first["params"], second["params"]),
        "another state came out. Something that the step reads is not in its arguments",
    )


@exercise("02.2", "the influence function of ridge regression")
def ridge_influence(answer) -> None:
    n, d = 12, 3
    cases = Cases({"the 1/B": 1 / n})
    x, y, query = _randn(n, d, seed=0), _randn(n, seed=1), _randn(d, seed=2)
    ones = torch.ones(n, dtype=x.dtype)
    uneven = 0.5 + torch.rand(n, dtype=x.dtype, generator=_generator(3))
    for case, decay, w in (
        ("all weights 1 and no decay", 0.0, ones),
        ("weight decay", 0.3, ones),
        ("weights that are not 1", 0.3, uneven),
    ):
        want = _ridge(x, y, query, decay, w)
        cases.same(
            case,
            cases.call(case, answer, x, y, query, decay, w),
            want,
            _ridge_suspects(x, y, query, decay, w, want),
        )


def _ridge(x, y, query, decay, w) -> Tensor:
    """The derivative of the minimiser's prediction, by autograd through its closed form."""
    w = w.clone().requires_grad_()
    return torch.autograd.grad(query @ _minimiser(x, y, decay, w), w)[0]


def _minimiser(x, y, decay, w) -> Tensor:
    return torch.linalg.solve(_hessian(x, decay, w), x.T @ (w * y) / len(x))


def _hessian(x, decay, w) -> Tensor:
    return (x.T * w) @ x / len(x) + decay * torch.eye(x.shape[1], dtype=x.dtype)


def _ridge_suspects(x, y, query, decay, w, want) -> dict[str, Tensor]:
    n, ones = len(x), torch.ones_like(w)

    def formula(hessian: Tensor, theta: Tensor) -> Tensor:
        return -query @ torch.linalg.solve(hessian, (x @ theta - y) * x.T) / n

    best, plain = _minimiser(x, y, decay, w), _minimiser(x, y, decay, ones)
    suspects = {
        "the sign is the other way round: where ∇φ and ∇ℓ point the same way, more weight lowers φ": -want,
        "this is the prediction for a removal by Koh & Liang's scaling: sign and 1/B": -n * want,
        "the weight decay is missing in the Hessian": formula(_hessian(x, 0.0, w), best),
        "the decay is multiplied by n": formula(_hessian(x, n * decay, w), best),
        "the gradients are multiplied by the weights": w * want,
        "the Hessian has no weights in it": formula(_hessian(x, decay, ones), best),
        "the parameters are fitted with all weights 1": formula(_hessian(x, decay, w), plain),
        "the weights are nowhere in it": formula(_hessian(x, decay, ones), plain),
    }
    return {reason: value for reason, value in suspects.items() if not torch.equal(value, want)}


@exercise("02.3", "the truncated Neumann series of an inverse, times a vector")
def neumann(answer) -> None:
    rate = 0.2
    cases = Cases({"η": rate})
    root, vector = _randn(4, 3, seed=0), _randn(3, seed=1)
    full = root.T @ root / 4 + 0.1 * torch.eye(3, dtype=root.dtype)
    singular = torch.outer(root[0], root[0])
    for case, hessian, steps in (
        ("one step", full, 1),
        ("two steps", full, 2),
        ("fifty steps", full, 50),
        ("a singular Hessian", singular, 50),
    ):
        want = _neumann(hessian, vector, rate, steps)
        suspects = {
            "there is one term too many; k goes up to T − 1": _neumann(hessian, vector, rate, steps + 1),
            "there is one term too few; k starts at 0": _neumann(hessian, vector, rate, steps - 1),
            "the sum starts at k = 1": _neumann(hessian, vector, rate, steps + 1) - rate * vector,
            "the powers are of I − H, without η": rate * _neumann(hessian, vector, 1.0, steps),
            "this is the last power alone, without the sum": _power(hessian, vector, rate, steps),
        }
        if hessian is full:
            suspects["this is H⁻¹v, the limit of infinitely many steps"] = torch.linalg.solve(full, vector)
        cases.same(case, cases.call(case, answer, hessian, vector, rate, steps), want, suspects)


def _neumann(hessian: Tensor, vector: Tensor, rate: float, steps: int) -> Tensor:
    total, term = torch.zeros_like(vector), vector
    for _ in range(steps):
        total, term = total + rate * term, term - rate * hessian @ term
    return total


def _power(hessian: Tensor, vector: Tensor, rate: float, steps: int) -> Tensor:
    return (
        torch.linalg.matrix_power(torch.eye(len(vector), dtype=vector.dtype) - rate * hessian, steps) @ vector
    )


@exercise("02.4", "one step of the derivative, for gradient descent with momentum")
def momentum_tangent(answer) -> None:
    d, n, rate = 3, 5, 0.1
    cases = Cases({"η": rate})
    jacobian, memory, slopes = (_randn(d, n, seed=seed) for seed in range(3))
    root = _randn(d, d, seed=3)
    hessian = root @ root.T
    for case, start, memory_now, mu in (
        ("the first step, from J = M = 0", torch.zeros_like(jacobian), torch.zeros_like(memory), 0.9),
        ("momentum 0", jacobian, memory, 0.0),
        ("momentum 0.9", jacobian, memory, 0.9),
    ):
        got = cases.call(case, answer, start, memory_now, hessian, slopes, rate, mu)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Wrong("asked for are two matrices, `return jacobian, memory`.")
        plain = hessian @ start + slopes / n
        want = mu * memory_now + plain
        cases.same(
            f"the memory in {case}",
            got[1],
            want,
            {
                "the 1/B in front of the examples' gradients is missing": mu * memory_now
                + hessian @ start
                + slopes,
                "H J is missing: the gradient moves because the parameters moved": mu * memory_now
                + slopes / n,
                "the old memory is not multiplied by μ": memory_now + plain,
                "the old memory is left out": plain,
                "the sign of the new part is the other way round": mu * memory_now - plain,
            },
        )
        cases.same(
            f"the jacobian in {case}",
            got[0],
            start - rate * want,
            {
                "it uses the memory from before the step": start - rate * memory_now,
                "it uses the gradient's part alone, without momentum": start - rate * plain,
                "the sign is the other way round: a step goes down": start + rate * want,
            },
        )
