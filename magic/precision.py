"""Float64 all the way: what a model computes in float32 inside, computed in float64.

Models of language normalise and rotate in float32 whatever precision they are in, by a cast in the middle
of `forward`. A finite difference through such a cast is one of a staircase, right to about three digits;
without the cast it is right to nine. The function that is differentiated is the same up to rounding, so a
check made without the cast speaks for the model with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

LOW = {torch.float32, torch.float16, torch.bfloat16}
CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
REINTERPRETS = {Tensor.view}  # view(dtype) reads the same bits as other numbers


class InDouble(TorchFunctionMode):
    """Inside `with InDouble():`, whatever asks for a float of 32 or 16 bits gets one of 64.

    A tensor that is in low precision already stays as it is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CASTS:
            return args[0].double()
        if func not in REINTERPRETS:
            args = tuple(_double(x) for x in args)
            kwargs = {name: _double(x) for name, x in kwargs.items()}
        result = func(*args, **kwargs)
        if _low(result) and not any(_low(x) for x in tree_iter((args, kwargs))):
            return result.double()  # it was made here: torch.zeros(3), or integers divided
        return result


def _double(x):
    return torch.float64 if isinstance(x, torch.dtype) and x in LOW else x


def _low(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in LOW
