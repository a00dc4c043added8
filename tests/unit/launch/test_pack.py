"""A pack in a worker: runs that others take over, stops, the run folder; workers between stages."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lorasweep.errors import StoreError, TrainingError
from lorasweep.launch import pack, process
from lorasweep.launch.local import Workers, run_points
from lorasweep.launch.pack import LOOK_S
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.lora import LoRA
from lorasweep.store import checkpoint, claims, files
from lorasweep.store.run_store import RunStore
from tests.unit.launch.trainers import Scripted, steps_of, train
from tests.world import tiny_spec


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: the clock of the pack's training."""
    now = [0.0]
    monkeypatch.setattr(pack.time, "monotonic", lambda: now[0])
    return now


def take_over(store, rid):
    """Claim a run as another process that believes its owner dead, and cut its records."""
    owner = json.dumps(claims.this_process()).encode()
    assert files.create_folder_once(store.attempt(rid, 2), {"owner.json": owner})
    store.cut_records(rid, 0)


@pytest.fixture
def pair(tmp_path):
    """A store, and two runs."""
    return RunStore(tmp_path / "runs"), [tiny_spec(seed=k) for k in range(2)]


def saved_steps(store, rid):
    return checkpoint.described(store.folder(rid) / "checkpoint")


@pytest.mark.parametrize("n_lost", [1, 2])
def test_runs_that_were_taken_over_are_trained_no_further(pair, clock, n_lost):
    (store, specs), steps, lost_at = pair, 50, 8
    ids = [s.id for s in specs]

    def before(step, *_):
        clock[0] += 1
        for rid in ids[:n_lost] if step == lost_at else ():
            take_over(store, rid)

    trainer = Scripted(steps, before)
    train(store, specs, trainer)
    for rid in ids[:n_lost]:
        assert trainer.updates[rid][-1] <= lost_at + LOOK_S + 1
        assert store.end(rid, 1)["state"] == "stopped" and store.result(rid) is None
        assert steps_of(store, rid) == [] and not saved_steps(store, rid)
    for rid in ids[n_lost:]:
        assert steps_of(store, rid) == list(range(1, steps + 1)) and store.state(rid) == "done"


@pytest.mark.parametrize(("checkpoint_s", "breaks"), [(1e9, 0), (0, 0), (1e9, 5)])
def test_nothing_is_written_for_a_run_lost_since_a_check(pair, clock, checkpoint_s, breaks):
    """At its end, at a checkpoint, at a failure."""
    store, (spec, _) = pair

    def before(step, *_):
        clock[0] += 0.1
        if step == 4:
            take_over(store, spec.id)
        if step == breaks:
            raise RuntimeError("broken")

    train(store, [spec], Scripted(5, before), checkpoint_s=checkpoint_s)
    assert steps_of(store, spec.id) == [] and store.result(spec.id) is None
    assert store.end(spec.id, 1)["state"] == "stopped"
    assert max(saved_steps(store, spec.id), default=0) <= 3


def test_a_run_lost_while_others_are_saved_is_not_saved(pair, monkeypatch):
    (store, specs), save, saved, stop = pair, checkpoint.save, [], StopFlag()

    def slow_save(folder, state):
        save(folder, state)
        saved.append(folder.parent.name)
        if len(saved) == 1:
            take_over(store, specs[1].id)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    stop.set = True
    with pytest.raises(Stopped):
        train(store, specs, Scripted(3), stop=stop)
    assert saved == [specs[0].id] and not saved_steps(store, specs[1].id)


def test_a_run_that_cannot_be_claimed_is_an_error_and_no_failure_of_others(pair, monkeypatch):
    (store, specs), claim = pair, pair[0].claim

    def of_another_user(spec):
        if spec is specs[1]:
            raise PermissionError(errno.EACCES, "Permission denied", f"{store.root}/attempts/1")
        return claim(spec)

    monkeypatch.setattr(store, "claim", of_another_user)
    with pytest.raises(StoreError, match="attempts/1 cannot be read or written"):
        train(store, specs, Scripted(1))
    assert store.end(specs[0].id, 1)["state"] == "stopped"


@pytest.mark.parametrize(("number", "state"), [(errno.ENOENT, "failed"), (errno.ENOSPC, "stopped")])
def test_a_file_of_a_run_that_is_gone_fails_it_alone_and_a_full_disk_stops_all(pair, number, state):
    store, specs = pair

    def before(*_):
        raise OSError(number, "said", f"{store.root}-of-rows/rows.jsonl")

    with pytest.raises(StoreError) if state == "stopped" else contextlib.nullcontext():
        train(store, specs, Scripted(1, before))
    assert {store.end(s.id, 1)["state"] for s in specs} == {state}


def test_a_stop_during_the_pretraining_of_a_base_takes_effect_after_one_update(tmp_path):
    spec = tiny_spec()
    recipe = dataclasses.replace(spec.model.recipe, steps=5000, batch_size=2)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, recipe=recipe))
    store, stop = RunStore(tmp_path / "runs"), StopFlag()
    stop.set = True
    with pytest.raises(Stopped):
        train(store, [spec], TorchTrainer(stop), stop=stop, models_dir=[str(tmp_path)])
    assert store.end(spec.id, 1)["state"] == "stopped" and not list(tmp_path.glob("*.safetensors"))


