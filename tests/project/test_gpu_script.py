"""`python -m tests.gpu` works where there is no GPU: a rehearsal, and parts that crash or hang."""

import json
import sys

from tests.gpu import __main__ as driver
from tests.gpu import stages

FAKES = {
    "machine": "tell(usable=True)",
    "fine": "tell(answer=42)",
    "crashes": "tell(before=1); print('the last words'); os.abort()",
    "hangs": "tell(before=2); time.sleep(60)",
}
TELL = """
import json, os, sys, time
def tell(**found):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"part": sys.argv[2], "at": 0, **found}) + "\\n")
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_part_that_crashes_or_hangs_loses_nothing(tmp_path, monkeypatch, capsys):
    def command_of(part, device, into, limit):
        assert device == "cpu" and limit <= part.seconds
        return [sys.executable, "-c", TELL + FAKES[part.name], str(into), part.label]

    made = [driver.Part("bench", name, 2 if name == "hangs" else 30) for name in FAKES if name != "machine"]
    made.append(driver.Part("bench", "late", 10_000, alone=True))
    monkeypatch.setattr(driver, "command_of", command_of)
    monkeypatch.setattr(driver, "PARTS", made)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--jobs", "3", "--budget", "200"]
    assert driver.main([*arguments, "--stages", "bench"]) == 0
    found = lines(tmp_path / "results.jsonl")
    ended = {line["part"]: line["ended"] for line in found if "ended" in line}
    assert ended == {
        "machine": "ok", "fine": "ok", "crashes": "exit -6", "hangs": "killed after 2 s", "late": "skipped"
    }  # fmt: skip
    told = {line["part"]: line for line in found if "ended" not in line}
    assert told["fine"]["answer"] == 42 and told["crashes"]["before"] == 1 and told["hangs"]["before"] == 2
    assert "the last words" in next(line["tail"] for line in found if line.get("ended") == "exit -6")
    said = capsys.readouterr().out
    assert "late: skipped" in said and "answer 42" in said and "| the last words" in said
    assert said.strip() == (tmp_path / "summary.txt").read_text().strip()
    assert "the last words" in (tmp_path / "log.txt").read_text()


def rehearsed(path, *arguments):
    """What a part tells in a rehearsal; it would be an error of this script if it told of one."""
    stages.main([*arguments, "--device", "cpu", "--into", str(path), "--label", "here", "--seconds", "1000"])
    found = lines(path)
    path.unlink()
    assert found and not [line for line in found if "error" in line or "FAILED" in line.values()], found
    return found


def test_a_rehearsal_of_every_part(tmp_path):
    path = tmp_path / "results.jsonl"
    (machine,) = rehearsed(path, "machine")
    assert machine["usable"] and machine["commit"] and machine["torch"]
    (same,) = rehearsed(path, "determinism")
    assert [name for name, x in same.items() if x is True] == [
        "same bits twice", "bits of the plain loop", "bits when TF32 is asked for", "scores' bits twice",
        "scores' bits with 3 states",
    ]  # fmt: skip
    *_, last = rehearsed(path, "chapter", "01")
    assert last["held"] == 2
    loops, *costs = rehearsed(path, "bench", "mlp")
    assert loops["a plain step, ms"] > 0 and [cost["K"] for cost in costs] == [4]
    assert all(cost["ratio"] > 0 and cost["norm of the scores"] > 0 for cost in costs)
    assert "28 of 28 parameters" in [
        line.get("bits of the plain loop") for line in rehearsed(path, "gpt2", "small")
    ]


def test_the_marked_tests_are_told_one_by_one(tmp_path):
    files = "tests/training/test_train.py"
    found = rehearsed(tmp_path / "results.jsonl", "tests", files, "0", "2")
    assert {name: x for name, x in found[-1].items() if name not in ("part", "at")} == {"passed": 1}
