"""Commands and workers that are killed, stopped, or on a full disk lose and repeat no update."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from lorasweep.launch import local
from lorasweep.store import claims
from lorasweep.store.checkpoint import described
from lorasweep.store.run_store import RunStore
from tests import world
from tests.integration.conftest import SMOKE
from tests.training import REWARDED
from tests.world import cli, compose_request, wait_for

pytestmark = pytest.mark.slow

ALONE = ("scale=smoke", "exec.checkpoint_s=0.3", "exec.workers=1", "exec.threads=1")
LONG = (*ALONE, "steps=120", "batch_size=8")
REWARDED = (
    *(*ALONE, "steps=40", "dataset=words", *REWARDED["words"], "objective=policy_gradient"),
    *("method=lora", "method.rank=8", "lr=6e-4"),
)


def start(*args, cwd):
    """Start the command in a new process group."""
    group = {"start_new_session": True, "stderr": subprocess.PIPE}
    return world.start("-m", "lorasweep", *args, cwd=cwd, **group)


def places(tmp_path):
    """Folders for an uninterrupted run, and for one that is killed."""
    made = tmp_path / "whole", tmp_path / "killed"
    for folder in made:
        folder.mkdir()
    return made


def killed_at(condition, *args, cwd):
    """Start a command in its own process group, and kill the group once a condition holds."""
    process = start(*args, cwd=cwd)
    wait_for(condition)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


MEASURES = ("train_nll", "test_nll", "surrogate", "reward", "entropy", "test_reward")


def kept(cwd):
    """Run id -> {step: MEASURES, None for those of other objectives} of a store."""
    store = RunStore(Path(cwd) / "runs")
    return {
        i: {r["step"]: tuple(map(r.get, MEASURES)) for r in store.records(i)}
        for i in store.existing()
    }


def furthest(cwd):
    return [max(steps, default=0) for steps in kept(cwd).values()]


PACK = (*LONG, "+sweep=lr_ratio", "~sweep.arms.fullft", "exec.pack_size=3")


@pytest.mark.parametrize(
    ("arm", "runs", "kills"),
    [
        ((*LONG, "method=fullft", "lr=1e-3", "steps=60"), 1, (15,)),
        pytest.param(PACK, 3, (15, 60), marks=pytest.mark.full),
        pytest.param(REWARDED, 1, (8, 24), marks=pytest.mark.full),
    ],
    ids=["fullft", "pack of lora", "rewarded"],
)
def test_killed_with_kill_9_it_resumes_with_the_same_bits(tmp_path, arm, runs, kills):
    whole, killed = places(tmp_path)
    cli(*arm, cwd=whole)
    for at in kills:
        killed_at(lambda at=at: max(furthest(killed), default=0) >= at, *arm, cwd=killed)
        assert list((killed / "runs").glob("*/checkpoint/*.json"))
        assert not list((killed / "runs").glob("*/result.json"))
    cli(*arm, cwd=killed)
    assert kept(whole) == kept(killed) and len(kept(whole)) == runs  # every step once
    one, other = (RunStore(folder / "runs") for folder in (whole, killed))
    for rid in one.existing():
        for key in ("test_nll", "test_reward", "curve"):
            assert one.result(rid).get(key) == other.result(rid).get(key)
        assert other.last_attempt(rid) == len(kills) + 1
        assert other.env(rid)["resumed_from_step"] > 0


@pytest.mark.full
def test_ctrl_c_stops_cleanly_and_the_next_command_resumes_though_its_worker_is_killed(tmp_path):
    arguments = (*LONG, "method=lora", "method.rank=4", "lr=3e-3")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: max(furthest(tmp_path), default=0) >= 10)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    (rid,) = kept(tmp_path)
    store = RunStore(tmp_path / "runs")
    assert store.state(rid) == "interrupted" and store.end(rid, 1)["state"] == "stopped"

    stopped_at = min(furthest(tmp_path))
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: min(furthest(tmp_path)) >= stopped_at + 5)
    assert store.env(rid)["resumed_from_step"] == stopped_at
    worker = store.owner(rid, 2)["pid"]
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert store.state(rid) == "done" and store.last_attempt(rid) == 3


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_only_the_command_dies_its_workers_stop_cleanly(tmp_path, number):
    """Nobody reads their events: interrupted, not failed, with a checkpoint of the last update."""
    arguments = (*LONG, "method=lora", "method.rank=4", "lr=3e-3", "steps=400")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: max(furthest(tmp_path), default=0) >= 10)
    (rid,) = kept(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    store = RunStore(tmp_path / "runs")
    wait_for(lambda: store.state(rid) != "running")
    assert store.state(rid) == "interrupted" and store.end(rid, 1)["state"] == "stopped"
    assert max(described(tmp_path / "runs" / rid / "checkpoint")) == max(furthest(tmp_path))


@pytest.mark.full
def test_an_owner_found_dead_on_another_machine_is_replaced(tmp_path, monkeypatch):
    """The command has watched the owner, and tells its workers, which have not."""
    one = ("scale=smoke", "method=lora", "method.rank=4", "lr=3e-3")
    request = compose_request([*one, f"exec.runs_dir={tmp_path}/runs"])
    store, (point,) = RunStore(tmp_path / "runs"), request.points
    store.prepare()
    store.claim(point.spec)
    path = store.folder(point.id) / "attempts/1/owner.json"
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "boot": "other", "host": "elsewhere"}))
    monkeypatch.setattr(claims, "SILENCE_S", 1.0)
    local.run_points(request.points, store, request.exec, lambda event: None)
    assert store.state(point.id) == "done" and store.last_attempt(point.id) == 2


def test_two_commands_at_once_share_the_runs(tmp_path):
    one_by_one = (*SMOKE, "exec.pack_size=1", "exec.workers=1", "steps=30")
    two = [start(*one_by_one, cwd=tmp_path) for _ in range(2)]
    answers = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    runs = list((tmp_path / "runs").glob("*/attempts"))
    assert len(runs) == 6 and all(len(list(r.iterdir())) == 1 for r in runs)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_cleanly_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        full = ("method=fullft", "lr=1e-3", "steps=40", "exec.checkpoint_s=0.1")
        arguments = (*LONG, *full, f"exec.runs_dir={disk}/runs")
        first = cli(*arguments, cwd=tmp_path, check=False)  # a checkpoint of 2.6 MB does not fit
        assert first.returncode == 2
        assert "No space left" in first.stderr and "Traceback" not in first.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        cli(*arguments, cwd=tmp_path)
        (result,) = disk.glob("runs/*/result.json")
        assert json.loads(result.read_text())["result"]["state"] == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
