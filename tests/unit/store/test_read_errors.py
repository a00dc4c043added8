"""A read that fails says nothing about what is there: no reader takes a run for free, finished or
failed because of it, and none gives up a checkpoint."""

import builtins
import errno
import io
import json
import os

import pytest
import torch

from lorasweep.errors import StoreError
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.slurm import submissions
from lorasweep.launch.slurm.submissions import Array, Submission
from lorasweep.launch.worker import skipped
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint, claims, files, looks
from lorasweep.store.claims import Lock
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event
from tests.world import tiny_spec

RESULT = {"test_nll": 2.5, "curve": [], "base_sha256": "x"}
FOLDERS = ("attempts", "jobs", "lock", ".slurm")
ERRORS = {"EIO": errno.EIO, "ESTALE": errno.ESTALE, "EMFILE": errno.EMFILE, "EACCES": errno.EACCES}


@pytest.fixture
def failing(monkeypatch):
    """failing(name, number, times): the next `times` reads of a file of this name fail, or lists of a
    folder."""
    monkeypatch.setattr(files, "PAUSES_S", (0, 0))
    left: dict[str, list[int]] = {}
    listdir = os.listdir

    def wrap(real):
        def call(path, *args, **kwargs):
            name = os.path.basename(path) if isinstance(path, str | os.PathLike) else None
            fault = left.get(name) if real is listdir or name not in FOLDERS else None
            if fault and fault[1] > 0:
                fault[1] -= 1
                raise OSError(fault[0], os.strerror(fault[0]), str(path))
            return real(path, *args, **kwargs)

        return call

    for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "listdir")):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))

    def fail(name, number, times=10**6):
        left.clear()
        left[name] = [number, times]

    fail.stop = left.clear
    return fail


def state(step):
    meta = {"step": step, "layout": ["x"], "records_size": 0, "threads": 1, "wall_s": 0.0}
    return {
        "tensors": {"param/w": torch.full((3,), float(step))},
        "meta": {**meta, "micro_batch_size": None},
    }


@pytest.fixture
def runs(tmp_path):
    """(store, its runs by what they are, a submission's folder, a lock's folder)."""
    store = RunStore(tmp_path / "runs")
    kinds = ("done", "running", "failed", "damaged")
    specs = {kind: tiny_spec(seed=k) for k, kind in enumerate(kinds)}
    for kind, spec in specs.items():
        n = store.claim(spec)
        store.write_env(spec.id, n, {"threads": 1})
        store.record(spec.id, {"step": 1})
        if kind == "failed":
            store.write_end(spec.id, n, "failed", "out of memory")
        if kind in ("done", "damaged"):
            store.finish(spec.id, "done", RESULT)
    path = store.folder(specs["damaged"].id) / "result.json"
    path.write_bytes(path.read_bytes()[:-9])
    slots = store.folder(specs["running"].id) / "checkpoint"
    for step in (3, 4):
        checkpoint.save(slots, state(step))
    folder = submissions.home(store.root) / "s"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "12_submitted.pkl").write_bytes(b"")
    array = Array("0", "s-0", 0, 1)
    submissions.write_record(folder, "t", [], [["x"]], [array])
    submissions.note_array(folder, "0", "12")
    submissions.withdraw(submissions.read(folder), ["x"])
    submissions.note(folder, "ended.json").write_text("{}")
    looks.note_look(store.root / "looks.json", "x", 2)
    lock = tmp_path / "lock"
    Lock(lock).acquire(5, print)
    return store, specs, folder, lock


READERS = {
    "result.json": (
        lambda store, specs, *_: store.state(specs["done"].id),
        lambda store, specs, *_: store.states([specs["done"].id]),
        lambda store, specs, *_: store.claim(specs["done"]),
        lambda store, specs, *_: store.claim(specs["damaged"]),
    ),
    "attempts": (
        lambda store, specs, *_: store.state(specs["running"].id),
        lambda store, specs, *_: store.claim(specs["running"]),
        lambda store, specs, *_: store.owns(specs["running"].id, 1),
    ),
    "end.json": (
        lambda store, specs, *_: store.states([specs["failed"].id]),
        lambda store, specs, *_: store.failures(specs["failed"].id),
        lambda store, specs, *_: store.claim(specs["failed"]),
    ),
    "spec.json": (
        lambda store, specs, *_: store.spec(specs["done"].id),
        lambda store, specs, *_: store.claim(specs["failed"]),
    ),
    "env.json": (lambda store, specs, *_: store.layout(specs["done"].id),),
    "metrics.jsonl": (
        lambda store, specs, *_: store.records(specs["done"].id),
        lambda store, specs, *_: store.records_size(specs["done"].id),
    ),
    "a.json": (
        lambda store, specs, *_: checkpoint.load_pack({"x": slots_of(store, specs)}),
        lambda store, specs, *_: checkpoint.keep_only(slots_of(store, specs), 3),
        lambda store, specs, *_: checkpoint.save(slots_of(store, specs), state(5)),
        lambda store, specs, *_: checkpoint.layout(slots_of(store, specs)),
    ),
    "b.safetensors": (lambda store, specs, *_: checkpoint.load(slots_of(store, specs), 4),),
    "submission.json": (lambda store, specs, folder, _: submissions.read(folder),),
    "array-0.json": (lambda store, specs, folder, _: submissions.read(folder),),
    "withdrawn.json": (
        lambda store, specs, folder, _: submissions.read(folder),
        lambda store, specs, folder, _: skipped(str(submissions.note(folder, "withdrawn.json"))),
    ),
    "ended.json": (lambda store, *_: submissions.read_all(store.root),),
    ".slurm": (lambda store, *_: submissions.read_all(store.root),),
    "jobs": (lambda store, specs, folder, _: Submission(folder, {}, []).complete(ARRAY, "12"),),
    "looks.json": (
        lambda store, *_: looks.read(store.root / "looks.json"),
        lambda store, *_: looks.note_look(store.root / "looks.json", "x", 1),
    ),
    "released": (lambda store, specs, folder, lock: Lock(lock).acquire(0, print),),
    "lock": (lambda store, specs, folder, lock: Lock(lock).acquire(0, print),),
}
ARRAY = Array("0", "s-0", 0, 1)


