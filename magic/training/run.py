"""Run: a training run as a pure function of its data weights.

    s_{t+1} = step(s_t, batch_t, weights),    g_t = d/dparams  Σ wᵢ ℓᵢ(params, batch_t) / B

MAGIC (Ilyas & Engstrom 2025, arXiv 2504.16430), section 2. With all weights 1 the states are, bit
for bit, those of the plain loop

    optimizer.zero_grad(); loss(model, x, y).mean().backward(); optimizer.step(); scheduler.step()

under `determinism.fix()`; where step t draws random numbers, after `determinism.seed_step(seed, t)`;
on CUDA with the optimizer's `foreach=False`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..identity import fingerprints
from ..kernels.graph import uses
from ..kernels.replace import measuring
from ..show import bar
from . import arguments, clipping, determinism, examples, finite, hypers, optim, run_identity
from .first_step import first_step
from .gradient import Gradient, Inputs, gradient, total
from .network import Network
from .record import Passed
from .state import State

REMEMBERED = 8  # trainings whose record is kept; those before are forgotten


class Run:
    """A deterministic training run, ready to be trained, replayed and differentiated.

    model      any nn.Module in float32 or float64; its values now are s_0. It is copied, never
               changed. It trains in the mode (train or eval) each of its modules is in now. Frozen
               parameters may lie in bfloat16 if they are cast up before they meet what is trained
    optimizer  SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adafactor or Muon of torch.optim over its
               parameters, or a list of several, stepped one after the other, each parameter in one of
               them; read, never stepped. A group of Adam may have "eps_root", added under the root, which
               torch.optim does not know
    data       a tuple of tensors or NumPy arrays with the n examples first, a map-style Dataset, or a list
               of dicts. Where its items are dicts, loss is given the batch as one dict
    loss       loss(model, *batch) -> (B,), a number per example; or (B, L), one per token: then data weights
               are (n, L) and scores (K, n, L), and the plain loop is that of loss(model, *batch).sum() / B
    batches    a (T, B) index tensor, or a sequence of T index tensors
    scheduler  a torch.optim.lr_scheduler, stepped once per training step; read on a copy. With a list of
               optimizers a list, one for each or None
    normalize  "batch": Σ wᵢℓᵢ / B with B the batch's size, as in MAGIC.
               "weights": Σ wᵢℓᵢ / Σ wᵢ, what leaving the rows out of the batch does.
    seed       every random number that step t draws is a function of (seed, t)
    collate    makes a batch out of a list of items, as in a DataLoader; None is torch's default_collate. Loss
               is given what it returns: the entries of a tuple, or one dict, one BatchEncoding. Where data
               are tensors, the items are tuples of them
    clip       the largest norm of all gradients together, as torch.nn.utils.clip_grad_norm_ has it, or
               ("value", c), as clip_grad_value_; between backward() and optimizer.step()
    accumulate   in how many parts of one length each batch is done, one after the other. Their gradients add
               up, as those of (loss(model, *part).mean() / accumulate).backward(), in the memory of one

    Creating a Run tries its first step three times, so that a mistake shows here and not after an hour.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizers,
        data,
        loss: Callable[..., Tensor],
        batches: Tensor | Sequence,
        scheduler=None,
        *,
        normalize: str = "batch",
        seed: int = 0,
        clip: float | tuple[str, float] | None = None,
        accumulate: int = 1,
        collate: Callable | None = None,
    ):
        arguments.check_arguments(model, loss, seed)
        examples.check_normalize(normalize)
        arguments.check_model(model)
        self.updates, self.group_of = optim.read(optimizer, model)
        self.data, self.n = examples.check_data(data, collate)
        self.batches = examples.check_batches(batches, self.n)
        self.hypers = hypers.hypers(optimizer, scheduler, len(self.batches))
        self.loss, self.normalize, self.seed, self.collate, self.first = loss, normalize, seed, collate, 0
        self.clip, self.accumulate, self.tokens = clipping.read(clip), accumulate, None
        self.ranks: Any = None  # magic.distributed sets it
        examples.check_accumulate(accumulate, self.batches)
        arguments.check_all_held(self.clip, model, self.group_of)
        self.network = Network(arguments.frozen_copy(model, keep=self.group_of))
        named = dict(self.network.module.named_parameters())
        first = named[next(iter(self.group_of))]
        self.device, self.dtype = first.device, first.dtype
        self._passed: dict[str, Passed] = {}
        params = {name: p.detach().clone() for name, p in named.items() if name in self.group_of}
        buffers = {name: b.detach().clone() for name, b in self.network.module.named_buffers()}
        self.initial = State(params, buffers, {name: {} for name in params}, moved=frozenset())
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._outside = weakref.WeakValueDictionary(model.named_parameters())
        self.tokens = first_step(self, model)

    # -- what a user calls -------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return len(self.batches)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n,), the shape of the data weights; (n, L) where each token has one."""
        return (self.n, self.tokens) if self.tokens else (self.n,)

    def train(self, weights=None, *, progress: bool = True, allow_negative: bool = False) -> State:
        """f(w): the final state. `weights` are (n,), or (n, L) where each token has one; None means 1.

        Raises NonFinite, with the step, when the training diverges, and ReplayMismatch when an
        earlier training of this Run with these weights was in another state at a step compared.
        A training that can be interrupted and resumed is `magic.train(run, disk=folder)`.
        """
        weights = self.weights(weights, allow_negative=allow_negative)
        with determinism.alone(), bar(self.steps, "train", progress) as shown:
            return self.advance(
                self.initial, self.steps, weights, self.passed(weights), lambda _: shown.update()
            )

    @determinism.in_turn
    def model(self, state: State) -> nn.Module:
        """A fresh module holding this state's values, in eval mode, usable like any other.

        Its frozen parameters lie in the run's memory until one of the two is written into (copy on write).
        """
        if state.params.keys() != self.initial.params.keys():
            raise ValueError("this state is of another run: its parameters have other names")
        model = arguments.sharing_copy(self.network.module, self.network.frozen.values())
        values = {**state.params, **state.buffers}
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in values:
                    tensor.copy_(values[name])
        for name, p in model.named_parameters():
            p.requires_grad_(name in self._trained)
        return model.eval()

    def weights(self, weights=None, *, allow_negative: bool = False) -> Tensor:
        """Data weights as a checked tensor of the run's `shape`, on its device; None is 1, a number all."""
        return examples.checked_weights(self, weights, allow_negative)

    @determinism.in_turn
    def identity(self, fresh: bool = False) -> dict[str, str]:
        """What defines the run, by name, each as a fingerprint; the code of model and loss, and what they
        hold, among it. All is read again at each call, but a Dataset's items only if `fresh`."""
        return run_identity.parts_of(self, fresh)

    def unknown(self) -> dict[str, str]:
        """The parts of `identity` that cannot be known whole, and why (a C extension, a call of eval)."""
        return run_identity.written_by_the_user(self).unknown

    def fingerprint(self) -> str:
        """16 hex digits of `identity`."""
        return fingerprints.digest(repr(self.identity()))

    def __getstate__(self) -> dict:
        # For copies and other processes: what this Run's trainings passed through stays here.
        return self.__dict__ | {"_passed": {}, "_outside": {}}

    def __repr__(self) -> str:
        count, kind = sum(p.numel() for p in self.initial.params.values()), type(self.network.module)
        rule, tokens = optim.named(self.updates), f"L={self.tokens:,}, " if self.tokens else ""
        return (
            f"Run({kind.__name__}, {count:,} parameters, n={self.n:,}, {tokens}T={self.steps:,}, "
            f"B={len(self.batches[0])}, {rule}, normalize={self.normalize!r}, {self.dtype})"
        )

    # -- the step ----------------------------------------------------------------------------------

    def part(self, t: int, part: int) -> slice:
        """Which places of step t's batch are in this part of it."""
        size = len(self.batches[t]) // self.accumulate
        return slice(part * size, (part + 1) * size)

    def batch(self, t: int, part: int | None = None) -> tuple:
        """What loss takes of the examples of step t, or of a part of its batch, on the model's device."""
        indices = self.batches[t] if part is None else self.batches[t][self.part(t, part)]
        return examples.batch(self.data, self.collate, indices, self.device)

    @determinism.in_turn
    def gradient(
        self, params: dict, buffers: dict, weight: Tensor, t: int, create_graph: bool = False
    ) -> Gradient:
        """The gradient of step t's weighted loss; `weight` are the data weights of the batch, (B,) or (B, L).

        Training calls this to step; the adjoint calls it with create_graph, to linearise. So there is one
        definition of what a step minimises.
        """
        return gradient(self, Inputs(params, buffers, weight), t, create_graph)

    def total(self, state: State, weights: Tensor) -> float:
        """The weighted loss of the step at `state`, with training's bits."""
        return total(self, state, weights)

    @determinism.in_turn
    @measuring
    def measured(self, measure: Callable, params: dict, buffers: dict) -> Tensor:
        """measure(model), (K,), with these tensors in the model and the model in eval mode.

        It sees a copy, so what it does to the model ends with it. The numbers may carry a graph.
        """
        determinism.seed_step(self.seed, self.first + self.steps)
        named = [*self.network.module.named_parameters(), *self.network.module.named_buffers()]
        # The copy shares these, since other tensors are put into their place anyway.
        shared = {id(x): x for name, x in named if name not in self.network.frozen}
        frozen = self.network.frozen.values()
        model = arguments.sharing_copy(self.network.module, frozen, shared).eval()
        params = {name: p.clone() for name, p in params.items()}
        out, _ = Network(model, watch=False).apply(measure, params, buffers)
        arguments.check_outputs(out)
        if name := uses(out, dict(self._outside)):
            raise ValueError(
                f"measure uses {name!r} of the model outside; it must use the model that it is given"
            )
        return out

    def moved(self, state: State) -> list[str]:
        """The floating-point buffers that training has written by now; the others are constants so far."""
        return [k for k, b in state.buffers.items() if k in state.moved and b.is_floating_point()]

    def step(self, state: State, weights: Tensor, passed: Passed | None = None) -> State:
        """h_t: s_t, batch_t, weights -> s_{t+1}. Pure: no argument is changed, nothing is remembered.

        Only `passed`, where it is given, notes the step's total loss, or compares it."""
        t = state.step
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
            weight = weights[self.batches[t].to(weights.device)]
            gradient = self.gradient(leaves, state.buffers, weight, t)
        return self.moved_on(state, weight, gradient, passed)

    def moved_on(
        self, state: State, weight: Tensor, gradient: Gradient, passed: Passed | None = None
    ) -> State:
        """s_{t+1}, from the gradient at s_t: clipping, the optimizer's update, and the buffers."""
        t, total, grads = state.step, gradient.total, gradient.by_name
        if all(grad is None for grad in grads.values()):
            raise ValueError(
                f"step {t}: the losses do not depend on the model that loss is given; it must call its "
                "first argument, not a model from outside"
            )
        if not math.isfinite(value := total.item()):  # the only number of a step that the host waits for
            raise finite.why(self, state, weight, total)
        if passed is not None:
            passed.witness(t, value)
        if self.clip is not None:
            used = {name: grad for name, grad in grads.items() if grad is not None}
            grads = {**grads, **self.clip.clip(used, state.params)}
        params, slots, hyper = dict(state.params), dict(state.slots), self.hypers[t]
        for name, grad in grads.items():
            if grad is None:  # not used in this step: PyTorch's optimizers pass it over, too
                continue
            if grad.is_sparse:
                raise TypeError(f"{name!r} has a sparse gradient; use nn.Embedding(sparse=False)")
            group = self.group_of[name]
            rule = self.updates[group].rule
            param, slots[name] = rule(params[name], grad.detach(), slots[name], hyper[group])
            # Strides may differ on axes of length 1, and then another kernel, with other rounding, may be
            # chosen.
            if param.stride() != params[name].stride():
                param = torch.empty_like(params[name]).copy_(param)
            params[name] = param
        buffers = dict(state.buffers)
        for name in gradient.written:
            buffers[name] = arguments.check_moved(name, gradient.buffers[name].detach())
        return State(params, buffers, slots, t + 1, state.moved | gradient.written)

    def passed(self, weights: Tensor) -> Passed:
        """What training with these weights passed through, as far as it is known; of the latest trainings."""
        key = fingerprints.fingerprint(weights)
        found = self._passed.pop(key, None) or Passed(self.steps)
        self._passed[key] = found  # the latest last
        while len(self._passed) > REMEMBERED:
            del self._passed[next(iter(self._passed))]
        return found

    def advance(
        self, state: State, to: int, weights: Tensor, passed: Passed, after: Callable[[State], object]
    ) -> State:
        """Step from `state` to step `to`, calling `after` with each; at noted steps, note or compare."""
        while state.step < to:
            with determinism.refusing_nondeterminism():
                state = self.step(state, weights, passed)
            if passed.notes(state.step):
                passed.compare(state)
            after(state)
        return finite.checked(state, self) if to == self.steps else state
