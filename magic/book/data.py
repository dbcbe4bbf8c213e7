"""Small real data sets, as plain tensors, for the book and its tests.

Each function returns (x_train, y_train, x_test, y_test): float32 images (n, channels, height, width)
scaled to mean 0 and standard deviation 1 over the training part, and int64 labels. Which examples
come out depends on `seed` alone.
"""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..show import needs

Split = tuple[Tensor, Tensor, Tensor, Tensor]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip


def digits(train: int = 1200, test: int = 500, seed: int = 0) -> Split:
    """scikit-learn's handwritten digits: 1,797 images of 8×8, ten classes. Offline, nothing to download.

    Raises ValueError for more images than there are, and ImportError without scikit-learn.
    Source: UCI ML, "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998).
    """
    raw = needs("sklearn.datasets", "notebooks", "digits needs").load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(raw.target, dtype=torch.int64)
    if train + test > len(x):
        raise ValueError(f"train={train} and test={test}: the digits are {len(x):,} images")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:train], order[train : train + test]
    return _scaled(x[chosen[0]], y[chosen[0]], x[chosen[1]], y[chosen[1]])


def fashion_mnist(train: int = 60_000, test: int = 10_000, size: int = 28, seed: int = 0) -> Split:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 + 10,000 images of 28×28, ten kinds of clothing.

    Taken from $FASHION_MNIST if set. Otherwise the first 4,000 + 1,000 of seed 0 come with magic, and
    more are taken from Debian's dataset-fashion-mnist or torchvision's folder in ./data, whichever is
    there; else torchvision downloads them. `size` averages 28×28 down to it.
    Raises RuntimeError, which says how to get the files, when they cannot be downloaded, FileNotFoundError
    for a $FASHION_MNIST without them, and ValueError for more images than there are.
    """
    if "FASHION_MNIST" not in os.environ and seed == 0 and 0 < train <= 4000 and 0 < test <= 1000:
        x_train, y_train, x_test, y_test = _shipped_fashion(train, test)
    else:
        folder = _fashion_folder()
        x_train, y_train = _some(_idx_images(folder, "train"), _idx_labels(folder, "train"), train, seed)
        x_test, y_test = _some(_idx_images(folder, "t10k"), _idx_labels(folder, "t10k"), test, seed)
    if size != 28:
        x_train, x_test = (torch.nn.functional.adaptive_avg_pool2d(x, size) for x in (x_train, x_test))
    return _scaled(x_train, y_train, x_test, y_test)


def cifar10(train: int = 50_000, test: int = 10_000, seed: int = 0, root: str = "data") -> Split:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, downloaded into `root` when it is not there.

    50,000 + 10,000 images of 3×32×32, ten classes. Raises RuntimeError, which says where to put the file,
    when it cannot be downloaded, and ImportError without torchvision.
    """
    datasets = _torchvision()
    parts: list[Tensor] = []
    for is_train in (True, False):
        try:
            part = datasets.CIFAR10(root, train=is_train, download=True)
        except Exception as error:
            raise RuntimeError(_no_data("CIFAR-10", "cifar-10-python.tar.gz", root, error)) from error
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).float()
        parts += _some(x, torch.tensor(part.targets), train if is_train else test, seed)
    return _scaled(*parts)


def python_text(train: int = 2000, test: int = 200, length: int = 32, seed: int = 0):
    """The language reference of Python 3.11, as sequences of characters.

    Returns (train, test, characters): int64 tokens (n, length + 1) and (m, length + 1), indices into the
    string `characters`. Sequences do not overlap; which are taken depends on `seed`.
    Source: see `documentation`.
    """
    text = _reference()
    characters = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(characters)}
    tokens = torch.tensor([index[c] for c in text])
    return *_rows(tokens, train, test, length, seed), characters


def documentation(train: int = 1000, test: int = 200, length: int = 24, words: int = 1000, seed: int = 0):
    """The language reference of Python 3.11, as sequences of words and signs.

    Returns (train, test, vocabulary): int64 tokens (n, length + 1) and (m, length + 1), indices into the list
    `vocabulary` of the most frequent words; all others are its first, "<other>". Sequences do not overlap;
    which are taken depends on `seed`.
    Source: `pydoc_data.topics` of Python 3.11.7, which comes with magic since it differs between versions of
    Python. Copyright 2001–2023 Python Software Foundation; licence: PSF version 2.
    """
    text = re.sub(r"([^\w\s])\1{2,}", " ", _reference())  # without ruled lines
    found = re.findall(r"\w+|[^\w\s]", text)
    vocabulary = ["<other>", *(word for word, _ in Counter(found).most_common(words - 1))]
    index = {word: i for i, word in enumerate(vocabulary)}
    return *_rows(torch.tensor([index.get(word, 0) for word in found]), train, test, length, seed), vocabulary


