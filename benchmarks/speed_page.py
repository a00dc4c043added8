"""Render bench.json as a page with a figure, and the summary in docs/usage.md.

Measures nothing: every number comes from the file that `python -m benchmarks speed` wrote.
"""

import json
from typing import Any

from analysis.inference.estimate import number
from analysis.report.text import markdown, text_hash
from benchmarks import plots
from benchmarks.harness import FIGURES, ROOT, render, with_block

Bench = dict[str, Any]
"""The content of bench.json: measurements, by part."""


def _grids(bench: Bench) -> list[dict[str, Any]]:
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
    head = "grid|lorasweep|one process a run (TRL + PEFT)|warm PEFT loop|pack|of the GEMM peak"
    rows = [
        [
            g["what"],
            f"{g['lorasweep_s']:.0f} s",
            f"{g['process_per_run_s']:.0f} s: **{g['vs_process_per_run']:.1f}x**",
            f"{g['warm_peft_s']:.0f} s: **{g['vs_warm_peft']:.1f}x**",
            str(g.get("pack", "-")),
            f"{g['flops_over_gemm_peak']:.2f} ({g['precision']})",
        ]
        for g in _grids(bench)
    ]
    return [*markdown([head.split("|"), *rows]), *answer_table(bench["parts"].get("answer"))]


def answer_table(found: dict[str, Any] | None) -> list[str]:
    """Render the time from nothing to a ratio; empty if it was not measured."""
    if found is None:
        return []
    per_curve = [found[k] for k in ("plain_runs", "same_interval_runs")]
    head = "runs|from nothing to a ratio, lorasweep|ratio"
    plain = [f"plain grid, {n} runs a curve, TRL" for n in per_curve]
    row = [
        str(found["runs"]),
        f"{found['wall_s']:.0f} s",
        f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]",
        f"{found['plain_grid_s']:.0f} s: **{found['vs_plain_grid']:.1f}x**",
        f"{found['same_interval_s']:.0f} s: **{found['vs_same_interval']:.1f}x**",
    ]
    sampled = min(p["sampled"] for p in found["processes"])
    note = (
        "Plain grids: 7 rates, every seed at all of them, one TRL process a run and one after the "
        f"other; {sampled} of each curve were timed and multiplied up. {per_curve[0]} runs a curve "
        f"are the fewest that are judged, {per_curve[1]} the fewest that give an interval (and on "
        "planted curves a narrower one than the sweep's)."
    )
    return ["", *markdown([[*head.split("|"), *plain], row]), "", note]


def steps_table(bench: Bench) -> list[str]:
    """Render the Markdown table of step times: milliseconds per step and run.

    By batch and pack size, with LoRA's time relative to full fine-tuning's.
    """
    rows = bench["parts"]["steps"]["steps"]
    sizes = sorted({r["pack"] for r in rows})
    packs = [f"LoRA r16, {n} in a pack" for n in sizes]
    out = [["model, batch", "FullFT", *packs, "alone / FullFT", "best / FullFT", "formula"]]
    ratios = bench["parts"]["steps"]["lora_over_fullft"]
    for model, batch in dict.fromkeys((r["model"], r["batch_size"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch_size"]) == (model, batch)]
        ms = {(r["method"], r["pack"]): f"{r['step_s'] * 1e3:.1f}" for r in here}
        share = ratios[model]["by_batch"][str(batch)]
        shares = (share["n1"], share["best"], ratios[model]["formula"])
        cells = [ms.get(("lora", n), "-") for n in sizes]
        out.append([f"{model}, {batch}", ms["fullft", 1], *cells, *(f"{v:.2f}" for v in shares)])
    return markdown(out)


def _parts(bench: Bench) -> list[str]:
    """Render a baseline's time, divided into start-up and steps."""
    out = [["grid, arm", "start and load", "updates", "held-out loss"]]
    for g in _grids(bench):
        for kind, name in (("process_per_run", "TRL, a process"), ("warm_peft", "PEFT loop, warm")):
            for a in g[kind]:
                seconds = [f"{a[k]:.1f} s" for k in ("start_s", "train_s", "eval_s")]
                out.append([f"{g['what']}: {a['arm']}, {name}", *seconds])
    return markdown(out)


def _memory(bench: Bench) -> list[str]:
    """Render the peak memory of LoRA and full fine-tuning."""
    head = "model, batch|FullFT|LoRA r16|idle|LoRA / FullFT, without idle|planned FullFT, LoRA"
    out = [head.split("|")]
    cases = {
        (c["model"], c["batch_size"], c["method"]): c for c in bench["parts"]["memory"]["cases"]
    }
    for model, batch in dict.fromkeys(key[:2] for key in cases):
        full, lora = cases[model, batch, "fullft"], cases[model, batch, "lora"]
        above_idle = [c["peak_bytes"] - c["idle_bytes"] for c in (lora, full)]
        planned = ", ".join(_mib(c["planned_bytes"]) for c in (full, lora))
        peaks = [_mib(v) for v in (full["peak_bytes"], lora["peak_bytes"], full["idle_bytes"])]
        share = f"{above_idle[0] / above_idle[1]:.2f}"
        out.append([f"{model}, {batch} ({full['precision']})", *peaks, share, planned])
    return markdown(out)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def page(bench: Bench) -> str:
    """Render the whole page."""
    parts = bench["parts"]["steps"]
    tables = {
        "grids": summary(bench),
        "baselines": _parts(bench),
        "steps": steps_table(bench),
        "memory": _memory(bench),
    }
    lines = {name: "\n".join(rows) for name, rows in tables.items()}
    return render("speed", **{**bench, **lines}, profile=parts["profile"])


def with_summary(text: str, bench: Bench) -> str:
    """Replace the summary in a page."""
    return with_block(text, "bench", summary(bench))


def write() -> None:
    """Write README.md and packing.png next to bench.json, and the summary in docs/usage.md."""
    text = (FIGURES / "bench.json").read_text()
    bench = json.loads(text)
    (FIGURES / "README.md").write_text(page(bench))
    plots.packing(bench["parts"]["steps"]["steps"], FIGURES / "packing.png", text_hash(text))
    document = ROOT / "docs" / "usage.md"
    document.write_text(with_summary(document.read_text(), bench))