def slots_of(store, specs):
    return store.folder(specs["running"].id) / "checkpoint"


def everything(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "heartbeat"}


@pytest.mark.parametrize("number", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("name", READERS)
def test_a_read_error_is_said_and_nothing_follows_from_it(runs, tmp_path, failing, name, number):
    before = everything(tmp_path)
    for reader in READERS[name]:
        failing(name, number)
        with pytest.raises(StoreError, match=f"{name} cannot be read .*nothing was concluded"):
            reader(*runs)
        failing.stop()
        assert everything(tmp_path) == before


def test_a_read_that_fails_for_a_moment_is_made_again(runs, failing):
    store, specs, folder, _ = runs
    failing("result.json", errno.ESTALE, 2)
    assert store.state(specs["done"].id) == "done"
    failing("b.safetensors", errno.EIO, 1)
    assert checkpoint.load_pack({"x": slots_of(store, specs)})["x"]["meta"]["step"] == 4
    failing("array-0.json", errno.EMFILE, 2)
    assert submissions.read(folder).arrays[0].job == "12"


def test_a_checkpoint_that_safetensors_cannot_open_is_not_lost(runs, monkeypatch, failing):
    """Its reader says "no such file" when too many are open."""
    store, specs, *_ = runs
    monkeypatch.setattr(
        "safetensors.torch.load_file", lambda p: (_ for _ in ()).throw(FileNotFoundError(p))
    )
    with pytest.raises(StoreError, match="cannot be read"):
        checkpoint.load(slots_of(store, specs), 4)


def test_a_worker_that_cannot_read_a_checkpoint_stops_and_loses_nothing(tmp_path, failing):
    """Not failed, and not from the start: the next attempt goes on where the last one ended."""
    store, spec, stop, started = RunStore(tmp_path), tiny_spec(), StopFlag(), []

    def trainer(pack, exec_, resume):
        started.append(resume[spec.id]["meta"]["step"] if resume else 0)
        for step in range(started[-1] + 1, 9):
            stop.set = len(started) == 1 and step == 5
            ended = {spec.id: ("done", RESULT)} if step == 8 else {}
            yield Event(step, {spec.id: {"step": step}}, ended, lambda k=step: {spec.id: state(k)})

    def run():
        execute([spec], Exec(), store, trainer, lambda event: None, stop)

    with pytest.raises(Stopped):
        run()
    failing("a.json", errno.EIO)
    with pytest.raises(StoreError, match="cannot be read"):
        run()
    failing.stop()
    assert store.end(spec.id, 2)["state"] == "stopped" and store.failures(spec.id) == 0
    run()
    assert started == [0, 5] and store.state(spec.id) == "done"
    assert [r["step"] for r in store.records(spec.id)] == list(range(1, 9))


def test_a_failure_is_recorded_for_the_runs_that_can_be_read(tmp_path, failing):
    """The cause that is reported is the failure, not what could not be read after it."""
    store, specs = RunStore(tmp_path), [tiny_spec(seed=k) for k in range(2)]

    def trainer(pack, exec_, resume):
        yield Event(1, {s.id: {"step": 1} for s in pack}, {}, dict)
        failing("result.json", errno.EIO, len(files.PAUSES_S) + 1)  # of the first run
        raise RuntimeError("broken")

    execute(specs, Exec(), store, trainer, lambda event: None, StopFlag())
    assert (
        store.end(specs[0].id, 1) is None and store.failure(specs[1].id) == "RuntimeError: broken"
    )


def test_a_heartbeat_that_cannot_be_read_is_no_silence(runs, monkeypatch, failing):
    store, specs, *_ = runs
    attempt = store.folder(specs["running"].id) / "attempts" / "1"
    owner = json.loads((attempt / "owner.json").read_text())
    (attempt / "owner.json").write_text(json.dumps({**owner, "host": "elsewhere"}))
    clock = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    liveness = claims.Liveness()
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing("heartbeat", errno.ESTALE)
    clock[0] += 10 * claims.SILENCE_S
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing.stop()
    clock[0] += claims.SILENCE_S - 1
    assert liveness.alive(attempt)
    clock[0] += 2
    assert not liveness.alive(attempt)


def test_an_owner_that_could_not_tell_its_start_time_is_not_called_dead(runs):
    """As when it had too many files open at its claim."""
    store, specs, *_ = runs
    attempt = store.folder(specs["running"].id) / "attempts" / "1"
    owner = json.loads((attempt / "owner.json").read_text())
    (attempt / "owner.json").write_text(json.dumps({**owner, "started": claims.UNKNOWN}))
    liveness = claims.Liveness()
    assert liveness.verdict(attempt) is None and liveness.alive(attempt)
    (attempt / "owner.json").write_text(
        json.dumps({**owner, "started": claims.UNKNOWN, "pid": 2**22 + 1})
    )
    assert liveness.verdict(attempt) is False
