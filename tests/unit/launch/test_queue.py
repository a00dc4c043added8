"""The jobs of a run folder: what Slurm's output says, submissions, follow-up jobs."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from lorasweep import follow_up
from lorasweep.errors import ClusterError, GaveUp, SpecError, StoreError
from lorasweep.launch.local import VARIABLE
from lorasweep.launch.slurm import guard, job, queue, submit
from lorasweep.launch.slurm.queue import Partition, RunningJobs
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims
from lorasweep.store.run_store import RunStore
from tests.world import ROOT, wait_for


def listed(folder, *jobs):
    """Give squeue's output: jobs as (id, array, task, state, name), submitted from `folder`."""
    rows = ((i, a, t, state, "None", "0", "n1", name, folder) for i, a, t, state, name in jobs)
    return "".join("|".join([*row[:-1], f"{row[-1]}/x.sh", "\n"]) for row in rows)


@pytest.fixture
def folder(tmp_path, slurm):
    """A submission of two runs in two jobs, 20_0 and 20_1, and a follow-up job, 23."""
    slurm("here")
    folder = submit._write(tmp_path, "lr ratio/x", [["r1"], ["r2"]], [{}, {}])
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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before sbatch", "after sbatch"])
def test_a_command_killed_at_any_sbatch_is_completed_by_the_next(
    compose, tmp_path, slurm, monkeypatch, moment
):
    """Each run is in one job, and none is cancelled; jobs without submitit's pickle fail soon."""
    given = ("cluster=slurm", "cluster.runs_per_job=1", "exec.pack_size=1")
    asked = compose("+sweep=lr_ratio", "scale=smoke", *given)
    taken, rows, calls = submit.take(tmp_path), {}, []
    monkeypatch.setattr(submit, "prepare", lambda *_: (Partition(0, 2880.0), taken))

    def sbatch(path):
        text, number = Path(path).read_text(), str(100 * len(calls) + 100)
        calls.append(text)
        if len(calls) == at and moment == "before sbatch":
            raise Killed
        array = re.search("--array=0-([0-9]+)%", text)
        name = re.search("--job-name=(.*)", text)[1]
        for k in range(int(array[1]) + 1 if array else 1):
            label, task = (f"{number}_{k}", str(k)) if array else (number, "N/A")
            job = (str(int(number) + k), number, task, "PENDING", name)
            rows[label] = listed(Path(path).parent, job)
        if len(calls) == at:
            raise Killed
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
        with pytest.raises(Killed):
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
    code, needed = submit.Snapshot(tmp_path, "0"), submit.JobResources(4, 2, 7.3, 3, 2)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "3")  # of an enclosing job
    texts = []

    def sbatch(path):
        assert "SLURM_MEM_PER_NODE" not in os.environ
        texts.append(Path(path).read_text())
        raise FailedJobError("error: seen")

    slurm("here", sbatch=sbatch)
    with pytest.raises(ClusterError, match=r"error: seen.* 2 GPU\(s\), 7\.3 GiB .*cluster\.gpus"):
        submit._send(tmp_path, "2", 2, n, needed, cluster, code, ("5", "6"))
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
    lines = [
        "gpu*|gpu:a100:8(S:0-1)|2-00:00:00|",
        "gpu*|gpu:4|2-00:00:00|",
        "long|(null)|infinite|",
    ]
    limits = {"30:00": 30, "1:30:00": 90, "1-00:30:00": 1470}
    lines += [f"p{n}|gpu:a:1,gpu:b:2|{limit}|" for n, limit in enumerate(limits)]
    slurm("here", sinfo="\n".join(lines))
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


# ---------------------------------------------------------------- owners that are jobs


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

    first, liveness = attempt("1", 12), claims.Liveness(alive)
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
    assert "slurm" not in claims.this_process()  # a command in an interactive job
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted(job_of(12))
    assert not any(map(claims.restarted, (job_of(12, restart=1), job_of(13), {})))


def test_a_machine_without_slurm_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no Slurm here.*login node.*cluster=local"):
        queue.partition_of(Cluster())


# ---------------------------------------------------------------- follow-up jobs


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
def test_a_follow_up_job_tries_again_where_that_may_help(
    compose, tmp_path, monkeypatch, errors, status
):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    task = {"follow": asked.plain(), "trainer": "a.b:c", "idle": 1, "updates": 4, "requeues": 0}
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{{}}\n{json.dumps(task)}\n")
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    act = Mock(side_effect=errors)
    monkeypatch.setattr(follow_up, "act", act)
    assert follow_up.follow_up(str(path)) == status and act.call_count == len(errors)
    (request, trainer), more = act.call_args
    assert (request.title, trainer, more["follow"]["idle"]) == (asked.title, "a.b:c", 1)


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
