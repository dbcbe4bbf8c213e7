"""Bergson's trainer beside magic on a small GPT-2. `python -m tests.experiments.language_peer`

The recipe is the sweep's (`language_sweep`) at batch 40 and eps_root 1e-6, without clipping and dropout, and
with a head of its own weight. (Where it is tied to the embedding, bergson 2.5.1 lists the parameter under
both of its names, and its training is another one than PyTorch's.) Four sayings, scores at w = 1. Both are
judged by the same retrainings and timed on one thread, beside a plain loop. Bergson (EleutherAI) is not among
magic's requirements: install it and torchopt in an environment of its own. Written is
notebooks/banks/13_language_models_peer.json.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import magic
from magic import subsets, text
from magic.book import data
from magic.evidence.comparison import Comparison
from tests.experiments import language_sweep as sweep
from tests.peers import _quiet

KEPT = Path(sweep.KEPT).with_name("13_language_models_peer.json")


class Shim(nn.Module):
    """The model in the form that bergson's trainer calls: labels are given for a query only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, targets=None, example_weight=None, labels=None):
        losses = text.loss()(self.model, input_ids, labels)
        return (losses if example_weight is None else losses * example_weight).mean()


def stream_of(tokens: Tensor, order: Tensor):
    """bergson's DataStream over the passages, in this order; its own makes an order itself."""
    from bergson.magic.data_stream import DataStream

    class Stream(DataStream):
        def __init__(self):
            super().__init__(order.reshape(-1), order.shape[1], device="cpu", weight_shape=(len(tokens),))
            self.weights = nn.Parameter(torch.ones(len(tokens)))

        def __getitem__(self, i: int) -> dict:
            if not 0 <= i < len(self):
                raise IndexError(i)
            return {"input_ids": tokens[order[i]], "example_weight": self.weights[order[i]]}

    return Stream()


def questions(words: list[str]) -> list[dict]:
    """The sayings as bergson's queries: a padded row, of which the said word alone is a target."""
    number, found = {word: i for i, word in enumerate(words)}, []
    for prompt, word in sweep.SAYINGS:
        ids = [number[x] for x in f"{prompt} {word}".split()]
        row, labels = torch.zeros(1, len(ids), dtype=torch.int64), torch.full((1, len(ids)), -100)
        row[0], labels[0, -1] = torch.tensor(ids), ids[-1]
        found.append({"input_ids": row, "labels": labels})
    return found


def by_bergson(run: magic.Run, words: list[str]) -> tuple[Tensor, Tensor]:
    """(4, n) scores at w = 1, and the (4,) outputs of the model that bergson trained."""
    import torchopt
    from bergson.magic.cli import compute_query_gradients
    from bergson.magic.trainer import BackwardState, Trainer
    from torchopt.pytree import tree_iter

    rates = [groups[0]["lr"] for groups in run.hypers]
    hyper = run.hypers[0][0]
    shim, folder = Shim(run.model(run.initial)), tempfile.mkdtemp(prefix="bergson-")
    shim.model.set_attn_implementation("eager")  # PyTorch's own attention has no second derivative
    stream = stream_of(run.data[0], torch.stack(list(run.batches)))
    try:
        with _quiet():
            optimizer = torchopt.adamw(
                lambda t: rates[min(int(t), len(rates) - 1)], betas=hyper["betas"], eps=hyper["eps"],
                eps_root=hyper["eps_root"], weight_decay=hyper["weight_decay"],
            )  # fmt: skip
            trainer, state = Trainer.initialize(shim, optimizer)
            state.detach_()
            stream.requires_grad = False
            state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode="sqrt")
            shim.eval()
            found = [compute_query_gradients(state, shim, [query]) for query in questions(words)]
            shim.train()
            scores, outputs = [], [float(loss) for _, loss, *_ in found]
            for gradient, *_ in found:
                state.detach_()
                stream.requires_grad = True
                moments = [m for m in tree_iter(state.opt_state) if m.is_floating_point()]
                zeros = [torch.zeros_like(m) for m in moments], torch.zeros_like(stream.weights)
                back = trainer.backward(
                    folder, stream, BackwardState(gradient, *zeros), state, cleanup=False, inplace=True,
                    save_mode="sqrt",
                )  # fmt: skip
                scores.append(back.weight_grads.detach())
    finally:
        shutil.rmtree(folder)
    return torch.stack(scores), torch.tensor(outputs)


def plain(run: magic.Run, train: Tensor) -> None:
    """The loop that everybody writes."""
    model, rates = copy.deepcopy(run.model(run.initial)), [groups[0]["lr"] for groups in run.hypers]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for rows, rate in zip(run.batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        text.loss()(model, train[rows]).mean().backward()
        optimizer.step()


def timed(job):
    """(what the job returns, CPU seconds, seconds)."""
    start = time.process_time(), time.perf_counter()
    made = job()
    return made, time.process_time() - start[0], time.perf_counter() - start[1]


def main() -> None:
    torch.set_num_threads(1)
    train, _, words = data.documentation(
        train=sweep.PASSAGES, test=200, length=sweep.LENGTH, words=sweep.WORDS
    )
    run = sweep.language_run(len(words), train, batch=40, root=1e-6, dropout=0.0, clip=None, tied=False)
    measure = sweep.sayings(words)
    _, loop, _ = timed(lambda: plain(run, train))
    ours, cpu, wall = timed(lambda: magic.attribute(run, measure, progress=False))
    (theirs, outputs), their_cpu, their_wall = timed(lambda: by_bergson(run, words))
    weights = subsets.random(run.n, sweep.DROP, sweep.SETS, sweep.SETS_SEED)
    true = torch.stack([sweep.outputs(run, measure, w) for w in weights])
    found = {"plain loop": {"cpu": round(loop, 2)}}
    for name, values, spent, waited in (
        ("magic", ours.values, cpu, wall),
        ("bergson", theirs, their_cpu, their_wall),
    ):
        scores = ours.like(values)
        lds = Comparison(scores.predict(weights).double(), true, ours.outputs.double()).spearman
        found[name] = {
            "lds": [round(x, 4) for x in (lds.mean, lds.low, lds.high)], "cpu": round(spent, 1),
            "seconds": round(waited, 1), "trainings": round(spent / loop, 1),
        }  # fmt: skip
    gap = (ours.values - theirs).norm(dim=1) / ours.values.norm(dim=1)
    found["apart"] = {
        "scores": [f"{x:.2g}" for x in gap.tolist()],
        "outputs": [f"{x:.2g}" for x in (outputs - ours.outputs).abs().tolist()],
    }
    found["made"] = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "n": run.n, "steps": run.steps, "sets": sweep.SETS, "drop": sweep.DROP, "seed": sweep.SETS_SEED,
        "bergson": __import__("importlib.metadata").metadata.version("bergson"),
    }  # fmt: skip
    KEPT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
