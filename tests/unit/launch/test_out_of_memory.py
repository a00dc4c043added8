"""Out of memory: smaller micro-batches, then smaller packs, before any run has failed."""

import errno
import json
import weakref

import pytest
import torch

from lorasweep.cli.progress import Display
from lorasweep.errors import ModelError
from lorasweep.launch import local, session
from lorasweep.launch.fitting import Limits
from lorasweep.launch.out_of_memory import is_out_of_memory, request
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.launch.worker import _Reporter
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.train.events import Event
from tests.world import tiny_spec

STEPS = 6
GPU_ERROR = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
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
    monkeypatch.setattr(session, "CHECKPOINT_SHARE", 0)


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
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_errors_of_memory_are_recognised(error, asked):
    assert is_out_of_memory(error()) and request(error()) == asked


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), OSError(errno.ENOSPC, "full"), KeyError("x")]
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
    worker = _Reporter(StopFlag())
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

    def end(rows):
        event = {"run": spec.id, "rows": rows, "asked": "2.50 GiB"}
        local._take_less(spec, event, exec_, store, limits, events.append)
        return store.end(spec.id, store.last_attempt(spec.id))

    def claimed_and_killed():
        store.claim(spec)
        owner = store.folder(spec.id) / f"attempts/{store.last_attempt(spec.id)}/owner.json"
        owner.write_text(json.dumps({**json.loads(owner.read_text()), "started": "before"}))

    claimed_and_killed()
    assert end(4)["state"] == "stopped" and limits.of(spec).rows == 2
    assert "with 4 row(s) of each at a time do not fit" in events[0]["note"]
    claimed_and_killed()
    cause = end(1)["cause"]
    assert store.state(spec.id) == "failed" and events[1]["cause"] == cause
    assert "alone, on 2 processes and one row" in cause and "(exec.world_size)" in cause
    other = specs_of(2)[1]
    store.claim(other)
    local._take_less(
        other, {"run": other.id, "rows": 1, "asked": ""}, exec_, store, limits, events.append
    )
    assert len(events) == 2 and store.state(other.id) == "running"  # somebody has it now
