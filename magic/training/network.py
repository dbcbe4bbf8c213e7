"""A module as a function of the tensors in it.

PyTorch's modules hold their parameters and write into their buffers. A step must do neither: it takes the
tensors that it is given and returns those that come out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call

from .record import sums


class _Call(nn.Module):
    """f(model, ...) as a module's forward, so that functional_call can put tensors into the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, f: Callable, *args):
        return f(self.model, *args)


class Network:
    """A model whose tensors are put into it for the length of one call.

    module   the model; nothing else holds it
    frozen   its parameters that are not trained, which are constants of the run
    watch    whether `changed` will be asked for
    """

    def __init__(self, module: nn.Module, watch: bool = True):
        self.module, self._call = module, _Call(module)
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._sums = sums(self.frozen) if watch else {}
        self._tied = _tied(module)

    def apply(self, f: Callable, params: dict, buffers: dict, held: dict | None = None) -> tuple:
        """f(model) with these tensors in the model, and the buffers that it left there.

        A buffer that f did not write is the given tensor itself. What f writes into are copies: `held`, if
        the caller made them, so that it can watch them.
        """
        held = held or {name: x.clone() for name, x in buffers.items()}
        fresh = {name: x._version for name, x in held.items()}
        tensors = {f"model.{name}": x for name, x in {**params, **held}.items()}
        out = functional_call(self._call, tensors, (f,), tie_weights=self._tied)
        after = {name: tensors[f"model.{name}"] for name in buffers}
        for name, x in after.items():  # compared as well, since a write through .data leaves no trace
            if x is held[name] and x._version == fresh[name] and torch.equal(x, buffers[name]):
                after[name] = buffers[name]
        return out, after

    def pure(self, f: Callable, params: dict, buffers: dict) -> tuple:
        """f(model), and the buffers that it left there, where nobody asks which of them were written: a form
        of `apply` that torch.func can transform."""
        tensors = {f"model.{name}": x for name, x in params.items()}
        tensors |= {f"model.{name}": x.clone() for name, x in buffers.items()}
        out = functional_call(self._call, tensors, (f,), tie_weights=self._tied)
        return out, {name: tensors[f"model.{name}"] for name in buffers}

    def changed(self) -> str | None:
        """The name of a frozen parameter whose bits are not what they were when the run was made."""
        return next((name for name, total in sums(self.frozen).items() if total != self._sums[name]), None)


def _tied(module: nn.Module) -> bool:
    """Whether a tensor has two names in the module. functional_call looks for such again in each call."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return len({id(x) for _, x in named}) < len(named)
