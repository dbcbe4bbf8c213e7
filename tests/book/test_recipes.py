"""Published recipes, and augmentation that is a function of the seed and the step."""

import itertools
import json

import pytest
import torch

import magic
from magic import text
from magic.book import corpora, data, recipes
from tests.experiments import gpt2_wikitext, kept, many_at_once, resnet9_fashion


def test_crops_and_flips_are_windows_of_the_mirrored_image():
    x = torch.arange(2 * 1 * 6 * 6, dtype=torch.float64).reshape(2, 1, 6, 6).repeat(40, 1, 1, 1)
    torch.manual_seed(3)
    moved = recipes.crop_and_flip(x, shift=2)
    padded = torch.nn.functional.pad(x, (2,) * 4, mode="reflect")
    seen = set()
    for image, wide in zip(moved, padded, strict=True):
        windows = {}
        for i, j in itertools.product(range(5), range(5)):
            windows[i, j, False] = wide[:, i : i + 6, j : j + 6]
            windows[i, j, True] = windows[i, j, False].flip(2)
        here = [key for key, window in windows.items() if torch.equal(window, image)]
        assert here, "it is no window of the image"
        seen |= set(here)
    assert len({key[:2] for key in seen}) > 15 and {key[2] for key in seen} == {False, True}
    assert torch.equal(recipes.crop_and_flip(x, shift=0, flip=False), x)
    with pytest.raises(ValueError, match="shift=6"):
        recipes.crop_and_flip(x, shift=6)


def test_augmentation_is_replayed_exactly():
    """Recomputed steps see the same crops: with one kept state the scores have the same bits."""
    x, y, x_test, y_test = (t[:24] for t in data.fashion_mnist(train=24, test=24, size=8))
    x, x_test = x.double(), x_test.double()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), recipes.augmented(recipes.classify), magic.batches(24, 8, 2))
    still = magic.Run(model, optimizer, (x, y), recipes.classify, magic.batches(24, 8, 2))
    assert run.train(progress=False).fingerprint() != still.train(progress=False).fingerprint()

    def measure(model):
        return recipes.classify(model, x_test[:3], y_test[:3])

    scores = magic.attribute(run, measure, progress=False)
    fewest = magic.attribute(run, measure, progress=False, plan=magic.plan(run, states=1))
    assert torch.equal(scores.values, fewest.values) and scores.values.abs().max() > 0
    assert magic.verify(scores, progress=False).ok


def test_the_published_resnet9():
    x, y, x_test, y_test = data.fashion_mnist(train=120, test=20, size=14)
    run = recipes.resnet9((x, y), width=2, epochs=2, size=40)
    weights = [p for name, p in run.initial.params.items() if p.dim() == 4]
    assert [len(w) for w in weights] == [2, 4, 4, 4, 8, 16, 16, 16], "eight convolutions, w to 8w"
    rates = magic.hyper(run, "lr")[:, 0]
    assert run.steps == 6 and rates[-1] < rates[0] < rates.max() < 1.2 * 0.085 / (1 + 1 / 0.15)
    assert magic.hyper(run, "momentum").unique().tolist() == [0.85]
    other = recipes.resnet9((x, y), width=2, epochs=2, size=40, augment=True)
    assert other.train(progress=False).fingerprint() != run.train(progress=False).fingerprint()
    scores = magic.attribute(other, lambda m: recipes.classify(m, x_test[:2], y_test[:2]), progress=False)
    assert scores.values.isfinite().all() and scores.health.verified >= 0


@pytest.fixture
def stories(tmp_path):
    """A folder with documents of a corpus, one of them empty."""
    datasets = pytest.importorskip("datasets")
    texts = [f"Story {i}. " + "Once there was a fox who could count. " * (i % 3 + 1) for i in range(30)]
    datasets.Dataset.from_dict({"text": [*texts, "  "]}).save_to_disk(tmp_path / "stories")
    datasets.Dataset.from_dict({"story": texts}).save_to_disk(tmp_path / "nameless")
    return tmp_path


def test_a_corpus_is_cut_into_rows_without_a_gap(stories):
    tokenizer, folder = text.byte_tokenizer(), str(stories / "stories")
    train, test = corpora.corpus(folder, tokenizer, train=20, test=4, length=32)
    assert train.shape == (20, 33) and test.shape == (4, 33) and train.dtype == torch.int64
    rows = [row.tolist() for row in torch.cat([train, test])]
    first = next(row for row in rows if tokenizer.decode(row[:8]) == "Story 0.")
    assert tokenizer.decode(first) == "Story 0. Once there was a fox who"
    ends = [tokenizer.decode(row) for row in rows if tokenizer.eos_token_id in row]
    assert any(".</s>Story" in end.replace(" ", "") for end in ends), (
        "an end of text is between two documents"
    )
    again, _ = corpora.corpus(folder, tokenizer, train=20, test=4, length=32)
    other, _ = corpora.corpus(folder, tokenizer, train=20, test=4, length=32, seed=1)
    assert torch.equal(train, again) and not torch.equal(train, other)


