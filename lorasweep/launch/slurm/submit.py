"""Submit the missing runs of a sweep to a cluster, and cancel queued runs.

A run is submitted only if no live job has it. One lock per run folder protects this decision. If
two jobs have a run nevertheless, the first job that claims the run trains it.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.local import VARIABLE, container_of
from lorasweep.launch.slurm import guard, job
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.queue import FOLLOW, Job, Partition, Queue
from lorasweep.plan import detect
from lorasweep.plan.detect import Hardware, from_plain
from lorasweep.plan.needs import ASSUMED_FLOPS_PER_CORE, products_flops_s
from lorasweep.plan.planner import Pack, Plan, Planner, make_packs, make_plan
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import files
from lorasweep.store.claims import JOB_VARIABLE, SILENCE_S
from lorasweep.store.files import Notify
from lorasweep.store.run_store import FINISHED, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request
from lorasweep.tracking import provenance

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # nodes usually do not share them
SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that jobs do not need: caches, and kept results (tables and figures)."""
MARGIN_TIME, MARGIN_MIN = 3.0, 15.0
"""Time limit: MARGIN_TIME times the expected time plus MARGIN_MIN minutes. Estimates are rough."""
MARGIN_MEMORY = 1.3
"""Requested / expected memory. Memory is planned within 20% (docs/log/2026-11-25.md)."""
HOST_BYTES = 3 * 2**30
"""Assumed host memory of a GPU worker for libraries, data and pinned buffers, without weights."""
GPU_FLOPS = 1e14
"""Assumed FLOP/s of a GPU worker until runs were measured: a third of an A100's dense bf16 peak."""


@dataclass
class Work:
    """The unfinished runs of a sweep in Slurm's queue, and what a command has submitted.

    `queued`, `running`, `exhausted` (killed exec.max_attempts times) and the fields with n_ count
    runs. `refused`: why Slurm did not take some jobs.
    """

    todo: list[Point]
    queued: int
    running: int
    covered: list[Job]
    """Live jobs with unfinished runs, also jobs of another sweep."""
    exhausted: int
    removed: str
    """Which runs wait in jobs of this sweep and are not of this command, in words; else empty."""
    folder: Path = Path()
    """Folder with records and logs of the jobs that were submitted."""
    sent: dict[str, int] = field(default_factory=dict)
    """Slurm id of an array -> its number of jobs."""
    follow: str | None = None
    """Slurm id of the follow-up job."""
    n_submitted: int = 0
    refused: str | None = None


