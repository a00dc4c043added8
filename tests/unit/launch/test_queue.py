"""The jobs of a run folder: what Slurm's output says, submissions, follow-up jobs."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.cli import actions
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm import guard, job, planning, queue, snapshot, submit
from lorasweep.launch.slurm.container import VARIABLE
from lorasweep.launch.slurm.queue import Partition, RunningJobs
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims
from lorasweep.store.run_store import RunStore
from tests.world import ROOT, wait_for


def listed(*jobs, script=""):
    """Give squeue's output: jobs as (id, array, task, state, name)."""
    rows = ((i, a, t, state, "None", "0", "n1", name, script) for i, a, t, state, name in jobs)
    return "".join("|".join([*row, "\n"]) for row in rows)


@pytest.fixture
def folder(tmp_path, slurm):
    """A submission of two runs in two jobs, 20_0 and 20_1, and a follow-up job, 23."""
    slurm("here")
    folder = submit._new_folder(tmp_path, "lr ratio/x")
    assert "/" not in folder.name and queue.read_all(tmp_path) == []
    folder.parent.mkdir()
    submit._write(folder, "x", [["r1"], ["r2"]], [{}, {}])
    for label in ("20_0", "20_1", "23"):
        (folder / "jobs" / f"{label}_submitted.pkl").touch()
    return folder


def test_the_names_of_jobs_say_which_runs_wait(folder, tmp_path, slurm):
    name, none = folder.name, "N/A"
    jobs = [("21", "20", "0", "RUNNING", f"{name}-0"), ("22", "20", "1", "PENDING", f"{name}-0")]
    jobs += [("23", "23", none, "PENDING", f"{name}-follow"), ("9", "9", none, "RUNNING", "mine")]
    # without submitit's file: neither can start, or the file of one that trains is not visible yet
    jobs += [("24", "24", none, "PENDING", f"{name}-1"), ("25", "25", none, "RUNNING", f"{name}-1")]
    given = slurm("here", squeue=listed(*jobs, script=f"{folder}/jobs/x.sh"))
    found = queue.look(tmp_path)
    assert {run: j.label for run, j in found.covered().items()} == {"r1": "20_0", "r2": "20_1"}
    assert [j.label for j in found.strays] == ["24"] and found.follows[folder].id == "23"
    assert all(
        words[words.index("-u") + 1] == str(os.geteuid()) for words in given if "-u" in words
    )
    found.submissions[0].withdraw(["r2"])
    assert set(queue.look(tmp_path).covered()) == {"r1"}
    queue.settle(tmp_path, print)
    assert [words[1:] for words in given if words[0] == "scancel"] == [("24",)]
    # a copy of the run folder has these names, but not these jobs
    shutil.copytree(tmp_path / ".slurm", tmp_path / "copy/.slurm")
    copy = queue.settle(tmp_path / "copy", print)
    assert not (copy.jobs or copy.follows or copy.strays) and len(queue.read_all(tmp_path)) == 1


def test_a_task_waits_as_long_as_slurm_may_run_it(folder, tmp_path, slurm):
    """A requeued task keeps its id; Slurm lists an ended one for some minutes, then forgets it."""
    waits = ["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"]
    for state in (*waits, *queue.RUNNING, *queue.ENDED, None):
        tasks = [("21", "20", "0", "RUNNING", f"{folder.name}-0")]
        tasks += [("22", "20", "1", state, f"{folder.name}-0")] if state else []
        tasks += [("23", "23", "N/A", state, f"{folder.name}-follow")] if state else []
        slurm("here", squeue=listed(*tasks))
        found, alive = queue.settle(tmp_path, print), state in (*waits, *queue.RUNNING)
        assert set(found.covered()) == ({"r1", "r2"} if alive else {"r1"}), state
        assert bool(found.follows) == alive, state
    slurm("here")
    queue.settle(tmp_path, print)
    assert queue.read_all(tmp_path) == [] and len(queue.read_all(tmp_path, over=True)) == 1


