"""What a user is shown: a progress bar for what takes more than seconds, statistics with their intervals,
values as small tables; and what to install, or to write instead, where something is missing or was renamed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from html import escape
from typing import NamedTuple

# what to install for a package that has another name, or that comes with another one
DISTRIBUTIONS = {"matplotlib": "seaborn", "sklearn": "scikit-learn", "trak": "traker"}


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def update(self, count: int = 1) -> None:
        pass


def bar(total: int, what: str, show: bool = True):
    """A tqdm bar (a widget in a notebook); nothing if `show` is false or tqdm is not installed."""
    if not show:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=what, leave=False)


def needs(package: str, extra: str, what: str = "this needs"):
    """The package, or the module of a package, imported.

    package  as in an import statement, such as "scipy.stats"
    extra    the optional dependency of this project that brings it, such as "notebooks"
    what     the beginning of the message: who needs it

    Raises ImportError, which names the extra to install, where the package is missing.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        name = DISTRIBUTIONS.get(top, top)
        raise ImportError(f"{what} {name}: pip install 'magic-attribution[{extra}]'", name=top) from error


def old_names(module: str, renamed: Mapping[str, str]) -> Callable:
    """The `__getattr__` of a module in which things were renamed: old names work, with a warning.

    module   its `__name__`
    renamed  old name -> new name
    """

    def find(name: str):
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_old(f"{module}.{name}", renamed[name])
        return getattr(sys.modules[module], renamed[name])

    return find


def warn_of_old(old: str, new: str) -> None:
    """Tell the caller's caller that a name has changed; the old one works for one version."""
    warnings.warn(f"{old} is {new} now; the old name will go", DeprecationWarning, stacklevel=3)


class Figure(NamedTuple):
    """A statistic with its interval: the value, and the two ends of what it may be, in the same unit.

    What the interval is, and of how many percent, the property that returns the figure says. It prints itself
    with three digits, or as a format says: f"{figure:.4f}" gives 0.9900 [0.9780, 0.9930].
    """

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(x, spec or ".3f") for x in self)
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)

    def __repr__(self) -> str:
        return format(self)


class Table:
    """A value shown as a table of rows(): (what, how much), in text and in a notebook."""

    @property
    def caption(self) -> str:
        return type(self).__name__

    def rows(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return f"{self.caption}\n" + "\n".join(f"  {name:<{width}}   {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        cell = "style='text-align:left'"
        body = "".join(
            f"<tr><th {cell}>{escape(name)}</th><td {cell}>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>{escape(self.caption)}</caption>{body}</table>"
