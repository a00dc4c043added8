"""Out of memory: smaller micro-batches, then smaller packs, before any run has failed."""

import dataclasses
import errno
import json
import weakref

import pytest
import torch

from lorasweep.cli.progress import Display
from lorasweep.errors import ModelError
from lorasweep.launch import local
from lorasweep.launch import pack as packs
from lorasweep.launch.out_of_memory import Limit, Limits, Shortage, is_out_of_memory
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.launch.worker import Reporter
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.train import sampling
from lorasweep.train.events import EVALUATION, LEARNING, SAMPLING, Event, phase
from lorasweep.train.objectives import rollouts, sft
from tests.rewarded import rewarded_spec
from tests.world import tiny_spec

STEPS = 6
GPU_ERROR = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
)
NCCL_ERROR = (
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "Last error:\nCuda failure 2 'out of memory'"
)


class Held:
    """What an attempt holds."""


class Refusing:
    """A trainer whose memory holds `most` rows of all members together. More fail in update
    `breaks_at`; `asked` lists (members, rows, first step) of each attempt, and `held` what it held."""

    def __init__(self, most, breaks_at=1, error=None):
        self.most, self.breaks_at, self.asked, self.held = most, breaks_at, [], []
        self.error = error or (lambda: torch.OutOfMemoryError(GPU_ERROR))

    def __call__(self, pack, exec_, resume):
        assert all(ref() is None for ref in self.held), "an earlier attempt is still in memory"
        rows = exec_.micro_batch_size
        first = resume[pack[0].id]["meta"]["step"] if resume else 0
        self.asked.append((len(pack), rows, first))
        activations = Held()
        self.held.append(weakref.ref(activations))
        ids = [s.id for s in pack]
        for step in range(first + 1, STEPS + 1):
            if step >= self.breaks_at and len(pack) * rows > self.most:
                raise self.error()
            ended = {i: ("done", {"test_nll": 1.0}) for i in ids} if step == STEPS else {}

            def snapshot(step=step, ids=tuple(ids)):
                state = {"tensors": {"param/w": torch.zeros(1)}, "meta": {"step": step}}
                return {i: {"tensors": state["tensors"], "meta": dict(state["meta"])} for i in ids}

            yield Event(step, {i: {"step": step} for i in ids}, ended, snapshot)


@pytest.fixture
def saves_each_update(monkeypatch):
    """With checkpoint_s=0: whatever a checkpoint costs."""
    monkeypatch.setattr(packs, "CHECKPOINT_SHARE", 0)


def specs_of(count, **fields):
    return [tiny_spec(method=LoRA(rank=4), batch_size=8, seed=k, **fields) for k in range(count)]


def run(store, specs, trainer, rows=4, checkpoint_s=1e9, **kwargs):
    events = []
    exec_ = Exec(checkpoint_s=checkpoint_s)
    execute(specs, exec_, store, trainer, events.append, StopFlag(), rows, **kwargs)
    return events


def test_micro_batches_then_packs_are_halved_until_all_runs_finish(tmp_path):
    store, specs, trainer = RunStore(tmp_path), specs_of(8), Refusing(most=4)
    events = run(store, specs, trainer)
    assert trainer.asked == [(8, 4, 0), (8, 2, 0), (8, 1, 0), (4, 1, 0), (4, 1, 0)]
    for spec in specs:
        env = store.env(spec.id)
        assert store.state(spec.id) == "done" and store.last_attempt(spec.id) == 1
        assert (env["micro_batch_size"], len(env["pack"])) == (1, 4)
        assert [r["step"] for r in store.records(spec.id)] == list(range(1, STEPS + 1))
        # it began anew, with a size as any other: nothing of it was computed with another
        assert not store.result(spec.id)["resumed_in_other_company"]
    notes = [e["note"] for e in events if "note" in e]
    assert len(notes) == 3 and "8 run(s) of tiny64 with 4 row(s)" in notes[0]
    assert "asked for 2.50 GiB" in notes[0] and "2 of each" in notes[0] and "packs of 4" in notes[2]
    log = (store.folder(specs[0].id) / "attempts" / "1" / "log.txt").read_text()
    assert all(note in log for note in notes) and "OutOfMemoryError" in log
    assert not any(e.get("ended") == "failed" for e in events)


def test_it_goes_on_from_the_last_checkpoint_and_says_so_in_the_result(tmp_path, saves_each_update):
    store, specs, trainer = RunStore(tmp_path), specs_of(2), Refusing(most=4, breaks_at=4)
    run(store, specs, trainer, checkpoint_s=0)
    assert trainer.asked == [(2, 4, 0), (2, 2, 3)]
    for spec in specs:
        assert [r["step"] for r in store.records(spec.id)] == list(range(1, STEPS + 1))
        assert store.result(spec.id)["resumed_in_other_company"]
        assert store.env(spec.id)["micro_batch_size"] == 2