def test_a_corpus_that_is_not_there(stories, monkeypatch):
    tokenizer = text.byte_tokenizer()
    with pytest.raises(ValueError, match=r"has 2,.* tokens, and 33,001 are needed"):
        corpora.corpus(str(stories / "stories"), tokenizer, train=1000, test=100, length=30)
    with pytest.raises(ValueError, match="no column 'text', but story"):
        corpora.corpus(str(stories / "nameless"), tokenizer, train=2, test=1)
    import datasets

    def offline(*of, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"'wikitext' could not be loaded: no network.*save_to_disk.*HF_HOME"):
        corpora.corpus("wikitext", tokenizer, train=2, test=1)


def test_gpt2_as_published():
    model, train, test = gpt2_wikitext.tiny()
    run = recipes.gpt2(model.double(), train, size=12, epochs=4, accumulate=2)
    rates = magic.hyper(run, "lr")[:, 0]
    assert run.steps == 16 and rates.argmax() == 3 and rates[0] == pytest.approx(2e-4)
    assert rates.max() == pytest.approx(8e-4) and rates[-1] == pytest.approx(8e-5)
    assert magic.hyper(run, "eps_root").unique().item() == pytest.approx(1e-6)
    scores = magic.attribute(run, lambda model: text.loss()(model, test[:2]), progress=False)
    assert scores.values.abs().max() > 0 and magic.verify(scores, progress=False).ok
    with torch.device("meta"):
        large = recipes.gpt2_of_92m()
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(92e6, rel=0.01) and not large.training


def test_the_experiment_with_gpt2_rehearsed(tmp_path):
    out = tmp_path / "found.jsonl"
    words = ["--small", "--sets", "8", "--targets", "2", "--drop", "0.1", "--out", str(out)]
    row = gpt2_wikitext.main(words)
    assert json.loads(out.read_text()) == row and row["n"] == 48 and -1 <= row["lds"] <= 1
    assert out.with_suffix(".sqlite").exists()


def test_the_experiment_with_resnet9_rehearsed(tmp_path):
    sizes = {"images": 120, "size": 8, "width": 2, "epochs": 1, "batch": 40, "targets": 2, "sets": 6}
    files = {"folder": tmp_path, "out": tmp_path / "found.csv", "points": tmp_path / "points.csv"}
    words = [word for name, value in (sizes | files).items() for word in (f"--{name}", str(value))]
    rows = resnet9_fashion.main(words)
    judged = {(row["method"], row["removed"]): row["lds"] for row in rows if "lds" in row}
    methods = {"MAGIC, w = 1": "15", "MAGIC, centre": "5", "EK-FAC": "15", "TRAK": "15"}
    assert list(judged) == [(name, f"{drop}%") for name, drops in methods.items() for drop in drops]
    assert (
        all(-1 <= lds <= 1 for lds in judged.values())
        and judged["MAGIC, w = 1", "1%"] > 0.5
        and rows[0]["steps"] == 3
    )
    points = kept.read(files["points"])
    assert len(points) == 7 * 6 * 2 + 2
    alone = [p for p in points if p["removed"] == "image 42"]
    assert len(alone) == 2 and all(float(p["true"]) != float(p["before"]) for p in alone)
    other = [row | {"images": 999} for row in rows[:2]]
    for some in (other, rows):
        kept.replace(files["out"], resnet9_fashion.COLUMNS, resnet9_fashion.WHERE, some)
    found = kept.read(files["out"])
    assert [row["images"] for row in found] == ["999"] * 2 + ["120"] * len(rows), "each size in its place"


def test_the_speed_of_many_at_once_rehearsed(tmp_path):
    out = tmp_path / "speed.csv"
    words = ["--networks", "small", "--trainings", "4", "--steps", "3", "--rounds", "1", "--jobs", "1"]
    (row,) = many_at_once.main([*words, "--out", str(out)])
    assert kept.read(out) == [{name: str(value) for name, value in row.items()}] and row["ratio"] > 0
    assert row["parameters"] == 65 * 32 + 33 * 10 and row["steps"] == 3