def work_of(request: Request, store: RunStore, now: Plan, queue: Queue) -> Work:
    """Compare the unfinished runs of the plan `now` with the queue."""
    states, covered = now.states, queue.covered()
    waiting = [p for p in now.todo if states[p.id] != "running"]
    free = [p for p in waiting if p.id not in covered]
    killed = {p.id for p in free if states[p.id] == "interrupted"}
    exhausted = {i for i in killed if store.failures(i) >= request.exec.max_attempts}
    wanted, family = {p.id for p in now.points}, f"{request.sweep_name}-{request.scale}-"
    gone, stop = set[str](), dict[str, None]()
    for s, runs, j in queue.jobs:
        ours = j.state == "PENDING" and f"{s.sweep}-".startswith(family)
        if more := {i for i in runs if ours and i not in wanted and store.state(i) == "missing"}:
            again = [k.label for f, k in queue.follows if f.sweep == s.sweep]
            gone, stop = gone | more, stop | dict.fromkeys([j.label, *again])
    said = (
        f"{len(gone)} queued run(s) of this sweep are not of this command, and will train; to take "
        f"them back: scancel {' '.join(stop)}, then this command again"
    )
    return Work(
        todo=[p for p in free if p.id not in exhausted],
        queued=len(waiting) - len(free),
        running=sum(s == "running" for s in states.values()),
        covered=list(dict.fromkeys(covered[p.id] for p in now.todo if p.id in covered)),
        exhausted=len(exhausted),
        removed=said if gone else "",
    )


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return how a submission would change the queue, as JSON values; empty without a cluster."""
    cluster = request.cluster
    if cluster.kind != "slurm" and files.status(slurm.home(store.root)) is None:
        return {}
    queue = slurm.look(store.root)
    work = work_of(request, store, now, queue)
    change: dict[str, Any] = {"queued": work.queued, "to_submit": len(work.todo)}
    change["removed"] = work.removed
    if queue.unavailable:
        change["unknown"] = queue.unavailable
    if cluster.kind == "slurm" and work.todo:
        partition = Partition(now.hardware.gpus_per_node)
        with suppress(ClusterError):  # no Slurm here
            partition = slurm.partition_of(cluster)
        jobs = jobs_of(request, store, work.todo, now, partition)
        change["jobs"] = [{"jobs": len(j.tasks), **dataclasses.asdict(j.needed)} for j in jobs]
    return {"queue": change}


# ---------------------------------------------------------------- which jobs


@dataclass(frozen=True)
class JobResources:
    """Resources of every job of an array; `cpus`, `gpus` and `mem_gib` are per node."""

    cpus: int
    gpus: int
    mem_gib: float
    time_min: int
    workers: int
    nodes: int = 1


@dataclass(frozen=True)
class Jobs:
    """Jobs with the same resources and settings."""

    tasks: list[list[Pack]]
    """Packs of each job."""
    exec: Exec
    needed: JobResources


def hardware_of(request: Request) -> Hardware:
    """Return the hardware to plan for: `request.hardware`, or this machine if that is empty."""
    return from_plain(request.hardware) if request.hardware else detect.this_machine()


def jobs_of(
    request: Request, store: RunStore, todo: Sequence[Point], now: Plan, partition: Partition
) -> list[Jobs]:
    """Group runs into packs and packs of one model into jobs; SpecError: a run fits on no device.

    The largest jobs are first, so if Slurm refuses one as too large, nothing has been submitted.
    """
    cluster, hardware, precision = request.cluster, now.hardware, todo[0].spec.precision
    if not cluster.gpus and request.hardware and hardware_of(request).has_speeds:
        cluster = dataclasses.replace(cluster, gpus=1)  # hardware= names GPUs
    if hardware.has_speeds:
        assumed = products_flops_s(hardware, precision)
    else:
        assumed = GPU_FLOPS if cluster.gpus else ASSUMED_FLOPS_PER_CORE[precision] * cluster.cpus
    jobs = []
    for chosen, points in Planner(hardware, request.exec).settings(todo):
        size, threads = chosen.world_size, chosen.threads
        if nodes_of(size, cluster, partition) > 1:
            threads = threads or cluster.cpus  # such a job detects the cores of one node
        workers = workers_of(cluster, size)
        exec_ = dataclasses.replace(chosen, workers=workers, threads=threads)
        flops_s = now.speeds.get(None) or size * assumed
        made = make_packs(points, now.states, store, Planner(hardware, exec_))

        def model(pack: Pack) -> str:
            return pack.points[0].spec.model.name

        for _, same in itertools.groupby(sorted(made, key=model), model):
            tasks = group(list(same), cluster, flops_s, size)
            needed = resources_for(tasks, cluster, flops_s, partition, size)
            jobs.append(Jobs(tasks, exec_, needed))
    return sorted(jobs, key=lambda j: (-j.needed.nodes * j.needed.gpus, -j.needed.mem_gib))


def workers_of(cluster: Cluster, world_size: int = 1) -> int:
    """Return the number of packs that a job trains in parallel, each on `world_size` processes."""
    most = max(1, cluster.gpus // world_size)
    asked = cluster.workers or most
    return min(asked, most) if world_size > 1 and cluster.gpus else asked


def nodes_of(world_size: int, cluster: Cluster, partition: Partition) -> int:
    """Return the smallest number of nodes for a run, with equally many processes on each."""
    per_node = cluster.gpus_per_node or partition.gpus
    if not cluster.gpus or not per_node:
        return 1  # processes without GPUs share one node
    divisors = (n for n in range(1, world_size + 1) if world_size % n == 0)
    return next(n for n in divisors if world_size // n <= per_node)


def group(
    packs: Sequence[Pack], cluster: Cluster, flops_s: float, world_size: int = 1
) -> list[list[Pack]]:
    """Group packs into jobs of `work_min` to `work_max` minutes, longest job first.

    Jobs are as short as possible with at most `parallel` of them. A job has at least one pack per
    worker, if possible.
    """
    side = workers_of(cluster, world_size)
    seconds = {id(p): p.flops / flops_s for p in packs}
    share_min = sum(seconds.values()) / 60 / side / cluster.parallel
    capacity = side * 60 * min(max(cluster.work_min, share_min), cluster.work_max)
    tasks: list[list[Pack]] = []
    left, room = 0.0, 0
    for pack in sorted(packs, key=lambda p: -p.flops):
        s, n = seconds[id(pack)], len(pack.points)
        full = s > left if cluster.runs_per_job is None else n > room
        if not tasks or (full and (cluster.runs_per_job is not None or len(tasks[-1]) >= side)):
            tasks.append([])
            left, room = capacity, cluster.runs_per_job or 0
        tasks[-1].append(pack)
        left, room = left - s, room - n
    return sorted(tasks, key=lambda task: -sum(seconds[id(p)] for p in task))


def resources_for(
    tasks: Sequence[Sequence[Pack]],
    cluster: Cluster,
    flops_s: float,
    partition: Partition,
    world_size: int = 1,
) -> JobResources:
    """Return the resources of each job: the settings in `cluster`, or estimates if not set.

    The time is at most the partition's limit: a job at its limit requeues itself.
    """
    side, nodes = workers_of(cluster, world_size), nodes_of(world_size, cluster, partition)
    here = world_size // nodes
    minutes, memory = cluster.time_min, cluster.mem_gib
    if minutes is None:
        work = [[p.flops for p in task] for task in tasks]
        longest_s = max((max(sum(w) / side, max(w)) for w in work), default=0.0) / flops_s
        minutes = math.ceil(MARGIN_TIME * longest_s / 60 + MARGIN_MIN)
    if memory is None:
        sizes = []
        for pack in (pack for task in tasks for pack in task):
            spec, size = pack.points[-1].spec, pack.memory_bytes
            if cluster.gpus:  # host memory of the node where process 0 reads the weights
                copies = 3 if spec.method.TRAINS_BASE else 1
                size = here * HOST_BYTES + 4 * spec.model.n_params * copies
            sizes.append(size)
        most = sum(sorted(sizes, reverse=True)[:side])
        memory = math.ceil(10 * MARGIN_MEMORY * most / 2**30) / 10
    gpus = here if nodes > 1 else max(cluster.gpus, here if cluster.gpus else 0)
    limit = int(min(minutes, partition.time_min))
    return JobResources(cluster.cpus * side * here, gpus, memory, limit, side, nodes)


# ---------------------------------------------------------------- submit and cancel


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Notify,
    trainer: str | None = None,
    idle: int = 0,
) -> Work:
    """Submit the sweep's missing runs that are not in a live job, and a follow-up job.

    `idle`: follow-up jobs in a row, so far, before which no update was saved.
    Raises ClusterError if Slurm cannot or will not take the jobs, StoreError if another command is
    submitting and does not end.
    """
    cluster = request.cluster
    partition, code = prepare(cluster, store.root)
    watch_others(store, points(), notify)
    with slurm.settled(store.root, notify) as queue:
        now = make_plan(points(), store, request.exec, hardware_of(request))
        work = work_of(request, store, now, queue)
        jobs: list[Jobs] = []
        if work.todo:
            jobs = jobs_of(request, store, work.todo, now, partition)
            notify(f"jobs run code snapshot {code.folder.name}")
        mine = os.environ.get("SLURM_JOB_ID")
        follows = [j.id for s, j in queue.follows if s.sweep == request.title and j.id != mine]
        if not jobs and (follows or not (work.covered and cluster.follow)):
            return work
        container = container_of(cluster, request.exec)
        common = {"requeues": cluster.requeues, "trainer": trainer}
        inside = {"container": container and dataclasses.asdict(container)}
        runs: list[list[str]] = []
        lines, arrays = [], []
        # task indices begin at 0 and must be below MaxArraySize
        most = max(1, int(slurm.setting("MaxArraySize") or 1001) - 1)
        for same in jobs:
            settings = {"exec": dataclasses.asdict(same.exec), **common, **inside}
            for k in range(0, len(same.tasks), most):
                part = same.tasks[k : k + most]
                arrays.append((len(runs), len(part), same.needed))
                for task in part:
                    of_task = [p for pack in task for p in pack.points]
                    runs.append([p.id for p in of_task])
                    lines.append({"runs": [p.spec.plain() for p in of_task], **settings})
        if cluster.follow:
            again = {**request.plain(), "action": "run", "format": "text"}
            before = {"idle": idle, "updates": updates_of(now.points, store)}
            lines.append({"follow": again, **common, **before})
        work.folder = folder = _write(store.root, request.title, runs, lines)
        for first, n, needed in arrays:
            try:
                work.sent[_send(folder, str(first), first, n, needed, cluster, code)] = n
            except ClusterError as error:
                if not work.sent:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                work.refused = str(error)
                break  # the follow-up job will submit the rest
            work.n_submitted += sum(map(len, runs[first : first + n]))
        work.queued += work.n_submitted
        if cluster.follow:  # it waits for these jobs and the others of these runs
            where = cluster.follow_partition or cluster.partition
            small = dataclasses.replace(cluster, gpus=0, partition=where, container=None)
            needed = JobResources(1, 0, 2.0, cluster.follow_min, 1)  # plans, fits, figures: 2 GiB
            after = sorted({*work.sent, *(job.label for job in work.covered)})
            try:
                work.follow = _send(folder, FOLLOW, len(runs), 1, needed, small, code, after)
            except ClusterError as error:
                work.refused = f"no follow-up job: {error}"
            if work.follow:  # it replaces the others
                with suppress(ClusterError):
                    slurm.cancel(follows)
        return work


def cancel(request: Request, store: RunStore, notify: Notify) -> tuple[int, int]:
    """Cancel the sweep's jobs; return the number of jobs and of their unfinished runs."""
    if files.status(slurm.home(store.root)) is None:  # nothing was submitted
        return 0, 0
    with slurm.settled(store.root, notify) as queue:
        live = [(runs, j) for s, runs, j in queue.jobs if s.sweep == request.title]
        follows = [j.label for s, j in queue.follows if s.sweep == request.title]
        states = store.states({r for runs, _ in live for r in runs})
        slurm.cancel([*follows, *(j.label for _, j in live)])
        return len(live), sum(state not in FINISHED for state in states.values())


