"""Measure overhead, steps, memory, whole grids and a whole answer, on an idle machine.

    python -m benchmarks speed [--out FILE] [part ...]

The baselines of grids, one TRL process per run and a plain PEFT loop in one process, get all cores.
They train some runs of each curve, one after another. The time of the others, which differ only in
learning rate and seed, is extrapolated. lorasweep's commands are timed from process start to the
report.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.inference.estimate import number
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.report.text import Rows, markdown
from benchmarks import harness, steps
from benchmarks.harness import BENCH, Figures, Log, Page, command, render
from benchmarks.steps import at
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.plan.needs import run_flops
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.work.search import all_points

GRIDS = {"tiny": ((1, 200), (4, 100), (16, 50)), "small": ((4, 8),)}
"""Scale -> (batch of a run, updates) of the grids of 16 LoRA runs."""
LORA_GRID = (
    "+sweep=lr_ratio",
    "~sweep.arms.fullft",
    "sweep.arms.lora.rank=[16]",
    "sweep.replicate.seeds=[]",
    "sweep.arms.lora.lr=${around:3e-4,16,1.3}",
)
FEW_ROWS = ("dataset.n_test=32", "dataset.n_test_curve=4")
"""Held-out rows of grids beyond scale tiny."""
PLAIN_RUNS = 7 * 3
"""Runs per curve of the plain grid, 7 LRs x 3 seeds: with fewer seeds no claim is judged."""
SAME_INTERVAL_RUNS = 7 * 2
"""Runs per curve of the smallest plain grid with an interval of the ratio. On simulated curves that
interval is narrower than the sweep's (analysis/results/calibration, "Runs for an interval")."""
SAMPLES, WARM = 3, 2
"""Timed TRL processes of each curve of the sweep, and runs of each curve in the warm loop."""


def baseline(
    kind: str, points: Sequence[Point], values: dict[str, Any], folder: Path
) -> dict[str, float]:
    """Train runs with a baseline in one process; return seconds per run by part.

    Loading counts as start-up. The first of several runs warms up the process and does not count.
    """
    job = {"jobs": [[p.spec.plain()] for p in points], "exec": values, "out": None}
    wall_s, rows = harness.baseline(kind, job, folder)
    kept = rows[1:] or rows
    parts = {k: sum(r[k] for r in kept) / len(kept) for k in ("train_s", "eval_s")}
    start_s = wall_s - sum(r["train_s"] + r["eval_s"] for r in rows)
    return {"start_s": start_s, **parts, "run_s": sum(parts.values())}


def timed(arguments: Sequence[str], home: Path) -> tuple[float, Any, list[Point]]:
    """Run a sweep's command in an empty folder; return its seconds, its answer and its runs.

    RuntimeError if a run failed; a diverged run, which ends early, is allowed.
    """
    asked = [*arguments, f"exec.reports_dir={home / 'reports'}"]
    seconds, found = command(*asked, runs_dir=home / "runs")
    store = RunStore(home / "runs")
    points = all_points(compose_request([*arguments, f"exec.runs_dir={home / 'runs'}"]), store)
    states = Counter(store.state(p.id) for p in points)
    if set(states) - {"done", "diverged"}:
        raise RuntimeError(f"runs that did not end: {dict(states)}")
    return seconds, found, points


def compare(
    points: Sequence[Point],
    whole_s: float,
    values: dict[str, Any],
    folder: Path,
    peak: float,
    samples: int = 1,
) -> Figures:
    """Compare `whole_s`, the wall seconds of all `points`, with both baselines.

    `flops_over_gemm_peak`: the runs' operations by the study's formula, with the unembedding at
    every token, over wall time and `peak`.
    """
    curves: dict[tuple[str, Any], list[Point]] = {}
    for p in points:
        curves.setdefault((p.arm, getattr(p.spec.method, "rank", None)), []).append(p)
    alone: list[Figures] = []
    warm: list[Figures] = []
    for (arm, _), runs in curves.items():
        each = [baseline("trl", [p], values, folder) for p in runs[:samples]]
        known = {"arm": arm, "runs": len(runs)}
        alone.append(known | {k: sum(t[k] for t in each) / len(each) for k in each[0]})
        warm.append(known | baseline("loop", runs[:WARM], values, folder))
    process_s = sum(c["runs"] * (c["start_s"] + c["run_s"]) for c in alone)
    warm_s = warm[0]["start_s"] + sum(c["runs"] * c["run_s"] for c in warm)
    return {
        "runs": len(points),
        "lorasweep_s": whole_s,
        "process_per_run": alone,
        "warm_peft": warm,
        "process_per_run_s": process_s,
        "warm_peft_s": warm_s,
        "vs_process_per_run": process_s / whole_s,
        "vs_warm_peft": warm_s / whole_s,
        "flops_over_gemm_peak": sum(run_flops(p.spec) for p in points) / whole_s / peak,
    }


