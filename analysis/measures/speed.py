"""Compare learning curves of LoRA and full fine-tuning, each at its optimal learning rate.

The step efficiency rho is full fine-tuning's number of steps to some loss divided by LoRA's: at 0.9
LoRA needs 11% more. Unlike a gap in nats, rho is equal at all losses if LoRA learns at a constant
fraction of full fine-tuning's speed.

A prefix is a run cut after some number of updates. For each rank, ln rho = f(updates) + b
log2(batch) is fitted to all prefixes, with a free f for each number of updates (or of examples), so
b compares batch sizes after equally many.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import (
    LEVEL,
    Estimate,
    Part,
    Spread,
    censored_slope,
    exp_of,
    from_draws,
    from_sample,
    pseudo_values,
    with_interval,
)
from analysis.measures.at_best import AtBest, T, is_finite, over_seeds, values_at_best
from analysis.measures.regret import Gap, gaps_of
from analysis.optimum.fit import Optimum, fit_all
from analysis.runs.curves import Points, at_step, by_run, lr_curves, on_curve_rows, same_rows
from analysis.runs.table import CURVE_KEYS


def curves_at_best(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[AtBest[Points]]:
    """Return each curve's learning curves by seed, at its optimal learning rate and its draws.

    Step 0 and the last evaluation, which uses more rows, are left out.
    """
    learned = by_run(table)
    found = values_at_best(table, optima, lambda run: dict(same_rows(learned.get(run.name))))
    return [mine.map(lambda points: sorted(points.items())) for mine in found]


def read_to(curves: Sequence[AtBest[Points]]) -> int:
    """Return the last update of the shortest curve; 0 without curves."""
    return min(
        (int(points[-1][0]) for c in curves for points in c.best.values() if points), default=0
    )


def steps_to_reach(points: Points, loss: float) -> float | None:
    """Return the step, interpolated in ln(step), at which a curve first reaches a loss, or None."""
    k = next((k for k, (_, value) in enumerate(points) if value <= loss), None)
    if not k:  # never, or at the first evaluation
        return None if k is None else points[0][0]
    (first, above), (step, value) = points[k - 1 : k + 1]
    share = (above - loss) / (above - value)
    return math.exp(math.log(first) + share * (math.log(step) - math.log(first)))


def _reach(one: Points, other: Points) -> tuple[float, int]:
    """Return ln(steps of `other` / steps of `one`) to the lowest loss of both, and its kind.

    Kind 0: a value. -1: an upper bound, since `other` has that loss at its first evaluation
    already. 1: a lower bound, since `one` has. The loss is the lowest that both reach.
    """
    loss = max(one[-1][1], other[-1][1])
    steps, others = steps_to_reach(one, loss), steps_to_reach(other, loss)
    assert steps is not None and others is not None  # both end at or below `loss`
    bound = -1 if other[0][1] <= loss else 1 if one[0][1] <= loss else 0
    return math.log(others / steps), bound


def log_rho(one: AtBest[Points], other: AtBest[Points]) -> AtBest[float]:
    """Return ln(rho) of one curve against another, by seed; +-inf where only a bound is known."""

    def of(a: Points, b: Points) -> float:
        value, bound = _reach(a, b) if a and b else (math.nan, 0)
        return bound * math.inf if bound else value

    return one.paired(other, of)


def rho(lora: AtBest[Points], full: AtBest[Points], pooled: Part | None = None) -> Estimate:
    """Return rho of two curves from `curves_at_best`, paired by seed.

    Steps are counted to the higher of the two last losses. If a curve has that loss at its first
    evaluation in any seed, rho is only a bound. The interval covers the spread over seeds (two or
    more) and the error of the optima. `pooled`: the variance of ln(rho) over similar curves.
    """
    pairs = [(lora.best[s], full.best[s]) for s in sorted(lora.best.keys() & full.best.keys())]
    found = [_reach(a, b) for a, b in pairs if a and b]
    bounds, values = {bound for _, bound in found} - {0}, [math.exp(v) for v, _ in found]
    if not bounds:
        return exp_of(over_seeds(log_rho(lora, full), pooled)) if found else Estimate(None)
    low = min(values) if bounds == {1} else None
    high = max(values) if bounds == {-1} else None
    return Estimate(None, low, high, len(found), ("one is there at its first evaluation",))


def slope_by_rank(logs: dict[int, AtBest[float]]) -> Estimate:
    """Return the slope of ln(rho) over log2(rank): the mean of least-squares slopes by seed.

    There is no value if any seed has only a bound, or with fewer than two ranks.
    """
    ranks = sorted(logs)
    if len(ranks) < 2:
        return Estimate(None)
    x = np.log2(ranks) - np.mean(np.log2(ranks))
    slopes = _by_rank(logs).map(lambda v: float(x @ np.array(list(v.values())) / (x @ x)))
    if not np.isfinite(list(slopes.best.values())).all():
        return Estimate(None, n=len(slopes.best), flags=("only_bounds",))
    return over_seeds(slopes)


def _by_rank(values: Mapping[int, AtBest[T]]) -> AtBest[dict[int, T]]:
    """Regroup values, for the seeds that all ranks have, to seed -> rank -> value."""
    first, *rest = sorted(values)
    together = values[first].map(lambda v: {first: v})
    for r in rest:
        together = together.paired(values[r], lambda found, v, r=r: {**found, r: v})  # type: ignore[misc]
    return together


DEPARTED = 0.05
"""A rank is behind at a step if its loss there exceeds full fine-tuning's by more than this share
of full fine-tuning's gain over the whole run."""


