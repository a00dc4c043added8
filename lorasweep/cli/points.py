"""Collect the runs of a sweep: its grid, second stage, and added rounds."""

from lorasweep.spec.metric import metric_of
from lorasweep.store import looks
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.replicates import added_points, second_stage
from lorasweep.sweep.request import Request


def all_points(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of the grid, of the second stage of finished curves, and of added rounds."""
    if request.parts:
        return list({p.id: p for part in request.parts for p in all_points(part, store)}.values())
    points = list(request.points)
    if request.sweep is None:
        return points
    if request.sweep.replicate.seeds:
        results = {p.id: store.result(p.id) or {} for p in points}
        unfinished = {curve_key(p) for p in points if not results[p.id]}
        over = [p for p in points if curve_key(p) not in unfinished]

        def loss(rid: str) -> float | None:
            metric = metric_of(results[rid])
            value = metric.value(results[rid])
            if value is None or results[rid].get("state") != "done":
                return None
            return metric.loss(value)

        points += second_stage(over, request.sweep.replicate, loss)
    rounds = looks.read(looks.path_of(store.root, request.title))
    return points + added_points(rounds, points)


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
