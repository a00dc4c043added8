"""Slurm: what its output says, jobs, what they request and run, guards, containers, follow-up jobs."""

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from submitit.core.utils import CommandFunction, FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from lorasweep import follow_up
from lorasweep.errors import ClusterError, GaveUp, SpecError, StoreError
from lorasweep.launch.container import VARIABLE, container_of
from lorasweep.launch.slurm import guard, job, queue, resources, sbatch, snapshot, submit
from lorasweep.launch.slurm.queue import Partition, RunningJobs
from lorasweep.plan import detect
from lorasweep.plan.detect import hardware_of
from lorasweep.plan.planner import make_plan, place
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import owners
from lorasweep.store.exported import load_runs
from lorasweep.store.run_store import RunStore
from tests.world import OTHER_USER, ROOT, as_another_user, cli, tiny_spec, wait_for


@pytest.fixture
def packs(compose, tmp_path):
    """24 runs of `lr_ratio` at scale smoke, in packs of at most four."""
    seeds = "sweep.axes.seed=[0,1,2,3]"
    request = compose("+sweep=lr_ratio", "scale=smoke", seeds, "exec.pack_size=4")
    store = RunStore(tmp_path / "runs")
    return make_plan(request.points, store, request.exec, detect.this_machine()).packs


@pytest.fixture
def slurm(monkeypatch):
    """`slurm(name, **outputs)`: a cluster of this name, with at most two jobs in an array; command
    -> its output, or a function of its arguments. Returns the list of commands that are given."""
    asked = []

    def set_up(name, **outputs):
        outputs["scontrol"] = f"ClusterName = {name}\nMaxArraySize = 3\n"

        def run(command, *arguments):
            asked.append((command, *arguments))
            output = outputs.get(command, "")
            return output(*arguments) if callable(output) else output

        queue.setting.cache_clear()
        monkeypatch.setattr(queue, "run", run)
        monkeypatch.setattr(CommandFunction, "__call__", lambda sbatch: run(*sbatch.command))
        monkeypatch.setattr(SlurmExecutor, "affinity", lambda *_: 1)
        return asked

    yield set_up
    queue.setting.cache_clear()


def listed(folder, *jobs):
    """Give squeue's output: jobs as (id, array, task, state, name), submitted from `folder`."""
    rows = ((i, a, t, state, "None", "0", "n1", name, folder) for i, a, t, state, name in jobs)
    return "".join("|".join([*row[:-1], f"{row[-1]}/x.sh", "\n"]) for row in rows)


@pytest.fixture
def folder(tmp_path, slurm):
    """A submission of two runs in two jobs, 20_0 and 20_1, and a follow-up job, 23."""
    slurm("here")
    folder = sbatch.write(tmp_path, "lr ratio/x", [["r1"], ["r2"]], [{}, {}])
    assert folder.parent.name == ".slurm"
    return folder


def test_the_names_of_jobs_say_which_runs_wait(folder, tmp_path, slurm):
    name, none = folder.name, "N/A"
    jobs = [("21", "20", "0", "RUNNING", f"{name}-0"), ("22", "20", "1", "PENDING", f"{name}-0")]
    jobs += [("23", "23", none, "PENDING", f"{name}-follow"), ("9", "9", none, "RUNNING", "mine")]
    given = slurm("here", squeue=listed(folder, *jobs))
    found = queue.look(tmp_path)
    assert {run: j.label for run, j in found.covered().items()} == {"r1": "20_0", "r2": "20_1"}
    assert [(s.folder, j.id) for s, j in found.follows] == [(folder, "23")]
    (asked,) = [words for words in given if words[0] == "squeue"]
    assert asked[asked.index("-u") + 1] == str(os.geteuid())
    # a copy of the run folder has these names, but not these jobs
    shutil.copytree(tmp_path / ".slurm", tmp_path / "copy/.slurm")
    with queue.settled(tmp_path / "copy", print) as copy:
        assert not (copy.jobs or copy.follows)
    slurm("here", squeue=Mock(side_effect=ClusterError("no Slurm here")))
    found = queue.look(tmp_path)
    assert found.unavailable == "no Slurm here" and found.covered() == {}


