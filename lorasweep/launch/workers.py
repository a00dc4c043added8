"""The worker processes of a command: start them with their threads and devices, read their events.

A worker is one process, or exec.world_size of them that train each run together, on this machine or
on the nodes of a Slurm job. Refuses to know the runs.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasweep.launch import nodes
from lorasweep.plan import detect

Event = dict[str, Any]
Report = Callable[[Event], None]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Makes waiting OpenMP threads sleep. By default they spin, and block the core that the other
thread needs: two training processes on two busy cores are then a hundred times slower (LOG.md)."""
LAST_S = 20.0
"""Seconds that the other processes of a worker may take to end after the first one."""


class Workers:
    """Worker processes, all with the same job file."""

    def __init__(
        self, job: list[str], log: Path, threads: int, world_size: int, n_nodes: int = 1
    ) -> None:
        """Set up; `job`: the arguments of launch/worker but the last, `log`: for what it prints.

        `n_nodes`: nodes of this Slurm job, over which the processes of a worker are spread.
        """
        self._job, self._log, self._world_size, self._nodes = job, log, world_size, n_nodes
        self._environment = worker_environment(threads)
        self._groups: list[list[subprocess.Popen]] = []
        self._events: queue.Queue[Event | None] = queue.Queue()
        self.out_of_memory: dict[str, Event] = {}
        """Run id -> what a worker of several processes reported when its memory ran out."""

    def start(self, number: int, shares: int) -> None:
        """Start `number` workers, each on one of `shares` shares of the GPUs."""
        with open(self._log, "ab") as errors:
            for k in range(number):
                group: list[subprocess.Popen] = []
                self._groups.append(group)
                before, given = self._commands(devices_of(k, shares))
                for more in given:
                    process = subprocess.Popen(
                        [
                            *before,
                            sys.executable,
                            "-m",
                            "lorasweep.launch.worker",
                            *self._job,
                            str(k),
                        ],
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        env={**self._environment, **more},
                    )
                    group.append(process)
        for group in self._groups:
            for process in group:
                arguments = (process, group, self._events)
                threading.Thread(target=_read, args=arguments, daemon=True).start()

    def _commands(self, devices: dict[str, str]) -> tuple[list[str], list[dict[str, str]]]:
        """Return what stands before a worker's command, and the environment of each it starts."""
        size = self._world_size
        if self._nodes > 1:
            return nodes.step(self._nodes, size, LAST_S), [_address(nodes.host(), size)]
        if size == 1:
            return [], [devices]
        address = _address("127.0.0.1", size)
        ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(size)]
        return [], [{**devices, **address, **rank} for rank in ranks]

    def pass_on(self, report: Report) -> str | None:
        """Report events until every process has ended; return the last error event, or None."""
        error, running = None, sum(map(len, self._groups))
        while running:
            event = self._events.get()
            if event is None:
                running -= 1
            elif "error" in event:
                error = event["error"]
            elif "out_of_memory" in event:
                self.out_of_memory[event["run"]] = event
            else:
                report(event)
        return error

    def wait(self) -> list[int]:
        """Wait for all processes; return the exit status of each worker.

        That is its first process's; if it was killed because another one failed, that one's.
        """
        codes = [[process.wait() for process in group] for group in self._groups]
        if self._nodes > 1:
            codes = [[nodes.status_of(code) for code in group] for group in codes]
        return [first if first >= 0 else max((first, *rest)) for first, *rest in codes]

    def stop(self) -> None:
        """Let each finish its update, write a checkpoint and exit; wait for all."""
        for group in self._groups:
            for process in group:
                if process.poll() is None:
                    process.send_signal(nodes.STOP if self._nodes > 1 else signal.SIGTERM)
        self.wait()


def _address(host: str, world_size: int) -> dict[str, str]:
    """Return torchrun's environment variables that all processes of a worker share.

    `host`: this machine, on which process 0 is.
    """
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker: this code, not the current folder's, and its threads."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        **WAIT_POLICY,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }


def devices_of(worker: int, workers: int) -> dict[str, str]:
    """Return the GPUs of a worker as an environment variable; empty without GPUs.

    Each worker has its own GPUs; with more workers than GPUs, workers share them.
    """
    devices = detect.devices()
    if not devices:
        return {}
    share = max(1, len(devices) // workers)
    mine = [devices[(worker * share + i) % len(devices)] for i in range(share)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _read(
    process: subprocess.Popen, group: list[subprocess.Popen], events: "queue.Queue[Event | None]"
) -> None:
    """Put a process's events into the queue. After its end, those that wait for it end, too."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.put(event)
    code = process.wait()
    first = process is group[0]
    for other in group if code or first else ():
        try:
            other.wait(LAST_S if first else 0)
        except subprocess.TimeoutExpired:
            other.kill()
    events.put(None)
