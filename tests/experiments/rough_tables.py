"""The tables of `tests.experiments.rough`, from what it has measured.

`python -m tests.experiments.rough_tables` writes them. It also prints how the forecast of
`magic.evidence.forecast` is fitted on every other recipe, and how well it does on those between: the rank
correlation of expected and true LDS, and how many of the intervals hold the truth. Fitted are recipes on the
digits only; those on clothing are held out always.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV

from magic import Figure, subsets
from magic.evidence.comparison import Comparison, spearman
from tests.experiments import kept, rough

BANKS = Path(__file__).parents[2] / "notebooks" / "banks"
RECIPES = BANKS / "12_how_far_does_a_tangent_reach_recipes.csv"
RESCUES = BANKS / "12_how_far_does_a_tangent_reach_rescues.csv"
MANY = BANKS / "12_how_far_does_a_tangent_reach_many.csv"
SETTING = {
    "targets": rough.TARGETS, "sets": rough.SETS, "drop": rough.DROP, **kept.provenance(),
    "threads": 1,
}  # fmt: skip
FEATURES = ["agreement", "jaggedness", "centre agrees", "metasmoothness", "decades", "moves"]
Cell = dict[str, np.ndarray]


def cells() -> dict[tuple[str, int], Cell]:
    """(recipe, start) -> what was measured."""
    every = ((name, start) for name in rough.RECIPES for start in range(rough.STARTS))
    there = [(name, start) for name, start in every if rough.place(name, start).exists()]
    return {key: dict(np.load(rough.place(*key))) for key in there}


def directions(values: np.ndarray) -> np.ndarray:
    """Each row freed of its mean, and divided by its length."""
    values = values - values.mean(-1, keepdims=True)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis, the means taken off."""
    return (directions(a) * directions(b)).sum(-1)


def judged(found: Cell, values: np.ndarray) -> Figure:
    """The LDS of (K, n) values over the random sets."""
    sets = subsets.random(values.shape[1], rough.DROP, rough.SETS, seed=0).double().numpy()
    told = torch.from_numpy(found["base"] + (sets - 1) @ values.T)
    return Comparison(told, torch.from_numpy(found["true"]), torch.from_numpy(found["base"])).spearman


def features(found: Cell) -> dict[str, float]:
    """What can be told before any set is judged; jaggedness by the mean over targets of its log(1 + x)."""
    values, noise = found["w = 1"], found["near"] - 1
    moved = noise @ values.T
    missed = found["near_true"] - found["base"] - moved
    return {
        "agreement": cosine(values[None], found["sets"]).mean(),
        "jaggedness": np.expm1(np.log1p((missed**2).mean(0) / (moved**2).mean(0)).mean()),
        "centre agrees": cosine(values, found["centre"]).mean(),
        "metasmoothness": found["metasmoothness"].mean(),
        "decades": found["decades"].max(),
        "moves": found["moves"].max(),
    }


def recipe_row(name: str, start: int, found: Cell) -> dict:
    lds, told = judged(found, found["w = 1"]), features(found)
    again = np.nanmean(spearman(found["true"][: rough.AGAIN], found["again"]))
    knob = next(knob for knob, names in rough.KNOBS.items() if name in names)
    return {
        "knob": knob, "recipe": name, "start": start, "accuracy": round(float(found["accuracy"]), 4),
        "lds": round(lds.mean, 4), "low": round(lds.low, 4), "high": round(lds.high, 4),
        "again": round(float(again), 4), **{name: f"{told[name]:.4g}" for name in FEATURES},
        "n": found["w = 1"].shape[1], **SETTING,
    }  # fmt: skip


def corrected(found: Cell, values: np.ndarray) -> np.ndarray:
    """(K, n): scaled values, and a ridge on what they leave of the retrainings without other sets."""
    weights = subsets.random(values.shape[1], rough.DROP, rough.FITTED, seed=5).double().numpy()
    moved, true, mended = weights - 1, found["fitted"] - found["base"], []
    for own, outcome in zip(values, true.T, strict=True):
        told = moved @ own
        scale = told @ outcome / max(told @ told, 1e-300)
        ridge = RidgeCV(alphas=np.logspace(-1, 7, 25)).fit(moved, outcome - scale * told)
        mended.append(scale * own + ridge.coef_)
    return np.stack(mended)


def rescues(name: str, start: int, every: dict[tuple[str, int], Cell]):
    """Yield (rescue, values, plain trainings that it takes) for a recipe in which they were tried."""
    found = every[name, start]
    cost = {key.removeprefix("time "): float(x) for key, x in found.items() if key.startswith("time ")}
    plain = cost["plain"]
    for rescue in ("w = 1", "centre", "last half", "last quarter", "smooth neighbour"):
        yield rescue, found[rescue], cost[rescue] / plain
    for rescue, of in (("mean of 3 sets", "sets"), ("mean of 3 jitters", "jitters")):
        yield rescue, found[of].mean(0), cost[of] / plain
    starts = [every[name, s]["w = 1"] for s in range(rough.STARTS) if (name, s) in every]
    if len(starts) == rough.STARTS:
        yield "mean of 3 starts", np.mean(starts, axis=0), rough.STARTS * cost["w = 1"] / plain
    both = [directions(found[one]) for one in ("last half", "smooth neighbour")]
    price = (cost["last half"] + cost["smooth neighbour"]) / plain
    yield "last half and neighbour, directions", np.mean(both, axis=0), price
    yield "w = 1, corrected", corrected(found, found["w = 1"]), cost["w = 1"] / plain + rough.FITTED
    yield "retrainings alone", corrected(found, 0 * found["w = 1"]), float(rough.FITTED)


