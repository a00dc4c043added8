"""Out of memory: smaller micro-batches, then smaller packs, before any run has failed."""

import dataclasses
import errno
import json
import math
import weakref
from unittest.mock import Mock

import pytest
import torch

from lorasweep.errors import ModelError
from lorasweep.launch import local
from lorasweep.launch import pack as packs
from lorasweep.launch.out_of_memory import Limit, Limits, Shortage, is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.train import sampling
from lorasweep.train.events import EVALUATION, LEARNING, SAMPLING, phase
from lorasweep.train.objectives import rollouts, sft
from tests.training import rewarded_spec
from tests.unit.launch.trainers import Scripted, steps_of, train
from tests.world import tiny_spec

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


def states(store, specs):
    return [store.state(s.id) for s in specs]


def test_micro_batches_then_packs_are_halved_until_all_runs_finish(store):
    specs, trainer = specs_of(8), Refusing(most=4)
    events = train(store, specs, trainer, 4)
    sizes = [(8, 4), (8, 2), (8, 1), (4, 1), (4, 1)]
    assert trainer.tried == [(runs, rows, 1, 0) for runs, rows in sizes]
    for spec in specs:
        env = store.env(spec.id)
        assert store.state(spec.id) == "done" and store.last_attempt(spec.id) == 1
        assert (env["micro_batch_size"], len(env["pack"])) == (1, 4)
        assert steps_of(store, spec.id) == list(range(1, STEPS + 1))
        # it started again with one size for all updates
        assert not store.result(spec.id)["resumed_in_other_company"]
    notes = notes_of(events)
    assert len(notes) == 3 and all("2.50 GiB" in note for note in notes)
    assert "8 run(s)" in notes[0] and "2 of each" in notes[0] and "packs of 4" in notes[2]
    log = (store.attempt(specs[0].id, 1) / "log.txt").read_text()
    assert all(note in log for note in notes) and "OutOfMemoryError" in log
    assert not any(e.get("ended") == "failed" for e in events)


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


def test_later_packs_of_a_worker_start_at_the_size_that_fitted(store):
    trainer, limits, specs = Refusing(most=2), Limits(), specs_of(6)
    train(store, specs[:3], trainer, 4, limits=limits)
    trainer.tried.clear()
    train(store, specs[3:], trainer, 4, limits=limits)
    train(store, specs_of(1, precision="fp64"), trainer, 4, limits=limits)  # of another kind
    assert trainer.tried[:3] == [(2, 1, 1, 0), (1, 1, 1, 0), (1, 4, 1, 0)]


def allocator_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    return caught.value


