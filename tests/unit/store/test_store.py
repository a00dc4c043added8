"""The store under fire: every file operation fails in turn, and the store is opened again (SQLite's
manner)."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasweep.errors import StoreError
from lorasweep.store import checkpoint, claims, files
from lorasweep.store.claims import Lock
from lorasweep.store.run_store import RunStore
from tests.world import ROOT, tiny_spec

RESULT = {
    "nll_start": 3.0,
    "test_nll": 2.5,
    "curve": [{"step": 1, "test_nll": 2.5}],
    "base_sha256": "x",
}


def work(store, spec):
    """What execute does to the store for one run, in its order."""
    rid = spec.id
    n = store.claim(spec)
    if n is None:
        return False
    store.cut_records(rid, 0)
    store.write_env(rid, n, {"threads": 1})
    for step in (1, 2, 3):
        store.record(rid, {"step": step, "train_nll": 3.0 - step / 10})
    return store.finish(rid, "done", RESULT)


class FaultyOS:
    """Stands in for `os` inside lorasweep.store.files; its operation number `at` errs, writes
    short, or kills."""

    OPERATIONS = (
        "open",
        "write",
        "fsync",
        "replace",
        "link",
        "unlink",
        "mkdir",
        "rename",
        "rmdir",
        "ftruncate",
    )

    def __init__(self, at, how):
        self.at, self.how, self.count, self.hit = at, how, 0, False

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.OPERATIONS:
            return real

        def operation(*args, **kwargs):
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            self.hit = True
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "short" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return operation


def work_in_child(root, spec, at, how):
    """Run `work` with a fault in a process of its own; returns whether the fault was reached."""
    pid = os.fork()
    if pid == 0:
        faulty = FaultyOS(at, how)
        files.os = faulty
        with contextlib.suppress(OSError):
            work(RunStore(root), spec)
        os._exit(7 if faulty.hit else 0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 7


@pytest.mark.parametrize("how", ["error", "short", "kill"])
def test_any_file_operation_may_fail_and_the_run_still_ends_exactly_once(tmp_path, how):
    spec = tiny_spec()
    rid = spec.id
    for at in range(1, 200):
        root = tmp_path / f"{how}-{at}"
        store = RunStore(root)
        store.prepare()
        reached = work_in_child(root, spec, at, how)
        store = RunStore(root)
        state = store.state(rid)
        assert state in ("missing", "interrupted", "done"), (at, state)
        if state == "done":
            assert store.result(rid)["test_nll"] == 2.5
            assert not work(store, spec)  # never twice
        else:
            assert work(store, spec)
        assert store.state(rid) == "done"
        assert [r["step"] for r in store.records(rid)] == [1, 2, 3]
        if not reached:
            assert at > 20
            return
    pytest.fail("the fault was still reached after 200 operations")


def test_a_result_is_written_once(tmp_path):
    store, spec = RunStore(tmp_path), tiny_spec()
    assert work(store, spec)
    assert not store.finish(spec.id, "done", {**RESULT, "test_nll": 9.9})
    assert store.result(spec.id)["test_nll"] == 2.5


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"null", b'{"sha256": "0", "result": {"state": "done"}}', b"\xff\xfe"]
)
def test_a_damaged_result_is_not_done_and_is_kept_aside(tmp_path, damage):
    store, spec = RunStore(tmp_path), tiny_spec()
    work(store, spec)
    path = store.folder(spec.id) / "result.json"
    path.write_bytes(damage)
    dead_owner(store, spec.id)
    assert store.state(spec.id) == "interrupted"
    assert work(store, spec)
    assert store.state(spec.id) == "done"
    assert list(path.parent.glob("result.damaged-*.json"))


def dead_owner(store, rid):
    """Make the last attempt's owner a process that is gone."""
    path = store.folder(rid) / "attempts" / str(store.last_attempt(rid)) / "owner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": 2**22 + 1}))


def unreadable(monkeypatch, name):
    """Let reads of files of this name fail, as when a network file system fails for a moment."""
    real = Path.read_bytes

    def read_bytes(path):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_a_result_that_cannot_be_read_for_a_moment_is_not_set_aside(tmp_path, monkeypatch):
    store, spec = RunStore(tmp_path), tiny_spec()
    work(store, spec)
    with monkeypatch.context() as moment:
        unreadable(moment, "result.json")
        moment.setattr(files, "PAUSES_S", ())
        dead_owner(store, spec.id)
        with pytest.raises(StoreError, match="cannot be read"):
            store.claim(spec)
    assert store.state(spec.id) == "done"
    assert not list((tmp_path / spec.id).glob("result.damaged-*.json"))


def test_an_owner_that_cannot_be_read_for_a_moment_is_not_called_dead(tmp_path, monkeypatch):
    store, spec = RunStore(tmp_path), tiny_spec()
    store.claim(spec)
    lock = Lock(tmp_path / "lock")
    lock.acquire(5, print)
    with monkeypatch.context() as moment:
        unreadable(moment, "owner.json")
        assert store.states([spec.id]) == {spec.id: "running"} and store.claim(spec) is None
        with pytest.raises(StoreError, match="cannot be read"):
            Lock(tmp_path / "lock").acquire(0.1, print)
    assert store.last_attempt(spec.id) == 1
    lock.release()
    path = tmp_path / spec.id / "attempts" / "1" / "owner.json"
    path.write_bytes(b"{")  # damaged is another thing
    assert store.state(spec.id) == "interrupted"


