"""Submissions: their records, the snapshot of the code, both ways to submit, jobs that follow."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from submitit.core.utils import FailedJobError

from lorasweep.errors import ClusterError, LorasweepError
from lorasweep.launch.slurm import (
    client,
    job,
    resources,
    sbatch,
    snapshot,
    submissions,
)
from lorasweep.spec.execution import Cluster
from tests.world import ROOT


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
        and not submissions.note(folder, "ended.json").exists()
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
    submissions.note_array(folder, "0", "--user=me")  # a note can be written by all of a group
    with pytest.raises(ClusterError, match="damaged"):
        submissions.read_all(tmp_path)
    (folder / "submission.json").write_text("{")
    with pytest.raises(ClusterError, match="damaged"):
        submissions.read_all(tmp_path)


def test_a_snapshot_is_named_by_its_content_and_runs(tmp_path):
    taken = snapshot.take(tmp_path)
    folder = taken.folder
    assert snapshot.take(tmp_path) == taken and len(list(tmp_path.iterdir())) == 1
    assert (folder / "conf/sweep/lr_ratio.yaml").is_file() and not list(folder.rglob("__pycache__"))
    quiet = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env = {**os.environ, "PYTHONPATH": str(folder), **quiet}
    code = "import lorasweep, json; from lorasweep.tracking import provenance; print(lorasweep.__file__, provenance.code()['snapshot'])"
    said = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0].startswith(str(folder)) and said[1] == folder.name
    assert folder.name in snapshot.describe(taken)


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
    (tmp_path / "manifest.json").write_text("{}")
    code = snapshot.Snapshot(tmp_path / "code", "0" * 64)
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

    def status_of(command):
        given.append(command)
        return left.pop(0)

    monkeypatch.setattr(job, "_status_of", status_of)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"follow": "request.json", "command": ["-m", "lorasweep"]}))
    with pytest.raises(LorasweepError, match="status") if fails else contextlib.nullcontext():
        job.run(str(path))
    assert given == [[sys.executable, "-m", "lorasweep", str(path)]] * tries
