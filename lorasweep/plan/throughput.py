"""Look up step times by pack size, for runs of one shape on given hardware.

Measurements by `action=measure_packs` (RUNS/.calibration) have precedence over the records of this
store's runs, which cover only the pack sizes that occurred.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

GAIN = 0.96
"""A larger pack counts as faster if its time per step and run is below this share of the time in
the smaller pack. Smaller differences are noise (docs/log)."""
SAMPLE = 8
"""Runs per shape whose records are read."""
FEWEST_STEPS = 5
"""Minimum number of updates of an attempt whose step time is used. The first update is slow."""

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Throughput:
    """Step times of one shape."""

    step_s: dict[int, float]
    """Pack size -> seconds per step and run."""
    measured: bool
    """True: measured by action=measure_packs; False: from the records of runs."""

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


class ThroughputTable:
    """Map shapes to Throughput, reading files at the first lookup of a shape."""

    def __init__(
        self, store: RunStore, hardware: Hardware, exec_: Exec, begun: Iterable[Point] = ()
    ) -> None:
        """Prepare the lookup; `begun`: runs whose records may be read."""
        self._store, self._hardware, self._exec = store, hardware, exec_
        self._begun = list(begun)
        self._by_shape: dict[Shape, list[str]] | None = None
        self._ends: dict[str, float] = {}
        self._known: dict[Shape, Throughput | None] = {}

    def of(self, spec: RunSpec) -> Throughput | None:
        """Return the step times of runs like `spec`; None if none are known."""
        shape = shape_of(spec)
        if shape not in self._known:
            step_s: dict[int, float] = {}
            if self._exec.world_size == 1:  # measured in one process
                path = measured_path(self._store.root, spec, self._hardware, self._exec)
                with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
                    found = json.loads(path.read_bytes())["step_s"]
                    step_s = {int(n): float(s) for n, s in found.items()}
            self._known[shape] = Throughput(step_s, True) if step_s else self._recorded(shape)
        return self._known[shape]

    def _recorded(self, shape: Shape) -> Throughput | None:
        if self._by_shape is None:
            self._by_shape = {}
            for p in self._begun:
                self._by_shape.setdefault(shape_of(p.spec), []).append(p.id)
        ids = self._by_shape.get(shape, [])
        times: dict[int, list[float]] = {}
        for rid in ids[:: -(-len(ids) // SAMPLE) or 1]:  # spread over the grid
            env = self._store.env(rid)
            found = self._step_time(rid, env) if self._comparable(env) else None
            if found:
                step, step_s = found
                # the runs of the pack that were still training
                size = sum(self._end(other) >= step for other in env["pack"])
                times.setdefault(size, []).append(step_s)
        if not times:
            return None
        return Throughput({n: statistics.median(s) for n, s in times.items()}, False)

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

    def _step_time(self, rid: str, env: dict[str, Any]) -> tuple[float, float] | None:
        """Return (an update, seconds per step around it); None if the run made too few updates."""
        since = env.get("resumed_from_step") or 0
        result = self._store.result(rid)
        if result is not None:
            done, step_s = result.get("steps_done", 0), result.get("step_s")
            if step_s is None or done - since < FEWEST_STEPS:
                return None  # it diverged, or this attempt was short
            return (since + done) / 2, step_s
        records = self._store.recent_records(rid)
        recent = [r for r in records if r["step"] > since and "step_s" in r]
        if len(recent) < FEWEST_STEPS:
            return None
        step_s = statistics.median(r["step_s"] for r in recent[1:])
        return recent[len(recent) // 2]["step"], step_s

    def _end(self, rid: str) -> float:
        """Return a run's last step; infinity while it is training."""
        if rid not in self._ends:
            self._ends[rid] = (self._store.result(rid) or {}).get("steps_done", math.inf)
        return self._ends[rid]
