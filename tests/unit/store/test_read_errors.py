"""A read that fails says nothing about what is there: no run is taken or ended because of it."""

import builtins
import errno
import io
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from lorasweep.errors import StoreError
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.slurm import queue
from lorasweep.store import checkpoint, claims, files, looks
from tests.unit.launch.trainers import Scripted, steps_of, train
from tests.unit.store.conftest import save
from tests.world import tiny_spec, write_json


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
    attempt, clock, liveness = store.attempt(rid, 1), [0.0], claims.Liveness()
    change_owner(rid, boot="other", host="elsewhere")
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing("heartbeat", errno.ESTALE)
    clock[0] += 10 * claims.SILENCE_S
    assert liveness.alive(attempt) and not liveness.sure(attempt)
    failing()
    for beat in ("5", "6"):
        (attempt / "heartbeat").write_text(beat)
        assert liveness.alive(attempt)
        clock[0] += claims.SILENCE_S - 1
        assert liveness.alive(attempt)
    clock[0] += 2
    assert not liveness.alive(attempt)
    (attempt / "owner.json").write_bytes(b"{")  # damaged, which is different
    assert store.state(rid) == "interrupted"
