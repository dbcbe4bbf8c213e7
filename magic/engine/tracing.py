"""The trace of a training step: the graph of its gradient, which its adjoint pulls cotangents back through.

The graph is recorded around the very function that training calls, so that a trace may stand for a step. Its
leaves are all that the gradient is a function of: parameters, buffers, data weights and, where they are asked
for, the training inputs themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.gradient import Gradient, Inputs, gradient_of_part, parts_here
from ..training.record import Passed
from ..training.run import Run
from ..training.state import State
from .refusals import refusing


def leaves_of(tensors: dict) -> dict:
    """The same values as new leaves of a graph, to differentiate with respect to."""
    return {k: x.detach().requires_grad_() for k, x in tensors.items()}


@dataclass(frozen=True, eq=False)
class Part:
    """The graph of the gradient of a step's batch, or of a part of it (`Run(accumulate=)`).

    params, buffers, weight   the leaves of the graph
    gradient   what they give, as functions of the leaves
    data       further leaves, place in run.data -> the rows of this part; empty if they were not asked for
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weight: Tensor
    gradient: Gradient
    data: dict[int, Tensor]

    @property
    def outputs(self) -> list[Tensor]:
        """The gradients of the parameters that this part uses."""
        return [g for g in self.gradient.by_name.values() if g is not None]


@dataclass(frozen=True, eq=False)
class Traced:
    """Step t with the graph of its gradient: all that its pull needs.

    state      s_t
    gradient   the sum over the parts, without a graph
    after      s_{t+1}, or None where it was not asked for
    last       the last part, from which the pull begins
    begins     the buffers that each part begins with, and the names of those that carry a derivative
    """

    state: State
    gradient: Gradient
    after: State | None
    last: Part
    begins: tuple[tuple[dict[str, Tensor], list[str]], ...]

    @property
    def grads(self) -> dict[str, Tensor]:
        """name -> gradient, of the parameters that the step uses."""
        return {name: g for name, g in self.gradient.by_name.items() if g is not None}

    @property
    def escaped(self) -> tuple[str, ...]:
        """Ways on which a number that depends on the parameters may have left the graph."""
        return self.gradient.escaped


def trace(
    run: Run,
    state: State,
    weights: Tensor,
    step: bool = True,
    passed: Passed | None = None,
    data: bool = False,
) -> Traced:
    """Do step t with its gradient's own graph recorded; with `step`, go on to s_{t+1}, and with `data` the
    floating-point tensors of the batch are leaves of the graph, too.

    Invariant: s_{t+1} has training's bits. The graph is recorded around the very operations that training
    uses, so what they return is what training got. Only where an expression with other bits stood in for an
    operation is the step done once more, as in training. So a trace may take the place of a step, and one
    made on the way down serves for the adjoint too. The total loss is compared with the one that training
    `passed` here.

    A batch that is done in parts is traced part by part, and of these graphs only the last is kept, so that
    no more memory is needed than for one. The pull traces the others again.

    A `detach` in the loss is in the graph as a stop, which has two phases. While the gradient is taken,
    inside `run.gradient`, it hands nothing back: the step is that of the plain loop. From then on it is the
    identity: the value that was held fixed in this step moves with the parameters from step to step, and the
    derivative of the step flows through it. A trace is always in the second phase.
    """
    t, begins = state.step, [(state.buffers, run.moved(state))]
    whole: Gradient | None = None
    weight = weights[run.batches[t].to(weights.device)].detach()
    parts = parts_here(run)
    for part in parts:
        last = trace_part(run, state, begins[-1], weight, part, data)
        one = last.gradient.detached()
        whole = one if whole is None else whole.plus(one)
        moved = state.moved | whole.written
        begins.append(
            (whole.buffers, [k for k, b in whole.buffers.items() if k in moved and b.is_floating_point()])
        )
        if part != parts[-1]:
            del last  # its graph must be gone before the next is made
    assert whole is not None, "a batch has at least one part"
    whole = whole if run.ranks is None else run.ranks.whole(whole, state.params)
    after = None
    if step and whole.same_bits:
        after = run.moved_on(state, weight, whole, passed)
    elif step:
        after = run.step(state, weights, passed)
    elif passed is not None:
        total = whole.total.item() if whole.same_bits else run.total(state, weights)
        passed.witness(t, total)
    return Traced(state, whole, after, last, tuple(begins[:-1]))


def trace_part(
    run: Run, state: State, begins: tuple[dict[str, Tensor], list[str]], weight: Tensor, part: int, data: bool
) -> Part:
    """The graph of the gradient of a part of the batch.

    begins  the buffers that it begins with, and the names of those that carry a derivative
    data    whether the floating-point tensors of the batch are leaves as well
    """
    t, (buffers, moved) = state.step, begins
    with torch.enable_grad(), refusing(f"step {t}"):
        params = leaves_of(state.params)
        held = buffers | leaves_of({name: buffers[name] for name in moved})
        weight, rows, batch = weight.detach().requires_grad_(), {}, None
        if data:
            given = run.batch(t, part)
            rows = leaves_of({i: x for i, x in enumerate(given) if x.is_floating_point()})
            # The loss gets copies, since it may write into its batch and nobody may write into a leaf.
            batch = tuple(rows[i].clone() if i in rows else x for i, x in enumerate(given))
        found = gradient_of_part(run, Inputs(params, held, weight, batch), t, part, create_graph=True)
    return Part(params, {name: held[name] for name in moved}, weight, found, rows)
