"""What a thing is: the code of a loss, a measure or a model and all that it holds, part by part.

Scores, banks and folders outlive the cell that made them. After an edit in a notebook they must not answer
for the edited code. So they keep the identity of what they were made from: a digest of every part, under a
name that a reader understands, so that a refusal can say which part has changed. How code and values are
read is told in bytecode.py and content.py.

A part of which something cannot be known (a C extension, an open file, a function that calls eval) is in
`unknown`, with the reason; it counts as changed until the reader vouches for it with `trust`.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from . import fingerprints
from .bytecode import cells, defined, held, home, is_user_class, is_user_function, state, version
from .content import Content

UNKNOWN = "unknown:"  # stands before the digest of a part of which something cannot be known
CODE, VERSIONS = "the code of ", "the versions of "


@dataclass(frozen=True)
class Identity:
    """Digests (16 hex digits) of the parts of a thing, by name, and why some cannot be known whole."""

    parts: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: Identity) -> Identity:
        return Identity(self.parts | other.parts, self.unknown | other.unknown)


class _Parts:
    """Takes a thing apart: a part for each function, and one for each value that a function names."""

    def __init__(self, role: str):
        self.role = role  # "loss", "measure" or "model"
        self.parts: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self._content = Content()
        self._met: dict[int, tuple[str, object]] = {}  # id -> (label, what was taken apart under it)

    def identity(self) -> Identity:
        libraries = [(top, version(top)) for top in sorted({*self._content.libraries, "builtins"})]
        self._note(f"{VERSIONS}what the {self.role} imports", fingerprints.digest(repr(libraries)), [])
        return Identity(self.parts, self.unknown)

    def _note(self, name: str, digest: str, unknown: list[str]) -> None:
        """Add a part, of which these things are unknown."""
        if name in self.parts:  # two things under one name
            digest = fingerprints.digest(self.parts[name] + digest)
        if unknown or name in self.unknown:
            reasons = [self.unknown[name]] if name in self.unknown else []
            self.unknown[name] = "; ".join(dict.fromkeys(reasons + unknown))
            digest = UNKNOWN + digest.removeprefix(UNKNOWN)
        self.parts[name] = digest

    def _called(self, label: str) -> str:
        return f"{CODE}the {self.role}" + (f": {label}" if label else "")

    def hold(self, label: str, value) -> None:
        """A part of its own for a value."""
        digest = self._content.digest(value)
        name = f"what the {self.role} holds" + (f": {label}" if label else "")
        self._note(name, digest, self._content.unknown)

    def add(self, label: str, value) -> None:
        """The parts of a value that is called `label`; the thing itself has no label."""
        if is_user_function(value) or is_user_class(value):
            if id(value) in self._met:
                return self._note(self._called(label), fingerprints.digest(self._met[id(value)][0]), [])
            self._met[id(value)] = (label, value)
            (self._function if is_user_function(value) else self._class)(label, value)
        elif isinstance(value, types.MethodType):
            self.add(label, value.__func__)
            self._object(label, value.__self__)
        elif isinstance(value, functools.partial):
            self.add(label, value.func)
            self.hold(self._in(label, "arguments"), (value.args, value.keywords))
        elif isinstance(value, staticmethod | classmethod):
            self.add(label, value.__func__)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.add(label, value.__wrapped__)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            self._made(label, value)
        elif isinstance(value, property):
            for accessor in filter(None, (value.fget, value.fset, value.fdel)):
                self.add(label, accessor)
        elif not label and is_user_class(type(value)):
            self._object(label, value)
        elif not label or _named_only(value):
            digest = self._content.digest(value)
            self._note(self._called(label), digest, self._content.unknown)
        else:
            self.hold(label, value)

    @staticmethod
    def _in(label: str, name: str) -> str:
        return f"{label}.{name}" if label else name

    def _function(self, label: str, f: types.FunctionType) -> None:
        # magic calls the thing itself by position, so the names of its arguments do not matter
        digest, unknown = self._content.code(f.__code__, named=bool(label)), list(self._content.unknown)
        self._content.unknown = []
        self._content.note_reach(f)
        unknown += self._content.unknown
        own: list[tuple[str, object]] = []
        libraries: list[tuple[str, object]] = []
        for name, value in held(f):
            (libraries if _named_only(value) else own).append((name, value))
        digest = fingerprints.digest(digest + self._content.digest(libraries))
        self._note(self._called(label), digest, unknown + self._content.unknown)
        for name, value in own:
            code = is_user_function(value) or is_user_class(value)
            self.add(name if code else self._in(label, name), value)

    def _made(self, label: str, f: types.FunctionType) -> None:
        """A function that a library made around the user's: under no_grad, or mapped by torch.func.vmap."""
        self._note(self._called(label), fingerprints.digest(f"{home(f)}.{f.__code__.co_qualname}"), [])
        if original := vars(f).get("_torchdynamo_orig_callable"):
            return self.add(label or "compiled", original)
        if id(f) not in self._met:
            self._met[id(f)] = (label, f)
            for name, value in zip(f.__code__.co_freevars, cells(f), strict=True):
                self.add(self._in(label, name), value)

    def _class(self, label: str, cls: type) -> None:
        bases = [(c.__module__, c.__qualname__) for c in cls.__mro__ if not is_user_class(c)]
        self._content.libraries |= {module.partition(".")[0] for module, _ in bases}
        digest = self._content.digest((bases, [name for name, _ in defined(cls)]))
        self._note(self._called(label or cls.__name__), digest, [])
        for name, value in defined(cls):
            self.add(name, value)

    def _object(self, label: str, x) -> None:
        """An object of a user's class: the class, and each thing that the object holds."""
        plain = is_user_class(type(x)) and not isinstance(x, nn.Module) and type(x).__base__ is object
        if isinstance(x, type) or not plain or not hasattr(x, "__dict__"):
            return self.hold(self._in(label, "self"), x)
        self.add(type(x).__name__, type(x))
        for name, value in state(x).items():
            self.hold(self._in(label, name), value)

    def modules(self, model: nn.Module) -> None:
        """A model's classes and what its modules hold beside parameters, buffers and modules."""
        tree, plain = [], []
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            self._content.call(x, name)
        for path, module in model.named_modules(remove_duplicate=False):
            kind = type(module)
            tree.append((path, kind.__module__, kind.__qualname__, [*module._parameters], [*module._buffers]))
            read = state(module)
            if not is_user_class(kind):
                self._content.libraries.add(kind.__module__.partition(".")[0])
                plain.append((path, read))
                continue
            if id(kind) not in self._met:
                self.add(kind.__name__, kind)
            for name, value in read.items():
                self.hold(self._in(path, name), value)
        # the module of a user's class may be renamed with its file; its code is what counts
        tree = [(path, "" if "__main__" in module else module, *rest) for path, module, *rest in tree]
        self._note(f"the modules of the {self.role}", self._content.digest(tree), [])
        self.hold("in layers of libraries", plain)