def test_a_queue_that_says_nothing_about_a_submission(folder, tmp_path, slurm):
    """Of another cluster; without Slurm; of a command that has not called sbatch; damaged."""
    slurm("there")
    found = queue.settle(tmp_path, print)
    assert found.elsewhere == {"r1", "r2"} and found.submissions == []
    slurm("here", squeue=Mock(side_effect=ClusterError("no Slurm here")))
    found = queue.look(tmp_path)
    assert found.unavailable == "no Slurm here" and found.covered() == {}
    assert len(found.submissions) == 1
    for path in (folder / "jobs").iterdir():
        path.unlink()
    slurm("here")
    queue.settle(tmp_path, print)
    assert len(queue.read_all(tmp_path)) == 1
    (folder / "submission.json").write_text("{")
    with pytest.raises(ClusterError, match="damaged"):
        queue.read_all(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before sbatch", "no file", "one file", "at the end"])
def test_a_command_killed_at_any_sbatch_is_completed_by_the_next(
    compose, tmp_path, slurm, monkeypatch, moment
):
    """Each run is in one job that can start; no job is cancelled that has submitit's file, and the
    queued job of a command is not pruned, though it has no runs."""
    given = ("cluster=slurm", "cluster.runs_per_job=1", "exec.pack_size=1", "prune=true")
    asked = compose("+sweep=lr_ratio", "scale=smoke", *given)
    where = Partition("main", True, 64, 512_000, 0, 2880.0, frozenset({"n1"}))
    taken, rows, calls = snapshot.take(tmp_path), {}, []
    monkeypatch.setattr(submit, "prepare", lambda *_: (where, taken))

    def sbatch(array):
        calls.append(array)
        now = moment if len(calls) == at else ""
        if now == "before sbatch":
            raise Killed
        number = str(100 * len(calls))
        for k in range(array.n):
            label, task = (f"{number}_{k}", str(k)) if array.n > 1 else (number, "N/A")
            name = f"{array.folder.name}-{array.part}"
            rows[label] = (f"{int(number) + k}", number, task, "PENDING", name)
            if k >= {"no file": 0, "one file": 1}.get(now, array.n):
                continue
            (array.folder / "jobs" / f"{label}_submitted.pkl").touch()
        if now:
            raise Killed
        return number

    monkeypatch.setattr(submit.Array, "submit", sbatch)
    cancel = Mock(side_effect=lambda *labels: [rows.pop(label) for label in labels] and "")
    slurm("here", squeue=lambda *_: listed(*rows.values()), scancel=cancel)
    for at in range(1, 5):  # three arrays of two jobs, then the follow-up job
        root = tmp_path / f"runs{at}"
        exec_ = dataclasses.replace(asked.exec, runs_dir=str(root))
        request, store = dataclasses.replace(asked, exec=exec_), RunStore(root)
        store.prepare()
        check = submit._new_folder(root, "check_gpu")
        check.parent.mkdir()
        submit._write(check, "check_gpu", [[]], [{}])
        (check / "jobs/7_submitted.pkl").touch()
        calls.clear()
        rows.clear()
        rows["7"] = ("7", "7", "N/A", "PENDING", f"{check.name}-0")
        with pytest.raises(Killed):
            submit.submit(request, store, lambda: asked.points, print)
        can_start = {j.label for _, _, j in queue.look(root).jobs}
        submit.submit(request, store, lambda: asked.points, print)
        n_calls = len(calls)
        submit.submit(request, store, lambda: asked.points, print)
        assert len(calls) == n_calls
        found = queue.look(root)
        runs = sorted(r for s, k, _ in found.jobs for r in s.tasks[k])
        assert runs == sorted(p.id for p in asked.points) and can_start <= rows.keys()
        assert len(found.follows) == 1 and not found.strays and len(rows) == 6 + 1 + 1
    assert cancel.called == moment.endswith("file")
    # the follow-up job of another sweep with some of these runs waits for their jobs
    other = compose("+sweep=lr_ratio", "scale=smoke", *given[:-1], "~sweep.arms.fullft")
    submit.submit(dataclasses.replace(other, exec=exec_), store, lambda: other.points, print)
    waits = {queue.look(root).covered()[p.id].label for p in other.points}
    assert calls[-1].part == "follow" and set(calls[-1].after) == waits and 0 < len(waits) < 6


@pytest.mark.parametrize(("n", "image"), [(1, None), (3, "docker://x#y")])
def test_what_sbatch_is_asked_for(tmp_path, monkeypatch, n, image):
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
    cluster = Cluster(kind="slurm", container=image, **given, **more)
    (tmp_path / guard.TASKS).write_text("{}")
    code, needed = snapshot.Snapshot(tmp_path, "0"), planning.JobResources(4, 2, 7.3, 33, 2)
    array = submit.Array(tmp_path, "2", 2, n, needed, cluster, code, ("5", "6"))
    with pytest.raises(ClusterError, match="error: seen"):
        array.submit()
    lines = [x.removeprefix("#SBATCH --") for x in texts[0].splitlines() if "#SBATCH" in x]
    given = dict(line.partition("=")[::2] for line in lines)
    assert given["mem"] == "7475M" and given["exclusive"] == "" and given["account"] == "'a b'"
    assert given["dependency"] == "afterany:5:6" and ("array" in given) == (n > 1)
    assert given["job-name"] == f"{tmp_path.name}-2"
    assert set(array.setup()) <= set(texts[0].splitlines())
    # the check and the job run outside of the container, in which the workers start
    outside = ("--overlap", "--nodes=1", "--ntasks=1", "--relative=0")
    assert array.srun() == (outside if image else ())
    assert (
        (f"export {VARIABLE}='{image}'" in array.setup()) == (VARIABLE in texts[0]) == bool(image)
    )


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


def job_of(number, restart=0, cluster="here"):
    return {"slurm": {"cluster": cluster, "job": str(number), "restart": restart}}


def test_the_worst_step_decides_how_a_job_ended(folder, tmp_path, slurm):
    name = f"{folder.name}-0"
    (folder / "jobs/7_1_0_log.out").touch()
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
    asked = slurm("here", squeue=lambda *_: listed(*running))
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
    for name, value in {"JOB_ID": "12", "CLUSTER_NAME": "here", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "slurm" not in claims.this_process()  # a command in an interactive job
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted(job_of(12))
    assert not any(map(claims.restarted, (job_of(12, restart=1), job_of(13), {})))


def test_a_machine_that_cannot_submit_says_what_to_do(monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(ClusterError, match=r"no Slurm here.*cluster=local"):
        queue.require()
    monkeypatch.setattr(queue.shutil, "which", str)
    monkeypatch.setattr(queue, "run", Mock(side_effect=ClusterError("failed: no configuration")))
    with pytest.raises(ClusterError, match=r"failed: no configuration\n.*login node.*action=plan"):
        queue.require()
    monkeypatch.setenv("SLURM_CONF", "/nowhere.conf")
    with pytest.raises(ClusterError, match=r"/nowhere\.conf: there is no such file"):
        queue.require()


# ---------------------------------------------------------------- follow-up jobs


@pytest.mark.parametrize("codes", [[0], [job.TRY_AGAIN, 0], [job.TRY_AGAIN] * 5, [2]])
def test_a_follow_up_command_is_tried_again_where_that_may_help(tmp_path, monkeypatch, codes):
    """`codes`: the exit status of each try, and of none after them."""
    given, left = [], iter(codes)

    def start(command):
        given.append(command)
        return Mock(wait=lambda: next(left))

    monkeypatch.setattr(job.subprocess, "Popen", start)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"command": ["-m", "lorasweep"]}))
    fails = pytest.raises(LorasweepError, match="status")
    with fails if codes[-1] else contextlib.nullcontext():
        job.run(str(path), 0)
    assert given == [[sys.executable, "-m", "lorasweep"]] * len(codes)


def test_the_exit_status_says_whether_to_try_again(compose, tmp_path, monkeypatch):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    task = {"follow": asked.plain(), "trainer": "a.b:c", "idle": 1, "updates": 4}
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{{}}\n{json.dumps(task)}\n")
    monkeypatch.setattr(actions, "Signals", lambda: None)
    again = [(ClusterError("busy"), job.TRY_AGAIN), (StoreError("held"), job.TRY_AGAIN)]
    ends = [(None, 0), (GaveUp("idle"), 2), (SpecError("wrong"), 2)]
    for error, code in (*again, *ends, (KeyboardInterrupt(), job.INTERRUPTED)):
        act = Mock(side_effect=error)
        monkeypatch.setattr(actions, "act", act)
        assert actions.follow_up(str(path)) == code, error
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
    wait_for(lambda: (tmp_path / "held").exists() or following.poll() is not None)
    following.send_signal(signal.SIGTERM)
    printed, _ = following.communicate(timeout=30)
    assert following.returncode == 0 and "stopped by SIGTERM" in printed
    assert (tmp_path / "released").exists()