def test_a_task_waits_as_long_as_slurm_may_run_it(folder, tmp_path, slurm):
    """A requeued task keeps its id; Slurm lists an ended one for some minutes, then forgets it."""
    waits = ["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"]
    for state in (*waits, *queue.RUNNING, *queue.ENDED, None):
        tasks = [("21", "20", "0", "RUNNING", f"{folder.name}-0")]
        tasks += [("22", "20", "1", state, f"{folder.name}-0")] if state else []
        tasks += [("23", "23", "N/A", state, f"{folder.name}-follow")] if state else []
        slurm("here", squeue=listed(folder, *tasks))
        found, alive = queue.look(tmp_path), state in (*waits, *queue.RUNNING)
        assert set(found.covered()) == ({"r1", "r2"} if alive else {"r1"}), state
        assert bool(found.follows) == alive, state


@pytest.mark.parametrize("moment", ["before sbatch", "after sbatch"])
def test_a_command_killed_at_any_sbatch_is_completed(compose, tmp_path, slurm, monkeypatch, moment):
    """Each run is in one job, and none is cancelled; jobs without submitit's pickle fail soon."""
    given = ("cluster=slurm", "cluster.runs_per_job=1", "exec.pack_size=1")
    asked = compose("+sweep=lr_ratio", "scale=smoke", *given)
    taken, rows, calls = snapshot.take(tmp_path), {}, []
    monkeypatch.setattr(submit, "prepare", lambda *_: (Partition(0, 2880.0), taken))

    def sbatch(path):
        text, number = Path(path).read_text(), str(100 * len(calls) + 100)
        calls.append(text)
        if len(calls) == at and moment == "before sbatch":
            raise SystemExit
        array = re.search("--array=0-([0-9]+)%", text)
        name = re.search("--job-name=(.*)", text)[1]
        for k in range(int(array[1]) + 1 if array else 1):
            label, task = (f"{number}_{k}", str(k)) if array else (number, "N/A")
            job = (str(int(number) + k), number, task, "PENDING", name)
            rows[label] = listed(Path(path).parent, job)
        if len(calls) == at:
            raise SystemExit
        return f"Submitted batch job {number}"

    cancel = Mock(side_effect=lambda _, *labels: [rows.pop(label) for label in labels] and "")
    slurm("here", squeue=lambda *_: "".join(rows.values()), scancel=cancel, sbatch=sbatch)
    for at in range(1, 5):  # three arrays of two jobs, then the follow-up job
        root = tmp_path / f"runs{at}"
        exec_ = dataclasses.replace(asked.exec, runs_dir=str(root))
        request, store = dataclasses.replace(asked, exec=exec_), RunStore(root)
        store.prepare()
        calls.clear()
        rows.clear()
        with pytest.raises(SystemExit):
            submit.submit(request, store, lambda: asked.points, print)
        submit.submit(request, store, lambda: asked.points, print)
        n_calls = len(calls)
        submit.submit(request, store, lambda: asked.points, print)
        assert len(calls) == n_calls
        found = queue.look(root)
        runs = sorted(r for _, runs, _ in found.jobs for r in runs)
        assert runs == sorted(p.id for p in asked.points)
        assert len(found.follows) == 1 and len(rows) == 6 + 1
    assert not cancel.called
    # the follow-up job of another sweep with some of these runs waits for their jobs
    other = compose("+sweep=lr_ratio", "scale=smoke", *given, "~sweep.arms.fullft")
    left = submit.submit(dataclasses.replace(other, exec=exec_), store, lambda: other.points, print)
    waits = {queue.look(root).covered()[p.id].label for p in other.points}
    after = re.search("--dependency=afterany:(.*)", calls[-1])[1].split(":")
    assert "-follow" in calls[-1] and set(after) == waits and 0 < len(waits) < 6
    # runs that left the command line are named, with their jobs and what submits them again
    again = [j.label for s, j in queue.look(root).follows if s.sweep == asked.title]
    jobs = {j.label for _, _, j in queue.look(root).jobs} - waits
    said = re.search(r"(\d) queued run.* scancel ([^,]*),", left.removed)
    assert int(said[1]) == len(jobs) and {*said[2].split()} == jobs.union(again)


