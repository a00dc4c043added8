"""The run folder: faults in any file operation, states, records, checkpoints."""

import contextlib
import errno
import multiprocessing
import os
import signal
import time
from unittest.mock import Mock

import pytest

from lorasweep.errors import StoreError
from lorasweep.store import checkpoint, files
from lorasweep.store.run_store import RunStore
from tests.unit.launch.trainers import steps_of
from tests.unit.store.conftest import save
from tests.world import tiny_spec

CURVE = [{"step": 1, "test_nll": 2.5}]
RESULT = {"nll_start": 3.0, "test_nll": 2.5, "curve": CURVE, "base_sha256": "x"}
DEAD_PID = 2**22 + 1


def work(store, spec):
    """Do to the store what training a run does, in the same order."""
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
    """Stands in for `os` inside lorasweep.store.files; its operation number `at` raises, writes only
    half, or kills the process."""

    OPERATIONS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rename")
    OPERATIONS += ("rmdir", "ftruncate")

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
    """Run `work` with a fault in another process; return whether the fault was reached."""
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
        RunStore(root).prepare()
        reached = work_in_child(root, spec, at, how)
        store = RunStore(root)
        state = store.state(rid)
        assert state in ("missing", "interrupted", "done"), (at, state)
        assert work(store, spec) == (state != "done")  # never twice
        assert store.state(rid) == "done" and store.result(rid)["test_nll"] == 2.5
        assert steps_of(store, rid) == [1, 2, 3]
        if not reached:
            assert at > 20
            return
    pytest.fail("the fault was still reached after 200 operations")


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", Mock(side_effect=PermissionError))
    with pytest.raises(PermissionError):
        files.write_atomic(tmp_path / "x", b"1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"null", b'{"sha256": "0", "result": {"state": "done"}}', b"\xff\xfe"]
)
def test_a_damaged_result_is_not_done_and_is_kept(store, change_owner, damage):
    spec = tiny_spec()
    work(store, spec)
    path = store.folder(spec.id) / "result.json"
    path.write_bytes(damage)
    change_owner(spec.id, pid=DEAD_PID)
    assert store.state(spec.id) == "interrupted"
    assert work(store, spec) and store.state(spec.id) == "done"
    assert list(path.parent.glob("result.damaged-*.json"))


def test_recent_records_are_read_from_the_end(store):
    spec = tiny_spec()
    store.claim(spec)
    assert store.recent_records(spec.id) == []
    for step in range(1, 501):
        store.record(spec.id, {"step": step, "train_nll": 1 / step})
        if step == 3:
            assert store.recent_records(spec.id) == store.records(spec.id)
    with open(store.folder(spec.id) / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 501, "tra')
    # the incomplete last record is ignored
    recent, all_records = store.recent_records(spec.id), store.records(spec.id)
    assert 20 < len(recent) < len(all_records) == 500
    assert recent == all_records[-len(recent) :]


def test_states_of_a_run(store):
    spec = tiny_spec()
    rid = spec.id
    assert store.state(rid) == "missing"
    n = store.claim(spec)
    assert store.state(rid) == "running" and store.claim(spec) is None
    store.write_end(rid, n, "failed", "out of memory")
    assert store.state(rid) == "failed" and store.failure(rid) == "out of memory"
    store.write_end(rid, store.claim(spec), "stopped", "asked")
    assert store.state(rid) == "interrupted"
    store.claim(spec)
    store.finish(rid, "diverged", {**RESULT, "test_nll": float("nan")})
    assert store.state(rid) == "diverged" and store.claim(spec) is None
    assert not store.finish(rid, "done", RESULT)  # a result is written once
    assert store.result(rid)["test_nll"] is None
    with pytest.raises(ValueError, match="'failed'"):
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


def test_a_folder_of_another_version_or_that_cannot_be_written_is_refused(store, tmp_path):
    store.prepare()
    (store.root / "store.json").write_text('{"train_version": 99}')
    with pytest.raises(StoreError, match=r"train_version 99.*exec\.runs_dir"):
        store.prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        RunStore(tmp_path / "file" / "runs").prepare()


def test_checkpoints_alternate_and_a_damaged_one_is_not_used(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, 1, 2, 3)
    assert set(checkpoint.described(folder)) == {2, 3}
    path = folder / f"{checkpoint.described(folder)[3]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    loaded = checkpoint.load_pack({"x": folder})
    assert loaded["x"]["meta"]["step"] == 2 and float(loaded["x"]["tensors"]["param/w"][0]) == 2.0


def test_a_pack_resumes_from_its_latest_common_step(tmp_path):
    save(tmp_path / "x", 1, 2, 3)
    save(tmp_path / "y", 1, 2)  # killed between the third writes of the two runs
    loaded = checkpoint.load_pack({"x": tmp_path / "x", "y": tmp_path / "y"})
    assert {s["meta"]["step"] for s in loaded.values()} == {2}
