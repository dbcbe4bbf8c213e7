"""Float64 all the way: what a model, a loss or a measure computes in float32, computed in float64.

A finite difference in float32 is right to two digits, and to none where a loss is nearly 0. In float64 it
is right to nine. The function that is differentiated is the same up to rounding, so a check in float64
speaks for the run in float32. Two things stand in the way. The user's code may hold tensors in float32,
such as test data, and PyTorch refuses to multiply these by float64 weights. And a model may cast in its
middle: language models normalise and rotate in float32 whatever precision they are in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checkpointing
from .stop_gradients import writes

LOW = {torch.float32, torch.float16, torch.bfloat16}
CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
REINTERPRETS = {Tensor.view}  # view(dtype) reads the same bits as other numbers


class InDouble(checkpointing.Keeping):
    """Inside `with InDouble():`, floats of 32 or 16 bits are turned into floats of 64 wherever they meet an
    operation of PyTorch, as its arguments, as the type it is asked for, or as its result.

    No mode listens in the backward pass, where a checkpointed block would be called again. So nothing is
    forgotten inside.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CASTS:
            return args[0].double()
        if func is Tensor.double:
            return func(*args, **kwargs)
        if all(map(_nothing_low, args)) and all(map(_nothing_low, kwargs.values())):  # nearly always
            made = func(*args, **kwargs)
            return made if _nothing_low(made) else _each(_made, made)
        if func not in REINTERPRETS:
            args, kwargs = _each(_asked, args), {name: _each(_asked, x) for name, x in kwargs.items()}
        if writes(func):  # into the tensor that is there
            return func(*args, **kwargs)
        kwargs = {name: _each(_made, x) for name, x in kwargs.items()}
        return _each(_made, func(*_each(_made, args), **kwargs))


def _nothing_low(x) -> bool:
    """Whether there is no tensor and no type of low precision in x."""
    if isinstance(x, Tensor):
        return x.dtype not in LOW
    if isinstance(x, (tuple, list)):
        return all(map(_nothing_low, x))
    return x not in LOW if isinstance(x, torch.dtype) else not isinstance(x, dict)


def _each(f, x):
    """f of x, or of everything in it; tree_map, quicker where there is no container in a container."""
    if type(x) is tuple:
        return tuple(f(y) if isinstance(y, Tensor) else _each(f, y) for y in x)
    return (
        f(x)
        if isinstance(x, Tensor | torch.dtype)
        else tree_map(f, x)
        if isinstance(x, list | dict | tuple)
        else x
    )


def _asked(x):
    return torch.float64 if isinstance(x, torch.dtype) and x in LOW else x


def _made(x):
    return x.double() if isinstance(x, Tensor) and x.dtype in LOW else x
