"""Hardware: a file of `conf/hardware/`, or this machine, as far as this process may use it.

In a Slurm job that is the job's share. Needs no torch.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from lorasweep.errors import SpecError
from lorasweep.spec.values import ABOVE_0, Is, Value, build
from lorasweep.tracking import provenance

Amount = Annotated[float, Is("", ABOVE_0)]
AmountOrNone = Annotated[float | None, Is("", ABOVE_0)]


@dataclass(frozen=True)
class Hardware(Value):
    """One machine that trains. None: not known."""

    WHERE: ClassVar[str] = "hardware."

    name: str = "???"
    processor: str | None = None
    """Model of the processor, as the system names it."""
    cores: Annotated[int | None, Is("", 1)] = None
    memory_gib: AmountOrNone = None
    """Memory of the host."""
    gpus: Annotated[int, Is("", 0)] = 0
    """GPUs that train at the same time."""
    gpus_per_node: Annotated[int, Is("", 1)] = 8
    gpu_name: str | None = None
    gpu_memory_gib: AmountOrNone = None
    """Memory of one GPU."""
    matmul_flops_s: dict[str, float] = field(default_factory=dict)
    """Precision -> peak floating-point operations per second of dense products on one GPU."""
    attainable_share: Amount = 0.8
    """Share of the peak in matmul_flops_s that the best large product reaches on the card."""
    attention_flops_s: AmountOrNone = None
    """Operations per second of a fused attention kernel on one GPU; None: a third of the peak."""
    bandwidth_bytes_s: AmountOrNone = None
    """Memory bandwidth of one GPU."""
    link_bytes_s: AmountOrNone = None
    """Bandwidth between a GPU and the other GPUs of its node, in one direction. None: plans for
    several GPUs leave out communication."""
    network_bytes_s: AmountOrNone = None
    """One GPU's share of the bandwidth between nodes, in one direction."""
    price_per_gpu_h: AmountOrNone = None
    """Price of one GPU in US dollars per hour."""
    process_gib: Amount = 500 / 1024
    """Memory of a worker on a CPU before weights: the interpreter, torch, transformers. Measured
    with a torch for CPUs (docs/log/2026-11-30.md)."""
    fast_bf16: bool | None = None
    """False: the processor has no bf16 instructions."""

    @property
    def worker_gib(self) -> float | None:
        """Memory limit of one worker: the memory of one GPU, or without GPUs that of the host."""
        return self.gpu_memory_gib if self.gpus else self.memory_gib

    @property
    def has_speeds(self) -> bool:
        """Whether the speed of training on these GPUs can be computed."""
        return self.gpus > 0 and bool(self.matmul_flops_s) and self.bandwidth_bytes_s is not None

    def problems(self) -> Iterator[str]:
        """Yield problems: impossible numbers, and missing figures that a plan needs."""
        yield from super().problems()
        if self.name == "???":
            yield "hardware.name is missing. Write `name: ...` at the top of its file."
        if any(not peak > 0 for peak in self.matmul_flops_s.values()):
            yield f"hardware.matmul_flops_s={dict(self.matmul_flops_s)}: expected numbers above 0."
        needed = ("gpu_memory_gib",) if self.gpus else ("cores", "memory_gib")
        missing = " and ".join(name for name in needed if getattr(self, name) is None)
        if missing:
            kind = f"{self.gpus} GPU(s)" if self.gpus else "no GPU"
            yield (
                f"hardware {self.name!r} has {kind}, so a plan needs {missing}. Add the figure to "
                "its file in conf/hardware."
            )


def from_plain(values: dict[str, Any]) -> Hardware:
    """Make a Hardware from a file's values; SpecError: a value is unknown, invalid or missing."""
    hardware = build(Hardware, values)
    if hardware.problem:
        raise SpecError(hardware.problem)
    return hardware


def hardware_of(values: dict[str, Any]) -> Hardware:
    """Return the machine to plan for: that of a file's values, or without any this machine."""
    return from_plain(values) if values else this_machine()


# ---------------------------------------------------------------- this machine

