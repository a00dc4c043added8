"""Measure the effect of the batch size on rho after equally many updates, or examples.

A prefix is a run that was cut after some number of updates. For each rank, ln rho = f(updates) + b
log2(batch) is fitted to all prefixes, with one free value of f for each number of updates. So b
compares batch sizes only after equally many updates. After these a larger batch has seen more
examples; f(examples) in place of f(updates) compares them after equally many examples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.regret import Gap, gaps_of
from analysis.measures.speed import curves_at_best, log_rho
from analysis.optimum.fit import Optimum, fit_all
from analysis.runs.learning_curves import at_step, by_run, on_curve_rows
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import CURVE_KEYS

EARLIEST = 8
"""Fewest updates of a prefix. Before, an adapter that starts at zero has hardly changed."""


class Prefix(NamedTuple):
    """rho at one batch size, number of updates and rank; each method is at its optimal LR there."""

    batch: int
    steps: int
    rank: int
    lora: Optimum
    full: Optimum
    logs: AtBest[float]
    """ln(rho) by seed; infinite if only a bound of it is known."""

    @property
    def bound(self) -> bool:
        """Whether rho of any seed is only a bound."""
        return not all(map(math.isfinite, self.logs.best.values()))

    @property
    def rho(self) -> Estimate:
        """rho averaged over seeds; no value if `bound`."""
        return Estimate(None) if self.bound else exp_of(over_seeds(self.logs))


def prefixes_of(table: pd.DataFrame, examples: bool = False) -> list[Prefix]:
    """Measure rho after every number of updates at which two or more batch sizes were evaluated.

    With `examples`, after every such number of examples. Runs of one batch size may differ in
    length: all that are long enough are fitted.

    Raises TableError: an LR schedule is not constant, so that a run cannot be cut to a shorter one.
    """
    table = on_curve_rows(table.reset_index(drop=True))
    found = []
    seen: dict[int, dict[int, int]] = {}  # number of updates or examples -> batch size -> updates
    for run, curve in by_run(table[table["status"] == "done"]).items():
        batch = int(table.at[run, "batch_size"])
        for step in (int(s) for s in curve["step"] if s >= EARLIEST):
            seen.setdefault(step * batch if examples else step, {})[batch] = step
    for _, steps in sorted((n, of_batch) for n, of_batch in seen.items() if len(of_batch) > 1):
        parts = [_cut(table[table["batch_size"] == b], step) for b, step in steps.items()]
        part = pd.concat(parts, ignore_index=True)
        # The order of a curve's draws depends on its index in the list. Small batches come first:
        # they have the most updates, so a curve keeps its index at all numbers of updates.
        optima = sorted(fit_all(lr_curves(part)), key=lambda o: o.curve.key["batch_size"])
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = {o.curve.group: o for o in optima if o.curve.is_full}
        for o in optima:
            if o.curve.key["method"] == "lora" and (other := full.get(o.curve.group)):
                logs = log_rho(points[id(o)], points[id(other)])
                batch = int(o.curve.key["batch_size"])
                found.append(Prefix(batch, steps[batch], int(o.curve.key["rank"]), o, other, logs))
    return sorted(found, key=lambda p: (p.rank, p.batch, p.steps))


def _cut(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Cut all runs after `step` updates; of runs that differ only in length, keep one."""
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    return at_step(table, step).drop_duplicates(keys).reset_index(drop=True)


def effect(prefixes: Sequence[Prefix], examples: bool = False) -> AtBest[float]:
    """Fit b, the change of ln(rho) per doubling of the batch size, to each seed's prefixes.

    All prefixes have one rank. The fit is least squares with fixed effects of the number of
    updates, or of examples. Each seed has its own fit, since the prefixes of one run are not
    independent.
    """
    batches = np.log2([p.batch for p in prefixes])
    steps = [p.steps * p.batch if examples else p.steps for p in prefixes]

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
    """Return the slope of y over x within groups; None if no group has two x with a finite y."""
    kept = np.isfinite(y)
    group = np.unique(np.asarray(groups)[kept], return_inverse=True)[1]
    sizes = np.bincount(group)
    dx, dy = (v[kept] - (np.bincount(group, v[kept]) / sizes)[group] for v in (x, y))
    spread = float(dx @ dx)
    return float(dx @ dy) / spread if spread > 1e-9 else None


def difference(high: Sequence[Prefix], low: Sequence[Prefix]) -> Estimate:
    """Return b at one rank (prefixes `high`) minus b at another (`low`), paired by seed.

    Only batch sizes and numbers of updates that both ranks have are used.
    """
    both = {(p.batch, p.steps) for p in high} & {(p.batch, p.steps) for p in low}
    shared = ([p for p in part if (p.batch, p.steps) in both] for part in (high, low))
    one, other = map(effect, shared)
    return over_seeds(one.minus(other))


def gaps_at_equal_examples(table: pd.DataFrame) -> tuple[int, dict[int, list[Gap]]]:
    """Compare every rank with full fine-tuning, in nats, after equally many examples.

    Returns the largest number of examples that every batch size has seen, and the gaps of the ranks
    by batch size. A batch size that was not evaluated after so many examples is left out.
    """
    table = on_curve_rows(table.reset_index(drop=True))
    longest = table.groupby("batch_size")["steps"].max()
    examples = int((longest * longest.index).min())
    parts = {}
    for batch in longest.index:
        part = table[table["batch_size"] == batch].reset_index(drop=True)
        if examples % batch == 0 and len(part := _cut(part, examples // int(batch))):
            parts[int(batch)] = part
    optima = fit_all(lr_curves(pd.concat(parts.values(), ignore_index=True))) if parts else []
    of_batch = {b: [o for o in optima if o.curve.key["batch_size"] == b] for b in parts}
    return examples, {b: gaps_of(part, of_batch[b]) for b, part in parts.items()}
