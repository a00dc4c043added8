"""Test whether ranks learn equally at first, against the spread over random draws of A.

All ranks train at one rate, each from at least two draws of A. Ranks differ once they are further
apart than two draws of A at the same rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, from_draws
from analysis.inference.seeds import from_sample
from analysis.inference.spread import Spread
from analysis.runs.learning_curves import by_run, same_rows

RESAMPLES = 2000
Draws = dict[int, dict[int, np.ndarray]]
"""Losses by rank and seed: [draws of A, steps]."""


@dataclass(frozen=True)
class Apart:
    """One rank compared with the highest."""

    rank: int
    difference: np.ndarray
    """Its mean loss minus the highest rank's, in nats, by step."""
    band: np.ndarray
    """Half width of the 95% band of the difference of two runs over draws of A, by step."""
    leaves: float
    """The step at which the difference leaves the band; infinite if never."""


@dataclass(frozen=True)
class Start:
    """How long the ranks learn equally."""

    lr: float
    top: int
    """The highest rank, with which the others are compared."""
    steps: list[float]
    ranks: list[Apart]
    first: Estimate
    """The step at which the first rank leaves its band."""
    growth: Estimate
    """Change of the lowest rank's difference per doubling of the updates, in nats; over seeds."""


def start_of(table: pd.DataFrame, top: int) -> Start | None:
    """Compare ranks with the highest one, at the rate that was run with more than one draw of A.

    None if fewer than two ranks have more than one draw.
    """
    part = table[table["method"] == "lora"]
    rates = part.loc[part["init_seed"].fillna(0) > 0, "lr"].unique()
    found: dict[int, dict[int, list[dict[float, float]]]] = {}
    for run, points in by_run(part[part["lr"].isin(rates)]).items():
        rank, seed = int(part.at[run, "rank"]), int(part.at[run, "seed"])
        found.setdefault(rank, {}).setdefault(seed, []).append(dict(same_rows(points)))
    again = {
        r: {s: draws for s, draws in seeds.items() if len(draws) > 1} for r, seeds in found.items()
    }
    again = {r: seeds for r, seeds in again.items() if seeds}
    if top not in again or len(again) < 2:
        return None
    curves = [c for seeds in again.values() for draws in seeds.values() for c in draws]
    steps = sorted(set.intersection(*map(set, curves)))
    drawn = {
        r: {s: np.array([[c[t] for t in steps] for c in draws]) for s, draws in seeds.items()}
        for r, seeds in again.items()
    }
    spread = {
        r: np.mean([np.var(c, 0, ddof=1) for c in seeds.values()], 0) for r, seeds in drawn.items()
    }
    band = {r: 1.96 * np.sqrt(spread[r] + spread[top]) for r in drawn}
    ranks = [_apart(r, drawn, band[r], top, steps) for r in sorted(drawn.keys() - {top})]
    first, growth = (
        _first_to_leave(drawn, band, steps),
        _growth(drawn[min(drawn)], drawn[top], steps),
    )
    return Start(float(rates[0]), top, steps, ranks, first, growth)


def _apart(rank: int, drawn: Draws, band: np.ndarray, top: int, steps: Sequence[float]) -> Apart:
    both = sorted(drawn[rank].keys() & drawn[top].keys())
    apart = np.mean([drawn[rank][s].mean(0) - drawn[top][s].mean(0) for s in both], 0)
    return Apart(rank, apart, band, _leaves(apart, band, steps))


def _growth(
    low: dict[int, np.ndarray], high: dict[int, np.ndarray], steps: Sequence[float]
) -> Estimate:
    """Return the slope of low's loss minus high's over log2(step): least squares, by seed."""
    x = np.log2(steps) - np.mean(np.log2(steps))
    both = sorted(low.keys() & high.keys())
    return from_sample([float(x @ (low[s].mean(0) - high[s].mean(0)) / (x @ x)) for s in both])


def _leaves(apart: np.ndarray, band: np.ndarray, steps: Sequence[float]) -> float:
    """Return the first step at which two evaluations in a row lie outside the band.

    The last evaluation counts alone. Infinite if there is none.
    """
    out = np.abs(apart) > band
    twice = [i for i in range(len(steps)) if out[i] and (i + 1 == len(steps) or out[i + 1])]
    return steps[twice[0]] if twice else math.inf


def _first_to_leave(drawn: Draws, band: dict[int, np.ndarray], steps: Sequence[float]) -> Estimate:
    """Return the step at which the first rank leaves its band.

    The interval is from a bootstrap over seeds and, within them, draws of A. A rank that never
    leaves counts as twice the last step.
    """
    top, rng = max(drawn), np.random.default_rng(20251126)
    seeds = sorted(set.intersection(*(set(v) for v in drawn.values())))
    found = []
    for _ in range(RESAMPLES):
        mine = rng.choice(seeds, len(seeds))
        mean = {
            r: np.mean([c[s][rng.integers(0, len(c[s]), len(c[s]))].mean(0) for s in mine], 0)
            for r, c in drawn.items()
        }
        found.append(min(_leaves(mean[r] - mean[top], band[r], steps) for r in drawn if r != top))
    n = sum(len(draws) for by_seed in drawn.values() for draws in by_seed.values())
    spread = Spread(len(seeds), "seeds with other draws of A")  # draws of one seed share batches
    return from_draws(np.minimum(np.array(found), 2.0 * steps[-1]), n, spread=spread)
