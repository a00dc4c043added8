"""A pack in a worker: runs taken over, stops, workers between stages; out of memory: smaller
micro-batches, then smaller packs; data: tokenized once, broken for their owner alone."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from psutil import pid_exists

from lorasweep.errors import DataError, ModelError, StoreError, TrainingError
from lorasweep.launch import local, process
from lorasweep.launch import pack as packs
from lorasweep.launch.local import run_points
from lorasweep.launch.out_of_memory import Limit, Limits, Shortage, is_out_of_memory
from lorasweep.launch.pack import LOOK_S
from lorasweep.launch.pool import Workers
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint, files, owners
from lorasweep.store.run_store import RunStore
from lorasweep.train import sampling
from lorasweep.train.events import EVALUATION, LEARNING, SAMPLING, phase
from lorasweep.train.objectives import policy_gradient, sft
from lorasweep.train.objectives.sft import SupervisedFineTuning
from tests.customers import make_base, model_of, write_rows
from tests.small_hub import qwen_like
from tests.training import rewarded_spec
from tests.unit.launch.trainers import Scripted, steps_of, train
from tests.world import as_another_user, compose_request, tiny_spec, write_splits


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: the clock of the pack's training."""
    now = [0.0]
    monkeypatch.setattr(packs.time, "monotonic", lambda: now[0])
    return now


def take_over(store, rid):
    """Claim a run as another process that believes its owner dead, and cut its records."""
    owner = json.dumps(owners.this_process()).encode()
    assert files.create_folder_once(store.attempt(rid, 2), {"owner.json": owner})
    store.cut_records(rid, 0)


@pytest.fixture
def pair(tmp_path):
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
        monkeypatch.setenv(owners.JOB_VARIABLE, "1")
        if not inside:
            monkeypatch.delenv(owners.JOB_VARIABLE)
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


@pytest.fixture
def stage(compose, tmp_path):
    """`stage(seed, workers)`: train six runs in packs of one; return the ids of the processes."""
    store = RunStore(tmp_path / "runs")
    store.prepare()

    def train(seed, pool, *settings, trainer="tests.unit.launch.trainers:one_update"):
        given = (f"sweep.axes.seed={seed}", "exec.pack_size=1", f"exec.runs_dir={store.root}")
        request = compose("+sweep=lr_ratio", "scale=smoke", *given, "exec.threads=1", *settings)
        run_points(request.points, store, request.exec, lambda e: None, trainer, workers=pool)
        assert set(store.states(p.id for p in request.points).values()) == {"done"}
        return {store.owner(p.id, 1)["pid"] for p in request.points}

    train.store = store
    return train


def test_stages_share_workers_and_a_dead_one_is_replaced(stage):
    with Workers(stage.store) as pool:
        one = stage(0, pool, "exec.workers=1")
        assert stage(1, pool, "exec.workers=1") == one
        (pid,) = one
        os.kill(pid, signal.SIGKILL)
        other = stage(2, pool, "exec.workers=1")
        assert len(other) == 1 and other != one
        assert stage(3, pool, "exec.workers=2") - other, "another share of the machine: new ones"
        assert not any(map(pid_exists, other)) and pool.log.exists()
    assert not pool.log.exists() and not any(map(pid_exists, one | other))


def test_ctrl_c_ends_workers_that_wait(stage, monkeypatch):
    with pytest.raises(Stopped), Workers(stage.store) as pool:
        (pid,) = stage(0, pool, "exec.workers=1")
        assert pid_exists(pid)
        monkeypatch.setattr(pool._events, "get", Mock(side_effect=KeyboardInterrupt))
        stage(1, pool, "exec.workers=1")
    assert not pid_exists(pid)


def test_workers_that_are_killed_before_they_claim_a_run_are_not_started_for_ever(stage):
    with pytest.raises(TrainingError, match="signal 9"):
        stage(0, None, "exec.workers=1", trainer="tests.unit.launch.trainers:killed")


