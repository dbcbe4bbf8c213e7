"""What a model or a function may remember outside its arguments, read so that changes can be noticed.

A step must not depend on the steps before it except through the state. Two things could carry more from
step to step: the attributes of the modules, and what the loss holds, which is what its closure, the globals
that it names and its defaults hold. `first_step` looks at both before and after a step.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

MOST = 1000  # a container of more entries than this is known by its length only
DEEP = 4  # and so is one that lies within this many containers

FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_OF_EVERY_MODULE = set(vars(nn.Module()))


def plain(value, depth: int = DEEP) -> object:
    """Numbers, texts, random generators and containers of these, as a value that can be compared later.

    None for anything else. A generator counts by its state, so that a number drawn from it is a change.
    """
    if isinstance(value, (int, float, complex, str, bytes)):
        return value if value == value else "nan"  # NaN differs from itself
    if isinstance(value, random.Random):
        return ("random", hash(value.getstate()))
    if isinstance(value, np.random.Generator):
        return ("numpy.random", str(value.bit_generator.state))
    if isinstance(value, torch.Generator):
        return ("torch.Generator", value.get_state().numpy().tobytes())
    if isinstance(value, (list, tuple, deque, dict, set, frozenset)):
        if len(value) > MOST or depth == 0:
            return (type(value).__name__, len(value))
        items: list[object]
        if isinstance(value, dict):
            items = [(plain(k, depth - 1), plain(v, depth - 1)) for k, v in value.items()]
        elif isinstance(value, (set, frozenset)):
            items = list(sorted(repr(plain(v, depth - 1)) for v in value))
        else:
            items = [plain(v, depth - 1) for v in value]
        return (type(value).__name__, len(value), tuple(items))
    if type(value).__module__ == "itertools":
        return repr(value)  # that of itertools.count shows the next number
    return None


def attributes(model: nn.Module) -> dict[str, object]:
    """What the modules hold in attributes of their own, by name, as far as `plain` knows it."""
    return {
        f"attribute {name!r} of module {owner!r}": known
        for owner, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and (known := plain(value)) is not None
    }


def held(function: Callable | None, role: str = "loss") -> dict[str, object]:
    """What a function holds, and what objects that it holds do, by name, as far as `plain` knows it.

    `role` is what the function is for the run, and part of the names.
    """
    found: dict[str, object] = {}
    for name, value in captured(function) if function is not None else ():
        if (known := plain(value)) is not None:
            found[f"{name!r}, which {role} holds,"] = known
        elif _of_the_user(value):
            for key, inner in getattr(value, "__dict__", {}).items():
                if (known := plain(inner)) is not None:
                    found[f"{name + '.' + key!r}, which {role} holds,"] = known
    return found


def _of_the_user(value) -> bool:
    """Whether this is an object like one of a user's class: no tensor, network, function, class or module."""
    kinds = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    return not isinstance(value, kinds)


def captured(function: Callable) -> Iterator[tuple[str, object]]:
    """(name, value) of what a function, and the functions that it holds, read besides their arguments."""
    todo, seen = [function], set()
    while todo:
        f = todo.pop()
        if id(f) in seen:
            continue
        seen.add(id(f))
        for name, value in _read_by(f):
            yield name, value
            module = getattr(value, "__module__", None) or ""
            if isinstance(value, FUNCTIONS) and not module.startswith(("torch", "numpy", "magic")):
                todo.append(value)


def _read_by(f) -> Iterator[tuple[str, object]]:
    """(name, value) of what this function, method, partial or callable object reads besides its arguments."""
    if isinstance(f, functools.partial):
        yield from (("partial", x) for x in (f.func, *f.args, *f.keywords.values()))
    elif isinstance(f, types.MethodType):
        yield "self", f.__self__
        yield f.__name__, f.__func__
    elif isinstance(f, types.FunctionType):
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if cell != types.CellType():  # the cell of a variable without a value is empty
                yield name, cell.cell_contents
        for code in _codes(f.__code__):
            yield from ((name, f.__globals__[name]) for name in code.co_names if name in f.__globals__)
        yield from (("a default", x) for x in (f.__defaults__ or ()))
        yield from (f.__kwdefaults__ or {}).items()
    elif callable(f) and _of_the_user(f):
        yield type(f).__name__, f
        call = vars(type(f)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield "__call__", call


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions defined inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
