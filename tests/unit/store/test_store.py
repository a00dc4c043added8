"""The run folder: faults, states, records, checkpoints, tables, looks, owners, failing reads; folders
that are replaced; copies for W&B."""

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

from lorasweep.errors import SpecError, StoreError
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.slurm import queue
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint, files, folders, looks, owners
from lorasweep.store.exported import import_table, load_runs
from lorasweep.store.folders import MARK, replaced
from lorasweep.store.owners import Liveness
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.unit.launch.trainers import Scripted, steps_of, train
from tests.world import tiny_spec, write_json


def save(folder, *steps):
    for step in steps:
        meta = {"step": step, "layout": ["x"], "records_size": 0}
        tensors = {"param/w": torch.full((3,), float(step))}
        checkpoint.save(folder, {"tensors": tensors, "meta": meta})


def at_once(count, do):
    """Call do(k) in `count` processes that live until all have returned; return what they return."""
    fork = multiprocessing.get_context("fork")
    start, end, out = fork.Barrier(count), fork.Barrier(count), fork.Queue()

    def work(k):
        start.wait()
        out.put(do(k))
        end.wait()

    processes = [fork.Process(target=work, args=(k,), daemon=True) for k in range(count)]
    for p in processes:
        p.start()
    found = [out.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    return found


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


@pytest.fixture
def change_owner(store):
    """`change_owner(rid, **fields)` changes the recorded owner of a run's last attempt."""

    def change(rid, **fields):
        path = store.attempt(rid, store.last_attempt(rid)) / "owner.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


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


OPERATIONS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rename", "rmdir")


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

        return operation if name in (*OPERATIONS, "ftruncate") else real


@pytest.mark.parametrize("how", ["error", "short", "kill"])
def test_any_file_operation_may_fail_and_the_run_still_ends_exactly_once(tmp_path, how):
    spec, reached, at = tiny_spec(), True, 0
    while reached:
        store, at = RunStore(tmp_path / f"{at}"), at + 1
        store.prepare()
        pid = os.fork()
        if pid == 0:  # works with a fault
            files.os = faulty = FaultyOS(at, how)
            with contextlib.suppress(OSError):
                work(RunStore(store.root), spec)
            os._exit(7 if faulty.count >= at else 0)
        _, status = os.waitpid(pid, 0)
        reached = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 7
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
    assert owners.start_time(os.getpid()) == owners.UNKNOWN and owners.start_time(2**22 - 1) == ""
    assert liveness.verdict(attempt) is None and liveness.alive(attempt)
    monkeypatch.undo()
    change_owner(spec.id, started=owners.UNKNOWN)  # too many files were open at its claim
    assert Liveness().verdict(attempt) is None and Liveness().alive(attempt)
    change_owner(spec.id, pid=DEAD_PID)
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


@pytest.fixture
def failing(monkeypatch):
    """failing(name, number, times): reads of files or folders of this name fail with this error;
    failing(): no more."""
    monkeypatch.setattr(files, "PAUSES_S", (0, 0))
    left: dict[str, list[int]] = {}

    def wrap(module, function):
        real = getattr(module, function)

        def call(path, *args, **kwargs):
            name = os.path.basename(path) if isinstance(path, str | os.PathLike) else None
            of_folder = name in ("attempts", ".slurm")
            fault = left.get(name) if not of_folder or function == "listdir" else None
            if fault and fault[1] > 0:
                fault[1] -= 1
                raise OSError(fault[0], os.strerror(fault[0]), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, function, call)

    for where in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "listdir")):
        wrap(*where)

    def fail(name=None, number=0, times=10**6):
        left.clear()
        left[name] = [number, times if name else 0]

    return fail