class Departure(NamedTuple):
    """The step from which LoRA stays behind full fine-tuning, or bounds of this step."""

    low: float
    """0 if the curve was behind at its first evaluation already."""
    high: float
    """Infinite if the curve was not behind at its last evaluation."""


UNKNOWN = Departure(0.0, math.inf)
"""The two curves have no step in common."""


def departure(lora: Points, full: Points, start: float) -> Departure:
    """Return the step from which LoRA stays behind; `start` is the NLL before training, in nats."""
    other = dict(full)
    steps = [s for s, _ in lora if s in other]
    if not steps:
        return UNKNOWN
    gain = max(start - full[-1][1], 1e-12)
    lack = [(nll - other[s]) / gain for s, nll in lora if s in other]
    if lack[-1] <= DEPARTED:
        return Departure(steps[-1], math.inf)
    k = max((k for k, v in enumerate(lack) if v <= DEPARTED), default=-1)
    if k < 0:
        return Departure(0.0, steps[0])
    share = (DEPARTED - lack[k]) / (lack[k + 1] - lack[k])
    at = math.exp(math.log(steps[k]) + share * (math.log(steps[k + 1]) - math.log(steps[k])))
    return Departure(at, at)


def slope_of(left: dict[int, AtBest[Departure]]) -> Estimate:
    """Return the slope of ln(departure) over log2(rank), from all ranks and seeds.

    A departure is right-censored if the rank does not fall behind within the run (without such
    ranks the slope would be too flat), and left-censored if the rank is behind at its first
    evaluation. One line is fitted to all seeds (`censored_slope`). The ranks of a seed share
    batches, so the interval is Student's over jackknife pseudo-values, one per seed. Without
    censoring these are the slopes of single seeds. The interval includes the error of full
    fine-tuning's optimum, which all ranks share.

    There is no value if fewer than two ranks have a departure that is not censored.
    """
    together = _by_rank(left)
    by_seed, n = together.best, len(together.best)
    whole = _slope(by_seed)
    is_censored = any(d.low != d.high for v in by_seed.values() for d in v.values())
    flags = ("censored",) if is_censored else ()
    without = [_slope({s: v for s, v in by_seed.items() if s != out}) for out in by_seed]
    if not math.isfinite(whole):
        return Estimate(None, n=n, flags=(*flags, "one_rank_departs"))
    if n < 2 or not np.isfinite(without).all():
        return Estimate(whole, n=n, flags=flags if n < 2 else (*flags, "one_rank_departs"))
    own = dict(zip(by_seed, pseudo_values(whole, without)))
    moved = [_slope(drawn) - whole for drawn in together.draws]
    shifted = tuple({s: v + m for s, v in own.items()} for m in moved)
    return over_seeds(AtBest(own, shifted), flags=flags)


