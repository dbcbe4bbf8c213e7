"""What a Run refuses, and how it says so: what is wrong, where, and the way out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
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
    _check_hooks(
        "for every module there are", modules._global_backward_hooks, modules._global_backward_pre_hooks
    )
    dtypes = {}
    for name, p in model.named_parameters():
        _check_values(f"parameter {name!r}", p)
        if not p.is_floating_point() or p.is_complex():
            raise TypeError(f"parameter {name!r} is {p.dtype}; magic differentiates float32 and float64")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {name!r} is {p.dtype}: its rounding is as large as a step's effect, and the "
                "derivative of such a run is invalid; use model.float() or model.double()"
            )
        if p.requires_grad and p.clone().stride() != p.stride():
            raise ValueError(
                f"parameter {name!r} is a view that skips or repeats numbers in memory; give it memory of "
                "its own, p.data = p.data.clone()"
            )
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ValueError(f"parameter {name!r} has gradient hooks, which magic does not run; remove them")
        if p.requires_grad:
            dtypes.setdefault(p.dtype, name)
    if len(dtypes) > 1:
        named = " and ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise TypeError(f"parameters of two precisions: {named}; use model.float() or model.double()")
    for name, b in model.named_buffers():
        _check_values(f"buffer {name!r}", b)
    _check_shared(model)


def _check_hooks(where: str, *hooks: dict) -> None:
    """Raise for hooks on a module's backward pass, which would be called for derivatives of it, too."""
    if any(hooks):
        raise ValueError(
            f"{where} backward hooks, which magic does not run; remove them. To scale a gradient by a, write "
            "a * x + ((1 - a) * x).detach() in forward, or use x.register_hook there"
        )


def _check_old_style(name: str, module: nn.Module) -> None:
    """Raise for hooks that write a plain tensor where a parameter was: they remember, and are not copied."""
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

    Training changes both in a plain loop, and only one of them in a Run, which holds them apart.
    """
    places: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.numel() and x.layout == torch.strided:
            length = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            start = x.storage_offset() * x.element_size()
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
    """A deep copy without the graphs of what the modules keep from a forward pass, as self.h = h does.

    Such a tensor has the same values in the copy and no history there: it is a value of the pass before,
    which a step must not read (`first_step` tries that). `memo` names what is shared, as for deepcopy.
    """
    memo = dict(memo or {})
    for module in model.modules():
        for x in _tensors(list(vars(module).values())):
            if x.grad_fn is not None:
                memo[id(x)] = x.detach()
    return copy.deepcopy(model, memo)


def _tensors(values, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in containers within containers."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple, deque, set, dict)) and depth:
            yield from _tensors(x.values() if isinstance(x, dict) else x, depth - 1)


def check_data(data) -> tuple:
    """(data, n): a tuple of tensors, or the Dataset as it is, and the number of examples."""
    if isinstance(data, (Tensor, np.ndarray)):
        data = (data,)
    if isinstance(data, dict):
        raise TypeError("data is a dict; pass its tensors as a tuple, in the order that loss takes them")
    if isinstance(data, (tuple, list)):
        if len(data) == 0:
            raise ValueError("data is empty")
        data = [_from_numpy(x, i) if isinstance(x, np.ndarray) else x for i, x in enumerate(data)]
        for i, x in enumerate(data):
            if not isinstance(x, Tensor) or x.dim() == 0:
                raise TypeError(
                    f"data[{i}] is a {type(x).__name__}; each must be a tensor or a NumPy array with the n "
                    "examples first (torch.as_tensor makes one)"
                )
        lengths = [len(x) for x in data]
        if len(set(lengths)) != 1:
            raise ValueError(f"data must be tensors of one length n; these have lengths {lengths}")
        return tuple(x.clone() if x.is_inference() else x.detach() for x in data), lengths[0]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return data, len(data)
    raise TypeError(
        f"data is a {type(data).__name__}; pass a tuple of tensors or a Dataset with len() and [i] "
        "(not a DataLoader: which examples form a batch is said by `batches`)"
    )


def _from_numpy(x: np.ndarray, i: int) -> Tensor:
    try:
        return torch.tensor(x, device="cpu")
    except TypeError as error:
        raise TypeError(
            f"data[{i}] is a NumPy array of {x.dtype}, which has no tensor; turn it into numbers first"
        ) from error


def each(f: Callable[[Tensor], Tensor], batch):
    """f of every tensor of a batch that may be tuples, lists and dicts within each other."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, dict):
        return {key: each(f, x) for key, x in batch.items()}
    made = [each(f, x) for x in batch]
    return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)


