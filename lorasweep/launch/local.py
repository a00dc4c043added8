"""Train runs on this machine or in this Slurm job, in worker processes that claim free runs.

A worker is one process of `launch.worker`, or exec.world_size processes that train each run
together. Two commands for the same sweep share the runs: each waits for runs of the other.
"""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, StoreError, TrainingError
from lorasweep.launch.out_of_memory import Limits, Shortage
from lorasweep.launch.pack import execute
from lorasweep.launch.process import THREAD_VARIABLES, StopFlag, Stopped, worker_environment
from lorasweep.launch.torch_trainer import Report, Trainer
from lorasweep.launch.worker import STOPPED
from lorasweep.plan import detect
from lorasweep.plan.planner import Plan, make_plan
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

POLL_S = 0.5
"""Seconds between checks of runs that other processes train."""
LAST_S = 20.0
"""Seconds that the other processes of a worker have to end after its process 0 has ended."""
SRUN_STOP = signal.SIGUSR2
"""Stop signal for srun, which passes it on and waits. At SIGTERM it would kill all at once."""
SRUN_KILLED = 128
"""If a signal kills a process, srun and apptainer exit with this plus the signal's number."""
VARIABLE = "LORASWEEP_CONTAINER"
"""Environment variable with the image, in jobs whose workers run inside a container."""
FORCED = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "HF_HOME")
"""Environment variables that must not be replaced by those of the image."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Report,
    trainer: Trainer | str | None = None,
    plan: Plan | None = None,
    workers: "Workers | None" = None,
    wait: bool = True,
) -> None:
    """Train every run of `points` until it is finished or has a recorded failure.

    `trainer`: None or a name (package.module:object) of one in worker processes; a callable trains
    in this process (for tests). `plan`: of these points on this machine, if it was just made.
    `workers`: None for new ones. `wait`: for runs that other processes train. Raises Stopped after
    Ctrl-C, or after a signal that stopped the workers.
    """
    hardware = plan.hardware if plan else detect.this_machine()
    limits, tried = Limits(), set[str]()
    with nullcontext(workers) if workers else Workers(store, exec_.world_size) as pool:
        while True:
            now, plan = plan, None
            if now is None:
                now = make_plan([p for p in points if p.id not in tried], store, exec_, hardware)
            mine = [p.id for p in now.todo if now.states[p.id] != "running"]
            if not mine:
                if not now.todo or not wait:
                    return
                time.sleep(POLL_S)
            elif trainer is None or isinstance(trainer, str):
                _run_workers(now, store, exec_, report, limits, pool, trainer)
            else:
                for pack in now.packs:
                    specs, rows = [p.spec for p in pack.points], pack.micro_batch_size
                    execute(specs, exec_, store, trainer, report, StopFlag(), rows, limits)
            for rid, state in store.states(mine).items():
                killed = state == "interrupted" and store.failures(rid) >= exec_.max_attempts
                if state == "failed" or killed:
                    tried.add(rid)


def _run_workers(
    plan: Plan,
    store: RunStore,
    exec_: Exec,
    report: Report,
    limits: Limits,
    workers: "Workers",
    trainer: str | None,
) -> None:
    """Train the packs of a plan in workers, and report their events."""
    packs = []
    for pack in plan.packs:
        limit, runs = limits.of(pack.points[0].spec), [p.spec.plain() for p in pack.points]
        sizes = {"most_rows": limit.rows, "forward_parts": limit.forward_parts}
        packs.append({"runs": runs, "micro_batch_size": pack.micro_batch_size, **sizes})
    attempts = {p.id: store.last_attempt(p.id) for p in plan.todo if plan.states[p.id] != "missing"}
    job = {
        "packs": packs,
        "exec": {**asdict(exec_), "threads": plan.threads, "workers": plan.workers},
        # A worker has not watched the heartbeats of other machines.
        "dead": {i: n for i, n in attempts.items() if plan.states[i] == "interrupted"},
        "trainer": trainer,
    }
    try:
        number = min(plan.workers, len(packs))
        error = workers.run(job, number, plan.workers, plan.threads, report)
    except KeyboardInterrupt:
        workers.end(stop=True)
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
        container: "Container | None" = None,
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


# ---------------------------------------------------------------- containers


@dataclass(frozen=True)
class Container:
    """An image, and the folders that are visible inside it at the same paths, where they exist.

    `by_srun`: srun starts processes inside (pyxis extends srun); else apptainer. `mounts`: the
    user's FOLDER or FOLDER:FOLDER_INSIDE.
    """

    image: str
    by_srun: bool
    folders: list[str]
    mounts: list[str]

    def _mounts(self) -> str:
        # cluster.setup may have set HF_HOME
        named = [f for f in (*self.folders, os.environ.get("HF_HOME")) if f and Path(f).is_dir()]
        pairs = [m if ":" in m else f"{m}:{m}" for m in (*named, *self.mounts)]
        return ",".join(dict.fromkeys(pairs))

    def srun(self) -> list[str]:
        """Return srun's options for a step inside the container; empty with apptainer."""
        where = [f"--container-mounts={self._mounts()}", f"--container-workdir={os.getcwd()}"]
        image = [f"--container-image={self.image}", *where, "--no-container-entrypoint"]
        return image if self.by_srun else []

    def python(self, env: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
        """Return the words that start the image's Python; with pyxis, for a step with `srun`.

        FORCED and the names in `more` of the environment `env` replace what the image or Slurm
        sets. Raises ClusterError without apptainer on this node.
        """
        kept = [f"{name}={env[name]}" for name in (*FORCED, *more) if name in env]
        # packages in the user's home are for the Python outside
        inside = ["env", "PYTHONNOUSERSITE=1", *kept, "python3"]
        if self.by_srun:
            return inside
        program = next(filter(shutil.which, ("apptainer", "singularity")), None)
        if program is None:
            raise ClusterError(
                f"cluster.container={self.image}: this node has no apptainer on the PATH. Load it, "
                "such as cluster.setup=['module load apptainer']."
            )
        mounts = ["--bind", self._mounts(), "--pwd", os.getcwd()]
        return [program, "exec", "--nv", *mounts, self.image, *inside]


def container_of(cluster: Cluster, exec_: Exec) -> Container | None:
    """Return the container of a cluster's jobs, or None; raise ClusterError without the image."""
    image = cluster.container
    if image is None:
        return None
    if image.endswith((".sif", ".sqsh")) and not Path(image).exists():
        raise ClusterError(f"cluster.container={image}: there is no such file.")
    hub = str(Path.home() / ".cache" / "huggingface")
    named = [exec_.runs_dir, exec_.reports_dir, *exec_.models_dir, *exec_.data_dir, hub, "."]
    paths = [Path(folder).absolute() for folder in named]
    folders = dict.fromkeys(str(q) for p in paths for q in (p, p.resolve()) if str(q) != "/")
    kind = cluster.container_kind or ("apptainer" if image.endswith(".sif") else "pyxis")
    return Container(image, kind == "pyxis", list(folders), cluster.container_mounts)
