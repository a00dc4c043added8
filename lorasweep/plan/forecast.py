"""Forecast sweeps on GPUs with a data sheet: place each kind of run, and add up the costs.

Before runs start, also choose their settings, and leave out or refuse runs that are too large.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import mean_length
from lorasweep.plan.packing import GPU_SIZES
from lorasweep.plan.placement import FORWARD_TOKENS, Misfit, Placement, place
from lorasweep.plan.throughput import Shape, shape_of
from lorasweep.plan.time import served_sampling_s
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.replicates import expected_second_stage


@dataclass(frozen=True, eq=False)
class Kind:
    """Runs of one shape and length, which cost the same."""

    spec: RunSpec
    pack_size: int
    place: Placement | Misfit
    left_out: bool
    """Whether the runs need more GPUs than exec.max_gpus."""

    @property
    def label(self) -> str:
        """The runs in words."""
        rank = f" rank {self.spec.method.rank}" if hasattr(self.spec.method, "rank") else ""
        return f"{self.spec.method.name}{rank} of {self.spec.model.name}"


Placed = tuple[Kind, Placement, int]
"""A kind, its placement, and its number of runs."""


@dataclass(frozen=True)
class Forecast:
    """The costs of runs on some hardware."""

    name: str
    hardware: Hardware
    runs: dict[str, Kind]
    """Run id -> kind. Second-stage runs have the learning rates of `expected_second_stage`."""
    stages: tuple[frozenset[str], ...] = ()
    """Ids of the runs of the first stage, then of those that each fresh seed adds."""

    def counts(self) -> Counter[Kind]:
        """Count the runs of each kind."""
        return Counter(self.runs.values())

    def placed(self, left_out: bool = False) -> list[Placed]:
        """List the kinds that are trained, or with `left_out` those that need too many GPUs."""
        return [
            (kind, kind.place, n)
            for kind, n in self.counts().items()
            if isinstance(kind.place, Placement) and kind.left_out == left_out
        ]

    def misfits(self) -> list[tuple[Kind, Misfit, int]]:
        """List the kinds that fit on no number of GPUs."""
        return [(k, k.place, n) for k, n in self.counts().items() if isinstance(k.place, Misfit)]

    @property
    def n_runs(self) -> int:
        """Number of runs that are trained."""
        return sum(n for _, _, n in self.placed())

    @property
    def packs(self) -> int:
        """Number of packs of the runs that are trained."""
        return sum(math.ceil(n / kind.pack_size) for kind, _, n in self.placed())

    def jobs(self, work_max_min: float) -> int:
        """Count the jobs; each has at most `work_max_min` minutes of packs, or one longer pack."""
        total = 0
        for kind, where, n in self.placed():
            each = max(1, int(60 * work_max_min / where.seconds))
            total += math.ceil(math.ceil(n / kind.pack_size) / each)
        return total

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the runs that are trained."""
        return sum(hours_of(*entry) for entry in self.placed())

    @property
    def tokens(self) -> float:
        """Training tokens of the runs that are trained."""
        return sum(n * where.tokens / kind.pack_size for kind, where, n in self.placed())

    def with_fresh(self, n: int) -> "Forecast":
        """Return the part of the first stage and of the first `n` fresh seeds."""
        stages = self.stages[: 1 + n]
        return replace(self, runs={i: self.runs[i] for s in stages for i in s}, stages=stages)

    def hours_by_run(self) -> dict[str, float]:
        """Return run id -> GPU-hours, of the runs that are trained."""
        each = {kind: hours_of(kind, where, 1) for kind, where, _ in self.placed()}
        return {i: each[kind] for i, kind in self.runs.items() if kind in each}

    def served_hours(self) -> float:
        """Return the least GPU-hours if a serving engine on the same GPUs sampled completions."""
        total = 0.0
        for kind, where, n in self.placed():
            gpus = where.layout.gpus
            engine = kind.pack_size * served_sampling_s(kind.spec, self.hardware, gpus)
            seconds = where.seconds - where.sampling_s + engine
            total += hours_of(kind, where, n) * seconds / where.seconds
        return total


def hours_of(kind: Kind, where: Placement, n: int) -> float:
    """Return the GPU-hours of `n` runs of a kind."""
    return n * where.gpu_hours / kind.pack_size