@pytest.mark.parametrize(("n", "image"), [(1, None), (3, "docker://x#y")])
def test_what_sbatch_is_asked_for(tmp_path, slurm, monkeypatch, n, image):
    given = {"partition": "gpu", "account": "a b", "qos": "q", "constraint": "c", "gpus": 2}
    more = {"setup": ["module load x"], "options": {"exclusive": "true", "comment": "a\nrm b"}}
    cluster = Cluster(kind="slurm", container=image, **given, **more)
    (tmp_path / guard.TASKS).write_text("{}")
    code, needed = snapshot.Snapshot(tmp_path, "0"), resources.JobResources(4, 2, 7.3, 3, 2)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "3")  # of an enclosing job
    texts = []

    def refuse(path):
        assert "SLURM_MEM_PER_NODE" not in os.environ
        texts.append(Path(path).read_text())
        raise FailedJobError("error: seen")

    slurm("here", sbatch=refuse)
    with pytest.raises(ClusterError, match=r"error: seen.* 2 GPU\(s\), 7\.3 GiB .*cluster\.gpus"):
        sbatch.send(tmp_path, "2", 2, n, needed, cluster, code, ("5", "6"))
    assert os.environ["SLURM_MEM_PER_NODE"] == "3"
    (text,) = texts
    lines = [x.removeprefix("#SBATCH --") for x in text.splitlines() if "#SBATCH" in x]
    given = dict(line.partition("=")[::2] for line in lines)
    assert given["comment"] == "'a rm b'" and "wckey" not in given
    assert given["mem"] == "7475M" and given["exclusive"] == "" and given["account"] == "'a b'"
    assert given["dependency"] == "afterany:5:6" and ("array" in given) == (n > 1)
    assert given["job-name"] == f"{tmp_path.name}-2"
    assert given["signal"] == "USR2@90"  # a job of 3 minutes is not warned at once
    assert (f"export {VARIABLE}='{image}'" in text) == (VARIABLE in text) == bool(image)
    assert text.index("module load x") < text.index("-I -c") < text.index("\nsrun ")


def test_partitions_are_read_and_known_by_name(slurm):
    lines = ["gpu*|gpu:a100:8(S:0-1)|2-00:00:00|", "gpu*|gpu:4|2-00:00:00|"]
    limits = {"30:00": 30, "1:30:00": 90, "1-00:30:00": 1470}
    lines += [f"p{n}|gpu:a:1,gpu:b:2|{limit}|" for n, limit in enumerate(limits)]
    slurm("here", sinfo="\n".join([*lines, "long|(null)|infinite|"]))
    assert queue.partition_of(Cluster()) == Partition(8, 2880.0)
    assert queue.partition_of(Cluster(partition="long")) == Partition(0, float("inf"))
    for n, minutes in enumerate(limits.values()):
        assert queue.partition_of(Cluster(partition=f"p{n}")) == Partition(3, minutes)
    with pytest.raises(ClusterError, match=r"'gpx'.*'gpu'"):
        queue.partition_of(Cluster(partition="gpx"))


def job_of(number, restart=0, cluster="here"):
    return {"slurm": {"cluster": cluster, "job": str(number), "restart": restart}}


