"""What sweeps take on given GPUs: kinds of runs, where each is placed, and the sums.

For hardware whose speeds are known (`Hardware.has_speeds`). Runs that sweeps share count once in a
total.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.plan.flops import mean_length, run_flops
from lorasweep.plan.gpu.placement import FORWARD_TOKENS, Misfit, Placement, place
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.packing import GPU_SIZES
from lorasweep.plan.throughput import Shape, shape_of
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.question import Replicates


@dataclass(frozen=True, eq=False)
class Kind:
    """Runs that cost alike: of one shape and length."""

    spec: RunSpec
    members: int
    """Runs that train together over one base."""
    place: Placement | Misfit
    left_out: bool
    """They need more GPUs than a run may take."""

    @property
    def label(self) -> str:
        """The runs in words."""
        rank = f" rank {self.spec.method.rank}" if hasattr(self.spec.method, "rank") else ""
        return f"{self.spec.method.name}{rank} of {self.spec.model.name}"


@dataclass(frozen=True)
class Forecast:
    """What runs take on some hardware."""

    name: str
    hardware: Hardware
    runs: dict[str, Kind]
    """Each run by its id; a run of the second stage by its curve, seed and place."""
    first: frozenset[str] = frozenset()
    """Those of the first stage."""

    def counts(self) -> Counter[Kind]:
        """Count the runs of each kind."""
        return Counter(self.runs.values())

    def placed(self) -> list[tuple[Kind, Placement, int]]:
        """List the kinds that are trained, with their place and number of runs."""
        return [
            (kind, kind.place, n)
            for kind, n in self.counts().items()
            if isinstance(kind.place, Placement) and not kind.left_out
        ]

    def left_out(self) -> list[tuple[Kind, Placement, int]]:
        """List the kinds that need more GPUs than a run may take."""
        return [
            (kind, kind.place, n)
            for kind, n in self.counts().items()
            if isinstance(kind.place, Placement) and kind.left_out
        ]

    def misfits(self) -> list[tuple[Kind, Misfit, int]]:
        """List the kinds that fit nowhere."""
        return [(k, k.place, n) for k, n in self.counts().items() if isinstance(k.place, Misfit)]

    @property
    def n_runs(self) -> int:
        """Runs that are trained."""
        return sum(n for _, _, n in self.placed())

    @property
    def packs(self) -> int:
        """Packs that they form."""
        return sum(math.ceil(n / kind.members) for kind, _, n in self.placed())

    def jobs(self, work_max_min: float) -> int:
        """Jobs of at most `work_max_min` minutes, or of one longer pack."""
        total = 0
        for kind, where, n in self.placed():
            each = max(1, int(60 * work_max_min / where.seconds))
            total += math.ceil(math.ceil(n / kind.members) / each)
        return total

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the runs that are trained."""
        return sum(hours_of(kind, where, n) for kind, where, n in self.placed())

    @property
    def expert_hours(self) -> float:
        """Those of models with experts, which no published measurement covers."""
        placed = [entry for entry in self.placed() if entry[0].spec.model.n_experts]
        return sum(hours_of(kind, where, n) for kind, where, n in placed)

    @property
    def sampling_hours(self) -> float:
        """Those of sampling answers, which no published measurement covers."""
        return sum(
            hours_of(kind, where, n) * where.sampling_s / where.seconds
            for kind, where, n in self.placed()
        )

    @property
    def tokens(self) -> float:
        """Tokens that they train on."""
        return sum(n * where.tokens / kind.members for kind, where, n in self.placed())

    @property
    def flops(self) -> float:
        """Their operations."""
        return sum(n * run_flops(kind.spec) for kind, _, n in self.placed())

    def stage_hours(self) -> tuple[float, float]:
        """Return the GPU-hours of the first stage and of the second."""
        first = replace(self, runs={k: v for k, v in self.runs.items() if k in self.first})
        return first.gpu_hours, self.gpu_hours - first.gpu_hours


