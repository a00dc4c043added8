"""Suggest the runs that are likeliest to decide the undecided claims."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.inference.decide import scale_of
from analysis.inference.estimate import POWER, SEEDS, Verdict
from analysis.inference.gates import MIN_SEEDS, GateCode
from analysis.optimum.fit import Optimum, seeds_at_best
from analysis.optimum.valley import expected_spread, gather
from analysis.runs.lr_curves import LrCurve, full_names

MAX_NEW_SEEDS = 5
"""The most new seeds that are suggested for one curve at a time."""
N_AROUND = 3
"""Number of learning rates around the optimum that get new seeds."""
HOPELESS = {GateCode.TASK, GateCode.BY_TASK, GateCode.MISSING, GateCode.WITHDRAWN}
"""Gates that no run of the grid lifts."""


@dataclass(frozen=True)
class Suggestion:
    """Runs to add to one curve."""

    curve: LrCurve
    lr: float
    seeds: tuple[int, ...]
    why: str


def suggest(found: Any) -> list[Suggestion]:
    """Suggest runs for undecided claims: runs that lift a gate, else runs that narrow the interval.

    Empty if every claim is decided, or if another task, arm or rank is needed. `found`: the
    `Analysis` of a question, or another object with its verdicts, members and of_rates.
    """
    wanted: list[Suggestion] = []
    for verdict in found.verdicts:
        if verdict.outcome != "UNDECIDED" or any(g.code in HOPELESS for g in verdict.gates):
            continue
        lora_only = found.of_rates and not verdict.log
        curves = [
            o
            for o in found.members.get(verdict.group, [])
            if not lora_only or o.curve.key["method"] == "lora"
        ]
        spread = verdict.estimate.spread
        if gated := [s for o in curves for s in _open_gates(o)]:
            wanted += gated
        elif found.of_rates and spread is None:  # a claim about optimal LRs
            wanted += _narrow(verdict, curves)
        elif spread is None or spread.of == SEEDS:  # no run adds other units, such as layer sets
            n = min(verdict.missing or MAX_NEW_SEEDS, MAX_NEW_SEEDS)
            wanted += [s for o in curves for s in _more_seeds(o, n, "narrows the interval")]
    merged: dict[tuple[int, float], Suggestion] = {}
    for s in wanted:
        known = merged.get((id(s.curve), s.lr))
        tried = s.curve.seed[np.abs(s.curve.x - math.log(s.lr)) < 2e-3].tolist()
        seeds = {*(known.seeds if known else ()), *s.seeds} - set(tried)
        if seeds:
            merged[id(s.curve), s.lr] = dataclasses.replace(known or s, seeds=tuple(sorted(seeds)))
    return list(merged.values())


def _make(o: Optimum, lr: float, seeds: Iterable[int], why: str) -> Suggestion:
    return Suggestion(o.curve, float(f"{lr:.2e}"), tuple(int(s) for s in seeds), why)


def _most_used(seeds: np.ndarray, n: int) -> list[int]:
    """Return the n seeds with the most runs, lower numbers first."""
    found, counts = np.unique(seeds, return_counts=True)
    return found[np.argsort(-counts, kind="stable")][:n].tolist()


def _open_gates(o: Optimum) -> list[Suggestion]:
    """Suggest LRs or seeds that lift the gates of one curve; empty if none is open."""
    lrs, why = missing_lrs(o)
    if lrs:
        return [_make(o, lr, _most_used(o.curve.seed, 1), why) for lr in lrs]
    have = seeds_at_best(o)
    if have < MIN_SEEDS:
        return _more_seeds(o, MIN_SEEDS - have, f"{MIN_SEEDS} seeds at the optimum")
    if "flat" in o.flags:
        return _more_seeds(o, MIN_SEEDS, "the LR curve is too flat for its noise")
    return []


def missing_lrs(o: Optimum) -> tuple[list[float], str]:
    """Return learning rates that a curve needs for a verdict, and why; none if it has enough.

    They lie beyond the edge of the LRs tried, below a diverged one, or around the best.
    """
    x, every = np.unique(o.curve.x[o.curve.usable]), np.unique(o.curve.x)
    if not len(x):
        below = [math.exp(every[0] - k * math.log(2)) for k in (1, 2, 3)]
        return below, "every learning rate broke down"
    step = float(np.median(np.diff(x))) if len(x) > 1 else math.log(2)
    first_diverged = min(every[every > x[-1]], default=math.inf)
    side = o.open_side
    if side > 0 and math.isfinite(first_diverged):
        thirds = [math.exp(x[-1] + (first_diverged - x[-1]) * k / 3) for k in (1, 2)]
        return thirds, "between the best learning rate and the first that breaks down"
    if side:
        end = x[-1] if side > 0 else every[0]
        beyond = [math.exp(end + side * k * step) for k in (1, 2)]
        return beyond, "beyond the edge of the learning rates tried"
    if "few_points" in o.flags or "no_variance" in o.flags:
        best = _best_tried(o, x)
        around = [math.exp(best - step / 2), math.exp(best + step / 2)]
        return around, "more learning rates around the best one"
    return [], ""


def _best_tried(o: Optimum, x: np.ndarray) -> float:
    """Return the ln(lr) of `x` with the lowest mean loss."""
    return float(x[np.argmin([o.curve.y[o.curve.usable & (o.curve.x == v)].mean() for v in x])])


def _more_seeds(o: Optimum, n: int, why: str) -> list[Suggestion]:
    fresh = int(o.curve.seed.max()) + 1 + np.arange(n)
    return [_make(o, math.exp(v), fresh, why) for v in _around(o)]


def _around(o: Optimum) -> np.ndarray:
    """Return the N_AROUND tried learning rates around the optimum, in ln(lr)."""
    x = np.unique(o.curve.x[o.curve.usable])
    at = math.log(o.best_lr.value) if o.best_lr.value else _best_tried(o, x)
    first = int(np.argmin(np.abs(x - at))) - N_AROUND // 2
    first = min(max(first, 0), max(len(x) - N_AROUND, 0))
    return x[first : first + N_AROUND]


def _narrow(verdict: Verdict, curves: Sequence[Optimum]) -> list[Suggestion]:
    """Add runs step by step until the claim would be decided if its value stayed the same.

    There are two kinds of step. One adds a seed at the N_AROUND LRs around the optimum. The other
    adds the LRs halfway between those, at MIN_SEEDS seeds so that the gate on seeds stays lifted.
    Each step goes to the curve where it reduces the estimand's variance most per run. At least one
    step is made.
    """
    known = [o for o in curves if o.best_lr.draws is not None]
    if not known or len(known) < len(curves) or verdict.estimate.value is None:
        return []
    # The weight of each curve's ln(best LR) in the estimand. A ratio compares the mean over LoRA's
    # curves with full fine-tuning. Otherwise the estimand is a slope over log2(rank).
    if verdict.log:
        n_lora = sum(o.curve.key["method"] == "lora" for o in known)
        shares = [1.0 if o.curve.key["method"] == "fullft" else 1.0 / n_lora for o in known]
    else:
        x = np.log2([float(o.curve.key["rank"]) for o in known])
        shares = ((x - x.mean()) / (float(((x - x.mean()) ** 2).sum()) or 1.0)).tolist()
    if not any(shares):  # all curves have one rank: the estimand is no slope over it
        return []
    # The standard error at which the interval excludes the margin's nearest edge with probability
    # POWER. It is in ln for ratios. The errors of optima are taken to be normal.
    to, level = scale_of(verdict.log), verdict.estimate.level
    room = min(abs(to(verdict.estimate.value) - to(edge)) for edge in verdict.margin)
    reach = stats.norm.ppf(0.5 + level / 2) + stats.norm.ppf(POWER)
    target = max(room / float(reach), 1e-4)
    plan = [(0, False)] * len(known)  # by curve: number of new seeds, whether LRs are new

    @functools.cache
    def variance(k: int, n: int, lrs: bool) -> float:
        """Return the part of the estimand's variance due to curve k, after runs are added.

        It is the variance of the present draws times the expected effect of the added runs.
        """
        now = float(np.std(known[k].best_lr.log_draws))
        return (shares[k] * now * _expected(known[k], n, lrs) / _expected(known[k], 0, False)) ** 2

    first = True
    while first or math.sqrt(sum(variance(k, *then) for k, then in enumerate(plan))) > target:
        steps = []
        for k, (n, lrs) in enumerate(plan):
            now = variance(k, n, lrs)
            if n < MAX_NEW_SEEDS:
                steps.append(((now - variance(k, n + 1, lrs)) / N_AROUND, k, (n + 1, lrs)))
            if not lrs:
                steps.append(((now - variance(k, n, True)) / (2 * MIN_SEEDS), k, (n, True)))
        if not steps or (max(steps)[0] <= 0 and not first):
            break
        _, which, then = max(steps)
        plan[which], first = then, False
    out = []
    for o, (n, lrs) in zip(known, plan):
        if lrs:
            seeds = _most_used(o.curve.seed, MIN_SEEDS)
            why = "halfway between the learning rates around the optimum"
            out += [_make(o, math.exp(v), seeds, why) for v in _halfway(o)]
        out += _more_seeds(o, n, "narrows the optimum") if n else []
    return out


def _halfway(o: Optimum) -> np.ndarray:
    x = _around(o)
    return (x[1:] + x[:-1]) / 2


def _expected(o: Optimum, n: int, lrs: bool) -> float:
    """Return the expected standard deviation of ln(best LR) after adding runs.

    These are n seeds at the LRs around the optimum, and, with `lrs`, two LRs halfway between those.
    They are given the loss of the fitted curve.
    """
    use = o.curve.usable
    x, block = o.curve.x[use], o.curve.block[use]
    extra = np.tile(_around(o), n)
    fresh = np.repeat(int(block.max()) + 1 + np.arange(n), N_AROUND)[: len(extra)]
    if lrs:
        most_used = _most_used(block, MIN_SEEDS)
        extra = np.concatenate([extra, np.repeat(_halfway(o), len(most_used))])
        fresh = np.concatenate([fresh, np.tile(most_used, len(_halfway(o)))])
    planned, blocks = np.concatenate([x, extra]), np.concatenate([block, fresh]).astype(int)
    assert o.shape is not None and o.pooled is not None
    runs = gather(planned, o.shape.height(planned), blocks)
    return expected_spread(runs, o.pooled.noise, o.pooled.misfit)


def plain(suggestions: Sequence[Suggestion]) -> list[dict[str, Any]]:
    """Return suggestions as plain values for JSON; names of curves say in what they differ."""
    rows = []
    for name, s in zip(full_names([s.curve for s in suggestions]), suggestions):
        r, key = s.curve.key.get("rank"), s.curve.key
        rank = None if r is None or r != r else int(r)
        of = {"curve": name, "group": s.curve.group, "method": key["method"], "rank": rank}
        rows.append({**of, "lr": s.lr, "seeds": list(s.seeds), "why": s.why})
    return rows


def lines(suggestions: Sequence[Suggestion]) -> list[str]:
    """Format suggestions as lines of text."""
    text = "{curve} ({group}): lr {lr:g}, seeds {ids}: {why}"
    rows = plain(suggestions)
    return [text.format(ids=", ".join(map(str, row["seeds"])), **row) for row in rows]