def whole_sweep(values: dict[str, Any], peak: float) -> Figures:
    """Time `lr_ratio` at tiny from an empty store; compare with the same runs and plain grids."""
    with tempfile.TemporaryDirectory() as folder:
        wall_s, answer, points = timed(["+sweep=lr_ratio", "scale=tiny"], Path(folder))
        found = compare(points, wall_s, values, Path(folder), peak, SAMPLES)
    (ratio,) = (r["ratio"] for r in answer["ratios"] if r["rank"] is None)
    seconds = sum(c["start_s"] + c["run_s"] for c in found["process_per_run"])
    found["answer"] = {
        **{"runs": len(points), "wall_s": wall_s},
        **{k: ratio[k] for k in ("value", "low", "high")},
        "sampled": SAMPLES,
        "plain_runs": PLAIN_RUNS,
        "plain_grid_s": PLAIN_RUNS * seconds,
        "same_interval_runs": SAME_INTERVAL_RUNS,
        "same_interval_s": SAME_INTERVAL_RUNS * seconds,
    }
    return found


def whole_grids(scale: str, values: dict[str, Any], log: Log) -> Figures:
    """Time grids of 16 LoRA runs and their baselines; at `tiny` also the whole sweep."""
    spec = compose_request(at(scale)).points[0].spec
    peak = steps.gemm_peak(spec.precision, detect.cores())
    part: Figures = {"gemm_peak": peak, "precision": spec.precision, "grids": []}
    if scale == "tiny":
        part["sweep"] = whole_sweep(values, peak)
        log(f"the sweep at tiny: {part['sweep']}")
    for batch, updates in GRIDS[scale]:
        asked = [*LORA_GRID, *at(scale), f"batch_size={batch}", f"steps={updates}"]
        asked += FEW_ROWS if scale != "tiny" else ()
        with tempfile.TemporaryDirectory() as folder:
            wall_s, _, points = timed(asked, Path(folder))
            store = RunStore(Path(folder) / "runs")
            grid: Figures = {
                **{"scale": scale, "model": spec.model.name, "batch_size": batch},
                **{"steps": updates, "pack": max(len(store.env(p.id)["pack"]) for p in points)},
                **compare(points, wall_s, values, Path(folder), peak),
            }
        part["grids"].append(grid)
        log(f"16 LoRA runs: {grid}")
    return part


# ---------------------------------------------------------------- the page


def _all_grids(bench: Figures) -> list[Figures]:
    whole = {"what": "the whole tiny sweep, FullFT and LoRA r4, r16", **bench["tiny"]["sweep"]}
    grids = [g for scale in GRIDS for g in bench[scale]["grids"]]
    named = [
        {"what": f"16 LoRA r16 on {g['model']}, batch {g['batch_size']}, {g['steps']} steps", **g}
        for g in grids
    ]
    return [g | {"precision": bench[g.get("scale", "tiny")]["precision"]} for g in (whole, *named)]


def summary(bench: Figures) -> list[str]:
    """Render the Markdown tables of whole grids and of the whole answer, against the baselines."""
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
    found = bench["tiny"]["sweep"]["answer"]
    per_curve = [found[k] for k in ("plain_runs", "same_interval_runs")]
    answer = ["runs", "lorasweep, from an empty folder to the ratio", "ratio"]
    row = [
        str(found["runs"]),
        f"{found['wall_s']:.0f} s",
        f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]",
    ]
    for n, seconds in zip(per_curve, (found["plain_grid_s"], found["same_interval_s"])):
        answer.append(f"plain grid, {n} runs per curve, TRL")
        row.append(f"{seconds:.0f} s: **{seconds / found['wall_s']:.1f}x**")
    note = (
        "Plain grids train every seed at 7 learning rates, with one TRL process per run, one after "
        f"the other. {found['sampled']} processes of each curve were timed, and the time of all "
        f"was extrapolated. A claim is judged from {per_curve[0]} runs per curve on; an interval "
        f"exists from {per_curve[1]} on (on simulated curves it is narrower than the sweep's)."
    )
    return [*markdown([head.split("|"), *rows]), "", *markdown([answer, row]), "", note]


