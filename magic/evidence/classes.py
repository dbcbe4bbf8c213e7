"""Runs whose loss is the cross-entropy of classes: of one label for each example, or of every next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .estimates import Tensors, losses_of

MASKED = -100  # the label of what is no target


@dataclass(frozen=True)
class Classes:
    """How a run's loss is made of cross-entropies: with c an example's shares, its loss is Σ_l c_l CE_l.

    tokens   whether they are the next tokens of sequences, data = (tokens,) or (tokens, labels), whose model
             is called with all tokens but the last; else data = (inputs, labels), and L is 1
    mean     whether an example's loss is the mean over its targets, and not their sum
    """

    tokens: bool
    mean: bool = False

    def logits(self, model, *batch: Tensor) -> Tensor:
        """(B, L, V): what the model gives for a batch."""
        if not self.tokens:
            return model(batch[0]).unsqueeze(1)
        options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        out = model(batch[0][:, :-1], **options)
        return getattr(out, "logits", out)

    def labels(self, *batch: Tensor) -> Tensor:
        """(B, L): the classes that are right, −100 where there is no target."""
        return batch[-1][:, 1:] if self.tokens else batch[1].unsqueeze(1)

    def shares(self, labels: Tensor) -> Tensor:
        """(B, L): what each cross-entropy counts for in its example's loss."""
        here = (labels != MASKED).double()
        return here / here.sum(1, keepdim=True) if self.mean else here

    def margins(self, model, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) each: log(p/(1 − p)) of the right class, p its probability, and 1 − p; 0 without target."""
        logits, labels = self.logits(model, *batch), self.labels(*batch)
        right = labels.clamp_min(0).unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)
        margin = logits.masked_fill(~right, 0).sum(-1) - logits.masked_fill(right, -torch.inf).logsumexp(-1)
        here = labels != MASKED
        return margin * here, torch.sigmoid(-margin) * here

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, L), 0 where there is no target."""
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=MASKED, reduction="none")
        return flat.view(labels.shape)


def classes_of(run: Run, test: Tensors, state: State) -> Classes | str:
    """How the run's loss is made of cross-entropies, found by comparing it on `test`; or why it is not."""
    if reason := _no_labels(run, test):
        return reason
    tokens = len(test) == 1 or test[1].dim() == 2
    with torch.no_grad(), determinism.alone():
        model = run.model(state)
        losses = losses_of(run, model, test)
        for kind in (Classes(tokens, mean=True), Classes(tokens)) if tokens else (Classes(False),):
            try:
                logits, labels = kind.logits(model, *test), kind.labels(*test)
                each = kind.cross_entropy(logits, labels) * kind.shares(labels)
                if torch.allclose(each.sum(1), losses.to(each), 1e-3, 1e-5):
                    return kind
            except Exception as error:
                what = "next tokens" if tokens else "model(images)"
                return f"the cross-entropy of {what} raises {type(error).__name__}: {error}"
    return f"the loss is not the cross-entropy of {'next tokens' if tokens else 'model(images)'}"


def _no_labels(run: Run, test: Tensors) -> str | None:
    """Why the data cannot be inputs and labels, or sequences of tokens; None if they can."""
    if len(test) > 2:
        return f"the data are {len(test)} tensors"
    y = test[-1]
    if {y.dtype, run.data[-1].dtype} != {torch.int64}:
        return f"data[{len(test) - 1}] is {run.data[-1].dtype} and test[{len(test) - 1}] {y.dtype}"
    if y.dim() == 2 and y.shape[1] > 1 and test[0].shape == y.shape and test[0].dtype == torch.int64:
        return None  # tokens, and labels for them
    return None if len(test) == 2 and y.dim() == 1 else f"test[{len(test) - 1}] has shape {tuple(y.shape)}"
