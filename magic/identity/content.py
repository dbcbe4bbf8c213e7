"""The content of any Python value, as a digest: equal in every process, different after an edit that counts.

A function's content is its bytecode (see bytecode.py) and what it refers to: closure cells, defaults, the
globals that it names, and those attributes of user modules that it names. For functions among these the
same holds, and so on. Things of a library (the standard library, installed packages, and magic itself
except for its models) count by their name, and the version of their package is noted apart.

No digest depends on addresses, on the order of sets or on the process. What has no readable content is
noted in `unknown`, with the reason, and is never taken for a constant.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import bytecode, fingerprints
from .bytecode import ABSENT, OUT_OF_SIGHT, OWN, SIGNATURE, is_user_class, is_user_function, of_library

_busy: list = []  # the runs whose identity is being taken: a loss may name its own run, which ends there
PRINTED = (
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo, range, slice
)  # fmt: skip
# Of an object whose class is derived from one of these, what it is without what its class adds.
PLAIN: dict[type, Callable[[Any], object]] = {
    **{kind: kind for kind in (int, float, complex, str, bytes)},
    bytearray: bytes,
    dict: lambda x: [(k, dict.__getitem__(x, k)) for k in x],
    list: lambda x: list(list.__iter__(x)),
    tuple: lambda x: list(tuple.__iter__(x)),
}


class Content:
    """Takes digests.

    libraries  the top packages of all libraries met so far
    unknown    why parts of what was read last could not be
    """

    def __init__(self) -> None:
        self.libraries: set[str] = set()
        self.unknown: list[str] = []
        self._hash = hashlib.blake2b(digest_size=8)
        self._seen: dict[int, tuple[int, object]] = {}  # id -> (its number in the order met, the object)
        self._tensors: dict[int, tuple] = {}
        self._nameless: types.CodeType | None = None

    def digest(self, x) -> str:
        """16 hex digits of the content of x; `unknown` then says what of it could not be read."""
        self.unknown, self._seen, self._hash = [], {}, hashlib.blake2b(digest_size=8)
        try:
            self._put(x)
        except RecursionError:
            self.unknown.append("it is nested too deeply to be read")
        except Exception as error:  # an object may do anything when its attributes are read
            self.unknown.append(f"it cannot be read ({type(error).__name__}: {error})")
        return self._hash.hexdigest()

    def call(self, x: Tensor, name: str) -> None:
        """From now on, this tensor counts by a name, since what it holds is looked after elsewhere."""
        self._tensors[id(x)] = (f"called {name}", x)

    def code(self, code: types.CodeType, named: bool) -> str:
        """The digest of code without what it refers to; `named` if the names of its arguments count."""
        self._nameless = None if named else code
        try:
            return self.digest(code)
        finally:
            self._nameless = None

    def _say(self, *words) -> None:
        """Hash these words, each behind its length, so that no two sequences of words hash the same bytes."""
        for word in words:
            raw = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self._hash.update(b"%d:" % len(raw))
            self._hash.update(raw)

    def _many(self, tag: str, items) -> None:
        items = list(items)
        self._say(tag, len(items))
        for item in items:
            self._put(item)

    def _named(self, kind: str, module: str | None, name: str) -> None:
        self.libraries.add((module or "builtins").partition(".")[0])
        self._say(kind, module, name)

    def _cannot(self, why: str) -> None:
        self.unknown.append(why)
        self._say("unknown", why)

    def _unordered(self, items) -> None:
        """Hash the sorted digests of the items, as the order of a set differs from process to process."""
        outer, seen, digests = self._hash, self._seen, []
        for item in items:
            self._hash, self._seen = hashlib.blake2b(digest_size=16), dict(seen)
            self._put(item)
            digests.append(self._hash.digest())
        self._hash, self._seen = outer, seen
        self._say("set", len(digests), *sorted(digests))

    def _put(self, x) -> None:
        kind = type(x)
        if x is None or x is ... or x is NotImplemented or kind in (bool, int, float, complex, str, bytes):
            self._say(kind.__name__, x if kind is bytes else repr(x))
        elif x is ABSENT:
            self._say("absent")
        elif kind is tuple:  # before what was seen: whether equal tuples are one object is up to Python
            self._many("tuple", x)
        elif kind in (set, frozenset):
            self._unordered(x)
        elif isinstance(x, Tensor):
            self._tensor(x)
        elif kind is types.CodeType:
            self._code(x)
        elif isinstance(x, PRINTED):
            self._say(kind.__name__, repr(x))
        elif id(x) in self._seen:
            self._say("again", self._seen[id(x)][0])
        else:
            self._seen[id(x)] = (len(self._seen), x)  # x itself, so that no other object is given its id
            self._object(x, kind)

    def _object(self, x, kind: type) -> None:
        if kind in (np.ndarray, np.memmap) or isinstance(x, np.generic):
            self._array(np.asarray(x))
        elif kind in (list, dict):
            self._many(kind.__name__, x if kind is list else [pair for pair in x.items()])
        elif isinstance(x, type):
            self._class(x)
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self._many("method", [x.__func__, x.__self__])
        elif (
            isinstance(x, types.BuiltinFunctionType | types.MethodWrapperType)
            or kind.__name__ == "cython_function_or_method"
        ):
            self._builtin(x)
        elif isinstance(x, types.ModuleType):
            self._module(x)
        elif isinstance(x, functools.partial):
            self._many("partial", [x.func, x.args, x.keywords])
        elif isinstance(x, staticmethod | classmethod):
            self._many(kind.__name__, [x.__func__])
        elif isinstance(x, property):
            self._many("property", [x.fget, x.fset, x.fdel])
        elif isinstance(x, enum.Enum):
            self._many("enum", [kind, x.name, x.value])
        elif isinstance(x, torch.Generator):
            self._many("generator", [str(x.device), x.get_state()])
        elif isinstance(x, weakref.ref):
            self._many("weakref", [x()])
        elif isinstance(x, logging.Logger | torch.utils.hooks.RemovableHandle):
            # what a logger writes changes no result, and a handle is a number; its hook is the module's
            self._named("logger", kind.__module__, getattr(x, "name", ""))
        elif kind.__module__ in ("typing", "torch._ops") or kind is types.GenericAlias:
            self._named("named", kind.__module__, str(x))
        elif kind.__module__.startswith(f"{OWN}.") and hasattr(kind, "fingerprint"):
            self._fingerprinted(x)
        elif kind.__module__.startswith(f"{OWN}.") and hasattr(kind, "removal_effect"):
            self._many("scores", [x.values, x.outputs, x.at])
        else:
            self._instance(x, kind)

    def _tensor(self, x: Tensor) -> None:
        if id(x) not in self._tensors:
            try:
                plain = x.detach()
                plain = plain.to_dense() if plain.layout is not torch.strided else plain
                print_ = fingerprints.fingerprint(plain.resolve_conj().resolve_neg())
            except Exception as error:
                print_ = None
                self._cannot(f"a tensor whose bytes cannot be read ({type(error).__name__})")
            self._tensors[id(x)] = (print_, x)
        self._say("tensor", self._tensors[id(x)][0], x.requires_grad)

    def _array(self, x: np.ndarray) -> None:
        if x.dtype.hasobject:
            return self._many("array", [str(x.dtype), x.shape, x.tolist()])
        self._say("array", x.dtype.str if not x.dtype.names else x.dtype.descr, x.shape)
        self._hash.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

    def _code(self, x: types.CodeType) -> None:
        counts = (x.co_argcount, x.co_posonlyargcount, x.co_kwonlyargcount, x.co_flags & SIGNATURE)
        count = x.co_argcount + x.co_kwonlyargcount  # the arguments stand first among the variables
        named = () if x is self._nameless else x.co_varnames[:count]
        self._say("code", counts, named, x.co_exceptiontable)
        self._many("instructions", bytecode.instructions(x))

    def _function(self, f: types.FunctionType) -> None:
        if is_user_function(f):
            self._many("function", [f.__code__, [(name, value) for name, value in bytecode.held(f)]])
            self.note_reach(f)
            return
        self._named("function", bytecode.home(f), f.__code__.co_qualname)
        # a library may have made it around a user's function, as torch.func.vmap does: that is in its cells
        self._many("cells", [vars(f).get("_torchdynamo_orig_callable"), *bytecode.cells(f)])

    def note_reach(self, f: types.FunctionType) -> None:
        """Note as unknown that a function calls eval or the like, which reach what its code does not name."""
        for name in sorted(OUT_OF_SIGHT.intersection(bytecode.names(f.__code__)[0]) - f.__globals__.keys()):
            self.unknown.append(f"it calls {name}(), and what that reaches is not written in the code")

    def _builtin(self, x) -> None:
        owner = getattr(x, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return self._many(f"builtin {x.__name__}", [owner])
        module = getattr(x, "__module__", None) or getattr(owner, "__name__", None)
        if module is None or of_library(module):
            return self._named("builtin", module, x.__qualname__)
        self._cannot(f"{module}.{x.__qualname__} is of a C extension")

    def _module(self, x: types.ModuleType) -> None:
        if of_library(x.__name__):
            return self._named("module", x.__name__, "")
        public = sorted((k, v) for k, v in vars(x).items() if not k.startswith("__"))
        self._many(f"module {x.__name__}", public)

    def _class(self, x: type) -> None:
        if not is_user_class(x):
            return self._named("class", x.__module__, x.__qualname__)
        library = [(c.__module__, c.__qualname__) for c in x.__mro__ if not is_user_class(c)]
        self.libraries |= {module.partition(".")[0] for module, _ in library}
        self._many("class", [library, list(bytecode.defined(x))])
        file = getattr(sys.modules.get(x.__module__), "__file__", None) or ""
        if file.endswith((".so", ".pyd")):
            self._cannot(f"{x.__qualname__} is of a C extension")

    def _fingerprinted(self, x) -> None:
        if any(x is other for other in _busy):
            return self._say("itself")
        _busy.append(x)
        try:
            self._say(type(x).__name__, x.fingerprint())
        finally:
            _busy.pop()

    def _instance(self, x, kind: type) -> None:
        self._put(kind)
        if (
            wrapped := getattr(x, "__wrapped__", None)
            if isinstance(x, functools._lru_cache_wrapper)
            else None
        ):
            return self._many("cached", [wrapped])
        read = bytecode.state(x)
        if isinstance(x, nn.Module):
            tensors = [x._parameters, x._buffers, x._modules, x.training]
            return self._many("nn.Module", [*(dict(t) if isinstance(t, dict) else t for t in tensors), read])
        for base, plain in PLAIN.items():
            if isinstance(x, base):
                return self._many(base.__name__, [plain(x), read])
        if isinstance(x, set | frozenset):
            self._unordered(x)
            return self._put(read)
        if not is_user_class(kind) and bytecode.pickles_itself(kind):
            return self._reduced(x, kind)  # which leaves out its caches, such as the hash that a path keeps
        if bytecode.hidden(kind) or not (read or is_user_class(kind)):
            self._reduced(x, kind)
        self._put(read)

    def _reduced(self, x, kind: type) -> None:
        """Hash what pickle would write of an object that has no attributes in Python, such as a deque."""
        try:
            special = copyreg.dispatch_table.get(kind)
            reduced = special(x) if special else x.__reduce_ex__(4)
        except Exception:
            return self._cannot(f"a {kind.__module__}.{kind.__qualname__}, whose content cannot be read")
        if isinstance(reduced, str):
            return self._named("global", kind.__module__, reduced)
        made, arguments, *rest = reduced
        items = [None if part is None else list(part) for part in rest[1:3]]
        self._many("reduced", [made, arguments, rest[:1], items])
