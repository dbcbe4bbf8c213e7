"""Which passages, and which of their tokens, moved an output: as coloured text, as a table, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from ..attribution import Attribution
from ..show import needs

SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍"}  # characters that would not be seen
COLORS = {"helpful": (1, 115, 178), "harmful": (222, 143, 5)}  # blue and orange of the book's figures


@dataclass(frozen=True)
class Passage:
    """One training example, token by token.

    role     "helpful" or "harmful": which way it moves the output, read as a loss
    index    its number among the training examples
    score    its score, the sum of its tokens'
    tokens   the text of each of its L + 1 tokens
    scores   a score for each; the first, which nothing predicts, has 0. Without scores for tokens, all have
             the passage's own
    """

    role: str
    index: int
    score: float
    tokens: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Passages:
    """What `magic.text.passages` returns; a notebook shows it as the last value of a cell."""

    found: tuple[Passage, ...]

    @property
    def largest(self) -> float:
        """The largest size of a token's score, which has the full colour."""
        return max((abs(s) for one in self.found for s in one.scores), default=0.0) or 1.0

    def frame(self):
        """A pandas DataFrame with a row for each token. Raises ImportError without pandas."""
        pd = needs("pandas", "notebooks")
        rows = [
            (one.role, one.index, place, token, score)
            for one in self.found
            for place, (token, score) in enumerate(zip(one.tokens, one.scores, strict=True))
        ]
        return pd.DataFrame(rows, columns=["role", "index", "place", "token", "score"])

    def plot(self, columns: int = 76, ax=None):
        """The coloured text as a picture, for paper and for places without HTML; returns the axes.

        columns   characters in a line. Raises ValueError for fewer than 10, ImportError without matplotlib.
        """
        if columns < 10:
            raise ValueError(f"columns={columns}: at least 10 characters in a line")
        plt = needs("matplotlib.pyplot", "notebooks", "the picture needs")
        lines = [line for one in self.found for line in _lines(one, columns)]
        if ax is None:
            _, ax = plt.subplots(figsize=(columns * 0.092, 0.3 + 0.2 * len(lines)))
        ax.set(xlim=(0, columns), ylim=(len(lines), 0))
        ax.axis("off")
        for row, line in enumerate(lines):
            for column, character, score in line:
                if score:
                    color = *(c / 255 for c in COLORS[_role(score)]), _strength(score, self.largest)
                    ax.add_patch(plt.Rectangle((column, row + 0.05), 1, 0.9, color=color, linewidth=0))
                ax.text(
                    column + 0.5, row + 0.5, character.replace("$", r"\$"),
                    family="monospace", fontsize=8, ha="center", va="center",
                )  # fmt: skip
        return ax

    def _repr_html_(self) -> str:
        parts = []
        for one in self.found:
            spans = "".join(map(self._span, one.tokens, one.scores))
            parts.append(
                f"<p style='margin:0.6em 0 0.1em'><b>{escape(one.role)}</b>, training example {one.index}, "
                f"score {one.score:+.3g}</p><p style='font-family:monospace;margin:0;line-height:1.7;"
                f"overflow-wrap:anywhere'>{spans}</p>"
            )
        return "<div>" + "".join(parts) + "</div>"

    def _span(self, token: str, score: float) -> str:
        """A token as HTML: all of its text escaped, its score as colour and as a tooltip."""
        red, green, blue = COLORS[_role(score)]
        color = f"rgba({red},{green},{blue},{_strength(score, self.largest):.2f})"
        return f"<span title='{score:+.3g}' style='background:{color}'>{escape(_visible(token))}</span>"

    def __repr__(self) -> str:
        return "\n".join(
            f"{one.role} {one.index} ({one.score:+.3g}): {''.join(map(_visible, one.tokens))}"
            for one in self.found
        )


def passages(
    scores: Attribution,
    tokens: Tensor | Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    target: int = 0,
    k: int = 3,
) -> Passages:
    """The k most helpful and the k most harmful training examples for one output, token by token.

    scores   per token, (K, n, L), or per example, (K, n), which colours a passage as a whole
    tokens   the n training examples, each of L + 1 token ids: token l + 1 has the score l
    decode   token ids -> their text, such as tokenizer.decode; it is called for each token
    target   which output

    An output is read as a loss: helpful is what makes it smaller. Raises ValueError where the tokens do not
    fit the scores, IndexError for a target that there is not.
    """
    if len(tokens) != scores.values.shape[1]:
        raise ValueError(f"tokens are {len(tokens)} examples, the scores of {scores.values.shape[1]}")
    found = []
    for role, index, score, _ in scores.top(target, k).itertuples(index=False):
        ids = torch.as_tensor(tokens[index]).tolist()
        if scores.values.dim() == 3:
            row = [0.0, *scores.values[target, index].tolist()]
        else:
            row = [score] * len(ids)
        if len(row) != len(ids):
            raise ValueError(
                f"example {index} has {len(ids)} tokens, and there are scores for {len(row) - 1}: it must be "
                "one token longer"
            )
        found.append(Passage(role, int(index), score, tuple(decode([i]) for i in ids), tuple(row)))
    return Passages(tuple(found))


def _role(score: float) -> str:
    return "helpful" if score < 0 else "harmful"


def _strength(score: float, largest: float) -> float:
    """0 … 0.85: how strong the colour is; a root, so that small scores are seen beside a large one."""
    return 0.85 * (abs(score) / largest) ** 0.5


def _visible(token: str) -> str:
    """A token's text with every character to be seen; what is not printable becomes a box."""
    return "".join(SHOWN.get(c, c if c.isprintable() else "▯") for c in token)


def _lines(one: Passage, columns: int) -> list[list[tuple[int, str, float]]]:
    """The passage's lines: a heading, and its characters as (column, character, score)."""
    heading = f"{one.role}, training example {one.index}, score {one.score:+.3g}"
    text = [(c, s) for token, s in zip(one.tokens, one.scores, strict=True) for c in _visible(token)]
    rows = [[(c, 0.0) for c in heading[:columns]]]
    rows += [text[i : i + columns] for i in range(0, len(text), columns)] + [[]]
    return [[(column, c, s) for column, (c, s) in enumerate(row)] for row in rows]
