"""One pack, start to finish, on this machine: claim, train, record. What a worker or a cluster job
calls.

    python -m lorasweep.launch.worker JOB.json {"packs": [{"runs": [spec, ...], "micro_batch_size":
    n}, ...], "exec": {...}, "dead": {run id: attempt},
     "trainer": null or "package.module:object", "skip": null or a file of run ids not to start}

Knows the store and asks a trainer for events; torch is loaded by the trainer alone, inside
functions.
"""

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorasweep.errors import DataError, LorasweepError, ModelError, SpecError, StoreError
from lorasweep.launch.process import die_with_parent, keep_freed_memory
from lorasweep.methods.registry import spec_from
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, files
from lorasweep.store import claims as ownership
from lorasweep.store.run_store import RunStore
from lorasweep.tracking import provenance
from lorasweep.train.events import Event, State

Trainer = Callable[[list[RunSpec], Exec, "dict[str, State] | None"], Iterator[Event]]
Report = Callable[[dict[str, Any]], None]

CHECKPOINT_SHARE = 20
"""A checkpoint is made at most once in this many times its own cost: at most 5% of the time."""


class Stopped(Exception):
    """A signal asked for a clean stop; the checkpoint is written."""


class StopFlag:
    """Set by SIGINT, SIGTERM and Slurm's warning SIGUSR2: finish the update, write a checkpoint,
    leave."""

    SAME_S = 2.0
    """Signals this close together are one wish: a terminal's Ctrl-C reaches a worker directly and
    by its parent."""

    def __init__(self) -> None:
        self.set = False
        self._since = 0.0

    def install(self) -> None:
        """Take over these signals; one that comes later than SAME_S after the first ends the
        process at once."""

        def handler(number: int, frame: Any) -> None:
            impatient = (
                number == signal.SIGINT or ownership.OUR_JOB not in os.environ
            )  # Slurm has its own way to end us
            if self.set and impatient and time.monotonic() - self._since > self.SAME_S:
                os._exit(128 + number)
            if not self.set:
                self.set, self._since = True, time.monotonic()

        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGUSR2, handler)


def execute(
    pack: Sequence[RunSpec],
    exec_: Exec,
    store: RunStore,
    trainer: Trainer,
    report: Report,
    stop: StopFlag,
    micro_batch_size: int | None = None,
) -> None:
    """Claim what is free of the pack and bring it to an end. Failures are recorded, not raised;
    Stopped, a full disk, and data or models that the user must mend are raised.

    `micro_batch_size` is the plan's; the user's (exec.micro_batch_size) and a checkpoint's come
    before it.
    """
    claims: dict[str, int] = {}
    beats = None
    try:
        for spec in pack:
            n = store.claim(spec)
            if n is not None:
                claims[spec.id] = n
            elif not claims:
                # another worker has the first member, so this pack is its: never torn between two
                return
        beats = _Heartbeats(store, claims)
        members = [s for s in pack if s.id in claims]
        _run(members, claims, exec_, store, trainer, report, stop, micro_batch_size)
    except Stopped:
        _end_all(store, claims, "stopped", "asked to stop")
        raise
    except (
        SpecError,
        DataError,
        ModelError,
    ) as error:  # the user's to mend: said once, not recorded run by run
        _end_all(store, claims, "stopped", str(error))
        raise
    except Exception as error:
        text = traceback.format_exc()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = f"{type(error).__name__}: {error}"
        _end_all(store, claims, "stopped" if full else "failed", cause, text)
        if full:
            free = checkpoint.free_bytes(store.root) / 2**20
            need = checkpoint_bytes(pack) / 2**20
            raise StoreError(
                f"the disk of {store.root} is full ({free:.0f} MiB free); the checkpoints of the {len(pack)} run(s) that were "
                f"training take up to {need:.1f} MiB, and action=plan says what the whole sweep needs. Finished runs are safe. "
                "Free some space and give the same command again: it goes on from the last checkpoints."
            ) from None
        for rid in claims:
            if store.result(rid) is None:
                report({"run": rid, "ended": "failed", "cause": cause})
    finally:
        if beats is not None:
            beats.stop()


