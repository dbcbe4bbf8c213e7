"""What a Python function, class or object refers to, and whose code it is: the user's or a library's.

Code is read as bytecode, not as source. Bytecode is what runs: it exists for lambdas and for code made by
exec, and it leaves out comments, docstrings, blank lines, the names of locals, and the line or cell that
a function stands in. An instruction names its constants and its names by their places in two lists, and
these places move when a docstring is added. So instructions are read with the constants and names
themselves. Bytecode differs between versions of Python, so the version has to be noted beside it.
"""

from __future__ import annotations

import bisect
import builtins
import dis
import enum
import functools
import importlib.util
import json
import sys
import sysconfig
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from torch import nn


class _Absent(enum.Enum):
    """What stands for the value of a name that is defined nowhere yet."""

    ABSENT = enum.auto()


ABSENT = _Absent.ABSENT
# Flags of code that belong to its signature: *args, **kwargs, generator, coroutine, async generator.
SIGNATURE = 0x04 | 0x08 | 0x20 | 0x80 | 0x200
ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "IMPORT_FROM"}
NOT_GLOBAL = ATTRIBUTES | {"IMPORT_NAME", "STORE_NAME", "DELETE_NAME"}
SAYS_NOTHING = {"__doc__", "__firstlineno__", "__static_attributes__"}  # of a class: where and what about
OUT_OF_SIGHT = {"eval", "exec", "globals", "__import__"}  # what these reach is not written in the code
OF_CLASSES = SAYS_NOTHING | {
    "__dict__", "__weakref__", "__module__", "__qualname__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl", "__slots__",
    "__orig_bases__", "__parameters__", "__dataclass_fields__", "__dataclass_params__", "__match_args__",
    "_backward_cls", "__classcell__",
}  # fmt: skip
LIBRARY_FOLDERS = tuple({str(Path(p).resolve()) for k, p in sysconfig.get_paths().items() if "lib" in k})
OWN = __name__.partition(".")[0]
# magic's own models and losses are code of the run that trains with one
READ_LIKE_A_USERS = {f"{OWN}.book.models", f"{OWN}.text.losses"}


# -- what is whose ---------------------------------------------------------------------------------


@functools.cache
def _library(name: str, file: str | None) -> bool:
    """Whether the module `name`, which lies in `file`, is a library's."""
    top = name.partition(".")[0]
    if top == OWN:
        return name not in READ_LIKE_A_USERS
    if top == "__main__":
        return False
    if file is None:
        return top in sys.builtin_module_names or top in sys.stdlib_module_names
    parts = Path(file).parts
    if "site-packages" in parts or "dist-packages" in parts:
        return True
    return str(Path(file).resolve()).startswith(LIBRARY_FOLDERS)


def of_library(module: str | None) -> bool:
    """Whether the module of this name is the standard library's, an installed package's or magic's."""
    if not module:
        return False
    found, package = sys.modules.get(module), sys.modules.get(module.partition(".")[0])
    # a part of an extension (torch._C._nn) has no file of its own
    return _library(module, getattr(found, "__file__", None) or getattr(package, "__file__", None))


def home(f: types.FunctionType) -> str | None:
    """The module whose code a function is; functools.wraps changes `__module__`, but not this."""
    return f.__globals__.get("__name__")


def version(top: str) -> str:
    """The version of a package, or Python's for a module of the standard library."""
    if top in sys.stdlib_module_names:
        return sys.version.split()[0]
    found = getattr(sys.modules.get(top), "__version__", None)
    try:
        return str(found or metadata.version(top))
    except metadata.PackageNotFoundError:
        return "of no known version"


def is_user_function(x) -> bool:
    return isinstance(x, types.FunctionType) and not of_library(home(x))


def is_user_class(x) -> bool:
    return isinstance(x, type) and not of_library(x.__module__)


# -- code ------------------------------------------------------------------------------------------


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and all code nested in it, such as that of lambdas."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def instructions(code: types.CodeType) -> list[tuple]:
    """(operation, argument) of each instruction: names and constants themselves, locals by their numbers.

    A jump is told by the number of the instruction that it leads to. Instructions that do nothing are left
    out, and so is what stores the docstring or the line of a class.
    """
    kept = [i for i in dis.get_instructions(code) if i.opname not in ("NOP", "EXTENDED_ARG", "CACHE")]
    silent = set()
    for k, i in enumerate(kept):
        if i.opname == "STORE_NAME" and i.argval in SAYS_NOTHING:
            silent |= {k - 1, k}
    kept = [i for k, i in enumerate(kept) if k not in silent]
    offsets = [i.offset for i in kept]
    found = []
    for i in kept:
        if i.opcode in dis.hasconst and i.arg is not None:  # dis does not look up names of keyword arguments
            found.append((i.opname, code.co_consts[i.arg]))
        elif i.opcode in dis.hasname:
            found.append((i.opname, i.argval))
        elif i.opcode in dis.hasjrel or i.opcode in dis.hasjabs:
            found.append((i.opname, bisect.bisect_left(offsets, i.argval)))
        else:
            found.append((i.opname, i.arg))
    return found


