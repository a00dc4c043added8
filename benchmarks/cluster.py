"""Measure the time that Slurm adds: before the first step, per job, and to a whole sweep.

    python -m benchmarks cluster [OUT.json]

Run it on a login node, or after `eval "$(make -s slurm-up)"`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import FIGURES, ROOT, Log
from lorasweep.launch.slurm import queue as slurm
from lorasweep.store import files

NOTHING = (
    "import sys\n"
    "from lorasweep.cli.actions import act\n"
    "from lorasweep.config.compose import compose_request as compose\n"
    "sys.exit(act(compose(sys.argv[1:]), 'benchmarks.overhead:nothing'))"
)
CLUSTER = (
    "cluster=slurm",
    "cluster.cpus=1",
    "cluster.mem_gib=1",
    "cluster.follow=false",
    "exec.threads=1",
)
RUNS_PER_JOB = {1: 40, 10: 400, 100: 2000}
"""Runs per job -> total runs: enough jobs to measure a rate."""
REAL = (
    "+sweep=lr_ratio",
    "scale=smoke",
    "steps=200",
    "sweep.axes.seed=[0,1,2,3]",
    "exec.threads=1",
    "exec.pack_size=4",
)


def grid(runs: int) -> list[str]:
    """Return the command line of a LoRA sweep with `runs` runs."""
    return [
        "+sweep=lr_ratio",
        "scale=smoke",
        "~sweep.arms.fullft",
        "sweep.arms.lora.lr=${around:3e-3,10,1.5}",
        f"sweep.axes.seed={list(range(runs // 10))}".replace(" ", ""),
    ]


def command_s(folder: Path, *arguments: str, nothing: bool = False) -> float:
    """Run a command; return its wall time in seconds."""
    start = ["-c", NOTHING] if nothing else ["-m", "lorasweep"]
    env = {
        **os.environ,
        "LORASWEEP_RUNS": str(folder / "runs"),
        "LORASWEEP_REPORTS": str(folder / "reports"),
        "PYTHONPATH": str(ROOT),
    }
    started = time.monotonic()
    subprocess.run([sys.executable, *start, *arguments], check=True, capture_output=True, env=env)
    return time.monotonic() - started


def wait(folder: Path, runs: int) -> float:
    """Wait until `runs` runs are finished; return the seconds waited."""
    started = time.monotonic()
    while len(list((folder / "runs").glob("*/result.json"))) < runs:
        time.sleep(0.1)
    return time.monotonic() - started


def measure(log: Log) -> dict[str, Any]:
    """Return first_step_s, command_s, local_s, slurm_s; by runs per job: jobs_per_h, runs_per_h."""
    slurm.require()
    found: dict[str, Any] = {"jobs_per_h": {}, "runs_per_h": {}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORASWEEP_BENCH_DIR")) as name:
        folder = Path(name)
        first = folder / "first"
        started = time.monotonic()
        found["command_s"] = command_s(first, *REAL, *CLUSTER)
        while not list((first / "runs").glob("*/metrics.jsonl")):
            time.sleep(0.05)
        found["first_step_s"] = time.monotonic() - started
        log(
            f"from command to first step: {found['first_step_s']:.1f} s, of which the command "
            f"{found['command_s']:.1f} s"
        )
        wait(first, 24)
        for per_job, runs in RUNS_PER_JOB.items():
            home = folder / str(per_job)
            more = (f"cluster.runs_per_job={per_job}", f"exec.pack_size={min(per_job, 10)}")
            command_s(home, *grid(runs), *CLUSTER, *more, nothing=True)
            seconds = wait(home, runs)
            runs_per_h = 3600 * runs / seconds
            jobs_per_h = runs_per_h / per_job
            found["jobs_per_h"][per_job], found["runs_per_h"][per_job] = jobs_per_h, runs_per_h
            log(f"{per_job} runs per job: {jobs_per_h:.0f} jobs/h, {runs_per_h:.0f} runs/h")
        local = command_s(folder / "local", *REAL, "exec.workers=2")
        started = time.monotonic()
        command_s(folder / "slurm", *REAL, *CLUSTER, "cluster.workers=2", "cluster.runs_per_job=24")
        wait(folder / "slurm", 24)
        found["local_s"], found["slurm_s"] = local, time.monotonic() - started
        log(f"24 runs: {local:.1f} s here, {found['slurm_s']:.1f} s as one job of two workers")
    return found


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the file of figures."""
    path = Path(arguments[0]) if arguments else FIGURES / "slurm.json"
    found = measure(lambda text: print(text, flush=True))
    files.write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