def test_a_torn_last_line_is_passed_over(tmp_path):
    store, spec = RunStore(tmp_path), tiny_spec()
    work(store, spec)
    path = store.folder(spec.id) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [r["step"] for r in store.records(spec.id)] == [1, 2]


def test_watching_reads_the_end_of_the_records_only(tmp_path):
    store, spec = RunStore(tmp_path), tiny_spec()
    store.claim(spec)
    assert store.recent_records(spec.id) == []
    for step in range(1, 501):
        store.record(spec.id, {"step": step, "train_nll": 1 / step})
        if step == 3:
            assert store.recent_records(spec.id) == store.records(spec.id)
    with open(tmp_path / spec.id / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 501, "tra')
    recent, all_records = store.recent_records(spec.id), store.records(spec.id)
    assert 20 < len(recent) < len(all_records) == 500
    assert recent == all_records[-len(recent) :]


def test_states_are_told_apart(tmp_path):
    store, spec = RunStore(tmp_path), tiny_spec()
    rid = spec.id
    assert store.state(rid) == "missing"
    n = store.claim(spec)
    assert store.state(rid) == "running" and store.claim(spec) is None
    store.write_end(rid, n, "failed", "out of memory")
    assert store.state(rid) == "failed" and store.failure(rid) == "out of memory"
    n = store.claim(spec)
    store.write_end(rid, n, "stopped", "asked")
    assert store.state(rid) == "interrupted"
    n = store.claim(spec)
    store.finish(rid, "diverged", {**RESULT, "test_nll": float("nan")})
    assert store.state(rid) == "diverged" and store.claim(spec) is None
    assert store.result(rid)["test_nll"] is None
    with pytest.raises(ValueError, match="ends as"):
        store.finish(rid, "failed", {})


def claim_all(root, specs, out):
    store = RunStore(root)
    out.put([s.id for s in specs if store.claim(s) is not None])
    time.sleep(1)  # stay alive until all have tried


def test_many_processes_claim_each_run_once(tmp_path):
    specs = [tiny_spec(seed=k) for k in range(40)]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [context.Process(target=claim_all, args=(tmp_path, specs, out)) for _ in range(6)]
    for p in processes:
        p.start()
    won = [rid for _ in processes for rid in out.get(timeout=60)]
    for p in processes:
        p.join()
    assert sorted(won) == sorted(s.id for s in specs)


def test_a_killed_owner_is_seen_and_an_owner_elsewhere_is_watched(tmp_path, monkeypatch):
    store, spec = RunStore(tmp_path), tiny_spec()
    rid = spec.id
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom lorasweep.store.run_store import RunStore\n"
        f"from tests.world import tiny_spec\nRunStore({str(tmp_path)!r}).claim(tiny_spec())\nprint('ok', flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ok\n"
    assert store.state(rid) == "running" and store.claim(spec) is None
    child.kill()
    child.wait()
    assert store.state(rid) == "interrupted"
    # another machine: only the heartbeat's content speaks, against our own clock
    path = store.folder(rid) / "attempts" / "1"
    owner = json.loads((path / "owner.json").read_text())
    (path / "owner.json").write_text(json.dumps({**owner, "boot": "other", "host": "elsewhere"}))
    clock = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    store = RunStore(tmp_path)
    assert store.state(rid) == "running"
    clock[0] += claims.SILENCE_S - 1
    (path / "heartbeat").write_text("5")
    assert store.state(rid) == "running"
    clock[0] += claims.SILENCE_S + 1
    assert store.state(rid) == "interrupted"


def test_a_store_of_another_version_or_that_cannot_be_written_is_refused(tmp_path):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    (store.root / "store.json").write_text('{"train_version": 99}')
    with pytest.raises(StoreError, match=r"train_version 99.*exec\.runs_dir"):
        store.prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        RunStore(tmp_path / "file" / "runs").prepare()


def state_of(step, value):
    import torch

    return {
        "tensors": {"param/w": torch.full((3,), float(value))},
        "meta": {"step": step, "layout": ["x"], "curve": [], "above": 0, "tokens": 0},
    }


def test_checkpoints_alternate_and_a_damaged_one_is_passed_over(tmp_path):
    folder = tmp_path / "checkpoint"
    for step in (1, 2, 3):
        checkpoint.save(folder, state_of(step, step))
    assert set(checkpoint.described(folder)) == {2, 3}
    slot = checkpoint.described(folder)[3]
    content = bytearray((folder / f"{slot}.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / f"{slot}.safetensors").write_bytes(content)
    loaded = checkpoint.load_pack({"x": folder})
    assert loaded["x"]["meta"]["step"] == 2 and float(loaded["x"]["tensors"]["param/w"][0]) == 2.0


def test_members_resume_from_their_latest_common_step(tmp_path):
    for name, steps in (
        ("x", (1, 2, 3)),
        ("y", (1, 2)),
    ):  # killed between the two members' third writes
        for step in steps:
            checkpoint.save(tmp_path / name, state_of(step, step))
    loaded = checkpoint.load_pack({"x": tmp_path / "x", "y": tmp_path / "y"})
    assert {s["meta"]["step"] for s in loaded.values()} == {2}
