"""Checkers of chapter 08, is the derivative useful: metasmoothness, the slope that kinks hide, the edge."""

from __future__ import annotations

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise


def _smoothness(ends: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The paper's number, from the parameters trained at w, w + hv and w + 2hv."""
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    return (first.abs() * first.sign() * second.sign()).sum() / first.abs().sum()


def _likely_smoothness(ends: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """What comes out of the usual mistakes."""
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    agreed = first.sign() * second.sign()
    return {
        "every parameter counts the same; each is to be weighed by how far it moved at first": agreed.mean(),
        "the second change is counted from the start, and not from where the first one ended": _smoothness(
            (ends[0], ends[1], ends[2] + ends[1] - ends[0])
        ),
        "the weights are those of the second change": (second.abs() * agreed).sum() / second.abs().sum(),
        "this is the share of the movement that goes on; what turns back has to be subtracted": (
            first.abs() * (agreed > 0)
        ).sum()
        / first.abs().sum(),
        "the sum is not divided by how far all parameters moved": (first.abs() * agreed).sum(),
        "this is a cosine; of the second change only the signs count": torch.cosine_similarity(
            first, second, dim=0
        ),
    }


@exercise("08.1", "the metasmoothness of three trainings' parameters")
def metasmoothness(answer) -> None:
    dice = torch.Generator().manual_seed(1)
    cases = Cases({})
    start, way = torch.randn(2, 7, generator=dice, dtype=torch.float64)
    straight = start, start + way, start + 2 * way
    noisy = tuple(torch.randn(3, 40, generator=dice, dtype=torch.float64))
    tail = torch.tensor([5.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    turned = torch.zeros(5, dtype=torch.float64), tail, tail + tail * torch.tensor([-0.5, 1, 1, 1, 1])
    for case, ends in (
        ("parameters on a straight line", straight),
        ("one large parameter that turns back", turned),
        ("random parameters", noisy),
    ):
        got = cases.call(case, answer, *ends)
        cases.same(case, got, _smoothness(ends), _likely_smoothness(ends))


def _kinked_slopes(rate: float, steps: int) -> Tensor:
    return torch.tensor([rate * steps / 2, (1 - (1 - rate) ** steps) / 2], dtype=torch.float64)


@exercise("08.2", "the slope that autograd finds in the kinked training, and the one across many kinks")
def two_slopes(answer) -> None:
    cases = Cases({})
    for rate, steps in ((0.1, 1), (0.1, 2), (0.1, 40), (0.03, 100)):
        cases.scalars = {"the rate": rate, "the number of steps": float(steps)}
        case = f"rate {rate:g} and {steps} step{'s' * (steps > 1)}"
        got = cases.call(case, answer, rate, steps)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Wrong(f"for {case}, return two numbers: autograd's slope, and that across many kinks.")
        told, true = _kinked_slopes(rate, steps)
        plain = torch.tensor(rate * steps, dtype=torch.float64)
        cases.same(
            f"{case}, autograd's slope",
            got[0],
            told,
            {
                "the weight enters the loss with a half": plain,
                "this is the slope across many kinks; for autograd the gradient is flat between two": true,
            },
        )
        cases.same(
            f"{case}, the slope across many kinks",
            got[1],
            true,
            {
                "this is autograd's slope once more: each step also moves θ back by rate·θ": told,
                "the weight enters the loss with a half": 2 * true,
                "the training has not come to its end, θ = w/2": torch.full_like(true, 0.5),
                "one step too many": _kinked_slopes(rate, steps + 1)[1],
                "one step too few": _kinked_slopes(rate, steps - 1)[1],
            },
        )


def _edge(curvature: float, momentum: float) -> float:
    """By bisection: the largest rate at which the step's matrix has no eigenvalue outside the unit circle."""
    low, high = 0.0, 8 / curvature
    for _ in range(60):
        rate = (low + high) / 2
        step = torch.tensor(
            [[1 - rate * curvature, -rate * momentum], [curvature, momentum]], dtype=torch.float64
        )
        inside = torch.linalg.eigvals(step).abs().max() <= 1 + 1e-9
        low, high = (rate, high) if inside else (low, rate)
    return low


@exercise("08.3", "the largest rate at which momentum still settles in a parabola")
def edge(answer) -> None:
    cases = Cases({}, tolerance=1e-4)
    for curvature, momentum in ((1.0, 0.0), (4.0, 0.0), (4.0, 0.5), (0.7, 0.9)):
        cases.scalars = {"the curvature": curvature}
        case = f"curvature {curvature:g} and momentum {momentum:g}"
        got = cases.call(case, answer, curvature, momentum)
        want = torch.tensor(_edge(curvature, momentum), dtype=torch.float64)
        plain = torch.tensor(2 / curvature, dtype=torch.float64)
        cases.same(
            case,
            got,
            want,
            {
                "this is the edge without momentum": plain,
                "momentum makes the step longer in the end, but the edge moves up, not down": plain
                * (1 - momentum),
                "this is the edge of the effective rate, rate/(1 − momentum)": want / (1 - momentum),
                "above rate = 1/curvature θ only overshoots; it still settles": plain / 2,
            },
        )
