"""What a Run refuses of models, losses and measures: what is wrong, where, and the way out.

What it refuses of data and batches is in examples.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules


def check_arguments(model, loss, seed) -> None:
    """Raise TypeError for arguments of Run that are not of the kind they must be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if isinstance(loss, nn.Module) or not callable(loss):
        raise TypeError(
            "loss must be a function loss(model, *batch) -> (B,), such as lambda model, x, y: "
            'F.cross_entropy(model(x), y, reduction="none")'
        )
    if not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: a run's seed is an integer")


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model whose training cannot be differentiated exactly."""
    for name, module in model.named_modules():
        _check_module(name, module)
    _check_hooks(
        "for every module there are", modules._global_backward_hooks, modules._global_backward_pre_hooks
    )
    dtypes: dict[torch.dtype, str] = {}
    for name, p in model.named_parameters():
        _check_parameter(name, p)
        if p.requires_grad:
            dtypes.setdefault(p.dtype, name)
    if len(dtypes) > 1:
        named = " and ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise TypeError(f"parameters of two precisions: {named}; use model.float() or model.double()")
    for name, b in model.named_buffers():
        _check_values(f"buffer {name!r}", b)
    _check_shared(model)


def _check_module(name: str, module: nn.Module) -> None:
    """Raise for a module whose backward pass is hidden, or cannot be differentiated."""
    if hasattr(module, "_orig_mod"):
        raise TypeError(
            f"module {name!r} is compiled, and torch.compile's backward cannot be differentiated again; "
            "pass the original module (compiled._orig_mod)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"module {name!r} is scripted: TorchScript rounds differently once it has optimised "
            "a function, and what it detaches cannot be seen; pass the module before torch.jit.script"
        )
    _check_hooks(f"module {name!r} has", module._backward_hooks, module._backward_pre_hooks)
    _check_old_style(name, module)


def _check_parameter(name: str, p: Tensor) -> None:
    """Raise for a parameter that cannot be differentiated, or that a plain loop would step in another way."""
    _check_values(f"parameter {name!r}", p)
    if not p.is_floating_point() or p.is_complex():
        raise TypeError(f"parameter {name!r} is {p.dtype}; magic differentiates float32 and float64")
    if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"parameter {name!r} is {p.dtype}: its rounding is as large as a step's effect, and the "
            "derivative of such a run is invalid; use model.float() or model.double(), or freeze it "
            "(requires_grad_(False)) and cast it up where it is used"
        )
    if p.requires_grad and p.clone().stride() != p.stride():
        raise ValueError(
            f"parameter {name!r} is a view that skips or repeats numbers in memory; give it memory of "
            "its own, p.data = p.data.clone()"
        )
    if p._backward_hooks or p._post_accumulate_grad_hooks:
        raise ValueError(f"parameter {name!r} has gradient hooks, which magic does not run; remove them")


def _check_hooks(where: str, *hooks: dict) -> None:
    """Raise for hooks on a module's backward pass: the adjoint would call them for other derivatives, too."""
    if any(hooks):
        raise ValueError(
            f"{where} backward hooks, which magic does not run; remove them. To scale a gradient by a, write "
            "a * x + ((1 - a) * x).detach() in forward, or use x.register_hook there"
        )


def _check_old_style(name: str, module: nn.Module) -> None:
    """Raise for hooks that put a plain tensor in the place of a parameter.

    The tensor is made anew in each forward pass and kept in an attribute, so the model remembers its last
    pass, and cannot be copied.
    """
    ways = {
        "weight_norm": "torch.nn.utils.parametrizations.weight_norm",
        "spectral_norm": "torch.nn.utils.parametrizations.spectral_norm",
        "prune": "torch.nn.utils.prune.remove(module, name), which makes the pruning permanent, or a "
        "parametrization that multiplies by the mask (torch.nn.utils.parametrize)",
    }
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__module__.removeprefix("torch.nn.utils.")
        if kind in ways and type(hook).__module__ != kind:
            raise TypeError(
                f"module {name!r} has torch.nn.utils.{kind}, which keeps its weight in a plain attribute; "
                f"use {ways[kind]}"
            )


def _check_values(what: str, x: Tensor) -> None:
    """Raise ValueError for a tensor that has no values yet, or none that autograd may touch."""
    if nn.parameter.is_lazy(x):
        raise ValueError(
            f"{what} is not initialised yet; call the model once on a batch, and make the optimizer then"
        )
    if x.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values; load the model first")
    if x.is_inference():
        raise ValueError(
            f"{what} was made inside torch.inference_mode, where autograd records nothing; make it outside"
        )


def _check_shared(model: nn.Module) -> None:
    """Raise ValueError for a trained parameter that lies in the memory of another parameter or buffer.

    A plain loop changes both when it steps one. A Run holds them apart, and would change only one.
    """
    places: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.numel() and x.layout == torch.strided:
            length = 1 + sum((int(n) - 1) * int(by) for n, by in zip(x.shape, x.stride(), strict=True))
            start = int(x.storage_offset()) * x.element_size()
            span = (start, start + length * x.element_size(), name, x.requires_grad)
            places.setdefault(x.untyped_storage().data_ptr(), []).append(span)
    for spans in places.values():
        end, last, trained = -1, "", False
        for start, stop, name, trains in sorted(spans):
            if start < end and (trained or trains):
                raise ValueError(
                    f"{last!r} and {name!r} are two tensors in the same memory (tied through .data?); tie "
                    "the Parameter itself, a.weight = b.weight, or give each its own with .clone()"
                )
            if stop > end:
                end, last, trained = stop, name, trains


