"""Coloured passages: the right ones, each token's own score, and nothing of a text that could do harm."""

import matplotlib
import pytest
import torch

import magic
from magic import text
from magic.text.passages import Passages

matplotlib.use("Agg")


def scored(values):
    values = torch.as_tensor(values)
    return magic.Attribution(values, torch.zeros(len(values)), torch.ones(values.shape[1:]))


def decode(ids):
    return "".join(map(chr, ids))


WORDS = torch.tensor([[*map(ord, "ab<c")], [*map(ord, "\n&$x")], [*map(ord, "wxyz")]])
SCORES = scored([[[-1.0, 0.0, 0.5], [2.0, 0.25, 0.0], [-2.0, 0.0, -0.5]], [[0.0] * 3, [1.0] * 3, [0.0] * 3]])


def test_the_most_helpful_and_harmful_with_each_tokens_score():
    shown = text.passages(SCORES, WORDS, decode, k=1)
    assert [(p.role, p.index, p.score) for p in shown.found] == [("helpful", 2, -2.5), ("harmful", 1, 2.25)]
    assert shown.found[0].tokens == ("w", "x", "y", "z") and shown.found[0].scores == (0.0, -2.0, 0.0, -0.5)
    table = shown.frame()
    assert len(table) == 8 and table.score.sum() == -0.25 and list(table.token[:4]) == [*"wxyz"]
    assert [p.index for p in text.passages(SCORES, WORDS, decode, target=1).found] == [1]
    assert repr(shown).splitlines() == ["helpful 2 (-2.5): wxyz", "harmful 1 (+2.25): ↵&$x"]


def test_scores_of_whole_examples_color_whole_passages():
    shown = text.passages(SCORES.per_example(), WORDS, decode, k=1)
    assert shown.found[0].scores == (-2.5,) * 4


def test_hostile_text_is_shown_and_not_obeyed():
    evil = [
        "<script>alert(1)</script>",
        "' onmouseover='alert(2)",
        "</span></p><img src=x onerror=alert(3)>",
        "\x00\u202e&lt;",
    ]
    ids = torch.tensor([[0, 1, 2, 3]])
    shown = text.passages(scored([[[-1.0, 1.0, -3.0]]]), ids, lambda ids: evil[ids[0]])
    page = shown._repr_html_()
    for part in ("<script", "<img", "' onmouseover", "\x00", "\u202e"):
        assert part not in page
    assert "&lt;script&gt;" in page and "&amp;lt;" in page and page.count("<span") == 4
    shown.plot()


def test_the_picture():
    ax = text.passages(SCORES, WORDS, decode, k=1).plot(columns=40)
    assert sum(t.get_text() == "w" for t in ax.texts) >= 1 and len(ax.patches) == 4
    with pytest.raises(ValueError, match="at least 10"):
        text.passages(SCORES, WORDS, decode).plot(columns=3)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="tokens are 2 examples, the scores of 3"):
        text.passages(SCORES, WORDS[:2], decode)
    with pytest.raises(ValueError, match="it must be one token longer"):
        text.passages(SCORES, WORDS[:, 1:], decode)
    with pytest.raises(IndexError):
        text.passages(SCORES, WORDS, decode, target=2)
    assert Passages(()).largest == 1.0
