"""Sets that were chosen, not drawn: `python -m tests.experiments.groups`

Chapter 10's recipe on the digits. Removed are, for each of ten test images, the 12, 60 and 120 training
images that help it most by its scores, as many that harm it most, half of its class, all of its class, and as
many at random. Two outputs are predicted: its loss, and its margin, the logit of the right class less the
log-sum-exp of the others, of which the loss is log(1 + exp(−margin)). Each is predicted to first order (from
the weights 1, and from the midpoint of the way to the set), to second order, and by the quotient
τ·v / (1 − vᵀHv / 2 τ·v), which has the same first two derivatives and is Newton's answer where the examples
left out have a large part in the curvature. A row of
notebooks/banks/12_how_far_does_a_tangent_reach_groups.csv is one set and one output.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

import magic
from magic import subsets
from magic.book import data
from magic.book.recipes import classify
from tests.experiments import judges, kept

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "12_how_far_does_a_tangent_reach_groups.csv"
COUNTS, TARGETS = (12, 60, 120), 10
COLUMNS = [
    "chosen", "removed", "target", "output", "before", "true", "tangent", "midpoint", "second order",
    "quotient", "n",
    "steps", "date", "torch", "threads",
]  # fmt: skip


def chosen(scores: magic.Attribution, labels: torch.Tensor, own: torch.Tensor):
    """Yield (how it was chosen, target, (n,) weights)."""
    for k, values in enumerate(scores.values):
        for weights in subsets.top(values, COUNTS):
            yield "most helpful", k, weights
        for weights in subsets.top(values, COUNTS, helpful=False):
            yield "most harmful", k, weights
        same = (labels == own[k]).nonzero().squeeze(1)
        for share, name in ((2, "half of its class"), (1, "its class")):
            yield name, k, subsets.without(len(labels), [same[: len(same) // share]])[0]
        for i, count in enumerate(COUNTS):
            yield "at random", k, subsets.random(len(labels), count / len(labels), 1, seed=100 * k + i)[0]


def main() -> None:
    torch.set_num_threads(1)
    x, y, x_test, y_test = data.digits(train=1200, test=500)
    x, x_test = x.double(), x_test.double()
    run = judges.mlp(x, y)

    def measure(model):
        return classify(model, x_test[:TARGETS], y_test[:TARGETS])

    scores = magic.attribute(run, measure, progress=False)
    rows, of_target = [], {}
    for how, k, weights in chosen(scores, y, y_test):

        def both(model, k=k):
            logits = model(x_test[k : k + 1])
            return torch.cat(
                [F.cross_entropy(logits, y_test[k : k + 1], reduction="none"), margin(logits, k)]
            )

        def margin(logits, k):
            right = F.one_hot(y_test[k : k + 1], 10).bool()
            return logits[right] - logits.masked_fill(right, -torch.inf).logsumexp(1)

        if k not in of_target:
            of_target[k] = magic.attribute(run, both, progress=False)
        own, way = of_target[k], (weights - 1).double()
        bend = magic.curvature(own, way, order=2, progress=False)
        half = magic.attribute(run, both, at=1 + way / 2, progress=False).values @ way
        after = magic.outputs(run, both, weights, progress=False)
        for i, output in enumerate(("loss", "margin")):
            first, second = bend.slope[i].item(), bend.second[i].item()
            told = {
                "before": own.outputs[i].item(), "true": (after - own.outputs)[i].item(), "tangent": first,
                "midpoint": half[i].item(), "second order": first + second / 2,
                "quotient": first / (1 - second / (2 * first)),
            }  # fmt: skip
            rows.append(
                {
                    "chosen": how, "removed": int((weights == 0).sum()), "target": k, "output": output,
                    **{name: f"{value:.6g}" for name, value in told.items()},
                    "n": run.n, "steps": run.steps, **kept.provenance(),
                }
            )  # fmt: skip
        kept.write(KEPT, COLUMNS, rows)
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
