"""Train one run in several processes: process 0 claims the run and leads, the others follow.

After each update, all processes exchange whether one of them got a stop signal. Then process 0
orders the others to write a checkpoint, to continue or to end.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.errors import ModelError, SpecError
from lorasweep.launch.out_of_memory import Shortage, is_out_of_memory
from lorasweep.launch.process import StopFlag
from lorasweep.launch.trainer import Trainer
from lorasweep.methods.registry import spec_from
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import load_of
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.models.sharding import Mesh

GO, WRITE, END = "go", "write", "end"
COMMUNICATION = ("gloo", "NCCL", "Broken pipe", "recvBytes", "TCPStore")
"""Substrings of the RuntimeErrors that torch raises when another process is gone."""


def check_world_size(
    specs: Sequence[RunSpec], exec_: Exec, cluster: Cluster, hardware: Hardware
) -> None:
    """Check that exec.world_size processes can train each run; raise SpecError if not."""
    size = exec_.world_size
    for spec in specs:
        if spec.batch_size % size:
            raise SpecError(
                f"exec.world_size={size} does not divide batch_size={spec.batch_size}: every "
                "process takes the same number of rows. Choose a number that divides it."
            )
        rank = getattr(spec.method, "rank", 0)  # each factor of an adapter is split along a side
        for m in load_of(spec.model, spec.method).adapted:
            for side in (m.d_in, m.d_out):
                if all(n % size for n in (side, rank, m.n_experts)):
                    raise SpecError(
                        f"exec.world_size={size} divides neither rank {rank} nor {side}, the sides "
                        f"of an adapter of {spec.model.name}: no split is possible. Choose a "
                        "number that divides the model's width, such as a power of 2."
                    )
    gpus, workers = hardware.gpus, exec_.workers or 1
    if cluster.kind == "local" and gpus and size * workers > gpus:  # nodes are checked with jobs
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
        self._events: Generator[Event, None, None] | None = None
        self._broken = False

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train one run, from the start or from its state in `resume`."""
        self.broken()
        self._events = self._lead(pack, exec_, resume)
        return self._events

    def _lead(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None
    ) -> Generator[Event, None, None]:
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
            self._broken = True
            for event in self._trainer(pack, exec_, states):
                self._stop.set = self._mesh.any(self._stop.set)
                event.snapshot = partial(snapshot, event.snapshot)
                try:
                    yield event
                except GeneratorExit:
                    self._mesh.broadcast((END, None, None))
                    self._broken = False
                    raise
                self._mesh.broadcast((GO, event.dropped, None))
            self._broken = False

    def broken(self) -> bool:
        """End an unfinished training; return whether it failed here while the others wait."""
        if self._events is not None:
            self._events.close()
        return self._broken

    def dismiss(self) -> None:
        """Let the other processes wait for the next job."""
        if not self.broken():
            self._mesh.broadcast(None)


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
