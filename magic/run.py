"""Run: a training run as a pure function of its data weights.

    s_{t+1} = step(s_t, batch_t, weights),    g_t = d/dparams  Σ wᵢ ℓᵢ(params, batch_t) / B

MAGIC (Ilyas & Engstrom 2025, arXiv 2504.16430), section 2. With all weights 1 the states are, bit
for bit, those of the plain loop

    optimizer.zero_grad(); loss(model, x, y).mean().backward(); optimizer.step(); scheduler.step()

under `determinism.fix()`; where step t draws random numbers, after `determinism.seed_step(seed, t)`;
on CUDA with the optimizer's `foreach=False`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import determinism, inputs, optim
from .equivalents import differentiable, measuring
from .show import bar
from .state import State
from .trial import first_step
from .verify import Passed


class NonFinite(ArithmeticError):
    """A number of the run became NaN or infinite; the message says at which step and where."""


def batches(n: int, size: int, epochs: int, seed: int = 0) -> Tensor:
    """The order of training: a (T, B) tensor of indices into n examples, T = epochs · (n // size).

    Each epoch is a fresh permutation; the n % size examples left over at its end are skipped, others
    in each epoch, so that every batch has the same size. The order depends on `seed` alone.
    """
    if not 1 <= size <= n:
        raise ValueError(f"size={size}: a batch holds between 1 and n={n} examples")
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least one epoch is needed")
    generator = torch.Generator().manual_seed(seed)
    per_epoch = n // size
    orders = [torch.randperm(n, generator=generator, device="cpu")[: per_epoch * size] for _ in range(epochs)]
    return torch.stack(orders).reshape(epochs * per_epoch, size)


class _Call(nn.Module):
    """f(model, ...) as a module's forward, so that functional_call can put tensors into the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, f: Callable, *args):
        return f(self.model, *args)


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a step's backward pass returns.

    total      the weighted loss, a scalar
    by_name    parameter -> gradient, or None where the step does not use the parameter
    buffers    the buffers after the forward pass
    same_bits  no operation was replaced by one with other bits
    """

    total: Tensor
    by_name: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    same_bits: bool


class Run:
    """A deterministic training run, ready to be trained, replayed and differentiated.

    model      any nn.Module in float32 or float64; its values now are s_0. It is copied, never
               changed. It trains in the mode (train or eval) each of its modules is in now.
    optimizer  torch.optim.SGD, Adam or AdamW over its parameters; read, never stepped. A parameter group
               of Adam may have "eps_root", added under the root, which torch.optim does not know
    data       a tuple of tensors with the n examples first, or a map-style Dataset
    loss       loss(model, *batch) -> (B,), one number per example
    batches    a (T, B) index tensor, or a sequence of T index tensors
    scheduler  a torch.optim.lr_scheduler, stepped once per training step; read on a copy
    normalize  "batch": Σ wᵢℓᵢ / B with B the batch's size, as in MAGIC.
               "weights": Σ wᵢℓᵢ / Σ wᵢ, what leaving the rows out of the batch does.
    seed       every random number that step t draws is a function of (seed, t)

    Creating a Run tries its first step twice, so a mistake is told here and not after an hour.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data,
        loss: Callable[..., Tensor],
        batches: Tensor | Sequence,
        scheduler=None,
        *,
        normalize: str = "batch",
        seed: int = 0,
    ):
        if normalize not in ("batch", "weights"):
            raise ValueError(f'normalize={normalize!r}: choose "batch" (Σwℓ/B) or "weights" (Σwℓ/Σw)')
        inputs.check_arguments(model, loss, seed)
        inputs.check_model(model)
        self.rule, self.group_of = optim.read(optimizer, model)
        self.data, self.n = inputs.check_data(data)
        self.batches = inputs.check_batches(batches, self.n)
        self.hypers = optim.hypers(optimizer, scheduler, len(self.batches))
        self.loss, self.normalize, self.seed = loss, normalize, seed
        self._adopt(inputs.frozen_copy(model, keep=self.group_of))
        named = dict(self._model.named_parameters())
        first = named[next(iter(self.group_of))]
        self.device, self.dtype = first.device, first.dtype
        self._passed: dict[str, Passed] = {}
        params = {name: p.detach().clone() for name, p in named.items() if name in self.group_of}
        buffers = {name: b.detach().clone() for name, b in self._model.named_buffers()}
        self.initial = State(params, buffers, {name: {} for name in params})
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._outside = weakref.WeakValueDictionary(model.named_parameters())
        first_step(self, model)

    def _adopt(self, model: nn.Module) -> None:
        self._model, self._call = model, _Call(model)

    # -- what a user calls -------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return len(self.batches)

    def train(self, weights=None, progress: bool = True, *, allow_negative: bool = False) -> State:
        """f(w): the final state. `weights` is (n,), or one number for all; None means 1.

        Raises NonFinite, with the step, when the training diverges, and ReplayMismatch when an
        earlier training of this Run with these weights was in another state at a step compared.
        A training that is to survive a kill is `magic.train(run, disk=folder)`.
        """
        weights = self.weights(weights, allow_negative=allow_negative)
        with determinism.fix(), bar(self.steps, "train", progress) as shown:
            return self.advance(
                self.initial, self.steps, weights, self.passed(weights), lambda _: shown.update()
            )

    def model(self, state: State) -> nn.Module:
        """A fresh module holding this state's values, in eval mode, usable like any other."""
        if state.params.keys() != self.initial.params.keys():
            raise ValueError("this state is of another run: its parameters have other names")
        model = copy.deepcopy(self._model)
        values = {**state.params, **state.buffers}
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in values:
                    tensor.copy_(values[name])
        for name, p in model.named_parameters():
            p.requires_grad_(name in self._trained)
        return model.eval()

    def weights(self, weights=None, *, allow_negative: bool = False) -> Tensor:
        """Data weights as an (n,) tensor on the run's device, checked. None is 1; a number fills it."""
        if weights is None or isinstance(weights, (int, float)):
            weights = torch.full((self.n,), 1.0 if weights is None else float(weights), dtype=self.dtype)
        weights = torch.as_tensor(weights).detach().to(self.device, self.dtype, copy=True)
        if weights.shape != (self.n,):
            raise ValueError(f"weights have shape {tuple(weights.shape)}; one per example is ({self.n},)")
        if not weights.isfinite().all():
            raise ValueError(f"weights[{(~weights.isfinite()).nonzero()[0].item()}] is not finite")
        if not allow_negative and (weights < 0).any():
            raise ValueError(
                f"weights[{(weights < 0).nonzero()[0].item()}] is negative, which trains away from an "
                "example; if that is meant, pass allow_negative=True to run.train"
            )
        return weights

    def identity(self) -> dict[str, str]:
        """What defines the run, by name, each as a fingerprint. Left out: the code of model and loss,
        and the items of a Dataset."""
        parts: dict[str, object] = {
            "the start s_0": self.initial.fingerprint(),
            "the model's constants or modes": (
                determinism.fingerprint(self._model),
                [module.training for module in self._model.modules()],
            ),
            "the optimizer or its hyper-parameters": (self.rule.__name__, self.hypers, self.group_of),
            "the order of the batches": [determinism.fingerprint(b) for b in self.batches],
            "normalize or seed": (self.normalize, self.seed),
            "the data": [determinism.fingerprint(x) for x in self.data]
            if isinstance(self.data, tuple)
            else self.n,
        }
        return {name: determinism.digest(repr(part)) for name, part in parts.items()}

    def fingerprint(self) -> str:
        """16 hex digits of `identity`."""
        return determinism.digest(repr(self.identity()))

    def __getstate__(self) -> dict:
        # For copies and other processes: what this Run's trainings passed through stays here.
        return self.__dict__ | {"_passed": {}, "_outside": {}}

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.initial.params.values())
        return (
            f"Run({type(self._model).__name__}, {count:,} parameters, n={self.n:,}, T={self.steps:,}, "
            f"B={len(self.batches[0])}, {self.rule.__name__}, normalize={self.normalize!r}, {self.dtype})"
        )

    # -- the step ----------------------------------------------------------------------------------

    def batch(self, t: int) -> tuple[Tensor, ...]:
        """The examples of step t, on the model's device."""
        indices = self.batches[t]
        if isinstance(self.data, tuple):
            return tuple(x[indices.to(x.device)].to(self.device) for x in self.data)
        items = torch.utils.data.default_collate([self.data[i] for i in indices.tolist()])
        items = items if isinstance(items, (tuple, list)) else (items,)
        return tuple(x.to(self.device) for x in items)

    def gradient(
        self, params: dict, buffers: dict, weight: Tensor, t: int, create_graph: bool = False
    ) -> Gradient:
        """The gradient of step t's weighted loss; `weight` is (B,), the data weights of the batch.

        Training calls this to step, the adjoint, with create_graph, to linearise: there is one definition
        of what a step minimises. The backward pass runs while the tensors are in the model, since
        activation checkpointing calls the model again there.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise TypeError("autocast is on: the derivative of a run in low precision is invalid")
        determinism.seed_step(self.seed, t)
        batch = self.batch(t)

        def weighted(model):
            with differentiable() if create_graph else contextlib.nullcontext() as replace:
                losses = self.loss(model, *batch)
            inputs.check_losses(losses, len(weight), t)
            w = weight.to(losses.dtype)
            total = (w * losses).sum() / (len(w) if self.normalize == "batch" else w.sum())
            leaves = list(params.values())
            grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
            return total, grads, not (replace and replace.rewritten)

        before = [p._version for p in params.values()]
        (total, grads, same_bits), after = self.apply(weighted, params, buffers)
        for (name, p), version in zip(params.items(), before, strict=True):
            if p._version != version:
                raise ValueError(
                    f"step {t}: the model changes its parameters or buffers in place, behind autograd's "
                    f"back: {name!r}; return the new value, or do it in the optimizer"
                )
        return Gradient(total, dict(zip(params, grads, strict=True)), after, same_bits)

    @measuring
    def measured(self, measure: Callable, params: dict, buffers: dict) -> Tensor:
        """measure(model), (K,), with these tensors in the model and the model in eval mode.

        It sees a copy, so what it does to the model ends with it.
        """
        determinism.seed_step(self.seed, self.steps)
        shared = {id(x): x for x in (*self._model.parameters(), *self._model.buffers())}
        model = copy.deepcopy(self._model, shared).eval()
        out, _ = self.apply(measure, params, buffers, call=_Call(model))
        if not isinstance(out, Tensor) or out.dim() != 1 or len(out) == 0:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"measure returned {shape}; it must return K >= 1 numbers as a (K,) tensor "
                '(reduction="none"; for a single number, .reshape(1))'
            )
        if name := inputs.uses(out, dict(self._outside)):
            raise ValueError(
                f"measure uses {name!r} of the model outside; it must use the model that it is given"
            )
        return out

    def apply(self, f: Callable, params: dict, buffers: dict, *, call: _Call | None = None) -> tuple:
        """f(model) with these tensors in the model, and the buffers it left."""
        tensors = {f"model.{name}": x for name, x in params.items()}
        tensors |= {f"model.{name}": x.clone() for name, x in buffers.items()}
        out = functional_call(call or self._call, tensors, (f,))
        return out, {name: tensors[f"model.{name}"] for name in buffers}

    def moved(self, state: State) -> list[str]:
        """The floating-point buffers that training has changed by now; the others are constants so far.

        A step hands on a buffer it leaves alone as the same tensor, so this is a matter of identity.
        """
        initial = self.initial.buffers
        return [k for k, b in state.buffers.items() if b is not initial[k] and b.is_floating_point()]

    def step(self, state: State, weights: Tensor) -> State:
        """h_t: s_t, batch_t, weights -> s_{t+1}. Pure: no argument is changed, nothing is remembered."""
        t = state.step
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
            weight = weights[self.batches[t].to(weights.device)]
            gradient = self.gradient(leaves, state.buffers, weight, t)
        return self.moved_on(state, weight, gradient)

    def moved_on(self, state: State, weight: Tensor, gradient: Gradient) -> State:
        """s_{t+1}, from the gradient at s_t: the optimizer's update, and the buffers."""
        t, total, grads = state.step, gradient.total, gradient.by_name
        if all(grad is None for grad in grads.values()):
            raise ValueError(
                f"step {t}: the losses do not depend on the model that loss is given; it must call its "
                "first argument, not a model from outside"
            )
        if not math.isfinite(total.item()):
            raise NonFinite(self._why_not_finite(state, weight, total))
        params, slots, hyper = dict(state.params), dict(state.slots), self.hypers[t]
        for name, grad in grads.items():
            if grad is None:  # not used in this step: PyTorch's optimizers pass it over, too
                continue
            if grad.is_sparse:
                raise TypeError(f"{name!r} has a sparse gradient; use nn.Embedding(sparse=False)")
            group = hyper[self.group_of[name]]
            params[name], slots[name] = self.rule(params[name], grad.detach(), slots[name], group)
        buffers = {k: self._kept(k, b, gradient.buffers[k].detach()) for k, b in state.buffers.items()}
        return State(params, buffers, slots, t + 1)

    def _kept(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """The buffer after a step: the same tensor as long as training has never changed it."""
        return before if before is self.initial.buffers[name] and torch.equal(before, after) else after

    def passed(self, weights: Tensor) -> Passed:
        """What training with these weights passed through, as far as it is known."""
        return self._passed.setdefault(determinism.fingerprint(weights), Passed(self.steps))

    def advance(
        self, state: State, to: int, weights: Tensor, passed: Passed, after: Callable[[State], object]
    ) -> State:
        """Step from `state` to step `to`, calling `after` with each; at noted steps, note or compare."""
        while state.step < to:
            with determinism.refusing():
                state = self.step(state, weights)
            if passed.notes(state.step):
                passed.compare(state)
            after(state)
        return self.checked(state) if to == self.steps else state

    def checked(self, final: State) -> State:
        """The last state, if all its tensors are finite."""
        if where := self._not_finite(final):
            t = final.step
            raise NonFinite(f"step {t}: {where[0]!r} is not finite; lower the learning rate or warm it up")
        return final

    def _not_finite(self, state: State) -> list[str]:
        constant = {f"buffers/{k}" for k in state.buffers} - {f"buffers/{k}" for k in self.moved(state)}
        flat = state.flatten().items()
        return [name for name, x in flat if name not in constant and not x.isfinite().all()]

    def _why_not_finite(self, state: State, weight: Tensor, total: Tensor) -> str:
        where = self._not_finite(state)
        if self.normalize == "weights" and weight.sum() == 0:
            cause = 'every example of its batch has weight 0; use normalize="batch" or larger batches'
        elif where:
            cause = f"{where[0]!r} is not finite; lower the learning rate or warm it up"
        else:
            largest = max(x.abs().max().item() for x in state.params.values() if x.numel())
            with torch.no_grad():
                batch = self.batch(state.step)
                losses, _ = self.apply(lambda model: self.loss(model, *batch), state.params, state.buffers)
            examples = self.batches[state.step][(~losses.isfinite()).cpu()].tolist()
            cause = (
                f"a per-example loss is NaN or infinite (examples {examples[:5]}) while every parameter is "
                f"finite (the largest is {largest:.3g}): look at these examples and at loss, or lower the "
                "learning rate"
            )
        return f"step {state.step}: the loss is {total.item()}: {cause}"
