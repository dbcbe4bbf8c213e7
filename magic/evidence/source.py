"""SOURCE: influence through a training that is approximated in segments, on kronfluence's EK-FAC factors.

Source: Bae et al. 2024, arXiv 2405.12186, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..attribution import Attribution
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .classes import classes_of
from .ekfac import fit, is_conv1d, layers_of
from .estimates import Tensors, checked, estimate, gradients, quietly, times

Blocks = dict[str, Tensor]  # layer -> (rows, out, in), with the bias as the last column


def source(run: Run, test: Tensors, states: list[State], *, pace: float = 1.0, batch_size=64) -> Attribution:
    """SOURCE: approximate unrolled differentiation, a segment of the training for each state.

    In a segment, gradients and curvature are taken to be those of its state. Gradient descent on a quadratic
    for a time τ = Σ η then has a closed form, and the derivative goes back through the segments, last first:

        values[k, i] = −(1/n) Σ_segments q · (1 − exp(−τH)) H⁻¹ g_i,     q ← exp(−τH) q

    with q the gradient of the test example at the last state, and H the EK-FAC curvature of `ekfac` at the
    segment's state, plus the weight decay.

    states  states of the run, the trained one last. The training is divided into segments in the middle
            between two of them
    pace    a factor on the rates, to be tuned for an optimizer that is not gradient descent: with momentum
            μ, SGD's rates are taken as η/(1 − μ), those of others as they are

    Only the layers are covered that `ekfac` covers; it costs one of its fits for each state. Of a weight that
    an embedding shares the gradient is that of both uses. Raises ValueError and ImportError as `ekfac` does,
    and ValueError unless pace > 0.
    """
    test, states = checked(run, test, states, batch_size)
    if not pace > 0:
        raise ValueError(f"pace={pace!r}: a positive factor on the rates")
    layers, classes = layers_of(run, states[-1], test), classes_of(run, test, states[-1])
    with determinism.alone(run.seed):
        pulled = _gather(run, states[-1], test, layers, batch_size)
        values = torch.zeros(len(test[0]), run.n, dtype=run.dtype, device=run.device)
        for state, time, decay in reversed(_segments(run, states, layers, pace)):
            factors = _factors(run, state, layers, classes, batch_size)
            filtered, kept = _through(pulled, factors, time, decay)
            done = 0
            for own in _batches(run, state, run.data, layers, batch_size):
                products = [filtered[name].flatten(1) @ g.flatten(1).T for name, g in own.items()]
                until = done + products[0].shape[1]
                values[:, done:until] -= torch.stack(products).sum(0) / run.n
                done = until
            pulled = kept
    return estimate(run, test, states[-1], values)


def _segments(
    run: Run, states: list[State], layers: list[str], pace: float
) -> list[tuple[State, dict, dict]]:
    """Of each segment its state, and for each layer the time τ and the mean weight decay."""
    steps = [state.step for state in states]
    if steps != sorted(set(steps)):
        raise ValueError(f"the states are those of steps {steps}: give each once, in the order of the run")
    ends = [0, *((a + b) // 2 for a, b in pairwise(steps)), run.steps]
    groups = {layer: run.group_of[_name(run, layer)] for layer in layers}
    all_times, found = times(run), []
    for state, (a, b) in zip(states, pairwise(ends), strict=True):
        time = {k: pace * sum(t[g] for t in all_times[a:b]) for k, g in groups.items()}
        decays = {
            k: [hyper[g].get("weight_decay") or 0.0 for hyper in run.hypers[a:b]] for k, g in groups.items()
        }
        found.append((state, time, {k: sum(x) / max(1, len(x)) for k, x in decays.items()}))
    return found


def _factors(run: Run, state: State, layers: list[str], classes, size: int) -> dict[str, tuple]:
    """Layer -> (the eigenvectors of the gradients' side, of the inputs' side, the eigenvalues)."""
    with quietly() as folder:
        analyzer = fit(run, state, layers, classes, folder, ("ekfac", size))
        found = analyzer.load_all_factors("factors")
    return {
        name: (
            found["gradient_eigenvectors"][name].to(run.device, run.dtype),
            found["activation_eigenvectors"][name].to(run.device, run.dtype),
            (found["lambda_matrix"][name] / found["num_lambda_processed"][name]).to(run.device, run.dtype),
        )
        for name in layers
    }


def _through(pulled: Blocks, factors: dict, time: dict, decay: dict) -> tuple[Blocks, Blocks]:
    """(1 − exp(−τH))/H and exp(−τH), applied to what was pulled back to the segment's end."""
    filtered, kept = {}, {}
    for name, q in pulled.items():
        left, right, values = factors[name]
        inside = left.T @ q @ right
        curvature = (values.clamp_min(0.0) + decay[name]).clamp_min(1e-30)
        shrunk = torch.exp(-time[name] * curvature)
        share = -torch.expm1(-time[name] * curvature) / curvature
        filtered[name], kept[name] = (left @ (inside * x) @ right.T for x in (share, shrunk))
    return filtered, kept


def _batches(run: Run, state: State, examples: Tensors, layers: list[str], size: int) -> Iterator[Blocks]:
    """The gradients of the examples, a batch at a time. What is not trained has the gradient 0."""
    widths = [p.numel() for p in state.params.values()]
    for flat in gradients(run, state, examples, size):
        by_name, blocks = dict(zip(state.params, flat.split(widths, dim=1), strict=True)), {}
        for layer in layers:
            name, module = _name(run, layer), run.network.module.get_submodule(layer)
            block = by_name[name].view(len(flat), *state.params[name].shape)
            block = block.transpose(1, 2) if is_conv1d(module) else block.flatten(2)
            if module.bias is not None:
                bias = by_name.get(f"{layer}.bias", torch.zeros_like(block[:, :, 0]))
                block = torch.cat([block, bias.unsqueeze(2)], dim=2)
            blocks[layer] = block
        yield blocks


def _gather(run: Run, state: State, examples: Tensors, layers: list[str], size: int) -> Blocks:
    """The gradients of all the examples, by layer."""
    parts = list(_batches(run, state, examples, layers, size))
    return {name: torch.cat([blocks[name] for blocks in parts]) for name in layers}


def _name(run: Run, layer: str) -> str:
    """The name of the layer's weight among the run's parameters; a tied one has that of its first owner."""
    weight = run.network.module.get_submodule(layer).weight
    return next(name for name, p in run.network.module.named_parameters() if p is weight)
