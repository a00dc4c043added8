"""Which runs train together: packs, their sizes, and the workers that share them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.plan.flops import mean_length, run_flops, train_flops
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.memory import pack_bytes
from lorasweep.plan.throughput import ThroughputTable
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

SIZES = (1, 2, 4, 8, 16)
"""Pack sizes that are considered without GPUs."""
GPU_SIZES = (*SIZES, 32, 64, 128)
FORWARD_TOKENS = 4096
"""Tokens of one forward over all members: beyond it nothing is gained, and activations leave the
cache (LOG.md)."""
GPU_FORWARD_TOKENS = 65536
"""The same on a GPU. Assumption: not measured yet."""
MEMORY_SHARE = 0.8
"""Share of the memory that the workers may take together."""
MOST_WORKERS = 8
"""Workers without GPUs, unless the user asks for more. Assumption: a laptop stays usable."""


@dataclass(frozen=True)
class Pack:
    """Runs that train together, and how."""

    points: list[Point]
    micro_batch_size: int
    """Rows a member and forward."""
    flops: float
    seconds: float | None
    """Expected on one worker; None: nothing was recorded for this shape."""
    memory_bytes: float
    """Expected peak of the process that trains it."""


def pack_sizes(hardware: Hardware) -> tuple[int, ...]:
    """Return the pack sizes worth trying, smallest first."""
    return GPU_SIZES if hardware.gpus else SIZES


def forward_tokens(hardware: Hardware) -> int:
    """Return how many tokens one forward should hold."""
    return GPU_FORWARD_TOKENS if hardware.gpus else FORWARD_TOKENS


def micro_batch(spec: RunSpec, members: int, hardware: Hardware) -> int:
    """Return the rows a member and forward: as many as forward_tokens() hold, at least one."""
    rows = forward_tokens(hardware) // (members * mean_length(spec))
    return max(1, min(spec.batch_size, rows))


def pack_key(spec: RunSpec) -> tuple[Any, ...]:
    """Return what the runs of one pack have in common.

    They differ in lr, seed, steps and the method's packed fields only.
    """
    apart = (*spec.method.PACKED_FIELDS, "model", "dataset", "method", "lr", "seed", "steps")
    method = tuple(v for k, v in spec.method.values() if k not in apart)
    rest = tuple(v for k, v in spec.values() if k not in apart)
    return (spec.model.canonical, spec.dataset.canonical, method, rest)


def pack_size(spec: RunSpec, exec_: Exec, hardware: Hardware, known: ThroughputTable) -> int:
    """Return how many runs like `spec` share a pack at most.

    In this order: the method's own limit; the user's choice; the best size that was measured; the
    default, unless records show that a smaller pack is as fast. What was measured or recorded does
    not go beyond the memory that there is now.
    """
    if spec.method.MAX_PACK is not None:
        return spec.method.MAX_PACK
    if exec_.pack_size is not None:
        return exec_.pack_size
    default, found = default_size(spec, exec_, hardware), known.of(spec)
    if found is None:
        return default
    best = found.best_size()
    if not found.measured and best == max(found.step_s):
        best = max(best, default)  # the largest size seen so far is the fastest
    return best if best <= default or _fits(best, spec, exec_, hardware) else default


def default_size(spec: RunSpec, exec_: Exec, hardware: Hardware) -> int:
    """Return as many runs as one forward holds tokens for and the memory allows."""
    tokens = spec.batch_size * mean_length(spec)
    sizes = [n for n in pack_sizes(hardware) if n == 1 or n * tokens <= forward_tokens(hardware)]
    return max((n for n in sizes if _fits(n, spec, exec_, hardware)), default=1)


def _fits(members: int, spec: RunSpec, exec_: Exec, hardware: Hardware) -> bool:
    """Return whether the memory allows a pack of so many runs."""
    if hardware.worker_gib is None:
        return True
    rows = exec_.micro_batch_size or micro_batch(spec, members, hardware)
    bound = MEMORY_SHARE * hardware.worker_gib * 2**30
    return pack_bytes(members, spec, hardware, rows) < bound


def make_packs(
    todo: Sequence[Point],
    states: dict[str, str],
    store: RunStore,
    exec_: Exec,
    hardware: Hardware,
    known: ThroughputTable,
) -> list[Pack]:
    """Group runs that may share a pack; longest first.

    Runs with a checkpoint keep the pack that they had, so that they continue bit for bit. Ranks are
    mixed only where one rank alone fills less than half a pack.
    """
    groups: dict[tuple[Any, ...], list[Point]] = {}
    resumed: dict[tuple[str, ...], list[Point]] = {}
    for p in todo:
        folder = store.folder(p.id) / "checkpoint"
        layout = () if states[p.id] == "missing" else checkpoint.layout(folder)
        if layout:
            resumed.setdefault(layout, []).append(p)
        else:
            groups.setdefault((pack_key(p.spec), _rank(p)), []).append(p)
    chunks = [sorted(runs, key=lambda p: layout.index(p.id)) for layout, runs in resumed.items()]
    total = sum(run_flops(p.spec) for p in todo)

    def shared_out(runs: list[Point], size: int) -> list[list[Point]]:
        if exec_.pack_size is None:
            size = _size_for_all_workers(size, runs, total, exec_, hardware)
        return _equal_parts(runs, size)

    small: dict[tuple[Any, ...], list[Point]] = {}
    for (key, _), runs in groups.items():
        size = pack_size(runs[0].spec, exec_, hardware, known)
        if 2 * len(runs) < size:
            small.setdefault(key, []).extend(runs)
        else:
            chunks += shared_out(runs, size)
    for runs in small.values():
        runs.sort(key=_rank)  # members of one rank stand together in a pack
        chunks += shared_out(runs, pack_size(runs[-1].spec, exec_, hardware, known))
    packs = (_pack(c, exec_, hardware, known) for c in chunks)
    return sorted(packs, key=lambda pack: -pack.flops)


def _rank(point: Point) -> int:
    return getattr(point.spec.method, "rank", 0)


def _size_for_all_workers(
    size: int, runs: list[Point], total: float, exec_: Exec, hardware: Hardware
) -> int:
    """Return a pack size that leaves no worker idle: `runs` get their share of the workers, by
    operations."""
    workers = exec_.workers or hardware.gpus or hardware.cores or 1
    mine = max(1, int(workers * sum(run_flops(p.spec) for p in runs) / total + 1e-9))
    return min(size, -(-len(runs) // mine))


def _equal_parts(runs: list[Point], size: int) -> list[list[Point]]:
    """Cut into packs as equal as possible: 7 and 7, not 8 and 6."""
    share = -(-len(runs) // -(-len(runs) // size))
    return [runs[k : k + share] for k in range(0, len(runs), share)]


def _pack(points: list[Point], exec_: Exec, hardware: Hardware, known: ThroughputTable) -> Pack:
    spec, n = points[-1].spec, len(points)  # of the largest rank
    found, seconds = known.of(spec), None
    if found is not None:
        with_evaluations = (p.spec.steps * run_flops(p.spec) / train_flops(p.spec) for p in points)
        seconds = found.at(n) * sum(with_evaluations)
    rows = exec_.micro_batch_size or micro_batch(spec, n, hardware)
    flops = sum(run_flops(p.spec) for p in points)
    return Pack(points, rows, flops, seconds, pack_bytes(n, spec, hardware, rows))


def workers_and_threads(packs: Sequence[Pack], exec_: Exec, hardware: Hardware) -> tuple[int, int]:
    """Choose the workers and the threads of each.

    One worker a GPU. Without GPUs one a core with one thread each while memory allows (measured:
    two one-thread workers finish 1.5 times the small runs of one two-thread worker).
    """
    cores = hardware.cores or 1
    most = hardware.gpus or min(cores, MOST_WORKERS)
    if not hardware.gpus and hardware.memory_gib is not None:
        largest = max((pack.memory_bytes for pack in packs), default=1.0)
        most = min(most, max(1, int(MEMORY_SHARE * hardware.memory_gib * 2**30 / largest)))
    workers = exec_.workers or max(1, min(most, len(packs) or 1))
    threads = exec_.threads or max(1, cores // min(workers, max(1, len(packs))))
    return workers, threads