def names(code: types.CodeType) -> tuple[list[str], list[str], list[tuple[str, int]]]:
    """The names that code and nested code load as globals, those it takes as attributes, its imports."""
    loaded: dict[str, bool] = {}
    attributes: dict[str, bool] = {}
    imported: dict[tuple[str, int], bool] = {}
    for part in codes(code):
        read = [i for i in dis.get_instructions(part) if i.opname != "EXTENDED_ARG"]
        texts = (c for c in part.co_consts if isinstance(c, str) and c.isidentifier())
        attributes |= dict.fromkeys(texts, True)  # getattr(x, "name")
        for k, i in enumerate(read):
            if i.opname == "IMPORT_NAME":
                imported[i.argval, read[k - 2].argval or 0] = True  # two before it, the level is loaded
            if i.opcode in dis.hasname and i.opname in ATTRIBUTES:
                attributes[i.argval] = True
            elif i.opcode in dis.hasname and i.opname not in NOT_GLOBAL:
                loaded[i.argval] = True
    return list(loaded), list(attributes), list(imported)


def _imported(f: types.FunctionType, name: str, level: int):
    """The module that an import inside a function finds, or None. A user's module is imported for it."""
    full = f"{'.' * level}{name}"
    try:
        full = importlib.util.resolve_name(full, f.__globals__.get("__package__"))
        if full in sys.modules:
            return sys.modules[full]
        spec = importlib.util.find_spec(full.partition(".")[0])
        if spec is None or _library(full, spec.origin):
            return None
        return importlib.import_module(full)
    except Exception:
        return None


def held(f: types.FunctionType) -> Iterator[tuple[str, object]]:
    """(name, value) of all that a user's function refers to."""
    code = f.__code__
    yield from zip(code.co_freevars, cells(f), strict=True)
    defaults = f.__defaults__ or ()
    yield from zip(
        code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True
    )
    yield from (f.__kwdefaults__ or {}).items()
    yield from ((name, x) for name, x in vars(f).items() if name != "__wrapped__")
    loaded, attributes, imported = names(code)
    for name in loaded:
        value = f.__globals__.get(name, ABSENT)
        if value is ABSENT:
            value = getattr(builtins, name, ABSENT)
        yield from _through(name, value, attributes, [])
    for name, level in imported:
        module = _imported(f, name, level)
        yield from _through(name, name if module is None else module, attributes, [])


def _through(name: str, value, attributes: list[str], seen: list) -> Iterator[tuple[str, object]]:
    """The value under its name; in the place of a user's module, those of its attributes that are named."""
    if not isinstance(value, types.ModuleType) or of_library(value.__name__):
        yield name, value
    elif not any(value is module for module in seen):
        seen.append(value)
        for attribute in attributes:
            if attribute in vars(value):
                yield from _through(f"{name}.{attribute}", vars(value)[attribute], attributes, seen)


def defined(cls: type) -> Iterator[tuple[str, object]]:
    """(name, value) of all that the user's classes among a class and its parents define."""
    for parent in filter(is_user_class, cls.__mro__):
        if issubclass(parent, enum.Enum):
            yield "members", [(name, member.value) for name, member in parent.__members__.items()]
        for name, value in sorted(vars(parent).items()):
            skip = name in OF_CLASSES or isinstance(value, types.MemberDescriptorType)
            if issubclass(parent, enum.Enum) and not isinstance(value, types.FunctionType):
                skip = True
            if not skip:
                yield f"{parent.__name__}.{name}", value


def state(x) -> dict[str, object]:
    """What an object holds in its attributes and slots, by name.

    Of an nn.Module, its parameters, buffers and modules are left out, and what is empty.
    """
    found = dict(getattr(x, "__dict__", {}))
    for parent in type(x).__mro__:
        slots = vars(parent).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(x, name):
                found[name] = getattr(x, name)
    if isinstance(x, nn.Module):
        for name in ("_parameters", "_buffers", "_modules", "training"):
            found.pop(name, None)
        for name in ("_flat_weights", "_flat_weight_refs") if isinstance(x, nn.RNNBase) else ():
            found.pop(name, None)  # these are its parameters once more
        # hooks are kept under numbers that count through the whole process, so the numbers are left out
        found = {
            k: list(v.values()) if k.endswith("_hooks") and isinstance(v, dict) else v
            for k, v in found.items()
        }
        found = {k: v for k, v in found.items() if not (k.startswith("_") and _empty(v))}
    # transformers keeps Python's hash of how a model generates, which is another one in each process
    found.pop("_original_object_hash", None)
    if any(parent.__name__ == "PreTrainedTokenizerBase" for parent in type(x).__mro__):
        found = _tokenizer(found)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def _tokenizer(found: dict) -> dict:
    """What a tokenizer of transformers holds, without what it remembers of its last call.

    That is which warnings it has given, and, in one that is written in Rust, how it padded and cut.
    """
    found.pop("deprecation_warnings", None)
    for name, value in found.items():
        if hasattr(value, "to_str"):
            said = json.loads(value.to_str())
            found[name] = {key: said[key] for key in said if key not in ("padding", "truncation")}
    return found


def _empty(x) -> bool:
    return x is None or x is False or (isinstance(x, dict | set | list) and not x)


def hidden(cls: type) -> bool:
    """Whether an object of this class holds memory that neither its attributes nor its slots show."""
    slots = 0
    for parent in cls.__mro__:
        own = vars(parent).get("__slots__", ())
        own = (own,) if isinstance(own, str) else own
        slots += sum(name not in ("__dict__", "__weakref__") for name in own)
    offsets = (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__basicsize__ > object.__basicsize__ + 8 * (slots + offsets)


def pickles_itself(kind: type) -> bool:
    """Whether a class says itself what of its objects is to be kept."""
    of_all = ("__reduce__", "__reduce_ex__", "__getstate__")
    return any(getattr(kind, name) is not getattr(object, name) for name in of_all)


def cells(f: types.FunctionType) -> list:
    """What the closure of a function holds."""
    found = []
    for cell in f.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(ABSENT)
    return found
