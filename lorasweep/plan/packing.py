"""What is done, what is missing, what it will cost, and which runs share a pack. Starts nothing; no
torch."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.plan import flops as cost
from lorasweep.plan import hardware as machine
from lorasweep.plan import throughput as calibrate
from lorasweep.plan.flops import run_flops
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec, part_json
from lorasweep.store import checkpoint
from lorasweep.store.run_store import FINAL, STATES, RunStore
from lorasweep.sweep.grid import Point

ASSUMED_FLOPS_PER_CORE = {"fp32": 6e10, "bf16": 2.5e11, "fp64": 2e10}
"""Floating-point operations a second and core by precision, used until something was measured here.
Assumption: what tiny128 (fp32) and SmolLM2-135M (bf16) reached on one core with matrix units
(LOG.md)."""
SLOW_BF16_FLOPS_PER_CORE = 7e8
"""The same for bf16 on a processor without instructions for it. Measured on AVX2 (LOG.md)."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that the workers may take together."""


@dataclass(frozen=True)
class Pack:
    """Runs that train together, and how."""

    points: list[Point]
    micro_batch_size: int
    """Rows a member and forward."""
    flops: float
    seconds: float | None
    """Expected on one worker; None: this shape was not measured on this machine."""


@dataclass
class Plan:
    """A sweep's runs by state, and what is left to do."""

    points: list[Point]
    states: dict[str, str]
    todo: list[Point]
    packs: list[Pack]
    workers: int
    threads: int
    flops: float
    hours: float
    basis: str
    """Where `hours` comes from: 'measured' (this store's finished runs), 'calibrated', or
    'assumed'."""
    checkpoint_gib: float
    """Disk that the checkpoints of the running packs may take."""
    memory_gib: float
    """Memory that the workers are expected to take together at their peak."""

    def counts(self) -> dict[str, int]:
        """Count the runs by state."""
        values = list(self.states.values())
        return {s: values.count(s) for s in STATES if s in values}


def make_plan(points: Sequence[Point], store: RunStore, exec_: Exec) -> Plan:
    """Look at the store and plan what is missing. Failed runs are left alone unless exec.retry is
    set."""
    points = list(points)
    states = store.states(p.id for p in points)
    skip = set(FINAL) if exec_.retry else {*FINAL, "failed"}
    todo = [p for p in points if states[p.id] not in skip]
    if exec_.retry:
        todo = [
            p for p in todo if states[p.id] != "failed" or store.failures(p.id) < exec_.max_attempts
        ]
    packs = make_packs([p for p in todo if states[p.id] != "running"], store, exec_, states)
    workers, threads = machine_split(packs, exec_)
    flops = sum(run_flops(p.spec) for p in todo)
    seconds, basis = _seconds(points, states, store, packs, flops, workers)
    busiest = sorted(packs, key=_pack_bytes, reverse=True)[:workers]
    disk = sum(p.spec.method.n_trainable(p.spec.model) for pack in busiest for p in pack.points)
    return Plan(
        points,
        states,
        todo,
        packs,
        workers,
        threads,
        flops,
        seconds / 3600,
        basis,
        disk * cost.CHECKPOINT_BYTES * 2 / 2**30,
        sum(map(_pack_bytes, busiest)) / 2**30,
    )


def to_calibrate(points: Sequence[Point], states: dict[str, str], exec_: Exec) -> list[RunSpec]:
    """List one spec of each shape that is worth measuring: several runs of it are to do, and they
    take far longer than the measurement. Nothing where the user has chosen the pack size."""
    if exec_.pack_size is not None:
        return []
    groups: dict[str, list[RunSpec]] = {}
    for p in points:
        if states[p.id] == "missing":
            groups.setdefault(calibrate.kind(p.spec, exec_), []).append(p.spec)
    worth = 8 * calibrate.BUDGET_S * ASSUMED_FLOPS_PER_CORE[points[0].spec.precision]
    total = sum(run_flops(s) for specs in groups.values() for s in specs)
    if bf16_is_slow(points):  # a measurement alone would take many minutes
        return []
    return [specs[0] for specs in groups.values() if len(specs) > 1 and total > worth]


