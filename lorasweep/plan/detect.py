"""Detect the hardware that this process may use (in a Slurm job, the job's share), without torch.

The command line and jobs call this module and pass the result to the planner.
"""

import csv
import os
import re
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lorasweep.plan.hardware import Hardware
from lorasweep.tracking import provenance

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
    return Hardware(
        name=NAME,
        processor=provenance.processor(),
        cores=cores(),
        memory_gib=memory_bytes() / 2**30,
        gpus=len(found),
        gpu_name=smallest.name if smallest else None,
        gpu_memory_gib=smallest.memory_bytes / 2**30 if smallest else None,
        # a torch with CUDA takes more even without a GPU (docs/log)
        process_gib=500 / 1024 if _torch_for_cpus() else 1.0,
        fast_bf16=None if found else fast_bf16(),
    )


def _torch_for_cpus() -> bool:
    return metadata.version("torch").endswith("+cpu")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    here = len(affinity(0)) if affinity else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or here
    return max(1, min(here, int(given)))


def memory_bytes() -> int:
    """Return this machine's memory, or the part that a Slurm job or a cgroup allows."""
    total = 8 * 2**30
    given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20
    given = given or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * 2**20 * cores()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total = min(total, given or total)
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (ValueError, OSError):
        return total


def fast_bf16() -> bool | None:
    """Return whether the processor has bf16 instructions; None if the system does not show it.

    Without such instructions, products in bf16 are about 50 times slower than in fp32 (docs/log).
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = {flag for line in lines for flag in line.split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}) if flags else None


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
    trains_here = "LORASWEEP_CONTAINER" not in os.environ
    if shutil.which("nvidia-smi") is None:
        return ()
    if trains_here and _torch_for_cpus():
        return ()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "MIG-" in (wanted or ""):
        return visible(slices(_nvidia_smi("-L")), wanted)
    fields = "--query-gpu=index,uuid,name,memory.total"
    return visible(_nvidia_smi(fields, "--format=csv,noheader,nounits"), wanted)


def _nvidia_smi(*arguments: str) -> str:
    """Return the output of nvidia-smi; empty if it fails."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


SLICE = re.compile(r"MIG (?P<profile>\S+\.(?P<gb>\d+)gb\S*) .*\(UUID: (?P<uuid>MIG-\S+)\)")


def slices(listed: str) -> str:
    """Return the table that `visible` parses of the MIG slices in the output of nvidia-smi -L.

    The memory of a slice is the one in its profile's name: 1g.10gb has 10 GB.
    """
    rows, card = [], ""
    for line in listed.splitlines():
        if found := SLICE.search(line):
            mib = int(found["gb"]) * 10**9 // 2**20
            rows.append(f"-, {found['uuid']}, {card} MIG {found['profile']}, {mib}")
        elif line.startswith("GPU "):
            card = line.partition(": ")[2].partition(" (UUID")[0]
    return "\n".join(rows)


def visible(table: str, wanted: str | None) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's table (index, uuid, name, MiB) and select GPUs in the order of `wanted`.

    `wanted`: the value of CUDA_VISIBLE_DEVICES, numbers or prefixes of uuids; None: all GPUs.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(table.splitlines()) if row]
    found = [(i, Gpu(uuid, name, int(mib) * 2**20)) for i, uuid, name, mib in rows if mib.isdigit()]
    if wanted is None:
        return tuple(gpu for _, gpu in found)
    return tuple(g for n in _names(wanted) for i, g in found if n == i or g.uuid.startswith(n))


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip()]
