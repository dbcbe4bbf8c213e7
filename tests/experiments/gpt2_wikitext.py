"""GPT-2 on WikiText, or a GPT-2 of 92 million parameters on TinyStories: scores, and trainings to judge them.

`python -m tests.experiments.gpt2_wikitext [--tinystories] [--model gpt2] [--corpus NAME or folder]`

The recipe is that of `magic.book.recipes.gpt2`. The losses of some rows that are not trained on are
attributed in one replay, at w = 1, and judged by retrainings without random 1 % of the rows. It takes a GPU,
and a network or a model and a text in folders (see `magic.text.pretrained` and `magic.book.corpora`). The
retrainings are kept in a bank, so that a second call goes on where the first was stopped, and a line of JSON
is added to --out. `--small` does all of it with a tiny model over Python's documentation, on any machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import magic
from magic import text
from magic.book import corpora, data, recipes
from tests.experiments import kept


def tiny():
    """(model, train, test): a model and a text for a rehearsal."""
    import transformers

    train, test, words = data.documentation(train=48, test=4, length=12, words=60)
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 12}
    config = transformers.GPT2Config(vocab_size=len(words), bos_token_id=0, eos_token_id=0, **shape)
    return transformers.AutoModelForCausalLM.from_config(config).eval(), train, test


def given(asked: argparse.Namespace):
    """(model, train, test): what the arguments ask for."""
    if asked.small:
        return tiny()
    model, tokenizer = text.pretrained(asked.model)
    if asked.tinystories:
        model = recipes.gpt2_of_92m(len(tokenizer))
    return model, *corpora.corpus(asked.corpus, tokenizer, asked.rows, asked.targets)


def measured(asked: argparse.Namespace) -> dict:
    """The row for --out."""
    model, train, test = given(asked)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 16 if asked.small else 64
    run = recipes.gpt2(model.to(device), train.to(device), size=size, accumulate=asked.accumulate)
    test = test[: asked.targets].to(device)

    def measure(model):
        return text.loss()(model, test)

    start = time.perf_counter()
    run.train(progress=False)
    trained = time.perf_counter()
    scores = magic.attribute(run, measure, memory=asked.memory, progress=not asked.small)
    scored = time.perf_counter()
    bank = magic.Bank(asked.out.with_suffix(".sqlite"), run, measure)
    result = magic.lds(scores, drop=asked.drop, subsets=asked.sets, bank=bank, progress=not asked.small)
    lds = result.spearman
    return {
        "corpus": asked.corpus, "parameters": sum(p.numel() for p in model.parameters()),
        "n": run.n, "steps": run.steps,
        "targets": len(test), "sets": asked.sets, "drop": asked.drop, "lds": lds.mean, "low": lds.low,
        "high": lds.high, "training, s": trained - start, "scores, s": scored - trained,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", **kept.provenance(),
    }  # fmt: skip


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tinystories", action="store_true")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--corpus", default=None)
    parser.add_argument("--rows", type=int, default=4608)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--sets", type=int, default=60)
    parser.add_argument("--drop", type=float, default=0.01)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--memory", default=None)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "gpt2.jsonl")
    asked = parser.parse_args(given)
    usual = "documentation" if asked.small else "tinystories" if asked.tinystories else "wikitext"
    asked.corpus = asked.corpus or usual
    return asked


def main(words: list[str] | None = None) -> dict:
    asked = arguments(words)
    return kept.add_line(asked.out, measured(asked))


if __name__ == "__main__":
    main()
