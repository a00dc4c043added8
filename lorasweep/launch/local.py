"""Train runs on this machine or in this Slurm job, in worker processes that claim free runs.

A worker is one process of `launch.worker`, or exec.world_size processes that train each run
together. The stages of a sweep use the same workers. Two commands for the same sweep share the
runs: each waits for runs that the other has claimed.
"""

import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

from lorasweep.errors import StoreError, TrainingError
from lorasweep.launch.out_of_memory import Limits, Shortage
from lorasweep.launch.pack import execute
from lorasweep.launch.process import THREAD_VARIABLES, StopFlag, Stopped, worker_environment
from lorasweep.launch.slurm.container import Container
from lorasweep.launch.trainer import Report, Trainer
from lorasweep.launch.worker import STOPPED, skipped
from lorasweep.plan import detect
from lorasweep.plan.planner import Plan, make_plan
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

POLL_S = 0.5
"""Seconds between checks of runs that other processes train."""
LAST_S = 20.0
"""Seconds that the other processes of a worker have to end after its process 0 has ended."""
SRUN_STOP = signal.SIGUSR2
"""Stop signal for srun, which passes it to all processes and waits for them. At SIGTERM srun would
kill them at once."""
SRUN_KILLED = 128
"""If a signal kills a process, srun and apptainer exit with this plus the signal's number."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Report,
    trainer: Trainer | str | None = None,
    plan: Plan | None = None,
    workers: "Workers | None" = None,
    skip: str | None = None,
    patience_s: float = math.inf,
) -> None:
    """Train every run of `points` until it is finished or has a recorded failure.

    `trainer`: None for the real trainer or a name (package.module:object): train in worker
    processes. A callable trains in this process (for tests).
    `plan`: plan of these points on this machine, if it was just made.
    `workers`: processes for runs with this `exec_`; None: new ones.
    `skip`: file of run ids that must not be started.
    `patience_s`: seconds without progress after which to return, if only other processes train.
    Raises Stopped after Ctrl-C, or after a signal that stopped the workers.
    """
    hardware = plan.hardware if plan else detect.this_machine()
    limits = Limits()
    tried: set[str] = set()
    quiet_since, held = time.monotonic(), None
    with nullcontext(workers) if workers else Workers(store, exec_.world_size) as pool:
        while True:
            now, plan = plan, None
            if now is None:
                unwanted = skipped(skip) | tried
                now = make_plan([p for p in points if p.id not in unwanted], store, exec_, hardware)
            mine = [p for p in now.todo if now.states[p.id] != "running"]
            others = {p.id for p in now.todo if now.states[p.id] == "running"}
            if mine:
                if trainer is None or isinstance(trainer, str):
                    settings = {"trainer": trainer, "skip": skip}
                    _run_workers(now, store, exec_, report, limits, pool, settings)
                else:
                    for pack in now.packs:
                        specs, rows = [p.spec for p in pack.points], pack.micro_batch_size
                        execute(specs, exec_, store, trainer, report, StopFlag(), rows, limits)
                for rid, state in store.states(p.id for p in mine).items():
                    killed = state == "interrupted" and store.failures(rid) >= exec_.max_attempts
                    if state == "failed" or killed:
                        tried.add(rid)
                quiet_since = time.monotonic()
            elif not others:
                return
            elif others != held:
                quiet_since, held = time.monotonic(), others
            elif time.monotonic() - quiet_since > patience_s:
                return
            else:
                time.sleep(POLL_S)


def _run_workers(
    plan: Plan,
    store: RunStore,
    exec_: Exec,
    report: Report,
    limits: Limits,
    workers: "Workers",
    settings: dict[str, Any],
) -> None:
    """Train the packs of a plan in workers, and report their events."""
    packs = []
    for pack in plan.packs:
        limit, runs = limits.of(pack.points[0].spec), [p.spec.plain() for p in pack.points]
        sizes = {"most_rows": limit.rows, "forward_parts": limit.forward_parts}
        packs.append({"runs": runs, "micro_batch_size": pack.micro_batch_size, **sizes})
    begun = [p.id for p in plan.todo if plan.states[p.id] != "missing"]
    attempts = {i: store.last_attempt(i) for i in begun}
    job = {
        "packs": packs,
        "exec": {**asdict(exec_), "threads": plan.threads, "workers": plan.workers},
        # A worker has not watched the heartbeats of other machines.
        "dead": {i: n for i, n in attempts.items() if plan.states[i] == "interrupted"},
        **settings,
    }
    try:
        number = min(plan.workers, len(packs))
        error = workers.run(job, number, plan.workers, plan.threads, report)
    except KeyboardInterrupt:
        workers.stop()
        raise Stopped from None
    codes = workers.codes()
    if error:
        raise TrainingError(error)
    if STOPPED in codes:
        raise Stopped
    crashed = [c for c in codes if c != 0]
    # A worker killed by a signal (code below 0) leaves interrupted runs, which are tried again. One
    # that was killed before it claimed a run would be started again and again.
    killed = any(c < 0 for c in crashed) and any(
        store.last_attempt(p.id) != attempts.get(p.id) for p in plan.todo
    )
    if crashed and not killed and not workers.shortages:
        tail = workers.log.read_text(errors="replace").splitlines()[-8:]
        by = f" (signal {-min(crashed)})" if min(crashed) < 0 else ""
        text = f"a worker crashed{by}. The end of its log, {workers.log}:"
        raise TrainingError("\n".join([text, *tail]))
    for rid, shortage in workers.shortages.items():
        spec = next(p.spec for p in plan.todo if p.id == rid)
        end_shortage(spec, shortage, exec_, store, limits, report)


def end_shortage(
    spec: RunSpec, shortage: Shortage, exec_: Exec, store: RunStore, limits: Limits, report: Report
) -> None:
    """After one process of a run ran out of memory: end the attempt, and lower the size limit."""
    rid, n = spec.id, store.last_attempt(spec.id)
    if n is None or store.state(rid) != "interrupted":
        return  # another worker claimed it
    if instead := limits.of(spec).lower(shortage, 1):
        text = shortage.retry_text(spec, 1, instead)
        store.log(rid, n, text)
        store.write_end(rid, n, "stopped", text)
        report({"note": text})
    else:
        cause = shortage.failure_text(spec, exec_.world_size)
        store.write_end(rid, n, "failed", cause)
        report({"run": rid, "ended": "failed", "cause": cause})


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
        """Set up; no process starts before the first job.

        `n_nodes`: nodes of this Slurm job, over which the processes of a run are spread.
        `container`: the workers run inside it.
        """
        self.log = store.root / ".jobs" / f"{os.getpid()}-{os.urandom(3).hex()}.log"
        self._world_size, self._nodes, self._container = world_size, n_nodes, container
        self._by_srun = n_nodes > 1 or bool(container and container.by_srun)
        self._share = (0, 0)
        self._groups: dict[int, list[subprocess.Popen]] = {}
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.shortages: dict[str, Shortage] = {}
        """Run id -> shortage of memory, for runs that are trained by several processes."""

    def __enter__(self) -> "Workers":
        """Return itself."""
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        """End all workers; after an error stop their runs, and keep the log."""
        if error is not None:
            self.stop()
            return
        self._end(list(self._groups))
        self.log.unlink(missing_ok=True)

    def run(
        self,
        job: dict[str, Any],
        number: int,
        shares: int,
        threads: int,
        report: Callable[[dict[str, Any]], None],
    ) -> str | None:
        """Let `number` workers, each with 1 / `shares` of the GPUs, do a job; report their events.

        Returns the last error, or None. Workers that are not there yet are started.
        """
        same = self._share == (shares, threads)
        self._end([k for k in self._groups if k >= number or not same or self._ended(k)])
        self._share, self.shortages, error = (shares, threads), {}, None
        for k in range(number):
            if k not in self._groups:
                self._start(k)
        for process in (p for group in self._groups.values() for p in group):
            assert process.stdin is not None
            with suppress(OSError):  # it has died
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
        busy = list(self._groups.values())
        while busy:
            event = self._events.get()
            if "over" in event:  # this worker has done the job, or has ended
                busy = [group for group in busy if group is not event["over"]]
            elif "error" in event:
                error = event["error"]
            elif "out_of_memory" in event:
                self.shortages[event["run"]] = Shortage(**event["out_of_memory"])
            else:
                report(event)
        return error

    def _ended(self, k: int) -> bool:
        return any(process.poll() is not None for process in self._groups[k])

    def _start(self, k: int) -> None:
        """Start worker `k`.

        On several nodes, and with pyxis, srun starts a worker as a job step, with equally many
        processes on each node. The job survives a failed step. On several nodes a process sees all
        GPUs of its node and takes the one with number LOCAL_RANK.
        """
        (shares, threads), size, start = self._share, self._world_size, [sys.executable]
        environments = [devices_of(k, shares)] if self._nodes == 1 else [{}]
        if self._by_srun and size > 1:
            environments[0] |= _address(socket.gethostname(), size)
        elif size > 1:
            shared = {**environments[0], **_address("127.0.0.1", size)}
            ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
            environments = [{**shared, **rank} for rank in ranks]
        group = self._groups[k] = []
        try:
            self.log.parent.mkdir(exist_ok=True)
            errors = open(self.log, "ab")  # noqa: SIM115
        except OSError as error:
            raise StoreError(
                f"{self.log} cannot be written ({error.strerror}). Free some space."
            ) from None
        with errors:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            for more in environments:
                env = {**worker_environment(threads), **more}
                if self._container:
                    start = self._container.python(env, (*THREAD_VARIABLES, *more))
                words = [*self._srun(), *start, "-m", "lorasweep.launch.worker", str(k)]
                group.append(subprocess.Popen(words, env=env, text=True, **pipes))
        for process in group:
            threading.Thread(target=self._read, args=(process, group), daemon=True).start()

    def _srun(self) -> list[str]:
        """Return the words that start a worker as a job step; empty if this process starts it."""
        if not self._by_srun:
            return []
        size = self._world_size
        srun = (
            f"srun --overlap --nodes={self._nodes} --ntasks={size} "
            f"--ntasks-per-node={size // self._nodes} --distribution=block "
            f"--wait={LAST_S:.0f} --kill-on-bad-exit=0 --export=ALL --unbuffered"
        )
        if self._nodes == 1:  # the job's other processes, on the same cores, are one task
            srun += f" --cpus-per-task={max(1, detect.cores() // size)}"
        return [*srun.split(), *(self._container.srun() if self._container else ())]

    def _read(self, process: subprocess.Popen, group: list[subprocess.Popen]) -> None:
        """Queue the events of a process. When process 0 ended or a process failed, end `group`."""
        assert process.stdout is not None
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
        """Return the exit status of each worker after a job, negative after a signal.

        A worker that waits for the next job counts as 0. The status of process 0 counts. If a
        signal killed process 0, the highest status of the worker counts: a positive one belongs to
        the process whose error was the cause.
        """
        found = []
        for k in [k for k in self._groups if self._ended(k)]:
            known = [process.wait() for process in self._groups.pop(k)]
            if self._by_srun or self._container:
                known = [SRUN_KILLED - c if c > SRUN_KILLED else c for c in known]
            found.append(known[0] if known[0] >= 0 else max(known))
        return found

    def stop(self) -> None:
        """Let all workers finish their update, write a checkpoint and exit."""
        for process in (p for group in self._groups.values() for p in group if p.poll() is None):
            process.send_signal(SRUN_STOP if self._by_srun else signal.SIGTERM)
        self._end(list(self._groups))

    def _end(self, numbers: Sequence[int]) -> None:
        """Take these workers' input away, and wait until they have ended."""
        ended = [p for k in numbers for p in self._groups.pop(k)]
        for process in ended:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        for process in ended:
            process.wait()


def _address(host: str, world_size: int) -> dict[str, str]:
    """Return torchrun's variables for the processes of a worker, with process 0 on `host`."""
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}


def devices_of(worker: int, workers: int) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES for a worker. More workers than GPUs share the GPUs."""
    devices = detect.devices()
    if not devices:
        return {}
    share = max(1, len(devices) // workers)
    mine = [devices[(worker * share + i) % len(devices)] for i in range(share)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
