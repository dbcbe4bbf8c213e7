"""`python -m tests.gpu` works where there is no GPU: a rehearsal, and parts that crash or hang."""

import csv
import json
import sys

import pytest
from nbformat import v4, write

from tests.experiments import resnet9_fashion
from tests.gpu import __main__ as driver
from tests.gpu import chapters, experiments, kept, stages

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
    made.append(driver.Part("bench", "fine", 10_000, arguments=("in steps",), least=1))
    monkeypatch.setattr(driver, "command_of", command_of)
    monkeypatch.setattr(driver, "PARTS", made)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--jobs", "3", "--budget", "200"]
    assert driver.main([*arguments, "--stages", "bench"]) == 0
    found = lines(tmp_path / "results.jsonl")
    ended = {line["part"]: line["ended"] for line in found if "ended" in line}
    assert ended == {
        "machine": "ok", "fine": "ok", "crashes": "exit -6", "hangs": "killed after 2 s", "late": "skipped",
        "fine in steps": "ok",
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


def test_a_rehearsal_of_every_part(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    (machine,) = rehearsed(path, "machine")
    assert machine["usable"] and machine["commit"] and machine["torch"]
    (same,) = rehearsed(path, "determinism")
    assert [name for name, x in same.items() if x is True] == [
        "same bits twice", "bits of the plain loop", "bits when TF32 is asked for", "scores' bits twice",
        "scores' bits with 3 states",
    ]  # fmt: skip
    monkeypatch.setattr(chapters, "absent", lambda *names: names[0])  # as where nbval is not installed
    (read,) = rehearsed(path, "chapter", "01")
    assert (read["held"], read["failed"], read["lines that differ"], read["cells done"]) == (2, 0, 0, 5)
    loops, *costs = rehearsed(path, "bench", "mlp")
    assert loops["a plain step, ms"] > 0 and [cost["K"] for cost in costs] == [4]
    assert all(cost["ratio"] > 0 and cost["norm of the scores"] > 0 for cost in costs)
    assert "28 of 28 parameters" in [
        line.get("bits of the plain loop") for line in rehearsed(path, "gpt2", "small")
    ]


def test_the_marked_tests_are_told_one_by_one(tmp_path):
    files = "tests/training/test_train.py"
    found = rehearsed(tmp_path / "results.jsonl", "tests", files, "0", "2")
    assert own(found[-1]) == {"passed": 1}


def own(told):
    """A line without what every line has."""
    return {name: x for name, x in told.items() if name not in ("part", "at", "seconds")}


def a_chapter(folder, *cells):
    """Chapter 99, with a cell for each pair of code and of what it is said to have printed."""
    made = [
        v4.new_code_cell(code, execution_count=i, outputs=[v4.new_output("stream", name="stdout", text=said)])
        for i, (code, said) in enumerate(cells, 1)
    ]
    write(v4.new_notebook(cells=made), folder / "99_made_up.ipynb")
    text = "# %% [markdown]\n# Some words\n\n" + "".join(f"# %%\n{code}\n" for code, _ in cells)
    (folder / "99_made_up.py").write_text(text)


def read_chapter(folder, monkeypatch):
    """What is told of it, and how its process ends."""
    monkeypatch.setattr(chapters, "NOTEBOOKS", folder)
    teller, code = stages.Teller(str(folder / "results.jsonl"), "chapter 99"), 0
    try:
        chapters.chapter(teller, "99")
    except SystemExit as end:
        code = end.code
    return [own(line) for line in lines(folder / "results.jsonl")], code


def test_a_chapter_is_compared_with_its_stored_claims(tmp_path, monkeypatch):
    a_chapter(
        tmp_path,
        (
            "from magic.book.checks import agree, claim\nclaim('near', 0.5, at_least=0.4)",
            "✓ near ≥ 0.4 (0.61)\n",
        ),
        ("print('in 3 s')\nclaim('other words', True)", "in 5 s\n✓ the words\n"),
        ("claim('false', False)", ""),
        ("1 / 0", ""),
        ("import no_such_package.part", ""),
        ("print('not reached')", ""),
    )
    monkeypatch.setattr(chapters, "absent", lambda *names: names[0])
    monkeypatch.setattr(chapters, "FEW", 6)
    differ, failed, error, skipped, last = read_chapter(tmp_path, monkeypatch)[0]
    assert differ == {"differs": "cell 1", "stored": ["✓ the words"], "now": ["✓ other words"]}
    assert failed == {"claim": "false", "outcome": "FAILED", "why": "does not hold: false"}
    assert error == {"what": "cell 3", "error": "ZeroDivisionError: division by zero"}
    assert skipped == {"what": "cell 4", "skipped": "no module no_such_package"}
    counts = {"held": 2, "failed": 1, "errors": 1, "lines that differ": 1, "cells done": 4}
    assert last == {"chapter": "99_made_up", "cells": 6, **counts}


def test_a_chapter_is_read_by_nbval(tmp_path, monkeypatch):
    a_chapter(
        tmp_path,
        ("print('in 3 s')", "in 5 s\n"),
        ("print(2)", "3\n"),
        ("import no_such_package.part\nx = 1", "\n"),
        ("print(x)", "1\n"),
        ("import magic.no_such_part", "\n"),
    )
    monkeypatch.setattr(chapters, "FEW", 4)
    (failed, skipped, counts), code = read_chapter(tmp_path, monkeypatch)
    assert failed["outcome"] == "FAILED" and "Cell 1" in failed["test"] and "3" in failed["why"]
    assert skipped["skipped"] == "no module no_such_package" and "Cell 2" in skipped["test"]
    assert counts == {"passed": 1, "failed": 1, "skipped": 2} and code == 1


def test_what_is_ours_is_never_absent():
    assert stages.absent("magic.no_such_part", "tests", "torch") is None
    assert stages.absent("torch", "no_such_package.part") == "no_such_package"


def test_every_chapter_is_read():
    every = {path.name[:2] for path in chapters.NOTEBOOKS.glob("[0-9][0-9]_*.py")}
    read = [part.arguments[0] for part in driver.PARTS if part.stage == "chapters"]
    assert {*read} == every and len(read) == len(every) > 10 and read[:3] == ["01", "03", "09"]


def test_stages_and_parts_are_asked_for_by_name():
    def asked(stages):
        return [part.label for part in driver.arguments_of(["--stages", stages]).parts]

    assert asked("chapter 03, bench") == [
        "chapter 03",
        *(p.label for p in driver.PARTS if p.stage == "bench"),
    ]
    assert asked("resnet9") == ["experiment resnet9"]
    assert len(driver.arguments_of([]).parts) == len(driver.PARTS), "experiments are asked for by name"
    with pytest.raises(SystemExit, match="2"):
        asked("resnet9,nothing")


def test_experiments_go_on_from_one_folder(tmp_path, monkeypatch):
    """tests/book/test_recipes.py rehearses the experiments themselves."""

    def main(words):
        asked.append(resnet9_fashion.arguments(words))
        same = {"images": asked[-1].images, "seed": 3, "lds": None}
        return [same | {"method": "training", "seconds": 1.5}, same | {"method": "MAGIC", "lds": 0.9}]

    asked = []
    monkeypatch.setattr(resnet9_fashion, "main", main)
    monkeypatch.setattr(experiments, "KEPT", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    common, *rows = rehearsed(tmp_path / "results.jsonl", "experiment", "resnet9")
    (given,) = asked
    assert given.images == 60 and given.folder == tmp_path / "kept" / "resnet9-rehearsal"
    assert given.out.parent == tmp_path / "resnet9-rehearsal" and given.out.parent.is_dir()
    assert own(common) == {"images": 60, "seed": 3}
    assert list(map(own, rows)) == [{"method": "training"}, {"method": "MAGIC", "lds": 0.9}]
    experiments.experiment(stages.Teller(str(tmp_path / "results.jsonl"), "here", "cuda"), "resnet9")
    assert asked[1].images == 60_000 and asked[1].folder == tmp_path / "kept" / "resnet9"


MACHINE = {
    "device": "cuda",
    "GPU": "H200",
    "driver": "580.1",
    "torch": "2.15.0",
    "CUDA": "13.0",
    "usable": True,
}
MACHINE |= {"part": "machine", "at": 1, "commit": "abc", "date": "2026-11-29 12:00", "memory GB": 139.0}


def results(path, *told, machine=MACHINE):
    end = {"part": "machine", "stage": "machine", "ended": "ok", "seconds": 2.0, "tail": ""}
    path.write_text("".join(json.dumps(line) + "\n" for line in (machine, end, *told)))
    return path


def a_part(label, stage, *told):
    return *({"part": label, "at": 3.5, **line} for line in told), {
        "part": label, "stage": stage, "ended": "ok", "seconds": 12.5, "tail": ""
    }  # fmt: skip


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_kept_with_what_they_were_measured_on(tmp_path, monkeypatch, capsys):
    bench = a_part("bench mlp", "bench", {"work": "mlp", "K": 4, "ratio": 3.14159265, "plan": "all"})
    same = a_part("determinism", "determinism", {"work": "conv", "same bits twice": True})
    test = a_part(
        "tests others 0 2", "cuda tests", {"test": "a", "outcome": "FAILED", "seconds": 1.0}, {"failed": 1}
    )
    file = results(tmp_path / "results.jsonl", *bench, *same, *test, {"part": "gpt2 lds", "at": 1, "r2": 0.5})
    monkeypatch.setattr(kept, "TABLE", tmp_path / "kept.csv")
    assert driver.main(["--keep", str(file)]) == 0 and "4 numbers of 4 parts" in capsys.readouterr().out
    first = table(kept.TABLE)
    assert [(row["stage"], row["part"], row["what"], row["value"], row["seconds"]) for row in first] == [
        ("bench", "bench mlp", "mlp, K 4: ratio", "3.14159", "12.5"),
        ("determinism", "determinism", "conv: same bits twice", "True", "12.5"),
        ("cuda tests", "tests others 0 2", "failed", "1", "12.5"),
        ("gpt2", "gpt2 lds", "r2", "0.5", ""),
    ]
    assert all(row[name] == MACHINE[name] for row in first for name in kept.MACHINE)
    assert list(first[0]) == list(kept.COLUMNS)
    kept.keep(file, kept.TABLE)
    assert table(kept.TABLE) == first, "keeping twice does not double"


def test_tables_of_an_experiment_are_merged_into_the_books(tmp_path):
    def rows(path, *found):
        path.parent.mkdir(exist_ok=True)
        path.write_text("images,device,lds,date\n" + "".join(f"{row},today\n" for row in found))
        return path

    file = results(tmp_path / "results.jsonl", *a_part("experiment resnet9", "resnet9", {"lds": 0.9}))
    ours = rows(tmp_path / "book" / "15_at_the_scale.csv", "10,cpu,0.9", "60,H200,0.1")
    rows(tmp_path / "resnet9" / ours.name, "60,H200,0.8", "60,H200,0.7")
    rows(tmp_path / "resnet9-rehearsal" / ours.name, "60,cpu,0.3")
    kept.keep(file, ours.with_name("15_gpu.csv"))
    found = [(row["images"], row["device"], row["lds"]) for row in table(ours)]
    assert found == [("10", "cpu", "0.9"), ("60", "H200", "0.8"), ("60", "H200", "0.7")]


def test_rows_of_the_same_code_and_part_are_replaced(tmp_path):
    def keep(machine_says, *told, **more):
        kept.keep(
            results(tmp_path / "r", *told, machine=MACHINE | {"commit": machine_says}), tmp_path / "t", **more
        )
        return [(row["commit"], row["part"], row["value"]) for row in table(tmp_path / "t")]

    one, two = (a_part("bench mlp", "bench", {"ratio": x, "other": x}) for x in (1, 2))
    conv = a_part("bench conv", "bench", {"ratio": 3})
    keep("old", *one)
    keep("new", *one, *conv)
    found = keep("new", *two)
    assert found == [
        ("old", "bench mlp", "1"), ("old", "bench mlp", "1"), ("new", "bench conv", "3"),
        ("new", "bench mlp", "2"), ("new", "bench mlp", "2"),
    ]  # fmt: skip
    assert keep("unknown", *conv, commit="said")[-1] == ("said", "bench conv", "3")
    with pytest.raises(ValueError, match=r"does not say of which commit.*--commit HASH"):
        keep("unknown", *conv)


def test_what_is_no_measurement_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept, "TABLE", tmp_path / "kept.csv")
    part = a_part("bench mlp", "bench", {"ratio": 3.0})
    (tmp_path / "lone").write_text(json.dumps(part[0]))
    (tmp_path / "cut").write_text('{"part": "mach')
    files = {
        "is a rehearsal on device cpu": results(tmp_path / "cpu", *part, machine=MACHINE | {"device": "cpu"}),
        "has no line of the machine": tmp_path / "lone",
        "tells no number": results(tmp_path / "empty"),
        "line 1 of": tmp_path / "cut",
        "No such file": tmp_path / "nowhere",
    }
    for reason, file in files.items():
        assert driver.main(["--keep", str(file)]) == 2
        assert reason in capsys.readouterr().err
    assert not kept.TABLE.exists()