def measured_flops(
    points: Sequence[Point], states: dict[str, str], store: RunStore
) -> float | None:
    """Return the operations a second of one worker, by this store's finished runs; None if none was
    trained here."""
    rates = []
    for p in [p for p in points if states[p.id] == "done"][:16]:
        result = store.result(p.id) or {}
        if result.get("wall_s") and not result.get("imported"):
            rates.append(run_flops(p.spec) / result["wall_s"])
    return statistics.median(rates) if rates else None


def _seconds(
    points: list[Point],
    states: dict[str, str],
    store: RunStore,
    packs: list[Pack],
    flops: float,
    workers: int,
) -> tuple[float, str]:
    """Return the expected time of what is left, and what the expectation rests on."""
    rate = measured_flops(points, states, store)
    if rate:
        return flops / (rate * workers), "measured"
    if packs and all(pack.seconds is not None for pack in packs):
        times = [pack.seconds or 0.0 for pack in packs]
        return max(sum(times) / workers, max(times)), "calibrated"
    precision = points[0].spec.precision if points else "fp32"
    rate = SLOW_BF16_FLOPS_PER_CORE if bf16_is_slow(points) else ASSUMED_FLOPS_PER_CORE[precision]
    return flops / (rate * machine.cores()), "assumed"


def bf16_is_slow(points: Sequence[Point]) -> bool:
    """Say whether these runs ask for bf16 of a processor that has none, with no GPU to do it."""
    return (
        bool(points)
        and points[0].spec.precision == "bf16"
        and not machine.gpus()
        and machine.slow_bf16()
    )


# ---------------------------------------------------------------- packs


def pack_key(spec: RunSpec) -> tuple[Any, ...]:
    """Runs with the same key may share a pack: they differ in lr, seed, steps and the method's
    packed fields only."""
    method = tuple(v for k, v in vars(spec.method).items() if k not in spec.method.PACKED_FIELDS)
    rest = tuple(
        v
        for k, v in vars(spec).items()
        if k not in ("model", "dataset", "method", "lr", "seed", "steps")
    )
    return (part_json(spec.model), part_json(spec.dataset), method, rest)


def pack_size(spec: RunSpec, exec_: Exec) -> int:
    """Return how many runs like `spec` share a pack at most: the user's choice, else what was
    measured to pay on this machine, else as many as one forward holds tokens for
    (calibrate.FORWARD_TOKENS)."""
    if spec.method.MAX_PACK is not None:
        return spec.method.MAX_PACK
    if exec_.pack_size is not None:
        return exec_.pack_size
    speed = calibrate.known(spec, exec_)
    if speed is not None:
        return speed.best_size()
    tokens = spec.batch_size * cost.mean_length(spec)
    wanted = [n for n in calibrate.sizes() if n == 1 or n * tokens <= calibrate.forward_tokens()]
    bound = MEMORY_SHARE * calibrate.worker_bytes()
    return max((n for n in wanted if _bytes(n, spec, exec_) < bound), default=1)