class Forecaster:
    """Places runs on some hardware. Each kind is placed once."""

    def __init__(self, hardware: Hardware, exec_: Exec) -> None:
        """Prepare for `hardware`, whose speeds must be known (`Hardware.has_speeds`)."""
        self.hardware, self.exec = hardware, exec_
        self._kinds: dict[Shape, Kind] = {}

    def forecast(self, name: str, points: Sequence[Point], second: Replicates) -> Forecast:
        """Forecast a sweep: its grid, and the fresh seeds of its second stage."""
        fresh = expected_second_stage(points, second)
        runs = {p.id: self.kind(p.spec) for p in (*points, *fresh)}
        seeds = [frozenset(p.id for p in fresh if p.spec.seed == s) for s in second.seeds]
        return Forecast(name, self.hardware, runs, (frozenset(p.id for p in points), *seeds))

    def total(self, parts: Iterable[Forecast]) -> Forecast:
        """Return the sum of forecasts; shared runs count once."""
        runs: dict[str, Kind] = {}
        for part in parts:
            runs |= part.runs
        return Forecast("total", self.hardware, runs)

    def kind(self, spec: RunSpec) -> Kind:
        """Return the kind of a run; SpecError: no speed is known for the precision of the run."""
        # not given by the rank alone: experts may share parts of an adapter
        trained = spec.method.n_trainable(spec.model)
        rows = (spec.dataset.canonical, spec.test_rows)  # with the numbers of evaluated rows
        early = spec.early_stopping > 0
        key = (*shape_of(spec), rows, early, spec.steps, spec.schedule, trained)
        if key not in self._kinds:
            self._kinds[key] = self._make_kind(spec)
        return self._kinds[key]

    def kinds(self, points: Iterable[Point]) -> list[Kind]:
        """List the kinds of runs, each once."""
        return list(dict.fromkeys(self.kind(p.spec) for p in points))

    def _make_kind(self, spec: RunSpec) -> Kind:
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
        if isinstance(alone, Misfit):
            return Kind(spec, 1, alone, False)
        left_out = most is not None and alone.layout.gpus > most
        if spec.method.MAX_PACK == 1 or alone.layout.gpus > 1:
            return Kind(spec, 1, alone, left_out)  # several processes train one run at a time
        # a pack that recomputes activations would be slower than its runs one by one
        how["checkpointing"] = (alone.layout.checkpointing,)
        asked = self.exec.pack_size
        for size in reversed(GPU_SIZES[1:]) if asked is None else [asked] if asked > 1 else []:
            if asked is None and size * spec.batch_size * mean_length(spec) > FORWARD_TOKENS:
                continue
            packed = place([spec] * size, self.hardware, rows, gpus=1, **how)
            if isinstance(packed, Placement):
                return Kind(spec, size, packed, left_out)
        return Kind(spec, 1, alone, left_out)


# ---------------------------------------------------------------- before runs start


def without_too_large(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> list[Point]:
    """Return the runs that need no more GPUs than exec.max_gpus."""
    planner = Forecaster(hardware, exec_)
    return [p for p in points if not planner.kind(p.spec).left_out]


def settings_of(
    points: Sequence[Point], hardware: Hardware, exec_: Exec
) -> list[tuple[Exec, list[Point]]]:
    """Group runs by the settings that the plan chooses if the user set none.

    The settings are world_size, pack_size, micro_batch_size and activation_checkpointing. Without
    `Hardware.has_speeds` none is chosen.

    Raises:
        SpecError: runs fit on no number of GPUs; the message names them, and what would help.
    """
    if not hardware.has_speeds:
        return [(exec_, list(points))]
    planner = Forecaster(hardware, exec_)
    _refuse(kind.place for kind in planner.kinds(points))
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        kind = planner.kind(point.spec)
        assert isinstance(kind.place, Placement)
        layout = kind.place.layout
        key = (layout.gpus, kind.pack_size, layout.rows, layout.checkpointing)
        groups.setdefault(key, []).append(point)
    names = ("world_size", "pack_size", "micro_batch_size", "activation_checkpointing")
    found = [(replace(exec_, **dict(zip(names, key))), some) for key, some in groups.items()]
    _refuse(problem for chosen, _ in found for problem in chosen.problems())
    return found


def refuse_unfit(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> None:
    """Raise SpecError if runs do not fit with these settings; the message says what would help."""
    how: dict[str, Any] = {"gpus": exec_.world_size, "join_rows": exec_.join_rows}
    how["checkpointing"] = (exec_.activation_checkpointing,)
    kinds = Forecaster(hardware, exec_).kinds(points)
    _refuse(place([kind.spec], hardware, exec_.micro_batch_size, **how) for kind in kinds)


def _refuse(problems: Iterable[Placement | Misfit | str]) -> None:
    lines = [f"  {problem}" for problem in problems if not isinstance(problem, Placement)]
    if lines:
        head = "these runs do not fit with the given settings, and nothing was started:"
        advice = (
            "  Or choose larger GPUs (hardware=...), or leave the runs out: exec.max_gpus=N, "
            "~sweep.arms.NAME or sweep.axes.model=[...]."
        )
        raise SpecError("\n".join([head, *lines, advice]))