@pytest.fixture
def runs(store, monkeypatch):
    """A store with one run in each of some states, a submission, and a record of looks."""
    kinds = ("done", "running", "failed", "damaged")
    specs = {kind: tiny_spec(seed=k) for k, kind in enumerate(kinds)}
    for kind, spec in specs.items():
        n = store.claim(spec)
        store.write_env(spec.id, n, {"threads": 1})
        store.record(spec.id, {"step": 1})
        if kind == "failed":
            store.write_end(spec.id, n, "failed", "out of memory")
        if kind in ("done", "damaged"):
            store.finish(spec.id, "done", {"test_nll": 2.5, "curve": [], "base_sha256": "x"})
    ids, looks_path = {kind: spec.id for kind, spec in specs.items()}, store.root / "looks.json"
    path = store.folder(ids["damaged"]) / "result.json"
    path.write_bytes(path.read_bytes()[:-9])
    slots = store.folder(ids["running"]) / "checkpoint"
    save(slots, 3, 4)
    folder = queue.home(store.root) / "s"
    write_json(folder / "submission.json", [{"sweep": "t", "tasks": [["x"]]}])
    job = queue.Job("12", "12", 0, "RUNNING", "", 0, "", "s-0", f"{folder}/0.sh")
    monkeypatch.setattr(queue, "jobs_of", lambda runs_dir: [job])
    looks.note_look(looks_path, "x", 2)
    paths = {"slots": slots, "submission": folder, "looks": looks_path}
    return SimpleNamespace(store=store, specs=specs, id=ids, **paths)


READERS = [
    ("result.json", lambda r: r.store.state(r.id["done"])),
    ("result.json", lambda r: r.store.states([r.id["done"]])),
    ("result.json", lambda r: r.store.claim(r.specs["done"])),
    ("result.json", lambda r: r.store.claim(r.specs["damaged"])),
    ("attempts", lambda r: r.store.state(r.id["running"])),
    ("attempts", lambda r: r.store.claim(r.specs["running"])),
    ("end.json", lambda r: r.store.states([r.id["failed"]])),
    ("end.json", lambda r: r.store.failures(r.id["failed"])),
    ("end.json", lambda r: r.store.claim(r.specs["failed"])),
    ("spec.json", lambda r: r.store.spec(r.id["done"])),
    ("spec.json", lambda r: r.store.claim(r.specs["failed"])),
    ("env.json", lambda r: r.store.env(r.id["done"])),
    ("metrics.jsonl", lambda r: r.store.records(r.id["done"])),
    ("metrics.jsonl", lambda r: r.store.records_size(r.id["done"])),
    ("a.json", lambda r: checkpoint.load_pack({"x": r.slots})),
    ("a.json", lambda r: checkpoint.keep_only(r.slots, 3)),
    ("a.json", lambda r: save(r.slots, 5)),
    ("a.json", lambda r: checkpoint.layout(r.slots)),
    ("b.safetensors", lambda r: checkpoint.load(r.slots, 4)),
    ("submission.json", lambda r: queue.read(r.submission)),
    ("submission.json", lambda r: queue.look(r.store.root)),
    (".slurm", lambda r: queue.look(r.store.root)),
    ("looks.json", lambda r: looks.read(r.looks)),
    ("looks.json", lambda r: looks.note_look(r.looks, "x", 1)),
]


@pytest.mark.parametrize("name", dict(READERS))
def test_a_read_error_is_raised_and_nothing_follows_from_it(runs, tmp_path, failing, name):
    def everything():
        files = (p for p in tmp_path.rglob("*") if p.is_file() and p.name != "heartbeat")
        return {p: p.read_bytes() for p in files}

    before = everything()
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES):
        for reader in (read for of, read in READERS if of == name):
            failing(name, number)
            with pytest.raises(StoreError, match=f"{name} cannot be read"):
                reader(runs)
            failing()
            assert everything() == before


def test_a_read_that_fails_for_a_moment_is_tried_again(runs, failing, monkeypatch):
    for name, number, reader in (
        ("result.json", errno.ESTALE, lambda r: r.store.state(r.id["done"]) == "done"),
        ("b.safetensors", errno.EIO, lambda r: checkpoint.load(r.slots, 4)),
        ("submission.json", errno.EMFILE, lambda r: queue.read(r.submission).tasks == [["x"]]),
    ):
        failing(name, number, 2)
        assert reader(runs)
    # a checkpoint is not lost where its reader says "no such file", as when too many are open
    monkeypatch.setattr("safetensors.torch.load_file", Mock(side_effect=FileNotFoundError))
    with pytest.raises(StoreError, match="cannot be read"):
        checkpoint.load(runs.slots, 4)


