"""RunStore: the folder that is the truth. One folder a run, readable and judgeable alone.

    <runs_dir>/<run_id>/spec.json      canonical spec
                        metrics.jsonl  one record a line attempts/<n>/  owner.json (made with it),
                        env.json, log.txt, heartbeat, end.json checkpoint/    two slots, deleted
                        when the run is over result.json    written last, once, with a checksum: the
                        run is over

Knows files, claims and states. Refuses to know torch, and how anything is trained.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import StoreError
from lorasweep.spec.run import TRAIN_VERSION, RunSpec
from lorasweep.store import claims as ownership
from lorasweep.store import files, index

if TYPE_CHECKING:
    import pandas as pd

STATES = ("missing", "running", "stale", "failed", "diverged", "done")
"""missing: never begun. stale: begun, and its process is gone. diverged is a result; failed is an
accident."""
FINAL = ("done", "diverged")


class RunStore:
    """Runs below one folder."""

    def __init__(self, root: str | Path, dead: dict[str, int] | None = None) -> None:
        """`dead`: run id -> attempt whose owner another watcher has already found dead."""
        self.root = Path(root).expanduser().absolute()
        self._liveness = ownership.Liveness()
        self._dead = dead or {}
        self._known: dict[str, list[Any]] = {}

    def prepare(self) -> None:
        """Make the folder and try a write; StoreError with the reason if it cannot be used."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            files.share_as(self.root)
            probe = self.root / f".probe.{os.getpid()}"
            files.write_atomic(probe, b"")
            probe.unlink()
            mark = self.root / "store.json"
            files.create_once(mark, json.dumps({"train_version": TRAIN_VERSION}).encode())
            version = json.loads(mark.read_bytes())["train_version"]
        except OSError as error:
            raise StoreError(
                f"run folder {self.root} cannot be written ({error.strerror or error}). "
                "Choose another: exec.runs_dir=FOLDER, or set LORASWEEP_RUNS."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f'{mark} is damaged. It should read {{"train_version": {TRAIN_VERSION}}}.'
            ) from None
        if version != TRAIN_VERSION:
            raise StoreError(
                f"run folder {self.root} was written by train_version {version}; this lorasweep trains by version "
                f"{TRAIN_VERSION}, and the two are never mixed. Use another folder: exec.runs_dir=FOLDER."
            )

    def folder(self, rid: str) -> Path:
        """Return the folder of a run; it need not exist."""
        return self.root / rid

    def existing(self) -> set[str]:
        """Return the ids that have a folder: one directory scan."""
        try:
            return {
                e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith(".")
            }
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(
                f"run folder {self.root} cannot be read ({error.strerror}). Set exec.runs_dir."
            ) from None

    # ------------------------------------------------------------ reading

    def result(self, rid: str) -> dict[str, Any] | None:
        """Return the result of a finished run; None if there is none or its checksum does not hold."""
        try:
            wrapped = json.loads((self.folder(rid) / "result.json").read_bytes())
            body = wrapped["result"]
            return body if wrapped["sha256"] == checksum(body) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def state(self, rid: str) -> str:
        """Return the state of a run, from its folder alone."""
        if not self.folder(rid).is_dir():
            return "missing"
        result = self.result(rid)
        if result is not None:
            return result["state"]
        last = self.last_attempt(rid)
        if last is None:
            return "missing"
        end = self.end(rid, last)
        if end is not None:
            return "failed" if end["state"] == "failed" else "stale"
        return "running" if self._alive(rid, last) else "stale"

    def states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the state of each id; ids without a folder cost nothing, finished ones little."""
        ids = list(ids)
        there = self.existing()
        over = self.finished(i for i in ids if i in there)
        begun = [(i, self.last_attempt(i)) for i in ids if i in there and i not in over]
        self._liveness.prepare(self._attempt(i, n) for i, n in begun if n is not None)
        return {
            i: over[i].state if i in over else self.state(i) if i in there else "missing"
            for i in ids
        }

    def finished(self, ids: Iterable[str]) -> dict[str, index.Entry]:
        """Return what is kept of the results of those that are finished, by way of an index."""
        return index.read(self.root, ids, self.result, self._known)

    def unsure(self, ids: Iterable[str]) -> list[str]:
        """List those of `ids` that count as running although nobody here can tell: their owners are
        on other machines."""
        last = {i: self.last_attempt(i) for i in ids}
        return [
            i
            for i, n in last.items()
            if n is not None and not self._liveness.sure(self._attempt(i, n))
        ]

    def last_attempt(self, rid: str) -> int | None:
        """Return the highest attempt number: its owner owns the run."""
        try:
            numbers = [
                int(e.name) for e in os.scandir(self.folder(rid) / "attempts") if e.name.isdigit()
            ]
        except FileNotFoundError:
            return None
        return max(numbers, default=None)

    def env(self, rid: str) -> dict[str, Any]:
        """Return where the last attempt ran; empty if it is not recorded (imported)."""
        path = self._attempt(rid, self.last_attempt(rid) or 0) / "env.json"
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError):
            return {}

    def layout(self, rid: str) -> dict[str, Any]:
        """Return {threads, micro_batch_size} under which a run ended; empty if it is not recorded
        (imported)."""
        env = self.env(rid)
        return {k: env[k] for k in ("threads", "micro_batch_size")} if env else {}

    def failures(self, rid: str) -> int:
        """Count the attempts that failed or were killed; clean stops do not count."""
        ends = [self.end(rid, n) for n in range(1, (self.last_attempt(rid) or 0) + 1)]
        return sum(e is None or e["state"] == "failed" for e in ends)

    def end(self, rid: str, attempt: int) -> dict[str, Any] | None:
        """Return how an attempt ended ({state: stopped | failed, cause}); None while open or
        killed."""
        try:
            return json.loads((self._attempt(rid, attempt) / "end.json").read_bytes())
        except (OSError, ValueError):
            return None

    def owner(self, rid: str, attempt: int) -> dict[str, Any]:
        """Return who made an attempt; empty if that cannot be read."""
        try:
            return json.loads((self._attempt(rid, attempt) / "owner.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def records(self, rid: str) -> list[dict[str, Any]]:
        """Return the records of a run; a torn last line is passed over."""
        try:
            lines = (self.folder(rid) / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # nothing after damage is trusted
        return found

    def spec(self, rid: str) -> dict[str, Any]:
        """Return the canonical spec of a run as a dict; StoreError if it is unreadable."""
        try:
            return json.loads((self.folder(rid) / "spec.json").read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.folder(rid)}/spec.json cannot be read ({error}).") from None

    # ------------------------------------------------------------ claiming and writing

    def claim(self, spec: RunSpec) -> int | None:
        """Claim a run; return the attempt's number, or None if it is finished or another process
        has it."""
        rid = spec.id
        folder = self.folder(rid)
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        if self.result(rid) is not None:
            return None
        spec_path = folder / "spec.json"
        if not spec_path.exists() or spec_path.read_bytes() != spec.canonical.encode():
            files.write_atomic(spec_path, spec.canonical.encode())
        last = self.last_attempt(rid)
        if last is not None and self.end(rid, last) is None:
            if self._alive(rid, last):
                return None
            if ownership.restarted(
                self.owner(rid, last)
            ):  # preempted, or its node failed: no fault of the run
                self.write_end(rid, last, "stopped", "started again by Slurm")
        mine = 1 if last is None else last + 1
        owner = json.dumps(ownership.me()).encode()
        if not files.create_folder_once(self._attempt(rid, mine), {"owner.json": owner}):
            return None
        if self.result(rid) is not None:  # finished between the look and the claim
            self.write_end(rid, mine, "stopped", "already finished")
            return None
        self._set_aside_damage(rid)
        return mine

    def _set_aside_damage(self, rid: str) -> None:
        """Move a result whose checksum fails out of the way of the next finish; it is kept for
        inspection."""
        path = self.folder(rid) / "result.json"
        if path.exists() and self.result(rid) is None:
            os.replace(path, path.with_name(f"result.damaged-{os.urandom(3).hex()}.json"))

    def _alive(self, rid: str, attempt: int) -> bool:
        return self._dead.get(rid) != attempt and self._liveness.alive(self._attempt(rid, attempt))

    def owns(self, rid: str, attempt: int) -> bool:
        """Say whether `attempt` is still the highest: if not, another process took over and this
        one must stop."""
        return self.last_attempt(rid) == attempt

    def write_env(self, rid: str, attempt: int, env: dict[str, Any]) -> None:
        """Record where an attempt runs."""
        files.write_atomic(
            self._attempt(rid, attempt) / "env.json", json.dumps(env, indent=1).encode()
        )

    def heartbeat(self, rid: str, attempt: int, beat: int) -> None:
        """Show that an attempt lives: the content changes."""
        path = self._attempt(rid, attempt) / "heartbeat"
        path.write_text(str(beat))

    def log(self, rid: str, attempt: int, text: str) -> None:
        """Append a line to an attempt's log."""
        files.append(self._attempt(rid, attempt) / "log.txt", (text.rstrip() + "\n").encode())

    def record(self, rid: str, record: dict[str, Any]) -> None:
        """Append one record. A value that is not finite is written as null."""
        files.append(self.folder(rid) / "metrics.jsonl", (_json(record) + "\n").encode())

    def records_size(self, rid: str) -> int:
        """Return the size of the records in bytes: where a checkpoint cuts back to."""
        try:
            return (self.folder(rid) / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            return 0

    def sync_records(self, rid: str) -> None:
        """Bring the records to the disk: a checkpoint that counts them must not outlive them."""
        files.sync(self.folder(rid) / "metrics.jsonl")

    def cut_records(self, rid: str, size: int) -> None:
        """Cut the records back to where a checkpoint was made."""
        files.truncate(self.folder(rid) / "metrics.jsonl", size)

    def finish(self, rid: str, state: str, result: dict[str, Any]) -> bool:
        """Write the result, once; say whether this call did it. Then the checkpoint is removed."""
        if state not in FINAL:
            raise ValueError(f"a run ends as {FINAL}, not as {state!r}")
        metrics = self.folder(rid) / "metrics.jsonl"
        if metrics.exists():
            files.sync(metrics)
        body = json.loads(_json({"run_id": rid, "state": state, **result}))
        content = json.dumps({"sha256": checksum(body), "result": body}).encode()
        first = files.create_once(self.folder(rid) / "result.json", content)
        shutil.rmtree(self.folder(rid) / "checkpoint", ignore_errors=True)
        return first

    def write_end(self, rid: str, attempt: int, state: str, cause: str) -> None:
        """Record how an attempt ended without a result: 'stopped' (go on at will) or 'failed' (an
        accident)."""
        content = json.dumps({"state": state, "cause": cause}).encode()
        files.write_atomic(self._attempt(rid, attempt) / "end.json", content)

    def failure(self, rid: str) -> str:
        """Return the cause of the last attempt's failure."""
        last = self.last_attempt(rid)
        end = self.end(rid, last) if last is not None else None
        return end["cause"] if end else ""

    def _attempt(self, rid: str, n: int) -> Path:
        return self.folder(rid) / "attempts" / str(n)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def checksum(body: dict[str, Any]) -> str:
    """Return the SHA-256 of a result's canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the table

_METHOD_COLUMNS = ("rank", "alpha", "layers", "scope")
_LATER = {"scaling_by": "rank", "init_scale": 1.0, "lr_b_ratio": 1.0, "start": "a", "init_seed": 0}
"""LoRA's fields that came later, and what they were before: absent from old specs."""
_RESULT_COLUMNS = (
    "test_nll",
    "test_bpb",
    "nll_start",
    "floor_nats",
    "train_nll",
    "steps_done",
    "tokens",
    "n_trainable",
    "norm_a",
    "norm_b",
    "norm_delta",
    "retain_nll",
    "retain_start",
    "step_s",
    "base_sha256",
    "wall_s",
    "imported",
)


def load_runs(runs_dir: str | Path, ids: Sequence[str] | None = None) -> "pd.DataFrame":
    """Return the table: one row a finished run (done or diverged), made from spec.json and
    result.json only.

    Columns: run_id, status, model, dataset, method and its fields, the spec's scalars, the measures
    (NLL in nats per loss-bearing token), and `spec`, `result` as JSON text, from which a store can
    be rebuilt. Missing values are NaN or None. Runs of another train_version are an error.
    """
    import pandas as pd

    store = RunStore(runs_dir)
    rows = []
    for rid in sorted(store.existing()) if ids is None else ids:
        result = store.result(rid)
        if result is not None:
            rows.append(table_row(store.spec(rid), result))
    return pd.DataFrame(rows)


def table_row(spec: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Flatten one run for the table."""
    if spec.get("train_version") != TRAIN_VERSION:
        raise StoreError(
            f"run {result.get('run_id')} was trained by train_version {spec.get('train_version')}, this lorasweep is "
            f"version {TRAIN_VERSION}. Use another run folder (exec.runs_dir=FOLDER) or the lorasweep that made it."
        )
    method = spec["method"]
    row: dict[str, Any] = {"run_id": result["run_id"], "status": result["state"]}
    row |= {
        "model": spec["model"]["name"],
        "dataset": spec["dataset"]["name"],
        "method": method["name"],
    }
    row |= {k: method.get(k) for k in _METHOD_COLUMNS}
    row |= {
        k: method.get(k, past if method["name"] == "lora" else None) for k, past in _LATER.items()
    }
    row |= {k: v for k, v in spec.items() if k not in ("model", "dataset", "method")}
    row |= {"hidden_size": spec["model"]["hidden_size"]}
    row |= {k: result.get(k) for k in _RESULT_COLUMNS}
    row |= {"spec": json.dumps(spec, sort_keys=True), "result": json.dumps(result, sort_keys=True)}
    return row


def import_table(runs_dir: str | Path, path: str | Path) -> int:
    """Put the runs of an exported table into a store, marked as imported; return how many were new."""
    import pandas as pd

    from lorasweep.methods.registry import spec_from
    from lorasweep.spec.run import validate

    path = Path(path)
    if not path.is_file():
        raise StoreError(f"no table {path}. Give a .parquet or .csv made by `action=export`.")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise StoreError(f"{path} cannot be read as a table ({error}).") from None
    if not {"spec", "result"} <= set(table.columns):
        raise StoreError(
            f"{path} has no columns 'spec' and 'result': only tables made by `action=export` carry runs."
        )
    rows = []
    for number, (spec_text, result_text) in enumerate(zip(table["spec"], table["result"]), start=1):
        try:
            spec, result = spec_from(json.loads(spec_text)), json.loads(result_text)
            validate(spec)
            rid, named = spec.id, result["run_id"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path}, row {number}: not a run ({error}).") from None
        if rid != named:
            raise StoreError(
                f"{path}, row {number}: the spec's name is {rid}, the result's {named}."
            )
        rows.append((rid, spec, result))
    store = RunStore(runs_dir)
    store.prepare()
    new = 0
    for rid, spec, result in rows:
        if store.result(rid) is None:
            store.folder(rid).mkdir(parents=True, exist_ok=True)
            store._set_aside_damage(rid)
            files.write_atomic(store.folder(rid) / "spec.json", spec.canonical.encode())
            new += store.finish(rid, result["state"], {**result, "imported": True})
    return new