def _reference() -> str:
    """Python's language reference, as it comes with magic."""
    return gzip.decompress(Path(__file__).with_name("python_docs.txt.gz").read_bytes()).decode()


def _rows(tokens: Tensor, train: int, test: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two parts of the sequences of length + 1 tokens into which these are cut."""
    rows = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)
    if not (train > 0 and test > 0 and train + test <= len(rows)):
        raise ValueError(f"train={train} and test={test}: there are {len(rows):,} sequences of this length")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:train]], rows[order[train : train + test]]


def _scaled(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Split:
    """The images, each channel with mean 0 and standard deviation 1 over those of the training part."""
    mean, deviation = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
    return (x_train - mean) / deviation, y_train, (x_test - mean) / deviation, y_test


def _some(x: Tensor, y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` of the images, drawn at random; all of them in their own order."""
    if not 0 < count <= len(x):
        raise ValueError(f"{count} images asked for; there are {len(x):,}")
    if count == len(x):
        return x, y
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[chosen], y[chosen]


def _shipped_fashion(train: int, test: int) -> tuple[Tensor, ...]:
    """Images 0 … 255 and labels out of fashion_mnist.npz, in the order in which seed 0 draws them."""
    with np.load(Path(__file__).with_name("fashion_mnist.npz")) as parts:
        x_train, y_train = parts["x_train"][:train], parts["y_train"][:train]
        x_test, y_test = parts["x_test"][:test], parts["y_test"][:test]
    images = (torch.from_numpy(x).float().unsqueeze(1) for x in (x_train, x_test))
    labels = (torch.from_numpy(y).long() for y in (y_train, y_test))
    (x_train, x_test), (y_train, y_test) = images, labels
    return x_train, y_train, x_test, y_test


def _fashion_folder() -> Path:
    """The first folder that holds all four files; downloaded where there is none."""
    asked = os.environ.get("FASHION_MNIST")
    folders = [Path(asked)] if asked else [DEBIAN, Path("data/FashionMNIST/raw")]
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for folder in folders:
        if all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in files):
            return folder
    if asked:
        raise FileNotFoundError(f"FASHION_MNIST is {asked}, which does not hold {', '.join(files)} (or .gz)")
    try:
        _torchvision().FashionMNIST("data", download=True)
    except Exception as error:
        raise RuntimeError(
            _no_data("Fashion-MNIST", "the four *-ubyte.gz files", "data/FashionMNIST/raw", error)
        ) from error
    return folders[-1]


def _torchvision():
    """torchvision's data sets."""
    return needs("torchvision.datasets", "notebooks", "this data set needs")


def _no_data(name: str, files: str, folder: str, error: Exception) -> str:
    """What to say where a data set could not be had: the ways to get it."""
    text = f"{name} is not on this machine and could not be downloaded ({type(error).__name__}: {error}). "
    if name == "Fashion-MNIST":
        text += (
            "On Debian or Ubuntu: apt-get install dataset-fashion-mnist. Or set FASHION_MNIST to a folder "
        )
        return text + f"with {files}, or put them into {folder}. magic.book.data.digits() needs no download"
    return text + f"Put {files} into {folder}. magic.book.data.digits() needs no download"


def _idx(folder: Path, name: str) -> bytes:
    """A file of the format in which MNIST came: a header, then one byte for each number."""
    path = folder / f"{name}.gz"
    return gzip.decompress(path.read_bytes()) if path.exists() else (folder / name).read_bytes()


def _idx_images(folder: Path, part: str) -> Tensor:
    """(n, 1, 28, 28), 0 … 255; the header has 16 bytes."""
    raw = np.frombuffer(_idx(folder, f"{part}-images-idx3-ubyte"), dtype=np.uint8, offset=16)
    return torch.from_numpy(raw.copy()).float().reshape(-1, 1, 28, 28)


def _idx_labels(folder: Path, part: str) -> Tensor:
    """(n,), 0 … 9; the header has 8 bytes."""
    raw = np.frombuffer(_idx(folder, f"{part}-labels-idx1-ubyte"), dtype=np.uint8, offset=8)
    return torch.from_numpy(raw.copy()).long()
