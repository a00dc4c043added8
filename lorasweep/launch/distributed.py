"""Several processes train one run: process 0 leads, the others follow.

Process 0 owns the run folder and decides; what it decides, every process does at the same update.
After each update it says whether to write a checkpoint, go on or end. A stop that was asked of any
process is known to all before. Torch is imported inside functions.
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
from lorasweep.launch.out_of_memory import is_out_of_memory, request
from lorasweep.launch.process import StopFlag
from lorasweep.launch.trainer import Trainer
from lorasweep.methods.registry import spec_from
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.models.sharding import Mesh

GO, WRITE, END = "go", "write", "end"
COMMUNICATION = ("gloo", "NCCL", "Broken pipe", "recvBytes", "TCPStore")
"""Parts of torch's messages when another process is gone; they are plain RuntimeErrors."""


def check_world_size(
    specs: Sequence[RunSpec], exec_: Exec, cluster: Cluster, hardware: Hardware
) -> None:
    """Check that runs can be trained by exec.world_size processes each.

    `hardware`: this machine, which counts unless jobs of a cluster train them.

    Raises:
        SpecError: they cannot.
    """
    size = exec_.world_size
    if size == 1:
        return
    for spec in specs:
        if spec.batch_size % size:
            sizes = [str(n) for n in range(1, spec.batch_size + 1) if spec.batch_size % n == 0]
            raise SpecError(
                f"exec.world_size={size} does not divide batch_size={spec.batch_size}: every "
                "process takes the same number of rows. Allowed for this batch: "
                f"{', '.join(sizes)}."
            )
    gpus, workers = hardware.gpus, exec_.workers or 1
    where = f"this machine has {gpus} ({hardware.gpu_name})"
    if cluster.kind != "local":
        gpus, workers = cluster.gpus, cluster.workers or max(1, cluster.gpus)
        where = f"a job has cluster.gpus={gpus}, for {workers} workers"
    if gpus and size * workers > gpus:
        fitting = f"exec.world_size=1 to {gpus // workers}"
        if size <= gpus and workers > 1:
            setting = "exec" if cluster.kind == "local" else "cluster"
            fitting += f", or {setting}.workers={gpus // size}"
        raise SpecError(
            f"exec.world_size={size}: every process of a run has a GPU of its own, and {where}. "
            f"Allowed: {fitting}. A run is trained within one machine."
        )


class Leader:
    """The trainer of process 0: trains like the one given, with the others."""

    def __init__(self, trainer: Trainer, mesh: "Mesh", stop: StopFlag) -> None:
        self._trainer, self._mesh, self._stop = trainer, mesh, stop
        self._events: Generator[Event, None, None] | None = None
        self.broken = False
        """A training failed here: the others wait for it, so nothing more can be trained."""

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train one run, from the start or from its state."""
        self._leave()
        self._events = self._lead(pack, exec_, resume)
        return self._events

    def _lead(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None
    ) -> Generator[Event, None, None]:
        found = resume and {i: _reference(state) for i, state in resume.items()}
        with _with_others():
            self._mesh.broadcast(([s.plain() for s in pack], dataclasses.asdict(exec_), found))
            self.broken = True
            for event in self._trainer(pack, exec_, found):
                self._stop.set = self._mesh.any(self._stop.set)
                event.snapshot = partial(self._states, event.snapshot)
                try:
                    yield event
                except GeneratorExit:
                    self._mesh.broadcast((END, None, None))
                    self.broken = False
                    raise
                self._mesh.broadcast((GO, event.dropped, None))
            self.broken = False

    def _states(self, held: Callable[[], dict[str, State]]) -> dict[str, State]:
        return {
            i: {"tensors": {}, "meta": s["meta"], "write": partial(self._write, i, s["tensors"])}
            for i, s in held().items()
        }

    def _write(self, run: str, tensors: "dict[str, Tensor]", folder: Path) -> dict[str, str]:
        from lorasweep.models.sharded_tensors import write

        with _with_others():
            self._mesh.broadcast((WRITE, run, folder))
            return write(folder, tensors, self._mesh)

    def _leave(self) -> None:
        """End a training that is not over, in all processes."""
        if self._events is not None:
            self._events.close()

    def dismiss(self) -> None:
        """Let the others end."""
        self._leave()
        if not self.broken:
            self._mesh.broadcast(None)


def follow(trainer: Trainer, mesh: "Mesh", stop: StopFlag) -> None:
    """Train what process 0 says, until it says no more."""
    from lorasweep.models.sharded_tensors import write

    with _with_others():
        while (order := mesh.broadcast()) is not None:
            specs, settings, resume = order
            events = trainer([spec_from(plain) for plain in specs], Exec(**settings), resume)
            for event in events:
                mesh.any(stop.set)
                while (word := mesh.broadcast())[0] == WRITE:
                    write(word[2], event.snapshot()[word[1]]["tensors"], mesh)
                if word[0] == END:
                    break
                event.dropped |= word[1]


def _reference(state: State) -> State:
    """Return a state without its tensors: every process reads its part of them."""
    return {"tensors": {}, "meta": state["meta"], "path": state["path"]}


@contextmanager
def _with_others() -> Iterator[None]:
    """Let this process die if another one did, so that its runs count as interrupted.

    Raises:
        ModelError: out of memory. Other processes are at another point, so no smaller size can be
            tried here.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            asked = request(error)
            raise ModelError(
                f"out of memory{f' (asked for {asked})' if asked else ''} in one of the processes "
                "of a run. Set a smaller exec.micro_batch_size, more processes "
                "(exec.world_size), or exec.activation_checkpointing=true."
            ) from None
        if isinstance(error, RuntimeError) and any(c in str(error) for c in COMMUNICATION):
            print(f"another process of this run is gone: {error}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise
