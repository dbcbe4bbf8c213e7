"""The parts of `python -m tests.gpu` that find out whether things hold, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = {
    "chapter": "chapters",
    "bench": "works",
    "gpt2": "works",
    "experiment": "experiments",
}  # the modules of parts that are not here
OTHERS = re.compile(r"def test_\w+\([^)]*\bdevice\b|mark\.cuda")


@dataclass
class Teller:
    """What a part finds goes into the file as it is found; a part that fails later has told it already."""

    into: str
    label: str
    device: str = "cpu"
    seconds: float = 60.0
    start: float = field(default_factory=time.monotonic)

    @property
    def small(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def tell(self, **found) -> None:
        line = json.dumps({"part": self.label, "at": round(time.monotonic() - self.start, 1), **found})
        with open(self.into, "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[dict]:
        """Tell of an error in the block, and go on after it. A package that is not here is no error.

        Yields a dict that holds what was told: "error" or, for such a package, "skipped".
        """
        found: dict = {}
        try:
            yield found
        except Exception as error:
            traceback.print_exc()
            if module := absent(*_lacked(error)):
                found["skipped"] = f"no module {module}"
            else:
                found["error"] = f"{type(error).__name__}: {str(error)[:1500]}"
            self.tell(what=what, **found)


def absent(*names: str) -> str | None:
    """The first package of these modules that is not installed here; ours are."""
    tops = (name.partition(".")[0] for name in names)
    return next((top for top in tops if importlib.util.find_spec(top) is None), None)


def _lacked(error: BaseException | None) -> Iterator[str]:
    """The modules that this error, or what caused it, did not find."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            yield error.name
        error = error.__cause__


def machine(teller: Teller) -> None:
    """Provenance, and whether the device computes at all."""
    import torch

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=ROOT
    )
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "commit": git.stdout.strip() or "unknown",
        "Python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(), "cores": os.cpu_count(), "device": teller.device,
    }  # fmt: skip
    for name in ("transformers", "nbval", "pytest", "scipy", "scikit-learn", "seaborn", "pandas"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if teller.device == "cuda" and torch.cuda.is_available():
        found["GPU"], found["memory GB"] = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 1e9
        with contextlib.suppress(Exception):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    x = torch.ones(8, 8, device=teller.device) @ torch.ones(8, 8, device=teller.device)
    teller.tell(**found, usable=x.sum().item() == 512.0)


def determinism(teller: Teller) -> None:
    """The same run twice, to the bit; the plain loop; the CPU against the GPU; another place for states."""
    from .works import checked_works

    for name, make in checked_works(teller.small).items():
        with teller.trying(name):
            teller.tell(work=name, **_same_twice(make, teller))


def _same_twice(make: Callable, teller: Teller) -> dict:
    import torch

    import magic
    from tests import bench

    work = make().to(teller.device)
    run, again = work.run(), work.run()
    final, second = run.train(progress=False), again.train(progress=False)
    found: dict = {"same bits twice": final.fingerprint() == second.fingerprint()}
    with magic.determinism.fix():
        plain = bench.plain(work, foreach=False)
    found["bits of the plain loop"] = all(
        torch.equal(p, final.params[name]) for name, p in plain.named_parameters()
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    found["bits when TF32 is asked for"] = (
        work.run().train(progress=False).fingerprint() == final.fingerprint()
    )
    torch.set_float32_matmul_precision(before)
    measure = work.measure(4)
    scores = magic.attribute(run, measure, progress=False)
    found["scores' bits twice"] = _equal(scores, magic.attribute(again, measure, progress=False))
    kept = magic.attribute(run, measure, plan=magic.plan(run, 4, states=3), progress=False)
    found["scores' bits with 3 states"] = _equal(scores, kept)
    on_cpu = work.to("cpu")
    other = on_cpu.run()
    gap = max(
        ((p.cpu() - q).norm() / q.norm().clamp_min(1e-30)).item()
        for p, q in zip(final.params.values(), other.train(progress=False).params.values(), strict=True)
    )
    there = magic.attribute(other, on_cpu.measure(4), progress=False).values
    found["parameters, GPU against CPU"] = gap
    found["scores, GPU against CPU"] = ((scores.values.cpu() - there).norm() / there.norm()).item()
    verified = magic.verify(scores, progress=False)
    found["verify holds"] = verified.ok
    found["verify"] = "; ".join(f"{what}: {told}" for what, told in verified.rows())
    return found


def _equal(a, b) -> bool:
    return bool((a.values == b.values).all())


def tests(teller: Teller, files: str, share: str, shares: str) -> None:
    """The tests marked `cuda`; a rehearsal does a few of the CPU."""
    every = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if OTHERS.search(path.read_text())]
    first = ("test_train.py", "test_exact.py")
    paths = [str(path) for path in every if path.name not in first] if files == "others" else [files]
    chosen = ["-k", "cpu and (sgd-nesterov-decay or gelu)"] if teller.small else ["-m", "cuda"]
    told_by_pytest(teller, ["--continue-on-collection-errors", *chosen, *paths], SHARE=share, SHARES=shares)


def told_by_pytest(teller: Teller, words: list[str], **environment: str) -> None:
    """Run pytest with tests/gpu/plugin.py, which tells of what fails. This process ends with its status."""
    quiet = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.plugin", *quiet, *words]
    told = {"GPU_INTO": teller.into, "GPU_LABEL": teller.label, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | told | environment)
    if done.returncode not in (0, 5):  # 5: this share has no test
        sys.exit(done.returncode)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("arguments", nargs="*")
    for option in ("--device", "--into", "--label"):
        parser.add_argument(option, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args(arguments)
    teller = Teller(given.into, given.label, given.device, given.seconds)
    place = importlib.import_module(f"tests.gpu.{PLACES.get(given.name, 'stages')}")
    getattr(place, given.name)(teller, *given.arguments)


if __name__ == "__main__":
    main()
