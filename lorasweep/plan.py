"""What is done, what is missing, what it will cost, and which runs share a pack. Starts nothing; no torch."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep import checkpoint
from lorasweep.grid import Point
from lorasweep.spec import Exec, RunSpec, part_json
from lorasweep.store import FINAL, STATES, RunStore

ASSUMED_FLOPS_PER_CORE = {"fp32": 6e10, "bf16": 2e11, "fp64": 2e10}
"""Floating-point operations a second and core by precision, used until this store holds a timed run of the sweep.
Assumption: what tiny128 (fp32) and SmolLM2-135M (bf16) reached on one core with matrix units (LOG.md)."""
TEXT_FILL = 0.4
"""Mean length of text rows as a share of max_length. Assumption: GSM8K has 0.37 of 512."""
FULLFT_BYTES = 20
"""Bytes a parameter of a full fine-tuning process: fp32 weight, gradient, two moments, and the start's copy."""
CHECKPOINT_BYTES = 12
"""Bytes a trained parameter of one checkpoint slot: fp32 weight and two moments; there are two slots."""


@dataclass
class Plan:
    """A sweep's runs by state, and what is left to do."""

    points: list[Point]
    states: dict[str, str]
    todo: list[Point]
    packs: list[list[Point]]
    workers: int
    threads: int
    flops: float
    hours: float
    measured: bool
    """True: `hours` comes from this store's own runs of the same model; False: from an assumed speed."""
    checkpoint_gib: float
    """Disk that the checkpoints of the running packs may take."""

    def counts(self) -> dict[str, int]:
        """Count the runs by state."""
        values = list(self.states.values())
        return {s: values.count(s) for s in STATES if s in values}


def make_plan(points: Sequence[Point], store: RunStore, exec_: Exec) -> Plan:
    """Look at the store and plan what is missing. Failed runs are left alone unless exec.retry is set."""
    points = list(points)
    states = store.states(p.id for p in points)
    skip = set(FINAL) if exec_.retry else {*FINAL, "failed"}
    todo = [p for p in points if states[p.id] not in skip]
    if exec_.retry:
        todo = [p for p in todo if states[p.id] != "failed" or store.failures(p.id) < exec_.max_attempts]
    packs = make_packs([p for p in todo if states[p.id] != "running"], store, exec_.pack_size, states)
    workers, threads = machine_split(points, exec_, len(packs))
    flops = sum(run_flops(p.spec) for p in todo)
    rate, measured = _rate(points, states, store, workers)
    disk = sum(
        sum(p.spec.method.n_trainable(p.spec.model) for p in pack) * CHECKPOINT_BYTES * 2 for pack in packs[:workers]
    )
    return Plan(points, states, todo, packs, workers, threads, flops, flops / rate / 3600, measured, disk / 2**30)


def run_flops(spec: RunSpec) -> float:
    """Estimate a run's floating-point operations: its updates, and the held-out evaluation at the end.

    Tokens a sequence are the data set's longest, times TEXT_FILL for text.
    """
    length = round(spec.dataset.max_length * (1.0 if spec.dataset.source == "synthetic" else TEXT_FILL))
    train = spec.method.step_flops(spec.model, spec.batch_size * length) * spec.steps
    evaluation = 2.0 * spec.model.n_matmul_params() * length * (spec.dataset.n_test + 8 * spec.dataset.n_test_curve)
    return train + evaluation


def _rate(points: list[Point], states: dict[str, str], store: RunStore, workers: int) -> tuple[float, bool]:
    """Return floating-point operations a second over all workers, and whether it was measured in this store."""
    rates = []
    for p in [p for p in points if states[p.id] == "done"][:16]:
        result = store.result(p.id) or {}
        if result.get("wall_s") and not result.get("imported"):
            rates.append(run_flops(p.spec) / result["wall_s"])
    if rates:
        return statistics.median(rates) * workers, True
    return ASSUMED_FLOPS_PER_CORE[points[0].spec.precision] * (os.cpu_count() or 1), False


def pack_key(spec: RunSpec) -> tuple[Any, ...]:
    """Runs with the same key may share a pack: they differ in lr, seed and the method's packed fields only."""
    method = tuple(v for k, v in vars(spec.method).items() if k not in spec.method.PACKED_FIELDS)
    rest = tuple(v for k, v in vars(spec).items() if k not in ("model", "dataset", "method", "lr", "seed"))
    return (part_json(spec.model), part_json(spec.dataset), method, rest)


def make_packs(todo: Sequence[Point], store: RunStore, size: int, states: dict[str, str]) -> list[list[Point]]:
    """Group runs that may share a pack, `size` at most. Runs with a checkpoint stay with the company that they
    had, so that they continue bit for bit. Full fine-tuning runs come first: they take longest alone."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    resumed: dict[tuple[str, ...], list[Point]] = {}
    for p in todo:
        layout = () if states[p.id] == "missing" else checkpoint.layout(store.folder(p.id) / "checkpoint")
        if layout:
            resumed.setdefault(layout, []).append(p)
        else:
            groups.setdefault(pack_key(p.spec), []).append(p)
    packs = [sorted(members, key=lambda p: layout.index(p.id)) for layout, members in resumed.items()]
    fresh = []
    for members in groups.values():
        limit = min(size, members[0].spec.method.MAX_PACK or size)
        count = -(-len(members) // limit)  # as equal as possible: 7 and 7, not 8 and 6
        share = -(-len(members) // count)
        fresh += [members[k : k + share] for k in range(0, len(members), share)]
    return packs + sorted(fresh, key=len)


def machine_split(points: Sequence[Point], exec_: Exec, n_packs: int) -> tuple[int, int]:
    """Choose workers x threads: one worker a core with one thread each while memory allows (measured: two
    one-thread workers finish 1.5 times the small runs of one two-thread worker)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_params = max(p.spec.model.n_params() for p in points)
    fit = max(1, int(0.7 * _memory_bytes() / (FULLFT_BYTES * n_params + 3e9)))
    workers = exec_.workers or max(1, min(cores, fit, n_packs or 1, 8))
    threads = exec_.threads or max(1, cores // min(workers, max(1, n_packs)))
    return workers, threads


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 8 * 2**30


def summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values: counts by state, arms, and the cost."""
    arms: dict[tuple[str, str, str], dict[str, Any]] = {}
    for p in plan.points:
        rank = getattr(p.spec.method, "rank", None)
        key = (p.arm, str(rank), p.spec.model.name)
        arm = arms.setdefault(
            key,
            {"arm": p.arm, "model": p.spec.model.name, "method": p.spec.method.name, "rank": rank,
             "n_trainable": p.spec.method.n_trainable(p.spec.model), "runs": 0},
        )  # fmt: skip
        arm["runs"] += 1
    return {
        "runs": {"total": len(plan.points), "todo": len(plan.todo), **plan.counts()},
        "arms": list(arms.values()),
        "cost": {
            "flops": plan.flops, "hours": plan.hours, "measured": plan.measured, "packs": len(plan.packs),
            "workers": plan.workers, "threads": plan.threads, "checkpoint_gib": plan.checkpoint_gib,
        },
    }  # fmt: skip