def test_a_changed_micro_batch_is_remembered_by_later_checkpoints(tmp_path, saves_each_update):
    """A run that changed its size and was then stopped and resumed as it was is still marked."""
    store, specs, stop = RunStore(tmp_path), specs_of(2), StopFlag()
    trainer = Refusing(most=4, breaks_at=3)

    def stop_late(event):
        stop.set = event.get("step") == 5

    with pytest.raises(Stopped):
        execute(specs, Exec(checkpoint_s=0), store, trainer, stop_late, stop, 4)
    run(store, specs, trainer)
    assert trainer.asked == [(2, 4, 0), (2, 2, 2), (2, 2, 5)]
    assert all(store.result(s.id)["resumed_in_other_company"] for s in specs)


def test_one_run_that_does_not_fit_alone_fails_with_what_to_do(tmp_path):
    """The others of its pack finish."""
    store, specs = RunStore(tmp_path), specs_of(3)
    small = Refusing(most=1)

    def trainer(pack, exec_, resume):
        if specs[2] in pack and exec_.micro_batch_size == 1:
            raise MemoryError
        yield from small(pack, exec_, resume)

    events = run(store, specs, trainer)
    assert [store.state(s.id) for s in specs] == ["done", "done", "failed"]
    (failed,) = [e for e in events if e.get("ended") == "failed"]
    cause = store.end(specs[2].id, 1)["cause"]
    assert failed == {"run": specs[2].id, "ended": "failed", "cause": cause}
    assert "tiny64 with lora does not fit" in cause and "exec.retry=true" in cause


def test_later_packs_of_a_worker_begin_at_the_size_that_fitted(tmp_path):
    store, trainer, limits = RunStore(tmp_path), Refusing(most=2), Limits()
    specs = specs_of(6)
    run(store, specs[:3], trainer, limits=limits)
    tried = len(trainer.asked)
    run(store, specs[3:], trainer, limits=limits)
    assert trainer.asked[tried:] == [(2, 1, 0), (1, 1, 0)]
    other = specs_of(1, precision="fp64")  # packs of another kind are not limited
    run(store, other, trainer, limits=limits)
    assert trainer.asked[tried + 2] == (1, 4, 0)


def test_another_error_fails_the_runs_at_once(tmp_path):
    store, specs = RunStore(tmp_path), specs_of(2)
    trainer = Refusing(most=1, error=lambda: RuntimeError("shapes do not match"))
    run(store, specs, trainer)
    assert len(trainer.asked) == 1 and [store.state(s.id) for s in specs] == ["failed"] * 2


def allocator_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    return caught.value


