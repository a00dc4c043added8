"""A cluster's pieces without a cluster: grouping, what jobs ask for, locks, owners, snapshots,
names, permissions, the index."""

import contextlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.cli import follow
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm import (
    client,
    job,
    partitions,
    preflight,
    resources,
    sbatch,
    snapshot,
    submissions,
)
from lorasweep.launch.slurm.partitions import Partition
from lorasweep.launch.slurm.running import RunningJobs
from lorasweep.plan import detect
from lorasweep.plan.estimate import make_plan
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims, files, index
from lorasweep.store.lock import Lock
from lorasweep.store.run_store import RunStore
from lorasweep.sweep import request
from lorasweep.sweep.names import run_names
from tests.world import ROOT

GPUS = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1"}))


def packs(compose, tmp_path, *more, seeds=4):
    asked = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        f"sweep.axes.seed={list(range(seeds))}",
        "exec.pack_size=4",
        *more,
    )
    store = RunStore(tmp_path / "runs")
    return make_plan(asked.points, store, asked.exec, detect.this_machine()).packs


# ---------------------------------------------------------------- which runs go where


def test_jobs_hold_every_pack_once_and_as_much_work_as_asked(compose, tmp_path):
    some = packs(compose, tmp_path)
    flops_s = sum(p.flops for p in some) / 3600  # an hour of work in all
    for cluster, least, most in (
        (Cluster(kind="slurm", work_min=5), 10, 16),
        (Cluster(kind="slurm", work_min=60, work_max=60), 1, 2),
    ):
        tasks = resources.group(some, cluster, flops_s)
        assert sorted(id(p) for t in tasks for p in t) == sorted(map(id, some))
        assert least <= len(tasks) <= most
        work = [sum(p.flops for p in t) / flops_s / 60 for t in tasks]
        assert all(w <= max(cluster.work_min, cluster.work_max) + 1e-9 for w in work)


def test_runs_per_job_is_kept(compose, tmp_path):
    tasks = resources.group(packs(compose, tmp_path), Cluster(kind="slurm", runs_per_job=8), 1e9)
    assert max(sum(len(p.points) for p in t) for t in tasks) <= 8
    assert sum(len(p.points) for t in tasks for p in t) == 24


def test_a_job_with_several_workers_gets_a_pack_for_each(compose, tmp_path):
    tasks = resources.group(
        packs(compose, tmp_path), Cluster(kind="slurm", gpus=4, work_min=0.01, work_max=0.01), 1e6
    )
    assert all(len(t) >= 4 for t in tasks[:-1]) and sum(map(len, tasks)) > 4


def test_a_job_asks_for_what_its_packs_need(compose, tmp_path):
    some = packs(compose, tmp_path)
    tasks = resources.group(some, Cluster(kind="slurm", work_min=10), 1e7)
    ask = resources.resources_for(tasks, Cluster(kind="slurm", cpus=3, workers=2), 1e7, GPUS)
    assert ask.cpus == 6 and ask.workers == 2 and 1 < ask.mem_gib < 4 and 15 < ask.time_min <= 2880
    set_ = resources.resources_for(tasks, Cluster(kind="slurm", mem_gib=7, time_min=33), 1e7, GPUS)
    assert (set_.mem_gib, set_.time_min) == (7, 33)
    assert (
        resources.resources_for(tasks, Cluster(kind="slurm"), 1.0, GPUS).time_min == 2880
    )  # the partition's limit; it goes on by itself


@pytest.mark.parametrize(
    "given, said",
    [
        ({"gpus": 9}, "cluster.gpus=9"),
        ({"cpus": 65}, "asks for 65 processors"),
        ({"mem_gib": 600}, "asks for 600 GiB"),
        ({"time_min": 9999}, "allows 2880"),
    ],
)
def test_what_no_node_can_hold_is_refused(given, said):
    cluster = Cluster(kind="slurm", **given)
    with pytest.raises(ClusterError, match=said):
        resources.check_fits(resources.resources_for([], cluster, 1.0, GPUS), cluster, GPUS)


