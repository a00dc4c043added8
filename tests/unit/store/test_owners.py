"""Owners of runs, locks and files: hidden processes, a group's folder, other users of the group."""

import os
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from lorasweep.cli.actions import act
from lorasweep.errors import SpecError, StoreError
from lorasweep.store import claims, files
from lorasweep.store.claims import Liveness, Lock
from lorasweep.store.run_store import RunStore
from tests.unit.store.conftest import at_once
from tests.world import as_another_user, tiny_spec


def test_an_owner_of_unknown_start_time_is_not_called_dead(store, change_owner, monkeypatch):
    """Login nodes hide other users' processes (hidepid=2), which still exist."""
    spec = tiny_spec()
    attempt = store.attempt(spec.id, store.claim(spec))
    liveness = Liveness()
    assert liveness.verdict(attempt) is True

    monkeypatch.setattr(Path, "read_text", Mock(side_effect=FileNotFoundError))
    assert claims.start_time(os.getpid()) == claims.UNKNOWN and claims.start_time(2**22 - 1) == ""
    assert liveness.verdict(attempt) is None and liveness.alive(attempt)
    monkeypatch.undo()
    change_owner(spec.id, started=claims.UNKNOWN)  # too many files were open at its claim
    assert Liveness().verdict(attempt) is None and Liveness().alive(attempt)
    change_owner(spec.id, pid=2**22 + 1)
    assert Liveness().verdict(attempt) is False


def writable(folder):
    """File or folder -> whether the group may write it."""
    written = [p for p in folder.rglob("*") if p.name != "store.json"]
    return {p: bool(p.stat().st_mode & stat.S_IWGRP) for p in written}


def test_files_of_a_groups_folder_are_writable_for_the_group(group_folder, tmp_path):
    store, spec = group_folder(), tiny_spec()
    assert store.claim(spec) == 1
    store.record(spec.id, {"step": 1})
    assert len(writable(store.root)) >= 5 and all(writable(store.root).values())
    os.umask(0o022)
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o755)
    files.share_as(mine)
    (mine / "x").write_text("")
    assert not (mine / "x").stat().st_mode & stat.S_IWGRP


@pytest.mark.parametrize("action", ["extend", "verify", "adapter", "status"])
def test_all_actions_write_files_that_the_group_may_write(group_folder, compose, action):
    """The lock of the looks, for example: another user adds a round, too."""
    runs = group_folder().root
    with suppress(SpecError):  # there is no run yet
        act(compose("+sweep=lr_ratio", "scale=smoke", f"action={action}"))
    with Lock(runs / "lock").held(1, print):
        pass
    assert all(writable(runs).values())


@pytest.mark.parametrize("mode", [0o2775, 0o3775], ids=["g+ws", "g+ws,+t"])
def test_another_user_of_the_group_resumes_a_sweep(group_folder, tmp_path, mode):
    """The second user claims a run that the first one left, and finishes it."""
    store, spec = group_folder(mode), tiny_spec()
    n = store.claim(spec)
    store.record(spec.id, {"step": 1})
    store.write_end(spec.id, n, "stopped", "asked to stop")

    def resume():
        other = RunStore(store.root)
        other.prepare()
        assert other.claim(spec) == n + 1
        other.record(spec.id, {"step": 2})
        assert other.finish(spec.id, "done", {"test_nll": 1.0})

    as_another_user(tmp_path, resume)
    assert store.state(spec.id) == "done"
    assert [r["step"] for r in store.records(spec.id)] == [1, 2]


def test_a_late_claim_that_a_later_holder_deletes_is_made_again(tmp_path, monkeypatch):
    create = files.create_folder_once

    def late(path, content):
        made = create(path, content)
        if path.name == "1":
            monkeypatch.undo()
            (path / "released").touch()
            path.rename(path.with_name("2"))
        return made

    monkeypatch.setattr(files, "create_folder_once", late)
    Lock(tmp_path / "lock").acquire(5, print)
    assert files.highest_number(tmp_path / "lock") == 3


def test_a_lock_has_one_holder_and_outlives_a_dead_one(tmp_path):
    folder, counter = tmp_path / "lock", tmp_path / "n"
    counter.write_text("0")

    def count(_):
        for _ in range(20):
            with Lock(folder).held(60, print):
                n = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(n + 1))

    at_once(4, count)
    assert counter.read_text() == "80"
    at_once(1, lambda _: Lock(folder).acquire(60, print))  # the process ends with the lock
    mine = Lock(folder)
    mine.acquire(5, lambda who: pytest.fail("waited for a dead process"))
    waited = []
    with pytest.raises(StoreError, match=f"process {os.getpid()}"):
        Lock(folder).acquire(0.5, waited.append)
    assert len(waited) == 1
    threading.Timer(0.5, mine.release).start()
    Lock(folder).acquire(5, waited.append)
