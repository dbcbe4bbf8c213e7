"""What has to hold of every checker of an exercise, for an answer that is right and for one that is wrong."""

from collections.abc import Iterable
from typing import Any

from magic.book.exercises.judging import judge


def passes(number: str, answer: Any) -> None:
    ok, text = judge(number, answer)
    assert ok and text.startswith(f"✓ {number}: right. You wrote "), text


def fails(number: str, answer: Any, words: Iterable[str]) -> None:
    """The answer is refused, and the reply contains each of the words."""
    ok, text = judge(number, answer)
    assert not ok and text.startswith(f"✗ {number}: "), text
    assert all(word in text for word in words), text