def rescue_rows(name: str, start: int, every: dict[tuple[str, int], Cell]) -> list[dict]:
    rows = []
    for rescue, values, cost in rescues(name, start, every):
        lds = judged(every[name, start], values)
        rows.append(
            {
                "recipe": name, "start": start, "rescue": rescue, "lds": round(lds.mean, 4),
                "low": round(lds.low, 4), "high": round(lds.high, 4), "trainings": round(cost, 1),
                "n": values.shape[1], **SETTING,
            }
        )  # fmt: skip
    return rows


def many_rows(name: str, found: Cell) -> list[dict]:
    """The LDS of means over M of the 32 sets, of scores and of directions; each is the mean of 32 / M."""
    values = np.load(rough.place(name, "many"))["sets"].astype(float)
    units = directions(values)
    count = len(units)
    pairs = ((units.sum(0) ** 2).sum(-1) - count) / (count * (count - 1))
    rows = []
    for m in (1, 2, 4, 8, 16, 32):
        plain, alike = (
            np.mean([judged(found, x[i : i + m].mean(0)) for i in range(0, count, m)], axis=0)
            for x in (values, units)
        )
        rows.append(
            {
                "recipe": name, "replays": m, "scores": round(plain[0], 4), "directions": round(alike[0], 4),
                "low": round(alike[1], 4), "high": round(alike[2], 4),
                "agreement of two": round(float(pairs.mean()), 4), "n": values.shape[-1], **SETTING,
            }
        )  # fmt: skip
    return rows


def fit(rows: list[dict]) -> tuple[np.ndarray, float]:
    """(offset, slope, jagged) of atanh LDS by least squares, and the standard deviation about it."""
    x, y = design(rows), np.arctanh(np.clip([row["lds"] for row in rows], -0.9999, 0.9999))
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return coefficients, float(np.sqrt(((y - x @ coefficients) ** 2).sum() / (len(y) - x.shape[1])))


def design(rows: list[dict]) -> np.ndarray:
    agreed = np.clip([float(row["agreement"]) for row in rows], -0.9999, 0.9999)
    jagged = np.log10(1 + np.array([float(row["jaggedness"]) for row in rows]))
    return np.column_stack([np.ones(len(rows)), np.arctanh(agreed), jagged])


def verdict(rows: list[dict]) -> None:
    """Fit on every other recipe on the digits, judge on those between; then fit on all, judge on clothing."""
    elsewhere = [row for row in rows if "clothing" in row["recipe"]]
    rows = [row for row in rows if row not in elsewhere]
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    mine = [row for row in rows if names.index(row["recipe"]) % 2 == 0]
    held = [row for row in rows if names.index(row["recipe"]) % 2 == 1]
    coefficients, spread = fit(mine)
    told, true = design(held) @ coefficients, np.array([row["lds"] for row in held])
    inside = np.abs(np.arctanh(np.clip(true, -0.9999, 0.9999)) - told) <= 1.96 * spread
    print(f"fitted on {len(mine)}: {coefficients.round(3)}, {spread:.3f}; judged on {len(held)}")
    print(f"rank correlation {spearman(told[:, None], true[:, None])[0]:.3f}, inside {inside.mean():.2f}")
    for name in FEATURES:
        alone = np.array([[float(row[name])] for row in held])
        print(f"  {name}: {spearman(alone, true[:, None])[0]:.3f}")
    coefficients, spread = fit(rows)
    print(f"fitted on all {len(rows)}: {coefficients.round(3)}, {spread:.3f}")
    for row, told in zip(elsewhere, design(elsewhere) @ coefficients, strict=True):
        low, mean, high = np.tanh(told + 1.96 * spread * np.array([-1, 0, 1]))
        print(f"  {row['recipe']} {row['start']}: {mean:.2f} [{low:.2f}, {high:.2f}], true {row['lds']:.2f}")


def main() -> None:
    every = cells()
    rows = [recipe_row(*key, found) for key, found in every.items()]
    kept.write(RECIPES, list(rows[0]), rows)
    rescued = [row for key, found in every.items() if "fitted" in found for row in rescue_rows(*key, every)]
    kept.write(RESCUES, list(rescued[0]), rescued)
    many = [row for name in rough.ROUGHEST for row in many_rows(name, every[name, 0])]
    kept.write(MANY, list(many[0]), many)
    verdict(rows)


if __name__ == "__main__":
    main()
