"""RunStore: one folder per run, the only place where the state of runs is kept.

    <runs_dir>/store.json       train_version of the runs; two versions are never mixed
    <runs_dir>/<run_id>/
        spec.json       canonical spec
        metrics.jsonl   one record per line
        attempts/<n>/   owner.json (created with the folder), env.json, log.txt, heartbeat, end.json
        checkpoint/     two slots, deleted when the run is finished
        result.json     written last, once, with a checksum: the run is finished

This module must not depend on torch.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.errors import StoreError
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import TRAIN_VERSION, RunSpec
from lorasweep.store import checkpoint, files, owners

STATES = ("missing", "running", "interrupted", "failed", "diverged", "done")
"""States of a run, computed from its folder and never stored. missing: not started. interrupted:
its process ended early. failed: ended by an error. diverged, done: the run has a result."""
FINISHED = ("done", "diverged")
Record = dict[str, Any]
"""Measurements of one update: JSON values, at least `step`."""
Result = dict[str, Any]
"""End and measurements of a run: JSON values, at least `run_id` and `state`."""
TRIAL = "trial"
"""Key in a result: the run (RunSpec.trial) whose weights were measured on test rows."""


class Entry(NamedTuple):
    """Part of a result that is kept in memory."""

    size: int
    mtime_ns: int
    state: str
    metric: str
    higher_is_better: bool
    value: float | None
    """Value of the metric."""


class RunStore:
    """The runs in one folder."""

    def __init__(
        self,
        root: str | Path,
        dead: dict[str, int] | None = None,
        jobs: owners.RunningJobs | None = None,
    ) -> None:
        """Set the folder. `dead`: run id -> attempt whose owner is known to be dead."""
        self.root = Path(root).expanduser().absolute()
        self._liveness = owners.Liveness(jobs)
        self._dead = dead or {}
        self._known: dict[str, Entry] = {}

    def prepare(self) -> None:
        """Create the folder; raise StoreError if it is not writable or of another train_version."""
        mark, version = self.root / "store.json", None
        try:
            files.make_own(self.root)
            # by a hard link, also if there is one: results need them, too
            files.create_once(mark, json.dumps({"train_version": TRAIN_VERSION}).encode())
            with suppress(ValueError, KeyError, TypeError):
                version = json.loads(mark.read_bytes())["train_version"]
        except OSError as error:
            raise StoreError(
                f"run folder {self.root} cannot be written, or its file system has no hard links "
                f"({error.strerror or error}). Choose another: exec.runs_dir=FOLDER, or set "
                "LORASWEEP_RUNS."
            ) from None
        if version != TRAIN_VERSION:
            raise StoreError(
                f"{mark} says train_version {version}; this lorasweep has version {TRAIN_VERSION}, "
                "and two are never mixed. Use another folder: exec.runs_dir=FOLDER."
            )

    def folder(self, rid: str) -> Path:
        """Return the folder of a run, which need not exist."""
        return self.root / rid

    def attempt(self, rid: str, n: int) -> Path:
        """Return the folder of an attempt at a run, which need not exist."""
        return self.folder(rid) / "attempts" / str(n)

    def existing(self) -> set[str]:
        """Return the run ids that have a folder, from one directory scan."""
        found = files.patiently(self.root, lambda: [e for e in os.scandir(self.root) if e.is_dir()])
        return {entry.name for entry in found or () if not entry.name.startswith(".")}

    # ------------------------------------------------------------ reading

    def result(self, rid: str) -> Result | None:
        """Return the result of a finished run; None if it is missing or damaged.

        This and the methods below raise StoreError if a file cannot be read now.
        """
        with suppress(ValueError, KeyError, TypeError):
            wrapped = json.loads(files.read(self.folder(rid) / "result.json") or b"")
            body = wrapped["result"]
            return body if wrapped["sha256"] == checksum(body) else None
        return None

    def state(self, rid: str) -> str:
        """Return the state of a run, from its folder alone."""
        result = self.result(rid)
        if result is not None:
            return result["state"]
        if (last := self.last_attempt(rid)) is None:
            return "missing"
        if end := self.end(rid, last):
            return "failed" if end["state"] == "failed" else "interrupted"
        return "running" if self._alive(rid, last) else "interrupted"

    def states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the state of each id. Fast for ids without a folder and for finished runs."""
        ids = list(ids)
        there = self.existing()
        over = self.finished(i for i in ids if i in there)
        begun = [(i, self.last_attempt(i)) for i in ids if i in there and i not in over]
        self._liveness.prepare(self.attempt(i, n) for i, n in begun if n is not None)
        return {
            i: over[i].state if i in over else self.state(i) if i in there else "missing"
            for i in ids
        }

    def finished(self, ids: Iterable[str]) -> dict[str, Entry]:
        """Return parts of the results of the finished runs among `ids`.

        A result is read once, and again if size or modification time of its file changed.
        """
        found: dict[str, Entry] = {}
        for rid in ids:
            stat = files.status(f"{self.root}/{rid}/result.json")  # a Path would be slow here
            entry = self._known.get(rid)
            if stat is None:
                continue
            file = (stat.st_size, stat.st_mtime_ns)
            if (entry is None or entry[:2] != file) and (body := self.result(rid)):
                metric = metric_of(body)
                judged = (metric.name, metric.higher_is_better, metric.value(body))
                entry = Entry(stat.st_size, stat.st_mtime_ns, body["state"], *judged)
                self._known[rid] = entry
            if entry and entry[:2] == file:  # else damaged: not finished
                found[rid] = entry
        return found

    def unsure(self, ids: Iterable[str]) -> list[str]:
        """List the runs among `ids` of which it is not yet certain whether the owner is alive."""
        last = [(i, self.last_attempt(i)) for i in ids]
        return [i for i, n in last if n is not None and not self._liveness.sure(self.attempt(i, n))]

    def last_attempt(self, rid: str) -> int | None:
        """Return the highest attempt number, or None. That attempt's owner owns the run."""
        names = files.names(self.folder(rid) / "attempts")
        return max((int(name) for name in names if name.isdigit()), default=None)

    def env(self, rid: str) -> dict[str, Any]:
        """Return env.json of the last attempt; empty for imported runs."""
        return files.read_json(self.attempt(rid, self.last_attempt(rid) or 0) / "env.json") or {}

    def failures(self, rid: str) -> int:
        """Count the attempts that failed or were killed; clean stops do not count.

        Neither do killed attempts from which a later checkpoint than their first one is left: a
        long run may be preempted often.
        """
        saved, count = self.saved_step(rid), 0
        for n in range(1, (self.last_attempt(rid) or 0) + 1):
            if end := self.end(rid, n):
                count += end["state"] == "failed"
            else:
                env = files.read_json(self.attempt(rid, n) / "env.json")
                count += env is None or (env.get("resumed_from_step") or 0) >= saved
        return count

    def saved_step(self, rid: str) -> int:
        """Return the number of updates in the last checkpoint; 0 without one."""
        return max(checkpoint.described(self.folder(rid) / "checkpoint"), default=0)

    def end(self, rid: str, attempt: int) -> dict[str, Any] | None:
        """Return how an attempt ended, {state: stopped | failed, cause}; None if not recorded."""
        return files.read_json(self.attempt(rid, attempt) / "end.json")

    def failure(self, rid: str) -> str:
        """Return the recorded cause of the last attempt's end; empty if there is none."""
        return (self.end(rid, self.last_attempt(rid) or 0) or {"cause": ""})["cause"]

    def owner(self, rid: str, attempt: int) -> dict[str, Any]:
        """Return the owner of an attempt; empty if it is missing or cannot be read."""
        with suppress(OSError):
            return owners.read_owner(self.attempt(rid, attempt))
        return {}

    def records(self, rid: str) -> list[Record]:
        """Return the records of a run, without incomplete lines."""
        lines, found = files.read(self.folder(rid) / "metrics.jsonl") or b"", []
        for line in lines.split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # ignore all lines after a damaged one
        return found

    def spec(self, rid: str) -> dict[str, Any]:
        """Return the canonical spec of a run; raise StoreError if it is missing or damaged."""
        spec = files.read_json(self.folder(rid) / "spec.json")
        if spec is None:
            raise StoreError(
                f"{self.folder(rid)}/spec.json is missing or damaged. Run the sweep again, or "
                "delete the folder."
            )
        return spec

    # ------------------------------------------------------------ claiming and writing

    def claim(self, spec: RunSpec) -> int | None:
        """Claim a run; return the new attempt's number, None if the run is finished or owned."""
        rid = spec.id
        folder, last = self.folder(rid), self.last_attempt(rid)
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        if self.result(rid) is not None:
            return None
        if files.read(folder / "spec.json") != spec.canonical.encode():
            files.write_atomic(folder / "spec.json", spec.canonical.encode())
        if last is not None and self.end(rid, last) is None:
            if self._alive(rid, last):
                return None
            if owners.restarted(self.owner(rid, last)):
                # preempted, or the node failed: not a failure of the run
                self.write_end(rid, last, "stopped", "started again by Slurm")
        mine = 1 if last is None else last + 1
        owner = json.dumps(owners.this_process()).encode()
        if not files.create_folder_once(self.attempt(rid, mine), {"owner.json": owner}):
            return None
        try:
            if self.result(rid) is not None:  # finished between the first check and the claim
                self.write_end(rid, mine, "stopped", "already finished")
                return None
            self._set_aside_damage(rid)
        except StoreError as error:
            self.write_end(rid, mine, "stopped", str(error))
            raise
        return mine

    def _set_aside_damage(self, rid: str) -> None:
        """Rename a result with a wrong checksum; it is kept for inspection."""
        path = self.folder(rid) / "result.json"
        if files.status(path) and self.result(rid) is None:
            os.replace(path, path.with_name(f"result.damaged-{os.urandom(3).hex()}.json"))

    def _alive(self, rid: str, attempt: int) -> bool:
        return self._dead.get(rid) != attempt and self._liveness.alive(self.attempt(rid, attempt))

    def write_env(self, rid: str, attempt: int, env: dict[str, Any]) -> None:
        """Write env.json of an attempt."""
        content = json.dumps(env, indent=1).encode()
        files.write_atomic(self.attempt(rid, attempt) / "env.json", content)

    def log(self, rid: str, attempt: int, text: str) -> None:
        """Append a line to an attempt's log."""
        files.append(
            self.attempt(rid, attempt) / "log.txt", f"{text.rstrip()}\n".encode("utf8", "replace")
        )

    def record(self, rid: str, *new: Record) -> None:
        """Append records in one write. Values that are not finite become null."""
        text = "".join(json.dumps(_finite(r), allow_nan=False) + "\n" for r in new)
        if text:
            files.append(self.folder(rid) / "metrics.jsonl", text.encode())

    def records_size(self, rid: str) -> int:
        """Return the size of the records in bytes."""
        status = files.status(self.folder(rid) / "metrics.jsonl")
        return status.st_size if status else 0

    def sync_records(self, rid: str) -> None:
        """Flush the records to the disk; required before a checkpoint with their size."""
        files.sync(self.folder(rid) / "metrics.jsonl")

    def cut_records(self, rid: str, size: int) -> None:
        """Cut the records back to `size` bytes, their size at a checkpoint."""
        files.truncate(self.folder(rid) / "metrics.jsonl", size)

    def finish(self, rid: str, state: str, result: Result) -> bool:
        """Write the result and delete the checkpoint; return whether this call wrote it."""
        if state not in FINISHED:
            raise ValueError(f"a run ends as one of {FINISHED}, got {state!r}")
        if self.records_size(rid):
            self.sync_records(rid)
        # through JSON, so that the checksum holds for the values that are read back
        body = json.loads(json.dumps(_finite({"run_id": rid, "state": state, **result})))
        content = json.dumps({"sha256": checksum(body), "result": body}).encode()
        first = files.create_once(self.folder(rid) / "result.json", content)
        shutil.rmtree(self.folder(rid) / "checkpoint", ignore_errors=True)
        return first

    def put(self, spec: RunSpec, result: Result) -> bool:
        """Store a finished run that was trained elsewhere; return whether it was new."""
        rid = spec.id
        if self.result(rid) is not None:
            return False
        self.folder(rid).mkdir(parents=True, exist_ok=True)
        self._set_aside_damage(rid)
        files.write_atomic(self.folder(rid) / "spec.json", spec.canonical.encode())
        return self.finish(rid, result["state"], {**result, "imported": True})

    def write_end(self, rid: str, attempt: int, state: str, cause: str) -> None:
        """Record how an attempt ended without a result: 'stopped' (will resume) or 'failed'."""
        content = json.dumps({"state": state, "cause": cause}).encode()
        files.write_atomic(self.attempt(rid, attempt) / "end.json", content)


def checksum(body: Result) -> str:
    """Return the SHA-256 of a result's canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