def test_partitions_are_known_by_name():
    with pytest.raises(ClusterError, match=r"partition 'gpx' not found\. Did you mean 'gpu'"):
        partitions.partition_of(Cluster(partition="gpx"), {"gpu": GPUS})
    assert partitions.partition_of(Cluster(), {"gpu": GPUS}) is GPUS


# ---------------------------------------------------------------- reading Slurm


def test_what_sinfo_says_is_read(monkeypatch):
    said = "gpu*|64|512000|gpu:a100:8(S:0-1)|2-00:00:00|n1|\ngpu*|32|256000|gpu:4|2-00:00:00|n2|\nlong|64|9|(null)|infinite|n3|\n"
    monkeypatch.setattr(client, "run", lambda *command: said)
    found = partitions.partitions()
    assert found["gpu"] == Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1", "n2"}))
    assert found["long"].gpus == 0 and found["long"].time_min == float("inf")
    assert [partitions._minutes(t) for t in ("30", "30:00", "1:30:00", "1-12", "1-00:30:00")] == [
        30,
        30,
        90,
        2160,
        1470,
    ]


def test_an_end_is_told_by_its_worst_step(monkeypatch):
    monkeypatch.setattr(
        client,
        "run",
        lambda *command: (
            "7_1|FAILED|1:0|n1|20\n7_1.batch|FAILED|1:0|n1|20\n7_1.0|OUT_OF_MEMORY|0:125|n1|19\n"
            "7_2|CANCELLED by 5|0:0|n2|3\n7_3|RUNNING|0:0|n2|3\n7_4|FAILED|9:0|n2|3\n"
        ),
    )
    ends = client.ended(["7"])
    assert (
        set(ends) == {"7_1", "7_2", "7_4"}
        and ends["7_1"].state == "OUT_OF_MEMORY"
        and ends["7_2"].state == "CANCELLED"
    )
    assert (
        "cluster.mem_gib" in ends["7_1"].cause()
        and "memory" in ends["7_4"].cause()
        and "memory" not in ends["7_2"].cause()
    )


def test_an_owner_that_is_a_job_lives_as_long_as_slurm_says(monkeypatch, tmp_path):
    running = {"12": 0}
    asked = []

    def ask(*command):
        asked.append(command)
        return (
            "ClusterName = here\n"
            if command[0] == "scontrol"
            else "".join(f"{j}|{n}|\n" for j, n in running.items())
        )

    monkeypatch.setattr(client, "run", ask)
    client.setting.cache_clear()
    lives = RunningJobs()
    assert lives("here", "12", 0) is True and lives("here", "13", 0) is False
    assert lives("here", "12", 1) is False  # its later execution is not its earlier one
    assert lives("there", "12", 7) is None  # another cluster's
    n = len(asked)
    assert lives("here", "13", 0) is False and len(asked) == n  # the dead stay dead, unasked
    attempt = tmp_path / "1"
    attempt.mkdir()
    owner = {
        "host": "elsewhere",
        "boot": "x",
        "pid": 1,
        "started": "1",
        "slurm": {"cluster": "here", "job": "12", "restart": 0},
    }
    (attempt / "owner.json").write_text(json.dumps(owner))
    liveness = claims.Liveness(lives)
    assert liveness.alive(attempt)
    running.clear()
    lives._asked = -100  # ten seconds later
    assert not liveness.alive(attempt)
    many = []  # one question is enough for any number of dead jobs
    for k in range(50):
        many.append(tmp_path / f"a{k}")
        many[-1].mkdir()
        (many[-1] / "owner.json").write_text(
            json.dumps({**owner, "slurm": {"cluster": "here", "job": str(100 + k), "restart": 0}})
        )
    asked.clear()
    liveness.prepare(many)
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1
    client.setting.cache_clear()


