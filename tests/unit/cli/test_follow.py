"""The command of a follow-up job: its exit status says whether another try may help."""

import json
import os
import subprocess
import sys
import time

import pytest

from lorasweep.cli import actions
from lorasweep.errors import ClusterError, GaveUp, SpecError, StoreError
from lorasweep.launch.slurm import job
from tests.world import ROOT


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
    task = {"follow": str(tmp_path / "request.json"), "trainer": "a.b:c", "idle": 1, "finished": 4}
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
