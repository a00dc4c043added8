"""Make later runs of a sweep: fresh seeds around each optimum, and runs added after a look.

The analysis chooses the runs that are added; `store.looks` records them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lorasweep.spec.run import validate
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.question import Replicates


def second_stage(
    points: Sequence[Point], replicate: Replicates, loss: Callable[[str], float | None]
) -> list[Point]:
    """Return runs with fresh seeds at the `n_lrs` learning rates around each curve's optimum.

    `loss`: run id -> loss (lower is better), None if the run diverged. Only first-stage runs select
    learning rates, so the selection does not change while the second stage runs.
    """
    curves: dict[tuple[str, str], dict[float, list[Point]]] = {}
    for p in points:
        curves.setdefault(curve_key(p), {}).setdefault(p.spec.lr, []).append(p)
    extra: dict[str, Point] = {}
    for (arm, _), by_lr in curves.items():
        if replicate.arms and arm not in replicate.arms:
            continue
        means = {}  # LR -> mean loss, infinity if any run diverged
        for lr, own in by_lr.items():
            found = [math.inf if (v := loss(p.id)) is None else v for p in own]
            means[lr] = sum(found) / len(found) if all(map(math.isfinite, found)) else math.inf
        for lr in lrs_around_optimum(means, replicate.n_lrs):
            for seed in replicate.seeds:
                spec = dataclasses.replace(by_lr[lr][0].spec, seed=seed)
                extra.setdefault(spec.id, Point(arm, spec))
    known = {p.id for p in points}
    return [p for p in extra.values() if p.id not in known]


def expected_second_stage(points: Sequence[Point], replicate: Replicates) -> list[Point]:
    """Return the second stage if each optimum is in the middle of its curve's learning rates.

    Used for plans: which learning rates get fresh seeds is not known before the first stage ends.
    """
    tried: dict[tuple[str, str], set[float]] = {}
    for p in points:
        tried.setdefault(curve_key(p), set()).add(p.spec.lr)
    ranks = {key: {lr: k for k, lr in enumerate(sorted(lrs))} for key, lrs in tried.items()}
    from_middle = {
        p.id: abs(of_curve[p.spec.lr] - (len(of_curve) - 1) / 2)
        for p in points
        for of_curve in (ranks[curve_key(p)],)
    }
    return second_stage(points, replicate, from_middle.get)


def lrs_around_optimum(losses: dict[float, float], n: int) -> list[float]:
    """Return `n` neighbouring learning rates around the best one; empty if no loss is finite.

    If `n` is even, one more lies above the best than below.
    """
    lrs = sorted(losses)
    if not any(map(math.isfinite, losses.values())):
        return []
    best = lrs.index(min(lrs, key=losses.__getitem__))
    first = min(max(0, best - (n - 1) // 2), max(0, len(lrs) - n))
    return lrs[first : first + n]


def planned_seeds(points: Sequence[Point], replicate: Replicates) -> int:
    """Return the number of seeds at the optimum after both stages, the largest of all arms."""
    seeds: dict[str, set[int]] = {}
    for p in points:
        fresh = replicate.seeds if not replicate.arms or p.arm in replicate.arms else []
        seeds.setdefault(p.arm, set(fresh)).add(p.spec.seed)
    return max(map(len, seeds.values()))


def added_points(rounds: Sequence[dict[str, Any]], known: Sequence[Point]) -> list[Point]:
    """Return the runs that recorded rounds (looks) added.

    Each is a run in `known` with another learning rate and seed. If that run is not in `known`, the
    sweep was edited or only a part of it was requested: then the added run is left out.
    """
    by_id = {p.id: p for p in known}
    extra: dict[str, Point] = {}
    for entry in (e for r in rounds for e in r["runs"]):
        like = by_id.get(entry["like"])
        if like is not None:
            spec = dataclasses.replace(like.spec, lr=entry["lr"], seed=entry["seed"])
            validate(spec)
            extra.setdefault(spec.id, Point(like.arm, spec))
    return [p for p in extra.values() if p.id not in by_id]
