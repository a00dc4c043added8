"""Measure seconds per step, the peak of matrix products, peak memory, and what nothing costs."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Log, command
from lorasweep.config.compose import compose_request
from lorasweep.data import splits as data
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, keep_freed_memory
from lorasweep.launch.torch_trainer import Events, finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.plan import detect
from lorasweep.plan.needs import train_flops
from lorasweep.plan.planner import place
from lorasweep.spec.execution import Exec
from lorasweep.spec.method import Method
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.store.run_store import RunStore, checksum
from lorasweep.train import pretrain
from lorasweep.train.events import Event

GRIDS = {"tiny": ((1, 4, 16), (1, 2, 4, 8, 16)), "small": ((1, 4, 8), (1, 2))}
"""Scale -> batch sizes and pack sizes."""
UPDATES = {"tiny": 10, "small": 5}
RANK = 16
METHODS = (LoRA(rank=RANK), FullFT())
TURNS = 3
"""How often full fine-tuning and LoRA alternate: a machine's speed drifts by 8% in minutes."""


def at(scale: str) -> list[str]:
    """Return the overrides for a scale, with fp32 if the processor has no bf16 instructions."""
    slow = detect.this_machine().fast_bf16 is False
    return [f"scale={scale}", *(["precision=fp32"] if slow else [])]


