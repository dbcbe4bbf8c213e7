"""Published recipes, and augmentation that is a function of the seed and the step."""

import itertools

import pytest
import torch

import magic
from magic.book import data, recipes


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
