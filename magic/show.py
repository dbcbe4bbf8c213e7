"""What a user is shown: a progress bar for what takes more than seconds, and values as small tables."""

from __future__ import annotations

import importlib
from html import escape


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


def needs(package: str, extra: str):
    """The package, imported; ImportError that names the extra to install where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        raise ImportError(f"this needs {top}: pip install 'magic-attribution[{extra}]'", name=top) from error


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
