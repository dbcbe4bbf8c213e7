"""Published training recipes as runs, and augmentation that a replay repeats to the bit.

Every random number of a step is a function of the run's seed and of the step. So a loss may crop and flip its
batch as it likes: a replay draws the same crops again, on the device where the batch is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def classify(model, x: Tensor, y: Tensor) -> Tensor:
    """(B,): the cross-entropy of each image."""
    return F.cross_entropy(model(x), y, reduction="none")


def crop_and_flip(x: Tensor, shift: int = 2, flip: bool = True) -> Tensor:
    """Each image of (B, C, H, W) moved by up to `shift` pixels, with its border mirrored, and half of them
    flipped from left to right, at random. Raises ValueError for a shift as large as the image."""
    count, _, height, width = x.shape
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift={shift}: 0 or more, and less than the images' size, {height} × {width}")
    padded = F.pad(x, (shift,) * 4, mode="reflect") if shift else x
    down, right = torch.randint(2 * shift + 1, (2, count, 1), device=x.device)
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    if flip:
        turned = torch.rand(count, 1, device=x.device) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    which = torch.arange(count, device=x.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmented(loss: Callable, shift: int = 2, flip: bool = True) -> Callable:
    """The loss of a batch whose images are cropped and flipped while the model is trained."""

    def of_moved(model, x: Tensor, *others: Tensor) -> Tensor:
        return loss(model, crop_and_flip(x, shift, flip), *others)

    return of_moved


def resnet9(
    train: tuple[Tensor, Tensor],
    width: int = 80,
    epochs: int = 20,
    size: int = 500,
    augment: bool = False,
    seed: int = 0,
):
    """The ResNet-9 with which MAGIC's author compares methods: Chen et al. 2026, arXiv 2609.15044.

    Eight convolutions of widths 80 to 640, each with BatchNorm and GELU; batches of 500, 20 epochs; SGD with
    momentum .85 and a rate that rises linearly and falls to 0. The paper's rate, .085, and weight decay,
    5e-4, are both divided by 1 + 1/(1 − .85). It does not say at which step the rate is highest: here that
    is so of `models.triangle`, after a quarter of the run. Nor is the output scaled.

    train   (n, C, H, W) images and their classes; in the paper 50,000 of CIFAR-10, without augmentation, for
            an accuracy of 89.88 %
    width   the first layer's channels; smaller ones for smaller machines
    returns a magic.Run
    """
    import magic

    from .models import ResNet9, triangle

    (x, y), momentum = train, 0.85
    share = 1 / (1 + 1 / (1 - momentum))
    torch.manual_seed(seed)
    model = ResNet9(x.shape[1], int(y.max()) + 1, width, scale=1.0, top=8).to(x.device)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.085 * share, momentum=momentum, weight_decay=5e-4 * share
    )
    batches = magic.batches(len(x), size, epochs, seed=seed)
    rate = triangle(optimizer, len(batches))
    loss = augmented(classify) if augment else classify
    return magic.Run(model, optimizer, (x, y), loss, batches, rate, seed=seed)


def gpt2(
    model,
    train: Tensor,
    epochs: int = 4,
    size: int = 64,
    eps_root: float = 1e-6,
    seed: int = 0,
    **options,
):
    """GPT-2 on WikiText as EleutherAI train it for studies of attribution (bergson's MAGIC trainer).

    Batches of 64 rows of 512 tokens, 4 epochs; AdamW with betas .95 and .975, a weight decay of .01 and 1e-6
    under its root; a rate that rises to 8e-4 for a quarter of the run and falls to 8e-5, linearly. Without
    dropout, where the model is in eval mode, as `magic.text.pretrained` returns it. Source: the card of
    huggingface.co/EleutherAI/gpt-2-wikitext-chunks-epsroot-1e-6-bs64.

    model    a causal language model of transformers: "gpt2" of `magic.text.pretrained` or `gpt2_of_92m()`
    train    (n, length + 1) tokens, as of `magic.book.corpora.corpus`
    options  of the Run, such as accumulate= where a batch does not fit
    returns  a magic.Run
    """
    import magic
    from magic import text

    groups = [{"params": list(model.parameters()), "eps_root": eps_root}]
    optimizer = torch.optim.AdamW(groups, lr=8e-4, betas=(0.95, 0.975), weight_decay=0.01)
    batches = magic.batches(len(train), size, epochs, seed=seed)
    top, last = max(1, len(batches) // 4), len(batches)

    def share(t: int) -> float:
        return (t + 1) / top if t < top else 1 - 0.9 * (t + 1 - top) / max(1, last - top)

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return magic.Run(model, optimizer, (train,), text.loss(), batches, rate, seed=seed, **options)


def gpt2_of_92m(vocabulary: int = 50_257, length: int = 512, seed: int = 0):
    """A GPT-2 of 92 million parameters with a random start, for TinyStories: Chen et al. 2026.

    arXiv 2609.15044 gives this number and no layout. Twelve layers of width 640 over GPT-2's own tokens have
    as many. In eval mode, so without dropout.
    """
    from ..show import needs

    transformers = needs("transformers", "text", "recipes.gpt2_of_92m needs")
    torch.manual_seed(seed)
    shape = {"n_layer": 12, "n_embd": 640, "n_head": 10, "n_positions": length}
    config = transformers.GPT2Config(vocab_size=vocabulary, **shape)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
