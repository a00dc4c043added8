"""The page of action=check_gpu, and the hardware file with the measured constants."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lorasweep.check.cases import CORRECTNESS, LOOP, PACKS, SPEED, Case, predict
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.time import LAUNCH_S

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
    for case in (c for c in cases if not c.options):
        before, after = predicted.get(case.name, {}), results.get(case.name, {})
        both = [key for key in COMPARED if before.get(key) and after.get(key)]
        found += [(case, key, before[key], after[key]) for key in both]
    return found


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
    node = results.get("node", {"failed": "it was not run"})
    if "failed" in node:
        return f"# Check of a GPU\n\nPart 1 failed: {node['failed']}\n"
    plans = predicted.get("cases", {})
    compared = comparisons(cases, plans, results)
    blocks = [f"# Check of {node['name']}", _summary(cases, results)]
    blocks.append("\n".join(_accuracy(compared, measured) + _answer(answer)))
    wrong = [row for row in compared if abs(row[2] / row[3] - 1) > WRONG]
    if wrong:
        wrong.sort(key=lambda row: -abs(math.log(row[3] / row[2])))
        shown = f", the {MOST} worst" if len(wrong) > MOST else ""
        blocks.append(f"Wrong by more than {WRONG:.0%}{shown}:")
        rows = [("case", "quantity", "predicted", "measured", "measured / predicted", "mostly")]
        for case, key, before, after in wrong[:MOST]:
            parts = plans[case.name]["parts"]
            mostly = max(parts, key=lambda name: parts[name]) if key == "step_s" else ""
            numbers = (f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}")
            rows.append((case.name, COMPARED[key], *numbers, mostly))
        blocks.append(_table(rows))
    blocks += ["## The card", _table(_card(node, predicted.get("hardware", {})))]
    checked = [r for c in cases if c.part == CORRECTNESS and "bound" in (r := _named(c, results))]
    head = ("check", "difference", "allowed")
    blocks += ["## Correctness", _table([head, *map(_check, checked)])]
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


def _named(case: Case, results: Results) -> dict[str, Any]:
    return {"name": case.name, **results.get(case.name, {})}


def _check(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (result["name"], f"{result['difference']:.2g}", f"{result['bound']:.2g}")


def _summary(cases: Sequence[Case], results: Results) -> str:
    node = results["node"]
    software = ", ".join(f"{k} {v}" for k, v in node["software"].items() if v)
    lines = [f"{node['memory_gib']:.1f} GiB, {software}.", ""]
    if any(c.options.get("small") for c in cases):
        text = "Shapes are shrunken, and the plan's formulas for GPUs are applied to a processor"
        lines += [f"**This machine has no GPU.** {text}: the ratios say nothing about a GPU.", ""]
    wrong = failures(cases, results)
    checks = sum(c.part == CORRECTNESS and c.name in results for c in cases)
    lines.append(f"- **Correctness:** {checks - len(wrong)} of {checks} checks passed.")
    return "\n".join([*lines, *(f"  - {text}" for text in wrong)])


def _accuracy(
    compared: Sequence[tuple[Case, str, float, float]], measured: Hardware | None
) -> list[str]:
    """Return a line for each quantity, and one for the seconds with the measured constants."""
    lines = []
    for key, label in COMPARED.items():
        ratios = [after / before for _, k, before, after in compared if k == key]
        if ratios:
            far = sum(abs(1 / ratio - 1) > WRONG for ratio in ratios)
            lines.append(
                f"- **{label[0].upper()}{label[1:]}:** the median of measured / predicted is "
                f"{statistics.median(ratios):.2f}; {far} of {len(ratios)} predictions are off by "
                f"more than {WRONG:.0%}."
            )
    if measured is not None:
        timed = [(predict(c, measured), after) for c, k, _, after in compared if k == "step_s"]
        ratios = [after / again["step_s"] for again, after in timed if "step_s" in again]
        if ratios:
            middle = statistics.median(ratios)
            lines.append(
                f"- **With the measured constants** the median of seconds is {middle:.2f}."
            )
    return lines


def _answer(answer: Mapping[str, Any] | None) -> list[str]:
    lines = []
    for claim in answer["claims"] if answer else ():
        here = "no estimate" if claim["value"] is None else f"{claim['value']:.3g}"
        kept = "no kept answer"
        if claim["kept"]:
            inside = "" if claim["inside"] else ", **outside**"
            kept = "kept {value:.3g} [{low:.3g}, {high:.3g}]".format(**claim["kept"]) + inside
        lines.append(f"  - {claim['claim']}: {here}; {kept}")
    return [f"- **{answer['sweep']} on this machine:**", *lines] if answer else []


def _card(node: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    speeds, attention = plan.get("matmul_flops_s", {}), node["attention"]
    share = plan.get("attainable_share", 1.0)
    rows = [("constant", "in the plan", "measured")]
    rows += [
        (f"products in {p}, TFLOP/s", _tera(speeds.get(p), share), _tera(found))
        for p, found in node["matmul_flops_s"].items()
    ]
    known, found = plan.get("attention_flops_s"), attention["flops_s"]
    rows.append(("causal attention in bf16, TFLOP/s", _tera(known), _tera(found)))
    for name, speed in attention["kernels"].items():
        taken = " (taken)" if name == attention["most_like"] else ""
        rows.append((f"- {name} kernel{taken}", "", _tera(speed)))
    bandwidth = plan.get("bandwidth_bytes_s")
    rows.append(("bandwidth, TB/s", _tera(bandwidth), _tera(node["bandwidth_bytes_s"])))
    launch = (f"{LAUNCH_S * 1e6:.1f}", f"{node['launch_s'] * 1e6:.1f}")
    return [*rows, ("launch of a kernel, microseconds", *launch)]


def _speeds(
    cases: Sequence[Case], plans: Results, results: Results, node: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Return a row for each measured case; packs are compared with runs one by one, too."""
    rows: list[tuple[str, ...]] = [
        (
            *("case", "rows per pass", "s an update", "planned", "tokens/s", "share of the peak"),
            *("GiB", "planned", "one by one / pack"),
        )
    ]
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


def _tera(number: float | None, share: float = 1.0) -> str:
    return f"{number * share / 1e12:.3g}" if number else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    head, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])
