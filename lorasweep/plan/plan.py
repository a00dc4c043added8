"""Plan a sweep: list finished and missing runs, group them into packs, and estimate the cost.

No run is started.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    checkpoint_bytes,
    mean_length,
    run_flops,
    updates_with_evaluations,
)
from lorasweep.plan.planner import Planner, Speeds, room_bytes, step_s_at
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import FINAL, STATES, RunStore
from lorasweep.sweep.grid import Point

LIKE_LENGTH = 2.0
"""Largest ratio of row lengths in a pack without GPUs: shorter rows are padded to the longest, and
a smaller pack is hardly slower (docs/log)."""
MOST_WORKERS = 8
"""Maximum number of workers by default, without GPUs. Assumption: a laptop stays usable."""


@dataclass(frozen=True)
class Pack:
    """Runs that train together."""

    points: list[Point]
    micro_batch_size: int
    """Rows per run and forward pass."""
    flops: float
    seconds: float | None
    """Expected seconds on one worker; None: no step times of this shape were measured."""
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
    """Source of `hours`: 'measured' (finished runs of this store), 'calibrated' (step times of
    these shapes), or 'assumed' (formulas)."""
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
    todo = [p for p in points if p.id in again or states[p.id] not in (*FINAL, "failed")]
    speeds = Speeds(store, hardware, exec_, (p for p in points if states[p.id] == "done"))
    planner = Planner(hardware, exec_, speeds)
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
    times = [pack.seconds for pack in packs if pack.seconds is not None]
    if speeds.finished and hardware.processor is not None:  # else the plan is for another machine
        hours, basis = speeds.seconds(p.spec for p in todo) / workers / 3600, "measured"
    elif packs and len(times) == len(packs):
        hours, basis = max(sum(times) / workers, *times) / 3600, "calibrated"
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
    """Return the plan as JSON values: counts by state, arms, packs, and cost."""
    arms: dict[tuple[str, str, int], dict[str, Any]] = {}
    for p in plan.points:
        method, model = p.spec.method, p.spec.model
        trained = method.n_trainable(model)
        names = {"arm": p.arm, "model": model.name, "method": method.name}
        arm = {**names, "rank": getattr(method, "rank", None), "n_trainable": trained, "runs": 0}
        arms.setdefault((p.arm, model.name, trained), arm)["runs"] += 1
    packs = [
        {
            "runs": len(p.points),
            "method": p.points[0].spec.method.name,
            "micro_batch_size": p.micro_batch_size,
            "expected_s": p.seconds,
        }
        for p in plan.packs
    ]
    keys = ("flops", "hours", "basis", "workers", "threads", "checkpoint_gib", "memory_gib")
    cost = {"packs": len(plan.packs), **{key: getattr(plan, key) for key in keys}}
    values = list(plan.states.values())
    counts = {s: values.count(s) for s in STATES if s in values}
    runs = {"total": len(plan.points), "todo": len(plan.todo), **counts}
    return {"runs": runs, "arms": list(arms.values()), "packs": packs, "cost": cost}


# ---------------------------------------------------------------- packs

ALONE = ("model", "dataset", "method", "lr", "seed", "steps", "early_stopping")
"""Fields that may differ between the runs of a pack, or that `pack_key` compares separately."""


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
        alike: list[list[Point]] = []
        for p in runs:
            lengths = [mean_length(q.spec) for q in [*alike[-1], p]] if alike else []
            if lengths and (hardware.gpus or max(lengths) <= LIKE_LENGTH * min(lengths)):
                alike[-1].append(p)
            else:
                alike.append([p])
        chunks += [chunk for some in alike for chunk in split(some, size)]
    packs = []
    for points in chunks:  # placed with the largest rank, the longest rows, and early stopping
        spec, n = max(points, key=_rank).spec, len(points)
        longest = max((p.spec for p in points), key=mean_length)
        if mean_length(longest) != mean_length(spec):
            spec = replace(spec, dataset=longest.dataset)
        spec = replace(spec, early_stopping=max(p.spec.early_stopping for p in points))
        found, seconds = planner.speeds and planner.speeds.of(spec), None
        if found:
            updates = sum(updates_with_evaluations(p.spec) for p in points)
            seconds = step_s_at(found, n) * updates
        where = planner.place(spec, n, planner.kind(spec).place if n > 1 else None)
        flops = sum(run_flops(p.spec) for p in points)
        packs.append(Pack(points, where.layout.rows, flops, seconds, where.memory_bytes))
    return sorted(packs, key=lambda pack: -pack.flops)


def _rank(point: Point) -> int:
    return getattr(point.spec.method, "rank", 0)
