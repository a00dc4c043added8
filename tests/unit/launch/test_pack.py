"""One pack: what a worker does when its claims are taken over, when it is stopped, and how often it
looks at the run folder."""

import dataclasses
import errno
import io
import itertools
import json
import os
import threading

import pytest
import torch

from lorasweep.launch import pack, process
from lorasweep.launch.pack import LOOK_S, execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint, claims, files
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event
from tests.world import tiny_spec

SLOW = Exec(checkpoint_s=1e9)
"""No checkpoint is due before the end."""


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: the clock of the pack's pack."""
    now = [0.0]
    monkeypatch.setattr(pack.time, "monotonic", lambda: now[0])
    return now


def take_over(store, rid):
    """Claim a run as another process does that believes its owner dead, and cut its records."""
    owner = json.dumps(claims.this_process()).encode()
    assert files.create_folder_once(store.folder(rid) / "attempts" / "2", {"owner.json": owner})
    store.cut_records(rid, 0)


def trainer_of(steps, before=lambda step: None):
    """A trainer of `steps` updates that calls `before` ahead of each and drops what it is told to;
    its `updates` are the steps that each run was trained for."""
    updates = {}

    def trainer(pack, exec_, resume):
        ids = [s.id for s in pack]
        for step in range(1, steps + 1):
            before(step)
            for i in ids:
                updates.setdefault(i, []).append(step)
            ended = {i: ("done", {"test_nll": 1.0}) for i in ids} if step == steps else {}

            def snapshot(step=step, ids=tuple(ids)):
                state = {"tensors": {"param/w": torch.zeros(1)}, "meta": {"step": step}}
                return dict.fromkeys(ids, state)

            event = Event(step, {i: {"step": step} for i in ids}, ended, snapshot)
            yield event
            ids = [i for i in ids if i not in event.dropped]

    trainer.updates = updates
    return trainer


def run(store, specs, trainer, exec_=SLOW, stop=None):
    execute(specs, exec_, store, trainer, lambda event: None, stop or StopFlag())


def steps_of(store, rid):
    return [record["step"] for record in store.records(rid)]


@pytest.mark.parametrize("n_lost", [1, 2])
def test_runs_that_were_taken_over_are_trained_no_further(tmp_path, clock, n_lost):
    """One update a second: the loss is seen within LOOK_S, and the rest of the pack goes on."""
    store, specs, steps, lost_at = RunStore(tmp_path), [tiny_spec(seed=k) for k in range(2)], 50, 8
    ids = [s.id for s in specs]

    def before(step):
        clock[0] += 1
        if step == lost_at:
            for rid in ids[:n_lost]:
                take_over(store, rid)

    trainer = trainer_of(steps, before)
    run(store, specs, trainer)
    assert trainer.updates[ids[0]][-1] <= lost_at + LOOK_S + 1
    assert store.end(ids[0], 1) == {"state": "stopped", "cause": "another process took over"}
    assert steps_of(store, ids[0]) == [] and store.result(ids[0]) is None
    assert not (store.folder(ids[0]) / "checkpoint").exists()
    if n_lost == 1:
        assert steps_of(store, ids[1]) == list(range(1, steps + 1))
        assert store.state(ids[1]) == "done"
    else:
        assert max(map(len, trainer.updates.values())) <= lost_at + LOOK_S + 1


def test_nothing_is_written_for_a_run_lost_since_the_last_look(tmp_path, clock):
    """Neither at its end, nor by a checkpoint, nor after a failure."""
    often = Exec(checkpoint_s=0)
    for name, exec_, breaks in (("end", SLOW, 0), ("save", often, 0), ("failure", SLOW, 5)):
        store, spec = RunStore(tmp_path / name), tiny_spec()

        def before(step, store=store, spec=spec, breaks=breaks):
            clock[0] += 0.1
            if step == 4:
                take_over(store, spec.id)
            if step == breaks:
                raise RuntimeError("broken")

        run(store, [spec], trainer_of(5, before), exec_)
        assert steps_of(store, spec.id) == [] and store.result(spec.id) is None
        assert store.end(spec.id, 1)["cause"] == "another process took over"
        slots = checkpoint.described(store.folder(spec.id) / "checkpoint")
        assert max(slots, default=0) <= 3


def test_no_checkpoint_is_written_for_a_run_lost_while_the_others_were(
    tmp_path, clock, monkeypatch
):
    store, specs = RunStore(tmp_path), [tiny_spec(seed=k) for k in range(2)]
    ids, save, saved = [s.id for s in specs], checkpoint.save, []

    def slow_save(folder, state):
        save(folder, state)
        saved.append(folder.parent.name)
        if len(saved) == 1:
            take_over(store, ids[1])

    monkeypatch.setattr(pack.checkpoint, "save", slow_save)
    stop = StopFlag()
    stop.set = True
    with pytest.raises(Stopped):
        run(store, specs, trainer_of(3), stop=stop)
    assert saved == [ids[0]] and not (store.folder(ids[1]) / "checkpoint").exists()


def test_between_two_looks_an_update_touches_no_file(tmp_path, clock, monkeypatch):
    store, specs, calls = RunStore(tmp_path), [tiny_spec(seed=k) for k in range(3)], []

    def counted(name, real):
        def call(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("open", "write", "stat", "lstat", "scandir", "listdir", "fsync", "mkdir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(io, "open", counted("io.open", io.open))
    by_update = []

    def before(step):
        clock[0] += 0.5
        by_update.append(len(calls))

    run(store, specs, trainer_of(60, before))
    cost = [after - ahead for ahead, after in itertools.pairwise(by_update)]
    assert cost[0] > 0  # the first update shows that the runs have begun
    looks = [update for update, n in enumerate(cost[1:], start=2) if n]
    assert len(looks) == 30 // LOOK_S - 1 and max(cost[1:]) <= 8 * len(specs)
    assert all(steps_of(store, s.id) == list(range(1, 61)) for s in specs)


def test_a_stop_is_answered_after_the_update_and_a_failure_keeps_its_records(tmp_path, clock):
    store, spec, stop = RunStore(tmp_path), tiny_spec(), StopFlag()

    def stopping(step):
        stop.set = step == 7

    trainer = trainer_of(50, stopping)
    with pytest.raises(Stopped):
        run(store, [spec], trainer, stop=stop)
    assert trainer.updates[spec.id][-1] == 7 and steps_of(store, spec.id) == list(range(1, 8))
    assert set(checkpoint.described(store.folder(spec.id) / "checkpoint")) == {7}

    def failing(step):
        if step == 6:
            raise OSError(errno.EIO, "broken")

    other = tiny_spec(seed=1)
    run(store, [other], trainer_of(9, failing))
    assert store.state(other.id) == "failed" and "broken" in store.failure(other.id)
    assert steps_of(store, other.id) == [1, 2, 3, 4, 5]


def test_waiting_threads_of_a_worker_sleep_unless_the_user_wants_them_to_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert process.worker_environment(2)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert process.worker_environment(2)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_stop_during_the_pretraining_of_a_base_is_answered_after_one_update(tmp_path):
    spec = tiny_spec()
    recipe = dataclasses.replace(spec.model.recipe, steps=5000, batch_size=2)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, recipe=recipe))
    store, stop = RunStore(tmp_path / "runs"), StopFlag()
    stop.set = True
    with pytest.raises(Stopped):
        run(store, [spec], TorchTrainer(stop), Exec(models_dir=[str(tmp_path)]), stop)
    assert store.end(spec.id, 1)["state"] == "stopped" and not list(tmp_path.glob("*.safetensors"))
