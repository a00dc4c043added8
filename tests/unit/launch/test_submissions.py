"""Submissions: their records, the snapshot of the code, both ways to submit, follow-up jobs."""

import contextlib
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.errors import ClusterError, LorasweepError
from lorasweep.launch.slurm import client, job, resources, sbatch, snapshot, submissions
from lorasweep.launch.slurm.submissions import Array, Queue
from lorasweep.spec.execution import Cluster
from tests.world import ROOT


@pytest.fixture
def folder(tmp_path):
    """A submission of two runs in two jobs, of which one is recorded, and of a follow-up job."""
    folder = submissions.home(tmp_path) / submissions.new_name("lr ratio/x")
    folder.mkdir(parents=True)
    assert "/" not in folder.name and submissions.read_all(tmp_path) == []
    arrays = [Array("0", "a-0", 0, 2), Array("follow", "a-f", 2, 1)]
    more = {"script": False, "cluster": "here"}
    submissions.write_record(folder, "x", ["r1", "r2"], [["r1"], ["r2"]], arrays, **more)
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("submission.json", "{"),
        ("notes", '{"job": "--user=me"}'),  # a note can be written by all of a group
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


def test_notes_of_earlier_versions_are_read_in_the_submissions_folder(tmp_path):
    folder = submissions.home(tmp_path) / "s"
    folder.mkdir(parents=True)
    submissions.write_record(folder, "t", [], [["x"]], [Array("0", "s-0", 0, 1)])
    (folder / "array-0.json").write_text(json.dumps({"job": "12", "abandoned": False}))
    (folder / "withdrawn.json").write_text(json.dumps(["x"]))
    (found,) = submissions.read_all(tmp_path)
    assert found.arrays[0].job == "12" and found.withdrawn == {"x"}
    (folder / "ended.json").write_text("{}")
    assert submissions.read_all(tmp_path) == []


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
    """submitit's batch file and ours have the same options and the same shell lines."""
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