@pytest.mark.parametrize(
    "error, asked",
    [
        (lambda: torch.OutOfMemoryError(GPU_ERROR), "2.50 GiB"),
        (allocator_error, f"{4e15 / 2**30:.2f} GiB"),
        (MemoryError, ""),
        (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ""),
        (lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"), ""),
        (lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ""),
        (lambda: torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors", 2), ""),
        (lambda: RuntimeError("CUDA error: out of memory"), ""),
        (lambda: torch.distributed.DistBackendError(NCCL_ERROR), ""),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_errors_of_memory_are_recognised(error, asked):
    assert is_out_of_memory(error()) and Shortage.of(error(), 1, 1).asked == asked


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 700 'illegal memory access'"),
        OSError(errno.ENOSPC, "full"),
        KeyError("x"),
    ],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_a_base_that_does_not_fit_is_said_once(monkeypatch):
    def load(*args):
        raise MemoryError

    monkeypatch.setattr(models, "load", load)
    with pytest.raises(ModelError, match="'tiny64': its weights do not fit"):
        next(iter(TorchTrainer()(specs_of(1), Exec(models_dir=["/nonexistent"]), None)))


def test_the_terminal_shows_what_did_not_fit(capsys):
    worker = Reporter(StopFlag())
    for event in ({"runs": [], "step": 1}, {"note": "first"}, {"note": "second"}):
        worker(event)
    assert {"note": "second"} in map(json.loads, capsys.readouterr().out.splitlines())
    with Display([Point("lora", specs_of(1)[0])]) as display:
        display.event({"note": "out of memory: 8 run(s)"})
    assert "out of memory: 8 run(s)" in capsys.readouterr().err


def test_several_processes_start_again_with_half_the_rows_until_one_does_not_fit(tmp_path):
    """By what a process reported; here the attempt's own process is gone."""
    store, spec, limits, events = RunStore(tmp_path), specs_of(1)[0], Limits(), []
    exec_ = Exec(world_size=2)

    def end(rows, **phase):
        shortage = Shortage(**{"rows": rows, "forward_parts": 1, "asked": "2.50 GiB", **phase})
        local.end_shortage(spec, shortage, exec_, store, limits, events.append)
        return store.end(spec.id, store.last_attempt(spec.id))

    def claimed_and_killed():
        store.claim(spec)
        owner = store.folder(spec.id) / f"attempts/{store.last_attempt(spec.id)}/owner.json"
        owner.write_text(json.dumps({**json.loads(owner.read_text()), "started": "before"}))

    claimed_and_killed()
    assert end(4)["state"] == "stopped" and limits.of(spec).rows == 2
    assert "with 4 row(s) of each at a time do not fit" in events[0]["note"]
    claimed_and_killed()
    assert end(2, phase=SAMPLING, divisible=True, forward_parts=2)["state"] == "stopped"
    assert limits.of(spec) == Limit(rows=2, forward_parts=4) and "in sampling" in events[1]["note"]
    del events[1]
    claimed_and_killed()
    cause = end(1)["cause"]
    assert store.state(spec.id) == "failed" and events[1]["cause"] == cause
    assert "alone, on 2 processes and one row" in cause and "(exec.world_size)" in cause
    other = specs_of(2)[1]
    store.claim(other)
    local.end_shortage(other, Shortage(1, 1, ""), exec_, store, limits, events.append)
    assert len(events) == 2 and store.state(other.id) == "running"  # somebody has it now


# ---------------------------------------------------------------- phases


class Full:
    """A memory that holds `most` of what a phase asks for, counted in rows of all runs."""

    def __init__(self, most):
        self.most, self.asked = most, []

    def take(self, rows):
        self.asked.append(rows)
        if rows > self.most:
            raise torch.OutOfMemoryError(GPU_ERROR)


class Watched:
    """The real trainer; `tried` lists (runs, learner's rows, forward_parts) of each attempt."""

    def __init__(self):
        self.tried, self.trainer = [], TorchTrainer()

    def __call__(self, pack, exec_, resume):
        self.tried.append((len(pack), exec_.micro_batch_size, exec_.forward_parts))
        yield from self.trainer(pack, exec_, resume)


def finished(tmp_path, specs, monkeypatch, rows=8):
    monkeypatch.setattr(packs, "LOOK_S", 1e9)
    store, trainer, limits = RunStore(tmp_path), Watched(), Limits()
    exec_ = Exec(runs_dir=str(tmp_path), models_dir=[str(tmp_path)], checkpoint_s=1e9, threads=1)
    events = []
    execute(specs, exec_, store, trainer, events.append, StopFlag(), rows, limits)
    states = {store.state(s.id) for s in specs}
    notes = [e["note"] for e in events if "note" in e]
    return trainer.tried, states, limits.of(specs[0]), notes


def rewarded(count):
    """Runs of 64 answers an update, 8 to a prompt."""
    changes = {"steps": 2, "precision": "fp32", "batch_size": 64}
    return [rewarded_spec("bandit", seed=k, **changes) for k in range(count)]


def test_sampling_that_runs_out_draws_fewer_at_once_and_then_the_pack_is_halved(
    tmp_path, monkeypatch
):
    """4 runs: 64, 32, 16, 8 answers of each; 8, of one prompt, are the fewest. 2 runs fit."""
    memory, together = Full(most=2 * 8), sampling._together

    def planted(model, prompts, uniforms_NAL, *rest):
        memory.take(uniforms_NAL.shape[0] * uniforms_NAL.shape[1])
        return together(model, prompts, uniforms_NAL, *rest)

    monkeypatch.setattr(sampling, "_together", planted)
    tried, states, limit, notes = finished(tmp_path, rewarded(4), monkeypatch)
    assert states == {"done"}
    assert tried == [(4, 8, 1), (4, 8, 2), (4, 8, 4), (4, 8, 8), (2, 8, 8), (2, 8, 8)]
    assert limit == Limit(rows=None, runs=2, forward_parts=8)
    assert memory.asked[:4] == [256, 128, 64, 32] and set(memory.asked[4:]) == {16}
    assert all(n.startswith("out of memory in sampling (asked for 2.50 GiB)") for n in notes)
    assert "1/2 of the usual at once" in notes[0] and "packs of 2" in notes[3]


def test_evaluation_that_runs_out_holds_less_at_once(tmp_path, monkeypatch):
    """Half of what one run holds fits: once halved for the base, and again for two runs. The learner
    keeps its rows."""
    memory, row_nlls = Full(most=None), rollouts.row_nlls

    def planted(model, rows_N, batches_N, precision):
        memory.most = memory.most or len(batches_N[0][0].lengths[0]) // 2
        memory.take(max(sum(len(b.lengths[0]) for b in bs) for bs in zip(*batches_N)))
        return row_nlls(model, rows_N, batches_N, precision)

    monkeypatch.setattr(rollouts, "EVAL_TOKENS", 1024)
    monkeypatch.setattr(rollouts, "row_nlls", planted)
    specs = [
        dataclasses.replace(s, dataset=dataclasses.replace(s.dataset, n_test=512, n_test_curve=512))
        for s in rewarded(2)
    ]
    tried, states, limit, notes = finished(tmp_path, specs, monkeypatch)
    assert states == {"done"} and tried == [(2, 8, 1), (2, 8, 2), (2, 8, 4)]
    assert limit.rows is None and limit.runs is None
    assert all(n.startswith("out of memory in evaluation") for n in notes)


def test_evaluation_and_learning_that_run_out_keep_limits_of_their_own(tmp_path, monkeypatch):
    learner, held_out = Full(most=2 * 2), Full(most=2 * 4)
    nll_sums, evaluate = sft.nll_sums, sft.evaluate

    def planted_learner(model, batch, precision):
        learner.take(len(batch.lengths) * len(batch.lengths[0]))
        return nll_sums(model, batch, precision)

    def planted_evaluation(model, batches, *rest):
        held_out.take(sum(max(len(b.lengths[0]) for b in own) for own in batches))
        return evaluate(model, batches, *rest)

    monkeypatch.setattr(sft, "nll_sums", planted_learner)
    monkeypatch.setattr(sft, "evaluate", planted_evaluation)
    short = dataclasses.replace(tiny_spec().dataset, n_test=16, max_length=64, exact_loss=False)
    specs = specs_of(2, steps=2, dataset=short)
    tried, states, limit, notes = finished(tmp_path, specs, monkeypatch)
    assert states == {"done"} and limit.rows == 2 and limit.runs is None
    assert [n.split("(")[0].strip() for n in notes].count("out of memory") == 2  # 8, 4, 2 rows
    parts = [t[2] for t in tried]
    assert parts == sorted(parts) and parts[-1] == limit.forward_parts > 1
    assert sum("in evaluation" in n for n in notes) == limit.forward_parts.bit_length() - 1
    assert {t[1] for t in tried} == {8, 4, 2} and {t[0] for t in tried} == {2}


@pytest.mark.parametrize(
    ("name", "divisible", "tried"),
    [
        (LEARNING, False, [(4, 4, 1), (4, 2, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1)]),
        (SAMPLING, False, [(4, 4, 1), (2, 4, 1), (1, 4, 1)]),
        (EVALUATION, True, [(4, 4, 1), (4, 4, 2), (4, 4, 4), (2, 4, 4), (1, 4, 4)]),
    ],
)
def test_what_is_tried_in_each_phase(tmp_path, name, divisible, tried):
    """Until a run alone, with the least at once, has failed."""
    asked = []

    def trainer(pack, exec_, resume):
        asked.append((len(pack), exec_.micro_batch_size, exec_.forward_parts))
        with phase(EVALUATION), phase(name, divisible and exec_.forward_parts < 4):
            raise RuntimeError("CUDA error: out of memory")
        yield

    store, specs, limits = RunStore(tmp_path), specs_of(4), Limits()
    run(store, specs, trainer, limits=limits)
    assert list(dict.fromkeys(asked)) == tried
    assert {store.state(s.id) for s in specs} == {"failed"}
    assert limits.of(specs[0]).rows == (1 if name == LEARNING else None)


def test_a_checkpoint_keeps_what_is_held_at_once(tmp_path, saves_each_update):
    """A run that is resumed by another worker samples and evaluates as before."""
    store, specs, stop, small = RunStore(tmp_path), specs_of(2), StopFlag(), Refusing(most=99)
    asked = []

    def trainer(pack, exec_, resume):
        asked.append(exec_.forward_parts)
        for event in small(pack, exec_, resume):
            if event.step == 3 and exec_.forward_parts == 1:
                with phase(SAMPLING, divisible=True):
                    raise MemoryError
            yield event

    def stop_late(event):
        stop.set = event.get("step") == 5

    with pytest.raises(Stopped):
        execute(specs, Exec(checkpoint_s=0), store, trainer, stop_late, stop, 4)
    run(store, specs, trainer)
    assert asked == [1, 2, 2]
    assert all(store.result(s.id)["resumed_in_other_company"] for s in specs)