def test_the_worst_step_decides_how_a_job_ended(folder, tmp_path, slurm):
    name = f"{folder.name}-0"
    (folder / "7_1_0_log.out").touch()
    lines = [f"11|7_1|{name}|FAILED|1:0|n1", "11.batch|7_1.batch|batch|FAILED|1:0|n1"]
    lines += ["11.0|7_1.0|python|OUT_OF_MEMORY|0:125|n1", f"12|7_2|{name}|CANCELLED by 5|0:0|n2"]
    lines += [f"13|7_3|{name}|RUNNING|0:0|n2", f"14|7_4|{name}|FAILED|9:0|n2"]
    slurm("here", sacct="\n".join(lines))
    owners = {str(k): job_of(k) for k in (11, 12, 13, 14)}
    found = queue.causes(tmp_path, {**owners, "other": {}, "there": job_of(12, cluster="there")})
    assert found.keys() == {"11", "12", "14"} and "CANCELLED" in found["12"]
    assert "cluster.mem_gib" in found["11"] and "7_1_0_log.out" in found["11"]
    assert "memory" in found["14"] and "memory" not in found["12"]


def test_slurm_decides_whether_an_owner_that_is_a_job_is_alive(slurm, tmp_path, monkeypatch):
    running = [("12", "12", "N/A", "RUNNING", "x")]
    asked = slurm("here", squeue=lambda *_: listed("", *running))
    alive = RunningJobs(tmp_path)
    assert alive("here", "12", 0, 0) is True and alive("here", "13", 0, 0) is False
    assert alive("here", "12", 1, 0) is False  # a later execution
    assert alive("there", "12", 7, 0) is None  # another cluster
    n = len(asked)
    assert alive("here", "14", 0, time.monotonic()) is False and len(asked) > n

    def attempt(name, number):
        owner = {"host": "elsewhere", "boot": "x", "pid": 1, "started": "1", **job_of(number)}
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner.json").write_text(json.dumps(owner))
        return tmp_path / name

    first, liveness = attempt("1", 12), owners.Liveness(alive)
    assert liveness.alive(first)
    running.clear()
    with monkeypatch.context() as m:
        m.setattr(queue, "FRESH_S", -1.0)  # later
        assert not liveness.alive(first)
    many = [attempt(f"a{k}", 100 + k) for k in range(50)]
    asked.clear()
    liveness.prepare(many)  # one query is enough for any number of dead jobs
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1
    # a Slurm that does not answer is not asked again for each run
    tries = Mock(side_effect=ClusterError("Unable to contact slurm controller"))
    monkeypatch.setattr(queue, "run", tries)
    silent = RunningJobs(tmp_path)
    assert {silent("here", str(k), 0, time.monotonic()) for k in range(50)} == {None}
    assert tries.call_count == 1


def test_a_job_that_slurm_started_again_recognises_its_earlier_execution(monkeypatch):
    for name, value in {"JOB_ID": "12", "CLUSTER_NAME": "here", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "slurm" not in owners.this_process()  # a command in an interactive job
    monkeypatch.setenv(owners.JOB_VARIABLE, "1")
    assert owners.restarted(job_of(12))
    assert not any(map(owners.restarted, (job_of(12, restart=1), job_of(13), {})))


def test_a_machine_without_slurm_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no Slurm here.*login node.*cluster=local"):
        queue.partition_of(Cluster())


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([None], 0),
        ([ClusterError("busy"), StoreError("held"), None], 0),
        ([ClusterError("busy")] * 5, 2),
        ([GaveUp("idle")], 2),
        ([SpecError("wrong")], 2),
        ([KeyboardInterrupt()], 0),
    ],
)
def test_a_follow_up_job_tries_again_where_it_helps(compose, tmp_path, monkeypatch, errors, status):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    task = {"follow": asked.plain(), "trainer": "a.b:c", "idle": 1, "updates": 4, "requeues": 0}
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{{}}\n{json.dumps(task)}\n")
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    act = Mock(side_effect=errors)
    monkeypatch.setattr(follow_up, "act", act)
    assert follow_up.follow_up(str(path)) == status and act.call_count == len(errors)
    request, trainer = act.call_args.args
    assert (request.title, trainer, request.task["idle"]) == (asked.title, "a.b:c", 1)


