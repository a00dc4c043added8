"""Collect the runs of a sweep: its grid, second stage, and added rounds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lorasweep.advise.evidence import published
from lorasweep.advise.rules.rates import family_of, law_rate
from lorasweep.cli import answer
from lorasweep.fleet.outcome import with_further
from lorasweep.plan.budget import parse_budget
from lorasweep.spec.metric import metric_of
from lorasweep.store import looks
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from lorasweep.sweep.grid import Point, curve_key, fields_of
from lorasweep.sweep.question import axes_of
from lorasweep.sweep.replicates import added_points, second_stage
from lorasweep.sweep.request import Request, question
from lorasweep.sweep.search import Look, is_short, search


def all_points(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of the grid, of the second stage of finished curves, and of added rounds.

    For a fleet: the trials so far, and the runs that are measured on test rows.
    """
    if request.parts:
        return list({p.id: p for part in request.parts for p in all_points(part, store)}.values())
    points = list(request.points)
    if request.members:
        return with_further(points, store, go_on="rates" not in request.given)
    if request.sweep is None:
        return points
    if request.sweep.search is not None:
        return _searched(request, store)
    if request.sweep.replicate.seeds:
        results = {p.id: store.result(p.id) or {} for p in points}
        unfinished = {curve_key(p) for p in points if not results[p.id]}
        over = [p for p in points if curve_key(p) not in unfinished]

        points += second_stage(over, request.sweep.replicate, lambda rid: final_loss(results[rid]))
    rounds = looks.read(looks.path_of(store.root, request.title))
    return points + added_points(rounds, points)


def final_loss(result: Mapping[str, Any], on_validation: bool = False) -> float | None:
    """Return a run's final metric as a loss, lower is better; None if the run diverged."""
    metric = metric_of(result)
    value = result.get(metric.on_part) if on_validation else metric.value(result)
    return metric.loss(value) if value is not None and result.get("state") == "done" else None


def judged(request: Request, points: Sequence[Point]) -> list[Point]:
    """Return the runs that the analysis judges: all but the short runs of a search."""
    return [p for p in points if not (is_search(request) and is_short(p, request.points))]


def is_search(request: Request) -> bool:
    """Return whether the sweep searches learning rates."""
    return request.sweep is not None and request.sweep.search is not None


def _searched(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of a search so far, within its budget."""
    assert request.sweep is not None and request.sweep.search is not None
    results = cache(store.result)
    budget = parse_budget(request.budget, request.points[0].spec.steps)

    def loss(rid: str) -> float | None:
        result = results(rid)
        if result is None:
            return None
        found = final_loss(result, on_validation=request.points[0].spec.dataset.n_validation > 0)
        return math.inf if found is None else found

    def may_begin(known: Sequence[Point], new: Sequence[Point]) -> bool:
        return budget is None or budget.allows(new, known, store)

    def look(points: Sequence[Point]) -> Look:
        ids = tuple(p.id for p in judged(request, points))
        key = (request.title, *ids)
        if key not in _LOOKS:
            _LOOKS[key] = Look(*answer.look(load_runs(store.root, ids), question(request)))
        return _LOOKS[key]

    arms = request.sweep.arms
    starts = [
        start_of(p, "lr" in request.given or "lr" in fields_of(axes_of(arms.get(p.arm, {}))))
        for p in request.points
    ]
    return search(starts, request.sweep.search, loss, may_begin, look)


_LOOKS: dict[tuple[str, ...], Look] = {}
"""(title, run ids) -> the analysis of these finished runs, for the time of a command."""


def start_of(point: Point, at_own: bool = False) -> Point:
    """Return the run at the published learning rate for its method and width.

    `at_own`: the user has set the learning rate; keep it.
    """
    if at_own:
        return point
    spec = point.spec
    kind = "lora" if spec.method.name == "lora" else "full"
    families = [family_of(spec.model)] if family_of(spec.model) else ["llama", "qwen"]
    laws = [law_rate(published(), str(f), spec.model.hidden_size, kind) for f in families]
    lr = math.prod(law for law in laws if law) ** (1 / len(laws))
    return Point(point.arm, dataclasses.replace(spec, lr=lr))


def qualifying(points: list[Point]) -> list[Point]:
    """Choose the runs that show whether a task is suitable.

    For each model, data set, batch size and number of updates, these are the runs of full
    fine-tuning of all weights, and of the LoRA with most parameters.
    """
    groups: dict[tuple[str, str, int, int], dict[str, list[Point]]] = {}
    for p in points:
        s = p.spec
        whole = getattr(s.method, "scope", "all") == "all"
        if s.schedule == "constant" and s.precision != "fp64" and whole:
            arms = groups.setdefault((s.model.name, s.dataset.name, s.batch_size, s.steps), {})
            arms.setdefault(s.method.name, []).append(p)
    chosen = []
    for arms in groups.values():
        chosen += arms.get("fullft", [])
        lora = arms.get("lora", [])
        if lora:
            best = max(lora, key=lambda p: p.spec.method.n_trainable(p.spec.model)).spec.method
            chosen += [p for p in lora if p.spec.method == best]
    return chosen
