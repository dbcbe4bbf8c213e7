"""Who helped, who harmed, and what if they were gone: a page to click on, in a notebook.

`Explorer` holds the question (which output, which examples are removed) and answers it: at once with the
prediction, and with the truth where a bank has it or after a training. Its page without widgets is plain
HTML, which a stored notebook and a web site show; `live` puts widgets of ipywidgets around the same answers.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from .. import subsets
from ..attribution import Attribution
from ..show import needs
from ..training.examples import check_indices
from .bank import Bank
from .comparison import ready
from .outputs import outputs

Shown = Tensor | Sequence  # images (n, C, H, W), or texts
CARD = "display:inline-block;margin:4px 8px;text-align:center;vertical-align:top;max-width:14em"
# set by Jupyter's server, by VS Code and by Colab, where somebody looks at a running notebook
FRONTENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")


def explore(
    scores: Attribution,
    examples: tuple | Shown | None = None,
    targets: tuple | Shown | None = None,
    *,
    bank: Bank | None = None,
    top: int = 6,
) -> Explorer:
    """Explore scores: pick an output, see who helped and harmed, remove examples, compare with the truth.

    examples   the n training examples as they are to be shown, images (n, C, H, W) or texts; with their
               labels as a pair. None: the run's first data tensors
    targets    the same for the K measured outputs; None: they are shown by number
    bank       where true outcomes are looked up, and kept; None: in memory
    top        how many helpful and harmful examples are shown

    Raises ValueError for scores without a run and measure, or where the numbers of examples or targets
    differ, and, for the widgets only, ImportError without ipywidgets.
    """
    run, measure = ready(scores)
    if examples is None:
        examples = tuple(run.data[:2]) if isinstance(run.data, tuple) else range(run.n)
    kept = bank or Bank(":memory:", run, measure)
    kept.serves(run, measure)
    return Explorer(scores, _Gallery(examples, run.n, "examples"), _targets(targets, scores), kept, top)


def _targets(targets, scores: Attribution) -> _Gallery:
    count = len(scores.outputs)
    return _Gallery([f"output {k}" for k in range(count)] if targets is None else targets, count, "targets")


class Explorer:
    """What `magic.explore` returns; a notebook shows it as the last value of a cell.

    target    the output that is looked at, 0 … K − 1
    removed   the training examples that are taken away, sorted
    """

    def __init__(self, scores: Attribution, examples: _Gallery, targets: _Gallery, bank: Bank, top: int):
        self.scores, self.examples, self.targets, self.bank, self.top = scores, examples, targets, bank, top
        self.target, self.removed = 0, ()

    def choose(self, target: int) -> None:
        """Look at another output. Raises IndexError for one that there is not."""
        if not 0 <= target < len(self.scores.outputs):
            raise IndexError(f"target={target}: there are {len(self.scores.outputs)} measured outputs")
        self.target = target

    def remove(self, examples: Iterable[int]) -> None:
        """Take these training examples away, and no others. Raises IndexError for one that there is not."""
        found = check_indices(list(examples), self.scores.values.shape[1])
        self.removed = tuple(sorted(found.tolist()))

    @property
    def predicted(self) -> float:
        """Predicted change of the output without the removed examples."""
        return self.scores.removal_effect(self.removed)[self.target].item()

    @property
    def true(self) -> float | None:
        """The true change, or None as long as no training has shown it."""
        with_all, without = (self.bank.get(w) for w in self._weights())
        return None if with_all is None or without is None else (without - with_all)[self.target].item()

    def train(self, progress: bool = True) -> float:
        """The true change, by as many trainings as are not in the bank: at most two."""
        run, measure = ready(self.scores)
        with_all, without = outputs(run, measure, self._weights(), bank=self.bank, jobs=1, progress=progress)
        return (without - with_all)[self.target].item()

    def _weights(self) -> Tensor:
        return subsets.without(self.scores.values.shape[1], [[], list(self.removed)])

    def ranked(self) -> list[tuple[str, int, float]]:
        """(role, example, score) of those that helped and harmed most."""
        frame = self.scores.top(self.target, self.top)
        return list(zip(frame["role"], frame["index"], frame["score"], strict=True))

    def answer(self) -> str:
        """Prediction and truth, in a sentence."""
        if not self.removed:
            return "Nothing is removed."
        many = f"example {self.removed[0]}" if len(self.removed) == 1 else f"{len(self.removed)} examples"
        true = self.true
        told = "not trained yet" if true is None else f"true {true:+.3f}"
        return f"Without {many}: predicted {self.predicted:+.3f}, {told}.".replace("-", "−")

    def live(self):
        """The same with widgets: choose, tick, train. Raises ImportError without ipywidgets."""
        from .explorer_widgets import page

        return page(self)

    def __repr__(self) -> str:
        return f"Explorer of {len(self.scores.outputs)} outputs, at output {self.target}. {self.answer()}"

    def _repr_html_(self) -> str:
        output = f"φ = {self.scores.outputs[self.target].item():.3f}"
        parts = [f"<div>{self.targets.card(self.target, output)}</div>"]
        for role in ("helpful", "harmful"):
            cards = [self.examples.card(i, f"τ = {s:+.3f}") for r, i, s in self.ranked() if r == role]
            parts.append(f"<div><b>{role}</b><br>{''.join(cards)}</div>")
        return f"<div>{''.join(parts)}<p>{escape(self.answer())}</p></div>"

    def _repr_mimebundle_(self, **_) -> dict:
        page = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if any(name in os.environ for name in FRONTENDS):
            page = {**self.live()._repr_mimebundle_(), **page}
        return page


class _Gallery:
    """Things to be shown by number, with labels where there are some."""

    def __init__(self, things: tuple | Shown, count: int, what: str):
        self.things, self.labels = things if isinstance(things, tuple) else (things, None)
        for part in (self.things, self.labels):
            if part is not None and len(part) != count:
                raise ValueError(f"{what}: {len(part)} are given to be shown, and there are {count}")

    def title(self, i: int) -> str:
        return f"{i}" if self.labels is None else f"{i}: a {_plain(self.labels[i])}"

    def card(self, i: int, below: str = "") -> str:
        """One of them as HTML."""
        below = escape(below).replace("-", "−")
        return f'<div style="{CARD}">{_drawn(self.things[i])}<br>{escape(self.title(i))}<br>{below}</div>'


def _plain(label) -> str:
    return str(label.item() if isinstance(label, Tensor) and label.numel() == 1 else label)


def _drawn(thing) -> str:
    """An image as <img>, anything else as its text."""
    if not isinstance(thing, Tensor) or thing.dim() < 2:
        return escape(str(thing)[:200])
    image = thing.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    image = image.movedim(0, -1).squeeze(-1) if image.dim() == 3 else image
    file = io.BytesIO()
    save = needs("matplotlib.image", "notebooks", "images need").imsave
    gray = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if image.dim() == 2 else {}
    save(file, image.numpy(), format="png", **gray)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" width="64" style="image-rendering:pixelated" alt="">'