def test_a_closed_terminal_stops_a_worker_cleanly_unless_it_is_to_outlive_it():
    lines = "import os, signal; from lorasweep.launch.process import StopFlag"
    lines += "; flag = StopFlag(); flag.install(); os.kill(os.getpid(), signal.SIGHUP)"
    command = [sys.executable, "-c", lines + "; print(flag.set)"]
    for start, stops in (([], "True"), (["nohup"], "False")):
        unblocked = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # as nohup may run us
        done = subprocess.run(
            [*start, *command], capture_output=True, text=True, preexec_fn=unblocked
        )
        assert (done.returncode, done.stdout.strip()) == (0, stops)


STEPS = 6
GPU_ERROR = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
NCCL_ERROR = "NCCL error in: NCCLUtils.cpp:77\nLast error:\nCuda failure 2 'out of memory'"


class Refusing(Scripted):
    """Memory holds `most` rows of all runs, and must no longer hold an earlier attempt."""

    def __init__(self, most):
        super().__init__(STEPS, self.check)
        self.most, self.held = most, []

    def check(self, step, pack, exec_):
        if len(pack) * exec_.micro_batch_size > self.most:
            raise torch.OutOfMemoryError(GPU_ERROR)

    def __call__(self, pack, exec_, resume):
        assert all(ref() is None for ref in self.held), "an earlier attempt is still in memory"
        held = set()
        self.held.append(weakref.ref(held))
        yield from super().__call__(pack, exec_, resume)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store; with checkpoint_s=0 each update writes a checkpoint, whatever it costs."""
    monkeypatch.setattr(packs, "CHECKPOINT_SHARE", 0)
    return RunStore(tmp_path)


def specs_of(count, **fields):
    return [tiny_spec(method=LoRA(rank=4), batch_size=8, seed=k, **fields) for k in range(count)]


def notes_of(events):
    return [e["note"] for e in events if "note" in e]


def test_micro_batches_then_packs_are_halved_until_all_runs_finish(store):
    specs, trainer, limits = specs_of(14), Refusing(most=4), Limits()
    events = train(store, specs[:8], trainer, 4, limits=limits)
    sizes = [(8, 4), (8, 2), (8, 1), (4, 1), (4, 1)]
    assert trainer.tried == [(runs, rows, 1, 0) for runs, rows in sizes]
    for spec in specs[:8]:
        env = store.env(spec.id)
        assert store.state(spec.id) == "done" and store.last_attempt(spec.id) == 1
        assert (env["micro_batch_size"], len(env["pack"])) == (1, 4)
        assert steps_of(store, spec.id) == list(range(1, STEPS + 1))
        # it started again with one size for all updates
        assert not store.result(spec.id)["resumed_in_other_company"]
    notes = notes_of(events)
    assert len(notes) == 3 and all("2.50 GiB" in note for note in notes)
    log = (store.attempt(specs[0].id, 1) / "log.txt").read_text()
    assert all(note in log for note in notes) and "OutOfMemoryError" in log
    assert not any(e.get("ended") == "failed" for e in events)
    # later packs of the worker start at the size that fitted; those of another kind do not
    trainer.tried.clear()
    train(store, specs[8:], trainer, 4, limits=limits)
    train(store, specs_of(1, precision="fp64"), trainer, 4, limits=limits)
    assert trainer.tried == [(4, 1, 1, 0), (2, 1, 1, 0), (1, 4, 1, 0)]


@pytest.mark.parametrize(
    ("name", "divisible", "tried"),
    [
        (LEARNING, False, [(2, 4, 1, 0), (2, 2, 1, 2), (2, 2, 1, 5)]),
        (SAMPLING, True, [(2, 4, 1, 0), (2, 4, 2, 2), (2, 4, 2, 5)]),
    ],
)
def test_later_checkpoints_keep_a_changed_size(store, name, divisible, tried):
    specs, stop = specs_of(2), StopFlag()

    def before(step, pack, exec_):
        if step == 3 and (exec_.micro_batch_size, exec_.forward_parts) == (4, 1):
            with phase(name, divisible):
                raise MemoryError

    def stop_late(event):
        stop.set = event.get("step") == 5

    trainer = Scripted(STEPS, before)
    with pytest.raises(Stopped):
        train(store, specs, trainer, 4, stop, report=stop_late, checkpoint_s=0)
    train(store, specs, trainer, 4)
    assert trainer.tried == tried
    for spec in specs:
        assert store.result(spec.id)["resumed_in_other_company"]
        assert store.env(spec.id)["micro_batch_size"] == tried[-1][1]
        assert steps_of(store, spec.id) == list(range(1, STEPS + 1))


def test_errors_of_memory_are_recognised():
    with pytest.raises(RuntimeError) as of_allocator:
        torch.empty(10**15)
    cuda = "CUDA kernel errors might be asynchronously reported"
    asked = [(torch.OutOfMemoryError(GPU_ERROR), " (asked for 2.50 GiB)")]
    asked += [(of_allocator.value, f" (asked for {4 * 10**15} bytes)")]
    unsaid = [
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("unable to mmap 4 bytes from file </a>: Cannot allocate memory (12)"),
        torch.AcceleratorError(f"CUDA error: out of memory\n{cuda}", 2),
        RuntimeError("CUDA error: out of memory"),
        torch.distributed.DistBackendError(NCCL_ERROR),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ]
    for error, text in (*asked, *((error, "") for error in unsaid)):
        assert is_out_of_memory(error), error
        assert Shortage.of(error, Exec(), tiny_spec()).asked == text
    others = ["size mismatch", "CUDA error: an illegal memory access was encountered"]
    others += ["NCCL error: Cuda failure 700 'illegal memory access'"]
    for error in (*map(RuntimeError, others), OSError(errno.ENOSPC, "full"), KeyError("x")):
        assert not is_out_of_memory(error), error


def test_a_base_that_does_not_fit_is_an_error_of_the_model(monkeypatch):
    monkeypatch.setattr(models, "load", Mock(side_effect=MemoryError))
    with pytest.raises(ModelError, match="'tiny64'"):
        next(iter(TorchTrainer()(specs_of(1), Exec(models_dir=["/nonexistent"]), None)))


def test_runs_of_several_processes_start_again_with_less_until_one_does_not_fit(store):
    """By what a process reported; here the attempt's own process is gone."""
    spec, other = specs_of(2)
    limits, events = Limits(), []

    def end(spec, shortage, killed=True):
        n = store.claim(spec)
        path = store.attempt(spec.id, n) / "owner.json"
        if killed:
            path.write_text(json.dumps({**json.loads(path.read_text()), "started": "before"}))
        local.end_shortage(spec, shortage, Exec(world_size=2), store, limits, events.append)
        return store.end(spec.id, n)

    assert end(spec, Shortage(4, 1, "2.50 GiB"))["state"] == "stopped"
    assert limits.of(spec).rows == 2 and "4 row(s)" in events[0]["note"]
    assert end(spec, Shortage(2, 2, "", SAMPLING, True))["state"] == "stopped"
    assert limits.of(spec) == Limit(rows=2, forward_parts=4) and SAMPLING in events[1]["note"]
    cause = end(spec, Shortage(1, 1, "2.50 GiB"))["cause"]
    assert store.state(spec.id) == "failed" and events[2]["cause"] == cause
    assert "2 process" in cause and "exec.world_size" in cause
    end(other, Shortage(1, 1, ""), killed=False)  # another worker claimed it
    assert len(events) == 3 and store.state(other.id) == "running"


