"""The run folder: faults, states, records, checkpoints, tables, looks, owners; copies for W&B."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from lorasweep.errors import SpecError, StoreError
from lorasweep.store import checkpoint, claims, files, looks
from lorasweep.store.claims import Liveness
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import import_table, load_runs
from lorasweep.sweep.grid import Point
from lorasweep.tracking.wandb import check, mirror
from tests.unit.launch.trainers import steps_of
from tests.unit.store.conftest import at_once, save
from tests.world import tiny_spec

RESULT = {"nll_start": 3.0, "test_nll": 2.5, "curve": [], "base_sha256": "x"}
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


OPERATIONS = (
    *("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rename", "rmdir"),
    "ftruncate",
)


class FaultyOS:
    """`os` for lorasweep.store.files, whose operation number `at` raises, writes half, or kills."""

    def __init__(self, at, how):
        self.at, self.how, self.count = at, how, 0

    def __getattr__(self, name):
        real = getattr(os, name)

        def operation(*args, **kwargs):
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "short" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return operation if name in OPERATIONS else real


def work_in_child(root, spec, at, how):
    """Run `work` with a fault in another process; return whether the fault was reached."""
    pid = os.fork()
    if pid == 0:
        files.os = faulty = FaultyOS(at, how)
        with contextlib.suppress(OSError):
            work(RunStore(root), spec)
        os._exit(7 if faulty.count >= at else 0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 7


@pytest.mark.parametrize("how", ["error", "short", "kill"])
def test_any_file_operation_may_fail_and_the_run_still_ends_exactly_once(tmp_path, how):
    spec, reached, at = tiny_spec(), True, 0
    while reached:
        store, at = RunStore(tmp_path / f"{at}"), at + 1
        store.prepare()
        reached = work_in_child(store.root, spec, at, how)
        state = store.state(spec.id)
        assert at < 200 and state in ("missing", "interrupted", "done"), (at, state)
        assert work(store, spec) == (state != "done")  # never twice
        assert store.state(spec.id) == "done" and store.result(spec.id)["test_nll"] == 2.5
        assert steps_of(store, spec.id) == [1, 2, 3]
    assert at > 20


def test_a_damaged_result_is_not_done_and_is_kept(store, change_owner):
    wrong = b'{"sha256": "0", "result": {"state": "done"}}'
    for k, damage in enumerate((b"", b"{", b"null", wrong, b"\xff\xfe")):
        spec = tiny_spec(seed=k)
        work(store, spec)
        path = store.folder(spec.id) / "result.json"
        path.write_bytes(damage)
        change_owner(spec.id, pid=DEAD_PID)
        assert store.state(spec.id) == "interrupted"
        assert work(store, spec) and store.state(spec.id) == "done"
        assert [p.read_bytes() for p in path.parent.glob("result.damaged-*.json")] == [damage]


def test_kills_after_which_a_run_got_further_do_not_count(store, change_owner):
    spec = tiny_spec()
    rid, slots = spec.id, store.folder(spec.id) / "checkpoint"
    counted = []
    for start, saved in ((None, 3), (3, 4), (4, None), (4, None), ("killed while it loads", None)):
        n = store.claim(spec)
        if not isinstance(start, str):
            store.write_env(rid, n, {"threads": 1, "resumed_from_step": start})
        slots.mkdir(exist_ok=True)
        if saved:
            save(slots, saved)
        change_owner(rid, pid=DEAD_PID)
        counted.append((store.saved_step(rid), store.failures(rid)))
    assert counted == [(3, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    store.write_end(rid, store.claim(spec), "stopped", "asked")
    store.write_end(rid, store.claim(spec), "failed", "an error")
    assert store.failures(rid) == 4


def test_states_of_a_run(store):
    spec = tiny_spec()
    rid = spec.id
    assert store.state(rid) == "missing"
    n = store.claim(spec)
    assert store.state(rid) == "running" and store.claim(spec) is None
    store.write_end(rid, n, "failed", "out of memory")
    assert store.state(rid) == "failed" and store.failure(rid) == "out of memory"
    store.write_end(rid, store.claim(spec), "stopped", "asked")
    assert store.state(rid) == "interrupted" and store.claim(spec) == 3
    store.finish(rid, "diverged", {**RESULT, "test_nll": float("nan")})
    assert store.state(rid) == "diverged" and store.claim(spec) is None
    assert not store.finish(rid, "done", RESULT)  # a result is written once
    assert store.result(rid)["test_nll"] is None


def test_many_processes_claim_each_run_once(tmp_path):
    specs = [tiny_spec(seed=k) for k in range(40)]

    def claim_all(_):
        store = RunStore(tmp_path)
        return [s.id for s in specs if store.claim(s) is not None]

    won = [rid for own in at_once(6, claim_all) for rid in own]
    assert sorted(won) == sorted(s.id for s in specs)


def test_a_folder_of_another_version_or_that_cannot_be_written_is_refused(store, tmp_path):
    store.prepare()
    (store.root / "store.json").write_text('{"train_version": 99}')
    (tmp_path / "file").write_text("")
    for root, words in ((store.root, "train_version 99"), (tmp_path / "file/r", "cannot be writ")):
        with pytest.raises(StoreError, match=words):
            RunStore(root).prepare()


def test_a_pack_resumes_from_the_latest_step_that_all_runs_have_whole(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    save(x, 1, 2, 3)
    save(y, 1, 2)  # killed between the third writes of the two runs
    assert set(checkpoint.described(x)) == {2, 3}
    both = checkpoint.load_pack({"x": x, "y": y})
    assert {s["meta"]["step"] for s in both.values()} == {2}
    path = x / f"{checkpoint.described(x)[3][0]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    loaded = checkpoint.load_pack({"x": x})["x"]
    assert loaded["meta"]["step"] == 2 and float(loaded["tensors"]["param/w"][0]) == 2.0


def test_finished_runs_are_read_once_until_their_file_changes(store, monkeypatch):
    ids = ["0", "1"]
    for rid in ids:
        store.folder(rid).mkdir(parents=True)
        store.finish(rid, "done", {"test_nll": 2.0})
    assert store.finished(ids).keys() == set(ids)
    with monkeypatch.context() as m:
        m.setattr(store, "result", Mock(side_effect=AssertionError))
        assert store.finished(ids).keys() == set(ids)
    result = store.folder("0") / "result.json"
    result.write_text(result.read_text().replace("2.0", "3.25"))  # its checksum is wrong
    assert [state == "done" for state in store.states(ids).values()] == [False, True]


def test_a_table_goes_into_another_store_and_with_a_bad_row_adds_nothing(tmp_path, store):
    for k in range(3):
        work(store, tiny_spec(seed=k))
    table = load_runs(store.root)
    for ending, write in {"parquet": table.to_parquet, "csv": table.to_csv}.items():
        path, there = tmp_path / f"table.{ending}", RunStore(tmp_path / ending)
        write(path, index=False)
        assert [import_table(there.root, path) for _ in range(2)] == [3, 0]
        again = load_runs(there.root)
        assert again[["run_id", "test_nll"]].equals(table[["run_id", "test_nll"]])
        assert again["imported"].all()
        assert all(there.claim(tiny_spec(seed=k)) is None for k in range(3))
    rows, state, other = table.to_dict("records"), {"state": "failed"}, {"run_id": "0" * 12}
    problems = {"the state": state, "belongs to run": other, "another result": {"test_nll": 9.0}}
    for problem, values in {**problems, "": {}}.items():  # at last the same row twice
        again = {**rows[0], "result": json.dumps({**json.loads(rows[0]["result"]), **values})}
        pd.DataFrame([*rows, again]).to_csv(tmp_path / "t.csv", index=False)
        fails = pytest.raises(StoreError, match=f"row 4.*{problem}")
        with fails if problem else contextlib.nullcontext():
            assert import_table(tmp_path / "b", tmp_path / "t.csv") == 3
        assert len(RunStore(tmp_path / "b").existing()) == (0 if problem else 3)


def test_rounds_added_at_the_same_time_are_all_recorded(tmp_path):
    path, known = looks.path_of(tmp_path, "rank-smoke"), [Point("lora", tiny_spec())]
    looks.note_look(path, "hash", planned=5)
    looks.note_look(path, "later", planned=9)  # only the first look counts
    with pytest.raises(SpecError, match="must not change after a look"):
        looks.append(path, [], "later", known)

    def add(seed):
        looks.append(path, [{"like": known[0].id, "lr": 1e-3, "seed": 1 + seed}], "hash", known)

    add(0)
    with pytest.raises(SpecError, match="nothing to add"):
        add(0)  # by a command that did not see the first one's runs
    at_once(3, lambda number: add(1 + number))
    rounds = looks.read(path)
    assert [r["round"] for r in rounds] == [2, 3, 4, 5]
    assert {r["runs"][0]["seed"] for r in rounds} == {1, 2, 3, 4}
    with pytest.raises(SpecError, match="optional stopping"):
        add(9)


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


def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path):
    lock, counter = tmp_path / "lock", tmp_path / "n"
    counter.write_text("0")

    def count(_):
        for _ in range(20):
            with files.locked(lock, 60):
                n = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(n + 1))

    at_once(4, count)
    assert counter.read_text() == "80"
    at_once(1, lambda _: files.locked(lock, 60).__enter__() and None)  # it dies with the lock
    waited = []
    with files.locked(lock, 0), pytest.raises(StoreError, match="another command holds"):
        files.locked(lock, 0.5, waited.append).__enter__()
    assert len(waited) == 1


# ---------------------------------------------------------------- copies for Weights & Biases


POINT = Point("lora", tiny_spec())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Return a store of one finished run, and a W&B that writes a line a record."""

    def init(id, dir=None, **_):
        n = len(list(tmp_path.rglob("offline-run-*")))
        file = Path(dir or tmp_path, "wandb", f"offline-run-{n}-{id}", "run")
        file.parent.mkdir(parents=True)

        def log(values, step):
            with file.open("a") as f:
                f.write(f"{step}\n")

        return SimpleNamespace(log=log, summary={}, finish=lambda: log({}, "end"))

    errors, api = SimpleNamespace(Error=ConnectionError), SimpleNamespace(api_key=None)
    fake = SimpleNamespace(init=init, Settings=lambda **_: None, errors=errors, api=api)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("lorasweep.tracking.wandb.check_installed", lambda *_: None)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "runs").mkdir()
    records = [{"step": k, "loss": 1.0} for k in (1, 2)]
    given = {"result": {"test_nll": 1.0}, "folder": tmp_path / "runs", "records": records}
    return SimpleNamespace(**{name: lambda run, v=value: v for name, value in given.items()})