def _slope(by_seed: dict[int, dict[int, Departure]]) -> float:
    """Return the slope over all seeds and ranks; NaN if the ranks do not determine it."""
    found = [(r, d) for v in by_seed.values() for r, d in v.items() if d != UNKNOWN]
    low = [math.log(d.low) if d.low > 0 else -math.inf for _, d in found]
    return censored_slope(
        [math.log2(r) for r, _ in found], low, [math.log(d.high) for _, d in found]
    )


SPAN = 4
"""Two spans of updates are compared: the last one, from n / SPAN to n, and the span before it."""


def losses_before(points: Points, *shares: float) -> list[float]:
    """Return the losses at the last update / each of `shares`, interpolated in ln(updates).

    They are NaN if the curve begins after the first of these updates.
    """
    steps, losses = np.array(points, dtype=float).T if points else (np.zeros(1), np.zeros(1))
    ends = steps[-1] / np.array(shares)
    if not 0 < steps[0] <= ends[0]:
        return [math.nan] * len(shares)
    return np.interp(np.log(ends), np.log(steps), losses).tolist()


def bend(points: Points) -> float:
    """Return ln(fall of the loss in the last span / in the span before), below 0 if it flattens.

    NaN if the loss does not fall in both spans, or if the curve begins within the first span.
    """
    first, middle, last = losses_before(points, SPAN**2, SPAN, 1.0)
    falls = first > middle > last  # False for NaN
    return math.log((middle - last) / (first - middle)) if falls else math.nan


def least_straight(*curves: AtBest[Points]) -> Estimate:
    """Return exp(`bend`), averaged over seeds, of the curve that is furthest from a line (1).

    No value if a seed has no bend, no interval if a curve has none.
    """
    found = [exp_of(_over(c.map(bend))) for c in curves]
    unknown = [e for e in found if not e.has_interval()]
    return unknown[0] if unknown else max(found, key=lambda e: abs(math.log(e.value or 1.0)))


def _over(values: AtBest[float]) -> Estimate:
    """Average over seeds; no value if a seed has none."""
    return over_seeds(values) if is_finite(values) else Estimate(None, n=len(values.best))


def fall_over(one: AtBest[Points], other: AtBest[Points]) -> Estimate:
    """Return one curve's fall of the loss over the last doubling / another's, paired by seed.

    0: the first is at a floor. There is no value if the other's loss does not fall in any seed.
    """

    def share(a: Points, b: Points) -> float:
        (half, last), (other_half, other) = (losses_before(p, 2, 1) for p in (a, b))
        return (half - last) / (other_half - other) if other_half > other else math.nan

    return _over(one.paired(other, share))


RESAMPLES = 2000


class Start(NamedTuple):
    """How long all ranks learn like the highest one at one learning rate.

    A rank learns differently once its loss leaves the 95% band of the difference between two draws.
    """

    lr: float
    ranks: list[tuple[int, float, float, float]]
    """Rank, the step at which it leaves the band (infinite: never), its difference from the highest
    rank and the band at the first step, in nats."""
    first: Estimate
    """The step at which the first rank leaves its band. It has no value if so many resamples never
    leave the band that the interval has no upper end."""
    growth: Estimate
    """Change of the lowest rank's difference per doubling of the updates, in nats; over seeds."""