def gemm_peak(precision: str, threads: int) -> float:
    """Return the best measured rate of large matrix products, in operations per second."""
    torch.set_num_threads(threads)
    dtype, best = torch.bfloat16 if precision == "bf16" else torch.float32, 0.0
    for m, k, n in ((2048, 2048, 2048), (1600, 576, 1536), (4096, 1024, 1024)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(8):
            started = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


class Bench:
    """One base model and its data, loaded once."""

    def __init__(self, scale: str, models_dirs: list[str], data_dirs: list[str]) -> None:
        spec = compose_request(at(scale)).points[0].spec
        few = dataclasses.replace(spec.dataset, n_test=1, n_test_curve=1)
        self.scale, self.spec = scale, dataclasses.replace(spec, dataset=few, steps=UPDATES[scale])
        pretrain.ensure(spec.model, models_dirs)
        self.base = models.load(spec.model, models_dirs, spec.precision)
        self.rows = data.load(few, data_dirs, self.base.tokenizer)

    def pack(self, method: Method, batch_size: int, count: int) -> list[RunSpec]:
        """Make `count` runs with learning rates too small to change anything."""
        spec = dataclasses.replace(self.spec, method=method, batch_size=batch_size)
        return [dataclasses.replace(spec, lr=1e-6 * (1 + k)) for k in range(count)]

    def median_s(self, pack: list[RunSpec]) -> float:
        """Train a pack; return the median seconds per step and run."""
        micro = place(pack[0], detect.this_machine(), len(pack)).layout.rows
        events = finetune(pack, self.base, self.rows, micro)
        return statistics.median(next(iter(e.records.values()))["step_s"] for e in events)


def measure(models_dirs: list[str], data_dirs: list[str], log: Log) -> dict[str, Any]:
    """Time steps of full fine-tuning and LoRA of rank 16 on one thread, as a worker does."""
    keep_freed_memory()  # as workers do
    rows: list[dict[str, Any]] = []
    out: dict[str, Any] = {"steps": rows, "lora_over_fullft": {}}
    for scale, (batches, sizes) in GRIDS.items():
        torch.set_num_threads(1)
        bench = Bench(scale, models_dirs, data_dirs)
        name, ratios = bench.spec.model.name, {}
        for batch in batches:
            adapters, whole = METHODS
            # full fine-tuning and LoRA in turns; the first turn warms up memory
            both = [bench.pack(method, batch, 1) for method in (whole, adapters)]
            times = [[bench.median_s(pack) for pack in both] for _ in range(TURNS + 1)][1:]
            turns, alone = map(list, zip(*times))
            full_s = statistics.median(turns)
            own = {"model": name, "batch_size": batch}
            rows.append({**own, "method": "fullft", "pack": 1, "step_s": full_s})
            ratio = {}
            for n in sizes:
                pack = bench.pack(adapters, batch, n)  # trained twice, to warm up memory
                lora_s = statistics.median(alone) if n == 1 else 0.0
                lora_s = lora_s or [bench.median_s(pack) for _ in range(2)][-1]
                rows.append({**own, "method": "lora", "pack": n, "step_s": lora_s})
                ratio[n] = lora_s / full_s
                log(
                    f"{name}, batch {batch}: a LoRA step in a pack of {n} {lora_s * 1e3:.1f} ms "
                    f"per run, full fine-tuning {full_s * 1e3:.1f} ms"
                )
            # divided by full fine-tuning's step: one LoRA run alone (n1), the best pack size
            ratio[1] = statistics.median(a / b for a, b in zip(alone, turns))
            ratios[str(batch)] = {"n1": ratio[1], "best": min(ratio.values())}
        one = dataclasses.replace(bench.spec, steps=1)
        lora, full = (train_flops(dataclasses.replace(one, method=m)) for m in METHODS)
        out["lora_over_fullft"][name] = {"formula": lora / full, "by_batch": ratios}
    return out


# ---------------------------------------------------------------- without training

MANY_RUNS = (
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


def nothing(pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None) -> Events:
    """Train nothing: yield one record and one result per run."""
    records = {s.id: {"step": 1, "train_nll": 2.0} for s in pack}
    yield Event(1, records, {s.id: ("done", dict(FINAL)) for s in pack}, dict)


def measure_overhead(log: Log) -> dict[str, float]:
    """Return seconds: plan_10k_s, noop_run_s, start_s, and status_10k_s without start_s."""
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        plan_s = min(command(*MANY_RUNS, "action=plan", runs_dir=empty)[0] for _ in range(3))
        log(f"planning 10,000 runs: {plan_s:.2f} s, including process start")
        specs = [p.spec for p in compose_request([*MANY_RUNS, f"exec.runs_dir={full}"]).points]
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
        timed = [command(*MANY_RUNS, "action=status", runs_dir=full) for _ in range(3)]
        assert timed[0][1]["runs"]["done"] == 10_000, timed[0][1]["runs"]
        status_s = min(t for t, _ in timed) - begin_s
        log(f"status of 10,000 finished runs: {status_s:.2f} s beyond start-up ({begin_s:.2f} s)")
    times = {"plan_10k_s": plan_s, "status_10k_s": status_s}
    return {**times, "start_s": begin_s, "noop_run_s": noop_s}


# ---------------------------------------------------------------- memory

MEMORY_CASES = (("tiny", 16), ("small", 8))
"""Scale and batch size."""
MEMORY_UPDATES = 2


def measure_memory(models_dirs: list[str], data_dirs: list[str], log: Log) -> dict[str, Any]:
    """Return peak resident bytes by case; `idle_bytes`: the peak before anything is loaded."""
    cases = []
    for scale, batch in MEMORY_CASES:
        for method in ("fullft", "lora"):
            cases.append(in_process(scale, method, batch, 1, models_dirs, data_dirs))
            log(str(cases[-1]))
    return {"cases": cases}


def in_process(*arguments: Any) -> dict[str, Any]:
    """Call `peak_memory` in a new process on one thread."""
    command = [sys.executable, "-m", "benchmarks.steps", json.dumps(arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def _resident_peak() -> int:
    """Return this program's peak resident bytes; ru_maxrss has the parent's memory at the fork."""
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) * 1024


def peak_memory(
    scale: str, method: str, batch: int, count: int, models_dirs: list[str], data_dirs: list[str]
) -> dict[str, Any]:
    """Train `count` runs for MEMORY_UPDATES updates in one pack; return peaks and planned bytes."""
    keep_freed_memory()  # as workers do
    idle = _resident_peak()
    spec = compose_request(at(scale)).points[0].spec
    few = dataclasses.replace(spec.dataset, n_test=4, n_test_curve=4)
    arm = FullFT() if method == "fullft" else LoRA(rank=RANK)
    spec = dataclasses.replace(
        spec, dataset=few, method=arm, batch_size=batch, steps=MEMORY_UPDATES
    )
    pretrain.ensure(spec.model, models_dirs)
    base = models.load(spec.model, models_dirs, spec.precision)
    rows = data.load(few, data_dirs, base.tokenizer)
    pack = [dataclasses.replace(spec, lr=1e-5 * (1 + k)) for k in range(count)]
    hardware = detect.this_machine()
    planned = place(spec, hardware, count)
    for _ in finetune(pack, base, rows, planned.layout.rows):
        pass
    return {
        **{"model": spec.model.name, "method": method, "precision": spec.precision},
        **{"batch_size": batch, "pack": count},
        "planned_bytes": planned.memory_bytes,
        "peak_bytes": _resident_peak(),
        "idle_bytes": idle,
    }


if __name__ == "__main__":
    print(json.dumps(peak_memory(*json.loads(sys.argv[1]))))
