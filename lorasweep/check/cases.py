"""The cases of action=check_gpu by part, the plan's predictions, their measurement, and the page.

Cases are measured in a process of their own. If it dies, that case has failed, and another process
goes on with the next one. Results are kept one by one.
"""

import json
import math
import os
import re
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from lorasweep.launch.process import die_with_parent, keep_freed_memory, worker_environment
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import LAUNCH_S, train_flops
from lorasweep.plan.planner import place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files

NODE, CORRECTNESS, SPEED, PACKS, LOOP = "node", "correctness", "speed", "packs", "loop"
MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b")
"""Shapes whose speed is measured, with random weights."""
PACKED = ("llama-3.2-1b", "llama-3.1-8b")
LIMIT_S, LAST_S = 2700.0, 60.0
"""Seconds after which no case begins (the next command measures the cases that are left), and how
much longer the last case may take."""
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


@dataclass(frozen=True)
class Case:
    """One measurement."""

    part: str
    name: str
    measure: str
    """Function of lorasweep.check.measures."""
    spec: RunSpec | None = None
    n_runs: int = 1


def shrink(model: ModelSpec) -> ModelSpec:
    """Return the same architecture with two narrow layers."""
    values: dict[str, Any] = {"hidden_size": 64, "mlp_size": 128, "n_layers": 2, "vocab_size": 512}
    values |= {"n_heads": 4, "n_kv_heads": 2, "head_size": 16}
    if model.n_experts:
        values |= {"n_experts": 4, "n_active_experts": 2}
    return replace(model, **values)


def cases_of(
    models: Mapping[str, Callable[[], ModelSpec]], small: RunSpec, on_gpu: bool, precision: str
) -> list[Case]:
    """List the cases of all parts; without a GPU they have shrunken shapes.

    Args:
        models: the shapes, by name.
        small: a run on a shipped base, for the part `correctness`.
        precision: of the cases of speed.
    """
    # tokens and rows of an update, the same in packs, runs of a pack, completions and their tokens
    length, rows, short, pack_rows, pack_sizes, completions, new_tokens = (
        (1024, 32, 256, (1, 8, 32), (1, 2, 4, 8, 16), 256, 128)
        if on_gpu
        else (32, 4, 16, (1, 4), (1, 4), 8, 4)
    )

    def run(name: str, method: Method, batch_size: int, length: int, **more: Any) -> RunSpec:
        model = models[name]() if on_gpu else shrink(models[name]())
        sizes: dict[str, Any] = {"max_length": length, "n_test": 1, "n_test_curve": 0}
        # its rows are drawn by lorasweep.check.measures
        dataset = DatasetSpec("random_tokens", "synthetic", "bandit", format="tokens", **sizes)
        more |= {"batch_size": batch_size, "precision": precision}
        return RunSpec(model, dataset, method, lr=1e-6, **more)  # changes nothing

    lora, full, small = LoRA(rank=32), FullFT(), replace(small, method=LoRA(rank=4))
    cases = [Case(NODE, "node", "node")]
    for method in (small.method, full):
        text = f"one update of {method.name} in fp64, against the CPU"
        spec = replace(small, method=method)
        cases.append(Case(CORRECTNESS, text, "update_as_on_cpu", spec))
    for p in ("fp64", "fp32", "bf16"):
        spec = replace(small, precision=p)
        cases.append(Case(CORRECTNESS, f"a pack in {p}, against its runs", "pack", spec))
    cases.append(Case(CORRECTNESS, "little memory", "little_memory", small))
    for name in MODELS:
        for method in (lora, full):
            spec = run(name, method, rows, length)
            cases.append(Case(SPEED, f"{name} {method.name}", "step", spec))
    for name in PACKED:
        for few in pack_rows:
            spec = run(name, lora, few, short)
            cases += [Case(PACKS, f"{name} {few} rows x {n}", "step", spec, n) for n in pack_sizes]
    name = PACKED[0]
    rl: dict[str, Any] = {"objective": "policy_gradient", "group_size": 4}
    spec = run(name, lora, completions, 2 * new_tokens, max_new_tokens=new_tokens, **rl)
    return [*cases, Case(LOOP, f"{name} sampling", "step", spec)]


