"""Owners of runs and of files: hidden processes, a group's folder, another user of the group."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from lorasweep.cli.actions import act
from lorasweep.errors import SpecError
from lorasweep.store import claims, files
from lorasweep.store.claims import Lock
from lorasweep.store.run_store import RunStore


def test_an_owner_whose_process_the_system_hides_is_not_called_dead(tmp_path, monkeypatch):
    """Login nodes hide other users' processes (hidepid=2): they exist, and their start time cannot
    be read."""
    attempt = tmp_path / "1"
    attempt.mkdir()
    (attempt / "owner.json").write_text(json.dumps(claims.this_process()))
    liveness = claims.Liveness()
    assert liveness.verdict(attempt) is True
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: (_ for _ in ()).throw(FileNotFoundError(self))
    )
    assert claims.start_time(os.getpid()) == claims.UNKNOWN and claims.start_time(2**22 - 1) == ""
    assert liveness.verdict(attempt) is None and liveness.alive(attempt)


def test_a_folder_of_a_group_stays_the_groups(tmp_path, compose):
    old = os.umask(0o022)
    try:
        runs = tmp_path / "runs"
        runs.mkdir()
        runs.chmod(0o2775)
        store = RunStore(runs)
        store.prepare()
        asked = compose("scale=smoke").points[0]
        assert store.claim(asked.spec) == 1
        store.record(asked.id, {"step": 1})
        written = [p for p in runs.rglob("*") if p.name != "store.json"]
        assert len(written) >= 5 and all(p.stat().st_mode & stat.S_IWGRP for p in written)
        os.umask(0o022)
        mine = tmp_path / "mine"
        mine.mkdir(mode=0o755)
        files.share_as(mine)
        (mine / "x").write_text("")
        assert not (mine / "x").stat().st_mode & stat.S_IWGRP
    finally:
        os.umask(old)


@pytest.mark.parametrize("action", ["extend", "verify", "adapter", "status"])
def test_what_any_action_writes_into_a_groups_folder_is_the_groups(tmp_path, compose, action):
    """The lock of the looks, for one: the next member adds a round, too."""
    old = os.umask(0o022)
    try:
        runs = tmp_path / "runs"
        runs.mkdir()
        runs.chmod(0o2775)
        with suppress(SpecError):  # there is no run yet
            act(compose("+sweep=lr_ratio", "scale=smoke", f"action={action}"))
        lock = Lock(runs / "lock")
        lock.acquire(1, print)
        lock.release()
        assert all(p.stat().st_mode & stat.S_IWGRP for p in runs.rglob("*"))
    finally:
        os.umask(old)


@pytest.mark.parametrize("mode", [0o2775, 0o3775], ids=["g+ws", "g+ws,+t"])
def test_another_user_of_the_group_goes_on_with_a_sweep(tmp_path, compose, mode):
    """A second user, not root, claims what the first left, and finishes it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    old = os.umask(0o022)
    try:
        runs = tmp_path / "runs"
        runs.mkdir()
        os.chown(runs, 0, 4321)
        runs.chmod(mode)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and str(folder).startswith(("/tmp/", "/dev/shm/")):
                folder.chmod(folder.stat().st_mode | 0o011)
        store = RunStore(runs)
        store.prepare()
        point = compose("scale=smoke").points[0]
        n = store.claim(point.spec)
        store.record(point.id, {"step": 1})
        store.write_end(point.id, n, "stopped", "asked to stop")
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(4321)
                os.setuid(4321)
                other = RunStore(runs)
                other.prepare()
                assert other.claim(point.spec) == n + 1
                other.record(point.id, {"step": 2})
                assert other.finish(point.id, "done", {"test_nll": 1.0})
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert store.state(point.id) == "done" and [r["step"] for r in store.records(point.id)] == [
            1,
            2,
        ]
    finally:
        os.umask(old)
