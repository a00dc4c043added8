"""Place runs on hardware: pack size, GPUs, rows per forward pass, memory and time.

One planner for this machine and for a card of the catalogue. Measured speeds override formulas.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    evaluated_completions,
    load_of,
    mean_length,
    run_flops,
    updates_with_evaluations,
)
from lorasweep.plan.memory import Layout, pack_memory
from lorasweep.plan.speeds import Shape, Speeds, shape_of
from lorasweep.plan.time import sampling_s, served_sampling_s, step_parts, step_seconds
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.replicates import expected_second_stage

MEMORY_ERROR, SPEED_ERROR = 0.17, 0.25
"""Nine in ten of the covered published figures have a smaller relative error
(analysis/results/plan/README.md). On a GPU, a pack must fit with the error of memory added."""
MEMORY_SHARE = 0.8
"""Share of the host's memory that all workers without a GPU together may use."""
MOST_GPUS = 512
"""Maximum number of GPUs tried for one run, a power of two."""
SIZES, GPU_SIZES = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64, 128)
"""Pack sizes to choose from without and with GPUs."""
PACK_TOKENS = 4096
"""Maximum tokens per update of a pack without GPUs; larger packs are no faster (docs/log)."""
FORWARD_NUMBERS = 1 << 18
"""Maximum tokens * hidden size per forward pass on a CPU: 1 MiB of fp32 states. With 8 times as
many, which the processor's cache does not hold, SmolLM2 takes 1.5 times as long (docs/log)."""
FORWARD_TOKENS = 32768
"""Maximum tokens per forward pass and GPU, and per update of a pack: more are no faster."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a pack trains, and its expected memory and time."""

    layout: Layout
    memory: dict[str, float]
    """Peak bytes of one process (one GPU) by component."""
    step: dict[str, float]
    """Seconds of an update of all runs in the pack, by component."""
    step_s: float
    seconds: float
    """Seconds of the pack, evaluations included; on a CPU if it had all cores."""
    sampling_s: float
    """The part of `seconds` in which completions are sampled."""
    tokens: float
    """Training tokens of the pack."""
    why: str = ""
    """Why the pack does not fit; empty if it fits."""
    remedy: str = ""
    """What would make it fit."""

    @property
    def memory_bytes(self) -> float:
        """Peak memory of one process (one GPU)."""
        return sum(self.memory.values())

    @property
    def memory_gib(self) -> float:
        """Peak memory of one process (one GPU)."""
        return self.memory_bytes / 2**30


def room_bytes(hardware: Hardware) -> float:
    """Return the memory that a pack may take by plan; infinite if none is known."""
    share = 1 / (1 + MEMORY_ERROR) if hardware.gpus else MEMORY_SHARE
    return math.inf if hardware.worker_gib is None else share * hardware.worker_gib * 2**30