def test_a_job_that_slurm_started_again_knows_its_earlier_self(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (
        "slurm" not in claims.this_process()
    )  # an interactive job, in which somebody runs a command
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted({"slurm": {"cluster": "here", "job": "12", "restart": 0}})
    assert not claims.restarted({"slurm": {"cluster": "here", "job": "12", "restart": 1}})
    assert not claims.restarted(
        {"slurm": {"cluster": "here", "job": "13", "restart": 0}}
    ) and not claims.restarted({})


# ---------------------------------------------------------------- one at a time


def test_a_lock_has_one_holder_and_outlives_a_dead_one(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lorasweep.store.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1]) / 'lock'); total = Path(sys.argv[1]) / 'n'\n"
        "for _ in range(20):\n"
        "    lock = Lock(Path(sys.argv[1]) / 'lock'); lock.acquire(60, lambda who: None)\n"
        "    n = int(total.read_text()); time.sleep(0.002); total.write_text(str(n + 1)); lock.release()\n"
    )
    (tmp_path / "n").write_text("0")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env) for _ in range(4)
    ]
    assert [w.wait() for w in workers] == [0] * 4 and (tmp_path / "n").read_text() == "80"
    dead = subprocess.run(
        [sys.executable, "-c", code.partition("for")[0] + "lock.acquire(9, print)", str(tmp_path)],
        env=env,
    )
    assert dead.returncode == 0
    mine = Lock(tmp_path / "lock")
    mine.acquire(5, lambda who: pytest.fail("waited for the dead"))
    waited = []
    with pytest.raises(StoreError, match=f"held by process {os.getpid()}"):
        Lock(tmp_path / "lock").acquire(0.5, waited.append)
    assert len(waited) == 1
    threading.Timer(0.5, mine.release).start()
    Lock(tmp_path / "lock").acquire(5, waited.append)


def test_an_owner_whose_process_the_system_hides_is_not_called_dead(tmp_path, monkeypatch):
    """Login nodes hide other users' processes (hidepid=2): they exist, and their start time cannot
    be read."""
    attempt = tmp_path / "1"
    attempt.mkdir()
    (attempt / "owner.json").write_text(json.dumps(claims.this_process()))
    liveness = claims.Liveness()
    assert liveness.verdict(attempt) is True
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: (_ for _ in ()).throw(FileNotFoundError(self))
    )
    assert claims.start_time(os.getpid()) == claims.UNKNOWN and claims.start_time(2**22 - 1) == ""
    assert liveness.verdict(attempt) is None and liveness.alive(attempt)


def test_a_run_of_a_machine_that_died_is_found_out_by_watching(tmp_path, compose, monkeypatch):
    """Its heartbeat stands still: nobody else can tell."""
    monkeypatch.setattr(claims, "SILENCE_S", 0.5)
    monkeypatch.setattr(preflight, "SILENCE_S", 0.5)
    store = RunStore(tmp_path / "runs")
    store.prepare()
    point = compose("scale=smoke").points[0]
    monkeypatch.setenv("LORASWEEP_HOST", "elsewhere")
    store.claim(point.spec)
    monkeypatch.delenv("LORASWEEP_HOST")
    said = []
    assert store.state(point.id) == "running" and store.unsure([point.id]) == [point.id]
    preflight.watch_others(store, [point], said.append)
    assert "watching 1 run" in said[0] and store.state(point.id) == "interrupted"


# ---------------------------------------------------------------- records


def test_a_request_comes_back_from_its_file(compose):
    asked = compose("+sweep=lr_ratio", "scale=tiny", "cluster=slurm", "cluster.gpus=2")
    again = request.from_plain(json.loads(json.dumps(asked.plain())))
    assert [(p.arm, p.id) for p in again.points] == [
        (p.arm, p.id) for p in asked.points
    ] and again.title == "lr_ratio-tiny"
    assert (again.exec, again.cluster, again.sweep) == (asked.exec, asked.cluster, asked.sweep)


