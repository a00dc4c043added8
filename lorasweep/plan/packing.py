"""Decide which runs train together: packs, their sizes, and the number of workers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import mean_length, run_flops, updates_with_evaluations
from lorasweep.plan.memory import pack_bytes
from lorasweep.plan.throughput import ThroughputTable
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

SIZES = (1, 2, 4, 8, 16)
"""Pack sizes to choose from without GPUs, smallest first."""
GPU_SIZES = (*SIZES, 32, 64, 128)
PACK_TOKENS = 4096
"""Maximum tokens per update of a pack by default; larger packs are no faster (docs/log)."""
FORWARD_NUMBERS = 1 << 18
"""Maximum tokens * hidden size per forward pass: 1 MiB of fp32 states. With 8 times as many, which
the processor's cache does not hold, SmolLM2 takes 1.5 times as long (docs/log)."""
GPU_FORWARD_TOKENS = 65536
"""Maximum tokens per update and per forward pass on a GPU. Assumption: not measured yet."""
LIKE_LENGTH = 2.0
"""Largest ratio of row lengths in a pack without GPUs: shorter rows are padded to the longest, and
a smaller pack is hardly slower (docs/log)."""
MEMORY_SHARE = 0.8
"""Share of the memory that all workers together may use."""
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
    """Expected seconds on one worker; None: no step times of this shape are known."""
    memory_bytes: float
    """Expected peak memory of the pack's process."""


def pack_sizes(hardware: Hardware) -> tuple[int, ...]:
    """Return the pack sizes worth trying, smallest first."""
    return GPU_SIZES if hardware.gpus else SIZES


def pack_tokens(hardware: Hardware) -> int:
    """Return the maximum number of tokens per update of a pack of default size."""
    return GPU_FORWARD_TOKENS if hardware.gpus else PACK_TOKENS


