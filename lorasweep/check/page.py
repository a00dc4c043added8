"""The page of action=check_gpu, and the hardware file with the measured constants."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import yaml

from lorasweep.check.cases import CORRECTNESS, LOOP, PACKS, SPEED, Case
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import LAUNCH_S

Results = Mapping[str, dict[str, Any]]
WRONG = 0.25
"""The page names predictions that are off by more than this share."""
COMPARED = {
    "step_s": "seconds an update",
    "memory_gib": "GiB at the peak",
    "sampled_tokens_s": "tokens sampled a second",
}
SPEEDS = (
    *("case", "rows per pass", "s an update", "planned", "tokens/s", "share of the peak"),
    *("GiB", "planned", "one by one / pack"),
)


def measured_hardware(node: Mapping[str, Any], known: Hardware | None, name: str) -> Hardware:
    """Return a machine with the measured constants; the others are those of `known`.

    `node`: the result of part 1. `known`: the card's file in conf/hardware, or None.
    """
    speeds = {p: s for p, s in node["matmul_flops_s"].items() if s}
    share = 1.0
    if known is not None and "bf16" in known.matmul_flops_s and "bf16" in speeds:
        share = speeds["bf16"] / known.matmul_flops_s["bf16"]
    return replace(
        known or Hardware(),
        name=name,
        gpus=max(1, node["gpus"]),
        gpu_name=node["name"],
        gpu_memory_gib=round(node["memory_gib"], 2),
        matmul_flops_s={p: float(f"{speed / share:.3g}") for p, speed in speeds.items()},
        attainable_share=round(share, 3),
        attention_flops_s=float(f"{node['attention']['flops_s']:.3g}"),
        bandwidth_bytes_s=float(f"{node['bandwidth_bytes_s']:.3g}"),
        fast_bf16=True,
    )


def hardware_file(hardware: Hardware, node: Mapping[str, Any], date: str) -> str:
    """Return the text of a file for conf/hardware."""
    plain = Hardware()
    values = {
        f.name: v
        for f in fields(Hardware)
        if (v := getattr(hardware, f.name)) != getattr(plain, f.name)
    }
    values["matmul_flops_s"] = dict(hardware.matmul_flops_s)
    return (
        f"# {node['name']}, measured on {date} by action=check_gpu ({_software(node)}).\n"
        "# The best product has matmul_flops_s times attainable_share. Not measured: links,\n"
        "# network and price.\n"
    ) + yaml.safe_dump(values, sort_keys=False)


def failures(cases: Sequence[Case], results: Results) -> list[str]:
    """Name the checks of correctness that failed."""
    checks = [c.name for c in cases if c.part == CORRECTNESS and c.name in results]
    return [n for n in checks if not results[n].get("difference", 1) <= results[n].get("bound", 0)]


def page(cases: Sequence[Case], predicted: Mapping[str, Any], results: Results) -> str:
    """Return the page as Markdown; `predicted`: see `cases.predictions`, empty before part 1."""
    node = results.get("node", {"failed": "it was not run"})
    if "failed" in node:
        return f"# Check of a GPU\n\nPart 1 failed: {node['failed']}\n"
    plans = predicted.get("cases", {})
    checks = [c for c in cases if c.part == CORRECTNESS and c.name in results]
    failed = failures(cases, results)
    blocks = [f"# Check of {node['name']}", f"{node['memory_gib']:.1f} GiB, {_software(node)}."]
    if not node["gpus"]:
        text = "Shapes are shrunken, and the plan's formulas for GPUs are applied to a processor"
        blocks.append(f"**This machine has no GPU.** {text}: the ratios say nothing about a GPU.")
    passed = f"{len(checks) - len(failed)} of {len(checks)} checks passed."
    lines = [f"- **Correctness:** {passed}"]
    wrong = [("case", "quantity", "predicted", "measured", "measured / predicted", "mostly")]
    for key, label in COMPARED.items():
        ratios = []
        for case in cases:
            plan = plans.get(case.name, {})
            before, after = plan.get(key), results.get(case.name, {}).get(key)
            if not before or not after:
                continue
            ratios.append(after / before)
            if abs(before / after - 1) > WRONG:
                mostly = max(plan["parts"], key=plan["parts"].get) if key == "step_s" else ""
                numbers = (f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}")
                wrong.append((case.name, label, *numbers, mostly))
        if ratios:
            far = sum(abs(1 / ratio - 1) > WRONG for ratio in ratios)
            lines.append(
                f"- **{label[0].upper()}{label[1:]}:** the median of measured / predicted is "
                f"{statistics.median(ratios):.2f}; {far} of {len(ratios)} predictions are off by "
                f"more than {WRONG:.0%}."
            )
    blocks.append("\n".join(lines))
    blocks += [f"Wrong by more than {WRONG:.0%}:", _table(wrong)] if wrong[1:] else []
    blocks += ["## The card", _table(_card(node, predicted.get("hardware", {})))]
    differences = [("check", "difference", "allowed", "")]
    for case in (c for c in checks if "bound" in results[c.name]):
        difference, bound = (f"{results[case.name][key]:.2g}" for key in ("difference", "bound"))
        differences.append((case.name, difference, bound, "**failed**" * (case.name in failed)))
    blocks += ["## Correctness", _table(differences)]
    alone = {c.spec: results.get(c.name, {}).get("step_s") for c in cases if c.n_runs == 1}
    titles = {SPEED: "Speed", PACKS: "Packs", LOOP: "Sampling"}
    for part, title in titles.items():
        rows = [SPEEDS]
        for case in (c for c in cases if c.part == part and "step_s" in results.get(c.name, {})):
            assert case.spec is not None
            after, before = results[case.name], plans[case.name]
            step_s, peak = after["step_s"], node["matmul_flops_s"].get(case.spec.precision)
            together = (alone.get(case.spec) or math.nan) * case.n_runs / step_s
            rows.append(
                (
                    *(case.name, f"{before['rows']}{', recomputed' * before['checkpointing']}"),
                    *(f"{step_s:.4g}", f"{before['step_s']:.4g}"),
                    f"{after.get('sampled_tokens_s') or after['tokens_s']:,.0f}",
                    f"{before['flops'] / step_s / peak:.0%}" if peak else "",
                    *(f"{after['memory_gib']:.1f}", f"{before['memory_gib']:.1f}"),
                    f"{together:.2f}" if case.n_runs > 1 else "",
                )
            )
        blocks += [f"## {title}", _table(rows)] if rows[1:] else []
    missing = [
        f"- {c.part}, {c.name}: {r.get('misfit') or r['failed']}"
        for c in cases
        if {"misfit", "failed"} & (r := results.get(c.name, {"failed": "not measured yet"})).keys()
    ]
    blocks += ["## Not measured", "\n".join(missing)] if missing else []
    return "\n\n".join(blocks) + "\n"


def _software(node: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in node["software"].items() if v)


def _card(node: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each constant, in the plan and measured."""
    planned, share = plan.get("matmul_flops_s", {}), plan.get("attainable_share", 1.0)
    found = [
        (f"products in {p}, TFLOP/s", planned.get(p, 0) * share, speed, 1e12)
        for p, speed in node["matmul_flops_s"].items()
    ]
    attention, bandwidth = plan.get("attention_flops_s"), plan.get("bandwidth_bytes_s")
    found += [
        ("causal attention in bf16, TFLOP/s", attention, node["attention"]["flops_s"], 1e12),
        ("bandwidth, TB/s", bandwidth, node["bandwidth_bytes_s"], 1e12),
        ("launch of a kernel, microseconds", LAUNCH_S, node["launch_s"], 1e-6),
    ]
    rows = [
        (text, *(f"{number / unit:.3g}" if number else "-" for number in pair))
        for text, *pair, unit in found
    ]
    return [("constant", "in the plan", "measured"), *rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    head, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])
