"""The page of action=check_gpu, and the hardware file with the measured constants."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lorasweep.check.cases import CORRECTNESS, LOOP, PACKS, SPEED, Case, predict
from lorasweep.plan.hardware import Hardware

Results = Mapping[str, dict[str, Any]]
WRONG = 0.25
"""The page names predictions that are off by more than this share."""
MOST = 10
"""Wrong predictions that are listed."""
COMPARED = {
    "step_s": "seconds an update",
    "memory_gib": "GiB at the peak",
    "sampled_tokens_s": "tokens sampled a second",
}
PRODUCTS = ("bf16", "fp32", "fp64")


# ---------------------------------------------------------------- hardware


def measured_hardware(node: Mapping[str, Any], known: Hardware | None, name: str) -> Hardware:
    """Return a machine with the measured constants; the others are those of `known`.

    `node`: the result of part 1. `known`: the card's file in conf/hardware, or None.
    """
    speeds = {p: s for p, s in node["matmul_flops_s"].items() if s}
    share = 1.0
    if known is not None and "bf16" in known.matmul_flops_s and "bf16" in speeds:
        share = speeds["bf16"] / known.matmul_flops_s["bf16"]
    base = known or Hardware()
    return dataclasses.replace(
        base,
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
    defaults = Hardware()
    values = {
        f.name: dict(value) if isinstance(value, Mapping) else value
        for f in dataclasses.fields(Hardware)
        if (value := getattr(hardware, f.name)) != getattr(defaults, f.name)
    }
    software = ", ".join(f"{k} {v}" for k, v in node["software"].items() if v)
    head = (
        f"# {node['name']}, measured on {date} by action=check_gpu ({software}).\n"
        "# The best product has matmul_flops_s times attainable_share. Not measured: links,\n"
        "# network and price.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


# ---------------------------------------------------------------- predicted and measured


def comparisons(
    cases: Sequence[Case], predicted: Results, results: Results
) -> list[tuple[Case, str, float, float]]:
    """List (case, quantity, predicted, measured) of everything that has both numbers.

    The plan knows nothing of the options of a case.
    """
    found = []
    for case in cases:
        before, after = _with_sampling(case, predicted.get(case.name, {})), results.get(case.name)
        for key in COMPARED if not case.options else ():
            if after and before.get(key) and after.get(key):
                found.append((case, key, before[key], after[key]))
    return found


def _with_sampling(case: Case, before: dict[str, Any]) -> dict[str, Any]:
    if seconds := before.get("parts", {}).get("sampling"):
        tokens = case.spec.batch_size * case.spec.max_new_tokens if case.spec else 0
        return {**before, "sampled_tokens_s": tokens / seconds}
    return before


def off_by(predicted: float, measured: float) -> float:
    """Return how far a prediction is off, as a share of the measured number."""
    return abs(predicted / measured - 1)


def failures(cases: Sequence[Case], results: Results) -> list[str]:
    """List the checks of correctness that failed: the cause, or the difference."""
    found = []
    for case in (c for c in cases if c.part == CORRECTNESS):
        result = results.get(case.name)
        if result is None:
            continue
        if "failed" in result:
            found.append(f"{case.name}: {result['failed']}")
        elif not result["difference"] <= result["bound"]:
            found.append(
                f"{case.name}: a difference of {result['difference']:.2g}, where "
                f"{result['bound']:.2g} is allowed"
            )
    return found


# ---------------------------------------------------------------- the page


def page(
    cases: Sequence[Case],
    predicted: Mapping[str, Any],
    results: Results,
    answer: Mapping[str, Any] | None,
    measured: Hardware | None,
) -> str:
    """Return the page as Markdown.

    `predicted`: see `cases.predictions`; empty before they were made. `answer`: the result of the
    last part. `measured`: the machine with measured constants.
    """
    node = results.get("node")
    if node is None or "failed" in node:
        return f"# Check of a GPU\n\nPart 1 failed: {(node or {}).get('failed', 'not run')}\n"
    compared = comparisons(cases, predicted.get("cases", {}), results)
    blocks = [
        f"# Check of {node['name']}",
        _summary(cases, predicted, results, compared, measured, answer),
        "## The card",
        _table(_card(node, predicted)),
        "## Correctness",
        _table(_correctness(cases, results)),
    ]
    titles = {SPEED: "Speed", PACKS: "Packs", LOOP: "Rows, compiling and sampling"}
    for part, title in titles.items():
        rows = _speeds([c for c in cases if c.part == part], predicted, results, node)
        if len(rows) > 1:
            blocks += [f"## {title}", _table(rows)]
    if answer:
        blocks += ["## A sweep on this machine", _table(_answer(answer))]
    left = [c for c in cases if c.name not in results]
    left_out = [(c, r) for c in cases if (r := results.get(c.name)) and "misfit" in r]
    failed = [(c, r) for c in cases if (r := results.get(c.name)) and "failed" in r]
    lines = [f"- {c.part}, {c.name}: {r['misfit']}" for c, r in left_out]
    lines += [f"- {c.part}, {c.name}: failed: {r['failed']}" for c, r in failed]
    lines += [f"- {c.part}, {c.name}: the same command measures it" for c in left]
    if lines:
        blocks += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def _summary(
    cases: Sequence[Case],
    predicted: Mapping[str, Any],
    results: Results,
    compared: Sequence[tuple[Case, str, float, float]],
    measured: Hardware | None,
    answer: Mapping[str, Any] | None,
) -> str:
    node = results["node"]
    software = ", ".join(f"{k} {v}" for k, v in node["software"].items() if v)
    lines = [f"{node['memory_gib']:.1f} GiB, {software}.", ""]
    if any(c.options.get("small") for c in cases):
        lines += [
            "**This machine has no GPU.** Shapes are shrunken, and the plan's formulas for GPUs "
            "are applied to a processor: the ratios below say nothing about a GPU.",
            "",
        ]
    checks = [c for c in cases if c.part == CORRECTNESS and c.name in results]
    wrong = failures(cases, results)
    lines.append(f"- **Correctness:** {len(checks) - len(wrong)} of {len(checks)} checks passed.")
    lines += [f"  - {text}" for text in wrong]
    for key, label in COMPARED.items():
        pairs = [(p, m) for _, k, p, m in compared if k == key]
        if pairs:
            middle = statistics.median(m / p for p, m in pairs)
            far = sum(off_by(p, m) > WRONG for p, m in pairs)
            lines.append(
                f"- **{label[0].upper()}{label[1:]}:** the median of measured / predicted is "
                f"{middle:.2f}; {far} of {len(pairs)} predictions are off by more than {WRONG:.0%}."
            )
    if measured is not None:
        again = {c.name: predict(c, measured) for c, key, _, _ in compared if key == "step_s"}
        ratios = [
            m / again[c.name]["step_s"]
            for c, k, _, m in compared
            if k == "step_s" and "step_s" in again[c.name]
        ]
        if ratios:
            lines.append(
                f"- **With the measured constants** the median of the seconds is "
                f"{statistics.median(ratios):.2f}."
            )
    if answer:
        inside = [c["inside"] for c in answer["claims"] if c["inside"] is not None]
        text = f"{sum(inside)} of {len(inside)} estimates lie in the kept intervals"
        lines.append(f"- **{answer['sweep']}:** {text if inside else 'no kept answer to compare'}.")
    wrong_by = sorted(
        (row for row in compared if off_by(*row[2:]) > WRONG), key=lambda row: -off_by(*row[2:])
    )
    if wrong_by:
        shown = f", the {MOST} worst" if len(wrong_by) > MOST else ""
        lines += ["", f"Wrong by more than {WRONG:.0%}{shown}:", ""]
        rows = [("case", "quantity", "predicted", "measured", "measured / predicted", "mostly")]
        for case, key, before, after in wrong_by[:MOST]:
            parts = predicted["cases"][case.name]["parts"]
            mostly = max(parts, key=lambda name: parts[name]) if key == "step_s" else ""
            numbers = (f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}")
            rows.append((case.name, COMPARED[key], *numbers, mostly))
        lines.append(_table(rows))
    return "\n".join(lines)


def _card(node: Mapping[str, Any], predicted: Mapping[str, Any]) -> list[Sequence[str]]:
    known = predicted.get("hardware", {})
    share = known.get("attainable_share", 1.0)
    rows: list[Sequence[str]] = [("constant", "in the plan", "measured")]
    for p in PRODUCTS:
        planned = known.get("matmul_flops_s", {}).get(p)
        here = node["matmul_flops_s"].get(p)
        rows.append((f"products in {p}, TFLOP/s", _tera(planned and planned * share), _tera(here)))
    attention = node["attention"]
    planned = known.get("attention_flops_s")
    rows.append(("causal attention in bf16, TFLOP/s", _tera(planned), _tera(attention["flops_s"])))
    for name, speed in attention["kernels"].items():
        mark = " (taken)" if name == attention["most_like"] else ""
        rows.append((f"- {name} kernel{mark}", "", _tera(speed) if speed else "refused"))
    bandwidth = known.get("bandwidth_bytes_s")
    rows.append(("bandwidth, TB/s", _tera(bandwidth), _tera(node["bandwidth_bytes_s"])))
    rows.append(("launch of a kernel, us", "6", f"{node['launch_s'] * 1e6:.1f}"))
    return rows


def _correctness(cases: Sequence[Case], results: Results) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("check", "difference", "allowed", "")]
    for case in (c for c in cases if c.part == CORRECTNESS):
        result = results.get(case.name)
        if result and "failed" not in result:
            passed = "passed" if result["difference"] <= result["bound"] else "FAILED"
            numbers = (f"{result['difference']:.2g}", f"{result['bound']:.2g}")
            rows.append((case.name, *numbers, passed))
    return rows


def _speeds(
    cases: Sequence[Case], predicted: Mapping[str, Any], results: Results, node: Mapping[str, Any]
) -> list[Sequence[str]]:
    """Return a row for each measured case; packs are also compared with runs one by one."""
    rows: list[Sequence[str]] = [
        (
            *("case", "rows a pass", "s an update", "planned", "tokens/s", "of the peak"),
            *("GiB", "planned", "one by one / pack"),
        )
    ]
    alone: dict[Any, float] = {}
    for case in cases:
        after, before = results.get(case.name), predicted.get("cases", {}).get(case.name)
        if not after or not before or "step_s" not in after:
            continue
        if case.n_runs == 1:
            alone[case.spec] = after["step_s"]
        peak = node["matmul_flops_s"].get(case.spec.precision) if case.spec else None
        share = before["flops"] / after["step_s"] / peak if peak else None
        one = alone.get(case.spec)
        rate = after.get("sampled_tokens_s") or after["tokens_s"]
        rows.append(
            (
                *(case.name, f"{before['rows']}{', again' if before['checkpointing'] else ''}"),
                *(f"{after['step_s']:.4g}", f"{before['step_s']:.4g}", f"{rate:,.0f}"),
                f"{share:.0%}" if share else "",
                *(f"{after['memory_gib']:.1f}", f"{before['memory_gib']:.1f}"),
                f"{case.n_runs * one / after['step_s']:.2f}" if one and case.n_runs > 1 else "",
            )
        )
    return rows


def _answer(answer: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("claim", "estimate here", "kept", "kept interval", "inside")]
    for claim in answer["claims"]:
        kept = claim["kept"]
        interval = f"{kept['low']:.3g} to {kept['high']:.3g}" if kept else ""
        inside = {True: "yes", False: "NO", None: ""}[claim["inside"]]
        value = "" if claim["value"] is None else f"{claim['value']:.3g}"
        before = f"{kept['value']:.3g}" if kept else ""
        rows.append((claim["claim"], value, before, interval, inside))
    return rows


def _tera(number: float | None) -> str:
    return f"{number / 1e12:.3g}" if number else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
