"""Small networks built to be smooth in the data weights.

A derivative predicts well when training is smooth (Engstrom et al. 2025, section 4): GELU instead of
ReLU, normalisation before the activation, average instead of max pooling, a scaled-down output.
No bias stands in front of a normalisation: its gradient would be rounding noise, which Adam divides
by itself. Their training is smoothest at a rate that rises and then falls to zero: `triangle`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def triangle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler: the optimizer's rate is reached after a quarter of the steps, then falls to zero."""

    def share(t: int) -> float:
        return min((t + 1) / (0.25 * steps), (steps - t) / (0.75 * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


class MLP(nn.Sequential):
    """Linear layers with GELU between them; images are flattened. `sizes` is input, hidden …, output."""

    def __init__(self, sizes: tuple[int, ...] = (64, 128, 10)):
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(inputs, outputs)]
            layers += [nn.GELU()] if i < len(sizes) - 2 else []
        super().__init__(*layers)


def normalisation(kind: str, channels: int) -> nn.Module:
    """A "batch" or "group" normalisation layer; groups of 8 channels, or one group of fewer."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(max(1, channels // 8), channels)
    raise ValueError(f'norm={kind!r}: choose "group" or "batch"')


def conv(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    """3×3 convolution without bias, normalisation, GELU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), normalisation(norm, outputs), nn.GELU()
    )


class ConvNet(nn.Module):
    """Two convolutions with 2×2 average pooling, then linear: (B, channels, size, size) -> (B, classes).

    Pooling with a fixed window: the adaptive one has no deterministic derivative on CUDA.
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, width: int = 32, size: int = 14, norm: str = "group"
    ):
        super().__init__()
        self.features = nn.Sequential(
            conv(channels, width, norm), nn.AvgPool2d(2), conv(width, 2 * width, norm), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(2 * width * (size // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Residual(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ResNet9(nn.Module):
    """The papers' vision model: (B, channels, H, W) -> (B, classes), H and W at least 8.

    Nine weight layers after Page 2018 ("How to train your ResNet"). Normalisation stands before each
    activation, pooling averages, and the output is scaled down, as metasmoothness asks. `width` is
    the first layer's channels, and `top` times that the last layers'; the papers' sizes are 64 and 4 there.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        width: int = 64,
        norm: str = "batch",
        scale: float = 0.125,
        top: int = 4,
    ):
        super().__init__()
        w, last, pool = width, top * width, nn.AvgPool2d(2)
        self.features = nn.Sequential(
            conv(channels, w, norm),
            conv(w, 2 * w, norm),
            pool,
            Residual(nn.Sequential(conv(2 * w, 2 * w, norm), conv(2 * w, 2 * w, norm))),
            conv(2 * w, 4 * w, norm),
            pool,
            conv(4 * w, last, norm),
            pool,
            Residual(nn.Sequential(conv(last, last, norm), conv(last, last, norm))),
        )
        self.head = nn.Linear(last, classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.features(x).mean((2, 3)))


class Block(nn.Module):
    """Attention to the tokens before, then a two-layer network, each added to what it reads, normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.gather = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attend(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.gather(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.network(self.before_network(x))


class Transformer(nn.Module):
    """A small language model: tokens (B, L) -> logits of the next token (B, L, vocabulary).

    Vaswani et al. 2017, with the normalisation first (Xiong et al. 2020) and learned positions.
    """

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 2, heads: int = 4, length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))