def _named_only(x) -> bool:
    """Whether x is a module, class or function of a library, and so only a name in the code that uses it."""
    kinds = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    whole = not getattr(x, "__closure__", None) if isinstance(x, types.FunctionType) else True
    return isinstance(x, kinds) and whole and not is_user_function(x) and not is_user_class(x)


def of_callable(f, role: str) -> Identity:
    """The identity of a function, or of anything that is called, such as a loss or a measure."""
    parts = _Parts(role)
    parts.add("", f)
    return parts.identity()


def of_model(model: nn.Module, role: str = "model") -> Identity:
    """The identity of a model but for its parameters, buffers and modes, which a run keeps in s_0."""
    parts = _Parts(role)
    parts.modules(model)
    return parts.identity()


# -- comparing -------------------------------------------------------------------------------------


def changed(here: Identity | dict, there: dict, trust: bool | Iterable[str] = False) -> list[str]:
    """The names of the parts that differ or cannot be known, without those that the reader trusts.

    trust  False; True for all parts that are code or cannot be known, but never for data, states,
           optimizer or batches; or the names of parts
    """
    parts = here.parts if isinstance(here, Identity) else here
    names = [
        name
        for name in itertools.chain(parts, (k for k in there if k not in parts))
        if parts.get(name) != there.get(name) or str(parts.get(name)).startswith(UNKNOWN)
    ]
    if trust is True:
        return [name for name in names if not _is_code(name, parts, there)]
    trusted = {trust} if isinstance(trust, str) else set(trust or ())
    if strangers := sorted(trusted - {*parts, *there}):
        raise ValueError(f"trust={strangers}: there are no such parts; those that differ are {names}")
    return [name for name in names if name not in trusted]


def _is_code(name: str, *sides: dict) -> bool:
    if name.startswith((CODE, VERSIONS)):
        return True
    return any(str(side.get(name)).startswith(UNKNOWN) for side in sides)


def refusal(what: str, names: list[str], since: str | None, out: str, unknown: dict | None = None) -> str:
    """The sentence that refuses `what`, made at `since`, for what is here: why, and the way out."""
    unknown = unknown or {}
    other = [name for name in names if name not in unknown]
    reasons = []
    if other:
        shown = "; ".join(other[:6]) + (f"; and {len(other) - 6} more" if len(other) > 6 else "")
        reasons.append(f"since it was made{f' ({since})' if since else ''}, this has changed: {shown}")
    reasons += [f"{name} cannot be known: {unknown[name]}" for name in names if name in unknown]
    return (
        f"{what}: {'. '.join(reasons)}. {out}; or, if you know that this alters no result, "
        f"vouch for it with trust={names[:6]!r}"
    )
