"""The explorer's widgets: they show what `Explorer` answers, and pass on what is clicked."""

from __future__ import annotations

from html import escape

from ..show import needs


def page(explorer):
    """A box for an `Explorer`: a choice of output, examples to tick, the answer, a button that trains."""
    return _Page(explorer).box


class _Page:
    def __init__(self, explorer):
        self.explorer, self.w = explorer, needs("ipywidgets", "notebooks", "the explorer's widgets need")
        w, targets = self.w, explorer.targets
        choices = [(targets.title(k), k) for k in range(len(explorer.scores.outputs))]
        self.choice = w.Dropdown(options=choices, value=explorer.target, description="output")
        self.button = w.Button(description="Train without them", icon="play", layout=w.Layout(width="auto"))
        self.bar, self.answer = w.Output(), w.HTML()
        self.asked, self.rows = w.HTML(), w.VBox()
        self.choice.observe(self._chosen, names="value")
        self.button.on_click(self._trained)
        below = w.HBox([self.button, self.answer])
        self.box = w.VBox([self.choice, self.asked, self.rows, below, self.bar])
        self._show()

    def _show(self) -> None:
        """Draw the examples anew, and the answer."""
        explorer, w = self.explorer, self.w
        output = f"φ = {explorer.scores.outputs[explorer.target].item():.3f}"
        self.asked.value = explorer.targets.card(explorer.target, output)
        self.ticks, rows = {}, []
        for role in ("helpful", "harmful"):
            cards = []
            for i, score in ((i, score) for r, i, score in explorer.ranked() if r == role):
                wide = w.Layout(width="auto")
                tick = w.Checkbox(i in explorer.removed, description="remove", indent=False, layout=wide)
                tick.observe(self._ticked, names="value")
                self.ticks[i] = tick
                cards.append(w.VBox([w.HTML(explorer.examples.card(i, f"τ = {score:+.3f}")), tick]))
            layout = w.Layout(flex_flow="row wrap")
            rows.append(w.VBox([w.HTML(f"<b>{role}</b>"), w.HBox(cards, layout=layout)]))
        self.rows.children = rows
        self._tell()

    def _tell(self) -> None:
        self.answer.value = self.explorer.answer()
        self.button.disabled = not self.explorer.removed or self.explorer.true is not None

    def _chosen(self, change) -> None:
        self.explorer.choose(change["new"])
        self._show()

    def _ticked(self, _) -> None:
        """Those ticked here, and those that were removed and are not on this page."""
        kept = [i for i in self.explorer.removed if i not in self.ticks]
        self.explorer.remove(kept + [i for i, tick in self.ticks.items() if tick.value])
        self._tell()

    def _trained(self, _) -> None:
        """Train, with a bar. An error would be lost in a log, so it is shown, too."""
        self.button.disabled, self.answer.value = True, "Training …"
        try:
            with self.bar:
                self.explorer.train()
            self.bar.clear_output()
            self._tell()
        except Exception as error:
            self.answer.value = escape(f"{type(error).__name__}: {error}")
            self.button.disabled = False
            raise
