"""The rank that is needed, and what it grows with: the law of r*.

r* is the rank at which LoRA gives up just what is allowed. Each seed is a draw of what is new, and
has an r* in every cell: its gaps over the ranks tried are interpolated. So the exponents of a law
are fitted seed by seed, over the same cells, and their spread is that over draws. How well such a
law foretells a cell that it was not fitted to stands beside it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats
from scipy.interpolate import PchipInterpolator

from analysis.inference.estimate import Estimate
from analysis.inference.gates import MIN_SEEDS
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.regret import Gap


def rank_needed_by_seed(gaps: Mapping[int, Gap]) -> AtBest[float]:
    """Return log2 of r* by seed; infinite, with its sign, where r* lies outside the ranks tried.

    Args:
        gaps: of one cell at one number of updates, by rank.
    """
    ranks = sorted(gaps)
    over = [gaps[r].beyond_allowed for r in ranks]

    def read(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
        seeds = set.intersection(*(set(v) for v in values)) if values else set()
        return {
            s: crossing([*map(math.log2, ranks)], [v[s] for v in values]) for s in sorted(seeds)
        }

    likely = tuple(read(v) for v in zip(*(o.likely for o in over)))
    return AtBest(read([o.best for o in over]), likely)


def crossing(x: Sequence[float], y: Sequence[float]) -> float:
    """Return where y last falls to 0, by a monotone cubic between the points.

    Negative infinity if all of y lies below 0, infinity if the last of y lies above.
    """
    if not np.isfinite(y).all():
        return math.nan
    if y[-1] > 0:
        return math.inf
    if max(y) <= 0:
        return -math.inf
    # Fritsch and Butland (1984): no overshoot, so a crossing lies between the ranks around it.
    return float(PchipInterpolator(x, y).roots(extrapolate=False).max())


@dataclass(frozen=True)
class Point:
    """One cell: what may explain its r*, as log2 by name, and log2 r* by seed."""

    cell: str
    by: dict[str, float]
    needed: AtBest[float]

    @property
    def inside(self) -> bool:
        """Whether r* lies within the ranks tried, for every seed."""
        return bool(self.needed.best) and all(map(math.isfinite, self.needed.best.values()))


@dataclass(frozen=True)
class RankLaw:
    """log2 r* = constant + sum of exponent x log2 of what explains it."""

    exponents: dict[str, Estimate]
    cells: int
    rivals: dict[str, float | None] = field(default_factory=dict)
    """p-value of each rival's exponents, all together; below 0.05 it is out. None: not testable."""
    left_out: float | None = None
    """Root mean square error, in doublings, of the law at a cell that it was not fitted to."""


def rank_law(
    points: Sequence[Point], names: Sequence[str], rivals: Mapping[str, Mapping[str, float]]
) -> RankLaw | None:
    """Fit the exponents of `names` by least squares in each seed, over the cells with an r* inside.

    Rivals are tested together in all exponents by Hotelling's T^2 over seeds (Hotelling 1931), to
    which the error of the best rates, that all seeds share, adds.

    Args:
        rivals: exponents by name of law; what a law does not name has exponent 0.

    Returns:
        None if the cells do not tell the exponents apart.
    """
    inside = [p for p in points if p.inside]
    design = _design(inside, names)
    if len(inside) < len(names) + 1 or np.linalg.matrix_rank(design, tol=1e-6) < design.shape[1]:
        return None
    solve = np.linalg.pinv(design)[1:]
    seeds = sorted(set.intersection(*(set(p.needed.best) for p in inside)))
    if len(seeds) < MIN_SEEDS:
        return None
    values = [
        AtBest(
            _of_seeds([p.needed.best for p in inside], row, seeds),
            tuple(
                _of_seeds(drawn, row, seeds) for drawn in zip(*(p.needed.likely for p in inside))
            ),
        )
        for row in solve
    ]
    found = {name: over_seeds(v) for name, v in zip(names, values)}
    tests = {
        rival: _hotelling(values, [claim.get(n, 0.0) for n in names])
        for rival, claim in rivals.items()
    }
    return RankLaw(found, len(inside), tests, _left_out(inside, names, seeds))


def _design(points: Sequence[Point], names: Sequence[str]) -> np.ndarray:
    return np.array([[1.0, *(p.by[n] for n in names)] for p in points]).reshape(
        len(points), 1 + len(names)
    )


def _of_seeds(
    by_cell: Sequence[Mapping[int, float]], row: np.ndarray, seeds: Sequence[int]
) -> dict[int, float]:
    return {s: float(row @ [v[s] for v in by_cell]) for s in seeds if all(s in v for v in by_cell)}


def _hotelling(values: Sequence[AtBest[float]], claimed: Sequence[float]) -> float | None:
    """Return the p-value of a vector of means; None with too few seeds for so many exponents."""
    seeds = sorted(values[0].best)
    n, q = len(seeds), len(values)
    if n <= q:
        return None
    by_seed = np.array([[v.best[s] for s in seeds] for v in values])
    shifts = [
        [np.mean([drawn[s] - v.best[s] for s in drawn]) for drawn in v.likely] for v in values
    ]
    covariance = np.cov(by_seed).reshape(q, q) / n
    drawn = np.array(shifts)
    if drawn.size and (kept := np.isfinite(drawn).all(0)).sum() > q:
        covariance = covariance + np.cov(drawn[:, kept]).reshape(q, q)
    off = by_seed.mean(1) - np.asarray(claimed)
    t2 = float(off @ np.linalg.pinv(covariance) @ off)
    return float(stats.f.sf(t2 * (n - q) / (q * (n - 1)), q, n - q))


def _left_out(points: Sequence[Point], names: Sequence[str], seeds: Sequence[int]) -> float | None:
    """Return the error at each cell of the law fitted to the others; None without such a law."""
    y = np.array([np.mean([p.needed.best[s] for s in seeds]) for p in points])
    design, off = _design(points, names), []
    for k in range(len(points)):
        rest = np.arange(len(points)) != k
        if np.linalg.matrix_rank(design[rest], tol=1e-6) < design.shape[1]:
            return None
        off.append(y[k] - design[k] @ (np.linalg.pinv(design[rest]) @ y[rest]))
    return float(np.sqrt(np.mean(np.square(off))))


def change_of_needed(
    first: AtBest[float], last: AtBest[float], doublings: float
) -> AtBest[float] | None:
    """Return the change of log2 r* a doubling of the updates; None if r* is outside in a seed."""
    change = last.paired(first, lambda b, a: (b - a) / doublings)
    return change if change.best and all(map(math.isfinite, change.best.values())) else None


def sum_of(values: Sequence[AtBest[float]]) -> AtBest[float] | None:
    """Add values of the seeds that all have; None without any."""

    def add(a: float, b: float) -> float:
        return a + b

    return functools.reduce(lambda a, b: a.paired(b, add), values) if values else None