def place(
    spec: RunSpec,
    hardware: Hardware,
    n_runs: int = 1,
    rows: int | None = None,
    *,
    gpus: int | None = 1,
    checkpointing: Sequence[bool] = (False,),
    join_rows: bool = False,
) -> Placement:
    """Choose the fewest GPUs, a power of two, that hold a pack, and the fastest layout on them.

    Without a layout that fits, the one with the least memory is returned, and `why`.

    Args:
        spec: a run of the pack, with the largest rank.
        rows: rows per forward pass, run and process; None: chosen.
        gpus: number of GPUs or processes; None: chosen, a divisor of the batch size.
        checkpointing: the allowed values of activation checkpointing.
        join_rows: see Exec.
    """
    room, length = room_bytes(hardware), spec.dataset.max_length
    powers = (2**k for k in range(MOST_GPUS.bit_length()))
    numbers = [gpus] if gpus else [n for n in powers if spec.batch_size % n == 0]
    for n in numbers:
        share, found = max(1, spec.batch_size // n), []
        if rows is not None:
            tries = [min(rows, share)]
        elif hardware.gpus:
            most = max(1, FORWARD_TOKENS // (n_runs * length))
            tries = [k for k in range(min(share, most), 0, -1) if share % k == 0]
        else:
            most = FORWARD_NUMBERS // spec.model.hidden_size // (n_runs * mean_length(spec))
            tries = [max(1, min(share, most))]
        for again in checkpointing:
            for k in tries:  # the largest that fits
                layout = Layout(n, k, again, share / k, join_rows)
                memory = pack_memory(n_runs, spec, hardware, layout)
                if sum(memory.values()) <= room:
                    found.append(_timed(spec, n_runs, layout, memory, hardware))
                    break
        if found:
            return min(found, key=lambda p: p.step_s)
    least = _timed(spec, n_runs, layout, memory, hardware)
    need = least.memory_gib * (1 + MEMORY_ERROR)
    largest = max(memory, key=lambda name: memory[name])
    why = (
        f"{spec.method.name} of {spec.model.name} takes {need:.0f} GiB a GPU on {layout.gpus} "
        f"GPU(s), {layout.rows} row(s) of {length:,} tokens a forward pass and activations "
        f"{'computed again' if layout.checkpointing else 'kept'} ({largest} "
        f"{memory[largest] / 2**30:.0f} GiB), and {hardware.name} has "
        f"{hardware.worker_gib or 0:.0f} GiB"
    )
    remedy = (
        f"a dataset.max_length below {length}, a batch_size that a larger power of two divides "
        f"({spec.batch_size} given; at most {MOST_GPUS} GPU(s) a run), or a GPU with {need:.0f} GiB"
    )
    if hardware.has_speeds and (gpus or rows):
        other = place(
            spec, hardware, n_runs, gpus=None, checkpointing=(False, True), join_rows=join_rows
        )
        if not other.why:
            again_too = " exec.activation_checkpointing=true" * other.layout.checkpointing
            rows, gpus = other.layout.rows, other.layout.gpus
            remedy = f"exec.world_size={gpus} exec.micro_batch_size={rows}{again_too}"
    return replace(least, why=why, remedy=remedy)


def _timed(
    spec: RunSpec, n_runs: int, layout: Layout, memory: dict[str, float], hardware: Hardware
) -> Placement:
    """Return the placement of a layout, with its times."""
    load, length = load_of(spec.model, spec.method), mean_length(spec)
    step = step_parts(load, layout, length, hardware, spec.precision, n_runs)
    step_s, updates, evaluated = step_seconds(step), updates_with_evaluations(spec), 0.0

    def drawn_s(completions: int, group: int) -> float:
        return sampling_s(load, spec, hardware, n_runs, layout.gpus, completions, group)

    if spec.max_new_tokens:
        step["sampling"] = drawn_s(spec.batch_size, spec.group_size)
        step_s += step["sampling"]
    if draws := evaluated_completions(spec):
        updates, evaluated = float(spec.steps), sum(drawn_s(n, 1) for n in draws)
    return Placement(
        layout=layout,
        memory=memory,
        step=step,
        step_s=step_s,
        seconds=step_s * updates + evaluated,
        sampling_s=step.get("sampling", 0.0) * spec.steps + evaluated,
        tokens=float(n_runs * spec.steps * spec.batch_size * length),
    )


# ---------------------------------------------------------------- kinds of runs


@dataclass(frozen=True, eq=False)
class Kind:
    """Runs of one shape and length, which cost the same."""

    spec: RunSpec
    pack_size: int
    place: Placement
    left_out: bool
    """Whether the runs need more GPUs than exec.max_gpus."""

    @property
    def label(self) -> str:
        """The runs in words."""
        rank = f" rank {self.spec.method.rank}" if hasattr(self.spec.method, "rank") else ""
        return f"{self.spec.method.name}{rank} of {self.spec.model.name}"

    @property
    def trains(self) -> bool:
        """Whether the runs fit, and on few enough GPUs."""
        return not (self.place.why or self.left_out)

    @property
    def hours(self) -> float:
        """GPU-hours of one run; without a GPU, hours of the whole machine."""
        return self.place.seconds * self.place.layout.gpus / self.pack_size / 3600


class Planner:
    """Plans runs for some hardware. Each kind of run is placed once."""

    def __init__(self, hardware: Hardware, exec_: Exec, speeds: Speeds | None = None) -> None:
        """Prepare for `hardware`; `speeds`: what was measured on it."""
        self.hardware, self.exec, self.speeds = hardware, exec_, speeds
        self._kinds: dict[Shape, Kind] = {}

    def place(self, spec: RunSpec, n_runs: int = 1, like: Placement | None = None) -> Placement:
        """Place a pack with the user's settings; the others are chosen if speeds are computed.

        `like`: placement of one run whose GPUs and checkpointing the pack has too.
        """
        e, choose = self.exec, self.hardware.has_speeds
        gpus = None if choose and e.world_size == 1 else e.world_size
        ways = (True,) if e.activation_checkpointing else (False, True) if choose else (False,)
        if like is not None:
            # a pack that recomputes activations would be slower than its runs one by one
            gpus, ways = like.layout.gpus, (like.layout.checkpointing,)
        how: dict[str, Any] = {"checkpointing": ways, "join_rows": e.join_rows}
        return place(spec, self.hardware, n_runs, e.micro_batch_size, gpus=gpus, **how)

    def kind(self, spec: RunSpec) -> Kind:
        """Return the kind of a run; SpecError: no speed is known for the precision of the run."""
        # not given by the rank alone: experts may share parts of an adapter
        trained = spec.method.n_trainable(spec.model)
        rows = (spec.dataset.canonical, spec.test_rows)  # with the numbers of evaluated rows
        early = spec.early_stopping > 0
        key = (*shape_of(spec), rows, early, spec.steps, spec.schedule, trained)
        if key not in self._kinds:
            hardware, most = self.hardware, self.exec.max_gpus
            if hardware.has_speeds and spec.precision not in hardware.matmul_flops_s:
                raise SpecError(
                    f"hardware {hardware.name!r} has no speed in {spec.precision}. Add "
                    f"matmul_flops_s.{spec.precision} to its file in conf/hardware."
                )
            where = self.place(spec)
            size = self._pack_size(spec, where)
            if size > 1:
                where = self.place(spec, size, where)
            left_out = most is not None and not where.why and where.layout.gpus > most
            self._kinds[key] = Kind(spec, size, where, left_out)
        return self._kinds[key]

    def _pack_size(self, spec: RunSpec, alone: Placement) -> int:
        """Return the largest number of runs like `spec` in a pack.

        The first of these that applies: the method's limit, the user's choice, the fastest
        measured size if it fits into the memory, the largest of usual size that fits.
        """
        e, hardware = self.exec, self.hardware
        if spec.method.MAX_PACK is not None or alone.layout.gpus > 1:
            return spec.method.MAX_PACK or 1  # several processes train one run at a time
        if e.pack_size is not None and not hardware.has_speeds:
            return e.pack_size
        sizes, most = (GPU_SIZES, FORWARD_TOKENS) if hardware.gpus else (SIZES, PACK_TOKENS)
        tokens = spec.batch_size * mean_length(spec)
        some = [e.pack_size] if e.pack_size else [n for n in sizes if n * tokens <= most]

        def fits(n_runs: int) -> bool:
            return n_runs == 1 or not self.place(spec, n_runs, alone).why

        default = next((n for n in reversed(some) if fits(n)), 1)
        found = self.speeds.of(spec) if self.speeds and e.pack_size is None else None
        best = found.best_size() if found else default
        return best if best <= default or fits(best) else default

    def forecast(self, points: Sequence[Point], second: Replicates) -> list[dict[str, Kind]]:
        """Return run id -> kind, of the runs and then of each fresh seed of the second stage.

        The second stage has the learning rates of `expected_second_stage`.
        """
        fresh = expected_second_stage(points, second)
        stages = [points, *([p for p in fresh if p.spec.seed == s] for s in second.seeds)]
        return [{p.id: self.kind(p.spec) for p in stage} for stage in stages]

    # ------------------------------------------------------------ before runs start

    def without_too_large(self, points: Sequence[Point]) -> list[Point]:
        """Return the runs that need no more GPUs than exec.max_gpus."""
        return [p for p in points if not self.kind(p.spec).left_out]

    def settings(self, points: Sequence[Point]) -> list[tuple[Exec, list[Point]]]:
        """Group runs by the settings that the plan chooses if the user set none.

        The settings are world_size, pack_size, micro_batch_size and activation_checkpointing.
        Without `Hardware.has_speeds` none is chosen.

        Raises:
            SpecError: runs fit on no number of GPUs; the message names them, and what would help.
        """
        if not self.hardware.has_speeds:
            return [(self.exec, list(points))]
        groups: dict[tuple[Any, ...], list[Point]] = {}
        for point in points:
            kind = self.kind(point.spec)
            layout = kind.place.layout
            key = (layout.gpus, kind.pack_size, layout.rows, layout.checkpointing)
            groups.setdefault(key, []).append(point)
        misfits = dict.fromkeys(k.place for p in points if (k := self.kind(p.spec)).place.why)
        if misfits:
            head = "these runs do not fit with the given settings, and nothing was started:"
            lines = (f"  {where.why}. It fits with {where.remedy}." for where in misfits)
            advice = (
                "  Or choose larger GPUs (hardware=...), or leave the runs out: exec.max_gpus=N, "
                "~sweep.arms.NAME or sweep.axes.model=[...]."
            )
            raise SpecError("\n".join([head, *lines, advice]))
        names = ("world_size", "pack_size", "micro_batch_size", "activation_checkpointing")
        found = [
            (replace(self.exec, **dict(zip(names, key))), some) for key, some in groups.items()
        ]
        if problems := [problem for chosen, _ in found for problem in chosen.problems()]:
            raise SpecError("\n".join(problems))
        return found


def costs(
    name: str, runs: Mapping[str, Kind], hardware: Hardware, work_max_min: float
) -> dict[str, Any]:
    """Return the costs of runs (id -> kind) as JSON values; `work_max_min`: the longest job."""
    counts = Counter(runs.values())
    trained = [(kind, n) for kind, n in counts.items() if kind.trains]
    placed = [kind.place for kind, _ in trained]

    def total(value: Callable[[Kind], float]) -> float:
        return sum(n * value(kind) for kind, n in trained)

    def packs(kind: Kind, n: int) -> int:
        return math.ceil(n / kind.pack_size)

    def jobs(kind: Kind, n: int) -> int:  # at most work_max_min of packs, or one longer pack
        return math.ceil(packs(kind, n) / max(1, int(60 * work_max_min / kind.place.seconds)))

    def served(kind: Kind) -> float:  # the least, if an engine on the same GPUs sampled
        where, seconds = kind.place, kind.place.seconds - kind.place.sampling_s
        engine = served_sampling_s(kind.spec, hardware, where.layout.gpus)
        return kind.hours * (seconds + kind.pack_size * engine) / where.seconds

    def cost(hours: float) -> float | None:
        return None if hardware.price_per_gpu_h is None else hours * hardware.price_per_gpu_h

    def ends(values: Sequence[float]) -> list[float] | None:
        return [min(values), max(values)] if values else None

    hours = total(lambda k: k.hours)
    largest = max((p.layout.gpus for p in placed), default=1)
    return {
        "name": name,
        "runs": sum(n for _, n in trained),
        "packs": sum(packs(*entry) for entry in trained),
        "jobs": sum(jobs(*entry) for entry in trained),
        "gpus_a_run": ends([p.layout.gpus for p in placed]),
        "micro_batch": ends([p.layout.rows for p in placed]),
        "memory_gib": max((p.memory_gib for p in placed), default=None),
        "tokens": total(lambda k: k.place.tokens / k.pack_size),
        "flops": total(lambda k: run_flops(k.spec)),
        "tokens_s": ends([p.tokens / p.seconds / p.layout.gpus for p in placed]),
        "gpu_hours": hours,
        # no published measurement covers models with experts or sampling
        "gpu_hours_by_formulas_alone": total(lambda k: k.hours * bool(k.spec.model.n_experts)),
        "gpu_hours_of_sampling": total(lambda k: k.hours * k.place.sampling_s / k.place.seconds),
        "gpu_hours_with_serving_engine": total(served),
        # on all GPUs of the hardware, or on the GPUs of the largest run if these are more
        "days": hours / 24 / max(hardware.gpus, largest),
        "cost_usd": cost(hours),
        "fits": not any(kind.place.why for kind in counts),
        "left_out": [
            {
                "kind": kind.label,
                "runs": n,
                "gpus_a_run": kind.place.layout.gpus,
                "gpu_hours": n * kind.hours,
                "cost_usd": cost(n * kind.hours),
            }
            for kind, n in counts.items()
            if kind.left_out
        ],
        "misfits": [
            {"kind": kind.label, "runs": n, "why": kind.place.why, "remedy": kind.place.remedy}
            for kind, n in counts.items()
            if kind.place.why
        ],
    }