def frozen_copy(model: nn.Module, keep) -> nn.Module:
    """A copy of the model in which only the parameters named in `keep` require a gradient."""
    try:
        copied = clean_copy(model)
    except Exception as error:
        raise TypeError(f"the model cannot be copied (copy.deepcopy): {error}") from error
    for name, p in copied.named_parameters():
        p.requires_grad_(name in keep)
        p.grad = None
    return copied


def clean_copy(model: nn.Module, memo: dict | None = None) -> nn.Module:
    """A deep copy of a model, also where its modules keep a tensor of their last forward pass (self.h = h).

    Such a tensor has a graph, with which PyTorch refuses to copy it. The copy holds its values without the
    graph. No step may read them, and `first_step` finds out if one does. `memo` holds what the two models are
    to share, as for copy.deepcopy.
    """
    memo = dict(memo or {})
    for module in model.modules():
        for x in _tensors(list(vars(module).values())):
            if x.grad_fn is not None:
                memo[id(x)] = x.detach()
    return copy.deepcopy(model, memo)


def sharing_copy(model: nn.Module, frozen: Iterable[Tensor], memo: dict | None = None) -> nn.Module:
    """`clean_copy`, but the parameters in `frozen` take no memory until one of the models is written into.

    PyTorch copies such a tensor at the first write through either of its owners. Where it cannot, as for
    memory that another library owns, the tensor is copied now.
    """
    memo = dict(memo or {})
    for p in frozen:
        if type(p) is nn.Parameter and p.layout is torch.strided:
            with contextlib.suppress(RuntimeError, AttributeError):
                memo[id(p)] = nn.Parameter(torch._lazy_clone(p.detach()), requires_grad=p.requires_grad)
    return clean_copy(model, memo)


def _tensors(values, depth: int = 4) -> Iterator[Tensor]:
    """The tensors among these values, and in containers of them, which are opened `depth` levels deep."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple, deque, set, dict)) and depth:
            yield from _tensors(x.values() if isinstance(x, dict) else x, depth - 1)


def check_mode(device: torch.device) -> None:
    """Raise where autograd cannot trace a step as training would do it."""
    if torch.is_autocast_enabled(device.type):
        raise TypeError("autocast is on: the derivative of a run in low precision is invalid")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode is on, in which nothing can be differentiated; leave it first")


def check_leaves(params: dict[str, Tensor], t: int) -> None:
    """Raise ValueError if the loss has frozen a parameter of step t."""
    for name, p in params.items():
        if not p.requires_grad:
            raise ValueError(
                f"step {t}: the model or loss sets requires_grad of {name!r} to False; freeze it before the "
                "Run is made"
            )


def check_unwritten(params: dict[str, Tensor], versions: list[int], t: int) -> None:
    """Raise ValueError if step t has written into a parameter in place since these were the versions."""
    for (name, p), version in zip(params.items(), versions, strict=True):
        if p._version != version:
            raise ValueError(
                f"step {t}: the model changes its parameters or buffers in place, behind autograd's "
                f"back: {name!r}; return the new value, or do it in the optimizer"
            )


def check_moved(name: str, after: Tensor) -> Tensor:
    """`after`, a buffer that a step has changed; TypeError if it is complex: its derivative would be lost."""
    if after.is_complex():
        raise TypeError(
            f"buffer {name!r} is {after.dtype} and changes in training; keep its real and imaginary parts in "
            "two real buffers (torch.view_as_real)"
        )
    return after


def check_losses(losses, count: int, t: int) -> None:
    """Raise unless step t has `count` losses, in float32 or float64, that depend on parameters."""
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"step {t}: loss returned {shape}; it must return one number per example, ({count},): "
            'use reduction="none"'
        )
    if losses.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"step {t}: the losses are {losses.dtype}; the derivative is invalid in this precision"
        )
    if not losses.requires_grad:
        raise ValueError(
            f"step {t}: the losses do not depend on the parameters by any differentiable path; "
            "look for detach(), no_grad(), .item() or argmax in loss, and for activation checkpointing with "
            "use_reentrant=True (use_reentrant=False is differentiable)"
        )


def check_outputs(out) -> None:
    """Raise unless measure returned K real numbers, (K,)."""
    if not isinstance(out, Tensor) or out.dim() != 1 or len(out) == 0:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"measure returned {shape}; it must return K >= 1 numbers as a (K,) tensor "
            '(reduction="none"; for a single number, .reshape(1))'
        )
    if out.is_complex():
        raise TypeError(
            f"measure returned {out.dtype}; measure real numbers (torch.view_as_real(z).reshape(-1))"
        )
