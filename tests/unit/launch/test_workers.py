"""Worker processes wait for the next stage of a sweep, and are replaced if they die meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from lorasweep.errors import TrainingError
from lorasweep.launch.local import Workers, run_points
from lorasweep.launch.process import Stopped
from lorasweep.store.run_store import RunStore

TRAINER = "tests.unit.launch.trainers:one_update"


@pytest.fixture
def stage(compose, tmp_path):
    """`stage(seed, workers)`: train six runs in packs of one; return the ids of the processes."""
    store = RunStore(tmp_path / "runs")
    store.prepare()

    def train(seed, pool, *settings, trainer=TRAINER):
        given = (f"sweep.axes.seed={seed}", "exec.pack_size=1", f"exec.runs_dir={store.root}")
        request = compose("+sweep=lr_ratio", "scale=smoke", *given, "exec.threads=1", *settings)
        run_points(request.points, store, request.exec, lambda e: None, trainer, workers=pool)
        assert set(store.states(p.id for p in request.points).values()) == {"done"}
        return {store.owner(p.id, 1)["pid"] for p in request.points}

    train.store = store
    return train


def is_there(pid):
    return Path(f"/proc/{pid}").exists()


def test_stages_share_workers_and_a_dead_one_is_replaced(stage):
    with Workers(stage.store) as pool:
        one = stage(0, pool, "exec.workers=1")
        assert stage(1, pool, "exec.workers=1") == one
        (pid,) = one
        os.kill(pid, signal.SIGKILL)
        other = stage(2, pool, "exec.workers=1")
        assert len(other) == 1 and other != one
        assert stage(3, pool, "exec.workers=2") - other, "another share of the machine: new ones"
        assert not any(map(is_there, other)) and pool.log.exists()
    assert not pool.log.exists()
    assert not any(map(is_there, one | other))


def test_ctrl_c_ends_workers_that_wait(stage, monkeypatch):
    with pytest.raises(Stopped), Workers(stage.store) as pool:
        (pid,) = stage(0, pool, "exec.workers=1")
        assert is_there(pid)

        monkeypatch.setattr(pool._events, "get", Mock(side_effect=KeyboardInterrupt))
        stage(1, pool, "exec.workers=1")
    assert not is_there(pid)


def test_workers_that_are_killed_before_they_claim_a_run_are_not_started_for_ever(stage):
    with pytest.raises(TrainingError, match="signal 9"):
        stage(0, None, "exec.workers=1", trainer="tests.unit.launch.trainers:killed")


def test_a_closed_terminal_stops_a_worker_cleanly_unless_it_is_to_outlive_it():
    lines = "import os, signal; from lorasweep.launch.process import StopFlag"
    lines += "; flag = StopFlag(); flag.install(); os.kill(os.getpid(), signal.SIGHUP)"
    command = [sys.executable, "-c", lines + "; print(flag.set)"]
    for start, stops in (([], "True"), (["nohup"], "False")):
        done = subprocess.run([*start, *command], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, stops)
