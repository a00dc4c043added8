"""Search learning rates: from the runs that have finished to the next ones.

Short runs over a wide range find the neighbourhood, runs of full length judge, and fresh seeds give
intervals. All functions depend on results alone, so every process that asks gets the same runs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from lorasweep.errors import SpecError
from lorasweep.spec.run import RunSpec, snap_lr
from lorasweep.sweep.grid import Point, around, curve_key, lrs_around_optimum, settings_of
from lorasweep.sweep.question import FINEST, MIN_SHORT, Search

LOWEST, HIGHEST = 1e-8, 10.0
"""Learning rates beyond which a search does not go."""

Losses = dict[float, float]
"""Learning rate -> loss (lower is better); infinity if the run diverged."""


Law = Callable[[RunSpec, RunSpec, float], float | None]
"""(a run, one of another arm, that arm's best learning rate) -> the best learning rate of the run's
arm by the law; None outside its scope."""
Look = tuple[bool, Mapping[str, Sequence[float]]]
"""What the analysis says of finished runs: whether they answer the question, and by the id of a run
the learning rates that its arm still needs: its optimum is at an edge, or has too few around it."""


def search(
    starts: Sequence[Point],
    how: Search,
    loss: Callable[[str], float | None],
    may_begin: Callable[[Sequence[Point], Sequence[Point]], bool],
    look: Callable[[Sequence[Point]], Look],
    law: Law = lambda of, known, lr: None,
) -> list[Point]:
    """Return the runs of a search so far, in the order in which they are trained.

    An arm that the law covers waits for the first arm of LoRA. Then it gets `n_lrs` learning rates
    in full around the prediction. It is searched like the first arm if another search has begun it
    so, or if the best of twice as many is at an end.

    Args:
        starts: a run of full length for each arm, at the learning rate to start from.
        loss: run id -> loss, infinity if the run diverged, None if it has not finished.
        may_begin: whether the budget allows runs (second argument) after others (first argument).
        look: judges finished runs, once the range of all arms is known.
        law: predicts an arm's best learning rate from the one of LoRA's first arm.
    """
    anchor = next((p for p in starts if p.spec.method.name == "lora"), starts[0])
    points: list[Point] = []
    for p in starts:
        if not p.spec.trainer.command and how.short_steps(p.spec.steps) >= p.spec.steps:
            raise SpecError(
                f"steps={p.spec.steps}, sweep.search.prefix={how.prefix}: a search begins with "
                f"shorter runs. Set steps={MIN_SHORT + 1} or more, and a prefix of 2 or more."
            )

    def at(start: Point, lr: float, steps: int, seed: int) -> Point:
        return Point(start.arm, dataclasses.replace(start.spec, lr=lr, steps=steps, seed=seed))

    def done(start: Point, lrs: Iterable[float], steps: int) -> bool:
        return None not in [loss(at(start, lr, steps, start.spec.seed).id) for lr in lrs]

    def losses(runs: Iterable[Point], full: bool = True) -> Losses:
        """Return mean losses of runs of an arm, in full or short, by learning rate."""
        by_lr: dict[float, list[float]] = {}
        for p in (p for p in runs if how.prefix == 1 or full != is_short(p, starts)):
            found = loss(p.id)
            assert found is not None, "a search goes on when all its runs have finished"
            by_lr.setdefault(p.spec.lr, []).append(found)
        return {lr: sum(found) / len(found) for lr, found in by_lr.items()}

    while True:
        by_arm: dict[tuple[str, str], list[Point]] = {}
        for p in points:
            by_arm.setdefault(arm_key(p), []).append(p)
        arms = [(start, by_arm.get(arm_key(start), [])) for start in starts]
        seeds, new = {p.spec.seed for p in points}, list[Point]()
        first = [p for p in by_arm.get(arm_key(anchor), []) if p.spec.seed == anchor.spec.seed]
        known = losses(first)
        unsettled = next_lrs(anchor.spec.lr, losses(first, False), known, how)[0]
        best = None if unsettled else vertex(known)
        for start, own in arms:  # the range of each arm, with its first seed
            steps, seed = start.spec.steps, start.spec.seed
            first = [p for p in own if p.spec.seed == seed]
            full, short = losses(first), losses(first, False)
            guess = law(start.spec, anchor.spec, best or anchor.spec.lr)
            lost = len(seeds) == 1 and len(full) >= 2 * how.n_lrs and _beyond(full, how.fine)
            ready = around(guess, how.n_lrs, how.fine) if guess and not unsettled else []
            wide = around(start.spec.lr, how.n_short, how.wide)
            begun = done(start, wide, how.short_steps(steps)) and not done(start, ready, steps)
            by_law = not lost if full else guess and (best or unsettled) and not begun
            if by_law and start is not anchor and not short:
                narrow = dataclasses.replace(how, wide=how.fine, n_full=how.n_lrs)
                lrs, in_full = next_lrs(0, full, full, narrow)[0] if full else ready, True
            else:  # full runs that short ones did not begin are of the law
                own_full = full if full.keys() & short.keys() else {}
                lrs, in_full = next_lrs(start.spec.lr, short, own_full, how)
            new += [at(start, lr, steps if in_full else how.short_steps(steps), seed) for lr in lrs]
        if not new:
            trained = [(start, own, losses(own)) for start, own in arms]  # live: best not lowest
            live = [one for one in trained if (_beyond(one[2], how.wide) or LOWEST) >= LOWEST]
            if live and (len(seeds) == 1 or len(seeds) >= MIN_SEEDS):
                decided, lrs_of = look(points)
                for start, own, tried in live:  # what the analysis asks for, with all seeds so far
                    ask = {v for p in own for v in lrs_of.get(p.id, ()) if LOWEST < v < HIGHEST}
                    far = [v for v in sorted(ask) if all(max(v / t, t / v) > FINEST for t in tried)]
                    for lr in far[: max(0, how.most_lrs - len(tried))]:
                        so_far = sorted({p.spec.seed for p in own})
                        new += [at(start, lr, start.spec.steps, seed) for seed in so_far]
                if not new and decided and len(seeds) >= MIN_SEEDS:
                    return points
            if not new:  # a fresh seed around the best learning rate of each arm
                seed = max(seeds, default=0) + 1
                for start, _, tried in live:
                    if seed <= start.spec.seed + how.seeds:
                        lrs = lrs_around_optimum(tried, how.n_lrs)
                        new += [at(start, lr, start.spec.steps, seed) for lr in lrs]
        new = [p for p in new if p not in points]
        begins = bool(new) and may_begin(points, new)
        points += new if begins else []
        if not begins or any(loss(p.id) is None for p in new):
            return points


MIN_SEEDS = 3
"""Seeds without which no claim is judged."""


SHARED = ("model", "dataset", "objective", "batch_size", "steps", "seed", "precision", "trainer")
"""Settings in which the arms of a search agree: losses are compared, and seeds paired."""
WORDS = {"fullft": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}
WORDS |= {"olora": "OLoRA", "vera": "VeRA", "oft": "OFT"}
"""Methods in words."""


def arm_key(point: Point) -> tuple[str, str]:
    """Return the key of a run's arm: its name, and all settings but LR, updates and seed."""
    return curve_key(Point(point.arm, dataclasses.replace(point.spec, steps=1)))


def arm_names(starts: Sequence[Point]) -> dict[tuple[str, str], str]:
    """Name arms, by `arm_key`: method, rank, layers, and settings that tell equal names apart."""
    names, settings = dict[tuple[str, str], str](), {arm_key(p): settings_of(p) for p in starts}
    for p in starts:
        m, rank = p.spec.method, getattr(p.spec.method, "rank", None)
        layers = "+".join(m.target_layers())
        name = WORDS.get(m.name, m.name) + f" rank {rank}" * bool(rank)
        names[arm_key(p)] = name + f" on {layers}" * bool(layers)
    for name in dict.fromkeys(names.values()):
        same = [key for key, of in names.items() if of == name]
        for k in (k for k in settings[same[0]] if k not in ("lr", "method")):
            values = {key: settings[key].get(k) for key in same}
            said = {i: f"{v:g}" if isinstance(v, float) else v for i, v in values.items()}
            more = {key: f"{names[key]}, {k} {said[key]}" for key in same}
            if len({*more.values()}) > len({names[key] for key in same}):
                names |= more
    return names


def check_search(points: Sequence[Point]) -> None:
    """Raise SpecError unless a search can start from these runs.

    Arms differ in more than the learning rate, and agree in SHARED. A short run is the beginning of
    the long one only at a constant learning rate.
    """
    specs = [p.spec for p in points]
    for key in SHARED:
        if len(values := dict.fromkeys(getattr(s, key) for s in specs)) > 1:
            shown = ", ".join(str(getattr(v, "name", v)) for v in values)
            raise SpecError(
                "a search is about one model and one data set, and compares methods at "
                f"equal settings: not {key}={shown} together. Give {key} one value."
            )
    arms: dict[str, Point] = {}
    for p in points:
        if (first := arms.setdefault(arm_key(p)[1], p)) is not p:
            raise SpecError(
                f"arms {first.arm} (lr={first.spec.lr:g}) and {p.arm} (lr={p.spec.lr:g}) of a "
                "search differ in the learning rate alone, which it finds itself. Leave one out."
            )
    for s in specs:
        if not s.trainer.command and (s.schedule != "constant" or s.warmup_steps):
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
    search starts. Between the best and its neighbours a gap gets a learning rate if it is wider
    than `fine`, or while fewer than `n_full` losses are finite. The gap towards which losses fall
    comes first: that is the side of the vertex of the parabola in ln(lr) through the three losses.
    """
    if not short:
        return around(centre, how.n_short, how.wide), False
    beyond = _beyond(full or short, how.wide)
    if beyond and beyond < LOWEST:
        return [] if full else [min(short)], True
    if not full:
        return ([beyond], False) if beyond else (lrs_around_optimum(short, how.n_lrs), True)
    if beyond:
        # a short run of nearly this learning rate is the beginning of the full one
        untried = (lr for lr in short if lr not in full)
        near = [lr for lr in untried if abs(math.log(lr / beyond)) < math.log(how.fine) / 2]
        return near or [beyond], True
    lrs = sorted(full)
    at = lrs.index(min(lrs, key=full.__getitem__))
    sides = [k for k in (at - 1, at + 1) if 0 <= k < len(lrs)]
    sides.sort(key=lambda k: abs((full[lrs[k]] - full[lrs[at]]) / math.log(lrs[k] / lrs[at])))
    gaps = [(min(lrs[at], lrs[k]), max(lrs[at], lrs[k])) for k in sides]
    missing = how.n_full - sum(map(math.isfinite, full.values()))
    wide = [gap for gap in gaps if gap[1] / gap[0] > how.fine * 1.1]
    if not wide and missing > 0:
        wide = [gap for gap in gaps if gap[1] / gap[0] > FINEST**2][:missing]
    return [snap_lr(math.sqrt(low * high)) for low, high in wide], True


def vertex(losses: Losses) -> float | None:
    """Return the vertex of the parabola in ln(lr) through the best and its neighbours.

    Beside a diverged run, or on a line, the best one tried. None if the best is at an end.
    """
    lrs = sorted(losses)
    at = lrs.index(min(lrs, key=losses.__getitem__))
    if at in (0, len(lrs) - 1):
        return None
    (a, b, c), (low, best, high) = (
        [math.log(lr / lrs[at]) for lr in lrs[at - 1 : at + 2]],
        [losses[lr] for lr in lrs[at - 1 : at + 2]],
    )
    down, up = (best - low) / (b - a), (high - best) / (c - b)  # slopes on both sides
    if not math.isfinite(up - down) or up <= down:
        return lrs[at]
    return lrs[at] * math.exp((a * up - c * down) / 2 / (up - down))


def _beyond(losses: Losses, factor: float) -> float | None:
    """Return a learning rate beyond the best, if that is at an end; None if it lies inside."""
    lrs = sorted(losses)
    best = min(lrs, key=losses.__getitem__)
    if best not in (lrs[0], lrs[-1]):
        return None
    low = best == lrs[0] or math.isinf(losses[best])
    found = lrs[0] / factor if low else lrs[-1] * factor
    return snap_lr(found) if found <= HIGHEST else None
