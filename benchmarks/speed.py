"""Measure overhead, steps, memory, whole grids and a whole answer, on an idle machine.

    python -m benchmarks speed [--out FILE] [part ...]

Writes analysis/results/bench/bench.json, and the page from it.
"""

import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import Any

from analysis.inference.estimate import number
from analysis.report.text import Rows, markdown, text_hash, with_block
from benchmarks import grids, harness, memory, overhead, plots, steps
from benchmarks.harness import FIGURES, ROOT, Figures, Log, render
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.tracking import provenance

GRIDS = {"tiny": ((1, 200), (4, 100), (16, 50)), "small": ((4, 8),)}
"""Scale -> (batch of a run, updates) of the grids of 16 LoRA runs."""


def headline(parts: Figures) -> Figures:
    """Select the main figures of all parts, for the top level of bench.json."""
    out: Figures = {
        "sweep_vs_process_per_run": None,
        "answer_vs_plain_grid": parts.get("answer", {}).get("vs_plain_grid"),
        "pack_vs_warm_peft": {},
        "grid_vs_process_per_run": {},
        "lora_step_over_fullft_step": {},
        "flops_over_gemm_peak": {},
    }
    if sweep := parts.get("tiny", {}).get("sweep"):
        out["sweep_vs_process_per_run"] = sweep["vs_process_per_run"]
        out["flops_over_gemm_peak"]["tiny128"] = sweep["flops_over_gemm_peak"]
    for scale in GRIDS:
        for grid in parts.get(scale, {}).get("grids", []):
            model, batch = grid["model"], str(grid["batch_size"])
            out["pack_vs_warm_peft"].setdefault(model, {})[batch] = grid["vs_warm_peft"]
            out["grid_vs_process_per_run"].setdefault(model, {})[batch] = grid["vs_process_per_run"]
            if scale != "tiny":
                out["flops_over_gemm_peak"][model] = grid["flops_over_gemm_peak"]
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
    content.setdefault("measured_on", {})[part] = f"{here.processor}, {date.today()}"


def whole_grids(scale: str, values: dict[str, Any], log: Log) -> Figures:
    """Time whole grids at a scale and their baselines; at `tiny` also the whole sweep."""
    spec = compose_request(steps.at(scale)).points[0].spec
    cores = detect.this_machine().cores or 1
    peak, start_s = steps.gemm_peak(spec.precision, cores), overhead.start_s()
    part: Figures = {"gemm_peak": peak, "precision": spec.precision}
    if scale == "tiny":
        part["sweep"] = grids.whole_sweep(values, peak, log)
    part["grids"] = [
        grids.lora_grid(scale, batch, updates, values, start_s, peak, log)
        for batch, updates in GRIDS[scale]
    ]
    return part


# ---------------------------------------------------------------- the page

Bench = dict[str, Any]
"""The content of bench.json: measurements, by part."""


def _all_grids(bench: Bench) -> list[dict[str, Any]]:
    tiny = bench["parts"]["tiny"]
    whole = {
        "what": "the whole tiny sweep, FullFT and LoRA r4, r16",
        "precision": tiny["precision"],
        **tiny["sweep"],
    }
    grids = [
        {
            "what": f"16 LoRA r16 on {g['model']}, batch {g['batch_size']}, {g['steps']} steps",
            "precision": bench["parts"][g["scale"]]["precision"],
            **g,
        }
        for scale in ("tiny", "small")
        for g in bench["parts"][scale]["grids"]
    ]
    return [whole, *grids]


def summary(bench: Bench) -> list[str]:
    """Render the Markdown tables of whole grids and of whole answers, against the baselines."""
    head = "grid|lorasweep|TRL process per run|warm PEFT loop|runs in a pack|share of GEMM peak"
    rows = [
        [
            g["what"],
            f"{g['lorasweep_s']:.0f} s",
            f"{g['process_per_run_s']:.0f} s: **{g['vs_process_per_run']:.1f}x**",
            f"{g['warm_peft_s']:.0f} s: **{g['vs_warm_peft']:.1f}x**",
            str(g.get("pack", "-")),
            f"{g['flops_over_gemm_peak']:.2f} ({g['precision']})",
        ]
        for g in _all_grids(bench)
    ]
    return [*markdown([head.split("|"), *rows]), *answer_table(bench["parts"].get("answer"))]


