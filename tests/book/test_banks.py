"""A chapter's bank is read from a copy, taken over where its bits are others, empty where there is none."""

import sqlite3

import pytest
import torch

import magic
from magic.book import banks
from magic.book.banks import shipped_bank
from magic.engine.measuring import measured_outputs
from magic.evidence import bank
from tests.support import cases


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with a chapter's bank of one retraining, seen as a chapter sees it."""
    run, *_ = cases.build("sgd", torch.float64)
    measure = cases.measure_on(*cases.data(torch.float64))
    (tmp_path / "banks").mkdir()
    (tmp_path / "solutions").mkdir()
    kept = magic.Bank(tmp_path / "banks" / "03_chapter.sqlite", run, measure, name="ours")
    weights = magic.subsets.single(run.n, [2])[0]
    outputs = magic.outputs(run, measure, weights, bank=kept, progress=False)
    banks._copy.cache_clear()
    monkeypatch.setattr(banks, "_compared", set())
    monkeypatch.chdir(tmp_path)
    return tmp_path, run, measure, weights, outputs


@pytest.mark.parametrize("place", [".", "solutions"])
def test_it_is_read_from_chapters_and_solutions(notebooks, monkeypatch, place):
    folder, run, measure, weights, outputs = notebooks
    monkeypatch.chdir(folder / place)
    found = shipped_bank("03_chapter", run, measure, name="ours")
    assert torch.equal(found.get(weights), outputs) and outputs.abs().sum() > 0


def test_the_book_is_not_written_into(notebooks):
    folder, run, measure, _weights, outputs = notebooks
    before = (folder / "banks" / "03_chapter.sqlite").read_bytes()
    found = shipped_bank("03_chapter", run, measure, name="ours")
    found.put(magic.subsets.single(run.n, [3])[0], outputs)
    assert len(shipped_bank("03_chapter", run, measure, name="ours")) == 2, "one copy for the whole chapter"
    assert (folder / "banks" / "03_chapter.sqlite").read_bytes() == before


def test_rows_with_other_bits_are_taken_over(notebooks, monkeypatch):
    _, run, measure, _weights, _outputs = notebooks
    taken = []
    monkeypatch.setattr(magic.Bank, "adopt", lambda self, **how: taken.append(self))
    shipped_bank("03_chapter", run, measure, name="ours")
    assert taken == []
    other, *_ = cases.build("sgd-momentum", torch.float64)
    assert taken == [shipped_bank("03_chapter", other, measure, name="ours")]


def test_one_row_of_a_file_is_trained_again(notebooks, monkeypatch):
    """And one of each run whose identity has changed; the others are believed without."""
    folder, _run, measure, *_ = notebooks
    runs = {case: cases.build(case, torch.float64)[0] for case in ("sgd", "sgd-momentum", "adam", "rmsprop")}
    path = folder / "banks" / "05_several.sqlite"
    with monkeypatch.context() as elsewhere:  # what is measured at the start has other bits there
        elsewhere.setattr(bank, "measured_outputs", lambda *a, **k: measured_outputs(*a, **k) * (1 + 1e-12))
        for name, run in runs.items():
            kept = magic.Bank(path, run, measure, name=name)
            magic.outputs(run, measure, magic.subsets.single(run.n, range(3)), bank=kept, progress=False)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE parts SET parts = '{}' WHERE key = (SELECT key FROM banks WHERE about LIKE "
                     "'%\"adam\"%')")  # fmt: skip
        file.execute("DELETE FROM parts WHERE key = (SELECT key FROM banks WHERE about LIKE '%rmsprop%')")
    trained, train = [], magic.Run.train
    monkeypatch.setattr(magic.Run, "train", lambda run, *a, **k: trained.append(run) or train(run, *a, **k))
    for name, run in runs.items():
        assert len(shipped_bank("05_several", run, measure, name=name)) == 3
    assert trained == [runs["sgd"], runs["adam"], runs["rmsprop"]]


def test_a_chapter_without_a_file_has_an_empty_bank(notebooks):
    _, run, measure, *_ = notebooks
    assert len(shipped_bank("04_other", run, measure)) == 0