def test_a_job_that_is_stopped_releases_its_lock_first(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from lorasweep.launch.slurm.job import stoppable\n"
        "from lorasweep.store.files import locked\n"
        "folder = Path(sys.argv[1])\n"
        "with stoppable(0), locked(folder / 'lock', 9):\n"
        "    (folder / 'held').touch()\n"
        "    try: time.sleep(60)\n"
        "    finally: time.sleep(1); (folder / 'released').touch()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    wait_for(lambda: (tmp_path / "held").exists() or following.poll() is not None)
    following.send_signal(signal.SIGTERM)
    printed, _ = following.communicate(timeout=30)
    assert following.returncode == 0 and "stopped by SIGTERM" in printed
    assert (tmp_path / "released").exists()


def append(path):
    path.write_text(path.read_text() + " ")


def plant(path, mode=0o666, content=b""):
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda a: append(a.code.folder / "snapshot.json"), None),  # it is not code
        (lambda a: append(a.folder / "tasks.jsonl"), "tasks.jsonl was changed"),
        (lambda a: (a.folder / "tasks.jsonl").unlink(), "No such file.*tasks.jsonl"),
        (lambda a: (a.folder / "tasks.jsonl").chmod(0o666), "others may write .*tasks.jsonl"),
        (lambda a: a.folder.chmod(0o775), "others may write .*/sweep-"),
        (lambda a: plant(a.folder / "12_1_submitted.pkl"), "others may write .*12_1_sub"),
        (lambda a: append(a.code.folder / "package/a.py"), "snapshot was changed"),
        (lambda a: (a.code.folder / "package/b.py").unlink(), "snapshot was changed"),
        (lambda a: plant(a.code.folder / "package/a.pyc", 0o644), "snapshot was changed"),
        (lambda a: plant(a.code.folder / "package/a.pyc"), "others may write .*a.pyc"),
        (lambda a: (a.code.folder / "package").chmod(0o775), "others may write .*package"),
        (lambda a: (a.code.folder / "c.py").symlink_to("/etc/passwd"), "c.py is a link"),
        pytest.param(
            lambda a: os.chown(a.folder, OTHER_USER, -1),
            f"/sweep-[0-9a-f]+ belongs to user {OTHER_USER}",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away"),
        ),
    ],
)
def test_a_job_whose_files_were_changed_or_could_be_is_refused(slurm, tmp_path, harm, said):
    slurm("here")
    RunStore(tmp_path / "runs").prepare()
    code = tmp_path / "snapshot"
    (code / "package").mkdir(parents=True)
    for name in ("package/a.py", "package/b.py", "snapshot.json"):
        (code / name).write_text(f"{name} = 1")
    tasks = [["a"], ["b"]]
    folder = sbatch.write(tmp_path / "runs", "sweep", tasks, [{"runs": task} for task in tasks])
    array = SimpleNamespace(folder=folder, code=snapshot.Snapshot(code, guard.digest(str(code))))
    script = tmp_path / "spooled.sh"  # Slurm runs its own copy of the script
    lines = sbatch.setup(array.folder, Cluster(kind="slurm"), array.code)
    script.write_text("\n".join([*lines, "srun job", ""]))
    harm(array)
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/srun").write_text("#!/bin/sh\necho reached\n")
    (tmp_path / "bin/srun").chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "12"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    assert ("reached" in done.stdout) == (done.returncode == 0) == (said is None), done.stderr
    assert re.search(said or "^$", done.stderr), done.stderr


