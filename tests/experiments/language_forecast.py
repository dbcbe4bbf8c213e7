"""Is the forecast right for a language model? `python -m tests.experiments.language_forecast`

Of six cells of `language_sweep`, the two with the lowest LDS among them, the scores at w = 1 are computed
again, and `magic.forecast` looks at what the LDS depends on. The true one is that of the sweep. A cell takes
some minutes, and is a row of notebooks/banks/12_how_far_does_a_tangent_reach_language.csv; those that are
there are not made again.
"""

from __future__ import annotations

from pathlib import Path

import torch

import magic
from magic.book import data
from tests.experiments import kept, language_sweep

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "12_how_far_does_a_tangent_reach_language.csv"
CELLS = [
    (160, 0.0, 0.0), (80, 0.0, 0.1), (40, 1e-6, 0.0), (160, 1e-6, 0.0), (20, 0.0, 0.0), (40, 1e-6, 0.1)
]  # fmt: skip
COLUMNS = [
    "recipe", "batch", "eps_root", "dropout", "lds", "low", "high", "agreement", "jaggedness", "sets",
    "jitters", "drop", "n", "targets", "date", "torch", "threads",
]  # fmt: skip
SETS, JITTERS = 3, 8


def row(batch: int, root: float, dropout: float) -> dict:
    sweep = language_sweep
    train, _, words = data.documentation(
        train=sweep.PASSAGES, test=200, length=sweep.LENGTH, words=sweep.WORDS
    )
    run = sweep.language_run(len(words), train, batch, root, dropout)
    scores = magic.attribute(run, sweep.sayings(words), progress=False)
    told = magic.forecast(scores, sweep.DROP, sets=SETS, jitters=JITTERS, progress=False)
    (judged,) = [
        cell
        for cell in kept.read(sweep.KEPT)
        if sweep.key(cell) == (batch, root, dropout) and cell["masks"] != "other"
    ]
    return {
        "recipe": f"GPT-2, batch {batch}, root {root:g}, dropout {dropout:g}",
        "batch": batch, "eps_root": root, "dropout": dropout,
        **{name: judged[name] for name in ("lds", "low", "high")},
        "agreement": round(told.agreement.mean().item(), 4),
        "jaggedness": f"{told.jaggedness.log1p().mean().expm1().item():.4g}",
        "sets": SETS, "jitters": JITTERS, "drop": sweep.DROP, "n": run.n, "targets": len(sweep.SAYINGS),
        **kept.provenance(),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = kept.read(KEPT)
    there = {language_sweep.key(row) for row in rows}
    for cell in CELLS:
        if cell not in there:
            rows.append(row(*cell))
            kept.write(KEPT, COLUMNS, rows)
            print({k: rows[-1][k] for k in COLUMNS[:9]}, flush=True)


if __name__ == "__main__":
    main()
