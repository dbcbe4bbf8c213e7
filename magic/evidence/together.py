"""Many retrainings of one run at once: the same batches, the same random numbers, other data weights.

The trainings that check a prediction differ in nothing but their weights. So they can go through each step
together, as one batch of R models (`torch.func.vmap` over parameters, buffers and weights), and share what
a step costs beside its arithmetic. On a small network that is most of it.

PyTorch computes R products of matrices by another kernel than one, which adds up in another order. So these
trainings differ from those one by one in their last bits, and a derivative is never compared with them to the
bit: a bank keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..training import determinism
from ..training.gradient import weighted_sum
from ..training.run import Run
from ..training.state import State

Stacked = dict[str, Tensor]  # name -> (R, ...)


def trained_together(run: Run, weights: Tensor) -> Iterator[State]:
    """The final states of R trainings with data weights (R, n), or (R, n, L), one after the other.

    They are those of `run.train` up to rounding. Raises NonFinite where one of them diverges, as that one
    alone would, and ValueError for an optimizer whose update is not elementwise (Muon, Adafactor), and for a
    model that torch.func.vmap cannot run, or whose random numbers are others under it.
    """
    check(run)
    weights = torch.stack([run.weights(w) for w in weights])
    try:
        with determinism.alone():
            params, buffers = _train(run, weights)
    except RuntimeError as error:
        if "vmap" not in str(error) and "functorch" not in str(error) and "atch" not in str(error):
            raise
        raise ValueError(
            f"together: torch.func.vmap cannot run this model or loss ({str(error).splitlines()[0]}); leave "
            "together= out, and the trainings are made one by one"
        ) from error
    for r in range(len(weights)):
        own = {name: p[r].clone() for name, p in params.items()}
        if not all(p.isfinite().all() for p in own.values()):
            run.train(weights[r], progress=False, allow_negative=True)  # says where it diverges
        yield State(own, {name: b[r].clone() for name, b in buffers.items()}, {}, run.steps)


def check(run: Run) -> None:
    """Raise ValueError for a run whose trainings cannot be made together."""
    if run.ranks is not None:
        raise ValueError("together: this run's batches are shared between ranks; leave together= out")
    whole = dict.fromkeys(update.told for update in run.updates if not update.elementwise)
    if whole:
        raise ValueError(
            f"together: the update of {', '.join(whole)} looks at a parameter as a whole, and many of them "
            "have no batched form here; leave together= out"
        )


def _train(run: Run, weights: Tensor) -> tuple[Stacked, Stacked]:
    """Every step, for all rows of the weights."""
    count = len(weights)

    def stacked(x: Tensor) -> Tensor:
        return x.expand(count, *x.shape).clone(memory_format=torch.contiguous_format)

    params = {name: stacked(p) for name, p in run.initial.params.items()}
    buffers = {name: stacked(b) for name, b in run.initial.buffers.items()}
    slots = {
        name: {
            slot: stacked(x) if x.is_floating_point() else x for slot, x in run.initial.slots[name].items()
        }
        for name in params
    }
    for t in range(run.steps):
        grads, buffers = _gradients(run, params, buffers, weights, t)
        if run.clip is not None:
            grads = vmap(run.clip.clip_by_hand)(grads)
        hyper = run.hypers[t]
        for name, g in grads.items():
            group = run.group_of[name]
            params[name], slots[name] = run.updates[group].rule(params[name], g, slots[name], hyper[group])
    return params, buffers


def _gradients(
    run: Run, params: Stacked, buffers: Stacked, weights: Tensor, t: int
) -> tuple[Stacked, Stacked]:
    """Step t's gradients of the parameters that it uses, and the buffers after it."""
    weight = weights[:, run.batches[t].to(weights.device)]
    grads: Stacked = {}
    after = buffers
    for part in range(run.accumulate):
        determinism.seed_step(run.seed, run.first + t, part)
        batch = run.batch(t, part)

        def total(params: dict, buffers: dict, weight: Tensor, batch=batch, part=part):
            losses, after = run.network.pure(lambda model: run.loss(model, *batch), params, buffers)
            return weighted_sum(run, losses, weight, t, part), after

        one, after = vmap(grad(total, has_aux=True), randomness="same")(params, after, weight)
        grads = {name: grads[name] + g if grads else g for name, g in one.items()}
    silent = [name for name, g in grads.items() if not g.any()]
    if silent or t in (0, run.steps // 2):
        alone = _alone(run, params, buffers, weight, t)
        _compare(run, {name: g[0] for name, g in grads.items()}, alone, t)
        # What a step does not use has gradient 0 here and none there, and an optimizer passes it over.
        grads = {name: g for name, g in grads.items() if alone[name] is not None}
    return grads, after


def _alone(run: Run, params: Stacked, buffers: Stacked, weight: Tensor, t: int) -> dict[str, Tensor | None]:
    """The gradients of the first row, by itself, as in training; None for what the step does not use."""
    with torch.enable_grad():
        leaves = {name: p[0].clone().requires_grad_() for name, p in params.items()}
        held = {name: b[0].clone() for name, b in buffers.items()}
        return run.gradient(leaves, held, weight[0], t).by_name


def _compare(run: Run, together: Stacked, alone: dict[str, Tensor | None], t: int) -> None:
    """Raise ValueError unless a gradient taken together is what it is alone, up to rounding."""
    pairs = [(g, together[name]) for name, g in alone.items() if g is not None]
    far = sum((a - b).square().sum() for a, b in pairs)
    size = sum(a.square().sum() for a, _ in pairs)
    limit = torch.finfo(run.dtype).eps ** 0.5
    if size < torch.inf and not far <= limit**2 * size:  # one that diverges is told of at its end
        raise ValueError(
            f"together: at step {t} the gradient taken together differs from that taken alone. An operation "
            "draws other random numbers under torch.func.vmap, as the dropout of fused attention does, or "
            "has a wrong batched form; leave together= out, and the trainings are made one by one"
        )
