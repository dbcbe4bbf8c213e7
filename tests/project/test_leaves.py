"""Data sets, models, figures and the checks that notebooks use."""

import gzip
import sys

import matplotlib
import numpy as np
import pytest
import torch

import magic
from magic.book import checks, data, models, plot
from tests.support import cases

matplotlib.use("agg")


def test_digits():
    x, y, x_test, _ = data.digits(train=100, test=50)
    assert x.shape == (100, 1, 8, 8) and x_test.shape == (50, 1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3
    again = data.digits(train=100, test=50)
    assert torch.equal(x, again[0]) and not torch.equal(x, data.digits(100, 50, seed=1)[0])
    with pytest.raises(ValueError, match="1,797"):
        data.digits(train=1700, test=100)


@pytest.fixture
def fashion_folder(tmp_path):
    """Four files in Fashion-MNIST's format, of noise."""
    dice = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = dice.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes(range(10)) * (count // 10))
    return tmp_path


def test_fashion_mnist_from_a_folder(fashion_folder, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(fashion_folder))
    x, y, x_test, _ = data.fashion_mnist(train=40, test=20)
    assert x.shape == (40, 1, 28, 28) and x_test.shape == (20, 1, 28, 28)
    assert y.tolist() == list(range(10)) * 4
    small = data.fashion_mnist(train=30, test=20, size=14)[0]
    assert small.shape == (30, 1, 14, 14)
    with pytest.raises(ValueError, match="41 images asked for; there are 40"):
        data.fashion_mnist(train=41, test=20)
    (fashion_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not hold .*t10k-labels-idx1-ubyte"):
        data.fashion_mnist(train=40, test=20)


def test_data_that_cannot_be_had_says_how_to_get_it(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    with pytest.raises(RuntimeError, match=r"apt-get install dataset-fashion-mnist.*FASHION_MNIST"):
        data.fashion_mnist()
    with pytest.raises(RuntimeError, match=r"no network.*cifar-10-python.tar.gz"):
        data.cifar10()


def test_cifar10_through_torchvision(monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data = np.random.default_rng(train).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(10)) * 3

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    x, y, x_test, _ = data.cifar10(train=20, test=10)
    assert x.shape == (20, 3, 32, 32) and x_test.shape == (10, 3, 32, 32) and len(y) == 20
    assert x.mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("sklearn.datasets", data.digits, "notebooks"),
        ("torchvision", data.cifar10, "notebooks"),
        ("seaborn", plot.style, "notebooks"),
        ("scipy.stats", lambda: magic.evidence.comparison.spearman(np.eye(3), np.eye(3)), "notebooks"),
    ],
)
def test_a_missing_package_names_its_extra(module, call, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'magic-attribution\[{extra}\]'"):
        call()


MODELS = {
    "mlp": (lambda: models.MLP((64, 16, 10)), (4, 1, 8, 8)),
    "convnet-group": (lambda: models.ConvNet(width=8, size=12), (4, 1, 12, 12)),
    "convnet-batch": (lambda: models.ConvNet(width=8, size=12, norm="batch"), (4, 1, 12, 12)),
    "resnet9": (lambda: models.ResNet9(width=4), (4, 3, 16, 16)),
    "resnet9-group": (lambda: models.ResNet9(channels=1, width=8, norm="group"), (4, 1, 28, 28)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train_and_differentiate(name, device):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double().to(device)
    x = torch.randn(12, *shape[1:], dtype=torch.float64, device=device)
    y = torch.randint(10, (12,), device=device)
    assert model(x[:4]).shape == (4, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(12, 4, 2))
    scores = magic.attribute(run, cases.measure_on(x, y), progress=False, plan=magic.plan(run, states=3))
    weights, change = run.weights(), 1e-5
    weights[5] += change
    above = scores.measure(run.model(run.train(weights, progress=False)))
    weights[5] -= 2 * change
    below = scores.measure(run.model(run.train(weights, progress=False)))
    slope = ((above - below) / (2 * change)).detach()
    assert ((slope - scores.values[:, 5]).norm() / slope.norm()) < 1e-4


def test_models_have_no_bias_before_a_normalisation():
    for make, _ in MODELS.values():
        for module in make().modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.bias is None
    with pytest.raises(ValueError, match='"group" or "batch"'):
        models.ConvNet(norm="layer")


def test_resnet9_of_the_papers_size():
    count = sum(p.numel() for p in models.ResNet9().parameters())
    assert 2_000_000 < count < 10_000_000
    outputs = []
    for scale in (0.125, 0.5):
        torch.manual_seed(0)
        outputs.append(models.ResNet9(width=8, scale=scale)(torch.ones(2, 3, 8, 8).tril()))
    assert outputs[0].abs().max() > 0
    torch.testing.assert_close(outputs[1], 4 * outputs[0])


def test_figures():
    import matplotlib.pyplot as plt

    plot.style()
    figure = plot.images(torch.rand(7, 1, 8, 8), [str(i) for i in range(7)], columns=3)
    assert len(figure.axes) == 9 and [ax.get_title() for ax in figure.axes][:2] == ["0", "1"]
    assert len(plot.images(torch.rand(1, 3, 8, 8), ["one"]).axes) == 1
    true = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    ax = magic.Comparison(true * 1.1, true, torch.zeros(3), "trainings without 5 % of the data").plot(
        targets=2
    )
    assert len(ax.collections[0].get_offsets()) == 40
    assert "LDS 1.000" in ax.get_title() and "5 % of" in ax.get_title()
    plt.close("all")


def test_figure_of_the_cotangents():
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    sizes = ((8, (1.0, 2.0)), (4, (1e-2, 1.5)), (0, (1e-7, 1.0)))
    health = magic.Health(12, sizes, 0, {})
    ax = health.plot()
    steady, wide = ax.lines[1], ax.lines[0]
    assert list(wide.get_xdata()) == [8, 4, 0] and list(wide.get_ydata()) == [1.0, 1e-2, 1e-7]
    assert to_hex(wide.get_color()) == plot.HARMFUL and to_hex(steady.get_color()) == plot.HELPFUL
    assert "2 targets; the widest sweeps 7.0" in ax.get_title() and ax.get_yscale() == "log"
    assert len(health.plot(1).lines) == 1 and "1 target;" in health.plot(targets=[1]).get_title()
    with pytest.raises(ValueError, match="there are 2 targets, 0 … 1"):
        health.plot(2)
    with pytest.raises(ValueError, match="no cotangent was measured"):
        magic.Health(12, (), 0, {}).plot()
    plt.close("all")


def test_python_text():
    train, test, characters = data.python_text(train=50, test=10, length=16)
    assert train.shape == (50, 17) and test.shape == (10, 17) and train.dtype == torch.int64
    assert train.min() >= 0 and train.max() < len(characters) < 200
    words = "".join(characters[i] for row in data.python_text(2000, 1)[0] for i in row).split()
    assert {"the", "a", "of"} <= set(words)
    assert torch.equal(train, data.python_text(50, 10, 16)[0])
    assert not torch.equal(train, data.python_text(50, 10, 16, seed=1)[0])
    with pytest.raises(ValueError, match="sequences of this length"):
        data.python_text(train=10**6)


def test_the_transformer_sees_no_future():
    torch.manual_seed(0)
    model = models.Transformer(20, width=16, heads=2).double()
    tokens = torch.randint(20, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(20, (3, 5))
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 20)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 0.01


def test_compare_and_claim(capsys):
    a = torch.tensor([1.0, 2.0])
    checks.compare("equal", a, a.clone())
    checks.compare("close", a, a * (1 + 3e-7))
    out = capsys.readouterr().out
    assert "same bits" in out and "agree to 1e-06" in out
    checks.compare("signed zero", torch.zeros(2), -torch.zeros(2))
    checks.compare("other type", a, a.double())
    assert "same bits" not in capsys.readouterr().out
    with pytest.raises(AssertionError, match="relative difference is"):
        checks.compare("far", a, a + 1)
    with pytest.raises(AssertionError, match="shape"):
        checks.compare("shape", a, a[:1])
    with pytest.raises(AssertionError, match="difference is nan"):
        checks.compare("nan", a * float("nan"), a)
    checks.claim("holds", True)
    assert "✓ holds" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="does not hold: no"):
        checks.claim("no", False)
