"""Train one pack: claim its runs, train them in the available memory, record how each ended.

`execute` handles errors. `_Pack` makes as many attempts as the memory requires. `_Attempt` trains
once, from the last checkpoint, and records events.
"""

import errno
import time
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasweep.errors import DataError, ModelError, SpecError, StoreError
from lorasweep.launch.out_of_memory import Limit, Limits, Shortage, free_memory, is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.torch_trainer import Report, Trainer
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.checkpoint import State
from lorasweep.store.owners import Heartbeat
from lorasweep.store.run_store import TRIAL, Record, RunStore
from lorasweep.tracking import provenance
from lorasweep.train.events import Event

CHECKPOINT_SHARE = 20
"""Minimum time between checkpoints, as a multiple of the time to write one. So writing takes at
most 5% of the time."""
LOOK_S = 5.0
"""Seconds between checks of ownership, which also write the new records; a check costs about a
millisecond per run on a network file system."""
ROWS, PROCESSES, PARTS = "micro_batch_size", "processes", "forward_parts"
END = "end"
"""Folder of the final state of a short run (exec.short_steps)."""
RESUMED_WITH_DIFFERENT_PACK = "resumed_in_other_company"
"""Stored key: whether the run resumed in a different pack, or with other ROWS, PROCESSES, PARTS."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_OF_THE_DATA = (Stopped, SpecError, ModelError, StoreError)
"""Errors that are never caused by a data set."""


def execute(
    pack: Sequence[RunSpec],
    exec_: Exec,
    store: RunStore,
    trainer: Trainer,
    report: Report,
    stop: StopFlag,
    micro_batch_size: int | None = None,
    limits: Limits | None = None,
) -> None:
    """Claim the free runs of a pack and train them to the end; record failures of runs.

    `micro_batch_size`: used if neither exec.micro_batch_size nor a checkpoint has one. Raises
    Stopped if `stop` was set, with checkpoints written; StoreError if the disk is full, or a file
    cannot be read or written now; SpecError, DataError or ModelError if the user must correct
    something.
    """
    claimed = _Pack(exec_, store, trainer, report, stop)
    heartbeat = None
    try:
        runs = claimed.claim(pack)
        if runs:
            heartbeat = Heartbeat(
                lambda: [store.attempt(rid, n) for rid, n in list(claimed.attempts.items())]
            )
            limit = (Limits() if limits is None else limits).of(runs[0])
            claimed.train(runs, micro_batch_size, limit)
    except Stopped:
        claimed.end_all("stopped", "asked to stop")
        raise
    except (SpecError, DataError, ModelError, StoreError) as error:  # the caller reports it once
        claimed.end_all("stopped", str(error))
        raise
    except Exception as error:
        cause, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, OSError) and claimed.concerns_folder(error):
            claimed.end_all("stopped", cause, trace)
            raise StoreError(
                f"{error.filename or store.root} cannot be read or written ({error}). Correct "
                "that, or choose exec.runs_dir=FOLDER; then run the same command again: it resumes "
                "from the last checkpoints."
            ) from error
        if unwritten := claimed.end_all("failed", cause, trace):
            # this process is alive, so the run would count as running: its end ends the claim
            raise StoreError(
                f"the failure of run {unwritten} ({cause}) cannot be written to {store.root}. Run "
                "the same command again when it can."
            ) from error
    finally:
        if heartbeat is not None:
            heartbeat.stop()


@dataclass
class _Pack:
    """The runs of a pack that this process has claimed."""

    exec: Exec
    store: RunStore
    trainer: Trainer
    report: Report
    stop: StopFlag
    attempts: dict[str, int] = field(default_factory=dict)
    """Run id -> attempt number of this process. Failed runs and runs that it lost are removed."""

    def claim(self, pack: Sequence[RunSpec]) -> list[RunSpec]:
        """Claim and return the free runs. If the first is taken, claim none: packs stay whole."""
        for spec in pack:
            if (n := self.store.claim(spec)) is not None:
                self.attempts[spec.id] = n
            elif not self.attempts:
                return []
        return [s for s in pack if s.id in self.attempts]

    def owns(self, rid: str) -> bool:
        """Return whether this process still owns a run; if not, end the attempt."""
        if rid not in self.attempts:
            return False
        if self.store.last_attempt(rid) == self.attempts[rid]:
            return True
        self.end(rid, "stopped", "another process took over")
        return False

    def log(self, spec: RunSpec, text: str) -> None:
        """Write to the log of a run in `attempts`."""
        if spec.id in self.attempts:
            self.store.log(spec.id, self.attempts[spec.id], text)

    def end(self, rid: str, state: str, cause: str, trace: str = "") -> None:
        """End the attempt at a run, if it is in `attempts`, as 'stopped' or 'failed'."""
        if (n := self.attempts.pop(rid, None)) is None:
            return
        if trace:
            self.store.log(rid, n, trace)
        self.store.write_end(rid, n, state, cause)
        if state == "failed":
            self.report({"run": rid, "ended": "failed", "cause": cause})

    def concerns_folder(self, error: Exception) -> bool:
        """Return whether an error is of the run folder or its disk, so that no run can go on."""
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        return full or Path(str(getattr(error, "filename", ""))).is_relative_to(self.store.root)

    def end_all(self, state: str, cause: str, trace: str = "") -> str:
        """End the attempts at all unfinished runs.

        Returns a run whose result cannot be read, or whose end cannot be written; '' if none.
        """
        unwritten = ""
        for rid in list(self.attempts):
            try:
                if self.store.result(rid) is None:
                    self.end(rid, state, cause, trace)
            except (OSError, StoreError):
                unwritten = rid
        return unwritten

    def train(self, runs: list[RunSpec], planned_rows: int | None, limit: Limit) -> None:
        """Train the runs to the end, in parts of at most `limit.runs`, from the latest checkpoints.

        If memory runs out, `limit` is lowered.
        """
        tried = [s for s in runs if self.exec.world_size == 1 and _has_trial(s, self.store)]
        parts = [tried, [s for s in runs if s not in tried]]
        while parts:
            part = [s for s in parts.pop(0) if not self.store.result(s.id) and self.owns(s.id)]
            if not part:
                continue
            if limit.runs is not None and len(part) > limit.runs:
                parts = [part[: limit.runs], part[limit.runs :], *parts]
                continue
            try:
                found = self._attempt(part, planned_rows, limit)
            except Exception as error:
                of_all = isinstance(error, NOT_OF_THE_DATA) or self.concerns_folder(error)
                if of_all or not self.exec.skip_broken_data:
                    raise
                parts = [*self._without_broken_data(part, error), *parts]
                continue
            if found is None:
                continue
            free_memory()
            if self.stop.set:
                raise Stopped
            shortage, trace = found
            if instead := limit.lower(shortage, len(part)):
                text = shortage.retry_text(part[0], len(part), instead)
                for spec in part:
                    self.log(spec, trace + text)
                self.report({"note": text})
                parts.insert(0, part)
            else:
                self.end(part[0].id, "failed", shortage.failure_text(part[0]), trace)

    def _attempt(
        self, part: list[RunSpec], planned_rows: int | None, limit: Limit
    ) -> tuple[Shortage, str] | None:
        """Train once. If memory runs out, return the shortage and the traceback, else None."""
        # a separate function, so that no variable keeps attempt and error, which hold tensors
        attempt = _Attempt(self, part, planned_rows, limit)
        try:
            attempt.train()
        except Exception as error:
            with suppress(OSError, StoreError):  # the first error is the one to report
                attempt.write_records()
            if not is_out_of_memory(error):
                raise
            return Shortage.of(error, attempt.exec, part[0]), traceback.format_exc()
        return None

    def _without_broken_data(self, part: list[RunSpec], error: Exception) -> list[list[RunSpec]]:
        """Fail the runs whose data caused an error; return the other runs, in parts to train.

        If it is unknown which data set caused the error, each is trained separately. The logs then
        leave out the error, which may quote data of another owner.
        """
        broken = [s for s in part if s.dataset == getattr(error, "dataset", part[0].dataset)]
        rest = [s for s in part if s not in broken]
        if rest and not hasattr(error, "dataset"):
            for spec in part:
                self.log(spec, "this pack failed: each of its data sets is trained separately")
            return [broken, rest]
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        for spec in broken:
            trace = "".join(traceback.format_exception(error))
            self.end(spec.id, "failed", f"{kind}{error}", trace)
        return [rest]


class _Attempt:
    """One training of claimed runs, from their latest common checkpoint; writes their records."""

    def __init__(
        self, pack: _Pack, runs: list[RunSpec], planned_rows: int | None, limit: Limit
    ) -> None:
        """Load the latest common checkpoint and its settings; delete the records made after it."""
        store, ids = pack.store, [s.id for s in runs]
        self.pack, self.store, self.runs = pack, store, runs
        self.ids, self.live = ids, list(ids)
        self.unwritten: dict[str, list[Record]] = {i: [] for i in ids}
        folders = {i: store.folder(i) / "checkpoint" for i in ids}
        states = checkpoint.load_pack(folders)
        if states and any(states[i]["meta"]["records_size"] > store.records_size(i) for i in ids):
            states = None  # a power failure lost records from before the checkpoint
        for i in ids:
            meta = states[i]["meta"] if states else {"records_size": 0, "step": None}
            store.cut_records(i, meta["records_size"])
            checkpoint.keep_only(folders[i], meta["step"])
        self.states = states = states or self._trials() or self._beginnings()
        metas = {i: states[i]["meta"] for i in ids} if states else {}
        self.wall_s = {i: metas[i]["wall_s"] if metas else 0.0 for i in ids}
        exec_, first = pack.exec, metas.get(ids[0], {})
        rows = exec_.micro_batch_size or first.get(ROWS, planned_rows)
        if limit.rows is not None:
            rows = min(limit.rows, rows or limit.rows)
        before = (first.get(ROWS), first.get(PROCESSES, 1), first.get(PARTS, 1))
        parts = max(exec_.forward_parts, limit.forward_parts, before[2])
        threads = first.get("threads", exec_.threads)
        different = bool(metas) and (rows, exec_.world_size, parts) != before
        for meta in metas.values():
            different |= meta["layout"] != ids or bool(meta.get(RESUMED_WITH_DIFFERENT_PACK))
        self.exec = replace(exec_, threads=threads, micro_batch_size=rows, forward_parts=parts)
        # what env.json and checkpoints record of the execution
        self.circumstances = {"threads": threads, ROWS: rows, PROCESSES: exec_.world_size}
        self.circumstances |= {PARTS: parts, RESUMED_WITH_DIFFERENT_PACK: different}

    def _trials(self) -> dict[str, State] | None:
        """Return weights and results of the trials of these runs; None unless all have one.

        Their records become the first records of these runs.
        """
        store, states = self.store, {}
        for spec in self.runs if self.pack.exec.world_size == 1 else ():
            trial = spec.trial.id
            weights = _has_trial(spec, store) and checkpoint.load_weights(store.folder(trial))
            if not weights:
                return None
            result, env = store.result(trial) or {}, store.env(trial)
            kept = {k: v for k, v in result.items() if k not in ("run_id", "state")}
            meta = {
                **{k: env.get(k, 1) for k in ("threads", ROWS, PROCESSES, PARTS)},
                **{k: result[k] for k in ("wall_s", RESUMED_WITH_DIFFERENT_PACK)},
                **{"step": result["steps_done"], "layout": self.ids},
                **{"result": {**kept, TRIAL: trial}, "last": (store.records(trial) or [{}])[-1]},
            }
            tensors = {f"{checkpoint.PARAM}{name}": tensor for name, tensor in weights.items()}
            states[spec.id] = State(tensors=tensors, meta=meta)
        for spec in self.runs if states else ():
            store.record(spec.id, *store.records(spec.trial.id)[:-1])
        return states or None

    def _beginnings(self) -> dict[str, State] | None:
        """Return the final states of shorter runs that are beginnings of these; None unless all.

        Their records become the first ones of these runs. A run that may end early has no
        beginning: the final state of the shorter one has its best weights.
        """
        steps, store = self.pack.exec.short_steps, self.store
        if steps is None or any(
            s.steps <= steps or s.schedule != "constant" or s.early_stopping for s in self.runs
        ):
            return None
        shorter = {s.id: replace(s, steps=steps).id for s in self.runs}
        states = checkpoint.load_pack({i: store.folder(k) / END for i, k in shorter.items()})
        for i in shorter if states else ():
            store.record(i, *store.records(shorter[i]))
        return states

    def train(self) -> None:
        """Train and record; raise Stopped, with checkpoints written, if `stop` was set."""
        self._write_env()
        for spec in self.runs:
            this = f"{spec.method.name} lr={spec.lr:g} seed={spec.seed}"
            self.pack.log(spec, f"training {len(self.ids)} run(s) together; this one: {this}")
        stop = self.pack.stop
        saved_at = looked_at = counted_at = time.monotonic()
        save_s = 0.0
        with closing(self.pack.trainer(self.runs, self.exec, self.states)) as events:
            for number, event in enumerate(events):
                now = time.monotonic()
                if number == 0:
                    self._write_env(backend=event.backend)
                for i in self.live:
                    # share of the pack's time
                    self.wall_s[i] += (now - counted_at) / len(self.live)
                    self.unwritten[i].append(event.records[i])
                counted_at = now
                self._finish(event)
                self.pack.report({"runs": self.live, "step": event.step})
                due = now - saved_at > max(self.exec.checkpoint_s, CHECKPOINT_SHARE * save_s)
                if self.live and (due or stop.set):
                    self.write_records()
                    layout, states = list(self.live), event.snapshot()
                    for i in layout:
                        if self._still_owned(i):  # the checkpoints before may have taken minutes
                            self._save_state(i, "checkpoint", states[i], layout)
                    saved_at = looked_at = time.monotonic()
                    save_s = saved_at - now
                elif number == 0 or now - looked_at > LOOK_S:
                    self.write_records()
                    looked_at = now
                if not self.live:
                    return
                if stop.set:
                    raise Stopped
                event.dropped.update(set(event.records) - set(self.live))

    def _write_env(self, **more: Any) -> None:
        env = {**provenance.environment(), "pack": self.ids, **self.circumstances, **more}
        asked = ("models_dir", "data_dir", "trainer_files", "prune_weights")
        env |= {name: getattr(self.exec, name) for name in asked}
        env["gpu"] = next((gpu.name for gpu in detect.gpus()), None)
        for i, spec in zip(self.ids, self.runs):
            env["offered_by"] = provenance.packages_of(spec)
            step = self.states[i]["meta"]["step"] if self.states else None
            self.store.write_env(i, self.pack.attempts[i], {**env, "resumed_from_step": step})

    def write_records(self) -> None:
        """Write the new records of the runs in training."""
        for i in list(self.live):
            self._still_owned(i)

    def _still_owned(self, i: str) -> bool:
        """Write the new records of a run. If another process owns it now, drop it; return False.

        Called right before each other write for a run: a new owner cuts the records back to the
        checkpoint.
        """
        if not self.pack.owns(i):
            self.live.remove(i)
            return False
        self.store.record(i, *self.unwritten[i])
        self.unwritten[i] = []
        return True

    def _finish(self, event: Event) -> None:
        """Record the runs that ended, with the weights and states that are kept."""
        weights, short = self.exec.keep_weights, self.exec.short_steps
        done = [i for i, (state, _) in event.ended.items() if state == "done"]
        short_ones = {s.id for s in self.runs if s.steps == short}
        states = event.snapshot() if done and (weights or short_ones) else {}
        for i, (state, measures) in event.ended.items():
            if i not in self.live or not self._still_owned(i):
                continue
            spec = self.runs[self.ids.index(i)]
            if i in done and weights:
                checkpoint.save_weights(self.store.folder(i), states[i])
            if i in done and i in short_ones:
                self._save_state(i, END, states[i], list(states))
            result = {
                **measures,
                "wall_s": self.wall_s[i],
                "n_trainable": spec.method.n_trainable(spec.model),
                "attempt": self.pack.attempts[i],
                "pack_size": len(self.ids),
                **{k: self.circumstances[k] for k in ("threads", RESUMED_WITH_DIFFERENT_PACK)},
            }
            if packages := provenance.packages_of(spec):
                result["packages"] = packages
            self.store.finish(i, state, result)
            metric = metric_of(measures)
            outcome = {"measure": metric.label, "value": metric.value(measures)}
            if not spec.test_rows:
                outcome = {"measure": "validation NLL", "value": measures.get(metric.on_part)}
            self.pack.report({"run": i, "ended": state, **outcome, "wall_s": self.wall_s[i]})
        self.live = [i for i in self.live if i not in event.ended]

    def _save_state(self, i: str, name: str, state: State, layout: list[str]) -> None:
        """Write the state of a run into the folder `name` of its folder."""
        self.store.sync_records(i)
        size, meta = self.store.records_size(i), {**state["meta"], **self.circumstances}
        meta |= {"layout": layout, "records_size": size, "wall_s": self.wall_s[i]}
        checkpoint.save(self.store.folder(i) / name, {**state, "meta": meta})


def _has_trial(spec: RunSpec, store: RunStore) -> bool:
    """Return whether the trial of a run has ended, so that the run only has to be measured."""
    if not spec.test_rows or not spec.dataset.n_validation:
        return False
    weights = store.folder(spec.trial.id) / checkpoint.WEIGHTS
    return weights.is_file() and (store.result(spec.trial.id) or {}).get("state") == "done"