def test_a_worker_that_cannot_read_a_checkpoint_stops_and_loses_nothing(store, failing):
    """Not failed, and not from the start: the next attempt resumes where the last one ended."""
    spec, stop = tiny_spec(), StopFlag()

    def before(step, *_):
        stop.set = len(trainer.tried) == 1 and step == 5

    trainer = Scripted(8, before)
    with pytest.raises(Stopped):
        train(store, [spec], trainer, stop=stop)
    failing("a.json", errno.EIO)
    with pytest.raises(StoreError, match="cannot be read"):
        train(store, [spec], trainer, stop=stop)
    failing()
    assert store.end(spec.id, 2)["state"] == "stopped" and store.failures(spec.id) == 0
    train(store, [spec], trainer, stop=stop)
    assert [t[3] for t in trainer.tried] == [0, 5] and store.state(spec.id) == "done"
    assert steps_of(store, spec.id) == list(range(1, 9))


def test_a_failure_is_recorded_for_the_runs_that_can_be_read(store, failing):
    """The reported cause is the failure, not the read that failed after it."""
    specs = [tiny_spec(seed=k) for k in range(2)]

    def before(step, *_):
        if step == 2:
            failing("result.json", errno.EIO, len(files.PAUSES_S) + 1)  # of the first run
            raise RuntimeError("broken")

    with pytest.raises(StoreError, match=rf"{specs[0].id} \(RuntimeError: broken\) cannot be wr"):
        train(store, specs, Scripted(3, before))
    assert store.end(specs[0].id, 1) is None
    assert store.failure(specs[1].id) == "RuntimeError: broken"
    assert steps_of(store, specs[1].id) == [1]  # a failed run keeps its records


def test_an_owner_is_dead_after_a_silence_and_not_because_it_cannot_be_read(
    runs, change_owner, monkeypatch, failing
):
    """Of one elsewhere only its heartbeat's content counts, by our own clock."""
    store, spec, rid = runs.store, runs.specs["running"], runs.id["running"]
    failing("owner.json", errno.EIO)
    assert store.states([rid]) == {rid: "running"} and store.claim(spec) is None
    failing()
    assert store.last_attempt(rid) == 1
    attempt, clock, liveness = store.attempt(rid, 1), [0.0], Liveness()
    change_owner(rid, boot="other", host="elsewhere")
    monkeypatch.setattr(owners.time, "monotonic", lambda: clock[0])
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing("heartbeat", errno.ESTALE)
    clock[0] += 10 * owners.SILENCE_S
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing()
    for beat in ("5", "6"):
        (attempt / "heartbeat").write_text(beat)
        assert liveness.alive(attempt)
        clock[0] += owners.SILENCE_S - 1
        assert liveness.alive(attempt)
    clock[0] += 2
    assert not liveness.alive(attempt)
    (attempt / "owner.json").write_bytes(b"{")  # damaged, which is different
    assert store.state(rid) == "interrupted"


def write(folder, last="facts.json", whole=True, **contents):
    with replaced(folder, last, whole) as partial:
        for name, text in contents.items():
            path = partial / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def files_of(folder):
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_text() for name, p in found.items() if name != MARK}


def exec_in(folder):
    return Exec(runs_dir=str(folder / "runs"), models_dir=[], data_dir=[str(folder / "data")])


def test_only_our_files_are_replaced_and_those_of_the_user_stay(tmp_path):
    out, there = tmp_path / "out", (".git", ".DS_Store", "lost+found")  # as in a new folder
    for name in there:
        (out / name).mkdir(parents=True)
    write(out, facts_json="1", README_md="a", adapter__model="x")
    assert all((out / name).exists() for name in there)
    (out / "notes.txt").write_text("mine")
    write(out, facts_json="2", README_md="b")
    assert files_of(out) == {"facts.json": "2", "README.md": "b", "notes.txt": "mine"}
    write(out, facts_json="1", README_md="a")  # an earlier content is ours, too
    assert files_of(out)["README.md"] == "a"


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda out: (out / "README.md").write_text("edited"), "README.md is not as"),
        (lambda out: (out / "new.txt").write_text("mine"), "new.txt is not as"),
        (lambda out: (out / "new.txt").symlink_to(out.parent / "other"), "new.txt is not as"),
        (lambda out: (out / "new.txt").mkdir(), "new.txt is not as"),
        (lambda out: (out / MARK).unlink(), "no .lorasweep.jsonl"),
        (lambda out: (out / "adapter").symlink_to(out.parent), r"adapter/new\.txt is not as"),
        (lambda out: out.rename(out.parent / "real") and out.symlink_to("real"), "is a link"),
    ],
)
def test_what_the_user_changed_or_added_is_refused_and_kept(tmp_path, spoil, match):
    out = tmp_path / "out"
    write(out, README_md="a", x_txt="1")
    (tmp_path / "other").write_text("mine")
    spoil(out)
    before = files_of(out)
    with pytest.raises(SpecError, match=match):
        write(out, README_md="b", new_txt="2", adapter__new_txt="3")
    assert files_of(out) == before and (tmp_path / "other").read_text() == "mine"
    assert not (tmp_path / "new.txt").exists()


