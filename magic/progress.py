"""A progress bar for whatever may take more than a few seconds."""

from __future__ import annotations


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