# ---------------------------------------------------------------- the files of a job, and sbatch


def _write(root: Path, title: str, runs: list[list[str]], tasks: Sequence[Any]) -> Path:
    """Write a submission into a new folder, which names its jobs. `runs`: run ids by task.

    Raises ClusterError if other users could write there.
    """
    name = re.sub("[^A-Za-z0-9_.-]", "_", title)
    folder = slurm.home(root) / f"{name}-{os.urandom(4).hex()}"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    files.write_atomic(folder / guard.TASKS, lines.encode())
    if why := guard.untrusted(map(str, (folder, *folder.iterdir()))):
        raise ClusterError(
            f"{why}. Choose a run folder on a file system that keeps permissions: "
            "exec.runs_dir=FOLDER."
        )
    record = json.dumps({"sweep": title, "tasks": runs})
    files.write_atomic(folder / "submission.json", record.encode())
    return folder


def setup(folder: Path, cluster: Cluster, code: "Snapshot") -> list[str]:
    """Return the shell lines before a job's command.

    They run the cluster's setup lines, check the files with `guard`, and put the snapshot of the
    code on PYTHONPATH.
    """
    check = [sys.executable, "-I", "-c", Path(guard.__file__).read_text(encoding="utf-8")]
    check += [str(folder), guard.digest(str(folder / guard.TASKS)), str(code.folder), code.sha256]
    return [
        *cluster.setup,
        f"{shlex.join(check)} || exit 1",
        # No bytecode: new files in the snapshot would change its digest.
        f"export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 {JOB_VARIABLE}=1",
        # Some releases of Slurm do not pass the job's CPU cores to its steps.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        f"export PYTHONPATH={shlex.quote(str(code.folder))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *([f"export {VARIABLE}={shlex.quote(cluster.container)}"] if cluster.container else []),
    ]


