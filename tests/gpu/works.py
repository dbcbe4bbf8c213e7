"""The parts of `python -m tests.gpu` that take times and memory: tests/bench.py's works, ResNet-9, GPT-2."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

import magic
from magic import text
from magic.book import data, models
from tests import bench as benchmark
from tests.bench import Work, plain, seconds
from tests.smollm2 import rows
from tests.support.cases import loss as classify

from .stages import Teller

TARGETS = (1, 4, 16, 64)
SEED = 0  # of weights and orders, here as in tests/bench.py, and of the sets that are left out
ROOT = 1e-8  # stands under AdamW's root, and smooths its first steps


def resnet9(kind: str, width: int, batch: int, steps: int) -> Work:
    """The book's ResNet-9 on 4,000 images of Fashion-MNIST, or on noise of CIFAR-10's shape."""
    if kind == "fashion":
        x, y, x_test, y_test = data.fashion_mnist(train=4000, test=1000)
    else:
        dice, n = torch.Generator().manual_seed(SEED), 50_000 if width == 64 else 500
        x, x_test = torch.randn(n, 3, 32, 32, generator=dice), torch.randn(64, 3, 32, 32, generator=dice)
        y, y_test = torch.randint(10, (n,), generator=dice), torch.randint(10, (64,), generator=dice)
    torch.manual_seed(SEED)
    model = models.ResNet9(x.shape[1], width=width, scale=1.0)
    order = magic.batches(len(x), batch, -(-steps * batch // len(x)), seed=SEED)[:steps]
    return Work(f"resnet9-{kind}", model, benchmark.momentum, (x, y), (x_test, y_test), classify, order)


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 16))


def adamw(model, root: float = ROOT):
    return torch.optim.AdamW([{"params": list(model.parameters()), "eps_root": root}], lr=3e-4)


def language(layers: int, width: int, vocabulary: int, n: int, length: int, batch: int) -> Work:
    """GPT-2 of this size over n rows of Python's documentation, one epoch. It starts at random, unless it has
    twelve layers and the weights are found. Without transformers, the book's transformer over characters."""
    torch.manual_seed(SEED)
    order = magic.batches(n, batch, 1, seed=SEED)
    options = {"order": order, "scheduler": warm_up, "clip": 1.0}
    if importlib.util.find_spec("transformers") is None:
        train, test, characters = data.python_text(train=n, test=16, length=length)
        model = models.Transformer(len(characters), width, layers, max(1, width // 64), length)
        return Work(
            "the book's transformer", model, adamw, (train,), (test,), benchmark.next_token, **options
        )
    import transformers

    sizes = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": max(1, width // 64),
        "n_positions": max(length, 32),
    }
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    name, tokenizer = f"GPT-2, {layers} layers of {width}, random start", text.byte_tokenizer()
    model = None
    if layers == 12:
        with contextlib.suppress(OSError, ValueError):
            model, tokenizer = text.pretrained("gpt2", local_files_only=True)
            name = "GPT-2 small, pretrained"
    if model is None:
        config = transformers.GPT2Config(
            vocab_size=vocabulary, bos_token_id=1, eos_token_id=1, **sizes, **drops
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = rows(tokenizer, n + 16, length)
    return Work(name, model, adamw, (tokens[:n],), (tokens[n:],), text.loss(), **options)


def checked_works(small: bool) -> dict[str, Callable[[], Work]]:
    """The works of the stage `determinism`: few steps of each kind."""
    few = 4 if small else 24

    def cut(make: Callable[[], Work]) -> Work:
        work = make()
        return replace(work, order=work.order[:few])

    made: dict[str, Callable[[], Work]] = {"mlp": partial(cut, partial(benchmark.build, "mlp"))}
    if not small:
        made["transformer"] = partial(cut, partial(benchmark.build, "transformer"))
        made["gpt2"] = partial(cut, partial(language, 2, 64, 259, 256, 32, 8))
        made["conv"] = partial(cut, partial(benchmark.build, "conv"))
        made["resnet9"] = partial(resnet9, "fashion", 16, 100, few)
    return made


@contextlib.contextmanager
def peak(device: str) -> Iterator[dict]:
    """Bytes on the GPU at the peak of the block, beyond those before it. magic resets the counter, too."""
    found: dict = {}
    if device == "cpu":
        yield found
        return
    gc.collect()
    reset, seen = torch.cuda.reset_peak_memory_stats, []

    def noting(*of) -> None:
        seen.append(torch.cuda.max_memory_allocated())
        reset(*of)

    reset()
    before, torch.cuda.reset_peak_memory_stats = torch.cuda.memory_allocated(), noting
    try:
        yield found
    finally:
        torch.cuda.reset_peak_memory_stats = reset
        found["peak GB"] = (max([*seen, torch.cuda.max_memory_allocated()]) - before) / 1e9


def budget(device: str) -> int:
    """Bytes that a replay may hold: six tenths of what is free on the GPU."""
    return int(0.6 * torch.cuda.mem_get_info()[0]) if device == "cuda" else 300_000_000


def loops(work: Work, teller: Teller) -> float:
    """Tell what a step takes in plain loops and in a Run; returns that of the plain loop, in seconds."""

    def a_step(job: Callable) -> float:
        job()
        return statistics.median(seconds(job) for _ in range(1 if teller.small else 2)) / steps

    steps, work = min(32, len(work.order)), replace(work, order=work.order[:32])
    one = a_step(lambda: plain(work))
    with magic.determinism.fix():
        fixed = a_step(lambda: plain(work, foreach=False))
    run = work.run()
    with peak(teller.device) as found:
        trained = a_step(lambda: run.train(progress=False))
    found |= {"parameters": sum(p.numel() for p in work.model.parameters()), "batch": len(work.order[0])}
    found |= {"a plain step, ms": 1e3 * one, "deterministic, ratio": fixed / one}
    found |= {"run.train(), ratio": trained / one, "seed": SEED}
    teller.tell(work=work.name, steps=steps, **found)
    return one


def cost(work: Work, targets: int, one: float, teller: Teller) -> None:
    """Tell what the metagradient of so many targets takes, of as many steps as there is time for."""
    memory = budget(teller.device)
    expected = magic.plan(work.run(), targets=targets, memory=memory).seconds
    steps = min(len(work.order), int(len(work.order) * 0.4 * teller.left / max(expected, 1e-9)))
    if steps < 2:
        teller.tell(work=work.name, K=targets, skipped=f"{expected:.0f} s expected, {teller.left:.0f} s left")
        return
    work, made = replace(work, order=work.order[:steps]), []
    run = work.run()
    with peak(teller.device) as found:
        took = seconds(
            lambda: made.append(magic.attribute(run, work.measure(targets), memory=memory, progress=False))
        )
    (scores,) = made
    plan, ratio = scores.plan, took / (steps * one)
    found |= {"seconds": took, "ratio": ratio, "ratio per target": ratio / targets}
    found |= {"seconds expected": plan.seconds, "planned GB": plan.nbytes / 1e9}
    found |= {"a state, MB": plan.trial.state_bytes / 1e6, "a trace, MB": plan.trial.trace_bytes / 1e6}
    found |= {"norm of the scores": scores.values.norm().item(), "plan": str(plan)}
    found["problems"] = "; ".join(scores.health.problems)
    teller.tell(work=work.name, K=targets, steps=steps, **found)


def bench(teller: Teller, name: str) -> None:
    """Times and memory of one work, for several numbers of targets."""
    size = (8, 20, 3) if teller.small else (64, 250, 64)
    makers = {f"resnet9-{kind}": partial(resnet9, kind, *size) for kind in ("fashion", "cifar")}
    work = makers[name]() if name in makers else benchmark.build(name)
    work = work.to(teller.device)
    if teller.small:
        work = replace(work, order=work.order[:3])
    one = loops(work, teller)
    for targets in TARGETS[1:2] if teller.small else TARGETS:
        with teller.trying(f"K = {targets}"):
            cost(work, targets, one, teller)


def gpt2(teller: Teller, what: str) -> None:
    """ "small": GPT-2 of 124 million parameters, its bits, times, memory and scores of 16 targets. "lds": two
    layers of width 128, and 40 retrainings without 1 % of the rows, to see whether the scores come true."""
    shape = (12, 768, 50257, 1024, 128, 8) if what == "small" else (2, 128, 259, 1024, 128, 8)
    work = language(*((2, 16, 259, 100, 16, 10) if teller.small else shape)).to(teller.device)
    one = loops(work, teller)
    targets = 2 if teller.small else 16
    if what == "small":
        with teller.trying("bits of the plain loop"):
            rough = replace(work, optimizer=partial(adamw, root=0.0), order=work.order[:16])
            final = rough.run().train(progress=False)
            with magic.determinism.fix():
                trained = plain(rough, foreach=False)
            same = [torch.equal(p, final.params[name]) for name, p in trained.named_parameters()]
            said = f"{sum(same)} of {len(same)} parameters"
            others = len(same) - sum(same)
            teller.tell(
                work=work.name, **{"bits of the plain loop": said, "parameters of other bits": others}
            )
            del final, trained, rough
        for steps in (4,) if teller.small else (4, 128):  # the few come in any case
            with teller.trying(f"{steps} steps"):
                cost(replace(work, order=work.order[:steps]), targets, one, teller)
        return
    scores = magic.attribute(work.run(), work.measure(targets), memory=budget(teller.device), progress=False)
    with teller.trying("verify"):
        verified = magic.verify(scores, progress=False)
        said = "; ".join(f"{name}: {told}" for name, told in verified.rows())
        teller.tell(work=work.name, **{"verify holds": verified.ok, "verify": said})
    judged(scores, work, teller)


def judged(scores: magic.Attribution, work: Work, teller: Teller) -> None:
    """Tell whether the scores come true in retrainings without 1 % of the rows."""
    sets = 3 if teller.small else 40
    found: dict[str, float] = {}
    result = magic.lds(scores, drop=0.01, subsets=sets, seed=SEED, progress=False)
    for name in ("spearman", "pearson", "r2", "slope"):
        mean, low, high = getattr(result, name)
        found |= {name: mean, f"{name}, low": low, f"{name}, high": high}
    teller.tell(work=work.name, targets=len(scores.outputs), sets=sets, drop=0.01, seed=SEED, **found)
