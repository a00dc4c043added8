"""Plan a sweep: place runs on hardware, group the missing ones into packs, estimate the cost.

A place: pack size, GPUs, rows per forward pass, memory and time. One planner for this machine and
for a card of the catalogue. Speeds of finished runs override formulas. No run is started.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import (
    Layout,
    checkpoint_bytes,
    evaluated_completions,
    load_of,
    mean_length,
    pack_memory,
    run_flops,
    sampling_s,
    step_parts,
    step_seconds,
    train_flops,
)
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import FINISHED, STATES, RunStore
from lorasweep.sweep.grid import Point, expected_second_stage
from lorasweep.sweep.question import Replicates

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
"""Maximum tokens per update of a pack without GPUs; more are no faster (docs/log/2026-11-28.md)."""
FORWARD_NUMBERS = 1 << 18
"""Maximum tokens * hidden size per forward pass on a CPU: 1 MiB of fp32 states. SmolLM2 takes 1.5
times as long with 8 times as many: the cache does not hold them (docs/log/2026-11-28.md)."""
FORWARD_TOKENS = 32768
"""Maximum tokens per forward pass and GPU, and per update of a pack: more are no faster."""
RATED_RUNS = 16
"""Finished runs that are read of each method and precision, spread over the grid."""
LIKE_LENGTH = 2.0
"""Largest ratio of row lengths in a pack without GPUs: shorter rows are padded to the longest, and
a smaller pack is hardly slower (docs/log/2026-11-28.md)."""
MOST_WORKERS = 8
"""Maximum number of workers by default, without GPUs. Assumption: a laptop stays usable."""
ALONE = ("model", "dataset", "method", "lr", "seed", "steps", "early_stopping")
"""Fields that may differ between the runs of a pack, or that `pack_key` compares separately."""

# ---------------------------------------------------------------- speeds of finished runs

Speeds = Mapping[tuple[str, str] | None, float]
"""(Method, precision), and None for all -> operations per second of finished runs."""


def speeds_of(done: Iterable[Point], store: RunStore) -> Speeds:
    """Return the speeds of finished runs, each on one worker; empty if none has a time."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for p in done:
        groups.setdefault((p.spec.method.name, p.spec.precision), []).append(p)
    flops, seconds = Counter[Any](), Counter[Any]()
    for key, runs in groups.items():
        for p in runs[:: -(-len(runs) // RATED_RUNS)]:
            result = store.result(p.id) or {}
            if result.get("wall_s") and not result.get("imported"):
                for k in (key, None):
                    flops[k] += run_flops(p.spec)  # type: ignore[assignment]
                    seconds[k] += result["wall_s"]
    return {k: flops[k] / seconds[k] for k in flops}


def seconds_at(speeds: Speeds, todo: Iterable[RunSpec]) -> float:
    """Return the expected seconds of runs on one worker."""
    kinds = ((s, (s.method.name, s.precision)) for s in todo)
    return sum(run_flops(s) / speeds.get(k, speeds[None]) for s, k in kinds)


# ---------------------------------------------------------------- places


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
) -> Placement:
    """Choose the fewest GPUs, a power of two, that hold a pack, and the fastest layout on them.

    Without a layout that fits, the one with the least memory is returned, and `why`.

    Args:
        spec: a run of the pack, with the largest rank.
        rows: rows per forward pass, run and process; None: chosen.
        gpus: number of GPUs or processes; None: chosen, a divisor of the batch size.
        checkpointing: the allowed values of activation checkpointing.
    """
    length, mean = spec.dataset.max_length, mean_length(spec)
    load = load_of(spec.model, spec.method)

    def timed(layout: Layout, memory: dict[str, float]) -> Placement:
        step = step_parts(load, layout, mean, hardware, spec.precision, n_runs)
        step_s, evaluated = step_seconds(step), 0.0
        updates = spec.steps * run_flops(spec) / train_flops(spec)  # evaluations as updates
        how = (spec, hardware, n_runs, layout.gpus)
        if spec.max_new_tokens:
            step["sampling"] = sampling_s(*how, spec.batch_size, spec.group_size)
            step_s += step["sampling"]
        if draws := evaluated_completions(spec):
            updates, evaluated = float(spec.steps), sum(sampling_s(*how, n, 1) for n in draws)
        return Placement(
            layout=layout,
            memory=memory,
            step=step,
            step_s=step_s,
            seconds=step_s * updates + evaluated,
            sampling_s=step.get("sampling", 0.0) * spec.steps + evaluated,
            tokens=float(n_runs * spec.steps * spec.batch_size * mean),
        )

    room, powers = room_bytes(hardware), (2**k for k in range(MOST_GPUS.bit_length()))
    for n in [gpus] if gpus else [n for n in powers if spec.batch_size % n == 0]:
        share, found = max(1, spec.batch_size // n), []
        if rows is not None:
            tries = [min(rows, share)]
        elif hardware.gpus:
            most = max(1, FORWARD_TOKENS // (n_runs * length))
            tries = [k for k in range(min(share, most), 0, -1) if share % k == 0]
        else:
            most = FORWARD_NUMBERS // spec.model.hidden_size // (n_runs * mean)
            tries = [max(1, min(share, most))]
        for again in checkpointing:
            for k in tries:  # the largest that fits
                layout = Layout(n, k, again, share / k)
                memory = pack_memory(n_runs, spec, hardware, layout)
                if sum(memory.values()) <= room:
                    found.append(timed(layout, memory))
                    break
        if found:
            return min(found, key=lambda p: p.step_s)
    least = timed(layout, memory)
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
        remedy = f"a larger exec.world_size, a smaller exec.micro_batch_size, {remedy}"
    return replace(least, why=why, remedy=remedy)


# ---------------------------------------------------------------- kinds of runs


@dataclass(frozen=True, eq=False)
class Kind:
    """Runs of one shape and length, which cost the same."""

    spec: RunSpec
    pack_size: int
    place: Placement

    @property
    def hours(self) -> float:
        """GPU-hours of one run; without a GPU, hours of the whole machine."""
        return self.place.seconds * self.place.layout.gpus / self.pack_size / 3600


class Planner:
    """Plans runs for some hardware. Each kind of run is placed once."""

    def __init__(self, hardware: Hardware, exec_: Exec) -> None:
        """Prepare for `hardware`."""
        self.hardware, self.exec = hardware, exec_
        self._kinds: dict[tuple[Any, ...], Kind] = {}

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
        rows, gpus = e.micro_batch_size, 1 if spec.method.LIBRARY else gpus
        return place(spec, self.hardware, n_runs, rows, gpus=gpus, checkpointing=ways)

    def kind(self, spec: RunSpec) -> Kind:
        """Return the kind of a run; SpecError: no speed is known for the precision of the run."""
        method, data = spec.method, spec.dataset.canonical
        key = (
            *(spec.model.canonical, data, spec.test_rows, spec.batch_size, spec.precision),
            *(spec.objective, spec.group_size, spec.max_new_tokens, spec.steps, spec.schedule),
            *(spec.early_stopping > 0, method.name),
            *(getattr(method, name, None) for name in ("layers", "scope", "rank")),
            # not given by the rank alone: experts may share parts of an adapter
            method.n_trainable(spec.model),
        )
        if key not in self._kinds:
            hardware = self.hardware
            if hardware.has_speeds and spec.precision not in hardware.matmul_flops_s:
                raise SpecError(
                    f"hardware {hardware.name!r} has no speed in {spec.precision}. Add "
                    f"matmul_flops_s.{spec.precision} to its file in conf/hardware."
                )
            where, e = self.place(spec), self.exec
            alone = spec.trainer.command or where.layout.gpus > 1
            if spec.method.MAX_PACK is not None or alone:
                size = spec.method.MAX_PACK or 1  # several processes train one run at a time
            elif e.pack_size is not None and not hardware.has_speeds:
                size = e.pack_size
            else:  # the largest of usual size that fits
                limit = FORWARD_TOKENS if hardware.gpus else PACK_TOKENS
                sizes = GPU_SIZES if hardware.gpus else SIZES
                tokens = spec.batch_size * mean_length(spec)
                some = [e.pack_size] if e.pack_size else [n for n in sizes if n * tokens <= limit]
                fits = (n for n in reversed(some) if n == 1 or not self.place(spec, n, where).why)
                size = next(fits, 1)
            if size > 1:
                where = self.place(spec, size, where)
            self._kinds[key] = Kind(spec, size, where)
        return self._kinds[key]

    def forecast(self, points: Sequence[Point], second: Replicates) -> dict[str, Kind]:
        """Return run id -> kind, of the runs and of the second stage (`expected_second_stage`)."""
        return {p.id: self.kind(p.spec) for p in [*points, *expected_second_stage(points, second)]}

    def without_too_large(self, points: Sequence[Point]) -> list[Point]:
        """Return the runs that need no more GPUs than exec.max_gpus, or fit nowhere."""
        most, places = self.exec.max_gpus or math.inf, [self.kind(p.spec).place for p in points]
        return [p for p, w in zip(points, places) if w.why or w.layout.gpus <= most]

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
        misfits: dict[Placement, None] = {}
        for point in points:
            kind = self.kind(point.spec)
            layout = kind.place.layout
            key = (layout.gpus, kind.pack_size, layout.rows, layout.checkpointing)
            groups.setdefault(key, []).append(point)
            misfits |= {kind.place: None} if kind.place.why else {}
        if misfits:
            raise SpecError(
                "these runs do not fit with the given settings, and nothing was started:\n"
                + "".join(f"  {w.why}. It fits with {w.remedy}.\n" for w in misfits)
                + "  Or choose larger GPUs (hardware=...), or leave the runs out: "
                "~sweep.arms.NAME or sweep.axes.model=[...]."
            )
        names = ("world_size", "pack_size", "micro_batch_size", "activation_checkpointing")
        return [(replace(self.exec, **dict(zip(names, k))), some) for k, some in groups.items()]


# ---------------------------------------------------------------- packs and plans


@dataclass(frozen=True)
class Pack:
    """Runs that train together."""

    points: list[Point]
    micro_batch_size: int
    """Rows per run and forward pass."""
    flops: float
    memory_bytes: float
    """Expected peak memory of the pack's process."""


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep by state, and the work that is left."""

    points: list[Point]
    states: dict[str, str]
    todo: list[Point]
    packs: list[Pack]
    workers: int
    threads: int
    flops: float
    hours: float
    basis: str
    """Source of `hours`: 'measured' (finished runs of this store) or 'assumed' (formulas)."""
    checkpoint_gib: float
    """Disk space for the packs that train at the same time."""
    memory_gib: float
    """Expected peak memory of all workers together."""
    hardware: Hardware
    speeds: Speeds


def make_plan(points: Sequence[Point], store: RunStore, exec_: Exec, hardware: Hardware) -> Plan:
    """Read the store and plan the missing runs, and with exec.retry failed ones, for `hardware`."""
    points = list(points)
    states = store.states(p.id for p in points)
    failed = [p.id for p in points if states[p.id] == "failed"] if exec_.retry else []
    again = {i for i in failed if store.failures(i) < exec_.max_attempts}
    todo = [p for p in points if p.id in again or states[p.id] not in (*FINISHED, "failed")]
    speeds = speeds_of((p for p in points if states[p.id] == "done"), store)
    planner = Planner(hardware, exec_)
    packs = make_packs([p for p in todo if states[p.id] != "running"], states, store, planner)
    # One process per GPU; without GPUs one per core, as far as memory allows. Measured: two
    # one-thread workers finish 1.5 times as many small runs as one two-thread worker.
    cores, size = hardware.cores or 1, exec_.world_size
    most = max(1, (hardware.gpus or min(cores, MOST_WORKERS)) // size)
    if not hardware.gpus and packs:
        need = size * max(pack.memory_bytes for pack in packs)
        most = int(min(most, max(1, room_bytes(hardware) // need)))
    workers = exec_.workers or max(1, min(most, len(packs) or 1))
    threads = exec_.threads or max(1, cores // (size * min(workers, max(1, len(packs)))))
    if speeds and hardware.processor is not None:  # else the plan is for another machine
        hours, basis = seconds_at(speeds, (p.spec for p in todo)) / workers / 3600, "measured"
    else:
        hours, basis = sum(planner.kind(p.spec).hours for p in todo), "assumed"
        hours /= hardware.gpus if hardware.has_speeds else 1
    largest = sorted(packs, key=lambda pack: -pack.memory_bytes)[:workers]
    return Plan(
        points=points,
        states=states,
        todo=todo,
        packs=packs,
        workers=workers,
        threads=threads,
        flops=sum(run_flops(p.spec) for p in todo),
        hours=hours,
        basis=basis,
        checkpoint_gib=checkpoint_bytes(p.spec for k in largest for p in k.points) / 2**30,
        memory_gib=sum(pack.memory_bytes for pack in largest) / 2**30,
        hardware=hardware,
        speeds=speeds,
    )


def summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values: counts by state, arms, and cost."""
    arms: dict[tuple[str, str, int], dict[str, Any]] = {}
    for p in plan.points:
        method, model = p.spec.method, p.spec.model
        trained = method.n_trainable(model)
        names = {"arm": p.arm, "model": model.name, "method": method.name}
        arm = {**names, "rank": getattr(method, "rank", None), "n_trainable": trained, "runs": 0}
        arms.setdefault((p.arm, model.name, trained), arm)["runs"] += 1
    keys = ("flops", "hours", "basis", "workers", "threads", "checkpoint_gib", "memory_gib")
    cost = {"packs": len(plan.packs), **{key: getattr(plan, key) for key in keys}}
    values = list(plan.states.values())
    counts = {s: values.count(s) for s in STATES if s in values}
    runs = {"total": len(plan.points), "todo": len(plan.todo), **counts}
    return {"runs": runs, "arms": list(arms.values()), "cost": cost}


def pack_key(spec: RunSpec) -> tuple[Any, ...]:
    """Return the key that all runs of one pack share.

    The runs may differ in lr, seed, steps, early stopping and the method's packed fields. With sft
    they may also differ in the data set, but not in exact_loss.
    """
    apart = (*spec.method.PACKED_FIELDS, *ALONE)
    method = tuple(v for k, v in spec.method.values() if k not in apart)
    rest = tuple(v for k, v in spec.values() if k not in apart)
    data = spec.dataset.exact_loss if spec.objective == "sft" else spec.dataset.canonical
    return (spec.model.canonical, data, method, rest)


def make_packs(
    todo: Sequence[Point], states: dict[str, str], store: RunStore, planner: Planner
) -> list[Pack]:
    """Group runs into packs, longest first.

    Runs with a checkpoint keep their pack, so that they resume bit for bit. The runs of one rank
    and data set share a pack with others only if they fill less than half a pack.
    """
    exec_, hardware = planner.exec, planner.hardware
    groups: dict[tuple[Any, ...], list[Point]] = {}
    resumed: dict[tuple[str, ...], list[Point]] = {}
    for p in todo:
        folder = store.folder(p.id) / "checkpoint"
        layout = () if states[p.id] == "missing" else checkpoint.layout(folder)
        if layout and exec_.world_size == 1:
            resumed.setdefault(layout, []).append(p)
        else:
            apart = (p.spec.dataset.canonical, _rank(p))
            groups.setdefault((pack_key(p.spec), apart), []).append(p)
    chunks = [sorted(runs, key=lambda p: layout.index(p.id)) for layout, runs in resumed.items()]
    total = sum(run_flops(p.spec) for p in todo)
    all_workers = exec_.workers or hardware.gpus or hardware.cores or 1

    def split(runs: list[Point], size: int) -> list[list[Point]]:
        """Split into packs of nearly equal size (7 and 7, not 8 and 6), enough for all workers."""
        if exec_.pack_size is None:
            # these runs get the share of the workers that matches their share of the operations
            share = all_workers * sum(run_flops(p.spec) for p in runs) / total
            size = min(size, -(-len(runs) // max(1, int(share + 1e-9))))
        size = -(-len(runs) // -(-len(runs) // size))
        packs: list[list[Point]] = [[]]
        # the runs of one data set stay together: they may have the first update in common
        for _, of_data in groupby(runs, key=lambda p: p.spec.dataset.canonical):
            own = list(of_data)
            if len(own) < size < len(packs[-1]) + len(own):
                packs.append([])
            for p in own:
                if len(packs[-1]) == size:
                    packs.append([])
                packs[-1].append(p)
        return packs

    small: dict[tuple[Any, ...], list[Point]] = {}
    for (key, _), runs in groups.items():
        size = planner.kind(runs[0].spec).pack_size
        if 2 * len(runs) < size:
            small.setdefault((key, size), []).extend(runs)
        else:
            chunks += split(runs, size)
    for (_, size), runs in small.items():
        # Runs of one rank must be neighbours. Equal row lengths need less padding. With equal steps
        # the pack stays full longer.
        runs.sort(key=lambda p: (_rank(p), mean_length(p.spec), p.spec.steps))
        alike, shortest, longest = list[list[Point]](), 0, 0
        for p in runs:
            length = mean_length(p.spec)
            shortest, longest = min(shortest, length), max(longest, length)
            if alike and (hardware.gpus or longest <= LIKE_LENGTH * shortest):
                alike[-1].append(p)
            else:
                alike.append([p])
                shortest = longest = length
        chunks += [chunk for some in alike for chunk in split(some, size)]
    packs = []
    for points in chunks:  # placed with the largest rank, the longest rows, and early stopping
        spec, n = max(points, key=_rank).spec, len(points)
        long = max((p.spec for p in points), key=mean_length)
        if mean_length(long) != mean_length(spec):
            spec = replace(spec, dataset=long.dataset)
        spec = replace(spec, early_stopping=max(p.spec.early_stopping for p in points))
        where = planner.place(spec, n, planner.kind(spec).place if n > 1 else None)
        flops = sum(run_flops(p.spec) for p in points)
        packs.append(Pack(points, where.layout.rows, flops, where.memory_bytes))
    return sorted(packs, key=lambda pack: -pack.flops)


def _rank(point: Point) -> int:
    return getattr(point.spec.method, "rank", 0)


def costs(
    name: str, runs: Mapping[str, Kind], hardware: Hardware, work_max_min: float
) -> dict[str, Any]:
    """Return the costs of runs (id -> kind) as JSON values; `work_max_min`: the longest job."""
    counts = Counter(runs.values())
    trained = [(kind, n) for kind, n in counts.items() if not kind.place.why]
    placed = [kind.place for kind, _ in trained]
    packs = [(kind, math.ceil(n / kind.pack_size)) for kind, n in trained]
    # at most work_max_min of packs, or one longer pack
    jobs = (math.ceil(n / max(1, int(60 * work_max_min / k.place.seconds))) for k, n in packs)
    misfits = list[dict[str, Any]]()
    price = hardware.price_per_gpu_h
    for k, n in counts.items():
        where, method = k.place, k.spec.method
        rank = f" rank {method.rank}" if hasattr(method, "rank") else ""
        if where.why:
            of_kind = {"kind": f"{method.name}{rank} of {k.spec.model.name}", "runs": n}
            misfits.append({**of_kind, "why": where.why, "remedy": where.remedy})

    def total(value: Callable[[Kind], float]) -> float:
        return sum(n * value(kind) for kind, n in trained)

    def ends(values: Sequence[float]) -> list[float] | None:
        return [min(values), max(values)] if values else None

    hours = total(lambda k: k.hours)
    largest = max((p.layout.gpus for p in placed), default=1)
    return {
        "name": name,
        "runs": sum(n for _, n in trained),
        "packs": sum(n for _, n in packs),
        "jobs": sum(jobs),
        "gpus_a_run": ends([p.layout.gpus for p in placed]),
        "micro_batch": ends([p.layout.rows for p in placed]),
        "memory_gib": max((p.memory_gib for p in placed), default=None),
        "tokens": total(lambda k: k.place.tokens / k.pack_size),
        "flops": total(lambda k: run_flops(k.spec)),
        "tokens_s": ends([p.tokens / p.seconds / p.layout.gpus for p in placed]),
        "gpu_hours": hours,
        "gpu_hours_of_sampling": total(lambda k: k.hours * k.place.sampling_s / k.place.seconds),
        # on all GPUs of the hardware, or on the GPUs of the largest run if these are more
        "days": hours / 24 / max(hardware.gpus, largest),
        "cost_usd": None if price is None else hours * price,
        "misfits": misfits,
    }
