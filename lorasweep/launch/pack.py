"""Train one pack from start to end on this machine: claim its runs, train them, record results.

Knows the store and the events of a trainer. Refuses to know how anything is trained.
"""

import dataclasses
import errno
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from lorasweep.errors import DataError, ModelError, SpecError, StoreError
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import Report, Trainer
from lorasweep.plan import detect
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.checkpoint import State
from lorasweep.store.claims import HEARTBEAT_S
from lorasweep.store.run_store import RunStore
from lorasweep.tracking import provenance
from lorasweep.train.events import Event

CHECKPOINT_SHARE = 20
"""Checkpoints are at least this many times their own cost apart, so they take at most 5% of the
time."""
ROWS = "micro_batch_size"
RESUMED_WITH_DIFFERENT_PACK = "resumed_in_other_company"
"""Key in env.json and result.json: the run was resumed in another pack or with another micro-batch.
The name is old, because kept results have it."""

Attempts = dict[str, int]
"""Run id -> number of this process's attempt."""


def execute(
    pack: Sequence[RunSpec],
    exec_: Exec,
    store: RunStore,
    trainer: Trainer,
    report: Report,
    stop: StopFlag,
    micro_batch_size: int | None = None,
) -> None:
    """Claim the free runs of a pack and train them to the end. Failures of runs are recorded.

    `micro_batch_size` is the plan's choice; exec.micro_batch_size and a checkpoint's value come
    before it.

    Raises:
        Stopped: `stop` was set; checkpoints are written.
        StoreError: the disk is full.
        SpecError, DataError, ModelError: something that the user must correct.
    """
    attempts: Attempts = {}
    beats = None
    try:
        _claim(pack, store, attempts)
        if not attempts:
            return
        beats = _Heartbeats(store, attempts)
        members = [s for s in pack if s.id in attempts]
        _Session(members, attempts, exec_, store, micro_batch_size).run(trainer, report, stop)
    except Stopped:
        _end_all(store, attempts, "stopped", "asked to stop")
        raise
    except (SpecError, DataError, ModelError) as error:  # reported once, not run by run
        _end_all(store, attempts, "stopped", str(error))
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end_all(store, attempts, "stopped", cause, traceback.format_exc())
            raise _disk_full(store, pack) from None
        _end_all(store, attempts, "failed", cause, traceback.format_exc())
        for rid in attempts:
            if store.result(rid) is None:
                report({"run": rid, "ended": "failed", "cause": cause})
    finally:
        if beats is not None:
            beats.stop()


def _claim(pack: Sequence[RunSpec], store: RunStore, attempts: Attempts) -> None:
    for spec in pack:
        n = store.claim(spec)
        if n is not None:
            attempts[spec.id] = n
        elif not attempts:
            return  # another worker has the first member, so it takes the pack: packs stay whole


def _disk_full(store: RunStore, pack: Sequence[RunSpec]) -> StoreError:
    free = checkpoint.free_bytes(store.root) / 2**20
    need = checkpoint_bytes(pack) / 2**20
    return StoreError(
        f"the disk of {store.root} is full ({free:.0f} MiB free). The checkpoints of the "
        f"{len(pack)} run(s) in training take up to {need:.1f} MiB; action=plan shows what the "
        "whole sweep needs. Finished runs are safe. Free some space, then run the same command "
        "again: it continues from the last checkpoints."
    )


def _end_all(
    store: RunStore, attempts: Attempts, state: str, cause: str, log_text: str = ""
) -> None:
    for rid, n in attempts.items():
        if store.result(rid) is None:
            try:
                if log_text:
                    store.log(rid, n, log_text)
                store.write_end(rid, n, state, cause)
            except OSError:
                continue  # a full disk: without end.json the run counts as interrupted, fine


def _resume(ids: Sequence[str], store: RunStore) -> dict[str, State] | None:
    """Load the latest common checkpoint and cut the records back to it.

    None if there is none: the runs start from the beginning.
    """
    folders = {i: store.folder(i) / "checkpoint" for i in ids}
    states = checkpoint.load_pack(folders)
    if states and any(states[i]["meta"]["records_size"] > store.records_size(i) for i in ids):
        states = None  # a power failure lost records from before the checkpoint
    for i in ids:
        store.cut_records(i, states[i]["meta"]["records_size"] if states else 0)
        checkpoint.keep_only(folders[i], states[i]["meta"]["step"] if states else None)
    return states