def answer_table(found: dict[str, Any] | None) -> list[str]:
    """Render the time from nothing to a ratio; empty if it was not measured."""
    if found is None:
        return []
    per_curve = [found[k] for k in ("plain_runs", "same_interval_runs")]
    head = "runs|lorasweep, from an empty folder to the ratio|ratio"
    plain = [f"plain grid, {n} runs per curve, TRL" for n in per_curve]
    row = [
        str(found["runs"]),
        f"{found['wall_s']:.0f} s",
        f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]",
        f"{found['plain_grid_s']:.0f} s: **{found['vs_plain_grid']:.1f}x**",
        f"{found['same_interval_s']:.0f} s: **{found['vs_same_interval']:.1f}x**",
    ]
    sampled = min(p["sampled"] for p in found["processes"])
    note = (
        "Plain grids train every seed at 7 learning rates, with one TRL process per run, one after "
        f"the other. {sampled} processes of each curve were timed, and the time of all was "
        f"extrapolated. A claim is judged from {per_curve[0]} runs per curve on; an interval "
        f"exists from {per_curve[1]} on (on simulated curves it is narrower than the sweep's)."
    )
    return ["", *markdown([[*head.split("|"), *plain], row]), "", note]


def _steps(bench: Bench) -> Rows:
    """Return milliseconds per step and run by batch and pack size, and ratios to FullFT."""
    rows = bench["parts"]["steps"]["steps"]
    sizes = sorted({r["pack"] for r in rows})
    packs = [f"LoRA r16, {n} in a pack" for n in sizes]
    out = [["model, batch", "FullFT", *packs, "alone / FullFT", "best / FullFT", "by FLOPs"]]
    ratios = bench["parts"]["steps"]["lora_over_fullft"]
    for model, batch in dict.fromkeys((r["model"], r["batch_size"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch_size"]) == (model, batch)]
        ms = {(r["method"], r["pack"]): f"{r['step_s'] * 1e3:.1f}" for r in here}
        share = ratios[model]["by_batch"][str(batch)]
        shares = (share["n1"], share["best"], ratios[model]["formula"])
        cells = [ms.get(("lora", n), "-") for n in sizes]
        out.append([f"{model}, {batch}", ms["fullft", 1], *cells, *(f"{v:.2f}" for v in shares)])
    return out


def _parts(bench: Bench) -> Rows:
    """Return the seconds of every baseline, divided into start-up, updates and evaluation."""
    out = [["grid, arm", "start and load", "updates", "held-out loss"]]
    for g in _all_grids(bench):
        for kind, name in (("process_per_run", "TRL process"), ("warm_peft", "warm PEFT loop")):
            for a in g[kind]:
                seconds = [f"{a[k]:.1f} s" for k in ("start_s", "train_s", "eval_s")]
                out.append([f"{g['what']}: {a['arm']}, {name}", *seconds])
    return out


def _memory(bench: Bench) -> Rows:
    """Return the peak memory of LoRA and full fine-tuning."""
    head = "model, batch|FullFT|LoRA r16|idle|LoRA / FullFT, without idle|planned FullFT, LoRA"
    out = [head.split("|")]
    cases = {
        (c["model"], c["batch_size"], c["method"]): c for c in bench["parts"]["memory"]["cases"]
    }
    for model, batch in dict.fromkeys(key[:2] for key in cases):
        full, lora = cases[model, batch, "fullft"], cases[model, batch, "lora"]
        above_idle = [c["peak_bytes"] - c["idle_bytes"] for c in (lora, full)]
        sizes = [full["peak_bytes"], lora["peak_bytes"], full["idle_bytes"]]
        sizes += [full["planned_bytes"], lora["planned_bytes"]]
        *peaks, whole, adapters = (f"{n / 2**20:,.0f} MiB" for n in sizes)
        share = f"{above_idle[0] / above_idle[1]:.2f}"
        out.append(
            [f"{model}, {batch} ({full['precision']})", *peaks, share, f"{whole}, {adapters}"]
        )
    return out


def _where(measured_on: dict[str, str]) -> str:
    """Name the parts of each machine and day."""
    parts: dict[str, list[str]] = {}
    for part, where in measured_on.items():
        parts.setdefault(where, []).append(part)
    return "; ".join(f"{', '.join(names)}: {where}" for where, names in parts.items())


def page(bench: Bench) -> str:
    """Render the whole page."""
    return render(
        "speed",
        **bench,
        where=_where(bench["measured_on"]),
        grids="\n".join(summary(bench)),
        baselines=_parts(bench),
        steps=_steps(bench),
        memory=_memory(bench),
        profile=bench["parts"]["steps"]["profile"],
    )


def write() -> None:
    """Write README.md and packing.png next to bench.json, and the summary in docs/usage.md."""
    text = (FIGURES / "bench.json").read_text()
    bench = json.loads(text)
    (FIGURES / "README.md").write_text(page(bench))
    plots.packing(bench["parts"]["steps"]["steps"], FIGURES / "packing.png", text_hash(text))
    document = ROOT / "docs" / "usage.md"
    document.write_text(with_block(document.read_text(), "bench", summary(bench)))


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
        write()
