"""Speeds that were measured on some hardware: step times by pack size, and finished runs.

Measurements by `action=measure_packs` (RUNS/.calibration) have precedence over this store's
finished runs, which cover only the pack sizes that occurred.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
SAMPLE, RATED_RUNS = 8, 16
"""Runs that are read of each shape, and of each method and precision; spread over the grid."""
FEWEST_STEPS = 5
"""Minimum number of updates of an attempt whose step time is used. The first update is slow."""

Shape = tuple[Any, ...]
Timed = Mapping[Hashable, Sequence[tuple[RunSpec, float]]]
"""(Method, precision) -> finished runs, and the seconds that each took."""


@dataclass(frozen=True)
class Throughput:
    """Step times of one shape."""

    step_s: dict[int, float]
    """Pack size -> seconds per step and run."""
    measured: bool
    """True: measured by action=measure_packs; False: from finished runs."""

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
        """Return the step times of runs like `spec`; None if none are known."""
        shape = shape_of(spec)
        if shape not in self._known:
            step_s: dict[int, float] = {}
            if self._exec.world_size == 1:  # measured in one process
                path = measured_path(self._store.root, spec, self._hardware, self._exec)
                found = (files.read_json(path) or {}).get("step_s", {})
                step_s = {int(n): float(s) for n, s in found.items()}
            self._known[shape] = Throughput(step_s, True) if step_s else self._recorded(shape)
        return self._known[shape]

    @cached_property
    def _by_shape(self) -> dict[Hashable, list[Point]]:
        return _sampled(self._done, shape_of, SAMPLE)

    def _recorded(self, shape: Shape) -> Throughput | None:
        times: dict[int, list[float]] = {}
        for p in self._by_shape.get(shape, ()):
            result, env = self._store.result(p.id) or {}, self._store.env(p.id)
            done, since = result.get("steps_done", 0), env.get("resumed_from_step") or 0
            if result.get("step_s") and done - since >= FEWEST_STEPS and self._comparable(env):
                half = (since + done) / 2  # the runs of the pack that were still training then
                others = ((self._store.result(i) or {}) for i in env["pack"])
                size = sum(other.get("steps_done", math.inf) >= half for other in others)
                times.setdefault(size, []).append(result["step_s"])
        medians = {n: statistics.median(s) for n, s in times.items()}
        return Throughput(medians, False) if times else None

    def _comparable(self, env: dict[str, Any]) -> bool:
        """Return whether an attempt ran on the hardware and with the settings of this plan."""
        hardware, exec_ = self._hardware, self._exec
        # threads per worker when every worker has a pack
        share = (hardware.cores or 1) // hardware.gpus if hardware.gpus else 1
        return (
            bool(env)  # empty if the run was imported
            and hardware.processor is not None
            and (env.get("processor"), env.get("gpu")) == (hardware.processor, hardware.gpu_name)
            and env.get("compile", False) == exec_.compile
            and env.get("processes", 1) == exec_.world_size
            and env.get("threads") == (exec_.threads or max(1, share))
            and exec_.micro_batch_size in (None, env.get("micro_batch_size"))
            and not env.get("resumed_in_other_company")  # the pack changed
        )

    @cached_property
    def timed(self) -> Timed:
        """Finished runs of this store by method and precision, with their seconds."""
        found: dict[Hashable, list[tuple[RunSpec, float]]] = {}
        rated = _sampled(self._done, lambda s: (s.method.name, s.precision), RATED_RUNS)
        for key, points in rated.items():
            for p in points:
                result = self._store.result(p.id) or {}
                if result.get("wall_s") and not result.get("imported"):
                    found.setdefault(key, []).append((p.spec, result["wall_s"]))
        return found

    @property
    def flops_s(self) -> float | None:
        """Operations per second of one worker; None: no run of this store has finished."""
        return _flops_s([run for some in self.timed.values() for run in some])


def _sampled(
    points: Iterable[Point], key: Callable[[RunSpec], Hashable], most: int
) -> dict[Hashable, list[Point]]:
    """Group runs, and choose at most `most` of each group, spread over the grid."""
    groups: dict[Hashable, list[Point]] = {}
    for p in points:
        groups.setdefault(key(p.spec), []).append(p)
    return {k: runs[:: -(-len(runs) // most)] for k, runs in groups.items()}


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