class _Session:
    """The training of one claimed pack: what it resumes from, and what is recorded."""

    def __init__(
        self,
        members: list[RunSpec],
        attempts: Attempts,
        exec_: Exec,
        store: RunStore,
        planned_rows: int | None,
    ) -> None:
        self.members, self.attempts, self.store = members, attempts, store
        self.specs = {s.id: s for s in members}
        self.ids = list(self.specs)
        self.live = list(self.ids)
        self.states = _resume(self.ids, store)
        self.different_pack = False
        self.exec = self._settings(exec_, planned_rows)
        self.wall_s = dict.fromkeys(self.ids, 0.0)
        if self.states:
            self.wall_s = {i: self.states[i]["meta"]["wall_s"] for i in self.ids}

    def _settings(self, exec_: Exec, planned_rows: int | None) -> Exec:
        """Return the settings to train with.

        The same pack continues bit for bit, so it keeps the threads and the micro-batch of its
        checkpoint, unless the user sets another micro-batch.
        """
        if not self.states:
            rows = planned_rows if exec_.micro_batch_size is None else exec_.micro_batch_size
            return dataclasses.replace(exec_, micro_batch_size=rows)
        metas = [self.states[i]["meta"] for i in self.ids]
        rows = exec_.micro_batch_size or metas[0][ROWS]
        self.different_pack = rows != metas[0][ROWS] or any(m["layout"] != self.ids for m in metas)
        return dataclasses.replace(exec_, threads=metas[0]["threads"], micro_batch_size=rows)

    def run(self, trainer: Trainer, report: Report, stop: StopFlag) -> None:
        """Train, and record each event.

        Ends early once other processes have taken over all of its runs.

        Raises:
            Stopped: a stop was asked for, and checkpoints are written.
        """
        self._write_start()
        saved_at = share_from = time.monotonic()
        save_s = 0.0
        for number, event in enumerate(trainer(self.members, self.exec, self.states)):
            now = time.monotonic()
            if number == 0:
                self._write_env({"backend": event.backend})
            for i in self.live:  # a member's share of the pack's time
                self.wall_s[i] += (now - share_from) / len(self.live)
            share_from = now
            owned = [i for i in self.live if self.store.owns(i, self.attempts[i])]
            if not owned:
                return _end_all(self.store, self.attempts, "stopped", "another process took over")
            self._record(event, owned, report)
            due = now - saved_at > max(self.exec.checkpoint_s, CHECKPOINT_SHARE * save_s)
            if self.live and (due or stop.set):
                self._save(event)
                saved_at = time.monotonic()
                save_s = saved_at - now
            if stop.set and self.live:
                raise Stopped

    def _write_env(self, more: dict[str, Any]) -> None:
        env = {
            **provenance.environment(),
            "pack": self.ids,
            "threads": self.exec.threads,
            ROWS: self.exec.micro_batch_size,
            "gpu": next((gpu.name for gpu in detect.gpus()), None),
            "compile": self.exec.compile,
            "resumed_from_step": self.states[self.ids[0]]["meta"]["step"] if self.states else None,
            RESUMED_WITH_DIFFERENT_PACK: self.different_pack,
            **more,
        }
        for i in self.specs:
            self.store.write_env(i, self.attempts[i], env)

    def _write_start(self) -> None:
        self._write_env({})
        for i, spec in self.specs.items():
            self.store.log(
                i,
                self.attempts[i],
                f"training {len(self.ids)} run(s) together; this one: {spec.method.name} "
                f"lr={spec.lr:g} seed={spec.seed}",
            )

    def _record(self, event: Event, owned: Sequence[str], report: Report) -> None:
        for i in owned:
            self.store.record(i, event.records[i])
        for i, (state, measures) in event.ended.items():
            if i in owned:
                self.store.finish(i, state, {**measures, **self._circumstances(i)})
                metric = metric_of(measures)
                outcome = {"measure": metric.label, "value": metric.value(measures)}
                report({"run": i, "ended": state, **outcome, "wall_s": self.wall_s[i]})
        self.live = [i for i in self.live if i not in event.ended]
        report({"runs": self.live, "step": event.step})

    def _circumstances(self, i: str) -> dict[str, Any]:
        spec = self.specs[i]
        return {
            "wall_s": self.wall_s[i],
            "n_trainable": spec.method.n_trainable(spec.model),
            "attempt": self.attempts[i],
            "pack_size": len(self.ids),
            "threads": self.exec.threads,
            RESUMED_WITH_DIFFERENT_PACK: self.different_pack,
        }

    def _save(self, event: Event) -> None:
        for i, state in event.snapshot().items():
            if i in self.live and self.store.owns(i, self.attempts[i]):
                self.store.sync_records(i)
                meta = {
                    **state["meta"],
                    "layout": self.live,
                    "records_size": self.store.records_size(i),
                    "threads": self.exec.threads,
                    ROWS: self.exec.micro_batch_size,
                    "wall_s": self.wall_s[i],
                }
                checkpoint.save(
                    self.store.folder(i) / "checkpoint",
                    {"tensors": state["tensors"], "meta": meta},
                )


class _Heartbeats:
    """A thread that writes the heartbeats of the claimed runs."""

    def __init__(self, store: RunStore, attempts: Attempts) -> None:
        self._store, self._attempts = store, dict(attempts)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(HEARTBEAT_S if beat else 0):
            beat += 1
            for rid, n in self._attempts.items():
                try:
                    self._store.heartbeat(rid, n, beat)
                except OSError:
                    continue  # the training meets the same error and reports it

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._done.set()
        self._thread.join()
