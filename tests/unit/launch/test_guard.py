"""In a run folder that a group can write, a job runs only what its user submitted."""

import json
import os
import re
import shutil
import struct
import subprocess

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch import worker
from lorasweep.launch.slurm import guard, resources, sbatch, snapshot, submissions, submit
from lorasweep.launch.slurm.planning import Task
from lorasweep.plan.packing import Pack
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.store.claims import Lock
from lorasweep.store.run_store import RunStore
from tests.world import OTHER_USER, as_another_user, compose_request

ARRAY = submissions.Array("0", "s-0", 0, 1)


@pytest.fixture
def described(group_folder, slurm, tmp_path):
    """In a group's run folder: a submission of two jobs and a follow-up job, with some code."""
    slurm("here")
    home, code = submissions.home(group_folder().root), tmp_path / "snapshot"
    home.mkdir()
    files.protect_entries(home)
    with files.own_only():
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
    script.write_bytes(sbatch.write_script(described).read_bytes())
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


def test_a_group_shares_the_notes_and_nothing_that_a_job_runs(described, tmp_path):
    """A second user reads a submission, writes notes on it and submits, but cannot change what the
    first user's jobs read, nor move it away."""
    home = described.folder.parent
    runs = home.parent
    submissions.note_array(described.folder, "0", "12")
    (home / "code").mkdir()

    def second_user():
        RunStore(runs).prepare()
        with Lock(home / "lock").held(5, print):
            (found,) = submissions.read_all(runs)
            assert found.arrays[0].job == "12" and found.complete(ARRAY, "9") is False
            submissions.withdraw(found, ["x"])
            submissions.note_array(found.folder, "0", "13")
        files.own_folder(home / "mine")
        for harm in (
            lambda: (found.folder / "tasks/1.json").write_text("{}"),
            lambda: (found.folder / "tasks/1.json").unlink(),
            lambda: (found.folder / "jobs/x.pkl").write_text(""),
            lambda: found.folder.rename(home / "away"),
            lambda: (found.folder / "jobs").rename(found.folder / "away"),
        ):
            with pytest.raises(PermissionError):
                harm()

    as_another_user(tmp_path, second_user)
    (found,) = submissions.read_all(runs)
    assert found.arrays[0].job == "13" and found.withdrawn == {"x"}
    assert run_job(described, tmp_path)[0]


def test_a_default_acl_of_the_group_does_not_open_a_job_folder(tmp_path):
    """As on many group folders, where it comes before the umask."""
    entry = struct.Struct("<HHI")
    anybody = 0xFFFFFFFF  # the id of an entry without a user: owner, group, others
    acl = struct.pack("<I", 2) + b"".join(entry.pack(tag, 7, anybody) for tag in (1, 4, 32))
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    files.own_folder(tmp_path / "job")
    with files.own_only():
        (tmp_path / "job" / "x").write_text("")
    assert guard.untrusted([str(tmp_path / "job"), str(tmp_path / "job" / "x")]) is None
