"""The benchmark's page: `python -m analysis.validation.bench` renders bench.json as a table, a
plot, and the README's summary.

Refuses to measure; every number comes from the file that `python -m lorasweep.bench` wrote.
"""

import json
from pathlib import Path
from typing import Any

from analysis.report import plots

FOLDER = Path(__file__).resolve().parents[1] / "results" / "bench"
BEGIN, END = (
    "<!-- bench: made by `python -m analysis.validation.bench` -->",
    "<!-- end of bench -->",
)


def _grids(told: dict[str, Any]) -> list[dict[str, Any]]:
    tiny = told["parts"]["tiny"]
    whole = {
        "what": "the whole tiny sweep, FullFT and LoRA r4, r16",
        "precision": tiny["precision"],
        **tiny["sweep"],
    }
    grids = [
        {
            "what": f"16 LoRA r16 on {g['model']}, batch {g['batch_size']}, {g['steps']} steps",
            "precision": told["parts"][g["scale"]]["precision"],
            **g,
        }
        for scale in ("tiny", "small")
        for g in told["parts"][scale]["grids"]
    ]
    return [whole, *grids]


def summary(told: dict[str, Any]) -> str:
    """Return the table of whole grids as Markdown: wall time against both baselines."""
    rows = [
        "| grid | lorasweep | one process a run (TRL + PEFT) | warm PEFT loop | pack | of the GEMM peak |",
        "|---|---|---|---|---|---|",
    ]
    for g in _grids(told):
        rows.append(
            f"| {g['what']} | {g['lorasweep_s']:.0f} s "
            f"| {g['process_per_run_s']:.0f} s: **{g['vs_process_per_run']:.1f}x** "
            f"| {g['warm_peft_s']:.0f} s: **{g['vs_warm_peft']:.1f}x** | {g.get('pack', '-')} "
            f"| {g['flops_over_gemm_peak']:.2f} ({g['precision']}) |"
        )
    return "\n".join(rows)


def steps_table(told: dict[str, Any]) -> str:
    """Return seconds a step and run by batch and pack size, and LoRA's share of full fine-tuning's."""
    rows = told["parts"]["steps"]["steps"]
    sizes = sorted({r["pack"] for r in rows})
    head = "".join(f" LoRA r16, {n} in a pack |" for n in sizes)
    out = [f"| model, batch | FullFT |{head} alone / FullFT | best / FullFT | formula |"]
    out.append("|---" * (len(sizes) + 5) + "|")
    ratios = told["parts"]["steps"]["lora_over_fullft"]
    for model, batch in dict.fromkeys((r["model"], r["batch_size"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch_size"]) == (model, batch)]
        mine = {(r["method"], r["pack"]): r["step_s"] for r in here}
        cells = "".join(
            f" {mine['lora', n] * 1e3:.1f} |" if ("lora", n) in mine else " - |" for n in sizes
        )
        share = ratios[model]["by_batch"][str(batch)]
        shares = f"{share['n1']:.2f} | {share['best']:.2f} | {ratios[model]['formula']:.2f}"
        out.append(f"| {model}, {batch} | {mine['fullft', 1] * 1e3:.1f} |{cells} {shares} |")
    return "\n".join(out)


def _parts(told: dict[str, Any]) -> list[str]:
    """Where a baseline's seconds go, start-up and steps apart."""
    out = ["| grid, arm | start and load | updates | held-out loss |", "|---|---|---|---|"]
    for g in _grids(told):
        for kind, name in (("process_per_run", "TRL, a process"), ("warm_peft", "PEFT loop, warm")):
            for a in g[kind]:
                seconds = " | ".join(f"{a[k]:.1f} s" for k in ("start_s", "train_s", "eval_s"))
                out.append(f"| {g['what']}: {a['arm']}, {name} | {seconds} |")
    return out


def _memory(told: dict[str, Any]) -> list[str]:
    """LoRA's peak memory beside full fine-tuning's."""
    out = [
        "| model, batch | FullFT | LoRA r16 | idle | LoRA / FullFT, without idle | planned FullFT, LoRA |",
        "|---" * 6 + "|",
    ]
    cases = told["parts"]["memory"]["cases"]
    for model, batch in dict.fromkeys((c["model"], c["batch_size"]) for c in cases):
        full, lora = (
            next(
                c for c in cases if (c["model"], c["batch_size"], c["method"]) == (model, batch, m)
            )
            for m in ("fullft", "lora")
        )
        share = (lora["peak_bytes"] - lora["idle_bytes"]) / (
            full["peak_bytes"] - full["idle_bytes"]
        )
        mib = [
            f"{v / 2**20:,.0f} MiB"
            for v in (
                full["peak_bytes"],
                lora["peak_bytes"],
                full["idle_bytes"],
                full["planned_bytes"],
                lora["planned_bytes"],
            )
        ]
        name = f"{model}, {batch} ({full['precision']})"
        out.append(
            f"| {name} | {mib[0]} | {mib[1]} | {mib[2]} | {share:.2f} | {mib[3]}, {mib[4]} |"
        )
    return out


def render(told: dict[str, Any]) -> str:
    """Return the whole page."""
    here = told["machine"]
    lines = [
        "# Benchmark",
        "",
        f"{here['cores']} cores, {here['processor']}, GPUs: {', '.join(here['gpus']) or 'none'}; torch "
        f"{here['packages'].get('torch')}, Python {here['python']}. Made by `make bench`, all on one machine. "
        "The baselines train a sample of the runs of each arm and are reckoned up; lorasweep trains all of them, and "
        "its start, calibration and loading count.",
        "",
        "## Whole grids",
        "",
        summary(told),
        "",
        "Where the baselines' time goes, a run (start once a process):",
        "",
        *_parts(told),
        "",
        "## Milliseconds a step and run",
        "",
        "One thread, as a worker has.",
        "",
        steps_table(told),
        "",
        "![packing](packing.png)",
        "",
        "## Peak memory",
        "",
        "Resident, of a process of its own on one thread; idle: Python and its libraries alone. Planned is what `action=plan` "
        "reckons with.",
        "",
        *_memory(told),
        "",
        "## What a step's time goes into",
        "",
        "By the profiler, batch as in the last row of each model above.",
        "",
    ]
    for model, methods in told["parts"]["steps"]["profile"].items():
        for method, shares in methods.items():
            lines.append(
                f"- {model}, {method}: "
                + ", ".join(f"{what} {share:.0%}" for what, share in shares.items())
            )
    lines += [
        "",
        "## The harness itself",
        "",
        f"- planning 10,000 runs: {told['plan_10k_s']:.2f} s, process start included",
        f"- status of 10,000 finished runs: {told['status_10k_s']:.2f} s beyond start-up",
        f"- a run of a trainer that does nothing: {told['noop_run_s'] * 1e3:.1f} ms",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write README.md and packing.png beside bench.json, and the block in the project's README."""
    told = json.loads((FOLDER / "bench.json").read_text())
    (FOLDER / "README.md").write_text(render(told))
    plots.packing(told["parts"]["steps"]["steps"], FOLDER / "packing.png")
    readme = Path(__file__).resolve().parents[2] / "README.md"
    readme.write_text(with_block(readme.read_text(), told))


def with_block(text: str, told: dict[str, Any]) -> str:
    """Return the README's text with its benchmark block made anew."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{summary(told)}\n{text[end:]}"


if __name__ == "__main__":
    main()
