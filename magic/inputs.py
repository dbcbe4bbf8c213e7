"""What a Run refuses, and how it says so: what is wrong, where, and the way out."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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
    for name, p in model.named_parameters():
        if not p.is_floating_point() or p.is_complex():
            raise TypeError(f"parameter {name!r} is {p.dtype}; magic differentiates float32 and float64")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {name!r} is {p.dtype}: its rounding is as large as a step's effect, and the "
                "derivative of such a run is invalid; use model.float() or model.double()"
            )
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ValueError(f"parameter {name!r} has gradient hooks, which magic does not run; remove them")


def frozen_copy(model: nn.Module, keep) -> nn.Module:
    """A copy of the model in which only the parameters named in `keep` require a gradient."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(f"the model cannot be copied (copy.deepcopy): {error}") from error
    for name, p in copied.named_parameters():
        p.requires_grad_(name in keep)
        p.grad = None
    return copied


def check_data(data) -> tuple:
    """(data, n): a tuple of tensors, or the Dataset as it is, and the number of examples."""
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, dict):
        raise TypeError("data is a dict; pass its tensors as a tuple, in the order that loss takes them")
    if isinstance(data, (tuple, list)):
        if len(data) == 0:
            raise ValueError("data is empty")
        for i, x in enumerate(data):
            if not isinstance(x, Tensor) or x.dim() == 0:
                raise TypeError(
                    f"data[{i}] is a {type(x).__name__}; each must be a tensor with the n examples first "
                    "(torch.as_tensor makes one)"
                )
        lengths = [len(x) for x in data]
        if len(set(lengths)) != 1:
            raise ValueError(f"data must be tensors of one length n; these have lengths {lengths}")
        return tuple(x.detach() for x in data), lengths[0]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return data, len(data)
    raise TypeError(
        f"data is a {type(data).__name__}; pass a tuple of tensors or a Dataset with len() and [i] "
        "(not a DataLoader: which examples form a batch is said by `batches`)"
    )


def check_batches(batches, n: int) -> list[Tensor]:
    """The batches as T int64 tensors of indices into n examples."""
    try:
        checked = [torch.as_tensor(b).clone() for b in batches]
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
            "look for detach(), no_grad(), .item() or argmax in loss"
        )


def check_indices(indices: Iterable[int], n: int) -> Tensor:
    """Training-example indices as a 1-d int64 tensor on the CPU; each in 0 … n−1, none twice."""
    if isinstance(indices, str):
        raise TypeError(f"examples are named by integer indices, not by {indices!r}")
    if not isinstance(indices, Iterable) or getattr(indices, "ndim", 1) == 0:
        indices = [int(indices)]
    given = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices)).cpu().reshape(-1)
    if given.dtype == torch.bool or given.is_floating_point():
        if len(given):
            raise TypeError(f"examples are named by integer indices; these are {given.dtype}")
        given = given.to(torch.int64)
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise IndexError(f"example {outside[0].item()} does not exist; the data has 0 … {n - 1}")
    if len(given.unique()) != len(given):
        twice = given[(given.unsqueeze(0) == given.unsqueeze(1)).sum(0) > 1][0].item()
        raise ValueError(f"example {twice} is named twice; it can be removed only once")
    return given.to(torch.int64)


def graph_nodes(tensors: list[Tensor]) -> list:
    """Every node of the autograd graphs that these tensors are the ends of."""
    nodes, todo = {}, [x.grad_fn for x in tensors]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes[node] = True
            todo += [parent for parent, _ in node.next_functions]
    return list(nodes)


def uses(output: Tensor, outside: dict[str, Tensor]) -> str | None:
    """The name of a parameter in `outside` that the graph of `output` leads to, if any."""
    for node in graph_nodes([output]):
        variable = getattr(node, "variable", None)
        for name, p in outside.items():
            if variable is p:
                return name
    return None
