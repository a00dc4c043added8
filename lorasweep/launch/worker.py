"""A worker process: train the free packs of jobs, and print events as JSON lines.

    python -m lorasweep.launch.worker FIRST

A job is a line on its standard input. It begins with pack FIRST, and prints {"job_done": true}
after a job. Until the input ends, it keeps the base model and the data for the next job.

    {"packs": [{"runs": [spec, ...], "micro_batch_size": n, "most_rows": n or null,
                "forward_parts": n}, ...],
     "exec": {...},
     "dead": {run id: attempt}, "trainer": null or "package.module:object",
     "skip": null or a file of run ids not to start}

With exec.world_size above one, several such processes get the same jobs and train each run
together; their ranks come from torchrun's environment variables (RANK, MASTER_ADDR, ...) or from
Slurm.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import LorasweepError
from lorasweep.launch.distributed import Leader, OutOfMemoryTogether, follow
from lorasweep.launch.out_of_memory import Limits
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped, die_with_parent, keep_freed_memory
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.trainer import Trainer, trainer_named
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore

if TYPE_CHECKING:
    from lorasweep.models.sharding import Mesh

STOPPED, REFUSED = 3, 4
"""Exit statuses. REFUSED: an error that was printed as an event."""
REPORT_S = 0.3
"""Minimum seconds between progress reports. Ends of runs and notes are reported at once."""
SLURM_RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
"""Environment variable of torchrun -> that of Slurm."""


def main(first: int) -> int:
    """Train the free packs of jobs, beginning with pack `first`; return the exit status."""
    die_with_parent()
    keep_freed_memory()
    stop = StopFlag()
    stop.install()
    trainers: dict[str | None, Trainer] = {}
    try:
        mesh = _join()
        for line in sys.stdin:
            job = json.loads(line)
            name = job["trainer"]
            trainers[name] = trainers.get(name) or trainer_named(name, stop, mesh)
            if not _train(job, first, trainers[name], stop, mesh):
                break
    except Stopped:
        return STOPPED
    except OutOfMemoryTogether as together:
        event = {"run": together.run, "out_of_memory": asdict(together.shortage)}
        print(json.dumps(event), flush=True)
        return REFUSED
    except LorasweepError as refusal:
        print(json.dumps({"error": str(refusal)}), flush=True)
        return REFUSED
    return 0


def _join() -> "Mesh | None":
    """Join the other processes of this worker; None if there are none."""
    if "WORLD_SIZE" not in os.environ:
        return None
    from lorasweep.models.sharding import Mesh

    os.environ.update({k: os.environ[v] for k, v in SLURM_RANKS.items() if k not in os.environ})
    return Mesh.join()


def _train(
    job: dict[str, Any], first: int, trainer: Trainer, stop: StopFlag, mesh: "Mesh | None"
) -> bool:
    """Do a job. Return False if the other processes of this worker can train no further run."""
    if mesh and mesh.rank:
        follow(trainer, mesh, stop)
        return not stop.set
    exec_, report, limits = Exec(**job["exec"]), Reporter(stop), Limits()
    store = RunStore(exec_.runs_dir, dead=job["dead"], jobs=RunningJobs(exec_.runs_dir))
    leader = Leader(trainer, mesh, stop) if mesh else None
    try:
        for pack in job["packs"][first:] + job["packs"][:first]:
            unwanted = skipped(job["skip"])
            specs = [s for s in map(spec_from, pack["runs"]) if s.id not in unwanted]
            if specs:
                limit, rows = limits.of(specs[0]), pack["micro_batch_size"]
                limit.rows = pack["most_rows"] or limit.rows
                limit.forward_parts = max(limit.forward_parts, pack["forward_parts"])
                execute(specs, exec_, store, leader or trainer, report, stop, rows, limits)
            if stop.set:
                raise Stopped
            if leader and leader.broken():
                return False  # the failure is recorded; new processes train the other packs
    finally:
        if leader:
            leader.dismiss()
    print(json.dumps({"job_done": True}), flush=True)
    return True


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
    sys.exit(main(int(sys.argv[1])))
