"""Search learning rates: from the runs that have finished to the next ones.

Short runs over a wide range find the neighbourhood, runs of full length judge, and fresh seeds give
intervals. All functions depend on results alone, so every process that asks gets the same runs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lorasweep.errors import SpecError
from lorasweep.spec.values import misfits
from lorasweep.sweep.grid import Point, around, curve_key
from lorasweep.sweep.question import FINEST, MIN_SHORT, Search
from lorasweep.sweep.replicates import lrs_around_optimum

LOWEST, HIGHEST = 1e-8, 10.0
"""Learning rates beyond which a search does not go."""

Losses = dict[float, float]
"""Learning rate -> loss (lower is better); infinity if the run diverged."""


class Look(NamedTuple):
    """What the analysis says of finished runs."""

    decided: bool
    """Whether they answer the question."""
    lrs: Mapping[str, Sequence[float]]
    """Id of a run -> learning rates that its arm still needs, as its optimum is at an edge, or has
    too few learning rates around it."""


def search(
    starts: Sequence[Point],
    how: Search,
    loss: Callable[[str], float | None],
    may_begin: Callable[[Sequence[Point], Sequence[Point]], bool],
    look: Callable[[Sequence[Point]], Look],
) -> list[Point]:
    """Return the runs of a search so far, in the order in which they are trained.

    Args:
        starts: a run of full length for each arm and rank, at the learning rate to start from.
        loss: run id -> loss, infinity if the run diverged, None if it has not finished.
        may_begin: whether the budget allows runs (second argument) after others (first argument).
        look: judges finished runs, once the range of all arms is known.
    """
    points: list[Point] = []
    for p in starts:
        if how.short_steps(p.spec.steps) >= p.spec.steps:
            raise SpecError(
                f"steps={p.spec.steps}, sweep.search.prefix={how.prefix}: a search begins with "
                f"shorter runs. Set steps={MIN_SHORT + 1} or more, and a prefix of 2 or more."
            )
    while True:
        new = [p for start in starts for p in _next_of(start, points, how, loss)]
        if not new:
            seeds, live = len({p.spec.seed for p in points}), _trained(starts, points, how, loss)
            if live and (seeds == 1 or seeds >= MIN_SEEDS):
                found = look(points)
                new = _more_lrs(live, points, how, found.lrs)
                if not new and found.decided and seeds >= MIN_SEEDS:
                    return points
            new = new or _fresh_seed(live, points, how, loss)
        new = [p for p in new if p not in points]
        if not new or not may_begin(points, new):
            return points
        points += new
        if any(loss(p.id) is None for p in new):
            return points


MIN_SEEDS = 3
"""Seeds without which no claim is judged."""


def check_search(points: Sequence[Point], how: Search) -> None:
    """Raise SpecError unless a search can start from these runs, with these settings.

    The runs have one model and data set, and differ in method and rank only. A short run is the
    beginning of the long one only at a constant learning rate.
    """
    for problem in misfits(how, "sweep.search."):
        raise SpecError(problem)
    if how.max_steps < how.min_steps:
        raise SpecError(
            f"sweep.search.max_steps={how.max_steps}: expected at least min_steps={how.min_steps}."
        )
    specs = [p.spec for p in points]
    pairs = sorted({f"model={s.model.name} dataset={s.dataset.name}" for s in specs})
    if len(pairs) > 1:
        raise SpecError(
            f"a search is about one model and one data set, not {len(pairs)}: "
            f"{', '.join(pairs)}. Give one of each."
        )
    arms = [(s.method.name, getattr(s.method, "rank", None)) for s in specs]
    if twice := next((arm for arm in arms if arms.count(arm) > 1), None):
        raise SpecError(
            f"a search compares full fine-tuning with ranks of LoRA, but {arms.count(twice)} arms "
            f"have method {twice[0]}{'' if twice[1] is None else f' and rank {twice[1]}'}. Give "
            "every other setting, such as layers, alpha, batch_size or seed, one value."
        )
    for s in specs:
        if s.schedule != "constant" or s.warmup_steps:
            raise SpecError(
                f"schedule={s.schedule}, warmup_steps={s.warmup_steps}: a search starts with short "
                "runs, which are the beginnings of longer ones at a constant learning rate only. "
                "Leave both out."
            )


def is_short(point: Point, points: Iterable[Point]) -> bool:
    """Return whether a run is shorter than others of its search, so that it is not judged."""
    return point.spec.steps < max(p.spec.steps for p in points)


def full_runs(points: Iterable[Point], steps: int) -> float:
    """Return the updates of some runs, in runs of full length (`steps` updates).

    A short run is the beginning of the longer one with its learning rate, so it counts once.
    """
    longest: dict[str, int] = {}
    for p in points:
        key = dataclasses.replace(p.spec, steps=1).id
        longest[key] = max(longest.get(key, 0), p.spec.steps)
    return sum(longest.values()) / steps


# ---------------------------------------------------------------- one arm


def next_lrs(centre: float, short: Losses, full: Losses, how: Search) -> tuple[list[float], bool]:
    """Return the learning rates to try next, and whether in full; none if the range is known.

    Where no learning rate from LOWEST on trains, one full run confirms it. `centre`: where the
    search starts.
    """
    if not short:
        return around(centre, how.n_short, how.wide), False
    beyond = _beyond(full or short, how.wide)
    if beyond and beyond < LOWEST:
        return [] if full else [min(short)], True
    if beyond and not full:
        return [beyond], False
    if not full:
        return lrs_around_optimum(short, how.n_lrs), True
    if beyond:
        # a short run of nearly this learning rate is the beginning of the full one
        near = [
            lr
            for lr in short
            if lr not in full and abs(math.log(lr / beyond)) < math.log(how.fine) / 2
        ]
        return near or [beyond], True
    return _between(full, how), True


def _between(losses: Losses, how: Search) -> list[float]:
    """Return learning rates between the best and its neighbours; empty if no more is needed.

    A gap gets one if it is wider than `fine`, or while fewer than `n_full` losses are finite. The
    gap towards which losses fall comes first: that is the side of the vertex of the parabola in
    ln(lr) through the three losses.
    """
    lrs = sorted(losses)
    at = lrs.index(min(lrs, key=losses.__getitem__))
    sides = [k for k in (at - 1, at + 1) if 0 <= k < len(lrs)]
    sides.sort(key=lambda k: abs((losses[lrs[k]] - losses[lrs[at]]) / math.log(lrs[k] / lrs[at])))
    gaps = [(min(lrs[at], lrs[k]), max(lrs[at], lrs[k])) for k in sides]
    missing = how.n_full - sum(map(math.isfinite, losses.values()))
    wide = [gap for gap in gaps if gap[1] / gap[0] > how.fine * 1.1]
    if not wide and missing > 0:
        wide = [gap for gap in gaps if gap[1] / gap[0] > FINEST**2][:missing]
    return [float(f"{math.sqrt(low * high):.2e}") for low, high in wide]


def _beyond(losses: Losses, factor: float) -> float | None:
    """Return a learning rate beyond the best, if that is at an end; None if it lies inside."""
    lrs = sorted(losses)
    best = min(lrs, key=losses.__getitem__)
    if best not in (lrs[0], lrs[-1]):
        return None
    low = best == lrs[0] or math.isinf(losses[best])
    found = lrs[0] / factor if low else lrs[-1] * factor
    return float(f"{found:.2e}") if found <= HIGHEST else None


def _next_of(
    start: Point, points: Sequence[Point], how: Search, loss: Callable[[str], float | None]
) -> list[Point]:
    """Return the next runs of an arm with its first seed; empty if its range is known."""
    mine = [p for p in points if _is_of(p, start) and p.spec.seed == start.spec.seed]
    full = {p.spec.lr: _loss(p, loss) for p in mine if p.spec.steps == start.spec.steps}
    short = {p.spec.lr: _loss(p, loss) for p in mine if p.spec.steps < start.spec.steps}
    lrs, in_full = next_lrs(start.spec.lr, short, full, how)
    steps = start.spec.steps if in_full else how.short_steps(start.spec.steps)
    return [_at(start, lr, steps, start.spec.seed) for lr in lrs]


def _trained(
    starts: Sequence[Point],
    points: Sequence[Point],
    how: Search,
    loss: Callable[[str], float | None],
) -> list[Point]:
    """Return the arms, by their starts, of which the losses are not lowest at the lowest end."""
    found = []
    for start in starts:
        full = _means(start, points, loss)
        if full and not (_beyond(full, how.wide) or LOWEST) < LOWEST:
            found.append(start)
    return found


def _means(start: Point, points: Sequence[Point], loss: Callable[[str], float | None]) -> Losses:
    """Return the mean losses of an arm's full runs, by learning rate."""
    by_lr: dict[float, list[float]] = {}
    for p in points:
        if _is_of(p, start) and p.spec.steps == start.spec.steps:
            by_lr.setdefault(p.spec.lr, []).append(_loss(p, loss))
    return {lr: sum(losses) / len(losses) for lr, losses in by_lr.items()}