@pytest.mark.parametrize("place", ["records", "write_text", "rename"])
def test_a_kill_leaves_one_whole_copy(world, tmp_path, monkeypatch, place):
    """While the records are copied; before the mark; between the mark and the move."""

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        kill = Mock(side_effect=SystemExit)
        patch.setattr(world if place == "records" else Path, place, kill)
        mirror([POINT], world, "g")
    assert [mirror([POINT], world, "g") for _ in range(2)][1] == 0
    (copy,) = (tmp_path / "wandb").rglob("run")
    assert copy.parent.parent == tmp_path / "wandb"
    assert copy.read_text().split() == ["1", "2", "end"]


def test_what_wandb_lacks_is_said_before_training_and_costs_no_answer(
    world, monkeypatch, tmp_path, capsys
):
    """A folder; a key; at last the network."""
    (tmp_path / "file").touch()
    with (
        monkeypatch.context() as m,
        pytest.raises(StoreError, match=r"WANDB_DIR=.*it is no folder"),
    ):
        m.setenv("WANDB_DIR", f"{tmp_path}/file")
        mirror([POINT], world, "g")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(SpecError, match="wandb login"):
        check()
    wandb = sys.modules["wandb"]
    wandb.api.api_key, wandb.init = "key", Mock(side_effect=ConnectionError("no network"))
    assert mirror([POINT], world, "g") == 0 and "no network" in capsys.readouterr().err