def start_of(table: pd.DataFrame, top: int) -> Start | None:
    """Compare ranks with rank `top` at the LR with several draws of A; None with only one rank."""
    part = table[(table["method"] == "lora") & (table["status"] == "done")]
    lrs = part.loc[part["init_seed"].fillna(0) > 0, "lr"].unique()
    curves: dict[tuple[int, int], list[dict[float, float]]] = {}
    for run, points in by_run(part[part["lr"].isin(lrs)]).items():
        key = int(part.at[run, "rank"]), int(part.at[run, "seed"])
        curves.setdefault(key, []).append(dict(same_rows(points)))
    again = {key: draws for key, draws in curves.items() if len(draws) > 1}
    shared = [set(c) for draws in again.values() for c in draws]
    steps = sorted(set.intersection(*shared)) if shared else []
    drawn: dict[int, dict[int, np.ndarray]] = {}  # losses by rank and seed: [draws of A, steps]
    for (rank, seed), draws in again.items():
        losses = np.array([[c[t] for t in steps] for c in draws])
        drawn.setdefault(rank, {})[seed] = losses
    if top not in drawn or len(drawn) < 2 or len(steps) < 2:
        return None
    spread = {
        r: np.mean([np.var(c, 0, ddof=1) for c in seeds.values()], 0) for r, seeds in drawn.items()
    }
    band = {r: 1.96 * np.sqrt(spread[r] + spread[top]) for r in drawn}
    apart = {
        r: [seeds[s].mean(0) - drawn[top][s].mean(0) for s in sorted(seeds.keys() & drawn[top])]
        for r, seeds in sorted(drawn.items())
        if r != top
    }
    mean = {r: np.mean(by_seed, 0) for r, by_seed in apart.items()}
    ranks = [
        (r, _leaves(m, band[r], steps), float(m[0]), float(band[r][0])) for r, m in mean.items()
    ]
    # The first rank to leave: a bootstrap over seeds, and over draws of A within each seed.
    rng, found = np.random.default_rng(20251126), []
    seeds = sorted(set.intersection(*(set(v) for v in drawn.values())))
    for _ in range(RESAMPLES):
        mine = rng.choice(seeds, len(seeds))
        means = {
            r: np.mean([c[s][rng.integers(0, len(c[s]), len(c[s]))].mean(0) for s in mine], 0)
            for r, c in drawn.items()
        }
        found.append(min(_leaves(means[r] - means[top], band[r], steps) for r in mean))
    n, units = sum(map(len, again.values())), Spread(len(seeds), "seeds with other draws of A")
    first = Estimate(None, n=n, spread=units)  # draws of one seed share batches
    if np.isinf(found).mean() < (1 - LEVEL) / 2:
        first = from_draws(np.minimum(np.array(found), 2.0 * steps[-1]), n, spread=units)
    # Least squares over log2(step), by seed.
    x = np.log2(steps) - np.mean(np.log2(steps))
    growth = from_sample([float(x @ v / (x @ x)) for v in apart[min(apart)]])
    return Start(float(lrs[0]), ranks, first, growth)


def _leaves(apart: np.ndarray, band: np.ndarray, steps: Sequence[float]) -> float:
    """Return the first step outside the band whose next step, if any, is outside; or infinity."""
    out = np.abs(apart) > band
    twice = [i for i in range(len(steps)) if out[i] and (i + 1 == len(steps) or out[i + 1])]
    return steps[twice[0]] if twice else math.inf


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
        optima = fit_all(lr_curves(part))
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


def stalled(optima: Sequence[Optimum], points: Sequence[dict[int, Points]]) -> list[Gate]:
    """Return a gate for each curve that has stopped learning by the end of its runs.

    Over seeds, how much the loss falls in the last doubling of the updates may be 0: the interval's
    lower end, or the value without an interval. Seeds whose curve begins later are left out.
    """
    found = []
    for o, mine in zip(optima, points):
        ends = (losses_before(one, 2, 1) for one in mine.values())
        gain = from_sample([half - last for half, last in ends if half == half])
        least = gain.value if gain.low is None else gain.low
        if least is not None and least <= 0:
            last = f"{o.curve.name} gains {with_interval(gain)} nats in the last doubling"
            found.append(Gate(GateCode.TASK, f"{last}, not clearly any"))
    return found