def _send(
    folder: Path,
    part: str,
    first: int,
    n: int,
    needed: JobResources,
    cluster: Cluster,
    code: "Snapshot",
    after: Sequence[str] = (),
) -> str:
    """Submit the tasks `first` to `first + n - 1` of the submission in `folder`; return Slurm's id.

    `part`: end of the job's name, the number of the first task or FOLLOW. `after`: ids of jobs that
    must end first. Raises ClusterError if Slurm refuses the jobs.
    """
    tasks, path = needed.gpus if needed.nodes > 1 else 1, str(folder / guard.TASKS)
    given: dict[str, Any] = {
        **{name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint")},
        "nodes": needed.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": needed.cpus // tasks,
        "gpus-per-node": needed.gpus or None,
        "mem": f"{round(needed.mem_gib * 1024)}M",
        "requeue": True,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "kill-on-invalid-dep": "no" if after else None,
        **{k: True if v.lower() == "true" else v for k, v in cluster.options.items()},
    }
    # in one line: a second line would be a command of the script
    lines = {k: " ".join(v.split()) if isinstance(v, str) else v for k, v in given.items()}
    # Variables of an enclosing job would pass on its memory limit, and its ids to submitit.
    hidden = {k: os.environ.pop(k) for k in [*os.environ] if slurm.is_hidden(k)}
    import submitit

    try:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(
            job_name=f"{folder.name}-{part}",
            time=needed.time_min,
            signal_delay_s=min(cluster.warn_s, 30 * needed.time_min),
            array_parallelism=cluster.parallel,
            setup=setup(folder, cluster, code),
            stderr_to_stdout=True,
            wckey=None,
            additional_parameters={k: v for k, v in lines.items() if v is not None},
            # --overlap: share the cores with the steps of the workers
            srun_args=["--overlap", "--nodes=1", "--ntasks=1", "--relative=0"],
        )
        if part == FOLLOW:
            return executor.submit(job.follow, path).job_id
        jobs = executor.map_array(job.run, [path] * n, range(first, first + n))
        return jobs[0].job_id.partition("_")[0]
    except RuntimeError as error:  # submitit's, with sbatch's message
        raise ClusterError(
            f"Slurm refused the jobs: {' '.join(str(error).split())}. Each asks for {needed.nodes} "
            f"node(s) with {needed.cpus} CPU core(s), {needed.gpus} GPU(s), {needed.mem_gib:g} GiB "
            f"and {needed.time_min} min: lower cluster.gpus, .cpus or .mem_gib, leave out large "
            "runs (exec.max_gpus=N), or choose another cluster.partition."
        ) from None
    finally:
        os.environ.update(hidden)


# ---------------------------------------------------------------- before submitting


def updates_of(points: Sequence[Point], store: RunStore) -> int:
    """Count the updates of finished runs, and those in the checkpoints of the others."""
    states = store.states(p.id for p in points)
    ended = {i for i, state in states.items() if state in FINISHED}
    return sum(p.spec.steps if p.id in ended else store.saved_step(p.id) for p in points)


def prepare(cluster: Cluster, root: Path) -> tuple[Partition, "Snapshot"]:
    """Check that jobs can use the run folder (else ClusterError), and copy the code there."""
    place, owner = root.resolve(), files.status(root)
    if os.pathsep in str(root):
        raise ClusterError(
            f"exec.runs_dir={root} has a '{os.pathsep}' in its name, at which the jobs' PYTHONPATH "
            "splits. Choose a folder without it."
        )
    if owner and owner.st_uid != os.geteuid():  # root: `jobs_of` would not show its jobs
        raise ClusterError(f"exec.runs_dir={root} is of user {owner.st_uid}: submit as this user.")
    if not cluster.shared and any(place.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        raise ClusterError(
            f"run folder {place}: nodes usually cannot see it, as it is local to a machine. Set "
            "exec.runs_dir=FOLDER (or LORASWEEP_RUNS) on a shared file system. If the nodes do see "
            "it, set cluster.shared=true."
        )
    partition = slurm.partition_of(cluster)
    home = slurm.home(root) / "code"
    home.mkdir(parents=True, exist_ok=True)
    return partition, take(home)


def watch_others(store: RunStore, points: list[Point], notify: Notify) -> None:
    """Watch heartbeats until it is clear which owners on other machines are alive."""
    states = store.states(p.id for p in points)
    if unsure := store.unsure(i for i, state in states.items() if state == "running"):
        notify(
            f"watching {len(unsure)} run(s) that another machine seems to train, for at most "
            f"{SILENCE_S + 1:.0f} s"
        )
    end = time.monotonic() + SILENCE_S + 1
    while unsure and time.monotonic() < end:
        time.sleep(2)
        unsure = store.unsure(i for i in unsure if store.state(i) == "running")


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code in a folder, so that later edits do not change queued jobs."""

    folder: Path
    sha256: str  # its `guard.digest`


def take(root: Path) -> Snapshot:
    """Copy the running code into a folder in `root`, named by its digest, if it is not there.

    conf/ is at the top, as in a checkout; permissions are those of this user. Running code that is
    a snapshot is not copied. Raises ClusterError if others changed it or could change it.
    """
    here = folder = Path(__file__).resolve().parents[3]
    if (here / guard.ABOUT).is_file():
        sha256 = guard.digest(str(here))
    else:
        partial = root / f".copy.{os.getpid()}.{os.urandom(3).hex()}"
        inside = here / "lorasweep"
        conf = next(c for c in (here / "conf", inside / "conf") if (c / "config.yaml").is_file())
        for top in (inside, here / "analysis", conf):
            for path, inner, names in os.walk(top, followlinks=True):
                skipped = SKIPPED | ({"conf"} if Path(path) == inside else set())
                inner[:] = set(inner) - skipped
                target = partial / top.name / Path(path).relative_to(top)
                target.mkdir(parents=True)
                for name in names:
                    shutil.copyfile(Path(path) / name, target / name)
        sha256 = guard.digest(str(partial))
        folder = root / sha256[:12]
        about = {**provenance.code(), "snapshot": folder.name}
        files.write_atomic(partial / guard.ABOUT, json.dumps(about, indent=1).encode())
        try:
            os.rename(partial, folder)
        except OSError:  # it is there
            shutil.rmtree(partial)
    problem = guard.problem(str(folder), sha256)
    if problem or folder.name != sha256[:12]:
        raise ClusterError(
            f"code snapshot {folder} is refused: {problem or 'it was changed'}. Another user could "
            f"run code as you. Find out who caused this, then delete the snapshot (rm -r {folder}) "
            "and run the command again."
        )
    return Snapshot(folder, sha256)