def test_submissions_are_read_back_and_torn_ones_are_not(tmp_path, monkeypatch):
    folder = submissions.home(tmp_path) / submissions.new_name("lr ratio/x")
    folder.mkdir(parents=True)
    assert "/" not in folder.name and submissions.read_all(tmp_path) == []
    arrays = [submissions.Array("0", "a-0", 0, 2), submissions.Array("follow", "a-f", 2, 1)]
    submissions.write_record(
        folder, "x", ["r1", "r2"], [["r1"], ["r2"]], arrays, script=False, cluster="here"
    )
    submissions.note_array(folder, "0", "12")
    (found,) = submissions.read_all(tmp_path)
    assert (
        found.arrays[0].label(1) == "12_1"
        and found.arrays[1].job is None
        and found.tasks == [["r1"], ["r2"]]
    )
    submissions.withdraw(found, ["r2"])
    live = client.Job("13", "12", 1, "PENDING", "", 0, "", "a-0")
    queue = submissions.Queue(
        submissions.read_all(tmp_path), {found.name: {1: live, 0: live}}, {}, []
    )
    assert set(queue.covered()) == {"r1"}
    monkeypatch.setattr(
        client, "run", lambda *command: "ClusterName = there\n" if command[0] == "scontrol" else ""
    )
    client.setting.cache_clear()
    other = submissions.look(
        tmp_path
    )  # another cluster's Slurm cannot tell: its silence means nothing
    assert (
        other.unknown_runs() == {"r1", "r2"}
        and other.submissions == []
        and not (folder / "ended.json").exists()
    )
    monkeypatch.setattr(
        client, "run", lambda *command: "ClusterName = here\n" if command[0] == "scontrol" else ""
    )
    client.setting.cache_clear()
    monkeypatch.setattr(
        client, "queue", lambda names: (_ for _ in ()).throw(ClusterError("no Slurm here"))
    )
    blind = submissions.look(
        tmp_path
    )  # on a machine without Slurm the folder still tells what it can
    assert (
        blind.unavailable == "no Slurm here"
        and blind.covered() == {}
        and len(blind.submissions) == 1
    )
    client.setting.cache_clear()
    (folder / "submission.json").write_text("{")
    with pytest.raises(ClusterError, match="damaged"):
        submissions.read_all(tmp_path)