def test_a_name_in_a_marker_cannot_point_outside(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    write(out, README_md="a")
    other.write_text("a")
    with (out / MARK).open("r+") as mark:
        mark.write(mark.read().replace("README.md", "../other.txt"))
    with pytest.raises(SpecError, match="is not as lorasweep wrote it"):
        write(out, facts_json="1")
    assert other.read_text() == "a"


@pytest.mark.parametrize("at", range(6))
def test_after_a_kill_at_any_rename_the_next_command_repairs(tmp_path, monkeypatch, at):
    """An exception that nothing handles stands for the kill; the staged files stay, too."""
    out = tmp_path / "out"
    write(out, facts_json="1", README_md="a", adapter__model="x")
    (out / "notes.txt").write_text("mine")
    steps = iter(range(100))

    def killed(do):
        def one(*given, **more):
            if next(steps) == at:
                raise SystemExit
            return do(*given, **more)

        return one

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(folders.shutil, "rmtree", lambda *a, **k: None)
        m.setattr(folders.os, "replace", killed(os.replace))
        m.setattr(folders.Path, "unlink", killed(Path.unlink))
        write(out, facts_json="2", README_md="b", new_txt="3", more_txt="4")
    assert files_of(out).get("facts.json") != "2"  # the last: so the folder is not complete
    write(out, facts_json="3", README_md="c")
    assert files_of(out) == {"facts.json": "3", "README.md": "c", "notes.txt": "mine"}


def test_commands_at_once_leave_the_files_of_one_also_if_some_fail(tmp_path):
    out = tmp_path / "out"

    def one(k):
        for turn in range(20):
            with contextlib.suppress(ValueError), replaced(out, "facts.json") as partial:
                for name in ("facts.json", "README.md", f"f{turn % 3}.txt"):
                    (partial / name).write_text(f"{k}")
                if k and turn % 2:
                    raise ValueError
        return 0

    assert at_once(4, one) == [0] * 4
    found = files_of(out)
    assert len({*found.values()}) == 1 and len(found) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("os error 28")])
@pytest.mark.parametrize("before", [{}, {"README.md": "a"}])
def test_a_full_disk_leaves_what_was_there(tmp_path, error, before):
    out = tmp_path / "out"
    if before:
        write(out, README_md="a")
    with pytest.raises(StoreError, match="written"), replaced(out, "x") as partial:
        (partial / "README.md").write_text("b")
        raise error
    assert files_of(out) == before and not (out / folders.PARTIAL).exists()


def test_a_folder_of_another_kind_is_refused(tmp_path):
    """An adapter must not take the place of a fleet's rules, nor a search that of a customer."""
    write(tmp_path / "fleet", "fleet.json", fleet_json="{}")
    write(tmp_path / "fleet", "index.html", whole=False, index_html="x")
    for last in ("lorasweep.json", "adapter_model.safetensors"):
        with pytest.raises(SpecError, match="folder of a fleet"):
            folders.check(tmp_path / "fleet", last, exec_in(tmp_path), [])
    folders.check(tmp_path / "fleet", "fleet.json", exec_in(tmp_path), [])
    with replaced(tmp_path / "one", "adapter_model.safetensors") as partial:
        (partial / "adapter_model.safetensors").write_text("x")
    with pytest.raises(SpecError, match="or of an adapter"):
        write(tmp_path / "one", facts_json="1")
    (tmp_path / "one/adapter_model.safetensors").unlink()
    write(tmp_path / "one", facts_json="1")  # nothing is left to lose


def test_a_folder_in_use_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "table.csv").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for out in (".", "runs", "runs/x", "data", "table.csv", "link"):
        with pytest.raises((SpecError, StoreError), match=r"would be mixed|is a link|no folder"):
            folders.check(tmp_path / out, "x", exec_in(tmp_path), [], [tmp_path / "table.csv"])
    folders.check(tmp_path / "new/one", "x", exec_in(tmp_path), [])
    assert sorted(tmp_path.rglob("*")) == before