def hours_of(kind: Kind, where: Placement, n: int) -> float:
    """GPU-hours of `n` runs of a kind."""
    return n * where.gpu_hours / kind.members


class Forecaster:
    """Places runs on some hardware. Each kind is placed once."""

    def __init__(self, hardware: Hardware, exec_: Exec) -> None:
        """Prepare for `hardware`, which knows its speeds."""
        self.hardware, self.exec = hardware, exec_
        self._kinds: dict[Shape, Kind] = {}

    def forecast(self, name: str, points: Sequence[Point], second: Replicates) -> Forecast:
        """Return what a sweep takes: its grid, and the fresh seeds of its second stage."""
        runs = {p.id: self.kind(p.spec) for p in points}
        first = frozenset(runs)
        runs |= {key: self.kind(spec) for key, spec in _fresh(points, second)}
        return Forecast(name, self.hardware, runs, first)

    def total(self, parts: Iterable[Forecast]) -> Forecast:
        """Return the sum of forecasts; runs that they share count once."""
        runs: dict[str, Kind] = {}
        for part in parts:
            runs |= part.runs
        return Forecast("total", self.hardware, runs)

    def kind(self, spec: RunSpec) -> Kind:
        """Return the kind of a run.

        Raises:
            SpecError: the hardware's file has no speed for its precision.
        """
        trained = spec.method.n_trainable(spec.model)  # experts share a rank in more than one way
        rows = spec.dataset.canonical  # how many are evaluated, too
        early = spec.early_stopping > 0
        key = (*shape_of(spec), rows, early, spec.steps, spec.schedule, trained)
        if key not in self._kinds:
            self._kinds[key] = self._placed(spec)
        return self._kinds[key]

    def _placed(self, spec: RunSpec) -> Kind:
        if spec.precision not in self.hardware.matmul_flops_s:
            raise SpecError(
                f"hardware {self.hardware.name!r} has no speed in {spec.precision}. Add "
                f"matmul_flops_s.{spec.precision} to its file in conf/hardware."
            )
        rows, most = self.exec.micro_batch_size, self.exec.max_gpus
        given = self.exec.world_size if self.exec.world_size > 1 else None
        ways = (True,) if self.exec.activation_checkpointing else (False, True)
        how: dict[str, Any] = {"checkpointing": ways, "join_rows": self.exec.join_rows}
        alone = place([spec], self.hardware, rows, gpus=given, **how)
        left_out = isinstance(alone, Placement) and most is not None and alone.layout.gpus > most
        if isinstance(alone, Placement):
            # a pack is no reason to compute activations again: it would be slower than its runs
            how["checkpointing"] = (alone.layout.checkpointing,)
        for size in reversed(GPU_SIZES) if self.exec.pack_size is None else [self.exec.pack_size]:
            tokens = size * spec.batch_size * mean_length(spec)
            if size == 1 or spec.method.MAX_PACK == 1 or isinstance(alone, Misfit):
                break
            if alone.layout.gpus > 1:
                break  # several processes train one run at a time
            if tokens > FORWARD_TOKENS and self.exec.pack_size is None:
                continue
            packed = place([spec] * size, self.hardware, rows, gpus=1, **how)
            if isinstance(packed, Placement):
                return Kind(spec, size, packed, left_out)
        return Kind(spec, 1, alone, left_out)


def _fresh(points: Sequence[Point], second: Replicates) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of the second stage: each with a key, and a run that costs the same.

    Which rates they get is not known before the first stage has finished; their number is.
    """
    curves: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        if not second.arms or p.arm in second.arms:
            curves.setdefault(curve_key(p), []).append(p)
    for (_, curve), runs in curves.items():
        rates = len({p.spec.lr for p in runs})
        for seed in sorted(set(second.seeds) - {p.spec.seed for p in runs}):
            for place_ in range(min(second.n_lrs, rates)):
                yield f"{curve} {seed} {place_}", runs[0].spec
