"""Train finished runs again, alone, and compare: a sample of a sweep, or one run for its weights.

Differences are compared with the noise between seeds. What they mean for a claim is not judged
here.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch.trainer import Trainer
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store.checkpoint import State
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.tracking import provenance

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

    def within(self, bound: float) -> bool:
        """Return whether both trainings ended alike, with final metrics at most `bound` apart."""
        return self.same_state and (self.difference is None or abs(self.difference) <= bound)


@dataclass(frozen=True)
class Report:
    """All comparisons, and the noise between seeds."""

    comparisons: list[Comparison]
    noise_floor: float | None
    """Standard deviation of the final metric between the seeds of a cell, pooled over the sweep's
    cells."""

    def differing(self) -> list[Comparison]:
        """Return the runs that ended differently, or differ by more than the noise."""
        bound = largest_difference(self.noise_floor)
        return [c for c in self.comparisons if not c.within(bound)]

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


def largest_difference(floor: float | None) -> float:
    """Return the largest difference of the final metric that counts as noise, from noise_floor."""
    return NO_FLOOR_NATS if floor is None else floor


def train_again(
    spec: RunSpec, store: RunStore, exec_: Exec, trainer: Trainer
) -> tuple[Comparison, State, dict[str, Any]]:
    """Train a finished run again, alone, with the threads and micro-batch that it had.

    Returns how it compares, its state at the end, and its result.

    Raises:
        TrainingError: the data or the base are others than those of the finished run.
    """
    before = store.result(spec.id) or {}
    state = ""
    final: dict[str, Any] = {}
    at_end: State = {"tensors": {}, "meta": {}}
    for event in trainer([spec], dataclasses.replace(exec_, **store.layout(spec.id)), None):
        if spec.id in event.ended:
            state, final = event.ended[spec.id]
            _check_same_inputs(spec.id, before, final)
            at_end = event.snapshot()[spec.id]
    name = metric_of(before).name
    pairs = [(a[name], b[name]) for a, b in zip(before["curve"], final["curve"])]
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    done = state == before["state"] == "done"
    recorded, alone = (before[name], final[name]) if done else (None, None)
    worst = max(gaps, default=None) if done else None
    same = state == before["state"]
    comparison = Comparison(spec.id, before.get("pack_size"), recorded, alone, same, worst)
    return comparison, at_end, final


def _check_same_inputs(rid: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, what in (("data_sha256", "other data"), ("base_sha256", "another base")):
        then, here = before.get(key), now.get(key)
        if then and here and then != here:
            raise TrainingError(
                f"run {rid} was trained on {what} (fingerprint {then}) than is there now ({here}), "
                "so it cannot be trained again. Get back what it was trained on."
            )


def changed_circumstances(rid: str, store: RunStore, backend: str) -> list[str]:
    """List what differs between a run's recorded attempt and a training here, alone.

    Each is a phrase, such as 'torch 2.9.0 then, 2.13.0 now'. `backend`: that of the training here.
    """
    env, result = store.env(rid), store.result(rid) or {}
    if not env:
        return ["the run was imported: where it was trained is not recorded here"]
    here = provenance.environment()
    pairs = {
        "processor": (env["processor"], here["processor"]),
        "GPU": (env.get("gpu"), next((gpu.name for gpu in detect.gpus()), None)),
        "backend": (env.get("backend", backend), backend),
        "lorasweep": (env["lorasweep"], here["lorasweep"]),
    }
    for name in ("torch", "transformers"):
        pairs[name] = (env["packages"].get(name), here["packages"][name])
    found = [
        f"{name} {then or 'none'} then, {now or 'none'} now"
        for name, (then, now) in pairs.items()
        if then != now
    ]
    if result.get("pack_size", 1) > 1:
        found.append(f"a pack of {result['pack_size']} runs then, alone now")
    if env.get("resumed_from_step"):
        found.append("the run was interrupted and resumed")
    return found


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
        comparison, _, _ = train_again(p.spec, store, exec_, trainer)
        show(comparison)
        comparisons.append(comparison)
    return Report(comparisons, noise_floor(points, store))
