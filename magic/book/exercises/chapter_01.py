"""The exercises of chapter 01: randomness that is computed, and where two runs part."""

from __future__ import annotations

import math

import torch

from .judging import Cases, Wrong, exercise

P, UNITS, STEPS = 0.2, 10_000, 1000


@exercise("01.2", "a dropout whose mask is a function of the seed and the step alone")
def dropout(answer) -> None:
    cases = Cases({})
    x = torch.randn(UNITS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def dropped(seed: int, t: int) -> torch.Tensor:
        """The units that the answer drops in this step."""
        return cases.call(f"seed {seed}, step {t}", answer, x, P, seed, t) == 0

    first = _values(cases, cases.call("one step", answer, x, P, 3, 5), x)
    torch.rand(7)  # between two calls somebody else draws numbers
    again = dropped(3, 5)
    cases.true(
        "the same step, done again",
        torch.equal(first, again),
        "two calls with the same seed and step drop different units",
    )
    for name, seed, t in (
        ("another step", 3, 6),
        ("another seed", 4, 5),
        ("seed 5 in step 3 beside seed 3 in step 5", 5, 3),
        ("seed 4 in step 4 beside seed 3 in step 5", 4, 4),
    ):
        otherwise = "the same units are dropped. The mask has to depend on the seed and on the step"
        otherwise += ", and a sum or a product of the two is the same for other pairs" if seed > 3 else ""
        cases.true(name, not torch.equal(first, dropped(seed, t)), otherwise)
    before = torch.get_rng_state()
    answer(x.clone(), P, 3, 5)
    cases.true(
        "the rest of the program",
        torch.equal(before, torch.get_rng_state()),
        "your function changes torch's global generator, so whoever draws next draws other numbers. "
        "A torch.Generator of your own leaves it alone",
    )


def _values(cases: Cases, got, x: torch.Tensor) -> torch.Tensor:
    """Which units are dropped, after a look at what became of the others."""
    if not isinstance(got, torch.Tensor) or got.shape != x.shape:
        raise Wrong(f"asked for is a tensor of the shape of x, {tuple(x.shape)}.")
    dropped = got == 0
    share = dropped.double().mean().item()
    if abs(share - (1 - P)) < 0.05:
        raise Wrong(
            f"a share of {share:.2f} of the units is dropped: p = {P} is the share to drop, not to keep."
        )
    cases.true(
        "the share", abs(share - P) < 0.05, f"a share of {share:.2f} of the units is dropped, p is {P}"
    )
    want = torch.where(dropped, 0.0, x / (1 - P))
    unscaled, inverse = torch.where(dropped, 0.0, x), torch.where(dropped, 0.0, x / P)
    cases.same(
        "the units that stay",
        got,
        want,
        {
            "they are not divided by 1 − p, so the sum is too small on average": unscaled,
            "they are divided by p, and should be by 1 − p": inverse,
        },
    )
    return dropped


@exercise("01.4", "a search for the first step at which two runs differ")
def first_difference(answer) -> None:
    cases = Cases({})
    allowed = math.ceil(math.log2(STEPS)) + 2
    for case, parted in (
        ("runs that part in the middle", 437),
        ("runs that part in the first step", 1),
        ("runs that part in the last step", STEPS),
        ("runs that never part", None),
    ):
        looks: list[int] = []
        got = cases.call(case, answer, _same(parted, looks), STEPS)
        if parted is None:
            cases.true(case, got is None, f"asked for is None, and your function returned {got}")
            continue
        if got == parted - 1:
            raise Wrong(
                f"wrong for {case}: {got} is the last step at which they agree; asked for is the next."
            )
        cases.true(case, got == parted, f"they differ from step {parted} on, and you returned {got}")
        cases.true(
            f"few looks at {case}",
            len(looks) <= allowed,
            f"{len(looks)} pairs of states were compared. Halving the range takes {allowed} at most",
        )


def _same(parted: int | None, looks: list[int]):
    """same(t) of two runs that part at that step; it notes where it was asked."""

    def same(t: int) -> bool:
        if not 0 <= t <= STEPS:
            raise ValueError(f"there is no state {t}: the states are 0 to {STEPS}")
        looks.append(t)
        return parted is None or t < parted

    return same
