"""Train a claimed pack: from its last checkpoint to its end, recording what is measured.

Knows the store and the events of a trainer. Refuses to know how runs are claimed.
"""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lorasweep.errors import StoreError
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import Report, Trainer
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.checkpoint import State
from lorasweep.store.records import Record
from lorasweep.store.run_store import RunStore
from lorasweep.tracking import provenance
from lorasweep.train.events import Event

CHECKPOINT_SHARE = 20
"""Checkpoints are at least this many times their own cost apart, so they take at most 5% of the
time."""
LOOK_S = 5.0
"""Seconds between looks at who owns the runs; new records are written then, too. On a network file
system each costs a round trip a run, about a millisecond, so neither is done at every update. A
process that is alive loses a claim only after SILENCE_S, so a few seconds of training more are
little."""
ROWS, PROCESSES, PARTS = "micro_batch_size", "processes", "forward_parts"
RESUMED_WITH_DIFFERENT_PACK = "resumed_in_other_company"
"""Key in env.json and result.json: the run was resumed in another pack, with another micro-batch,
another part of sampling and evaluation at once, or on another number of processes. The name is old,
because kept results have it."""


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


def leave_to_new_owner(rid: str, attempts: dict[str, int], store: RunStore) -> None:
    """End this process's attempt at a run that another process has taken over."""
    store.write_end(rid, attempts.pop(rid), "stopped", "another process took over")


def _at_most(most: int | None, rows: int | None) -> int | None:
    return rows if most is None else min(most, rows or most)


class Session:
    """The training of one claimed pack: what it resumes from, and what is recorded."""

    def __init__(
        self,
        members: list[RunSpec],
        attempts: dict[str, int],
        exec_: Exec,
        store: RunStore,
        planned_rows: int | None,
        most_rows: int | None = None,
    ) -> None:
        """Load the latest common checkpoint of the members, and cut their records back to it.

        `attempts` is shared with the caller: runs that other processes took over are removed.
        `most_rows`: the largest micro-batch that may fit into the memory.
        """
        self.members, self.attempts, self.store = members, attempts, store
        self.specs = {s.id: s for s in members}
        self.ids = list(self.specs)
        self.live = list(self.ids)
        self.unwritten: dict[str, list[Record]] = {i: [] for i in self.ids}
        self.states = _resume(self.ids, store)
        self.different_pack = False
        self.exec = self._settings(exec_, planned_rows, most_rows)
        self.wall_s = dict.fromkeys(self.ids, 0.0)
        if self.states:
            self.wall_s = {i: self.states[i]["meta"]["wall_s"] for i in self.ids}

    @property
    def rows(self) -> int:
        """Rows per member and forward pass."""
        return self.exec.rows_of(self.members[0].batch_size)

    def _settings(self, exec_: Exec, planned_rows: int | None, most_rows: int | None) -> Exec:
        """Return the settings to train with.

        The same pack continues bit for bit, so it keeps the threads and the micro-batch of its
        checkpoint, unless the user sets another micro-batch or it does not fit.
        """
        if not self.states:
            rows = planned_rows if exec_.micro_batch_size is None else exec_.micro_batch_size
            return dataclasses.replace(exec_, micro_batch_size=_at_most(most_rows, rows))
        metas = [self.states[i]["meta"] for i in self.ids]
        rows = _at_most(most_rows, exec_.micro_batch_size or metas[0][ROWS])
        before = (metas[0][ROWS], metas[0].get(PROCESSES, 1), metas[0].get(PARTS, 1))
        parts = max(exec_.forward_parts, before[2])
        self.different_pack = (rows, exec_.world_size, parts) != before or any(
            m["layout"] != self.ids or m.get(RESUMED_WITH_DIFFERENT_PACK) for m in metas
        )
        return dataclasses.replace(
            exec_, threads=metas[0]["threads"], micro_batch_size=rows, forward_parts=parts
        )

    def run(self, trainer: Trainer, report: Report, stop: StopFlag) -> None:
        """Train, and record what is measured. Runs that other processes took over are dropped.

        Raises:
            Stopped: a stop was asked for, and checkpoints are written.
        """
        self._write_start()
        try:
            self._train(trainer, report, stop)
        except Exception:
            with suppress(OSError, StoreError):  # the first error is the one to report
                self._look()
            raise

    def _train(self, trainer: Trainer, report: Report, stop: StopFlag) -> None:
        saved_at = looked_at = share_from = time.monotonic()
        save_s = 0.0
        for number, event in enumerate(trainer(self.members, self.exec, self.states)):
            now = time.monotonic()
            if number == 0:
                self._write_env({"backend": event.backend})
            for i in self.live:
                self.wall_s[i] += (now - share_from) / len(self.live)  # its share of the pack's
                self.unwritten[i].append(event.records[i])
            share_from = now
            self._finish(event, report)
            due = now - saved_at > max(self.exec.checkpoint_s, CHECKPOINT_SHARE * save_s)
            if self.live and (due or stop.set):
                self._save(event)
                saved_at = looked_at = time.monotonic()
                save_s = saved_at - now
            elif number == 0 or now - looked_at > LOOK_S:
                self._look()
                looked_at = now
            if not self.live:
                return
            if stop.set:
                raise Stopped
            event.dropped.update(set(event.records) - set(self.live))

    def _write_env(self, more: dict[str, Any]) -> None:
        env = {
            **provenance.environment(),
            "pack": self.ids,
            "threads": self.exec.threads,
            ROWS: self.exec.micro_batch_size,
            "gpu": next((gpu.name for gpu in detect.gpus()), None),
            "compile": self.exec.compile,
            PROCESSES: self.exec.world_size,
            PARTS: self.exec.forward_parts,
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

    def _look(self) -> list[str]:
        """Write new records, and return the live runs that this process still owns."""
        return [i for i in list(self.live) if self._still_mine(i)]

    def _still_mine(self, i: str) -> bool:
        """Write a live run's new records and return True, or leave it to its new owner.

        Called right before anything else is written for a run, because a new owner cuts the records
        back to the checkpoint that it continues from.
        """
        if not self.store.owns(i, self.attempts[i]):
            self.live.remove(i)
            leave_to_new_owner(i, self.attempts, self.store)
            return False
        self.store.record(i, *self.unwritten[i])
        self.unwritten[i] = []
        return True

    def _finish(self, event: Event, report: Report) -> None:
        keeps = self.exec.keep_weights and any(s == "done" for s, _ in event.ended.values())
        states = event.snapshot() if keeps else {}
        for i, (state, measures) in event.ended.items():
            if i in self.live and self._still_mine(i):
                if state == "done" and states:
                    checkpoint.save_weights(self.store.folder(i), states[i])
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
        layout, states = self._look(), event.snapshot()
        for i in layout:
            if not self._still_mine(i):  # writing the others' checkpoints may have taken minutes
                continue
            self.store.sync_records(i)
            meta = {
                **states[i]["meta"],
                "layout": layout,
                "records_size": self.store.records_size(i),
                "threads": self.exec.threads,
                ROWS: self.exec.micro_batch_size,
                PROCESSES: self.exec.world_size,
                PARTS: self.exec.forward_parts,
                RESUMED_WITH_DIFFERENT_PACK: self.different_pack,
                "wall_s": self.wall_s[i],
            }
            checkpoint.save(self.store.folder(i) / "checkpoint", {**states[i], "meta": meta})
