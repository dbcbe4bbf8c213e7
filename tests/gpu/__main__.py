"""Everything that only a GPU can tell, in one call. From the repository's root:

    python -m tests.gpu                              # some nine minutes on one H100 or H200
    python -m tests.gpu --stages determinism,gpt2    # some stages of: determinism, cuda tests, chapters,
                                                     # bench, gpt2; or parts, such as "chapter 09"
    python -m tests.gpu --stages resnet9             # an experiment, which takes many such calls and goes on
                                                     # from build/gpu/resnet9; another is gpt2-wikitext
    python -m tests.gpu --device cpu                 # rehearse everything in miniature, without a GPU
    python -m tests.gpu --keep FOLDER/results.jsonl  # put the numbers into notebooks/banks/15_gpu.csv

Each part of a stage is a process of its own with a time limit, so that a crash or a hang of one loses nothing
of the others. What a part finds is appended at once, as a line of JSON, to FOLDER/results.jsonl; beside it
are log.txt, all that was printed, and summary.txt. Parts that take no times run side by side and come first;
they have a bit more than half of the time. PyTorch is not imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.gpu import kept

ROOT = Path(__file__).parents[2]
LEAST = 0.3  # of its time limit a part must have left, or it is not begun
FIRST = ("01", "03", "09")  # chapters that are read in any case
LONG = ("08", "09", "10", "11", "12", "13", "14")  # chapters that train many models
DAY = 24 * 3600.0


class Part(NamedTuple):
    """A process: `name` and `arguments` for tests.gpu.stages, its seconds at most, whether it runs alone.

    least   the seconds that must be left to begin it; else LEAST of its own
    """

    stage: str
    name: str
    seconds: float
    alone: bool = False
    arguments: tuple[str, ...] = ()
    least: float | None = None

    @property
    def label(self) -> str:
        return " ".join((self.name, *self.arguments))


def tests(files: str, shares: int, seconds: float) -> list[Part]:
    """The tests marked `cuda` of these files, in so many processes."""
    return [
        Part("cuda tests", "tests", seconds, arguments=(files, str(i), str(shares))) for i in range(shares)
    ]


def chapter(number: str) -> Part:
    """A chapter of the book."""
    return Part("chapters", "chapter", 250 if number in LONG else 150, arguments=(number,))


def other_chapters() -> list[Part]:
    """The chapters that are read if there is time, the short ones first."""
    numbers = [path.name[:2] for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))]
    return [chapter(number) for number in sorted(numbers, key=LONG.__contains__) if number not in FIRST]


def experiment(name: str) -> Part:
    """An experiment that is begun however little time is left, since a later call goes on with it."""
    return Part(name, "experiment", DAY, True, (name,), least=30)


PARTS = [
    Part("determinism", "determinism", 180),
    *tests("tests/training/test_train.py", 1, 200),
    chapter("01"),
    *tests("tests/engine/test_exact.py", 4, 260),
    *tests("others", 2, 260),
    chapter("03"),
    chapter("09"),
    *other_chapters(),
    Part("bench", "bench", 40, True, ("mlp",)),
    Part("bench", "bench", 40, True, ("conv",)),
    Part("bench", "bench", 50, True, ("transformer",)),
    Part("gpt2", "gpt2", 90, True, ("lds",)),
    Part("bench", "bench", 80, True, ("resnet9-fashion",)),
    Part("gpt2", "gpt2", 200, True, ("small",)),
    Part("bench", "bench", 90, True, ("resnet9-cifar",)),
]
EXPERIMENTS = [experiment("resnet9"), experiment("gpt2-wikitext")]
STAGES = tuple(dict.fromkeys(part.stage for part in PARTS))


class Report:
    """The files in the folder, and what is known of each part so far."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.log, self.summary = (
            folder / name for name in ("results.jsonl", "log.txt", "summary.txt")
        )
        self.lines: list[str] = []
        self.before = self.results.stat().st_size if self.results.exists() else 0  # of other calls

    def note(self, **found) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        self.summary.write_text("\n".join(self.lines) + "\n")

    def found(self, label: str) -> Iterator[dict]:
        """What the part has told in this call, without what was noted of its end."""
        own = self.results.read_bytes()[self.before :] if self.results.exists() else b""
        for line in own.decode().splitlines():
            told = json.loads(line)
            if told["part"] == label and "ended" not in told:
                yield told


def command_of(part: Part, device: str, into: Path, limit: float) -> list[str]:
    """What is started for a part."""
    command = [sys.executable, "-m", "tests.gpu.stages", part.name, *part.arguments, "--device", device]
    return [*command, "--into", str(into.resolve()), "--label", part.label, "--seconds", f"{limit:.0f}"]


