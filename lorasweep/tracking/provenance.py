"""Record machine and software of a run. The list of facts is fixed, so that no secret leaks."""

import json
import os
import platform
import socket
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep import plugins
from lorasweep.spec.run import RunSpec

PACKAGES: tuple[str, ...] = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")
PACKAGES += ("hydra-core", "omegaconf")
SLURM = {
    "job": "SLURM_JOB_ID",
    "array": "SLURM_ARRAY_JOB_ID",
    "task": "SLURM_ARRAY_TASK_ID",
    "node": "SLURMD_NODENAME",
    "partition": "SLURM_JOB_PARTITION",
    "restart": "SLURM_RESTART_COUNT",
    "gpus": "CUDA_VISIBLE_DEVICES",
    "container": "LORASWEEP_CONTAINER",
}
"""Recorded fact about a Slurm job -> environment variable."""


@cache
def environment() -> dict[str, Any]:
    """Describe the code, the packages, the machine and the Slurm job (None outside one)."""
    slurm = {name: os.environ[key] for name, key in SLURM.items() if key in os.environ}
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "lorasweep": lorasweep.__version__,
        **code(),
        "python": platform.python_version(),
        "packages": versions,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": processor(),
        "slurm": slurm if "job" in slurm else None,
    }


def packages_of(spec: RunSpec) -> str:
    """Name the packages, with versions, that give parts of a run; '' if none."""
    data, parts = spec.dataset, [("method", spec.method.name), ("model", spec.model.name)]
    parts += [("dataset", data.name.partition("(")[0])]  # without the parameters of a grid
    parts += [("generator", data.location)] * (data.source == "synthetic")
    found = {o.package for kind, name in parts for o in plugins.offers(kind).get(name, [])}
    if library := spec.method.LIBRARY:
        found.add(f"{library} {metadata.version(library)}")
    return ", ".join(sorted(found))


def code() -> dict[str, Any]:
    """Describe this code: commit, whether files were edited since, and name of the snapshot."""
    snapshot = Path(__file__).resolve().parents[2] / "snapshot.json"
    if snapshot.is_file():
        return json.loads(snapshot.read_bytes())
    edited = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if edited is None else bool(edited),
        "snapshot": None,
    }


def processor() -> str:
    """Return the model name of this machine's processor; empty if the system hides it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, "")
    return platform.processor()


def _git(*args: str) -> str | None:
    """Return the output of git in this checkout; None if it fails or there is no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
