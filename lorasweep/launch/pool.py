"""Worker processes, which take job after job and keep their base model; also in a container."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

from lorasweep.errors import StoreError
from lorasweep.launch.container import Container
from lorasweep.launch.out_of_memory import Shortage
from lorasweep.launch.process import THREAD_VARIABLES, worker_environment
from lorasweep.plan import detect
from lorasweep.store.run_store import RunStore

LAST_S = 20.0
"""Seconds that the other processes of a worker have to end after its process 0 has ended."""
SRUN_STOP = signal.SIGUSR2
"""Stop signal for srun, which passes it on and waits. At SIGTERM it would kill all at once."""
SRUN_KILLED = 128
"""If a signal kills a process, srun and apptainer exit with this plus the signal's number."""


class Workers:
    """Worker processes, which take job after job and keep their base model.

    A context manager: at its end all workers end. Their stderr is in the file `log`.
    """

    def __init__(
        self,
        store: RunStore,
        world_size: int = 1,
        n_nodes: int = 1,
        container: Container | None = None,
    ) -> None:
        """Set up, without a process. `n_nodes`: of this job, which the processes of a run share."""
        self.log = store.root / ".jobs" / f"{os.getpid()}-{os.urandom(3).hex()}.log"
        self._world_size, self._nodes, self._container = world_size, n_nodes, container
        self._by_srun = n_nodes > 1 or bool(container and container.by_srun)
        self._shape = (0, 0, 0)  # workers, shares, threads
        self._groups: list[list[Any]] = []
        """The processes of each worker."""
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.shortages: dict[str, Shortage] = {}
        """Run id -> shortage of memory, for runs that are trained by several processes."""

    def __enter__(self) -> "Workers":
        """Return itself."""
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        """End all workers; after an error stop their runs, and keep the log."""
        self.end(stop=error is not None)
        if error is None:
            self.log.unlink(missing_ok=True)

    def run(
        self,
        job: dict[str, Any],
        number: int,
        shares: int,
        threads: int,
        report: Callable[[dict[str, Any]], None],
    ) -> str | None:
        """Let `number` workers, each with 1 / `shares` of the GPUs, do a job; return an error.

        They are kept for the next job with the same numbers, until one has ended.
        """
        shape, self.shortages, error = (number, shares, threads), {}, None
        if shape != self._shape or any(p.poll() is not None for p in chain(*self._groups)):
            self.end()
            self._shape = shape
            for k in range(number):
                self._groups.append([])
                self._start(k)
        for process in chain(*self._groups):
            with suppress(OSError):  # it has died
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
        busy = list(self._groups)
        while busy:
            event = self._events.get()
            if "over" in event:  # this worker has done the job, or has ended
                busy = [group for group in busy if group is not event["over"]]
            elif "out_of_memory" in event:
                self.shortages[event["run"]] = Shortage(**event["out_of_memory"])
            elif "error" in event:
                error = event["error"]
            else:
                report(event)
        return error

    def _start(self, k: int) -> None:
        """Start worker `k`: on several nodes, and with pyxis, by srun as a job step.

        On several nodes a process sees all GPUs of its node and takes the one with its LOCAL_RANK.
        """
        (_, shares, threads), size, nodes = self._shape, self._world_size, self._nodes
        shared = devices_of(k, shares) if nodes == 1 else {}
        if size > 1:  # torchrun's variables, with process 0 on this machine
            host = socket.gethostname() if self._by_srun else "127.0.0.1"
            with socket.create_server(("", 0)) as probe:
                port = str(probe.getsockname()[1])
            shared |= {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        environments = [shared]
        if size > 1 and not self._by_srun:
            ranks = map(str, range(size))
            environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
        srun: list[str] = []
        if self._by_srun:
            srun = (
                f"srun --overlap --nodes={nodes} --ntasks={size} --ntasks-per-node={size // nodes} "
                f"--distribution=block --wait={LAST_S:.0f} --kill-on-bad-exit=0 --export=ALL "
                "--unbuffered"
            ).split()
            if nodes == 1:  # the job's other processes, on the same cores, are one task
                srun.append(f"--cpus-per-task={max(1, detect.cores() // size)}")
            srun += self._container.srun() if self._container else []
        group = self._groups[k]
        try:
            self.log.parent.mkdir(exist_ok=True)
            errors = open(self.log, "ab")  # noqa: SIM115
        except OSError as error:
            raise StoreError(f"{self.log} cannot be written ({error.strerror}).") from None
        with errors:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            for more in environments:
                env, start = {**worker_environment(threads), **more}, [sys.executable]
                if self._container:
                    start = self._container.python(env, (*THREAD_VARIABLES, *more))
                words = [*srun, *start, "-m", "lorasweep.launch.worker", str(k)]
                group.append(subprocess.Popen(words, env=env, text=True, **pipes))
        for process in group:
            threading.Thread(target=self._read, args=(process, group), daemon=True).start()

    def _read(self, process: Any, group: list[Any]) -> None:
        """Queue the events of a process. When process 0 ended or a process failed, end `group`."""
        for line in process.stdout:
            with suppress(ValueError):  # not an event
                event = json.loads(line)
                if isinstance(event, dict):
                    self._events.put({"over": group} if "job_done" in event else event)
        code, first = process.wait(), process is group[0]
        for other in group if code or first else ():
            try:
                other.wait(LAST_S if first else 0)
            except subprocess.TimeoutExpired:
                other.kill()
        if first:
            self._events.put({"over": group})

    def codes(self) -> list[int]:
        """Return the exit status of each worker that has ended, negative after a signal.

        That of process 0; if a signal killed it, the highest one of the worker: a positive one
        belongs to the process whose error was the cause.
        """
        found = []
        for group in self._groups:
            if all(process.poll() is None for process in group):
                continue  # it waits for the next job
            known = [process.wait() for process in group]
            if self._by_srun or self._container:
                known = [SRUN_KILLED - c if c > SRUN_KILLED else c for c in known]
            found.append(known[0] if known[0] >= 0 else max(known))
        return found

    def end(self, stop: bool = False) -> None:
        """End all workers: without work they exit, `stop` also writes checkpoints of runs."""
        ended, self._groups = [*chain(*self._groups)], []
        for process in ended:
            if stop and process.poll() is None:
                process.send_signal(SRUN_STOP if self._by_srun else signal.SIGTERM)
            with suppress(OSError):
                process.stdin.close()
        for process in ended:
            process.wait()


def devices_of(worker: int, workers: int) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES for a worker. More workers than GPUs share the GPUs."""
    devices = detect.devices()
    if not devices:
        return {}
    share = max(1, len(devices) // workers)
    mine = [devices[(worker * share + i) % len(devices)] for i in range(share)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