class Running:
    """A part at work; its output goes into a temporary file."""

    def __init__(self, part: Part, device: str, report: Report, limit: float):
        self.part, self.limit, self.start = part, limit, time.monotonic()
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `close`)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        quiet = {
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command_of(part, device, report.results, limit), cwd=ROOT, stdout=self.output,
            stderr=subprocess.STDOUT, env=os.environ | hidden | quiet | offline, start_new_session=True,
        )  # fmt: skip

    def ended(self) -> str | None:
        """How it ended, or None while it is at work. A part beyond its time is killed."""
        code = self.process.poll()
        if code is None and time.monotonic() - self.start > self.limit:
            self.kill()
            return f"killed after {self.limit:.0f} s"
        return None if code is None else "ok" if code == 0 else f"exit {code}"

    def kill(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self, ended: str, report: Report) -> None:
        """Note how it ended, and say what it found."""
        self.output.seek(0)
        text, label, took = self.output.read(), self.part.label, time.monotonic() - self.start
        with report.log.open("a") as file:
            file.write(f"\n===== {label}: {ended}, {took:.0f} s\n{text}")
        tail = "" if ended == "ok" else text[-3000:]
        report.note(part=label, stage=self.part.stage, ended=ended, seconds=round(took, 1), tail=tail)
        report.say(f"\n{label}: {ended}, {took:.0f} s")
        for told in report.found(label):
            report.say(
                "  " + ", ".join(f"{k} {_short(x)}" for k, x in told.items() if k not in ("part", "at"))
            )
        self.output.close()
        for line in tail.splitlines()[-8:]:
            report.say(f"  | {line[:160]}")


def _short(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)[:400]


def run_all(parts: list[Part], device: str, report: Report, until: float, side_by_side: int) -> None:
    """Every part for which there is time."""
    waiting, running = list(parts), list[Running]()
    try:
        while waiting or running:
            for one, ended in [(one, ended) for one in running if (ended := one.ended())]:
                running.remove(one)
                one.close(ended, report)
            while waiting and len(running) < side_by_side:
                part, left = waiting.pop(0), until - time.monotonic()
                if left >= (LEAST * part.seconds if part.least is None else part.least):
                    running.append(Running(part, device, report, min(part.seconds, left)))
                    continue
                report.note(part=part.label, stage=part.stage, ended="skipped", seconds=0.0)
                report.say(f"\n{part.label}: skipped, {max(left, 0):.0f} s are left")
            time.sleep(0.05)
    finally:  # also when this process is told to end
        for one in running:
            one.kill()
            one.close("killed with all the others", report)


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    """What is asked for; `parts` are those of the stages, or parts named one by one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("OUT") or "build/gpu")
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse in miniature"
    )
    usual = max(1, (os.cpu_count() or 1) // 2 - 1)
    parser.add_argument("--jobs", type=int, default=usual, help="side by side")
    parser.add_argument("--keep", type=Path, metavar="RESULTS", help="put the numbers into a table")
    parser.add_argument("--commit", help="for --keep, where the machine had no git")
    given = parser.parse_args(words)
    asked, every = [name.strip() for name in given.stages.split(",")], [*PARTS, *EXPERIMENTS]
    for name in asked:
        if name not in {*STAGES, *(word for part in every for word in (part.stage, part.label))}:
            stages = dict.fromkeys((*STAGES, *(part.stage for part in EXPERIMENTS)))
            parser.error(f"no stage {name!r}; there are {', '.join(stages)}")
    given.parts = [part for part in every if {part.stage, part.label} & {*asked}]
    return given


def main(arguments: list[str] | None = None) -> int:
    given = arguments_of(arguments)
    if given.keep:
        try:
            print(kept.keep(given.keep, kept.TABLE, given.commit))
        except (ValueError, OSError) as error:
            print(f"not kept: {error}", file=sys.stderr)
            return 2
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it began ends with it
    try:
        return ask(given)
    finally:
        signal.signal(signal.SIGTERM, before)


def ask(given: argparse.Namespace) -> int:
    """Run the parts that were asked for; 1 where there is no device to run them on."""
    until, report = time.monotonic() + given.budget, Report(given.out)
    run_all([Part("machine", "machine", 90)], given.device, report, until, 1)
    if not any(told.get("usable") for told in report.found("machine")):
        report.say(
            f"there is no {given.device} device that PyTorch can use; --device cpu rehearses without one"
        )
        return 1
    together = [part for part in given.parts if not part.alone]
    alone = [part for part in given.parts if part.alone]
    first = until - (0.45 * given.budget if alone else 0)
    run_all(together, given.device, report, first, given.jobs)
    run_all(alone, given.device, report, until, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