def _run(
    members: list[RunSpec],
    claims: dict[str, int],
    exec_: Exec,
    store: RunStore,
    trainer: Trainer,
    report: Report,
    stop: StopFlag,
    planned_rows: int | None,
) -> None:
    ids = [s.id for s in members]
    specs = dict(zip(ids, members))
    resume = checkpoint.load_pack({i: store.folder(i) / "checkpoint" for i in ids})
    if resume and any(resume[i]["meta"]["records_size"] > store.records_size(i) for i in ids):
        resume = None  # records that a power cut took cannot be mended: from the start
    layout_changed = False
    for i in ids:
        store.cut_records(i, resume[i]["meta"]["records_size"] if resume else 0)
        checkpoint.keep_only(
            store.folder(i) / "checkpoint", resume[i]["meta"]["step"] if resume else None
        )
        layout_changed |= bool(resume) and resume[i]["meta"]["layout"] != ids
    if resume:  # the same layout goes on bit for bit, so its threads and micro-batch go with it ...
        meta = resume[ids[0]]["meta"]
        rows = (
            exec_.micro_batch_size or meta["micro_batch_size"]
        )  # ... unless the user asks for another
        layout_changed |= rows != meta["micro_batch_size"]
        exec_ = Exec(**{**vars(exec_), "threads": meta["threads"], "micro_batch_size": rows})
    elif exec_.micro_batch_size is None:
        exec_ = Exec(**{**vars(exec_), "micro_batch_size": planned_rows})
    env = {
        **provenance.environment(),
        "pack": ids,
        "threads": exec_.threads,
        "micro_batch_size": exec_.micro_batch_size,
        "resumed_from_step": resume[ids[0]]["meta"]["step"] if resume else None,
        "resumed_in_other_company": layout_changed,
    }
    for i in ids:
        store.write_env(i, claims[i], env)
        store.log(
            i,
            claims[i],
            f"training {len(ids)} run(s) together; this one: {specs[i].method.name} "
            f"lr={specs[i].lr:g} seed={specs[i].seed}",
        )
    started, saved_at, cost, wall = time.monotonic(), time.monotonic(), 0.0, dict.fromkeys(ids, 0.0)
    if resume:
        wall = {i: resume[i]["meta"]["wall_s"] for i in ids}
    share_from, live = started, list(ids)

    for event in trainer(members, exec_, resume):
        now = time.monotonic()
        for i in live:  # a member's share of the pack's time
            wall[i] += (now - share_from) / len(live)
        share_from = now
        mine = [i for i in live if store.owns(i, claims[i])]
        for i in mine:
            store.record(i, event.records[i])
        for i, (state, final) in event.ended.items():
            if i in mine:
                extra = {
                    "wall_s": wall[i],
                    "n_trainable": specs[i].method.n_trainable(specs[i].model),
                    "attempt": claims[i],
                    "pack_size": len(ids),
                    "threads": exec_.threads,
                    "resumed_in_other_company": layout_changed,
                }
                store.finish(i, state, {**final, **extra})
                report(
                    {"run": i, "ended": state, "test_nll": final.get("test_nll"), "wall_s": wall[i]}
                )
        live = [i for i in live if i not in event.ended]
        report({"runs": live, "step": event.step})
        due = now - saved_at > max(exec_.checkpoint_s, CHECKPOINT_SHARE * cost)
        if live and (due or stop.set):
            for i, state in event.snapshot().items():
                if i in live and store.owns(i, claims[i]):
                    store.sync_records(i)
                    where = {
                        "layout": live,
                        "records_size": store.records_size(i),
                        "threads": exec_.threads,
                        "micro_batch_size": exec_.micro_batch_size,
                        "wall_s": wall[i],
                    }
                    state = {"tensors": state["tensors"], "meta": {**state["meta"], **where}}
                    checkpoint.save(store.folder(i) / "checkpoint", state)
            saved_at = time.monotonic()
            cost = saved_at - now
        if stop.set and live:
            raise Stopped