def collated(data, indices: list[int]) -> tuple:
    """The items of a Dataset as one batch, by torch's default_collate: a tuple of what loss takes.

    A tuple or list gives an argument for each entry; anything else, a dict among it, is one argument.
    """
    items = [data[i] for i in indices]
    try:
        batch = torch.utils.data.default_collate(items)
    except (TypeError, RuntimeError, KeyError) as error:
        raise TypeError(
            f"examples {indices[:5]} of the Dataset cannot be put together: {error}. Each item must have the "
            "same keys and tensors of the same shapes: pad them, or turn them into numbers, in the Dataset"
        ) from error
    _check_tensors(batch, indices, "item")
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _check_tensors(batch, indices: list[int], where: str) -> None:
    if isinstance(batch, Tensor):
        return
    if isinstance(batch, dict):
        parts = [(f"[{key!r}]", x) for key, x in batch.items()]
    elif isinstance(batch, (tuple, list)) and not any(isinstance(x, (str, bytes)) for x in batch):
        parts = [(f"[{i}]", x) for i, x in enumerate(batch)]
    else:
        raise TypeError(
            f"{where} of the Dataset, in example {indices[0]}, is text or an object, not numbers; turn it "
            "into a tensor in the Dataset, such as token ids"
        )
    for name, x in parts:
        _check_tensors(x, indices, where + name)


def check_mode(device: torch.device) -> None:
    """Raise where autograd cannot record a step as training would do it."""
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
    """The buffer that a step has changed; TypeError if it is complex, for its derivative would be lost."""
    if after.is_complex():
        raise TypeError(
            f"buffer {name!r} is {after.dtype} and changes in training; keep its real and imaginary parts in "
            "two real buffers (torch.view_as_real)"
        )
    return after


def check_batches(batches, n: int) -> list[Tensor]:
    """The batches as T int64 tensors of indices into n examples."""
    try:
        given = [b if isinstance(b, Tensor) else torch.as_tensor(b, device="cpu") for b in batches]
        checked = [b.clone() for b in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"batches is a {type(batches).__name__}; pass a (T, B) index tensor, such as magic.batches "
            "makes, or a sequence of index tensors"
        ) from error
    if not checked:
        raise ValueError("batches is empty: a run has at least one step")
    for t, indices in enumerate(checked):
        if (
            indices.dim() != 1
            or len(indices) == 0
            or indices.is_floating_point()
            or indices.dtype == torch.bool
        ):
            raise ValueError(
                f"batches[{t}] has shape {tuple(indices.shape)} and type {indices.dtype}; "
                "each batch is a non-empty 1-d tensor of example indices"
            )
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= n:
            raise IndexError(
                f"batches[{t}] asks for example {low if low < 0 else high}; data has 0 … {n - 1}"
            )
    return [indices.to(torch.int64) for indices in checked]


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


def check_indices(indices: Iterable[int], n: int) -> Tensor:
    """Training-example indices as a 1-d int64 tensor on the CPU; each in 0 … n−1, none twice."""
    if isinstance(indices, str):
        raise TypeError(f"examples are named by integer indices, not by {indices!r}")
    if not isinstance(indices, Iterable) or getattr(indices, "ndim", 1) == 0:
        indices = [int(indices)]
    given = indices if isinstance(indices, Tensor) else torch.as_tensor(list(indices), device="cpu")
    given = given.cpu().reshape(-1)
    if given.dtype == torch.bool or given.is_floating_point():
        if len(given):
            raise TypeError(f"examples are named by integer indices; these are {given.dtype}")
        given = given.to(torch.int64)
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise IndexError(f"example {outside[0].item()} does not exist; the data has 0 … {n - 1}")
    values, counts = given.unique(return_counts=True)
    if len(values) != len(given):
        twice = values[counts > 1][0].item()
        raise ValueError(f"example {twice} is named twice; it can be removed only once")
    return given.to(torch.int64)
