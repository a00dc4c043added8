"""The jobs of a run folder: what Slurm's output says, submissions, follow-up jobs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.cli import actions
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm import guard, job, planning, queue, snapshot, submit
from lorasweep.launch.slurm.queue import Partition, RunningJobs
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims
from tests.world import ROOT

OWNER = {"host": "elsewhere", "boot": "x", "pid": 1, "started": "1"}


def listed(*jobs):
    """Give squeue's output: jobs as (id, array, task, state, name)."""
    rows = ((i, a, t, state, "None", "0", "n1", name) for i, a, t, state, name in jobs)
    return "".join("|".join([*row, "\n"]) for row in rows)


@pytest.fixture
def folder(tmp_path, slurm):
    """A submission of two runs in two jobs."""
    slurm("here")
    folder = submit._new_folder(tmp_path, "lr ratio/x")
    assert "/" not in folder.name and queue.read_all(tmp_path) == []
    folder.parent.mkdir()
    submit._write(folder, "x", [["r1"], ["r2"]], [{}, {}])
    return folder


def test_the_names_of_jobs_say_which_runs_wait(folder, tmp_path, slurm):
    name = folder.name
    jobs = [("21", "20", "0", "RUNNING", f"{name}-0"), ("22", "20", "1", "PENDING", f"{name}-0")]
    jobs += [("23", "23", "N/A", "PENDING", f"{name}-follow"), ("9", "9", "N/A", "RUNNING", "mine")]
    jobs += [
        ("24", "24", "N/A", "PENDING", f"{name}-1"),
        ("25", "25", "N/A", "TIMEOUT", f"{name}-0"),
    ]
    given = slurm("here", squeue=listed(*jobs))
    for label in ("20_0", "20_1", "23"):
        (folder / "jobs" / f"{label}_submitted.pkl").touch()
    found = queue.look(tmp_path)
    assert {run: j.label for run, j in found.covered().items()} == {"r1": "20_0", "r2": "20_1"}
    assert [j.label for j in found.strays] == ["24"] and found.follows[folder].id == "23"
    found.submissions[0].withdraw(["r2"])
    assert set(queue.look(tmp_path).covered()) == {"r1"}
    queue.settle(tmp_path, print)
    assert ("scancel", "24") in given and len(queue.read_all(tmp_path)) == 1
    slurm("here")
    queue.settle(tmp_path, print)
    assert queue.read_all(tmp_path) == [] and len(queue.read_all(tmp_path, over=True)) == 1


def test_a_damaged_submission_is_refused(folder, tmp_path):
    (folder / "submission.json").write_text("{")
    with pytest.raises(ClusterError, match="damaged"):
        queue.read_all(tmp_path)


def test_another_clusters_slurm_says_nothing_about_a_submission(folder, tmp_path, slurm):
    slurm("there")
    found = queue.settle(tmp_path, print)
    assert found.elsewhere == {"r1", "r2"} and found.submissions == []
    assert len(queue.read_all(tmp_path)) == 1


def test_the_folder_is_read_on_a_machine_without_slurm(folder, tmp_path, slurm):
    slurm("here", squeue=Mock(side_effect=ClusterError("no Slurm here")))
    found = queue.look(tmp_path)
    assert found.unavailable == "no Slurm here" and found.covered() == {}
    assert len(found.submissions) == 1


