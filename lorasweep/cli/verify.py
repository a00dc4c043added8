"""Train a sample of finished runs again, alone, to check that packing changes no result.

Differences are compared with the noise between seeds. What they mean for a claim is not judged
here.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.streams import stream
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key

NO_FLOOR_NATS = 0.01
"""Difference of the final NLL that counts as different if no setting has two seeds. Assumption:
seeds of the tiny sweep differ by about this (LOG.md)."""


@dataclass(frozen=True)
class Comparison:
    """One run: its recorded result, and its result when trained alone."""

    run: str
    pack_size: int | None
    recorded: float | None
    alone: float | None
    same_state: bool
    curve_difference: float | None
    """Largest difference of the metric (held-out NLL: nats) over the steps where it was taken; None
    if the run diverged."""

    @property
    def difference(self) -> float | None:
        """Final metric alone minus recorded; None for a diverged run."""
        return None if self.recorded is None or self.alone is None else self.alone - self.recorded


@dataclass(frozen=True)
class Report:
    """All comparisons, and the noise between seeds."""

    comparisons: list[Comparison]
    noise_floor: float | None
    """Standard deviation of the final metric between the seeds of a cell, pooled over the sweep's
    cells."""

    def differing(self) -> list[Comparison]:
        """Return the runs that ended differently, or differ by more than the noise."""
        bound = NO_FLOOR_NATS if self.noise_floor is None else self.noise_floor
        return [
            c
            for c in self.comparisons
            if not c.same_state or (c.difference and abs(c.difference) > bound)
        ]

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        rows = [{**asdict(c), "difference": c.difference} for c in self.comparisons]
        return {
            "runs": rows,
            "noise_floor": self.noise_floor,
            "differing": [c.run for c in self.differing()],
        }


def choose(points: Sequence[Point], store: RunStore, count: int) -> list[Point]:
    """Draw `count` finished runs that were trained here, first those that shared a pack.

    The draw is the same each time.
    """
    finished = []
    for p in points:
        result = store.result(p.id)
        if result is not None and not result.get("imported"):
            finished.append((result.get("pack_size", 1) == 1, stream("verify", p.id).random(), p))
    if not finished:
        raise SpecError(
            f"no run of this sweep was trained to the end in {store.root}. Run the sweep first."
        )
    return [p for _, _, p in sorted(finished, key=lambda row: row[:2])[:count]]


def noise_floor(points: Sequence[Point], store: RunStore) -> float | None:
    """Pool the variance of the final measure between seeds over the cells with two or more seeds.

    None if no setting has two seeds.
    """
    cells: dict[tuple[Any, ...], list[float]] = {}
    for p in points:
        result = store.result(p.id) or {}
        if result.get("state") == "done":
            value = result[metric_of(result).name]
            cells.setdefault((*curve_key(p), p.spec.lr), []).append(value)
    repeated = [values for values in cells.values() if len(values) > 1]
    degrees = sum(len(values) - 1 for values in repeated)
    if not degrees:
        return None
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in repeated)
    return math.sqrt(squares / degrees)


def compare_alone(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    count: int,
    show: Callable[[Comparison], None],
) -> Report:
    """Retrain `count` runs alone, with the same threads and micro-batch, and compare."""
    from lorasweep.launch.trainer import TorchTrainer

    trainer, comparisons = TorchTrainer(), []
    for p in choose(points, store, count):
        before = store.result(p.id) or {}
        layout = store.layout(p.id)
        state: str = ""
        final: dict[str, Any] = {}
        for event in trainer([p.spec], dataclasses.replace(exec_, **layout), None):
            if p.id in event.ended:
                state, final = event.ended[p.id]
        name = metric_of(before).name
        pairs = [(a[name], b[name]) for a, b in zip(before["curve"], final["curve"])]
        gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        done = state == before["state"] == "done"
        recorded, alone = (before[name], final[name]) if done else (None, None)
        worst = max(gaps, default=None) if done else None
        comparison = Comparison(
            p.id, before.get("pack_size"), recorded, alone, state == before["state"], worst
        )
        show(comparison)
        comparisons.append(comparison)
    return Report(comparisons, noise_floor(points, store))
