"""The effect of the batch size on rho, apart from that of the number of updates.

For each rank, ln rho = f(updates) + b log2(batch) over the prefixes of all runs. f is free: one
value at each number of updates. So b compares batches after equally many updates only, and a rho
that falls along the learning curve is no batch effect, however unequal the runs' lengths are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.regret import Gap, gaps_of
from analysis.measures.speed import curves_at_best, log_rho
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import at_step, by_run, on_curve_rows
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import CURVE_KEYS

EARLIEST = 8
"""Updates of the shortest prefix. Before, adapters that start at zero have hardly left it."""


@dataclass(frozen=True)
class Prefix:
    """One batch size and rank after one number of updates, each method at its optimal LR for it."""

    batch: int
    steps: int
    rank: int
    lora: Optimum
    full: Optimum
    logs: AtBest[float]
    """ln(rho) by seed; infinite where only a bound is known."""

    @property
    def bound(self) -> bool:
        """Whether any seed has only a bound: one method is there at its first evaluation."""
        return not all(map(math.isfinite, self.logs.best.values()))

    @property
    def rho(self) -> Estimate:
        """rho over the seeds; without a value where only a bound is known."""
        return Estimate(None) if self.bound else exp_of(over_seeds(self.logs))


def prefixes_of(table: pd.DataFrame) -> list[Prefix]:
    """Measure rho after every number of updates that two batch sizes were evaluated at.

    Runs of one batch may have several lengths: all that are long enough give the optimum.

    Raises:
        TableError: a schedule is not constant, so that runs have no prefixes.
    """
    table = on_curve_rows(table.reset_index(drop=True))
    found = []
    batches: dict[int, set[int]] = {}  # by number of updates
    for run, curve in by_run(table).items():
        if table.at[run, "status"] == "done":
            for step in curve["step"]:
                batches.setdefault(int(step), set()).add(int(table.at[run, "batch_size"]))
    for step in sorted(s for s, b in batches.items() if s >= EARLIEST and len(b) > 1):
        part = _after(table, step)
        # Draws of the optimum depend on a curve's place in the list: small batches, which are seen
        # longest, come first, so that a curve's draws at all lengths are in the same order.
        optima = sorted(fit_all(lr_curves(part)), key=lambda o: o.curve.key["batch_size"])
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = {o.curve.group: o for o in optima if o.curve.key["method"] == "fullft"}
        for o in optima:
            if o.curve.key["method"] == "lora" and (other := full.get(o.curve.group)):
                logs = log_rho(points[id(o)], points[id(other)])
                key = o.curve.key
                found.append(Prefix(int(key["batch_size"]), step, int(key["rank"]), o, other, logs))
    return sorted(found, key=lambda p: (p.rank, p.batch, p.steps))


def _after(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Cut all runs after a number of updates; of equal beginnings one is kept."""
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    return at_step(table, step).drop_duplicates(keys).reset_index(drop=True)


def effect(prefixes: Sequence[Prefix]) -> AtBest[float]:
    """Return b, the change of ln(rho) per doubling of the batch, by seed.

    Least squares with a value of its own for each number of updates (fixed effects): deviations
    from the mean at that number, of ln(rho) and of log2(batch). One b for each seed, since the
    prefixes of one run are anything but independent.

    Args:
        prefixes: of one rank.
    """
    batches = np.log2([p.batch for p in prefixes])
    steps = [p.steps for p in prefixes]

    def slopes(by_prefix: Sequence[dict[int, float]]) -> dict[int, float]:
        found = {
            seed: within(steps, batches, np.array([v.get(seed, math.nan) for v in by_prefix]))
            for seed in sorted(set().union(*by_prefix))
        }
        return {seed: b for seed, b in found.items() if b is not None}

    n = max((len(p.logs.draws) for p in prefixes), default=0)
    draws = [[p.logs.draws[k] if p.logs.draws else p.logs.best for p in prefixes] for k in range(n)]
    return AtBest(slopes([p.logs.best for p in prefixes]), tuple(map(slopes, draws)))


def within(groups: Sequence[int], x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the slope of y over x within groups; None if no group has two values of x.

    Args:
        y: missing values are NaN, and infinite ones count as missing.
    """
    kept = np.isfinite(y)
    group = np.unique(np.asarray(groups)[kept], return_inverse=True)[1]
    sizes = np.bincount(group)
    dx, dy = (v[kept] - (np.bincount(group, v[kept]) / sizes)[group] for v in (x, y))
    spread = float(dx @ dx)
    return float(dx @ dy) / spread if spread > 1e-9 else None


def difference(high: Sequence[Prefix], low: Sequence[Prefix]) -> Estimate:
    """Return b of one rank minus that of another, paired by seed, where both were measured."""
    both = {(p.batch, p.steps) for p in high} & {(p.batch, p.steps) for p in low}
    shared = ([p for p in part if (p.batch, p.steps) in both] for part in (high, low))
    one, other = map(effect, shared)
    return over_seeds(one.minus(other))


def gaps_at_equal_examples(table: pd.DataFrame) -> tuple[int, dict[int, list[Gap]]]:
    """Compare every rank with full fine-tuning in nats after equally many examples.

    Returns:
        The number of examples: the most that every batch has seen. By batch, the gap of each rank;
        a batch that was not evaluated after so many is missing.
    """
    table = on_curve_rows(table.reset_index(drop=True))
    longest = table.groupby("batch_size")["steps"].max()
    examples = int((longest * longest.index).min())
    parts = {}
    for batch in longest.index:
        part = table[table["batch_size"] == batch].reset_index(drop=True)
        if examples % batch == 0 and len(part := _after(part, examples // int(batch))):
            parts[int(batch)] = part
    optima = fit_all(lr_curves(pd.concat(parts.values(), ignore_index=True))) if parts else []
    of_batch = {b: [o for o in optima if o.curve.key["batch_size"] == b] for b in parts}
    return examples, {b: gaps_of(part, of_batch[b]) for b, part in parts.items()}
