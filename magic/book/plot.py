"""The figures of the book: one style, one colour-blind-safe palette (seaborn's "colorblind")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..show import needs

HELPFUL, HARMFUL, NEUTRAL = "#0173b2", "#de8f05", "#949494"  # blue, orange, grey


def _libraries():
    """Pyplot and seaborn, which brings it."""
    sns = needs("seaborn", "notebooks", "figures need")
    return needs("matplotlib.pyplot", "notebooks", "figures need"), sns


def style() -> None:
    """The book's style: white ground, light grid, the colour-blind palette, text that can be read."""
    plt, sns = _libraries()
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=1.0)
    plt.rcParams.update(
        {"figure.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": "medium"}
    )


def images(pictures: Tensor, titles: Sequence[str], columns: int = 6, colors: Sequence[str] | None = None):
    """A grid of images (n, C, H, W), each with its title; returns the figure."""
    plt, _ = _libraries()
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, 1.7 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    colors = colors or ["black"] * len(pictures)
    for ax, picture, title, color in zip(axes.flat, pictures.detach().cpu(), titles, colors, strict=False):
        low, high = picture.min(), picture.max()
        picture = ((picture - low) / (high - low + 1e-12)).permute(1, 2, 0).squeeze(-1)
        ax.imshow(picture, cmap="gray_r" if picture.dim() == 2 else None, interpolation="nearest")
        ax.set_title(title, fontsize=8, color=color)
    return figure


def chain(ax=None):
    """A run of T steps as a chain of states, and the cotangent's way back; returns the axes."""
    plt, _ = _libraries()
    if ax is None:
        _, ax = plt.subplots(figsize=(7.4, 2.4))
    ax.set(xlim=(-0.4, 6.4), ylim=(-1.25, 1.15))
    ax.axis("off")

    def arrow(start: tuple, end: tuple, color: str, bend: float = 0.0) -> None:
        shape = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops={**shape, "color": color, "linewidth": 1.4})

    for k, name in enumerate(["s_0", r"\cdots", "s_t", "s_{t+1}", r"\cdots", "s_T", r"\varphi"]):
        ax.text(k, 0, f"${name}$", ha="center", va="center", fontsize=15)
        if k:
            arrow((k - 0.72, 0), (k - 0.3, 0), NEUTRAL)
            arrow((k - 0.12, 0.24), (k - 0.88, 0.24), HARMFUL, bend=0.35)
        if 0 < k < 6:
            arrow((k - 0.42, -0.78), (k - 0.42, -0.12), NEUTRAL)
            arrow((k - 0.58, -0.12), (k - 0.58, -0.78), HARMFUL)
            ax.text(k - 0.5, -1.02, "$w$", ha="center", va="center", fontsize=14)
    for k, name in {2: r"\Delta_t", 3: r"\Delta_{t+1}", 5: r"\Delta_T"}.items():
        ax.text(k, 0.52, f"${name}$", ha="center", color=HARMFUL, fontsize=13)
    ax.text(-0.35, -1.02, "weights", ha="left", va="center", fontsize=10)
    ax.text(-0.35, 0.72, "the way back", ha="left", color=HARMFUL, fontsize=10)
    return ax


def predicted_against_true(result, ax=None, targets: int | None = 1):
    """Predicted against true change of the measured outputs, a dot per retrained model; returns the axes.

    `result` is what `magic.lds` returns; `targets` limits the dots to the first so many outputs. Where they
    are several, each output's changes are divided by the standard deviation of its true ones, since one
    output that changes much would leave the others no room.
    """
    plt, sns = _libraries()
    if ax is None:
        _, ax = plt.subplots(figsize=(4.4, 4.2))
    predicted = (result.predicted - result.baseline)[:, :targets]
    true = (result.true - result.baseline)[:, :targets]
    several = true.shape[1] > 1
    unit = true.std(0) if several else torch.ones(1)
    predicted, true = predicted / unit, true / unit
    low, high = (f(torch.cat([predicted, true])).item() for f in (torch.min, torch.max))
    margin = 0.06 * (high - low)
    ends = [low - margin, high + margin]
    ax.plot(ends, ends, color=NEUTRAL, linewidth=1, zorder=1)
    look = {"s": 18, "alpha": 0.7, "linewidth": 0} if several else {"s": 32}
    sns.scatterplot(
        x=predicted.flatten().numpy(), y=true.flatten().numpy(), ax=ax, color=HELPFUL, zorder=2, **look
    )
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel="predicted change", ylabel="true change, retrained")
    if several:
        ax.set(xlabel="predicted change / its output's σ", ylabel="true change, retrained / σ")
    ax.locator_params(nbins=5)
    title = f"{len(true)} {result.what}, {result.true.shape[1]} outputs"
    ax.set_title(f"{title}\nLDS {result.spearman}, slope {result.slope:.2f}")
    return ax


def cotangent_sizes(health, targets: int | Sequence[int] | None = None, ax=None):
    """‖∂φ_k/∂params_t‖ along the run, a line for each target; returns the axes.

    `health` is `Attribution.health`; `targets` are those to show, None for all. Orange are those that
    range over so many powers of ten that `health` speaks against them.
    """
    plt, _ = _libraries()
    steps = [t for t, _ in health.sizes]
    if not steps:
        raise ValueError("no cotangent was measured: the replay went back through no step")
    count = len(health.decades)
    chosen = range(count) if targets is None else [targets] if isinstance(targets, int) else targets
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 3.2))
    for k in chosen:
        if not 0 <= k < count:
            raise ValueError(f"targets={targets!r}: there are {count} targets, 0 … {count - 1}")
        color = HARMFUL if k in health.wide else HELPFUL
        ax.plot(steps, [row[k] for _, row in health.sizes], color=color, linewidth=1.2, alpha=0.8)
    ax.set(yscale="log", xlim=(0, health.steps), xlabel="training step t", ylabel="‖∂φ/∂params‖ at s_t")
    ranges = [health.decades[k] for k in chosen]
    told = f"{len(ranges)} target{'s' * (len(ranges) > 1)}"
    ax.set_title(f"{told}; the widest ranges over {max(ranges):.1f} powers of ten")
    return ax
