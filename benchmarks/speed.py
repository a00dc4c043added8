"""Measure lorasweep's own time, steps, memory, whole grids and a whole answer, on an idle machine.

    python -m benchmarks speed [--out FILE] [part ...]

Writes analysis/results/bench/bench.json, and the page from it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import grids, harness, memory, overhead, speed_page, steps
from benchmarks.harness import Figures, Log
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.tracking import provenance

GRIDS = {"tiny": ((1, 200), (4, 100), (16, 50)), "small": ((4, 8),)}
"""Scale -> (batch of a run, updates) of the grids of 16 LoRA runs."""


def headline(parts: Figures) -> Figures:
    """Select the figures that the README quotes."""
    out: Figures = {
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


def _record(content: Figures, part: str, figures: Any) -> None:
    content.setdefault("parts", {})[part] = figures
    here, env = detect.this_machine(), provenance.environment()
    machine = {
        "processor": here.processor,
        "cores": here.cores,
        "gpus": [here.gpu_name] * here.gpus,
        "packages": env["packages"],
        "python": env["python"],
    }
    content |= {**headline(content["parts"]), "machine": machine}


def whole_grids(scale: str, values: dict[str, Any], log: Log) -> Figures:
    """Time whole grids at a scale and their baselines; at `tiny` also the whole sweep."""
    spec = compose_request(steps.at(scale)).points[0].spec
    cores = detect.this_machine().cores or 1
    peak, start_s = steps.gemm_peak(spec.precision, cores), overhead.start_s()
    part: Figures = {"gemm_peak": peak, "precision": spec.precision}
    if scale == "tiny":
        part["sweep"] = grids.whole_sweep(values, peak, log)
    wanted = [grids.Grid(scale, batch, updates) for batch, updates in GRIDS[scale]]
    part["grids"] = [grids.lora_grid(grid, values, start_s, peak, log) for grid in wanted]
    return part


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, or all, and write the page."""
    values = harness.exec_values()
    dirs = (values["models_dir"], values["data_dir"])
    parts: dict[str, Callable[[Log], Any]] = {
        "overhead": overhead.measure,
        "steps": partial(steps.measure, *dirs),
        "memory": partial(memory.measure, *dirs),
        "answer": partial(grids.time_answer, "tiny", values),
        "tiny": partial(whole_grids, "tiny", values),
        "small": partial(whole_grids, "small", values),
    }
    harness.measure_parts("bench.json", parts, arguments, _record)
    if "--out" not in arguments:
        speed_page.write()
