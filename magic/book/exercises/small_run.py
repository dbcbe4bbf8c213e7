"""The small run of the capstone, its states and its scores in the simplest way and with mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SmallRun(NamedTuple):
    """A training by SGD with momentum, as exercise 07.9 describes it; `phi` is an output to try."""

    losses: Callable[[Tensor, Tensor], Tensor]
    theta: Tensor
    weights: Tensor
    order: Tensor
    rate: float
    mu: float
    phi: Callable[[Tensor], Tensor]


def small_run(steps: int = 12, mu: float = 0.9, seed: int = 0, twice: bool = False) -> SmallRun:
    """A network of 21 parameters on 10 examples, in batches of 4; with `twice`, one of them twice."""
    dice = torch.Generator().manual_seed(seed)
    inputs = torch.randn(13, 3, generator=dice, dtype=torch.float64)
    wanted = torch.sin(inputs.sum(1))
    theta = 0.5 * torch.randn(21, generator=dice, dtype=torch.float64)
    weights = 0.5 + torch.rand(10, generator=dice, dtype=torch.float64)
    order = torch.stack([torch.randperm(10, generator=dice)[:4] for _ in range(steps)])
    if twice:
        order[::2, 1] = order[::2, 0]

    def predicted(theta: Tensor, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ theta[:12].view(3, 4) + theta[12:16])
        return hidden @ theta[16:20] + theta[20]

    def losses(theta: Tensor, rows: Tensor) -> Tensor:
        return (predicted(theta, inputs[:10][rows]) - wanted[:10][rows]) ** 2

    def phi(theta: Tensor) -> Tensor:
        return torch.cosh(predicted(theta, inputs[10:])).sum()

    return SmallRun(losses, theta, weights, order, 0.1, mu, phi)


def gradient(run: SmallRun, theta: Tensor, weight: Tensor, rows: Tensor, graph: bool = False) -> Tensor:
    total = (weight * run.losses(theta, rows)).sum() / len(rows)
    return torch.autograd.grad(total, theta, create_graph=graph)[0]


def step(run: SmallRun, state: tuple, rows: Tensor, *, weighted: bool = True, sign: float = 1.0) -> tuple:
    """One step from (theta, m); with a keyword, as somebody might get it wrong."""
    theta, m = state
    weight = run.weights[rows] if weighted else torch.ones_like(run.weights[rows])
    m = run.mu * m + gradient(run, theta.detach().requires_grad_(), weight, rows)
    return theta - sign * run.rate * m, m


def states_of(run: SmallRun) -> list[tuple]:
    """Every (theta, m) of the training."""
    states = [(run.theta, torch.zeros_like(run.theta))]
    for rows in run.order:
        states.append(step(run, states[-1], rows))
    return states


def scores_of(
    run: SmallRun,
    states: list,
    *,
    buffer: bool = True,
    weighted: bool = True,
    add: str = "all",
    skip: int = -1,
) -> Tensor:
    """∂φ/∂w from all states; with a keyword, what a reader gets who forgets a part."""
    end = states[-1][0].detach().requires_grad_()
    to_theta, to_m = torch.autograd.grad(run.phi(end), end)[0], torch.zeros_like(run.theta)
    found = torch.zeros_like(run.weights)
    for t in reversed(range(len(run.order))):
        rows, theta = run.order[t], states[t][0].detach().requires_grad_()
        weight = (run.weights[rows] if weighted else torch.ones_like(run.weights[rows])).requires_grad_()
        to_gradient = to_m - run.rate * to_theta
        g = gradient(run, theta, weight, rows, graph=True)
        curved, part = torch.autograd.grad(g, (theta, weight), to_gradient)
        if t != skip:
            if add == "all":
                found.index_add_(0, rows, part)
            elif add == "last of a batch":
                found[rows] = found[rows] + part
            else:
                found[rows] = part
        to_theta, to_m = to_theta + curved, run.mu * to_gradient * buffer
    return found
