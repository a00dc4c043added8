"""A job runs only what its user submitted, and only its owner writes a run folder."""

import os
import re
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorasweep.errors import ClusterError, StoreError
from lorasweep.launch.slurm import guard, submit
from lorasweep.spec.execution import Cluster
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from tests.world import OTHER_USER, ROOT, as_another_user, tiny_spec


@pytest.fixture
def array(slurm, tmp_path):
    """A submission of two jobs, with some code."""
    slurm("here")
    RunStore(tmp_path / "runs").prepare()
    code = tmp_path / "snapshot"
    (code / "package").mkdir(parents=True)
    for name in ("package/a.py", "package/b.py", "snapshot.json"):
        (code / name).write_text(f"{name} = 1")
    folder = submit._write(
        tmp_path / "runs", "sweep", [["a"], ["b"]], [{"runs": ["a"]}, {"runs": ["b"]}]
    )
    return SimpleNamespace(folder=folder, code=submit.Snapshot(code, guard.digest(str(code))))


def run_job(array, tmp_path, meanwhile):
    """Run a job's script with a stand-in for srun; return whether it was reached, and the errors."""
    script = tmp_path / "spooled.sh"  # Slurm runs its own copy of the script
    lines = submit.setup(array.folder, Cluster(kind="slurm"), array.code)
    script.write_text("\n".join([*lines, "srun job", ""]))
    meanwhile(array)
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
def test_a_job_whose_files_were_changed_or_could_be_is_refused(array, tmp_path, harm, said):
    reached, errors = run_job(array, tmp_path, harm)
    assert reached == (said is None) and re.search(said or "^$", errors), errors


def test_a_snapshot_runs_and_one_that_was_changed_is_not_used_again(tmp_path, monkeypatch):
    taken = submit.take(tmp_path)
    assert submit.take(tmp_path) == taken and len(list(tmp_path.iterdir())) == 1
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
        m.setattr(submit.shutil, "copyfile", edited)
        other = submit.take(tmp_path)
    assert other.sha256 == guard.digest(str(other.folder)) and other.folder != taken.folder
    append(taken.folder / "lorasweep/errors.py")
    with pytest.raises(ClusterError, match=r"was changed after .*rm -r "):
        submit.take(tmp_path)


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
        submit.prepare(Cluster(kind="slurm"), store.root)
