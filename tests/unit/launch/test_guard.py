"""A job runs only what its user submitted, and only its owner writes a run folder."""

import json
import os
import re
import shutil
import stat
import subprocess

import pytest

from lorasweep.errors import ClusterError, StoreError
from lorasweep.launch import worker
from lorasweep.launch.slurm import guard, resources, sbatch, snapshot, submissions, submit
from lorasweep.launch.slurm.planning import Task
from lorasweep.plan.packing import Pack
from lorasweep.spec.execution import Cluster
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from tests.world import OTHER_USER, as_another_user, compose_request, tiny_spec


@pytest.fixture
def described(slurm, tmp_path):
    """A submission of two jobs and a follow-up job, with some code."""
    slurm("here")
    RunStore(tmp_path / "runs").prepare()
    home, code = submissions.home(tmp_path / "runs"), tmp_path / "snapshot"
    home.mkdir()
    (code / "package").mkdir(parents=True)
    for name in ("package/a.py", "package/b.py", "snapshot.json"):
        (code / name).write_text(f"{name} = 1")
    taken = snapshot.Snapshot(code, guard.digest(str(code)))
    request = compose_request(["+sweep=lr_ratio", "scale=smoke", "cluster=slurm"])
    parts = (request.points[:3], request.points[3:])
    tasks = [Task([Pack(part, 1, 0.0, None, 0.0)], request.exec) for part in parts]
    arrays = [submissions.Array("0", "sweep-1-0", 0, 2), submissions.Array("follow", "f", 2, 1)]
    follow_up, folder = submit.FollowUp(("-m", "lorasweep")), home / "sweep-1"
    submit.write_submission(folder, request, tasks, arrays, follow_up, taken)
    needed = resources.JobResources(1, 0, 1.0, 10, 1)
    return sbatch.Description(folder, arrays[0], needed, Cluster(kind="slurm"), taken)


def run_job(described, tmp_path, meanwhile=lambda described: None):
    """Run a job's script with a stand-in for srun; return whether it was reached, and the errors."""
    script = tmp_path / "spooled.sh"  # Slurm runs its own copy of the script
    script.write_text("\n".join([*described.setup(), "srun job", ""]))
    meanwhile(described)
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/srun").write_text("#!/bin/sh\necho reached\n")
    (tmp_path / "bin/srun").chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "12"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    reached = "reached" in done.stdout
    assert reached == (done.returncode == 0)
    return reached, done.stderr


def append(path):
    path.write_text(path.read_text() + " ")


def replace(path):
    """Write a file again with the same content, so that all may write it."""
    content = path.read_bytes()
    path.unlink()
    plant(path, content=content)


def plant(path, mode=0o666, content=b""):
    path.write_bytes(content)
    path.chmod(mode)


def test_a_job_that_nobody_touched_runs(described, tmp_path):
    def meanwhile(described):
        (described.folder / "tasks/0.json").write_text("{}")  # another job's
        append(described.code.folder / "snapshot.json")  # not code

    assert run_job(described, tmp_path, meanwhile) == (True, "")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: append(d.folder / "tasks/1.json"), "tasks/1.json was changed"),
        (lambda d: append(d.folder / "request.json"), "request.json was changed"),
        (lambda d: append(d.folder / "manifest.json"), "manifest.json was changed"),
        (lambda d: (d.folder / "tasks/1.json").unlink(), "tasks/1.json is not there"),
        (lambda d: replace(d.folder / "tasks/1.json"), "others may write .*tasks/1.json"),
        (lambda d: d.folder.chmod(0o775), "others may write .*sweep-1"),
        (lambda d: (d.folder / "jobs").chmod(0o777), "others may write .*jobs"),
        (lambda d: plant(d.folder / "jobs/12_1_submitted.pkl"), "others may write .*12_1_sub"),
        (lambda d: append(d.code.folder / "package/a.py"), "the code in .* was changed"),
        (lambda d: (d.code.folder / "package/b.py").unlink(), "the code in .* was changed"),
        (lambda d: plant(d.code.folder / "package/a.pyc", 0o644), "the code in .* was changed"),
        (lambda d: plant(d.code.folder / "package/a.pyc"), "others may write .*a.pyc"),
        (lambda d: replace(d.code.folder / "package/b.py"), "others may write .*b.py"),
        (lambda d: (d.code.folder / "package").chmod(0o775), "others may write .*package"),
        (lambda d: (d.code.folder / "c.py").symlink_to("/etc/passwd"), "c.py is a link"),
        pytest.param(
            lambda d: os.chown(d.folder / "tasks", OTHER_USER, -1),
            f"tasks belongs to user {OTHER_USER}",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away"),
        ),
    ],
)
def test_a_job_whose_files_were_changed_or_could_be_is_refused(described, tmp_path, harm, said):
    reached, errors = run_job(described, tmp_path, harm)
    assert not reached and re.search(said, errors), errors


def test_a_snapshot_that_was_changed_is_not_used_again(tmp_path):
    taken = snapshot.take(tmp_path)
    append(taken.folder / "lorasweep/errors.py")
    with pytest.raises(ClusterError, match=r"was changed after .*rm -r "):
        snapshot.take(tmp_path)


def test_code_that_is_edited_while_it_is_copied_is_named_by_the_copy(tmp_path, monkeypatch):
    copy = shutil.copyfile

    def edited(source, target):
        copy(source, target)
        if target.name == "errors.py":
            append(target)

    with monkeypatch.context() as m:
        m.setattr(snapshot.shutil, "copyfile", edited)
        first = snapshot.take(tmp_path)
    assert first.sha256 == guard.digest(str(first.folder))
    second = snapshot.take(tmp_path)  # of the code as it was before the edit
    assert first.folder != second.folder and len(list(tmp_path.iterdir())) == 2


def test_a_worker_refuses_a_job_file_with_another_checksum(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker.StopFlag, "install", lambda self: None)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"trainer": "somebody:code"}))
    assert worker.main(str(path), "0" * 64) == worker.REFUSED
    assert str(path) in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o2775, 0o3775])
def test_a_run_folder_that_others_may_write_is_refused_with_the_remedy(tmp_path, mode):
    store = RunStore(tmp_path / "runs")
    store.prepare()
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