NAME = "this_machine"


class Gpu(NamedTuple):
    """One GPU that this process may use."""

    uuid: str
    """Name in CUDA_VISIBLE_DEVICES. Numbers are unreliable, as CUDA puts the fastest GPU first."""
    name: str
    memory_bytes: int


def this_machine() -> Hardware:
    """Describe the machine that this process runs on. Peak speeds and prices stay unknown."""
    found = gpus()
    smallest = min(found, key=lambda gpu: gpu.memory_bytes, default=None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20
    given = given or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * 2**20 * cores()
    allowed, about = Path("/sys/fs/cgroup/memory.max"), Path("/proc/cpuinfo")
    limit = allowed.read_text().strip() if allowed.is_file() else "max"
    text = about.read_text(encoding="ascii", errors="replace") if about.is_file() else ""
    flags = {*" ".join(re.findall(r"(?m)^(?:flags|Features).*", text)).split()}
    return Hardware(
        name=NAME,
        processor=provenance.processor(),
        cores=cores(),
        memory_gib=min(memory, given or memory, int(limit) if limit.isdigit() else memory) / 2**30,
        gpus=len(found),
        gpu_name=smallest.name if smallest else None,
        gpu_memory_gib=smallest.memory_bytes / 2**30 if smallest else None,
        # a torch with CUDA takes more even without a GPU (docs/log/2026-11-30.md)
        process_gib=500 / 1024 if _torch_for_cpus() else 1.0,
        # without these instructions, bf16 is 50 times slower than fp32 (docs/log/2026-11-25.md)
        fast_bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        if flags and not found
        else None,
    )


def _torch_for_cpus() -> bool:
    return metadata.version("torch").endswith("+cpu")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    here = len(affinity(0)) if affinity else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or here
    return max(1, min(here, int(given)))


def devices() -> tuple[str, ...]:
    """List GPU names for CUDA_VISIBLE_DEVICES; without nvidia-smi, those that Slurm set there."""
    found = tuple(gpu.uuid for gpu in gpus())
    if found or "SLURM_JOB_ID" not in os.environ:
        return found
    return tuple(_names(os.environ.get("CUDA_VISIBLE_DEVICES", "")))


@cache
def gpus() -> tuple[Gpu, ...]:
    """List the GPUs in CUDA_VISIBLE_DEVICES; none without nvidia-smi or with a torch for CPUs.

    In a job that trains inside a container, this environment's torch does not count.
    """
    here = "LORASWEEP_CONTAINER" not in os.environ
    if shutil.which("nvidia-smi") is None or (here and _torch_for_cpus()):
        return ()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    fields = ["--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", *(["-L"] if "MIG-" in (wanted or "") else fields)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible(done.stdout, wanted)


SLICE = re.compile(r"MIG (?P<profile>\S+\.(?P<gb>\d+)gb\S*) .*\(UUID: (?P<uuid>MIG-\S+)\)")
"""A MIG slice in the output of nvidia-smi -L. Its profile names its memory: 1g.10gb has 10 GB."""


def visible(listed: str, wanted: str | None) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's table (index, uuid, name, MiB), or its list of slices.

    `wanted`: the value of CUDA_VISIBLE_DEVICES, numbers or prefixes of uuids, in whose order the
    GPUs are returned; None: all GPUs.
    """
    found, card = list[tuple[str, Gpu]](), ""
    for line in listed.splitlines():
        row = line.split(", ")
        if line.startswith("GPU "):  # slices of different cards differ in speed
            card = line.partition(": ")[2].partition(" (UUID")[0]
        elif m := SLICE.search(line):
            found.append(("-", Gpu(m["uuid"], f"{card} MIG {m['profile']}", int(m["gb"]) * 10**9)))
        elif len(row) == 4 and row[3].isdigit():
            found.append((row[0], Gpu(row[1], row[2], int(row[3]) * 2**20)))
    if wanted is None:
        return tuple(gpu for _, gpu in found)
    return tuple(g for n in _names(wanted) for i, g in found if n == i or g.uuid.startswith(n))


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip()]