@pytest.fixture
def shortage(store, monkeypatch):
    """shortage(module, name, rows, most): this function has memory for `most` rows of all runs, or
    for half the rows of its first call. shortage.train(specs) trains for real with that: (runs,
    learner's rows, forward_parts) of each attempt, the limit, the notes."""
    monkeypatch.setattr(packs, "LOOK_S", 1e9)

    def plant(module, name, rows, most=None):
        real, asked = getattr(module, name), []

        def call(*arguments):
            asked.append(rows(*arguments))
            if asked[-1] > (most or asked[0] // 2):
                raise torch.OutOfMemoryError(GPU_ERROR)
            return real(*arguments)

        monkeypatch.setattr(module, name, call)
        return asked

    def finished(specs):
        tried, real, limits = [], TorchTrainer(), Limits()

        def trainer(pack, exec_, resume):
            tried.append((len(pack), exec_.micro_batch_size, exec_.forward_parts))
            yield from real(pack, exec_, resume)

        folders = {"runs_dir": str(store.root), "models_dir": [str(store.root)]}
        events = train(store, specs, trainer, 8, limits=limits, threads=1, **folders)
        assert set(store.states(s.id for s in specs).values()) == {"done"}
        return tried, limits.of(specs[0]), notes_of(events)

    plant.train = finished
    return plant


def rewarded(count, **sizes):
    """Runs of 64 completions an update, 8 to a prompt; `sizes` of their data."""
    changes = {"steps": 2, "precision": "fp32", "batch_size": 64}
    specs = [rewarded_spec("bandit", seed=k, **changes) for k in range(count)]
    return [dataclasses.replace(s, dataset=dataclasses.replace(s.dataset, **sizes)) for s in specs]


def test_sampling_that_runs_out_draws_fewer_and_then_halves_the_pack(shortage):
    """4 runs: 64, 32, 16, 8 completions of each; 8, of one prompt, are the fewest. 2 runs fit."""
    asked = shortage(sampling, "_together", lambda m, p, u, *_: math.prod(u.shape[:2]), 2 * 8)
    tried, limit, notes = shortage.train(rewarded(4))
    assert tried == [(4, 8, 1), (4, 8, 2), (4, 8, 4), (4, 8, 8), (2, 8, 8), (2, 8, 8)]
    assert limit == Limit(rows=None, runs=2, forward_parts=8)
    assert asked[:4] == [256, 128, 64, 32] and set(asked[4:]) == {16}
    assert all(SAMPLING in n and "2.50 GiB" in n for n in notes)
    assert "1/2" in notes[0] and "packs of 2" in notes[3]


def test_evaluation_that_runs_out_holds_less_at_once(monkeypatch, shortage):
    """Half of what one run holds fits: halved for the base and for two runs, not for the learner."""

    def rows(model, rows_N, batches_N, precision):
        return max(sum(b.tokens_NRT.shape[1] for b in bs) for bs in zip(*batches_N))

    shortage(policy_gradient, "row_nlls", rows)
    monkeypatch.setattr(policy_gradient, "EVAL_TOKENS", 1024)
    tried, limit, notes = shortage.train(rewarded(2, n_test=512, n_test_curve=512))
    assert tried == [(2, 8, 1), (2, 8, 2), (2, 8, 4)]
    assert limit.rows is None and limit.runs is None and all(EVALUATION in n for n in notes)


def test_evaluation_and_learning_that_run_out_have_separate_limits(shortage):
    def held_out(model, batches, *_):
        return sum(max(b.tokens_NRT.shape[1] for b in own) for own in batches)

    shortage(sft, "nll_sums", lambda m, b, p: b.tokens_NRT[..., 0].size, 2 * 2)
    shortage(sft, "evaluate", held_out, 2 * 4)
    short = dataclasses.replace(tiny_spec().dataset, n_test=16, max_length=64, exact_loss=False)
    tried, limit, notes = shortage.train(specs_of(2, steps=2, dataset=short))
    parts = [t[2] for t in tried]
    assert parts == sorted(parts) and parts[-1] == limit.forward_parts > 1
    in_evaluation = sum(EVALUATION in n.split("(")[0] for n in notes)
    assert in_evaluation == limit.forward_parts.bit_length() - 1
    assert len(notes) - in_evaluation == 2  # 8, 4, 2 rows
    assert {t[1] for t in tried} == {8, 4, 2} and {t[0] for t in tried} == {2}
    assert limit.rows == 2 and limit.runs is None


@pytest.mark.parametrize(
    ("name", "divisible", "tried"),
    [
        (LEARNING, False, [(4, 4, 1), (4, 2, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1)]),
        (SAMPLING, False, [(4, 4, 1), (2, 4, 1), (1, 4, 1)]),
        (EVALUATION, True, [(4, 4, 1), (4, 4, 2), (4, 4, 4), (2, 4, 4), (1, 4, 4)]),
    ],
)
def test_sizes_tried_in_each_phase_until_a_run_alone_has_failed(store, name, divisible, tried):
    def before(step, pack, exec_):
        with phase(EVALUATION), phase(name, divisible and exec_.forward_parts < 4):
            raise RuntimeError("CUDA error: out of memory")

    specs, limits, trainer = specs_of(4), Limits(), Scripted(STEPS, before)
    train(store, specs, trainer, 4, limits=limits)
    assert list(dict.fromkeys(t[:3] for t in trainer.tried)) == tried
    assert set(store.states(s.id for s in specs).values()) == {"failed"}
    assert "exec.retry=true" in store.failure(specs[0].id)
    assert limits.of(specs[0]).rows == (1 if name == LEARNING else None)


@pytest.fixture
def load(tmp_path):
    """`load(answer)` writes a data set and loads it as a new worker would."""
    for name in ("runs", "gsm8k"):
        (tmp_path / name).mkdir()
    data = compose_request(["dataset=gsm8k"]).points[0].spec.dataset
    data = dataclasses.replace(data, revision="", n_test=4, n_test_curve=4)
    exec_ = Exec(runs_dir=str(tmp_path / "runs"), data_dir=[str(tmp_path)])
    base = SimpleNamespace(tokenizer=qwen_like())

    def run(answer, **changes):
        rows = [{"question": f"So? {i}", "answer": answer} for i in range(9)]
        write_splits(tmp_path / "gsm8k", rows)
        for path in (tmp_path / "gsm8k").iterdir():
            with contextlib.suppress(PermissionError):  # already done by its owner
                path.chmod(0o666)
        spec = tiny_spec(dataset=dataclasses.replace(data, **changes))
        return TorchTrainer().data(spec, exec_, base)

    return run


def test_data_are_tokenized_once_and_refused_if_they_changed(load, tmp_path):
    first = load("Yes")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")}
    assert len(kept) == 2 and load("Yes").sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")} == kept
    with pytest.raises(DataError, match=r"gsm8k.*exec\.runs_dir=.*/runs-2"):
        load("No")
    load("No", name="mine")
    load("Yes")
    (note,) = [p for p in (tmp_path / "runs/.data").iterdir() if '"mine"' not in p.read_text()]
    note.unlink()
    load("No")


def test_data_of_a_folder_that_is_only_read_are_checked_and_not_recorded(load, tmp_path):
    """As when another user's runs are trained again: verified, or exported."""
    runs = tmp_path / "runs"
    runs.chmod(0o755)
    for path in (tmp_path / "gsm8k", tmp_path):
        path.chmod(0o777)

    def read():
        before = sorted(runs.rglob("*"))
        assert len(load("Yes").test) == 4 and sorted(runs.rglob("*")) == before
        if before:  # the owner's
            with pytest.raises(DataError, match="gsm8k"):
                load("No")

    as_another_user(tmp_path, read)
    load("Yes")
    as_another_user(tmp_path, read)


SECRET = "zanzibar 7351"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pack(base, tmp_path):
    """Four customers' runs; the rows of the third hold the secret."""
    found = []
    for k, name in enumerate(("ann", "bob", "secret", "dan")):
        folder = tmp_path / name
        answer = f"{SECRET} {{k}}" if name == "secret" else "357 {k}"
        write_rows(folder / "train.jsonl", 12 + k, answer)
        sizes = {"holdout": 6, "n_validation": 3, "n_test": 3, "n_test_curve": 3, "max_length": 64}
        dataset = DatasetSpec(name=name, source="jsonl", location=str(folder), **sizes)
        fields = {"method": LoRA(rank=4), "steps": 3 + k, "batch_size": 2}
        found.append(tiny_spec(model=model_of(base), dataset=dataset, **fields))
    return found


def trained(pack, tmp_path, trainer=None, **settings):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    given = {"skip_broken_data": True, "keep_weights": True, "checkpoint_s": 0.0, **settings}
    trainer = trainer or TorchTrainer()
    events = train(store, pack, trainer, runs_dir=str(store.root), **given)
    return store, events, [store.state(s.id) for s in pack]


def all_text(store, spec):
    files = [p for p in store.folder(spec.id).rglob("*") if p.is_file()]
    return b"\n".join(p.read_bytes() for p in files).decode(errors="replace")


def test_broken_data_fail_only_their_owners_run(pack, tmp_path):
    path, secret = tmp_path / "secret" / "train.jsonl", json.dumps({"text": SECRET}) + "\n"
    for text, cause in {f"{{{SECRET}\n": r"train\.jsonl:1", 9 * secret: "prompt"}.items():
        path.write_text(text)
        with pytest.raises(DataError, match=cause):
            trained(pack, tmp_path / cause[:5], skip_broken_data=False)
    store, events, states = trained(pack, tmp_path)
    assert states == ["done", "done", "failed", "done"]
    assert [e["run"] for e in events if e.get("ended") == "failed"] == [pack[2].id]
    for spec in (pack[0], pack[1], pack[3]):
        assert SECRET not in all_text(store, spec) and "secret" not in all_text(store, spec)
        assert store.result(spec.id)["pack_size"] == 3
    for cause in ("6 rows", "no file"):
        write_rows(path, 6, SECRET) if cause == "6 rows" else path.unlink()
        with pytest.raises(DataError, match=cause):
            trained(pack, tmp_path / cause, skip_broken_data=False)


@pytest.mark.parametrize("error", [KeyError(SECRET), OSError(errno.EIO, "broken", SECRET)])
def test_an_error_in_training_is_quoted_to_its_owner_only(pack, tmp_path, monkeypatch, error):
    """It is found by halves: the runs resume from their checkpoints in smaller packs."""
    monkeypatch.setattr(packs, "CHECKPOINT_SHARE", 0)

    class Broken(TorchTrainer):
        def __call__(self, pack, exec_, resume):
            for event in super().__call__(pack, exec_, resume):
                if event.step == 3 and any(s.dataset.name == "secret" for s in pack):
                    raise error
                yield event

    store, _, states = trained(pack, tmp_path, Broken())
    assert states == ["done", "done", "failed", "done"]
    assert SECRET in store.failure(pack[2].id) and SECRET in all_text(store, pack[2])
    for spec in (pack[0], pack[1], pack[3]):
        assert SECRET not in all_text(store, spec)
        assert store.result(spec.id)["resumed_in_other_company"]


def test_a_run_that_diverges_leaves_and_the_others_end(pack, tmp_path, monkeypatch):
    wild = pack[2].id
    monkeypatch.setattr(SupervisedFineTuning, "diverged", lambda self, run, loss: run == wild)
    store, _, states = trained(pack, tmp_path)
    assert states == ["done", "done", "diverged", "done"]
    for k, spec in enumerate(pack):
        weights = checkpoint.load_weights(store.folder(spec.id))
        assert (weights is None) == (spec.id == wild)
        if weights:
            n = sum(t.numel() for t in weights.values())
            assert n == spec.method.n_trainable(spec.model)
            result = store.result(spec.id)
            assert (result["n_test"], result["n_train"]) == (3, 6 + k)
            assert result["test_nll"] != result["test_nll_curve"]  # of test and validation rows
    assert not list(store.root.rglob(".weights*"))
