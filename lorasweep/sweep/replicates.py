"""The second stage of a sweep: fresh seeds at the learning rates around each curve's optimum."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.question import Replicates


def second_stage(
    points: Sequence[Point], replicate: Replicates, loss: Callable[[str], float | None]
) -> list[Point]:
    """Return runs with fresh seeds at the `n_lrs` learning rates around each curve's optimum.

    `loss` maps a run id to its loss (lower is better), or None if the run diverged. It is called
    for runs of the first stage only, so that the selection does not change while the second stage
    runs.
    """
    curves: dict[tuple[str, str], dict[float, list[Point]]] = {}
    for p in points:
        curves.setdefault(curve_key(p), {}).setdefault(p.spec.lr, []).append(p)
    extra: dict[str, Point] = {}
    for (arm, _), by_lr in curves.items():
        if replicate.arms and arm not in replicate.arms:
            continue
        for lr in _around_the_best(by_lr, replicate.n_lrs, loss):
            for seed in replicate.seeds:
                spec = dataclasses.replace(by_lr[lr][0].spec, seed=seed)
                extra.setdefault(spec.id, Point(arm, spec))
    known = {p.id for p in points}
    return [p for p in extra.values() if p.id not in known]


def planned_seeds(points: Sequence[Point], replicate: Replicates) -> int:
    """Return the number of seeds at the optimum after both stages, in the arm with most seeds."""
    seeds: dict[str, set[int]] = {}
    for p in points:
        fresh = replicate.seeds if not replicate.arms or p.arm in replicate.arms else []
        seeds.setdefault(p.arm, set(fresh)).add(p.spec.seed)
    return max(map(len, seeds.values()))


def _around_the_best(
    by_lr: dict[float, list[Point]], n_lrs: int, loss: Callable[[str], float | None]
) -> list[float]:
    """Return `n_lrs` neighbouring learning rates around the one with the lowest mean loss.

    If the number is even, one more lies above it than below. Empty if all runs diverged.
    """
    lrs = sorted(by_lr)
    scores = [_mean([loss(p.id) for p in by_lr[lr]]) for lr in lrs]
    if not any(map(math.isfinite, scores)):
        return []
    best = min(range(len(lrs)), key=scores.__getitem__)
    first = min(max(0, best - (n_lrs - 1) // 2), max(0, len(lrs) - n_lrs))
    return lrs[first : first + n_lrs]


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean; infinity if any run diverged."""
    usable = [v for v in values if v is not None and math.isfinite(v)]
    return sum(usable) / len(usable) if usable and len(usable) == len(values) else math.inf
