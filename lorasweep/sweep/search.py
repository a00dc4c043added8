"""Search the learning rate of an arm: from the runs that have finished to the next ones.

Short runs over a wide range find the neighbourhood; runs of full length judge. All functions depend
on results alone, so every process that asks gets the same runs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from lorasweep.errors import SpecError
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.question import Search
from lorasweep.sweep.replicates import lrs_around_optimum

LOWEST, HIGHEST = 1e-8, 10.0
"""Learning rates beyond which a search gives up."""

Losses = dict[float, float]
"""Learning rate -> loss (lower is better); infinity if the run diverged."""


def next_lrs(centre: float, short: Losses, full: Losses, how: Search) -> tuple[list[float], bool]:
    """Return the learning rates to try next, and whether in full; none if the range is known.

    `centre`: where the search starts.

    Raises:
        SpecError: no learning rate from LOWEST on trains.
    """
    if not short:
        return around(centre, how.n_short, how.wide), False
    beyond = _beyond(short, how.wide)
    if beyond and not full:
        return [beyond], False
    if not full:
        return lrs_around_optimum(short, how.n_lrs), True
    beyond = _beyond(full, how.wide)
    if beyond:
        # a short run of nearly this learning rate is the beginning of the full one
        near = [lr for lr in short if abs(math.log(lr / beyond)) < math.log(how.fine) / 2]
        return near or [beyond], True
    return _between(full, how.fine), True


def _between(losses: Losses, fine: float) -> list[float]:
    """Return a learning rate between the best and the neighbour towards which the losses fall.

    That is the side of the vertex of the parabola in ln(lr) through the three losses; a neighbour
    that diverged counts as infinitely bad. Empty if this neighbour is within a factor `fine`.
    """
    lrs = sorted(losses)
    at = lrs.index(min(lrs, key=losses.__getitem__))
    if at == len(lrs) - 1:
        side = at - 1
    else:
        slopes = [
            abs(losses[lrs[k]] - losses[lrs[at]]) / abs(math.log(lrs[k] / lrs[at]))
            for k in (at - 1, at + 1)
        ]
        side = at - 1 if slopes[0] < slopes[1] else at + 1
    low, high = sorted((lrs[at], lrs[side]))
    return [float(f"{math.sqrt(low * high):.2e}")] if high / low > fine * 1.1 else []


def _beyond(losses: Losses, factor: float) -> float | None:
    """Return a learning rate beyond the best, if that is at an end; None if it lies inside."""
    lrs = sorted(losses)
    best = min(lrs, key=losses.__getitem__)
    if best not in (lrs[0], lrs[-1]):
        return None
    low = best == lrs[0] or math.isinf(losses[best])
    found = lrs[0] / factor if low else lrs[-1] * factor
    if found < LOWEST:
        raise SpecError(
            f"no learning rate from {lrs[0]:g} on trains: all losses are worse than that of the "
            "lowest one, or not finite. Check the model's weights and the rows."
        )
    return float(f"{found:.2e}") if found <= HIGHEST else None


def searched(start: Point, how: Search, loss: Callable[[str], float | None]) -> list[Point]:
    """Return the runs of a search from `start` so far, the unfinished ones last.

    `loss`: run id -> loss, infinity if the run diverged, None if it has not finished.
    """
    short: Losses = {}
    full: Losses = {}
    points: list[Point] = []
    steps = max(1, start.spec.steps // how.prefix)
    while True:
        lrs, in_full = next_lrs(start.spec.lr, short, full, how)
        length = start.spec.steps if in_full else steps
        new = [_at(start, lr, length, start.spec.seed) for lr in lrs]
        points += new
        found = {p.spec.lr: loss(p.id) for p in new}
        known = {lr: value for lr, value in found.items() if value is not None}
        if len(known) < len(found) or not found:
            return points
        (full if in_full else short).update(known)


def fresh_seeds(
    start: Point, points: Sequence[Point], how: Search, loss: Callable[[str], float | None]
) -> Iterator[list[Point]]:
    """Yield for each fresh seed the full runs around the best learning rate of a search."""
    full = [p for p in points if p.spec.steps == start.spec.steps]
    losses = {p.spec.lr: math.inf if (v := loss(p.id)) is None else v for p in full}
    for seed in range(start.spec.seed + 1, start.spec.seed + 1 + how.seeds):
        lrs = lrs_around_optimum(losses, how.n_lrs)
        yield [_at(start, lr, start.spec.steps, seed) for lr in lrs]


def _at(start: Point, lr: float, steps: int, seed: int) -> Point:
    return Point(start.arm, dataclasses.replace(start.spec, lr=lr, steps=steps, seed=seed))
