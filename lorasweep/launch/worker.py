"""A worker process: train the free packs of job files, and print events as JSON lines.

    python -m lorasweep.launch.worker JOB.json SHA256 [FIRST]

It prints {"job_done": true} after a job. Further jobs are lines on its standard input, [JOB.json,
SHA256] as JSON; until this input ends, it keeps the base model and the data for the next job.

    {"packs": [{"runs": [spec, ...], "micro_batch_size": n, "most_rows": n or null,
                "forward_parts": n}, ...],
     "exec": {...},
     "dead": {run id: attempt}, "trainer": null or "package.module:object",
     "skip": null or a file of run ids not to start}

With exec.world_size above one, several such processes train each run together; their ranks come
from torchrun's environment variables (RANK, MASTER_ADDR, ...) or from Slurm.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from lorasweep.errors import LorasweepError, StoreError
from lorasweep.launch.distributed import Leader, follow
from lorasweep.launch.out_of_memory import Limits, OutOfMemoryTogether
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped, die_with_parent, keep_freed_memory
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.trainer import Trainer, trainer_named
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore

STOPPED, REFUSED, OUT_OF_MEMORY = 3, 4, 5
"""Exit statuses. REFUSED: an error that the user must correct. OUT_OF_MEMORY: only if several
processes train a run; a single process handles the shortage itself."""
REPORT_S = 0.3
"""Minimum seconds between progress reports. Ends of runs and notes are reported at once."""
SLURM_RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
"""Environment variable of torchrun -> that of Slurm."""


def main(job_path: str, sha256: str, first: int = 0) -> int:
    """Train the free packs of job files, beginning with pack `first`; return the exit status."""
    die_with_parent()
    keep_freed_memory()
    stop = StopFlag()
    stop.install()
    trainers: dict[str | None, Trainer] = {}
    try:
        for path, sha in chain([(job_path, sha256)], map(json.loads, sys.stdin)):
            job = _read_job(Path(path), sha)
            folder = job["exec"]["runs_dir"]
            store = RunStore(folder, dead=job["dead"], jobs=RunningJobs(folder))
            if job["exec"]["world_size"] > 1:
                _run_together(job, first, store, stop)
                return 0
            name = job["trainer"]
            trainers[name] = trainers.get(name) or trainer_named(name, stop)
            _run(job, first, store, trainers[name], stop)
            print(json.dumps({"job_done": True}), flush=True)
    except Stopped:
        return STOPPED
    except OutOfMemoryTogether as together:
        event = {"run": together.run, "out_of_memory": asdict(together.shortage)}
        print(json.dumps(event), flush=True)
        return OUT_OF_MEMORY
    except LorasweepError as refusal:
        print(json.dumps({"error": str(refusal)}), flush=True)
        return REFUSED
    return 0


def _read_job(path: Path, sha256: str) -> dict[str, Any]:
    content = path.read_bytes()
    # others may be able to write the file, which names the trainer to import
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StoreError(f"{path} was changed after it was written. Run the command again.")
    return json.loads(content)


def _run_together(job: dict[str, Any], first: int, store: RunStore, stop: StopFlag) -> None:
    """Train together with the other processes of this worker."""
    from lorasweep.models.sharding import Mesh

    os.environ.update({k: os.environ[v] for k, v in SLURM_RANKS.items() if k not in os.environ})
    mesh = Mesh.join()
    trainer = trainer_named(job["trainer"], stop, mesh)
    if mesh.rank:
        follow(trainer, mesh, stop)
        return
    leader = Leader(trainer, mesh, stop)
    try:
        _run(job, first, store, leader, stop)
    finally:
        leader.dismiss()


def _run(
    job: dict[str, Any], first: int, store: RunStore, trainer: Trainer, stop: StopFlag
) -> None:
    exec_, report, limits = Exec(**job["exec"]), Reporter(stop), Limits()
    for pack in job["packs"][first:] + job["packs"][:first]:
        unwanted = skipped(job["skip"])
        specs = [s for s in map(spec_from, pack["runs"]) if s.id not in unwanted]
        if specs:
            limit, rows = limits.of(specs[0]), pack["micro_batch_size"]
            limit.rows = pack["most_rows"] or limit.rows
            limit.forward_parts = max(limit.forward_parts, pack["forward_parts"])
            execute(specs, exec_, store, trainer, report, stop, rows, limits)
        if stop.set:
            raise Stopped
        if isinstance(trainer, Leader):
            trainer.leave()
            if trainer.broken:
                return  # the failure is recorded; new processes train the other packs


def skipped(path: str | None) -> set[str]:
    """Read a file of run ids that must not be started; empty without a file."""
    return set(files.read_json(Path(path)) or []) if path else set()


class Reporter:
    """Prints events as JSON lines; sets the stop flag if the reading process is gone."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Print an event. Progress is left out within REPORT_S of the last event printed."""
        if event.keys().isdisjoint(("ended", "note")) and time.monotonic() - self._last <= REPORT_S:
            return
        self._last = time.monotonic()
        try:
            print(json.dumps(event), flush=True)
        except OSError:  # the command that started this worker is gone: stop cleanly
            self._stop.set = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