@pytest.mark.parametrize(
    "error, asked",
    [
        (lambda: torch.OutOfMemoryError(GPU_ERROR), " (asked for 2.50 GiB)"),
        (allocator_error, f" (asked for {4e15 / 2**30:.2f} GiB)"),
        (MemoryError, ""),
        (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ""),
        (lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ""),
        (lambda: torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors", 2), ""),
        (lambda: RuntimeError("CUDA error: out of memory"), ""),
        (lambda: torch.distributed.DistBackendError(NCCL_ERROR), ""),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
        (lambda: RuntimeError("size mismatch"), None),
        (lambda: RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (lambda: RuntimeError("NCCL error: Cuda failure 700 'illegal memory access'"), None),
        (lambda: OSError(errno.ENOSPC, "full"), None),
        (lambda: KeyError("x"), None),
    ],
)
def test_errors_of_memory_are_recognised(error, asked):
    error = error()
    assert is_out_of_memory(error) == (asked is not None)
    if asked is not None:
        assert Shortage.of(error, Exec(), tiny_spec()).asked == asked


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
def full(monkeypatch):
    """full(module, name, rows, most): this function has memory for `most` rows of all runs, or for
    half the rows of its first call. Returns a list with rows(*arguments) of each call."""

    def plant(module, name, rows, most=None):
        real, asked = getattr(module, name), []

        def call(*arguments):
            asked.append(rows(*arguments))
            if asked[-1] > (most or asked[0] // 2):
                raise torch.OutOfMemoryError(GPU_ERROR)
            return real(*arguments)

        monkeypatch.setattr(module, name, call)
        return asked

    return plant


def finished(tmp_path, specs, monkeypatch):
    """Train for real: (runs, learner's rows, forward_parts) by attempt, the limit, the notes."""
    monkeypatch.setattr(packs, "LOOK_S", 1e9)
    tried, real, limits = [], TorchTrainer(), Limits()

    def trainer(pack, exec_, resume):
        tried.append((len(pack), exec_.micro_batch_size, exec_.forward_parts))
        yield from real(pack, exec_, resume)

    folders = {"runs_dir": str(tmp_path), "models_dir": [str(tmp_path)]}
    store = RunStore(tmp_path)
    events = train(store, specs, trainer, 8, limits=limits, threads=1, **folders)
    assert set(states(store, specs)) == {"done"}
    return tried, limits.of(specs[0]), notes_of(events)


def rewarded(count):
    """Runs of 64 completions an update, 8 to a prompt."""
    changes = {"steps": 2, "precision": "fp32", "batch_size": 64}
    return [rewarded_spec("bandit", seed=k, **changes) for k in range(count)]


def test_sampling_that_runs_out_draws_fewer_and_then_halves_the_pack(tmp_path, monkeypatch, full):
    """4 runs: 64, 32, 16, 8 completions of each; 8, of one prompt, are the fewest. 2 runs fit."""
    asked = full(sampling, "_together", lambda m, p, u_NAL, *_: math.prod(u_NAL.shape[:2]), 2 * 8)
    tried, limit, notes = finished(tmp_path, rewarded(4), monkeypatch)
    assert tried == [(4, 8, 1), (4, 8, 2), (4, 8, 4), (4, 8, 8), (2, 8, 8), (2, 8, 8)]
    assert limit == Limit(rows=None, runs=2, forward_parts=8)
    assert asked[:4] == [256, 128, 64, 32] and set(asked[4:]) == {16}
    assert all(SAMPLING in n and "2.50 GiB" in n for n in notes)
    assert "1/2" in notes[0] and "packs of 2" in notes[3]


def test_evaluation_that_runs_out_holds_less_at_once(tmp_path, monkeypatch, full):
    """Half of what one run holds fits: halved for the base and for two runs, not for the learner."""

    def rows(model, rows_N, batches_N, precision):
        return max(sum(len(b.lengths[0]) for b in bs) for bs in zip(*batches_N))

    full(rollouts, "row_nlls", rows)
    monkeypatch.setattr(rollouts, "EVAL_TOKENS", 1024)
    (first, second) = rewarded(2)
    many = dataclasses.replace(first.dataset, n_test=512, n_test_curve=512)
    specs = [dataclasses.replace(s, dataset=many) for s in (first, second)]
    tried, limit, notes = finished(tmp_path, specs, monkeypatch)
    assert tried == [(2, 8, 1), (2, 8, 2), (2, 8, 4)]
    assert limit.rows is None and limit.runs is None and all(EVALUATION in n for n in notes)


def test_evaluation_and_learning_that_run_out_have_separate_limits(tmp_path, monkeypatch, full):
    def held_out(model, batches, *_):
        return sum(max(len(b.lengths[0]) for b in own) for own in batches)

    full(sft, "nll_sums", lambda m, b, p: len(b.lengths) * len(b.lengths[0]), 2 * 2)
    full(sft, "evaluate", held_out, 2 * 4)
    short = dataclasses.replace(tiny_spec().dataset, n_test=16, max_length=64, exact_loss=False)
    tried, limit, notes = finished(tmp_path, specs_of(2, steps=2, dataset=short), monkeypatch)
    assert limit.rows == 2 and limit.runs is None
    parts = [t[2] for t in tried]
    assert parts == sorted(parts) and parts[-1] == limit.forward_parts > 1
    in_evaluation = sum(EVALUATION in n.split("(")[0] for n in notes)
    assert in_evaluation == limit.forward_parts.bit_length() - 1
    assert len(notes) - in_evaluation == 2  # 8, 4, 2 rows
    assert {t[1] for t in tried} == {8, 4, 2} and {t[0] for t in tried} == {2}


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
    assert set(states(store, specs)) == {"failed"} and "exec.retry=true" in store.failure(
        specs[0].id
    )
    assert limits.of(specs[0]).rows == (1 if name == LEARNING else None)