def test_a_snapshot_runs_and_one_that_was_changed_is_not_used_again(tmp_path, monkeypatch):
    taken = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == taken and len(list(tmp_path.iterdir())) == 1
    assert (taken.folder / "conf/sweep/lr_ratio.yaml").is_file()
    code = "import lorasweep; from lorasweep.tracking import provenance\n"
    code += "print(lorasweep.__file__, provenance.code()['snapshot'])"
    env = {**os.environ, "PYTHONPATH": str(taken.folder), "PYTHONSAFEPATH": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=ROOT, text=True)
    assert printed.startswith(f"{taken.folder}/") and printed.split()[1] == taken.folder.name

    copy = shutil.copyfile

    def edited(source, target):  # in the middle of copying
        copy(source, target)
        if target.name == "errors.py":
            append(target)

    with monkeypatch.context() as m:
        m.setattr(snapshot.shutil, "copyfile", edited)
        other = snapshot.take(tmp_path)
    assert other.sha256 == guard.digest(str(other.folder)) and other.folder != taken.folder
    append(taken.folder / "lorasweep/errors.py")
    with pytest.raises(ClusterError, match=r"was changed after .*rm -r "):
        snapshot.take(tmp_path)


def test_a_run_folder_that_others_may_write_is_refused_with_the_remedy(tmp_path):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    for mode in (0o775, 0o777, 0o3775):
        store.root.chmod(mode)
        with pytest.raises(StoreError, match=f"chmod -R go-w {store.root}"):
            store.prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")
def test_another_user_reads_a_run_folder_and_does_not_write_it(tmp_path):
    store, spec = RunStore(tmp_path / "runs"), tiny_spec()
    os.umask(os.umask(0) & ~0o022)  # a login whose files the group may write
    store.prepare()
    store.claim(spec)
    store.finish(spec.id, "done", {"test_nll": 1.0})
    written = [p.stat().st_mode for p in store.root.rglob("*")]
    assert not any(mode & (stat.S_IWGRP | stat.S_IWOTH) for mode in written)

    def other():
        there = RunStore(store.root)
        assert there.state(spec.id) == "done" and len(load_runs(store.root)) == 1
        with pytest.raises(StoreError, match="belongs to another user"):
            there.prepare()

    as_another_user(tmp_path, other)
    os.chown(store.root, OTHER_USER, -1)
    with pytest.raises(ClusterError, match=f"is of user {OTHER_USER}"):
        snapshot.prepare(Cluster(kind="slurm"), store.root)


GPUS, slurm_cluster = Partition(8, 2880.0), partial(Cluster, kind="slurm")


def test_jobs_hold_every_pack_once_and_as_much_work_as_asked(packs):
    flops_s = sum(p.flops for p in packs) / 3600  # an hour of work in all
    for least, most, minutes in (10, 16, {"work_min": 5}), (1, 2, {"work_min": 60, "work_max": 60}):
        cluster = slurm_cluster(**minutes)
        tasks = resources.group(packs, cluster, flops_s)
        assert sorted(id(p) for t in tasks for p in t) == sorted(map(id, packs))
        assert least <= len(tasks) <= most
        longest = max(sum(p.flops for p in t) / flops_s / 60 for t in tasks)
        assert longest <= max(cluster.work_min, cluster.work_max) + 1e-9
    tasks = resources.group(packs, slurm_cluster(runs_per_job=8), 1e9)
    n_runs = [sum(len(p.points) for p in t) for t in tasks]
    assert max(n_runs) <= 8 and sum(n_runs) == 24
    four = slurm_cluster(gpus=4, work_min=0.01, work_max=0.01)
    tasks = resources.group(packs, four, 1e6)  # a pack for each worker
    assert all(len(t) >= 4 for t in tasks[:-1]) and sum(map(len, tasks)) > 4


def test_a_job_requests_what_its_packs_need(packs):
    tasks = resources.group(packs, slurm_cluster(work_min=10), 1e7)

    def needed(flops_s=1e7, **settings):
        return resources.resources_for(tasks, slurm_cluster(**settings), flops_s, GPUS)

    two = needed(cpus=3, workers=2)
    assert (two.cpus, two.workers) == (6, 2) and 1 < two.mem_gib < 4 and 15 < two.time_min <= 2880
    given = needed(mem_gib=7, time_min=33)
    assert (given.mem_gib, given.time_min) == (7, 33)
    for more in ({"flops_s": 1.0}, {"time_min": 3000}):
        assert needed(**more).time_min == 2880  # the partition's limit; the job requeues itself