def micro_batch(
    spec: RunSpec,
    n_runs: int,
    hardware: Hardware,
    processes: int = 1,
    checkpointing: bool = False,
    join_rows: bool = False,
) -> int:
    """Return the rows per run, process and pass that the cache, or a GPU's memory, allow."""
    tokens, share = GPU_FORWARD_TOKENS, spec.batch_size // processes
    if not hardware.gpus:
        tokens = FORWARD_NUMBERS // spec.model.hidden_size
    rows = max(1, min(share, tokens // (n_runs * mean_length(spec))))
    if hardware.gpus and hardware.gpu_memory_gib is not None:
        room = MEMORY_SHARE * hardware.gpu_memory_gib * 2**30
        shared = (processes, checkpointing, join_rows)
        while rows > 1 and pack_bytes(n_runs, spec, hardware, rows, *shared) > room:
            rows //= 2
    return rows


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


def pack_size(spec: RunSpec, exec_: Exec, hardware: Hardware, known: ThroughputTable) -> int:
    """Return the largest number of runs like `spec` in a pack.

    The first of these that applies: the method's limit, the user's choice, the fastest known size
    if it fits into the memory, the default.
    """
    if spec.method.MAX_PACK is not None or exec_.world_size > 1:
        return spec.method.MAX_PACK or 1
    if exec_.pack_size is not None:
        return exec_.pack_size
    default, found = default_size(spec, exec_, hardware), known.of(spec)
    if found is None:
        return default
    best = found.best_size()
    if not found.measured and best == max(found.step_s):
        best = max(best, default)  # larger packs than were recorded may be faster still
    return best if best <= default or _fits(best, spec, exec_, hardware) else default


def default_size(spec: RunSpec, exec_: Exec, hardware: Hardware) -> int:
    """Return the largest pack size that `pack_tokens` and the memory allow."""
    tokens = spec.batch_size * mean_length(spec)
    sizes = [n for n in pack_sizes(hardware) if n == 1 or n * tokens <= pack_tokens(hardware)]
    return max((n for n in sizes if _fits(n, spec, exec_, hardware)), default=1)


def _fits(n_runs: int, spec: RunSpec, exec_: Exec, hardware: Hardware) -> bool:
    if hardware.worker_gib is None:
        return True
    rows = exec_.micro_batch_size or micro_batch(spec, n_runs, hardware, join_rows=exec_.join_rows)
    bound = MEMORY_SHARE * hardware.worker_gib * 2**30
    return pack_bytes(n_runs, spec, hardware, rows, join_rows=exec_.join_rows) < bound


def make_packs(
    todo: Sequence[Point],
    states: dict[str, str],
    store: RunStore,
    exec_: Exec,
    hardware: Hardware,
    known: ThroughputTable,
) -> list[Pack]:
    """Group runs into packs, longest first.

    Runs with a checkpoint keep their pack, so that they resume bit for bit. The runs of one rank
    and data set share a pack with others only if they fill less than half a pack.
    """
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
        size = pack_size(runs[0].spec, exec_, hardware, known)
        if 2 * len(runs) < size:
            small.setdefault((key, size), []).extend(runs)
        else:
            chunks += split(runs, size)
    for (_, size), runs in small.items():
        # Runs of one rank must be neighbours. Equal row lengths need less padding. With equal steps
        # the pack stays full longer.
        runs.sort(key=lambda p: (_rank(p), mean_length(p.spec), p.spec.steps))
        for alike in [runs] if hardware.gpus else _of_like_length(runs):
            chunks += split(alike, size)
    shared, packs = (exec_.world_size, exec_.activation_checkpointing, exec_.join_rows), []
    for points in chunks:
        # estimate memory for the largest rank, the longest rows, and early stopping if a run has it
        spec, n = max(points, key=_rank).spec, len(points)
        longest = max((p.spec for p in points), key=mean_length)
        if mean_length(longest) != mean_length(spec):
            spec = replace(spec, dataset=longest.dataset)
        spec = replace(spec, early_stopping=max(p.spec.early_stopping for p in points))
        found, seconds = known.of(spec), None
        if found is not None:
            seconds = found.at(n) * sum(updates_with_evaluations(p.spec) for p in points)
        rows = exec_.micro_batch_size or micro_batch(spec, n, hardware, *shared)
        memory = pack_bytes(n, spec, hardware, rows, *shared)
        packs.append(Pack(points, rows, sum(run_flops(p.spec) for p in points), seconds, memory))
    return sorted(packs, key=lambda pack: -pack.flops)


def _of_like_length(runs: Sequence[Point]) -> list[list[Point]]:
    """Divide sorted runs where row lengths differ by more than a factor LIKE_LENGTH."""
    found: list[list[Point]] = []
    for p in runs:
        length = mean_length(p.spec)
        own = [mean_length(q.spec) for q in found[-1]] if found else []
        if own and max(*own, length) <= LIKE_LENGTH * min(*own, length):
            found[-1].append(p)
        else:
            found.append([p])
    return found


def _rank(point: Point) -> int:
    return getattr(point.spec.method, "rank", 0)


def workers_and_threads(packs: Sequence[Pack], exec_: Exec, hardware: Hardware) -> tuple[int, int]:
    """Choose the number of workers and the threads of each.

    There is one process per GPU; without GPUs one per core, as far as memory allows. Measured: two
    one-thread workers finish 1.5 times as many small runs as one two-thread worker.
    """
    cores = hardware.cores or 1
    most = max(1, (hardware.gpus or min(cores, MOST_WORKERS)) // exec_.world_size)
    if not hardware.gpus and hardware.memory_gib is not None:
        largest = max((pack.memory_bytes for pack in packs), default=1.0)
        most = min(most, max(1, int(MEMORY_SHARE * hardware.memory_gib * 2**30 / largest)))
    workers = exec_.workers or max(1, min(most, len(packs) or 1))
    processes = exec_.world_size * min(workers, max(1, len(packs)))
    threads = exec_.threads or max(1, cores // processes)
    return workers, threads