def _end_all(
    store: RunStore, claims: dict[str, int], state: str, cause: str, text: str = ""
) -> None:
    for rid, n in claims.items():
        if store.result(rid) is None:
            try:
                if text:
                    store.log(rid, n, text)
                store.write_end(rid, n, state, cause)
            except (
                OSError
            ):  # a full disk: without end.json the run counts as stale, which is also right
                continue


class _Heartbeats:
    """A thread that shows that the claimed runs are being worked on."""

    def __init__(self, store: RunStore, claims: dict[str, int]) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(store, dict(claims)), daemon=True)
        self._thread.start()

    def _beat(self, store: RunStore, claims: dict[str, int]) -> None:
        beat = 0
        while not self._done.wait(0 if beat == 0 else ownership.HEARTBEAT_S):
            beat += 1
            for rid, n in claims.items():
                try:
                    store.heartbeat(rid, n, beat)
                except OSError:
                    continue  # the training itself meets the same trouble and reports it

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


# ---------------------------------------------------------------- the real trainer


class TorchTrainer:
    """Loads base models and data once a process and trains packs with `lorasweep.train.loop`."""

    def __init__(self) -> None:
        self._base: tuple[Any, Any] | None = None
        self._data: dict[Any, Any] = {}

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None
    ) -> Iterator[Event]:
        import torch

        from lorasweep.data import load as data
        from lorasweep.models import load as models
        from lorasweep.train import pretrain
        from lorasweep.train.loop import train

        if exec_.threads:
            torch.set_num_threads(exec_.threads)
        first = pack[0]
        key = (
            json.dumps(first.model, default=vars, sort_keys=True),
            first.precision,
            exec_.compile,
        )
        if self._base is None or self._base[0] != key:
            self._base, self._data = None, {}  # one base in memory at a time
            pretrain.ensure(first.model, exec_.models_dir)
            self._base = (key, models.load(first.model, exec_.models_dir, first.precision))
            if exec_.compile:
                self._base[1].model.compile(dynamic=True)
        base = self._base[1]
        data_key = json.dumps(first.dataset, default=vars, sort_keys=True)
        if data_key not in self._data:
            self._data[data_key] = data.load(first.dataset, exec_.data_dir, base.tokenizer)
        yield from train(pack, base, self._data[data_key], exec_.micro_batch_size, resume)


def _trainer(name: str | None) -> Trainer:
    """Return the trainer of that name (package.module:object), or the real one."""
    if name is None:
        return TorchTrainer()
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def skipped(path: str | None) -> set[str]:
    """Read a file of run ids that are not to be started; none if it is not there."""
    try:
        with open(path or "", "rb") as file:
            return set(json.load(file))
    except (OSError, ValueError):
        return set()


def main(job_path: str, first: int = 0) -> int:
    """Run the packs of a job file that are free, in order from number `first`; events go to stdout
    as JSON lines."""
    die_with_parent()
    keep_freed_memory()
    stop = StopFlag()
    stop.install()
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    exec_ = Exec(**job["exec"])
    store = RunStore(exec_.runs_dir, dead=job.get("dead"))
    files.share_as(store.root)
    trainer = _trainer(job.get("trainer"))
    last = 0.0

    def report(event: dict[str, Any]) -> None:
        nonlocal last
        if "ended" in event or time.monotonic() - last > 0.3:
            last = time.monotonic()
            try:
                print(json.dumps(event), flush=True)
            except OSError:  # nobody listens any more: the command is gone, so stop cleanly
                stop.set = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    packs = job["packs"]
    try:
        for pack in packs[first:] + packs[:first]:
            unwanted = skipped(job.get("skip"))
            specs = [s for s in map(spec_from, pack["runs"]) if s.id not in unwanted]
            if specs:
                execute(specs, exec_, store, trainer, report, stop, pack["micro_batch_size"])
            if stop.set:
                return 3
    except Stopped:
        return 3
    except LorasweepError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
