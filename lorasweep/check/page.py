"""The page of action=check_gpu, and the hardware file with the measured constants."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import yaml

from lorasweep.check.cases import CORRECTNESS, LOOP, PACKS, SPEED, Case, predict
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.time import LAUNCH_S

Results = Mapping[str, dict[str, Any]]
WRONG, MOST = 0.25, 10
"""The page names predictions that are off by more than this share, and at most so many."""
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
    known = {
        f.name: (getattr(hardware, f.name), getattr(Hardware(), f.name)) for f in fields(Hardware)
    }
    values = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, (value, default) in known.items()
        if value != default
    }
    return (
        f"# {node['name']}, measured on {date} by action=check_gpu ({_software(node)}).\n"
        "# The best product has matmul_flops_s times attainable_share. Not measured: links,\n"
        "# network and price.\n"
    ) + yaml.safe_dump(values, sort_keys=False)


def failures(cases: Sequence[Case], results: Results) -> list[str]:
    """List the checks of correctness that failed: the cause, or the difference."""
    found = []
    for case in (c for c in cases if c.part == CORRECTNESS and c.name in results):
        result = results[case.name]
        if "failed" in result:
            found.append(f"{case.name}: {result['failed']}")
        elif not result["difference"] <= result["bound"]:
            allowed = f"where {result['bound']:.2g} is allowed"
            found.append(f"{case.name}: a difference of {result['difference']:.2g}, {allowed}")
    return found


def page(
    cases: Sequence[Case],
    predicted: Mapping[str, Any],
    results: Results,
    measured: Hardware | None,
) -> str:
    """Return the page as Markdown.

    `predicted`: see `cases.predictions`; empty before they were made. `measured`: the machine with
    measured constants.
    """
    node = results.get("node", {"failed": "it was not run"})
    if "failed" in node:
        return f"# Check of a GPU\n\nPart 1 failed: {node['failed']}\n"
    plans = predicted.get("cases", {})
    # the plan knows nothing of the options of a case
    compared = [
        (case, key, before, after)
        for case in (c for c in cases if not c.options)
        for key in COMPARED
        if (before := plans.get(case.name, {}).get(key))
        and (after := results.get(case.name, {}).get(key))
    ]
    wrong_checks = failures(cases, results)
    checks = [c for c in cases if c.part == CORRECTNESS and c.name in results]
    blocks = [f"# Check of {node['name']}", f"{node['memory_gib']:.1f} GiB, {_software(node)}."]
    if any(c.options.get("small") for c in cases):
        text = "Shapes are shrunken, and the plan's formulas for GPUs are applied to a processor"
        blocks.append(f"**This machine has no GPU.** {text}: the ratios say nothing about a GPU.")
    passed = f"{len(checks) - len(wrong_checks)} of {len(checks)} checks passed."
    lines = [f"- **Correctness:** {passed}", *(f"  - {text}" for text in wrong_checks)]
    blocks.append("\n".join(lines + _accuracy(compared, measured)))
    wrong = [row for row in compared if abs(row[2] / row[3] - 1) > WRONG]
    if wrong:
        wrong.sort(key=lambda row: -abs(math.log(row[3] / row[2])))
        shown = f", the {MOST} worst" if len(wrong) > MOST else ""
        rows = [("case", "quantity", "predicted", "measured", "measured / predicted", "mostly")]
        for case, key, before, after in wrong[:MOST]:
            parts = plans[case.name]["parts"]
            mostly = max(parts, key=lambda name: parts[name]) if key == "step_s" else ""
            numbers = (f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}")
            rows.append((case.name, COMPARED[key], *numbers, mostly))
        blocks += [f"Wrong by more than {WRONG:.0%}{shown}:", _table(rows)]
    blocks += ["## The card", _table(_card(node, predicted.get("hardware", {})))]
    head = [("check", "difference", "allowed")]
    known = [(c.name, results[c.name]) for c in checks if "bound" in results[c.name]]
    differences = [(n, f"{r['difference']:.2g}", f"{r['bound']:.2g}") for n, r in known]
    blocks += ["## Correctness", _table(head + differences)]
    titles = {SPEED: "Speed", PACKS: "Packs", LOOP: "Rows, compiling and sampling"}
    for part, title in titles.items():
        some = [c for c in cases if c.part == part and "step_s" in results.get(c.name, {})]
        blocks += [f"## {title}", _table(_speeds(some, plans, results, node))] if some else []
    missing = [
        f"- {c.part}, {c.name}: {r.get('misfit') or r['failed']}"
        for c in cases
        if {"misfit", "failed"} & (r := results.get(c.name, {"failed": "not measured yet"})).keys()
    ]
    blocks += ["## Not measured", "\n".join(missing)] if missing else []
    return "\n\n".join(blocks) + "\n"


def _software(node: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in node["software"].items() if v)


def _accuracy(compared: Sequence[Any], measured: Hardware | None) -> list[str]:
    """Return a line for each quantity, and one for the seconds with the measured constants."""
    lines = []
    for key, label in COMPARED.items():
        if ratios := [after / before for _, k, before, after in compared if k == key]:
            far = sum(abs(1 / ratio - 1) > WRONG for ratio in ratios)
            lines.append(
                f"- **{label[0].upper()}{label[1:]}:** the median of measured / predicted is "
                f"{statistics.median(ratios):.2f}; {far} of {len(ratios)} predictions are off by "
                f"more than {WRONG:.0%}."
            )
    if measured is not None:
        timed = [(predict(c, measured), after) for c, k, _, after in compared if k == "step_s"]
        if ratios := [after / again["step_s"] for again, after in timed if "step_s" in again]:
            middle = statistics.median(ratios)
            lines.append(
                f"- **With the measured constants** the median of seconds is {middle:.2f}."
            )
    return lines


def _card(node: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each constant, in the plan and measured."""

    def tera(number: float | None, share: float = 1.0) -> str:
        return f"{number * share / 1e12:.3g}" if number else "-"

    attention, share = node["attention"], plan.get("attainable_share", 1.0)
    planned = plan.get("matmul_flops_s", {})
    rows = [("constant", "in the plan", "measured")]
    for p, speed in node["matmul_flops_s"].items():
        rows.append((f"products in {p}, TFLOP/s", tera(planned.get(p), share), tera(speed)))
    chosen = (tera(plan.get("attention_flops_s")), tera(attention["flops_s"]))
    rows.append(("causal attention in bf16, TFLOP/s", *chosen))
    rows += [(f"- {n} kernel", "", tera(speed)) for n, speed in attention["kernels"].items()]
    bandwidth = (tera(plan.get("bandwidth_bytes_s")), tera(node["bandwidth_bytes_s"]))
    launch = (f"{LAUNCH_S * 1e6:.1f}", f"{node['launch_s'] * 1e6:.1f}")
    return [
        *(*rows, ("bandwidth, TB/s", *bandwidth)),
        ("launch of a kernel, microseconds", *launch),
    ]


def _speeds(
    cases: Sequence[Case], plans: Results, results: Results, node: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Return a row for each measured case; packs are compared with runs one by one, too."""
    rows: list[tuple[str, ...]] = [SPEEDS]
    alone = {c.spec: results[c.name]["step_s"] for c in cases if c.n_runs == 1}
    for case in cases:
        after, before = results[case.name], plans[case.name]
        assert case.spec is not None
        peak = node["matmul_flops_s"].get(case.spec.precision)
        one, step_s = alone.get(case.spec, math.nan), after["step_s"]
        rows.append(
            (
                *(case.name, f"{before['rows']}{', recomputed' * before['checkpointing']}"),
                *(f"{step_s:.4g}", f"{before['step_s']:.4g}"),
                f"{after.get('sampled_tokens_s') or after['tokens_s']:,.0f}",
                f"{before['flops'] / step_s / peak:.0%}" if peak else "",
                *(f"{after['memory_gib']:.1f}", f"{before['memory_gib']:.1f}"),
                f"{case.n_runs * one / step_s:.2f}" if case.n_runs > 1 else "",
            )
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    head, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])