@pytest.mark.parametrize(
    ("world_size", "node_gpus", "settings", "expected"),
    [
        (1, 8, {"gpus": 8}, (1, 8, 16, 8)),
        (4, 8, {"gpus": 8}, (1, 8, 16, 2)),
        (4, 8, {"gpus": 1, "cpus": 3}, (1, 4, 12, 1)),
        (16, 8, {"gpus": 1}, (2, 8, 16, 1)),
        (16, 8, {"gpus": 1, "gpus_per_node": 4}, (4, 4, 8, 1)),
        (8, 6, {"gpus": 1}, (2, 4, 8, 1)),
        (4, 8, {"gpus": 0}, (1, 0, 8, 1)),  # on processors, for tests
    ],
)
def test_a_job_has_as_few_nodes_as_hold_its_processes(world_size, node_gpus, settings, expected):
    partition = dataclasses.replace(GPUS, gpus=node_gpus)
    cluster = slurm_cluster(**settings)
    n = resources.resources_for([], cluster, 1.0, partition, world_size)
    assert (n.nodes, n.gpus, n.cpus, n.workers) == expected


def test_jobs_train_each_run_as_the_plan_places_it(compose, tmp_path):
    def planned(*overrides):
        models = "sweep.axes.model=[llama-3.2-1b,llama-3.1-8b,qwen3-32b]"
        given = ("scale=paper", "cluster=slurm", "hardware=h100", models, *overrides)
        request, store = compose("+sweep=lr_ratio", *given), RunStore(tmp_path / "runs")
        now = make_plan(request.points, store, request.exec, hardware_of(request.hardware))
        return request, resources.jobs_of(request, store, now.todo, now, GPUS)

    request, jobs = planned()
    sizes = [j.needed.nodes * j.needed.gpus for j in jobs]
    assert sorted(set(sizes)) == [1, 2, 4, 16] and sizes == sorted(sizes, reverse=True)
    assert jobs[0].needed.nodes == 2 and jobs[0].exec.threads == request.cluster.cpus
    small = [j.needed.mem_gib for j in jobs if j.needed.gpus == 1]
    assert len(small) > 1 and 2 * min(small) < max(small)  # of the small model, and of 8B
    hardware, seen = hardware_of(request.hardware), []
    for one, task in ((j, task) for j in jobs for task in j.tasks):
        how = {"gpus": one.exec.world_size, "checkpointing": (one.exec.activation_checkpointing,)}
        assert how["gpus"] == one.needed.nodes * one.needed.gpus
        for pack in task:
            rows, specs = pack.micro_batch_size, [p.spec for p in pack.points]
            assert rows == one.exec.micro_batch_size
            assert not place(specs[-1], hardware, len(specs), rows, **how).why
            seen += [s.id for s in specs]
    assert sorted(seen) == sorted(p.id for p in request.points)


@pytest.mark.parametrize("given", ["kind=pbs", "container_kind=docker", "cpus=0", "work_min=0"])
def test_settings_without_a_meaning_are_refused(compose, given):
    with pytest.raises(ClusterError, match=f"^cluster.{given.partition('=')[0]}="):
        compose("+sweep=lr_ratio", "cluster=slurm", f"cluster.{given}")


def test_the_profiles_compose_and_letters_that_stdout_lacks_are_escaped(tmp_path):
    how = {"cwd": tmp_path, "env": {"PYTHONIOENCODING": "ascii"}}
    for path in sorted((ROOT / "slurm/cluster").glob("*.yaml")):
        given = ("--config-dir", ROOT / "slurm", "+sweep=lr_ratio", f"cluster={path.stem}")
        said = cli(*given, "--cfg", "job", "cluster.account='é'", **how).stdout
        assert f"name: {path.stem}" in said and "account: \\xe9" in said


