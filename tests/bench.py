"""What a metagradient costs, in plain training runs. `uv run python -m tests.bench`

Every figure is a ratio to a plain torch.optim loop over the same model, data and batches, timed in
the same process, interleaved, one thread; medians over rounds. A metagradient's time contains its
training, its plan, its checks. With --peers also a full unroll by autograd and, where it is installed,
bergson (see tests/peers.py) on the same work. --keep notes the ratios in tests/bench.json, with what they
were measured on; --compare prints them beside those noted last.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magic
from magic.book import data, models
from magic.training.record import checksums
from tests import peers
from tests.support.cases import loss as classify

KEPT = Path(__file__).with_name("bench.json")


@dataclass
class Work:
    """A training run, and test examples whose losses are measured."""

    name: str
    model: nn.Module
    optimizer: Callable
    data: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    loss: Callable
    order: Tensor
    scheduler: Callable | None = None
    clip: float | None = None

    def to(self, device: str) -> Work:
        """The same work there."""
        there = {name: tuple(x.to(device) for x in getattr(self, name)) for name in ("data", "test")}
        model = copy.deepcopy(self.model).to(device)
        return replace(self, model=model, order=self.order.to(device), **there)

    def measure(self, targets: int) -> Callable:
        test = tuple(x[:targets] for x in self.test)
        return lambda model: self.loss(model, *test)

    def run(self) -> magic.Run:
        optimizer = self.optimizer(self.model)
        scheduler = self.scheduler and self.scheduler(optimizer)
        return magic.Run(self.model, optimizer, self.data, self.loss, self.order, scheduler, clip=self.clip)


def next_token(model, tokens):
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def mlp() -> Work:
    """Digits, MLP 64-256-256-10, AdamW, T = 200, B = 128."""
    x, y, x_test, y_test = data.digits()
    order = magic.batches(len(x), 128, 23)[:200]
    return Work("mlp", models.MLP((64, 256, 256, 10)), adamw, (x, y), (x_test, y_test), classify, order)


def conv() -> Work:
    """Fashion-MNIST, 2,000 images of 14×14, two convolutions of width 16 with BatchNorm, SGD momentum,
    T = 240, B = 100."""
    x, y, x_test, y_test = data.fashion_mnist(train=2000, test=500, size=14)
    model, order = models.ConvNet(width=16, norm="batch"), magic.batches(len(x), 100, 12)
    return Work("conv", model, momentum, (x, y), (x_test, y_test), classify, order)


def transformer() -> Work:
    """The Python documentation, two layers of width 64 over 32 characters, AdamW, T = 50, B = 32."""
    train, test, characters = data.python_text(train=1600, test=200)
    model, order = models.Transformer(len(characters)), magic.batches(len(train), 32, 1)
    return Work("transformer", model, adamw, (train,), (test,), next_token, order)


WORKS = {"mlp": mlp, "conv": conv, "transformer": transformer}


def build(name: str) -> Work:
    torch.manual_seed(0)
    return WORKS[name]()


def plain(work: Work, foreach: bool | None = None) -> nn.Module:
    """What everybody writes; with foreach=False the loop whose bits a Run has on a GPU, too."""
    model = copy.deepcopy(work.model)
    optimizer = work.optimizer(model)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    scheduler = work.scheduler and work.scheduler(optimizer)
    for indices in work.order:
        optimizer.zero_grad()
        work.loss(model, *(x[indices] for x in work.data)).mean().backward()
        if work.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def seconds(job: Callable) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if torch.cuda.is_initialized():  # a GPU works on its own, so it is waited for
        torch.cuda.synchronize()
    return time.perf_counter() - start


def jobs_of(work: Work, targets: list[int], memory: str, with_peers: bool) -> dict[tuple[str, int], Callable]:
    """(what, K) -> what is timed; K = 0 where nothing is differentiated."""
    run = work.run()

    def differentiate(k):
        return lambda: magic.attribute(run, work.measure(k), memory=memory, progress=False)

    jobs: dict[tuple[str, int], Callable] = {("run.train()", 0): lambda: run.train(progress=False)}
    jobs |= {("magic.attribute", k): differentiate(k) for k in targets}
    if with_peers:
        jobs |= peers.jobs(work, targets)
    return jobs


def table(name: str, targets: list[int], rounds: int, memory: str, with_peers: bool) -> dict:
    """Time one work, and print its table."""
    work = build(name)
    jobs = jobs_of(work, targets, memory, with_peers)
    plain(work)
    for job in jobs.values():
        job()  # warm up
    base, times = [], {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            base.append(seconds(lambda: plain(work)))
            times[key].append(seconds(job))
    one = statistics.median(base)
    print(f"\n{name}: {' '.join(WORKS[name].__doc__.split())}")
    print(f"a plain loop takes {one:.3f} s ({min(base):.3f} … {max(base):.3f})\n")
    print(f"  {'':<26}{'K':>4}{'ratio':>9}{'per target':>12}{'lowest … highest':>21}")
    found = {}
    for (what, k), values in times.items():
        ratio = statistics.median(values) / one
        span = f"{min(values) / one:.2f} … {max(values) / one:.2f}"
        print(f"  {what:<26}{k or '':>4}{ratio:>9.2f}{ratio / k if k else float('nan'):>12.2f}{span:>21}")
        found[f"{what} K={k}"] = ratio
    run = work.run()
    state = run.train(progress=False)
    once = statistics.median(seconds(lambda: checksums(state)) for _ in range(9))
    noting = once * len(next(iter(run._passed.values())).noted)
    print(f"\n  fingerprints: {noting / one:.2%} of a plain loop")
    for k in targets:
        print(f"  K = {k}: {magic.plan(run, targets=k, memory=memory)}")
    return found


def peak_rss(name: str, targets: int, memory: str) -> int:
    """Bytes of this process at its peak, after a plain loop (targets = 0) or a metagradient. Linux."""
    work = build(name)
    if targets:
        magic.attribute(work.run(), work.measure(targets), memory=memory, progress=False)
    else:
        plain(work)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_table(name: str, targets: list[int], budgets: list[str]) -> None:
    """Peak memory above the plain loop's, each in a process of its own, beside the budget given."""

    def measured(*arguments) -> int:
        command = [sys.executable, "-m", "tests.bench", "--peak", name, *map(str, arguments)]
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    floor = measured(0, "1GB")
    print(f"\n  {'budget':>10}{'K':>5}{'peak above the plain loop':>28}")
    for memory in budgets:
        for k in targets:
            print(f"  {memory:>10}{k:>5}{(measured(k, memory) - floor) / 1e6:>25,.0f} MB")


