"""Measure the peak memory of full fine-tuning and LoRA, and compare it with the plan."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.harness import ROOT, Log
from benchmarks.steps import RANK, at
from lorasweep.config.compose import compose_request
from lorasweep.data import load as data
from lorasweep.launch.process import keep_freed_memory
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.plan import detect
from lorasweep.plan.memory import pack_bytes
from lorasweep.plan.packing import micro_batch
from lorasweep.train import pretrain

CASES = (("tiny", 16), ("small", 8))
"""Scale and batch size."""
STEPS = 2


def measure(models_dirs: list[str], data_dirs: list[str], log: Log) -> dict[str, Any]:
    """Return peak resident bytes by case; `idle_bytes`: the peak before anything is loaded."""
    cases = []
    for scale, batch in CASES:
        for method in ("fullft", "lora"):
            case = json.loads(in_process(scale, method, batch, 1, models_dirs, data_dirs))
            cases.append(case)
            peak, planned = (f"{case[k] / 2**20:,.0f}" for k in ("peak_bytes", "planned_bytes"))
            log(f"{case['model']}, {method}, batch {batch}: peak {peak} MiB, planned {planned}")
    return {"cases": cases}


def in_process(
    scale: str, method: str, batch: int, count: int, models_dirs: list[str], data_dirs: list[str]
) -> str:
    """Run `main` in a new process on one thread, and return the JSON that it prints."""
    arguments = json.dumps([scale, method, batch, count, models_dirs, data_dirs])
    command = [sys.executable, "-m", "benchmarks.memory", arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=env)
    return done.stdout.splitlines()[-1]


def _resident_peak() -> int:
    """Return this program's peak resident bytes; ru_maxrss has the parent's memory at the fork."""
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) * 1024


def main(
    scale: str, method: str, batch: int, count: int, models_dirs: list[str], data_dirs: list[str]
) -> dict[str, Any]:
    """Train `count` runs for STEPS updates in one pack; return peaks and planned bytes."""
    keep_freed_memory()  # as workers do
    idle = _resident_peak()
    spec = compose_request(at(scale)).points[0].spec
    few = dataclasses.replace(spec.dataset, n_test=4, n_test_curve=4)
    arm = FullFT() if method == "fullft" else LoRA(rank=RANK)
    spec = dataclasses.replace(spec, dataset=few, method=arm, batch_size=batch, steps=STEPS)
    pretrain.ensure(spec.model, models_dirs)
    base = models.load(spec.model, models_dirs, spec.precision)
    rows = data.load(few, data_dirs, base.tokenizer)
    pack = [dataclasses.replace(spec, lr=1e-5 * (1 + k)) for k in range(count)]
    hardware = detect.this_machine()
    micro = micro_batch(spec, count, hardware)
    for _ in finetune(pack, base, rows, micro):
        pass
    planned = pack_bytes(count, spec, hardware, micro)
    return {
        "model": spec.model.name,
        "method": method,
        "precision": spec.precision,
        "batch_size": batch,
        "pack": count,
        "planned_bytes": planned,
        "peak_bytes": _resident_peak(),
        "idle_bytes": idle,
    }


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