def test_a_snapshot_is_named_by_its_content_and_runs(tmp_path):
    folder = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == folder and len(list(tmp_path.iterdir())) == 1
    assert (folder / "conf/sweep/lr_ratio.yaml").is_file() and not list(folder.rglob("__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    code = "import lorasweep, json; from lorasweep.tracking import provenance; print(lorasweep.__file__, provenance.code()['snapshot'])"
    said = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0].startswith(str(folder)) and said[1] == folder.name
    assert folder.name in snapshot.describe(folder)


# ---------------------------------------------------------------- submitting


@pytest.mark.parametrize("n", [1, 3])
def test_both_ways_to_submit_ask_for_the_same(tmp_path, monkeypatch, n):
    """submitit's own batch file and ours have the same options and the same lines of shell."""
    from submitit.slurm.slurm import SlurmExecutor

    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("srun", "sbatch"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sbatch.job, "run", max)  # what is pickled does not matter
    texts = []

    def submit_command(executor, command):
        texts.append(executor._make_submission_file_text(command, "x"))
        raise FailedJobError("error: seen")

    monkeypatch.setattr(SlurmExecutor, "_submit_command", submit_command)
    cluster = Cluster(
        kind="slurm",
        partition="gpu",
        account="a b",
        qos="q",
        constraint="c",
        gpus=2,
        setup=["module load x"],
        options={"exclusive": "true", "exclude": "n17"},
    )
    array = submissions.Array("0", "name-0", 2, n)
    needed = resources.JobResources(4, 2, 7.3, 33, 2)
    described = sbatch.Description(tmp_path, array, needed, cluster, tmp_path / "code", ("5", "6"))
    with pytest.raises(ClusterError, match="error: seen"):
        sbatch.submit(described)
    script = sbatch.write_script(described).read_text()

    def options(text):
        lines = (x.removeprefix("#SBATCH --") for x in text.splitlines() if "#SBATCH" in x)
        return dict(line.partition("=")[::2] for line in lines)

    theirs, ours = options(texts[0]), options(script)
    assert theirs.pop("wckey") == "submitit"
    assert theirs == ours and ours["mem"] == "7475M" and ours["exclusive"] == ""
    assert ours["dependency"] == "afterany:5:6" and ("array" in ours) == (n > 1)
    for line in described.setup():
        assert line in texts[0].splitlines() and line in script.splitlines()


@pytest.mark.parametrize(
    ("codes", "tries", "fails"),
    [
        ([0], 1, False),
        ([job.TRY_AGAIN, 0], 2, False),
        ([job.TRY_AGAIN] * 5, 5, True),
        ([2], 1, True),
    ],
)
def test_the_following_command_is_tried_again_where_that_may_help(
    tmp_path, monkeypatch, codes, tries, fails
):
    given, left = [], list(codes)

    def run(command, check):
        given.append(command)
        return subprocess.CompletedProcess(command, left.pop(0))

    monkeypatch.setattr(job.subprocess, "run", run)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"follow": "request.json", "command": ["-m", "lorasweep"]}))
    with pytest.raises(LorasweepError, match="status") if fails else contextlib.nullcontext():
        job.run(str(path))
    assert given == [[sys.executable, "-m", "lorasweep", str(path)]] * tries


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ClusterError("busy"), job.TRY_AGAIN),
        (StoreError("held"), job.TRY_AGAIN),
        (GaveUp("idle"), 2),
        (KeyboardInterrupt(), job.INTERRUPTED),
        (SpecError("wrong"), 2),
    ],
)
def test_the_following_command_says_whether_another_try_may_help(
    compose, tmp_path, monkeypatch, error, code
):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    (tmp_path / "request.json").write_text(json.dumps(asked.plain()))
    task = {"follow": str(tmp_path / "request.json"), "trainer": "a.b:c", "idle": 1, "finished": 4}
    (tmp_path / "task.json").write_text(json.dumps(task))
    acted = []

    def act(request, trainer, follow):
        acted.append((request.title, trainer, follow["idle"]))
        if error:
            raise error

    monkeypatch.setattr(follow, "act", act)
    monkeypatch.setattr(follow.signal, "signal", lambda *_: None)
    assert follow.main(str(tmp_path / "task.json")) == code
    assert acted == [(asked.title, "a.b:c", 1)]


# ---------------------------------------------------------------- before anything starts


def test_a_run_folder_that_nodes_cannot_see_is_refused(tmp_path):
    mounts = [("/", "ext4"), ("/scratch", "tmpfs"), ("/home", "nfs4")]
    nodes = frozenset({"n1", "n2"})
    with pytest.raises(ClusterError, match="tmpfs of this machine"):
        preflight.check_visible(Path("/scratch/runs"), nodes, mounts)
    with pytest.raises(ClusterError, match=r"cluster\.shared=true"):
        preflight.check_visible(Path("/tmp/runs"), nodes, mounts)
    preflight.check_visible(Path("/home/me/runs"), nodes, mounts)
    preflight.check_visible(
        Path("/tmp/runs"), frozenset({os.uname().nodename}), mounts
    )  # the node is this machine


def test_a_disk_that_is_too_small_is_refused_with_what_is_needed(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.checkpoint, "free_bytes", lambda path: 2**20)
    with pytest.raises(StoreError, match=r"0\.00 GiB free, and this sweep needs up to 0\.\d\d GiB"):
        preflight.check_disk(tmp_path, packs(compose, tmp_path), 4)


