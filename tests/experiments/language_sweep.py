"""Which recipes of a small GPT-2 give scores that predict? `python -m tests.experiments.language_sweep`

Batch size × eps_root × dropout; in each cell one training, one replay of four sayings at w = 1, and trainings
without random sets of 5 % of the passages, the same sets in every cell. Model, text and sayings are chapter
13's, with half its passages, words and examples seen, so that a cell takes a minute. All cells see the same
number of examples; the rate grows with the root of the batch size. With dropout, retrainings see the masks of
the run, which depend on its seed and the number of the step alone; "other masks" are those of another seed.

A cell is a row of notebooks/banks/13_language_models_sweep.csv, written when it is done; those that are there
are not made again. `--cells N` stops after N.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import magic
from magic import subsets, text
from magic.book import data, models
from magic.evidence.comparison import Comparison
from tests.experiments import kept

KEPT = Path(__file__).parents[2] / "notebooks" / "banks" / "13_language_models_sweep.csv"
BATCHES, ROOTS, DROPOUTS = (20, 40, 80, 160), (1e-6, 0.0, 1e-8), (0.0, 0.1)
CHAPTER = (40, 1e-6, 0.0)  # the cell that is chapter 13's recipe; those that differ in one thing come next
PASSAGES, WORDS, LENGTH, SEEN = 500, 500, 24, 4000
SETS, DROP, SETS_SEED = 20, 0.05, 0
SAYINGS = [("New in version", "3"), ("in version 3", "."), ("number of", "the"), ("can be", "used")]
COLUMNS = [
    "batch", "eps_root", "dropout", "masks", "steps", "nats", "lds", "low", "high", "largest_score", "moves",
    "clipped", "sets", "drop", "n", "targets", "seed", "seconds", "date", "torch", "threads",
]  # fmt: skip


def language_run(vocabulary: int, train: torch.Tensor, batch: int, root: float, dropout: float, **options):
    """Chapter 13's recipe at this batch size; `options` go to the Run: seed=, of the masks, or clip=. With
    tied=False the head has a weight of its own."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=options.pop("tied", True),
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    rate = 8e-3 * math.sqrt(batch / 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    optimizer.param_groups[0]["eps_root"] = root
    epochs = math.ceil(SEEN / (PASSAGES // batch * batch))
    batches = magic.batches(PASSAGES, size=batch, epochs=epochs, seed=0)[: SEEN // batch]
    scheduler = models.triangle(optimizer, len(batches))
    options = {"clip": 1.0} | options
    return magic.Run(model, optimizer, (train,), text.loss(), batches, scheduler, **options)


def sayings(words: list[str]):
    """measure(model) -> (4,): −log p of the said word after each prompt, in nats."""
    number = {word: i for i, word in enumerate(words)}
    prompts = [torch.tensor([[number[w] for w in prompt.split()]]) for prompt, _ in SAYINGS]
    said = [number[word] for _, word in SAYINGS]

    def measure(model):
        after = [model(prompt).logits[0, -1].log_softmax(-1) for prompt in prompts]
        return -torch.stack([row[word] for row, word in zip(after, said, strict=True)])

    return measure


def outputs(run: magic.Run, measure, weights: torch.Tensor) -> torch.Tensor:
    """(4,): what the model trained with these weights says."""
    with torch.no_grad():
        return measure(run.model(run.train(weights, progress=False))).double()


def cell(batch: int, root: float, dropout: float) -> list[dict]:
    """The rows of a cell: one, or with dropout a second one, of retrainings with other masks."""
    start = time.perf_counter()
    train, test, words = data.documentation(train=PASSAGES, test=200, length=LENGTH, words=WORDS)
    measure, run = sayings(words), language_run(len(words), train, batch, root, dropout)
    scores = magic.attribute(run, measure, progress=False)
    with torch.no_grad():
        nats = text.loss()(run.model(run.train(progress=False)), test).mean().item()
    weights = subsets.random(run.n, DROP, SETS, SETS_SEED)
    runs = {"replayed" if dropout else "none": lambda i: run}
    if dropout and (batch, root) == (40, 1e-6):
        runs["other"] = lambda i: language_run(len(words), train, batch, root, dropout, seed=i + 1)
    rows = []
    for masks, of in runs.items():
        true = torch.stack([outputs(of(i), measure, w) for i, w in enumerate(weights)])
        compared = Comparison(scores.predict(weights).double(), true, scores.outputs.double()).spearman
        rows.append(
            {
                "batch": batch, "eps_root": root, "dropout": dropout, "masks": masks, "steps": run.steps,
                "nats": round(nats, 4), "lds": round(compared.mean, 4), "low": round(compared.low, 4),
                "high": round(compared.high, 4), "largest_score": f"{scores.values.abs().max().item():.4g}",
                "moves": f"{max(scores.health.moves):.3g}", "clipped": scores.health.clipped, "sets": SETS,
                "drop": DROP, "n": run.n, "targets": len(SAYINGS), "seed": 0,
                "seconds": round(time.perf_counter() - start), **kept.provenance(),
            }
        )  # fmt: skip
    return rows


def key(row: dict) -> tuple[int, float, float]:
    """Batch size, root and dropout of a row that was kept."""
    return int(row["batch"]), float(row["eps_root"]), float(row["dropout"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=None, help="stop after so many")
    limit = parser.parse_args().cells
    torch.set_num_threads(1)
    rows = kept.read(KEPT)
    there = {key(row) for row in rows}
    todo = list(itertools.product(BATCHES, ROOTS, DROPOUTS))
    todo.sort(key=lambda one: sum(a != b for a, b in zip(one, CHAPTER, strict=True)))
    for one in [cell for cell in todo if cell not in there][:limit]:
        rows += cell(*one)
        kept.write(KEPT, COLUMNS, rows)
        print(
            {k: rows[-1][k] for k in ("batch", "eps_root", "dropout", "nats", "lds", "seconds")}, flush=True
        )


if __name__ == "__main__":
    main()
