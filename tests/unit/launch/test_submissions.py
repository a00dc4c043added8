"""Submissions: their records, the snapshot of the code, both ways to submit, Slurm's output, follow-up jobs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.cli import actions
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm import client, job, resources, sbatch, snapshot, submissions
from lorasweep.launch.slurm.client import Partition, RunningJobs
from lorasweep.launch.slurm.submissions import Array, Queue
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims
from tests.world import ROOT


@pytest.fixture
def folder(tmp_path):
    """A submission of two runs in two jobs, of which one is recorded, and of a follow-up job."""
    folder = submissions.home(tmp_path) / submissions.new_name("lr ratio/x")
    folder.mkdir(parents=True)
    assert "/" not in folder.name and submissions.read_all(tmp_path) == []
    arrays = [Array("0", "a-0", 0, 2), Array("follow", "a-f", 2, 1)]
    submissions.write_record(folder, "x", ["r1", "r2"], [["r1"], ["r2"]], arrays, cluster="here")
    submissions.note_array(folder, "0", "12")
    return folder


def test_submissions_are_read_back(folder, tmp_path):
    (found,) = submissions.read_all(tmp_path)
    assert found.arrays[0].job == "12" and found.arrays[1].job is None
    assert found.tasks == [["r1"], ["r2"]]
    submissions.withdraw(found, ["r2"])
    live = client.Job("13", "12", 1, "PENDING", "", 0, "", "a-0")
    (again,) = submissions.read_all(tmp_path)
    queue = Queue([again], [(again, 1, live), (again, 0, live)])
    assert set(queue.covered()) == {"r1"}


def test_a_job_of_a_script_of_version_0_2_is_adopted(folder, tmp_path, monkeypatch):
    """Its user submitted the script, so that submitit wrote no files."""
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "script": True}))
    submissions.note(folder, "array-0.json").unlink()
    live = client.Job("77_0", "77", 0, "RUNNING", "", 0, "", "a-0")
    monkeypatch.setattr(client, "queue", lambda names: [live])
    monkeypatch.setattr(client, "named", lambda name: [])
    monkeypatch.setattr(client, "setting", lambda name: "here")
    monkeypatch.setattr(client, "cancel", lambda jobs: pytest.fail(f"cancelled {jobs}"))
    submissions.reconcile(tmp_path, print)
    (found,) = submissions.read_all(tmp_path)
    assert found.arrays[0].job == "77"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("submission.json", "{"),
        ("notes", '{"job": "--user=me"}'),
    ],
)
def test_damaged_submissions_are_refused(folder, tmp_path, name, content):
    path = submissions.note(folder, "array-0.json") if name == "notes" else folder / name
    path.write_text(content)
    with pytest.raises(ClusterError, match="damaged"):
        submissions.read_all(tmp_path)


def test_another_clusters_slurm_says_nothing_about_a_submission(folder, tmp_path, slurm):
    slurm("there")
    queue = submissions.look(tmp_path)
    assert queue.unknown_runs() == {"r1", "r2"} and queue.submissions == []
    assert not submissions.note(folder, "ended.json").exists()


def test_the_folder_is_read_on_a_machine_without_slurm(folder, tmp_path, slurm):
    slurm("here", squeue=Mock(side_effect=ClusterError("no Slurm here")))
    queue = submissions.look(tmp_path)
    assert queue.unavailable == "no Slurm here" and queue.covered() == {}
    assert len(queue.submissions) == 1


def test_a_snapshot_is_named_by_its_content_and_runs(tmp_path):
    taken = snapshot.take(tmp_path)
    folder = taken.folder
    assert snapshot.take(tmp_path) == taken and len(list(tmp_path.iterdir())) == 1
    assert (folder / "conf/sweep/lr_ratio.yaml").is_file() and not list(folder.rglob("__pycache__"))
    quiet = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env = {**os.environ, "PYTHONPATH": str(folder), **quiet}
    code = (
        "import lorasweep; from lorasweep.tracking import provenance\n"
        "print(lorasweep.__file__, provenance.code()['snapshot'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    path, name = done.stdout.split()
    assert path.startswith(str(folder)) and name == folder.name
    assert folder.name in snapshot.describe(taken)


@pytest.mark.parametrize("n", [1, 3])
def test_both_ways_to_submit_ask_for_the_same(tmp_path, monkeypatch, n):
    from submitit.slurm.slurm import SlurmExecutor

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("srun", "sbatch"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sbatch.job, "run", max)  # any function can be pickled
    texts = []

    def submit_command(executor, command):
        texts.append(executor._make_submission_file_text(command, "x"))
        raise FailedJobError("error: seen")

    monkeypatch.setattr(SlurmExecutor, "_submit_command", submit_command)
    given = {"partition": "gpu", "account": "a b", "qos": "q", "constraint": "c", "gpus": 2}
    more = {"setup": ["module load x"], "options": {"exclusive": "true", "exclude": "n17"}}
    cluster = Cluster(kind="slurm", **given, **more)
    needed = resources.JobResources(4, 2, 7.3, 33, 2)
    (tmp_path / "manifest.json").write_text("{}")
    code = snapshot.Snapshot(tmp_path / "code", "0" * 64)
    array = Array("0", "name-0", 2, n)
    described = sbatch.Description(tmp_path, array, needed, cluster, code, ("5", "6"))
    with pytest.raises(ClusterError, match="error: seen"):
        sbatch.submit(described)

    def options(text):
        lines = (x.removeprefix("#SBATCH --") for x in text.splitlines() if "#SBATCH" in x)
        return dict(line.partition("=")[::2] for line in lines)

    given = options(texts[0])
    assert given["mem"] == "7475M" and given["exclusive"] == "" and given["account"] == "'a b'"
    assert given["dependency"] == "afterany:5:6" and ("array" in given) == (n > 1)
    assert set(described.setup()) <= set(texts[0].splitlines())


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
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"follow": "request.json", "command": ["-m", "lorasweep"]}))
    fails = pytest.raises(LorasweepError, match="status")
    with fails if codes[-1] else contextlib.nullcontext():
        job.run(str(path))
    assert given == [[sys.executable, "-m", "lorasweep", str(path)]] * len(codes)


OWNER = {"host": "elsewhere", "boot": "x", "pid": 1, "started": "1"}


def job_of(number, restart=0):
    return {"cluster": "here", "job": str(number), "restart": restart}


def test_partitions_are_read_and_known_by_name(slurm):
    lines = ["gpu*|64|512000|gpu:a100:8(S:0-1)|2-00:00:00|n1|"]
    lines += ["gpu*|32|256000|gpu:4|2-00:00:00|n2|", "long|64|9|(null)|infinite|n3|"]
    limits = {"30": 30, "30:00": 30, "1:30:00": 90, "1-12": 2160, "1-00:30:00": 1470}
    lines += [f"p{n}|1|1|(null)|{limit}|n4|" for n, limit in enumerate(limits)]
    slurm("here", sinfo="\n".join(lines))
    found = client.partitions()
    gpu = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1", "n2"}), 2)
    assert found["gpu"] == gpu
    assert found["long"].gpus == 0 and found["long"].time_min == float("inf")
    assert [found[f"p{n}"].time_min for n in range(len(limits))] == list(limits.values())
    assert client.partition_of(Cluster(), found) is found["gpu"]
    with pytest.raises(ClusterError, match=r"'gpx'.*'gpu'"):
        client.partition_of(Cluster(partition="gpx"), found)


def test_the_worst_step_decides_how_a_job_ended(slurm):
    slurm(
        "here",
        sacct="7_1|FAILED|1:0|n1|20\n7_1.batch|FAILED|1:0|n1|20\n7_1.0|OUT_OF_MEMORY|0:125|n1|19\n"
        "7_2|CANCELLED by 5|0:0|n2|3\n7_3|RUNNING|0:0|n2|3\n7_4|FAILED|9:0|n2|3\n",
    )
    ends = client.ended(["7"])
    states = {label: end.state for label, end in ends.items()}
    assert states == {"7_1": "OUT_OF_MEMORY", "7_2": "CANCELLED", "7_4": "FAILED"}
    assert "cluster.mem_gib" in ends["7_1"].cause() and "memory" in ends["7_4"].cause()
    assert "memory" not in ends["7_2"].cause()


def test_slurm_decides_whether_an_owner_that_is_a_job_is_alive(slurm, tmp_path, monkeypatch):
    running = {"12": 0}
    asked = slurm("here", squeue=lambda *_: "".join(f"{j}|{n}|\n" for j, n in running.items()))
    alive = RunningJobs()
    assert alive("here", "12", 0) is True and alive("here", "13", 0) is False
    assert alive("here", "12", 1) is False  # a later execution
    assert alive("there", "12", 7) is None  # another cluster
    n = len(asked)
    assert alive("here", "13", 0) is False and len(asked) == n  # a dead job is not queried again

    def attempt(name, number):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "owner.json").write_text(json.dumps({**OWNER, "slurm": job_of(number)}))
        return folder

    first, liveness = attempt("1", 12), claims.Liveness(alive)
    assert liveness.alive(first)
    running.clear()
    monkeypatch.setattr(client, "FRESH_S", -1.0)  # later
    assert not liveness.alive(first)
    monkeypatch.undo()
    slurm("here")
    many = [attempt(f"a{k}", 100 + k) for k in range(50)]
    asked.clear()
    liveness.prepare(many)  # one query is enough for any number of dead jobs
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1


def test_a_slurm_that_does_not_answer_is_not_asked_again_for_each_run(monkeypatch):
    tries = []

    def silent(*words):
        tries.append(words)
        raise ClusterError("Unable to contact slurm controller")

    monkeypatch.setattr(client, "run", silent)
    alive = RunningJobs()
    assert [alive("here", str(k), 0) for k in range(50)] == [None] * 50 and len(tries) == 1
    monkeypatch.setattr(client, "FRESH_S", -1.0)  # later
    alive.refresh()
    assert alive("here", "1", 0) is None and len(tries) == 3


def test_a_job_that_slurm_started_again_recognises_its_earlier_execution(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "slurm" not in claims.this_process()  # a command in an interactive job
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted({"slurm": job_of(12)})
    others = ({"slurm": job_of(12, restart=1)}, {"slurm": job_of(13)}, {})
    assert not any(map(claims.restarted, others))


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
    (tmp_path / "request.json").write_text(json.dumps(asked.plain()))
    task = {"follow": str(tmp_path / "request.json"), "trainer": "a.b:c", "idle": 1, "updates": 4}
    (tmp_path / "task.json").write_text(json.dumps(task))
    acted = []

    def act(request, trainer, follow):
        acted.append((request.title, trainer, follow["idle"]))
        if error:
            raise error

    monkeypatch.setattr(actions, "act", act)
    monkeypatch.setattr(actions, "Signals", lambda: None)
    assert actions.follow_up(str(tmp_path / "task.json")) == code
    assert acted == [(asked.title, "a.b:c", 1)]


def test_a_follow_up_job_that_is_stopped_releases_its_lock_first(tmp_path):
    """It is not killed while it holds the lock, or between an sbatch and its record."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from lorasweep.launch.slurm.job import Signals\n"
        "from lorasweep.store.claims import Lock\n"
        "Signals(); folder = Path(sys.argv[1]).parent; lock = Lock(folder / 'lock')\n"
        "lock.acquire(9, print); (folder / 'held').touch()\n"
        "try: time.sleep(60)\n"
        "finally: time.sleep(1); lock.release()\n"
    )
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"follow": "x", "command": ["-c", code], "requeues": 0}))
    command = [sys.executable, "-m", "lorasweep.launch.slurm.job", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    while not (tmp_path / "held").exists():
        assert following.poll() is None
        time.sleep(0.05)
    following.terminate()
    printed, _ = following.communicate(timeout=30)
    assert following.returncode == 0 and "stopped by SIGTERM" in printed
    assert (tmp_path / "lock" / "1" / "released").exists()


def test_a_slurm_that_is_installed_and_does_not_answer_says_what_to_do(monkeypatch):
    def run(*command):
        raise ClusterError(f"{command[0]} failed: no configuration")

    monkeypatch.setattr(client, "inside", lambda: None)
    monkeypatch.setattr(client.shutil, "which", str)
    monkeypatch.setattr(client, "run", run)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(ClusterError, match=r"failed: no configuration\n.*login node.*action=plan"):
        client.require()
