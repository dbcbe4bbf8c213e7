"""What the chapters share: data, models, plots, claims that are checked, and checkers for the exercises.

Nothing else needs it. A reader needs one name of it: `from magic.book import check`.
"""

from .exercises.judging import check

__all__ = ["check"]
