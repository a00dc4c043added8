"""What this machine has: processors, memory, GPUs. Asks the system, never torch, so that planning
needs none.

Inside a Slurm job that is what the job was given.
"""

import csv
import os
import shutil
import subprocess
from functools import cache
from importlib import metadata
from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU that this process may use."""

    uuid: str
    """What CUDA_VISIBLE_DEVICES calls it; its number may be another's, as CUDA counts the fastest
    first."""
    name: str
    memory_bytes: int


def cores() -> int:
    """Return the processors that this process may use."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(
        1,
        min(
            here,
            int(
                os.environ.get("SLURM_CPUS_PER_TASK")
                or os.environ.get("SLURM_CPUS_ON_NODE")
                or here
            ),
        ),
    )


def memory_bytes() -> int:
    """Return this machine's memory, or what a Slurm job or a control group allows of it."""
    total = 8 * 2**30
    given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20
    given = given or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * 2**20 * cores()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total = min(total, given or total)
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(total, int(file.read()))
    except (ValueError, OSError):
        return total


def slow_bf16() -> bool:
    """Say whether the processor is known to have no bf16 instructions: products then take about 50
    times as long as in fp32 (measured on AVX2: 0.7 against 40 to 60 GFLOP/s a core). False where
    the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = {
                f for line in file if line.startswith(("flags", "Features")) for f in line.split()
            }
    except OSError:
        return False
    return bool(flags) and not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def devices() -> tuple[str, ...]:
    """List what CUDA_VISIBLE_DEVICES may name, one a GPU: those of this machine, or those that a
    Slurm job was given (also where nothing here can look at them)."""
    found = tuple(gpu.uuid for gpu in gpus())
    if found or "SLURM_JOB_ID" not in os.environ:
        return found
    return tuple(
        n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()
    )


@cache
def gpus() -> tuple[Gpu, ...]:
    """List the GPUs that CUDA_VISIBLE_DEVICES leaves, as nvidia-smi names them; none where there is
    no nvidia-smi, or where torch is a CPU build."""
    if shutil.which("nvidia-smi") is None or metadata.version("torch").endswith("+cpu"):
        return ()
    ask = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible(told, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(told: str, wanted: str | None) -> tuple[Gpu, ...]:
    """Read nvidia-smi's table (index, uuid, name, MiB) and keep what `wanted`
    (CUDA_VISIBLE_DEVICES) names, in its order; None: all."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(told.splitlines()) if row]
    found = [
        (index, Gpu(uuid, name, int(mib) * 2**20))
        for index, uuid, name, mib in rows
        if mib.isdigit()
    ]
    if wanted is None:
        return tuple(gpu for _, gpu in found)
    names = [n.strip() for n in wanted.split(",") if n.strip()]
    return tuple(gpu for n in names for index, gpu in found if n == index or gpu.uuid.startswith(n))
