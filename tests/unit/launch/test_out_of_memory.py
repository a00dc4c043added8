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
from lorasweep.train.objectives import policy_gradient, sft
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
        assert set(states(store, specs)) == {"done"}
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
    assert set(states(store, specs)) == {"failed"}
    assert "exec.retry=true" in store.failure(specs[0].id)
    assert limits.of(specs[0]).rows == (1 if name == LEARNING else None)