def _steps(bench: Figures) -> Rows:
    """Return milliseconds per step and run by batch and pack size, and ratios to FullFT."""
    rows = bench["steps"]["steps"]
    sizes = sorted({r["pack"] for r in rows})
    packs = [f"LoRA r16, {n} in a pack" for n in sizes]
    out = [["model, batch", "FullFT", *packs, "alone / FullFT", "best / FullFT", "by FLOPs"]]
    ratios = bench["steps"]["lora_over_fullft"]
    for model, batch in dict.fromkeys((r["model"], r["batch_size"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch_size"]) == (model, batch)]
        ms = {(r["method"], r["pack"]): f"{r['step_s'] * 1e3:.1f}" for r in here}
        share = ratios[model]["by_batch"][str(batch)]
        shares = (share["n1"], share["best"], ratios[model]["formula"])
        cells = [ms.get(("lora", n), "-") for n in sizes]
        out.append([f"{model}, {batch}", ms["fullft", 1], *cells, *(f"{v:.2f}" for v in shares)])
    return out


def _memory(bench: Figures) -> Rows:
    """Return the peak memory of LoRA and full fine-tuning."""
    head = "model, batch|FullFT|LoRA r16|idle|LoRA / FullFT, without idle|planned FullFT, LoRA"
    out = [head.split("|")]
    cases = bench["memory"]["cases"]
    for full, lora in zip(cases[::2], cases[1::2]):
        above_idle = [c["peak_bytes"] - c["idle_bytes"] for c in (lora, full)]
        sizes = [full["peak_bytes"], lora["peak_bytes"], full["idle_bytes"]]
        sizes += [full["planned_bytes"], lora["planned_bytes"]]
        *peaks, whole, adapters = (f"{n / 2**20:,.0f} MiB" for n in sizes)
        name = f"{full['model']}, {full['batch_size']} ({full['precision']})"
        share = f"{above_idle[0] / above_idle[1]:.2f}"
        out.append([name, *peaks, share, f"{whole}, {adapters}"])
    return out


def page(bench: Figures) -> str:
    """Render the whole page."""
    baselines = [["grid, arm", "start and load", "updates", "held-out loss"]]
    for g in _all_grids(bench):
        for kind, name in (("process_per_run", "TRL process"), ("warm_peft", "warm PEFT loop")):
            for a in g[kind]:
                seconds = [f"{a[k]:.1f} s" for k in ("start_s", "train_s", "eval_s")]
                baselines.append([f"{g['what']}: {a['arm']}, {name}", *seconds])
    parts: dict[str, list[str]] = {}  # machine and day -> parts
    for part, where in bench["measured_on"].items():
        parts.setdefault(where, []).append(part)
    return render(
        "speed",
        machine=bench["machine"],
        overhead=bench["overhead"],
        where="; ".join(f"{', '.join(names)}: {where}" for where, names in parts.items()),
        grids="\n".join(summary(bench)),
        baselines=baselines,
        steps=_steps(bench),
        memory=_memory(bench),
    )


def draw(bench: Figures, inputs: str) -> None:
    """Draw a LoRA step's time per run over the pack size, relative to full fine-tuning."""
    rows, panels = bench["steps"]["steps"], []
    for model in dict.fromkeys(r["model"] for r in rows):
        series = []
        for batch in dict.fromkeys(r["batch_size"] for r in rows if r["model"] == model):
            mine = [r for r in rows if (r["model"], r["batch_size"]) == (model, batch)]
            lora = [r for r in mine if r["method"] == "lora"]
            whole = next(r["step_s"] for r in mine if r["method"] == "fullft")
            shares = [r["step_s"] / whole for r in lora]
            series.append(Series(f"batch {batch}", [r["pack"] for r in lora], shares))
        names, one = ("runs in a pack", "LoRA r16 step a run / FullFT step"), {"FullFT": 1.0}
        ticks = [(n, str(n)) for n in sorted({n for s in series for n in s.x})]
        axes: Any = {"log_x": True, "lines": one, "ticks": ticks, "y_range": (0, None)}
        panels.append(Panel(model, *names, series, **axes))
    plots.panels(panels, BENCH / "packing.png", inputs)


PAGE = Page(BENCH / "bench.json", "README.md", page, draw)


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, or all, and write the page."""
    values = harness.exec_values()
    dirs = (values["models_dir"], values["data_dir"])
    parts: dict[str, Callable[[Log], Any]] = {
        "overhead": steps.measure_overhead,
        "steps": partial(steps.measure, *dirs),
        "memory": partial(steps.measure_memory, *dirs),
        **{scale: partial(whole_grids, scale, values) for scale in GRIDS},
    }
    harness.measure(PAGE, parts, arguments, "torch", "transformers", "peft", "trl")
