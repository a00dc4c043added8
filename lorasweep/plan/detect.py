"""Detect the hardware that this process may use (in a Slurm job, the job's share), without torch.

The command line and jobs call this module and pass the result to the planner.
"""

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
        # a torch with CUDA takes more even without a GPU (docs/log)
        process_gib=500 / 1024 if _torch_for_cpus() else 1.0,
        # without these instructions, bf16 is about 50 times slower than fp32 (docs/log)
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