def make_packs(
    todo: Sequence[Point], store: RunStore, exec_: Exec, states: dict[str, str]
) -> list[Pack]:
    """Group runs that may share a pack; longest first. Runs with a checkpoint stay with the company
    that they had, so that they continue bit for bit. Ranks are mixed only where one alone fills
    less than half a pack."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    resumed: dict[tuple[str, ...], list[Point]] = {}
    for p in todo:
        layout = (
            ()
            if states[p.id] == "missing"
            else checkpoint.layout(store.folder(p.id) / "checkpoint")
        )
        if layout:
            resumed.setdefault(layout, []).append(p)
        else:
            groups.setdefault((pack_key(p.spec), getattr(p.spec.method, "rank", 0)), []).append(p)
    chunks = [
        sorted(members, key=lambda p: layout.index(p.id)) for layout, members in resumed.items()
    ]
    small: dict[tuple[Any, ...], list[Point]] = {}
    total = sum(run_flops(p.spec) for p in todo)
    for (key, _), members in groups.items():
        size = pack_size(members[0].spec, exec_)
        if 2 * len(members) < size:
            small.setdefault(key, []).extend(members)
        else:
            chunks += _shares(members, _spread(size, members, total, exec_))
    for members in small.values():
        members.sort(
            key=lambda p: getattr(p.spec.method, "rank", 0)
        )  # members of one rank stand together in a pack
        chunks += _shares(
            members, _spread(pack_size(members[-1].spec, exec_), members, total, exec_)
        )
    return sorted((_pack(c, exec_) for c in chunks), key=lambda pack: -pack.flops)


def _spread(size: int, members: list[Point], total: float, exec_: Exec) -> int:
    """Return a pack size that leaves no worker idle: these runs get their share of the workers, by
    arithmetic."""
    if exec_.pack_size is not None:
        return size
    workers = exec_.workers or len(machine.gpus()) or machine.cores()
    mine = max(1, int(workers * sum(run_flops(p.spec) for p in members) / total + 1e-9))
    return min(size, -(-len(members) // mine))


def _shares(members: list[Point], size: int) -> list[list[Point]]:
    """Cut into packs as equal as possible: 7 and 7, not 8 and 6."""
    share = -(-len(members) // -(-len(members) // size))
    return [members[k : k + share] for k in range(0, len(members), share)]


def _pack(points: list[Point], exec_: Exec) -> Pack:
    spec, n = points[-1].spec, len(points)  # of the largest rank
    speed = calibrate.known(spec, exec_)
    seconds = None
    if speed is not None:
        step_s = speed.step_s[max((k for k in speed.step_s if k <= n), default=min(speed.step_s))]
        seconds = sum(
            step_s * p.spec.steps * run_flops(p.spec) / cost.train_flops(p.spec) for p in points
        )
    rows = exec_.micro_batch_size or calibrate.micro_batch(spec, n)
    return Pack(points, rows, sum(run_flops(p.spec) for p in points), seconds)


def _bytes(members: int, spec: RunSpec, exec_: Exec) -> float:
    return cost.pack_bytes(
        members, spec, exec_.micro_batch_size or calibrate.micro_batch(spec, members)
    )


def _pack_bytes(pack: Pack) -> float:
    return cost.pack_bytes(len(pack.points), pack.points[-1].spec, pack.micro_batch_size)


def machine_split(packs: Sequence[Pack], exec_: Exec) -> tuple[int, int]:
    """Choose workers x threads: one worker a GPU; without GPUs one a core with one thread each
    while memory allows (measured: two one-thread workers finish 1.5 times the small runs of one
    two-thread worker)."""
    cores, gpus = machine.cores(), len(machine.gpus())
    largest = max(map(_pack_bytes, packs), default=1.0)
    fit = max(1, int(MEMORY_SHARE * machine.memory_bytes() / largest))
    workers = exec_.workers or max(1, min(gpus or min(cores, fit, 8), len(packs) or 1))
    threads = exec_.threads or max(1, cores // min(workers, max(1, len(packs))))
    return workers, threads


def summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values: counts by state, arms, packs, and the cost."""
    arms: dict[tuple[str, str, str], dict[str, Any]] = {}
    for p in plan.points:
        rank = getattr(p.spec.method, "rank", None)
        key = (p.arm, str(rank), p.spec.model.name)
        arm = arms.setdefault(
            key,
            {
                "arm": p.arm,
                "model": p.spec.model.name,
                "method": p.spec.method.name,
                "rank": rank,
                "n_trainable": p.spec.method.n_trainable(p.spec.model),
                "runs": 0,
            },
        )
        arm["runs"] += 1
    return {
        "runs": {"total": len(plan.points), "todo": len(plan.todo), **plan.counts()},
        "arms": list(arms.values()),
        "packs": [
            {
                "runs": len(p.points),
                "method": p.points[0].spec.method.name,
                "micro_batch_size": p.micro_batch_size,
                "expected_s": p.seconds,
            }
            for p in plan.packs
        ],
        "cost": {
            "flops": plan.flops,
            "hours": plan.hours,
            "basis": plan.basis,
            "packs": len(plan.packs),
            "workers": plan.workers,
            "threads": plan.threads,
            "checkpoint_gib": plan.checkpoint_gib,
            "memory_gib": plan.memory_gib,
        },
    }