def test_a_second_signal_ends_a_worker_that_cannot_stop(monkeypatch):
    """In a job only Ctrl-C does: Slurm's TERM and USR2 come in any number."""
    clock, ended, stop = [0.0], Mock(), StopFlag()
    monkeypatch.setattr(process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(process.os, "_exit", ended)
    for after, number, inside, ends in (
        (0, signal.SIGINT, False, 0),
        (1, signal.SIGINT, False, 0),
        (3, signal.SIGTERM, True, 0),
        (3, signal.SIGTERM, False, 1),
        (3, signal.SIGINT, True, 2),
    ):
        monkeypatch.setenv(claims.JOB_VARIABLE, "1")
        if not inside:
            monkeypatch.delenv(claims.JOB_VARIABLE)
        clock[0] = after
        stop._handle(number, None)
        assert stop.set and ended.call_count == ends


def test_waiting_threads_of_a_worker_sleep_unless_the_user_wants_them_to_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for given in ("PASSIVE", "ACTIVE"):
        assert process.worker_environment(2)["OMP_WAIT_POLICY"] == given
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")


def test_a_longer_run_starts_where_its_beginning_ended(tmp_path):
    """Same numbers as in one piece, and nothing that was trained is trained again."""
    specs = [tiny_spec(method=LoRA(rank=2), lr=lr, steps=6) for lr in (1e-3, 4e-3, 2e-3)]
    short = [dataclasses.replace(s, steps=2) for s in specs[:2]]
    parts, whole = RunStore(tmp_path / "parts"), RunStore(tmp_path / "whole")
    train(parts, short, TorchTrainer(StopFlag()), short_steps=2)
    train(parts, specs[:2], TorchTrainer(StopFlag()), short_steps=2, keep_weights=True)
    train(whole, specs[:2], TorchTrainer(StopFlag()), keep_weights=True)
    for s in specs[:2]:
        assert parts.env(s.id)["resumed_from_step"] == 2 and steps_of(parts, s.id) == [*range(1, 7)]
        one, other = (checkpoint.load_weights(store.folder(s.id)) for store in (parts, whole))
        assert one and all(torch.equal(one[name], other[name]) for name in one)
        assert parts.result(s.id)["test_nll"] == whole.result(s.id)["test_nll"]
    train(parts, specs[2:], TorchTrainer(StopFlag()), short_steps=2)  # without a beginning
    assert parts.env(specs[2].id)["resumed_from_step"] is None
    # one that may end early keeps its best weights: it is no beginning of a longer one
    early = tiny_spec(early_stopping=1, steps=6)
    train(parts, [dataclasses.replace(early, steps=2)], Scripted(2), short_steps=2)
    train(parts, [early], Scripted(6), short_steps=2)
    assert parts.env(early.id)["resumed_from_step"] is None
    assert steps_of(parts, early.id) == [*range(1, 7)]


# ---------------------------------------------------------------- worker processes


TRAINER = "tests.unit.launch.trainers:one_update"


@pytest.fixture
def stage(compose, tmp_path):
    """`stage(seed, workers)`: train six runs in packs of one; return the ids of the processes."""
    store = RunStore(tmp_path / "runs")
    store.prepare()

    def train(seed, pool, *settings, trainer=TRAINER):
        given = (f"sweep.axes.seed={seed}", "exec.pack_size=1", f"exec.runs_dir={store.root}")
        request = compose("+sweep=lr_ratio", "scale=smoke", *given, "exec.threads=1", *settings)
        run_points(request.points, store, request.exec, lambda e: None, trainer, workers=pool)
        assert set(store.states(p.id for p in request.points).values()) == {"done"}
        return {store.owner(p.id, 1)["pid"] for p in request.points}

    train.store = store
    return train


def is_there(pid):
    return Path(f"/proc/{pid}").exists()


def test_stages_share_workers_and_a_dead_one_is_replaced(stage):
    with Workers(stage.store) as pool:
        one = stage(0, pool, "exec.workers=1")
        assert stage(1, pool, "exec.workers=1") == one
        (pid,) = one
        os.kill(pid, signal.SIGKILL)
        other = stage(2, pool, "exec.workers=1")
        assert len(other) == 1 and other != one
        assert stage(3, pool, "exec.workers=2") - other, "another share of the machine: new ones"
        assert not any(map(is_there, other)) and pool.log.exists()
    assert not pool.log.exists()
    assert not any(map(is_there, one | other))


def test_ctrl_c_ends_workers_that_wait(stage, monkeypatch):
    with pytest.raises(Stopped), Workers(stage.store) as pool:
        (pid,) = stage(0, pool, "exec.workers=1")
        assert is_there(pid)

        monkeypatch.setattr(pool._events, "get", Mock(side_effect=KeyboardInterrupt))
        stage(1, pool, "exec.workers=1")
    assert not is_there(pid)


def test_workers_that_are_killed_before_they_claim_a_run_are_not_started_for_ever(stage):
    with pytest.raises(TrainingError, match="signal 9"):
        stage(0, None, "exec.workers=1", trainer="tests.unit.launch.trainers:killed")


def test_a_closed_terminal_stops_a_worker_cleanly_unless_it_is_to_outlive_it():
    lines = "import os, signal; from lorasweep.launch.process import StopFlag"
    lines += "; flag = StopFlag(); flag.install(); os.kill(os.getpid(), signal.SIGHUP)"
    command = [sys.executable, "-c", lines + "; print(flag.set)"]
    for start, stops in (([], "True"), (["nohup"], "False")):
        done = subprocess.run([*start, *command], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, stops)
