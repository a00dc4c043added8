"""A worker process: train the free packs of a job file. Started by launch/local.

With exec.world_size above one it is one of several processes that train each run together; what
torchrun sets in the environment (RANK, MASTER_ADDR, ...) names them, or Slurm (`nodes`).

    python -m lorasweep.launch.worker JOB.json SHA256 [FIRST]

The job file lies in the run folder, where others may write, and names the trainer to import: it is
refused unless it has the given SHA-256.

    {"packs": [{"runs": [spec, ...], "micro_batch_size": n, "most_rows": n or null,
                "forward_parts": n}, ...],
     "exec": {...},
     "dead": {run id: attempt}, "trainer": null or "package.module:object",
     "skip": null or a file of run ids not to start}

Events go to stdout as JSON lines.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lorasweep.errors import LorasweepError
from lorasweep.launch import nodes
from lorasweep.launch.distributed import Leader, follow
from lorasweep.launch.fitting import Limits
from lorasweep.launch.out_of_memory import OutOfMemoryTogether
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped, die_with_parent, keep_freed_memory
from lorasweep.launch.slurm.running import RunningJobs
from lorasweep.launch.trainer import Trainer, trainer_named
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore

STOPPED, REFUSED, OUT_OF_MEMORY = 3, 4, 5
"""Exit statuses: stopped by a signal; an error that the user must correct, printed as an event;
memory of one of the processes of a run ran out, printed as an event."""
REPORT_S = 0.3
"""Minimum seconds between progress reports. Ends of runs and notes are reported at once."""


def skipped(path: str | None) -> set[str]:
    """Read a file of run ids that must not be started; empty if there is no file."""
    return set(files.read_json(Path(path)) or []) if path else set()


class _Reporter:
    """Prints events. If nobody reads them any more, it sets the stop flag."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if event.keys().isdisjoint(("ended", "note")) and time.monotonic() - self._last <= REPORT_S:
            return
        self._last = time.monotonic()
        try:
            print(json.dumps(event), flush=True)
        except OSError:  # the command that started this worker is gone, so stop cleanly
            self._stop.set = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main(job_path: str, sha256: str, first: int = 0) -> int:
    """Train the free packs of a job file, starting with number `first`; return the exit status."""
    die_with_parent()
    keep_freed_memory()
    stop = StopFlag()
    stop.install()
    content = Path(job_path).read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        print(json.dumps({"error": f"{job_path} was changed by somebody else."}), flush=True)
        return REFUSED
    job = json.loads(content)
    store = RunStore(job["exec"]["runs_dir"], dead=job.get("dead"), jobs=RunningJobs())
    files.share_as(store.root)
    try:
        if job["exec"]["world_size"] > 1:
            _run_together(job, first, store, stop)
        else:
            _run(job, first, store, trainer_named(job.get("trainer"), stop), stop)
    except Stopped:
        return STOPPED
    except OutOfMemoryTogether as error:
        print(json.dumps({"out_of_memory": error.run, **vars(error)}), flush=True)
        return OUT_OF_MEMORY
    except LorasweepError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return REFUSED
    return 0


def _run_together(job: dict[str, Any], first: int, store: RunStore, stop: StopFlag) -> None:
    """Train with the other processes: process 0 as any worker does, the others as it says."""
    from lorasweep.models.sharding import Mesh

    nodes.take_rank()
    mesh = Mesh.join()
    trainer = trainer_named(job.get("trainer"), stop, mesh)
    if mesh.rank:
        return follow(trainer, mesh, stop)
    leader = Leader(trainer, mesh, stop)
    try:
        _run(job, first, store, leader, stop)
    finally:
        leader.dismiss()


def _run(
    job: dict[str, Any], first: int, store: RunStore, trainer: Trainer, stop: StopFlag
) -> None:
    exec_, report, limits = Exec(**job["exec"]), _Reporter(stop), Limits()
    packs = job["packs"]
    for pack in packs[first:] + packs[:first]:
        unwanted = skipped(job.get("skip"))
        specs = [s for s in map(spec_from, pack["runs"]) if s.id not in unwanted]
        if specs:
            rows = pack["micro_batch_size"]
            limit = limits.of(specs[0])
            if pack["most_rows"] is not None:
                limit.rows = pack["most_rows"]
            limit.forward_parts = max(limit.forward_parts, pack["forward_parts"])
            execute(specs, exec_, store, trainer, report, stop, rows, limits)
        if stop.set:
            raise Stopped
        if isinstance(trainer, Leader):
            trainer.leave()
            if trainer.broken:
                return  # a training failed, and is recorded; new processes train the other packs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