def predictions(cases: list[Case], hardware: Hardware) -> dict[str, Any]:
    """Return what the plan expects of the cases of speed on one GPU, by name under `cases`.

    Keys of each: rows (of a forward pass), checkpointing, step_s, tokens_s, memory_gib, flops (of
    an update), sampled_tokens_s, parts (seconds by component); or only misfit: why it does not fit.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        if case.part not in (SPEED, PACKS, LOOP):
            continue
        spec = case.spec
        assert spec is not None
        placed = place(spec, hardware, case.n_runs, checkpointing=(False, True))
        if placed.why:
            found[case.name] = {"misfit": placed.why}
            continue
        found[case.name] = {
            "rows": placed.layout.rows,
            "checkpointing": placed.layout.checkpointing,
            "step_s": placed.step_s,
            "tokens_s": placed.tokens / spec.steps / placed.step_s,
            "memory_gib": placed.memory_gib,
            "flops": case.n_runs * train_flops(spec) / spec.steps,
            "parts": placed.step,
        }
        if seconds := placed.step.get("sampling"):
            tokens = case.n_runs * spec.batch_size * spec.max_new_tokens
            found[case.name]["sampled_tokens_s"] = tokens / seconds
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"written": written, "hardware": asdict(hardware), "cases": found}


def path_of(folder: Path, case: Case) -> Path:
    """Return the file of a case's result: its measures, {"misfit": why} or {"failed": cause}."""
    name = re.sub(r"[^a-z0-9.]+", "_", f"{case.part} {case.name}".lower())
    return folder / "cases" / f"{name}.json"


def measure(
    cases: Sequence[Case],
    folder: Path,
    threads: int,
    predicted: Mapping[str, Any],
    report: Callable[[Case, dict[str, Any]], None],
    limit_s: float = LIMIT_S,
) -> None:
    """Measure the cases that have no result, or that failed; keep and report each."""
    until, alone = time.monotonic() + limit_s, (1, get_context("spawn"), _begin, (folder, threads))
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    pool: ProcessPoolExecutor | None = None
    for case in cases:
        path, before = path_of(folder, case), predicted.get(case.name, {})
        known, left_s = files.read_json(path), until - time.monotonic()
        if "misfit" in before:
            result = {"misfit": before["misfit"]}
        elif (known is not None and "failed" not in known) or left_s <= 0:
            continue
        else:
            pool = pool or ProcessPoolExecutor(*alone)
            try:
                result = pool.submit(_measured, case, before, left_s + LAST_S).result()
            except BrokenProcessPool:
                late = f"or it took more than {LAST_S:.0f} s beyond the time of all cases"
                result = {"failed": f"its process died (see log.txt), {late}"}
            if "failed" in result:  # the next case gets another process
                pool.shutdown()
                pool = None
        files.write_atomic(path, json.dumps(result).encode())
        report(case, result)
    if pool:
        pool.shutdown()


_kept: dict[str, Any] = {}
"""In the process of the cases: the base of a case, which may serve for the next one."""


def _begin(folder: Path, threads: int) -> None:
    """Begin the process of the cases; what libraries print goes into log.txt."""
    die_with_parent()
    keep_freed_memory()
    os.environ.update(worker_environment(threads))
    with (folder / "log.txt").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def _measured(case: Case, predicted: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Measure a case; after so many seconds the alarm ends the process, whatever it does."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    arguments: dict[str, Any] = {"spec": case.spec} if case.spec else {}
    started = time.monotonic()
    if predicted:
        arguments |= {"kept": _kept, "n_runs": case.n_runs, "predicted": predicted}
    try:
        from lorasweep.check import measures  # after the environment is set: it imports torch

        result = getattr(measures, case.measure)(**arguments)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {**result, "seconds": round(time.monotonic() - started, 1)}


# ---------------------------------------------------------------- the page


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
    plain = asdict(Hardware())
    values = {k: v for k, v in asdict(hardware).items() if v != plain[k]}
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
    """Return the page as Markdown; `predicted`: see `predictions`, empty before part 1."""
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
