"""Measure all or some parts of the benchmark, one after another, on an idle machine.

python -m lorasweep.bench OUT.json [part ...]
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from lorasweep.bench import answer, grids, memory, overhead, steps
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.tracking import provenance

PARTS = ("overhead", "steps", "memory", "answer", "tiny", "small")
GRIDS = {"tiny": ((1, 200), (4, 100), (16, 50)), "small": ((4, 8),)}
"""Scale -> (per-run batch, updates) of the grids of 16 LoRA runs."""


def exec_values() -> dict[str, Any]:
    """Return the fields of an Exec with absolute paths, because baselines run in other folders."""
    exec_ = compose_request(["scale=tiny"]).exec
    absolute = {
        k: [str(Path(d).resolve()) for d in getattr(exec_, k)] for k in ("models_dir", "data_dir")
    }
    return {**dataclasses.asdict(Exec()), **absolute}


def headline(parts: dict[str, Any]) -> dict[str, Any]:
    """Select the figures that the README quotes."""
    out: dict[str, Any] = {
        "sweep_vs_process_per_run": None,
        "answer_vs_plain_grid": parts.get("answer", {}).get("vs_plain_grid"),
        "pack_vs_warm_peft": {},
        "grid_vs_process_per_run": {},
        "lora_step_over_fullft_step": {},
        "flops_over_gemm_peak": {},
    }
    if "sweep" in parts.get("tiny", {}):
        out["sweep_vs_process_per_run"] = parts["tiny"]["sweep"]["vs_process_per_run"]
        out["flops_over_gemm_peak"]["tiny128"] = parts["tiny"]["sweep"]["flops_over_gemm_peak"]
    for scale in GRIDS:
        for grid in parts.get(scale, {}).get("grids", []):
            model, batch = grid["model"], str(grid["batch_size"])
            out["pack_vs_warm_peft"].setdefault(model, {})[batch] = grid["vs_warm_peft"]
            out["grid_vs_process_per_run"].setdefault(model, {})[batch] = grid["vs_process_per_run"]
            if scale != "tiny":
                out["flops_over_gemm_peak"][grid["model"]] = grid["flops_over_gemm_peak"]
    for model, ratio in parts.get("steps", {}).get("lora_over_fullft", {}).items():
        out["lora_step_over_fullft_step"][model] = list(ratio["by_batch"].values())[-1]["n1"]
    keys = ("plan_10k_s", "status_10k_s", "noop_run_s")
    return out | {k: parts.get("overhead", {}).get(k) for k in keys}


def main(out: str, wanted: list[str]) -> None:
    """Measure the parts in `wanted` and write the figures. Other parts stay in the file."""
    path, started = Path(out), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = json.loads(path.read_text())["parts"] if path.is_file() and wanted else {}

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    values, here = exec_values(), detect.this_machine()
    for part in wanted or PARTS:
        if part == "overhead":
            parts[part] = overhead.measure(log)
        elif part == "steps":
            parts[part] = steps.measure(values["models_dir"], values["data_dir"], log)
        elif part == "memory":
            parts[part] = memory.measure(values["models_dir"], values["data_dir"], log)
        elif part == "answer":
            parts[part] = answer.measure("tiny", values, log)
        else:
            parts[part] = whole_grids(part, values, here, log)
        env = provenance.environment()
        machine = {
            "processor": here.processor,
            "cores": here.cores,
            "gpus": [here.gpu_name] * here.gpus,
            "packages": env["packages"],
            "python": env["python"],
        }
        content = {**headline(parts), "machine": machine, "parts": parts}
        files.write_atomic(path, json.dumps(content, indent=1).encode())


def whole_grids(
    scale: str, values: dict[str, Any], here: Hardware, log: grids.Log
) -> dict[str, Any]:
    """Time whole grids at a scale and their baselines; at `tiny` also the whole sweep."""
    spec = compose_request(steps.at(scale)).points[0].spec
    peak, start_s = steps.gemm_peak(spec.precision, here.cores or 1), overhead.start_s()
    part: dict[str, Any] = {"gemm_peak": peak, "precision": spec.precision}
    if scale == "tiny":
        part["sweep"] = grids.whole_sweep(values, peak, log)
    wanted = [grids.Grid(scale, batch, updates) for batch, updates in GRIDS[scale]]
    part["grids"] = [grids.lora_grid(grid, values, start_s, peak, log) for grid in wanted]
    return part


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
