"""Measured speeds: step times by pack size (action=measure_packs), and those of finished runs."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import run_flops
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

GAIN = 0.96
"""A larger pack counts as faster if its time per step and run is below this share of the time in
the smaller pack. Smaller differences are noise (docs/log)."""
RATED_RUNS = 16
"""Finished runs that are read of each method and precision, spread over the grid."""

Shape = tuple[Any, ...]
Timed = Mapping[tuple[str, str], Sequence[tuple[RunSpec, float]]]
"""(Method, precision) -> finished runs, and the seconds that each took."""


@dataclass(frozen=True)
class Throughput:
    """Step times of one shape, measured by action=measure_packs."""

    step_s: dict[int, float]
    """Pack size -> seconds per step and run."""

    def best_size(self) -> int:
        """Return the fastest pack size; of two that differ by noise, the smaller."""
        best = min(self.step_s)
        for size in sorted(self.step_s):
            if self.step_s[size] < GAIN * self.step_s[best]:
                best = size
        return best

    def at(self, size: int) -> float:
        """Return the seconds per step and run at `size`, or at the next smaller known size."""
        return self.step_s[max((n for n in self.step_s if n <= size), default=min(self.step_s))]


def shape_of(spec: RunSpec) -> Shape:
    """Return the settings that determine the time of a step; of text data only max_length."""
    method = spec.method
    layers, scope, rank = (getattr(method, name, None) for name in ("layers", "scope", "rank"))
    fields = [method.name, layers, scope, rank, spec.batch_size, spec.precision]
    if spec.objective != "sft":  # files of earlier versions name no objective
        fields += [spec.objective, spec.group_size, spec.max_new_tokens]
    data = spec.dataset
    rows = data.canonical if data.source == "synthetic" else data.max_length
    return (spec.model.canonical, rows, *fields)


def measured_path(root: Path, spec: RunSpec, hardware: Hardware, exec_: Exec) -> Path:
    """Return the file for measurements of this shape on this hardware and software."""
    model, rows, *fields = shape_of(spec)
    machine = [hardware.processor, hardware.cores, [hardware.gpu_name] * hardware.gpus]
    software = [metadata.version("torch"), lorasweep.__version__]
    where = [*machine, *software, exec_.micro_batch_size, exec_.compile]
    text = json.dumps([model, rows, fields, where])
    return root / ".calibration" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class Speeds:
    """What was measured on some hardware with some settings; files are read at the first use."""

    def __init__(
        self, store: RunStore, hardware: Hardware, exec_: Exec, done: Iterable[Point] = ()
    ) -> None:
        """Prepare the lookup; `done`: finished runs that may be read."""
        self._store, self._hardware, self._exec = store, hardware, exec_
        self._done, self._known = list(done), dict[Shape, Throughput | None]()

    def of(self, spec: RunSpec) -> Throughput | None:
        """Return the step times of runs like `spec`; None if none were measured."""
        if self._exec.world_size > 1:  # measured in one process
            return None
        shape = shape_of(spec)
        if shape not in self._known:
            path = measured_path(self._store.root, spec, self._hardware, self._exec)
            found = (files.read_json(path) or {}).get("step_s", {})
            step_s = {int(n): float(s) for n, s in found.items()}
            self._known[shape] = Throughput(step_s) if step_s else None
        return self._known[shape]

    @cached_property
    def timed(self) -> Timed:
        """Finished runs of this store, with their seconds."""
        groups: dict[tuple[str, str], list[Point]] = {}
        for p in self._done:
            groups.setdefault((p.spec.method.name, p.spec.precision), []).append(p)
        found: dict[tuple[str, str], list[tuple[RunSpec, float]]] = {}
        for key, runs in groups.items():
            for p in runs[:: -(-len(runs) // RATED_RUNS)]:
                result = self._store.result(p.id) or {}
                if result.get("wall_s") and not result.get("imported"):
                    found.setdefault(key, []).append((p.spec, result["wall_s"]))
        return found

    @property
    def flops_s(self) -> float | None:
        """Operations per second of one worker; None: no run of this store has finished."""
        return _flops_s([run for some in self.timed.values() for run in some])


def _flops_s(runs: Sequence[tuple[RunSpec, float]]) -> float | None:
    seconds = sum(s for _, s in runs)
    return sum(run_flops(spec) for spec, _ in runs) / seconds if runs else None


def measured_seconds(todo: Iterable[RunSpec], timed: Timed) -> float:
    """Return the expected seconds of `todo` on one worker, at the speeds of finished runs.

    Runs of other methods or precisions are expected at the mean speed of all finished runs.
    """
    overall = _flops_s([run for some in timed.values() for run in some])
    speeds = {key: _flops_s(some) for key, some in timed.items()}
    found = ((s, speeds.get((s.method.name, s.precision)) or overall) for s in todo)
    return sum(run_flops(spec) / speed for spec, speed in found if speed)