def provenance(threads: int, rounds: int) -> dict:
    """What a ratio depends on besides the code, and which code it was."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=KEPT.parent
    )
    cpuinfo = Path("/proc/cpuinfo")
    told = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git.stdout.strip(),
        "processor": told[1] if told else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "PyTorch": torch.__version__,
        "threads": threads,
        "rounds": rounds,
    }


def keep(found: dict[str, dict[str, float]], made: dict, path: Path = KEPT) -> None:
    """Note ratios, {work: {what: ratio}}, behind those that are there."""
    noted = json.loads(path.read_text()) if path.exists() else []
    rounded = {work: {what: round(x, 3) for what, x in ratios.items()} for work, ratios in found.items()}
    path.write_text(json.dumps([*noted, made | {"ratios": rounded}], indent=1) + "\n")


def compare(found: dict[str, dict[str, float]], path: Path = KEPT) -> None:
    """Print each work's ratios beside those noted last for it."""
    if not path.exists():
        raise SystemExit(f"{path.name} is not there yet: --keep makes it")
    noted = json.loads(path.read_text())
    for work, ratios in found.items():
        last = next((one for one in reversed(noted) if work in one["ratios"]), None)
        if last is None:
            print(f"\n{work}: nothing is noted yet")
            continue
        print(f"\n{work}, noted last: " + ", ".join(f"{k} {x}" for k, x in last.items() if k != "ratios"))
        print(f"  {'':<40}{'noted':>9}{'now':>9}{'now/noted':>11}")
        for what, now in ratios.items():
            if before := last["ratios"][work].get(what):
                print(f"  {what:<40}{before:>9.2f}{now:>9.2f}{now / before:>11.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default="mlp,conv,transformer")
    parser.add_argument("--targets", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--budgets", default="", help="also peak memory, at these budgets: 100MB,1GB")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--keep", action="store_true", help="note the ratios in tests/bench.json")
    parser.add_argument("--compare", action="store_true", help="print them beside those noted last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=3, metavar=("WORK", "K", "MEMORY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        name, targets, memory = given.peak
        print(peak_rss(name, int(targets), memory))
        return
    targets = [int(k) for k in given.targets.split(",")]
    print(
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{given.threads} thread(s), medians of {given.rounds} rounds; 1 = a plain loop, training included"
    )
    for name in given.works.split(","):
        found = {name: table(name, targets, given.rounds, given.memory, given.peers)}
        if given.budgets:
            memory_table(name, targets, given.budgets.split(","))
        if given.compare:
            compare(found)
        if given.keep:
            keep(found, provenance(given.threads, given.rounds) | {"memory": given.memory})


if __name__ == "__main__":
    main()