@pytest.mark.parametrize(
    "given, said",
    [
        ("cluster.kind=pbs", "cluster.kind 'pbs' not found"),
        ("cluster.cpus=0", "cluster.cpus=0: give more than 0"),
        ("cluster.gpus=-1", "cluster.gpus=-1"),
        ("+cluster.options.array=3", "is set by lorasweep itself"),
        ("cluster.runs_per_job=0", "or null to go by the plan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(compose, given, said):
    with pytest.raises(ClusterError, match=said):
        compose("+sweep=lr_ratio", "cluster=slurm", given)


def test_the_profiles_compose(compose):
    for path in sorted((ROOT / "slurm/cluster").glob("*.yaml")):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "lorasweep",
                "--config-dir",
                str(ROOT / "slurm"),
                "+sweep=lr_ratio",
                f"cluster={path.stem}",
                "--cfg",
                "job",
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0 and f"name: {path.stem}" in done.stdout, done.stderr


# ---------------------------------------------------------------- a group's folder, names, the index


def test_a_folder_of_a_group_stays_the_groups(tmp_path, compose):
    old = os.umask(0o022)
    try:
        runs = tmp_path / "runs"
        runs.mkdir()
        runs.chmod(0o2775)
        store = RunStore(runs)
        store.prepare()
        asked = compose("scale=smoke").points[0]
        assert store.claim(asked.spec) == 1
        store.record(asked.id, {"step": 1})
        written = [p for p in runs.rglob("*") if p.name != "store.json"]
        assert len(written) >= 5 and all(p.stat().st_mode & stat.S_IWGRP for p in written)
        os.umask(0o022)
        mine = tmp_path / "mine"
        mine.mkdir(mode=0o755)
        files.share_as(mine)
        (mine / "x").write_text("")
        assert not (mine / "x").stat().st_mode & stat.S_IWGRP
    finally:
        os.umask(old)


def test_another_user_of_the_group_goes_on_with_a_sweep(tmp_path, compose):
    """A second user, not root, claims what the first left, and finishes it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    old = os.umask(0o022)
    try:
        runs = tmp_path / "runs"
        runs.mkdir()
        os.chown(runs, 0, 4321)
        runs.chmod(0o2775)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
                folder.chmod(folder.stat().st_mode | 0o011)
        store = RunStore(runs)
        store.prepare()
        point = compose("scale=smoke").points[0]
        n = store.claim(point.spec)
        store.record(point.id, {"step": 1})
        store.write_end(point.id, n, "stopped", "asked to stop")
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(4321)
                os.setuid(4321)
                other = RunStore(runs)
                other.prepare()
                assert other.claim(point.spec) == n + 1
                other.record(point.id, {"step": 2})
                assert other.finish(point.id, "done", {"test_nll": 1.0})
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert store.state(point.id) == "done" and [r["step"] for r in store.records(point.id)] == [
            1,
            2,
        ]
    finally:
        os.umask(old)


def test_names_say_what_differs_and_no_more(compose):
    points = compose("+sweep=lr_ratio", "scale=smoke").points
    assert set(run_names(points).values()) >= {"fullft lr=0.002", "lora lr=0.005"}
    more = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "sweep.arms.lora.rank=[2,4]",
        "+sweep.axes.batch_size=[4,8]",
    ).points
    assert "lora r2 batch_size=4 lr=0.005" in run_names(more).values() and len(
        set(run_names(more).values())
    ) == len(more)


def test_the_index_is_a_cache_and_no_more(tmp_path, compose):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    points = compose("+sweep=lr_ratio", "scale=smoke", f"sweep.axes.seed={list(range(10))}").points
    for p in points:
        store.claim(p.spec)
        store.finish(p.id, "done", {"test_nll": 2.0, "wall_s": 1.0, "threads": 1})
    ids = [p.id for p in points]
    assert set(store.states(ids).values()) == {"done"} and (tmp_path / "runs/.index.json").is_file()
    read = []
    assert (
        index.read(store.root, ids, lambda rid: read.append(rid), {}).keys() == set(ids)
        and not read
    )
    result = store.folder(ids[0]) / "result.json"
    result.write_text(
        result.read_text().replace('"test_nll": 2.0', '"test_nll": 3.25')
    )  # damaged: its checksum fails
    assert store.states(ids)[ids[0]] != "done" and store.states(ids)[ids[1]] == "done"
    (tmp_path / "runs/.index.json").write_text('{"version": 1, "runs": {"x": 3}}')
    assert RunStore(tmp_path / "runs").states(ids)[ids[1]] == "done"
