"""Commands that submit: killed, two at once, of an edited sweep, and refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep.errors import ClusterError
from tests.slurm.cluster import (
    ALONE,
    FAST,
    SMOKE,
    STEPS,
    ask,
    attempts,
    command,
    results,
    start,
    submitted,
)
from tests.world import ROOT, environment

TWO_JOBS = (*SMOKE, *ALONE, "cluster.runs_per_job=3")
DIES = {
    "before sbatch": ("kill -9 $PPID; exit 1", ""),
    "after sbatch": ('{sbatch} "$@"; kill -9 $PPID; exit 1', ""),
    "before the record": ('exec {sbatch} "$@"', "die(); was(path, content)"),
    "after the record": ('exec {sbatch} "$@"', "was(path, content); die()"),
}
"""When it is killed -> the commands of its sbatch, and the code with which it records the number."""
DYING = """
import os, signal
from lorasweep.store import files
was = files.write_atomic
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def write(path, content):
    if path.name == "array-0.json":
        {record}
    else:
        was(path, content)
files.write_atomic = write
"""


@pytest.mark.full
def test_a_command_killed_while_it_submits_is_put_right_by_the_next(queue, tmp_path):
    folders = {when: tmp_path / when.replace(" ", "_") for when in DIES}
    dying = {when: _start_dying(cwd, when) for when, cwd in folders.items()}
    for when, process in dying.items():
        text = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, (when, text)
    outputs = {when: ask(cwd, *TWO_JOBS) for when, cwd in folders.items()}
    queue.drain()
    for (when, text), cwd in zip(outputs.items(), folders.values()):
        assert ("adopted" in text) == (when == "before the record"), (when, text)
        assert ("cancelled" in text) == (when == "after sbatch"), (when, text)
        assert ("submitted 6 runs" in text) == when.endswith("sbatch"), (when, text)
        assert len(results(cwd)) == 6, when
        assert all(ends == {1: None} for ends in attempts(cwd).values()), when


def _start_dying(cwd, when):
    sbatch, record = DIES[when]
    fake = cwd / "bin" / "sbatch"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\n" + sbatch.format(sbatch=shutil.which("sbatch")) + "\n")
    fake.chmod(0o755)
    dying = DYING.replace("{record}", record or "was(path, content)")
    path = f"{fake.parent}:{os.environ['PATH']}"
    return start(cwd, *TWO_JOBS, trainer=STEPS, before=dying, PATH=path)


def test_two_users_who_ask_at_once_submit_one_sweep(queue, tmp_path):
    with queue.closed():  # a job that starts at once would be reported as running, not as queued
        both = [start(tmp_path, *SMOKE, *FAST, trainer=STEPS) for _ in range(2)]
        outputs = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert sum("submitted 6 runs" in text for text in outputs) == 1
        assert all("queued" in text for text in outputs) and len(submitted(tmp_path)) == 1
    queue.drain()
    assert len(results(tmp_path)) == 6
    assert all(ends == {1: None} for ends in attempts(tmp_path).values())


@pytest.mark.full
def test_an_edited_sweep_submits_what_is_new_and_takes_back_what_is_gone(queue, tmp_path):
    with queue.closed():  # nothing starts for now
        ask(tmp_path, *SMOKE, *ALONE, "cluster.runs_per_job=1", "exec.pack_size=1")
        edited = (*SMOKE, "sweep.arms.fullft.lr=[1e-3,3e-3]", "~sweep.arms.lora")
        plan = ask(tmp_path, *edited, *ALONE, "action=plan")
        assert re.search(r"to submit: [12] runs", plan)
        assert re.search(r"(\d) queued run\(s\)", plan)[1] in "56"
        text = ask(tmp_path, *edited, *ALONE, "prune=true")
        assert re.search(r"submitted [12] runs", text) and re.search(r"cancelled [56] queued", text)
    queue.drain()
    assert len(results(tmp_path)) == 2


@pytest.mark.full
def test_a_cancelled_sweep_leaves_the_queue_and_ends_when_asked_for_again(queue, tmp_path):
    with queue.closed():
        ask(tmp_path, *SMOKE, *FAST, "cluster.runs_per_job=3")
        assert len(queue.jobs()) == 3  # two and the one that follows
        assert "cancelled 2 job(s) with 6 unfinished run(s)" in ask(
            tmp_path, *SMOKE, *FAST, "action=cancel"
        )
        queue.drain()
        assert results(tmp_path) == {}
    assert "submitted 6 runs" in ask(tmp_path, *SMOKE, *ALONE)
    queue.drain()
    assert len(results(tmp_path)) == 6


@pytest.mark.full
def test_queued_jobs_run_the_code_as_it_was(queue, tmp_path):
    """The checkout is broken while the jobs wait."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in ("lorasweep", "analysis", "conf", "sweeps"):  # with what is not committed yet
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    env = {**environment(tmp_path), "PYTHONPATH": f"{clone}:{ROOT}"}
    with queue.closed():
        asked = command(*SMOKE, *ALONE, trainer=STEPS)
        options = {"capture_output": True, "text": True, "check": True}
        done = subprocess.run(asked, cwd=clone, env=env, **options)
        assert re.search(r"code snapshot \w+ of commit \w+", done.stderr)
        (clone / "lorasweep/launch/worker.py").write_text("a syntax error")
    queue.drain()
    assert len(results(tmp_path)) == 6


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "given, message",
    [
        ("partition=gpux", "partition 'gpux' not found. Available: main, scavenge, urgent"),
        ("gpus=3", "cluster.gpus=3, but a node of partition 'main' has at most 2"),
        ("warn_s=4000", "would be warned at once"),
        ("constraint=gold", "Slurm refused the jobs: "),
    ],
)
def test_what_the_cluster_cannot_do_is_said_and_not_submitted(slurm, tmp_path, given, message):
    with pytest.raises(ClusterError, match=re.escape(message)):
        ask(tmp_path, *SMOKE, *FAST, f"cluster.{given}")
    assert slurm.jobs() == {}


def test_without_slurm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(ClusterError, match=r"no Slurm here.*cluster=local"):
        ask(tmp_path, *SMOKE, "cluster=slurm")
    monkeypatch.setenv("SLURM_CONF", "/nowhere.conf")
    with pytest.raises(ClusterError, match=re.escape("/nowhere.conf: there is no such file")):
        ask(tmp_path, *SMOKE, "cluster=slurm")
