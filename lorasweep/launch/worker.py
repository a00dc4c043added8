"""A worker process: train the free packs of jobs, and print events as JSON lines.

    python -m lorasweep.launch.worker FIRST

A job is a line on its standard input. It begins with pack FIRST, and prints {"job_done": true}
after a job. Until the input ends, it keeps the base model and the data for the next job.

    {"packs": [{"runs": [spec, ...], "micro_batch_size": n, "most_rows": n or null,
                "forward_parts": n}, ...],
     "exec": {...},
     "dead": {run id: attempt}, "trainer": null or "package.module:object"}

With exec.world_size above one, several such processes, which torchrun's environment variables or
Slurm number, get the same jobs. Process 0 claims a run and leads, the others follow. After each
update they exchange whether one got a stop signal. Then process 0 orders the others to write a
checkpoint, to continue or to end.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import LorasweepError, ModelError, SpecError
from lorasweep.launch.out_of_memory import Limits, Shortage, is_out_of_memory
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped, die_with_parent, keep_freed_memory
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.torch_trainer import Events, Report, Trainer, trainer_named
from lorasweep.methods.registry import spec_from
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import load_of
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.models.sharding import Mesh

STOPPED, REFUSED = 3, 4
"""Exit statuses. REFUSED: an error that was printed as an event."""
REPORT_S = 0.3
"""Minimum seconds between progress reports. Ends of runs and notes are reported at once."""
GO, WRITE, END = "go", "write", "end"
COMMUNICATION = ("gloo", "NCCL", "Broken pipe", "recvBytes", "TCPStore")
"""Substrings of the RuntimeErrors that torch raises when another process is gone."""


def main(first: int) -> int:
    """Train the free packs of jobs, beginning with pack `first`; return the exit status."""
    die_with_parent()
    keep_freed_memory()
    stop = StopFlag()
    stop.install()
    trainers: dict[str | None, Trainer] = {}
    try:
        mesh = None
        if "WORLD_SIZE" in os.environ:  # the other processes of this worker
            from lorasweep.models.sharding import Mesh

            for name, of_slurm in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
                os.environ.setdefault(name, os.environ.get(of_slurm, ""))
            mesh = Mesh.join()
        for line in sys.stdin:
            job = json.loads(line)
            name = job["trainer"]
            trainers[name] = trainers.get(name) or trainer_named(name, stop, mesh)
            if not _train(job, first, trainers[name], stop, mesh):
                break
    except Stopped:
        return STOPPED
    except LorasweepError as refusal:
        event: dict[str, Any] = {"error": str(refusal)}
        if isinstance(refusal, OutOfMemoryTogether):
            event = {"run": refusal.run, "out_of_memory": dataclasses.asdict(refusal.shortage)}
        print(json.dumps(event), flush=True)
        return REFUSED
    return 0


def _train(
    job: dict[str, Any], first: int, trainer: Trainer, stop: StopFlag, mesh: "Mesh | None"
) -> bool:
    """Do a job. Return False if the other processes of this worker can train no further run."""
    if mesh and mesh.rank:
        follow(trainer, mesh, stop)
        return not stop.set
    exec_, report, limits = Exec(**job["exec"]), _reporter(stop), Limits()
    store = RunStore(exec_.runs_dir, dead=job["dead"], jobs=RunningJobs(exec_.runs_dir))
    leader = Leader(trainer, mesh, stop) if mesh else None
    try:
        for pack in job["packs"][first:] + job["packs"][:first]:
            specs, rows = [spec_from(plain) for plain in pack["runs"]], pack["micro_batch_size"]
            limit = limits.of(specs[0])
            limit.rows = pack["most_rows"] or limit.rows
            limit.forward_parts = max(limit.forward_parts, pack["forward_parts"])
            execute(specs, exec_, store, leader or trainer, report, stop, rows, limits)
            if stop.set:
                raise Stopped
            if leader and leader.broken:
                return False  # the failure is recorded; new processes train the other packs
    finally:
        if mesh and leader and not leader.broken:
            mesh.broadcast(None)  # the others wait for the next job
    print(json.dumps({"job_done": True}), flush=True)
    return True


def _reporter(stop: StopFlag) -> Report:
    """Return what prints events as JSON lines; it sets the stop flag if nobody reads them.

    Progress is left out within REPORT_S of the last event printed.
    """
    last = 0.0

    def report(event: dict[str, Any]) -> None:
        nonlocal last
        if event.keys().isdisjoint(("ended", "note")) and time.monotonic() - last <= REPORT_S:
            return
        last = time.monotonic()
        try:
            print(json.dumps(event), flush=True)
        except OSError:  # the command that started this worker is gone: stop cleanly
            stop.set = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    return report


# ---------------------------------------------------------------- several processes


def check_world_size(
    specs: Sequence[RunSpec], exec_: Exec, cluster: Cluster, hardware: Hardware
) -> None:
    """Check that exec.world_size processes can train each run; raise SpecError if not."""
    size, gpus = exec_.world_size, hardware.gpus
    for uneven in (spec.batch_size for spec in specs if spec.batch_size % size):
        raise SpecError(f"exec.world_size={size} does not divide batch_size={uneven}.")
    for model, method in {(spec.model, spec.method) for spec in specs}:
        if method.LIBRARY and size > 1:
            raise SpecError(f"exec.world_size={size}: method={method.name} trains in one process.")
        rank = getattr(method, "rank", 0)  # each factor of an adapter is split along a side
        for m in load_of(model, method).adapted:
            if any(all(n % size for n in (side, rank, m.n_experts)) for side in (m.d_in, m.d_out)):
                raise SpecError(
                    f"exec.world_size={size} divides neither rank {rank} nor a side of an adapter "
                    f"of {model.name} ({m.d_in} x {m.d_out}). Choose a divisor of its width."
                )
    if cluster.kind == "local" and gpus and size * (exec_.workers or 1) > gpus:
        raise SpecError(
            f"exec.world_size={size}: every process of a run needs a separate GPU, and this "
            f"machine has {gpus} ({hardware.gpu_name}). exec.world_size times exec.workers must "
            f"be at most {gpus}. Several machines: cluster=slurm."
        )


class OutOfMemoryTogether(ModelError):
    """One process of a run is out of memory. The others wait for it, so all must start again."""

    def __init__(self, run: str, shortage: Shortage) -> None:
        super().__init__(f"out of memory{shortage.asked} in one of the processes of a run")
        self.run, self.shortage = run, shortage


class Leader:
    """Trainer of process 0: calls the given trainer, and sends orders to the other processes."""

    def __init__(self, trainer: Trainer, mesh: "Mesh", stop: StopFlag) -> None:
        self._trainer, self._mesh, self._stop = trainer, mesh, stop
        self.broken = False
        """Whether training failed here while the others wait."""

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Events:
        """Train one run, from the start or from its state in `resume`."""
        # send no tensors: every process reads its part from the checkpoint
        states: dict[str, State] | None = resume and {
            i: {"tensors": {}, "meta": s["meta"], "path": s["path"]} for i, s in resume.items()
        }

        def write(run: str, tensors: "dict[str, Tensor]", folder: Path) -> dict[str, str]:
            from lorasweep.models.sharding import write_tensors

            with _with_others(pack[0], exec_):
                self._mesh.broadcast((WRITE, run, folder))
                return write_tensors(folder, tensors, self._mesh)

        def snapshot(held: Callable[[], dict[str, State]]) -> dict[str, State]:
            return {
                i: {"tensors": {}, "meta": s["meta"], "write": partial(write, i, s["tensors"])}
                for i, s in held().items()
            }

        with _with_others(pack[0], exec_):
            self._mesh.broadcast(([s.plain() for s in pack], dataclasses.asdict(exec_), states))
            self.broken = True
            for event in self._trainer(pack, exec_, states):
                self._stop.set = self._mesh.any(self._stop.set)
                event.snapshot = partial(snapshot, event.snapshot)
                try:
                    yield event
                except GeneratorExit:
                    self._mesh.broadcast((END, None, None))
                    self.broken = False
                    raise
                self._mesh.broadcast((GO, event.dropped, None))
            self.broken = False


def follow(trainer: Trainer, mesh: "Mesh", stop: StopFlag) -> None:
    """Train the runs that process 0 broadcasts, until process 0 dismisses this process."""
    while (order := mesh.broadcast()) is not None:
        specs, settings, resume = order
        pack, exec_ = [spec_from(plain) for plain in specs], Exec(**settings)
        with _with_others(pack[0], exec_):
            _follow_once(trainer(pack, exec_, resume), mesh, stop)


def _follow_once(events: Iterator[Event], mesh: "Mesh", stop: StopFlag) -> None:
    """Train one run. A separate function, so that its local variables are freed at the end."""
    from lorasweep.models.sharding import write_tensors

    for event in events:
        mesh.any(stop.set)
        while (word := mesh.broadcast())[0] == WRITE:
            write_tensors(word[2], event.snapshot()[word[1]]["tensors"], mesh)
        if word[0] == END:
            break
        event.dropped |= word[1]


@contextmanager
def _with_others(spec: RunSpec, exec_: Exec) -> Iterator[None]:
    """Kill this process if another one is gone; raise OutOfMemoryTogether if memory ran out."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryTogether(spec.id, Shortage.of(error, exec_, spec)) from None
        if isinstance(error, RuntimeError) and any(c in str(error) for c in COMMUNICATION):
            print(f"another process of this run is gone: {error}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)  # so that the run counts as interrupted
        raise


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