def _more_lrs(
    starts: Sequence[Point],
    points: Sequence[Point],
    how: Search,
    wanted: Mapping[str, Sequence[float]],
) -> list[Point]:
    """Return full runs at more learning rates of some arms, with all seeds so far."""
    found = []
    for start in starts:
        mine = [p for p in points if _is_of(p, start) and p.spec.steps == start.spec.steps]
        tried = {p.spec.lr for p in mine}
        seeds = sorted({p.spec.seed for p in mine})
        new = {lr for p in mine for lr in wanted.get(p.id, ()) if LOWEST < lr < HIGHEST}
        far = [lr for lr in new if all(abs(math.log(lr / t)) > math.log(FINEST) for t in tried)]
        for lr in sorted(far)[: max(0, how.most_lrs - len(tried))]:
            found += [_at(start, lr, start.spec.steps, seed) for seed in seeds]
    return found


def _fresh_seed(
    starts: Sequence[Point],
    points: Sequence[Point],
    how: Search,
    loss: Callable[[str], float | None],
) -> list[Point]:
    """Return full runs with the next seed around the best learning rate of each arm."""
    seed = max((p.spec.seed for p in points), default=0) + 1
    found: list[Point] = []
    for start in (s for s in starts if seed <= s.spec.seed + how.seeds):
        lrs = lrs_around_optimum(_means(start, points, loss), how.n_lrs)
        found += [_at(start, lr, start.spec.steps, seed) for lr in lrs]
    return found


def _is_of(point: Point, start: Point) -> bool:
    """Return whether a run is one of an arm and rank, at any length."""
    same = dataclasses.replace(point.spec, steps=start.spec.steps)
    return point.arm == start.arm and curve_key(Point(point.arm, same)) == curve_key(start)


def _loss(point: Point, loss: Callable[[str], float | None]) -> float:
    found = loss(point.id)
    assert found is not None, "a search goes on when all its runs have finished"
    return found


def _at(start: Point, lr: float, steps: int, seed: int) -> Point:
    return Point(start.arm, dataclasses.replace(start.spec, lr=lr, steps=steps, seed=seed))
