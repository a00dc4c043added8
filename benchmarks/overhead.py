"""Measure lorasweep without training: plan and status of 10,000 runs; 1,000 runs of a no-op."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Log, command
from lorasweep.config.compose import compose_request
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.store.run_store import RunStore, checksum
from lorasweep.train.events import Event

GRID = (
    "+sweep=lr_ratio",
    "~sweep.arms.fullft",
    "sweep.arms.lora.lr=${around:3e-3,25,1.3}",
    "sweep.arms.lora.rank=[1,2,4,8,16]",
    f"sweep.axes.seed={list(range(80))}".replace(" ", ""),
    "sweep.replicate.seeds=[]",
)
"""10,000 runs: 25 learning rates, 5 ranks, 80 seeds."""
FINAL = {
    **{"nll_start": 3.0, "test_nll": 2.0, "train_nll": 2.0, "steps_done": 1, "tokens": 1},
    **{"base_sha256": "none", "data_sha256": "none", "wall_s": 1.0},
    "curve": [{"step": 1, "test_nll": 2.0}],
}


def nothing(pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None) -> Iterator[Event]:
    """Train nothing: yield one record and one result per run."""
    records = {s.id: {"step": 1, "train_nll": 2.0} for s in pack}
    yield Event(1, records, {s.id: ("done", dict(FINAL)) for s in pack}, dict)


def measure(log: Log) -> dict[str, float]:
    """Return seconds: plan_10k_s, noop_run_s, start_s, and status_10k_s without start_s."""
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        plan_s = min(command(*GRID, "action=plan", runs_dir=empty)[0] for _ in range(3))
        log(f"planning 10,000 runs: {plan_s:.2f} s, including process start")
        specs = [p.spec for p in compose_request([*GRID, f"exec.runs_dir={full}"]).points]
        store = RunStore(full)
        store.prepare()
        exec_ = Exec(runs_dir=str(full))
        started = time.perf_counter()
        for k in range(0, 1000, 4):
            execute(specs[k : k + 4], exec_, store, nothing, lambda event: None, StopFlag())
        noop_s = (time.perf_counter() - started) / 1000
        log(f"1,000 runs of a trainer that does nothing: {noop_s * 1e3:.2f} ms per run")
        for spec in specs[1000:]:  # as training would write it, without flushing to disk
            home = store.folder(spec.id)
            (home / "attempts" / "1").mkdir(parents=True)
            (home / "spec.json").write_text(spec.canonical)
            (home / "metrics.jsonl").write_text('{"step": 1, "train_nll": 2.0}\n')
            body = {"run_id": spec.id, "state": "done", **FINAL}
            result = {"sha256": checksum(body), "result": body}
            (home / "result.json").write_text(json.dumps(result))
        none = Path(folder) / "none"
        begin_s = min(command("action=status", runs_dir=none)[0] for _ in range(3))
        timed = [command(*GRID, "action=status", runs_dir=full) for _ in range(3)]
        assert timed[0][1]["runs"]["done"] == 10_000, timed[0][1]["runs"]
        status_s = min(t for t, _ in timed) - begin_s
        log(f"status of 10,000 finished runs: {status_s:.2f} s beyond start-up ({begin_s:.2f} s)")
    times = {"plan_10k_s": plan_s, "status_10k_s": status_s}
    return {**times, "start_s": begin_s, "noop_run_s": noop_s}