def test_a_snapshot_runs(tmp_path):
    taken = snapshot.take(tmp_path)
    assert (taken.folder / "conf/sweep/lr_ratio.yaml").is_file()
    env = {**os.environ, "PYTHONPATH": str(taken.folder), "PYTHONSAFEPATH": "1"}
    code = (
        "import lorasweep; from lorasweep.tracking import provenance\n"
        "print(lorasweep.__file__, provenance.code()['snapshot'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    path, name = done.stdout.split()
    assert path.startswith(str(taken.folder)) and name == taken.folder.name
    assert name in snapshot.describe(taken)


@pytest.mark.parametrize("n", [1, 3])
def test_what_sbatch_is_asked_for(tmp_path, monkeypatch, n):
    from submitit.slurm.slurm import SlurmExecutor

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("srun", "sbatch"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(job, "run", max)  # any function can be pickled
    texts = []

    def submit_command(executor, command):
        texts.append(executor._make_submission_file_text(command, "x"))
        raise FailedJobError("error: seen")

    monkeypatch.setattr(SlurmExecutor, "_submit_command", submit_command)
    given = {"partition": "gpu", "account": "a b", "qos": "q", "constraint": "c", "gpus": 2}
    more = {"setup": ["module load x"], "options": {"exclusive": "true", "exclude": "n17"}}
    cluster = Cluster(kind="slurm", **given, **more)
    (tmp_path / guard.TASKS).write_text("{}")
    code, needed = (
        snapshot.Snapshot(tmp_path / "code", "0"),
        planning.JobResources(4, 2, 7.3, 33, 2),
    )
    array = submit.Array(tmp_path, "2", 2, n, needed, cluster, code, ("5", "6"))
    with pytest.raises(ClusterError, match="error: seen"):
        array.submit()
    lines = [x.removeprefix("#SBATCH --") for x in texts[0].splitlines() if "#SBATCH" in x]
    given = dict(line.partition("=")[::2] for line in lines)
    assert given["mem"] == "7475M" and given["exclusive"] == "" and given["account"] == "'a b'"
    assert given["dependency"] == "afterany:5:6" and ("array" in given) == (n > 1)
    assert given["job-name"] == f"{tmp_path.name}-2"
    assert set(array.setup()) <= set(texts[0].splitlines())


def test_partitions_are_read_and_known_by_name(slurm):
    lines = ["gpu*|64|512000|gpu:a100:8(S:0-1)|2-00:00:00|n1|"]
    lines += ["gpu*|32|256000|gpu:4|2-00:00:00|n2|", "long|64|9|(null)|infinite|n3|"]
    limits = {"30": 30, "30:00": 30, "1:30:00": 90, "1-12": 2160, "1-00:30:00": 1470}
    lines += [f"p{n}|1|1|(null)|{limit}|n4|" for n, limit in enumerate(limits)]
    slurm("here", sinfo="\n".join(lines))
    found = queue.partitions()
    gpu = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1", "n2"}), 2)
    assert found["gpu"] == gpu
    assert found["long"].gpus == 0 and found["long"].time_min == float("inf")
    assert [found[f"p{n}"].time_min for n in range(len(limits))] == list(limits.values())
    assert queue.partition_of(Cluster(), found) is found["gpu"]
    with pytest.raises(ClusterError, match=r"'gpx'.*'gpu'"):
        queue.partition_of(Cluster(partition="gpx"), found)


def test_the_worst_step_decides_how_a_job_ended(folder, tmp_path, slurm):
    name = f"{folder.name}-0"
    (folder / "jobs/7_1_0_log.out").touch()
    slurm(
        "here",
        sacct=f"11|7_1|{name}|FAILED|1:0|n1\n11.batch|7_1.batch|batch|FAILED|1:0|n1\n"
        f"11.0|7_1.0|python|OUT_OF_MEMORY|0:125|n1\n12|7_2|{name}|CANCELLED by 5|0:0|n2\n"
        f"13|7_3|{name}|RUNNING|0:0|n2\n14|7_4|{name}|FAILED|9:0|n2\n",
    )
    owners = {str(k): {"slurm": {"job": str(k)}} for k in (11, 12, 13, 14)}
    found = queue.causes(tmp_path, {**owners, "other": {}})
    assert found.keys() == {"11", "12", "14"} and "CANCELLED" in found["12"]
    assert "cluster.mem_gib" in found["11"] and "7_1_0_log.out" in found["11"]
    assert "memory" in found["14"] and "memory" not in found["12"]


def test_slurm_decides_whether_an_owner_that_is_a_job_is_alive(slurm, tmp_path, monkeypatch):
    running = [("12", "12", "N/A", "RUNNING", "x")]
    asked = slurm("here", squeue=lambda *_: listed(*running))
    alive = RunningJobs(tmp_path)
    assert alive("here", "12", 0, 0) is True and alive("here", "13", 0, 0) is False
    assert alive("here", "12", 1, 0) is False  # a later execution
    assert alive("there", "12", 7, 0) is None  # another cluster
    n = len(asked)
    assert alive("here", "14", 0, time.monotonic()) is False and len(asked) > n

    def attempt(name, number):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "owner.json").write_text(json.dumps({**OWNER, "slurm": job_of(number)}))
        return folder

    first, liveness = attempt("1", 12), claims.Liveness(alive)
    assert liveness.alive(first)
    running.clear()
    monkeypatch.setattr(queue, "FRESH_S", -1.0)  # later
    assert not liveness.alive(first)
    monkeypatch.undo()
    asked = slurm("here")
    many = [attempt(f"a{k}", 100 + k) for k in range(50)]
    asked.clear()
    liveness.prepare(many)  # one query is enough for any number of dead jobs
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1


def job_of(number, restart=0):
    return {"cluster": "here", "job": str(number), "restart": restart}


def test_a_slurm_that_does_not_answer_is_not_asked_again_for_each_run(tmp_path, monkeypatch):
    tries = Mock(side_effect=ClusterError("Unable to contact slurm controller"))
    queue.setting.cache_clear()
    monkeypatch.setattr(queue, "run", tries)
    alive = RunningJobs(tmp_path)
    found = {alive("here", str(k), 0, time.monotonic()) for k in range(50)}
    assert found == {None} and tries.call_count == 1
    monkeypatch.setattr(queue, "FRESH_S", -1.0)  # later
    assert alive("here", "1", 0, 0) is None and tries.call_count == 2


def test_a_job_that_slurm_started_again_recognises_its_earlier_execution(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "slurm" not in claims.this_process()  # a command in an interactive job
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted({"slurm": job_of(12)})
    others = ({"slurm": job_of(12, restart=1)}, {"slurm": job_of(13)}, {})
    assert not any(map(claims.restarted, others))


def test_a_slurm_that_is_installed_and_does_not_answer_says_what_to_do(monkeypatch):
    monkeypatch.setattr(queue.shutil, "which", str)
    monkeypatch.setattr(queue, "run", Mock(side_effect=ClusterError("failed: no configuration")))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(ClusterError, match=r"failed: no configuration\n.*login node.*action=plan"):
        queue.require()


# ---------------------------------------------------------------- follow-up jobs


@pytest.mark.parametrize("codes", [[0], [job.TRY_AGAIN, 0], [job.TRY_AGAIN] * 5, [2]])
def test_a_follow_up_command_is_tried_again_where_that_may_help(tmp_path, monkeypatch, codes):
    """`codes`: the exit status of each try, and of none after them."""
    given, left = [], list(codes)

    def start(command):
        given.append(command)
        return Mock(wait=lambda: left.pop(0))

    monkeypatch.setattr(job.subprocess, "Popen", start)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"command": ["-m", "lorasweep"]}))
    fails = pytest.raises(LorasweepError, match="status")
    with fails if codes[-1] else contextlib.nullcontext():
        job.run(str(path), 0)
    assert given == [[sys.executable, "-m", "lorasweep"]] * len(codes)


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
def test_the_exit_status_says_whether_to_try_again(compose, tmp_path, monkeypatch, error, code):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    task = {"follow": asked.plain(), "trainer": "a.b:c", "idle": 1, "updates": 4}
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{{}}\n{json.dumps(task)}\n")
    act = Mock(side_effect=error)
    monkeypatch.setattr(actions, "act", act)
    monkeypatch.setattr(actions, "Signals", lambda: None)
    assert actions.follow_up(str(path)) == code
    (request, trainer), more = act.call_args
    assert (request.title, trainer, more["follow"]["idle"]) == (asked.title, "a.b:c", 1)


def test_a_follow_up_job_that_is_stopped_releases_its_lock_first(tmp_path):
    """It is not killed while it holds the lock, or between an sbatch and submitit's file."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from lorasweep.launch.slurm.job import Signals\n"
        "from lorasweep.store.files import locked\n"
        "Signals(); folder = Path(sys.argv[1]).parent\n"
        "with locked(folder / 'lock', 9):\n"
        "    (folder / 'held').touch()\n"
        "    try: time.sleep(60)\n"
        "    finally: time.sleep(1); (folder / 'released').touch()\n"
    )
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"command": ["-c", code, str(path)], "requeues": 0}))
    command = [sys.executable, "-m", "lorasweep.launch.slurm.job", str(path), "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    while not (tmp_path / "held").exists():
        assert following.poll() is None
        time.sleep(0.05)
    following.send_signal(signal.SIGTERM)
    printed, _ = following.communicate(timeout=30)
    assert following.returncode == 0 and "stopped by SIGTERM" in printed
    assert (tmp_path / "released").exists()