def test_a_run_of_a_machine_that_died_is_found_by_watching(tmp_path, compose, monkeypatch):
    """Its heartbeat does not change, and nobody else knows."""
    monkeypatch.setattr(owners, "SILENCE_S", 0.5)
    monkeypatch.setattr(submit, "SILENCE_S", 0.5)
    store = RunStore(tmp_path / "runs")
    store.prepare()
    point = compose("scale=smoke").points[0]
    with monkeypatch.context() as m:
        m.setenv("LORASWEEP_HOST", "elsewhere")
        store.claim(point.spec)
    shown = []
    assert store.state(point.id) == "running" and store.unsure([point.id]) == [point.id]
    submit.watch_others(store, [point], shown.append)
    assert "1 run" in shown[0] and store.state(point.id) == "interrupted"


def test_folders_that_jobs_cannot_use_are_refused(slurm):
    """Local to a machine; with a colon, at which the path of imports splits."""
    slurm("here", sinfo="main*|(null)|infinite|")
    for folder, why in (("/tmp/runs", r"cluster\.shared=true"), ("/me/10:00/runs", "has a ':'")):
        with pytest.raises(ClusterError, match=why):
            snapshot.prepare(Cluster(kind="slurm"), Path(folder))


# ---------------------------------------------------------------- containers (tests/slurm starts workers in stand-ins)


NGC = "nvcr.io#nvidia/pytorch:25.06-py3"
ENV = {"PYTHONPATH": "/code", "OMP_NUM_THREADS": "4", "OTHER": "x"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(image, **settings)`: the container of a cluster, in a folder with runs and an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HOME", raising=False)
    for name in ("runs", "data", "bin"):
        (tmp_path / name).mkdir()
    for name in ("x.sif", "x.sqsh"):
        (tmp_path / name).write_text("")
    (tmp_path / "bin" / "apptainer").write_text("")
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(image, runs="runs", **settings):
        cluster = Cluster(kind="slurm", container=image, **settings)
        folders = {"runs_dir": str(tmp_path / runs), "reports_dir": str(tmp_path / "reports")}
        models, data = [str(tmp_path / "models")], [str(tmp_path / "data")]
        return container_of(cluster, Exec(**folders, models_dir=models, data_dir=data))

    return make


def test_the_image_says_the_kind_of_container_and_must_be_there(made, tmp_path):
    for image, by_srun in {"x.sif": False, "x.sqsh": True, NGC: True}.items():
        assert made(image).by_srun == by_srun
    assert not made("docker://x", container_kind="apptainer").by_srun
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert made(NGC, "link").folders[:2] == [f"{tmp_path}/link", f"{tmp_path}/runs"]  # both paths
    with pytest.raises(ClusterError, match=r"gone\.sif: there is"):
        made("gone.sif")


def test_folders_that_exist_are_mounted_at_their_paths(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "bin"))  # as a line of cluster.setup sets it
    mounts = [f"{tmp_path}/{name}:{tmp_path}/{name}" for name in ("runs", "data")]
    mounts += [f"{tmp_path}:{tmp_path}", f"{tmp_path}/bin:{tmp_path}/bin", "/a:/a", "/b:/c:ro"]
    inside = "env PYTHONNOUSERSITE=1 PYTHONPATH=/code {hub}OMP_NUM_THREADS=4 python3".format
    pyxis = made(NGC, container_mounts=["/a", "/b:/c:ro"])
    assert pyxis.srun() == [
        f"--container-image={NGC}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={tmp_path}",
        "--no-container-entrypoint",
    ]
    assert " ".join(pyxis.python(ENV, ["OMP_NUM_THREADS"])) == inside(hub="")
    apptainer = made("x.sif", container_mounts=["/a", "/b:/c:ro"])
    assert apptainer.srun() == []
    start = ["apptainer", "exec", "--nv", "--bind", ",".join(mounts), "--pwd", str(tmp_path)]
    words = apptainer.python({**ENV, "HF_HOME": "/hub"}, ["OMP_NUM_THREADS"])
    assert words == [*start, "x.sif", *inside(hub="HF_HOME=/hub ").split()]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="no apptainer on the PATH"):
        apptainer.python(ENV)
