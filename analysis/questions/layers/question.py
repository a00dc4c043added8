"""Question: is LoRA on attention only worse than on the MLP only, and does attention add anything.

Compares, on every task, the step efficiency rho of each layer set and its loss at the end, each at
its own best rate; attention and MLP have equal parameters. Every task has its verdicts; claims
about all tasks stand beside them. Full fine-tuning of the same matrices shows whether the order
comes from the location.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.correlation import within_groups
from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import pooled_variance
from analysis.measures.efficiency import log_rho, rho
from analysis.measures.layer_sets import SETS, Arm, Task, tasks_of
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    claims_about,
    correct,
    distinct,
    fewest_seeds,
    judge_claims,
)
from analysis.questions.layers.compared import OF_TASK, UNKNOWN, Compared, compared_on
from analysis.runs.lr_curves import title

EVERYWHERE = {
    "attention_everywhere": ("attention_over_mlp", max),
    "mlp_everywhere": ("mlp_over_both", min),
}
"""Estimands over all tasks: which one of a task, and what picks the task worst for the claim."""
ESTIMANDS = (*OF_TASK, *EVERYWHERE, "trace_correlation")
LOG_ESTIMANDS = ()
"""The ratios' margins may start at 0, so none is judged as a logarithm."""


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the layer sets on every task and over all, and the correlation with the gradient."""
    tasks = tasks_of(table)
    group = " and ".join(t.name for t in tasks) if len(tasks) < 3 else f"all {len(tasks)} tasks"
    compared = [compared_on(t) for t in tasks]
    used = [c for c in compared if c.pair and c.joint]
    found: list[Verdict] = []
    for estimand in dict.fromkeys(c["estimand"] for c in question["claims"].values()):
        if estimand in EVERYWHERE:
            found += _everywhere(estimand, compared, question, group)
        elif estimand in OF_TASK:
            found += [v for c in compared for v in _of_task(estimand, c, question)]
        else:
            found += _judged(question, estimand, *_traced(compared), group, _rests(used))
    panels = [_panel(t) for t in tasks]
    caption = "step efficiency by layer set and task"
    figure = Section("Layer sets", figure="layers.png", panels=panels, caption=caption)
    measures = {
        "attention_over_mlp": {c.task.name: c.worse.plain() for c in used},
        "mlp_over_both": {c.task.name: c.both.plain() for c in used},
        "ranks": {
            c.task.name: {a.layers: a.rank for a in c.pair} for c in used if c.pair is not None
        },
        "gradient_share": {t.name: {a.layers: a.share for a in t.lora} for t in tasks},
    }
    optima = [a.optimum for t in tasks for a in t.arms]
    members = {c.task.name: c.optima for c in compared} | {group: _rests(used)}
    sections = [_over_tasks(used), *(_arms(t) for t in tasks), figure]
    return Analysis(optima, correct(found, question), sections, measures, members)


def _rests(used: Sequence[Compared]) -> list[Optimum]:
    return distinct(o for c in used for o in c.optima)


def _judged(
    question: dict[str, Any],
    estimand: str,
    e: Estimate,
    gates: list[Gate],
    group: str,
    rests: Sequence[Optimum],
) -> list[Verdict]:
    """Judge the claims about one estimand, given the optima on which it rests."""
    return judge_claims(
        claims_about(question, estimand), {estimand: (e, gates)}, (), group, fewest_seeds(rests)
    )


def _of_task(estimand: str, c: Compared, question: dict[str, Any]) -> list[Verdict]:
    """Judge the claims about one estimand on one task."""
    e, gates = c.measured(estimand)
    return _judged(question, estimand, e, gates, c.task.name, c.rests(estimand))


def _everywhere(
    estimand: str, compared: Sequence[Compared], question: dict[str, Any], group: str
) -> list[Verdict]:
    """Judge the claims about all tasks, by the task that is worst for them."""
    of_task, hardest = EVERYWHERE[estimand]
    measured = [(c, *c.measured(of_task)) for c in compared]
    known = [e for _, e, _ in measured if e.value is not None]
    worst = hardest(known, key=lambda e: e.value, default=UNKNOWN)
    gates = [g for c, _, closed in measured for g in c.named(closed)]
    rests = distinct(o for c in compared for o in c.rests(of_task))
    asked = claims_about(question, estimand)
    each = {**asked, "claims": {k: {**v, "estimand": of_task} for k, v in asked["claims"].items()}}
    by_task = [v for c in compared for v in _of_task(of_task, c, each)]
    return [
        _by_task(v, [w for w in by_task if w.claim == v.claim])
        for v in _judged(question, estimand, worst, gates, group, rests)
    ]


def _by_task(v: Verdict, each: Sequence[Verdict]) -> Verdict:
    """Adjust a verdict over all tasks by the tasks' own verdicts.

    It is SUPPORTED only if each task's is. If the tasks disagree, the reason lists their outcomes.
    """
    outcomes = sorted(w.outcome for w in each)
    split = {"SUPPORTED", "REFUTED"} <= set(outcomes)
    if not each or len(set(outcomes)) == 1 or (v.outcome == "UNDECIDED" and not split):
        return v
    counts = ", ".join(f"{o} on {outcomes.count(o)}" for o in sorted(set(outcomes)))
    gate = Gate(GateCode.BY_TASK, counts)
    outcome = "UNDECIDED" if v.outcome == "SUPPORTED" else v.outcome
    why = f"{gate.sentence}; {v.why}"
    return dataclasses.replace(v, why=why, outcome=outcome, gates=(gate, *v.gates))


def _traced(compared: Sequence[Compared]) -> tuple[Estimate, list[Gate]]:
    """Return the correlation over tasks and what forbids a verdict about it."""
    trace, gates = _trace([c for c in compared if c.pair and c.joint]), []
    if trace.value is None:
        gates = [
            Gate(GateCode.TASK, f"{trace.n} layer sets over all tasks are too few to correlate")
        ]
    for c in compared:
        if c.optima:
            gates += c.named(c.gates(c.optima, c.worse, c.both))
        else:
            gates += c.named(c.measured("mlp_over_both")[1])
    return trace, gates


def _trace(compared: Sequence[Compared]) -> Estimate:
    """Return the rank correlation of ln(rho) with ln(gradient share), within tasks."""
    tasks = []
    for c in compared:
        arms = [a for a in (*c.pair, c.joint[1]) if a.share]
        speeds = [_mean_log(log_rho(a.points, c.task.full.points).best) for a in arms]
        tasks.append([(math.log(a.share), v) for a, v in zip(arms, speeds) if v is not None])
    return within_groups(tasks, "layer sets over all tasks")


def _mean_log(logs: dict[int, float]) -> float | None:
    known = [v for v in logs.values() if math.isfinite(v)]
    return float(np.mean(known)) if known and len(known) == len(logs) else None


def _speed(a: Arm, t: Task) -> Estimate:
    """Return rho of an arm; its variance over seeds is at least that pooled over all arms."""
    pooled = pooled_variance(
        [list(log_rho(b.points, t.full.points).best.values()) for b in (*t.lora, *t.restricted)]
    )
    return rho(a.points, t.full.points, pooled)


def _over_tasks(compared: Sequence[Compared]) -> Section:
    rows = [
        [
            "task",
            "rho attention / rho mlp, equal parameters [95%]",
            "rho mlp / rho attention+mlp, equal rank [95%]",
            "attention's loss less mlp's, % of FullFT's gain [95%]",
            "mlp's loss less attention+mlp's, % [95%]",
            "the same order under full fine-tuning of the matrices",
        ]
    ]
    for c in compared:
        nll = {a.layers: a.nll for a in c.task.restricted}
        attention, mlp, same = nll.get("attention"), nll.get("mlp"), "-"
        if attention is not None and mlp is not None and c.worse.value is not None:
            gap = attention - mlp
            agrees = "yes" if (gap > 0) == (c.worse.value < 1) else "no"
            same = f"{agrees}: attention {signed(gap)} nats against mlp"
        percents = [with_interval(g.percent()) for g in c.gaps]
        ratios = [with_interval(c.worse), with_interval(c.both)]
        rows.append([c.task.name, *ratios, *percents, same])
    text = "A claim about all tasks is judged by the task that is worst for it."
    return Section("Over the tasks", rows, [text])


ARMS = (
    "arm",
    "trained parameters",
    "rho [95%]",
    "best NLL",
    "gap to FullFT (nats)",
    "share of the squared gradient",
)


def _arms(t: Task) -> Section:
    rows = [list(ARMS)]
    for a in t.arms:
        speed, gap = "-", None
        if t.full is not None and a is not t.full:
            speed = with_interval(_speed(a, t))
            gap = None if a.nll is None or t.full.nll is None else a.nll - t.full.nll
        n, share = f"{a.n_trainable:,}", number(a.share)
        rows.append([_name(a, t), n, speed, number(a.nll, 5), signed(gap), share])
    return Section(t.name, rows)


def _name(a: Arm, t: Task) -> str:
    if a is t.full:
        return "full fine-tuning"
    return f"FullFT of {a.layers}" if a.rank is None else f"LoRA r{a.rank} on {a.layers}"


def _panel(t: Task) -> Panel:
    here = [s for s in SETS if any(a.layers == s for a in (*t.lora, *t.restricted))]
    order = {s: k for k, s in enumerate(here)}
    kinds = {
        "LoRA, rank raised to the MLP's parameters": _by_rank(t, True),
        "LoRA, one rank": _by_rank(t, False),
        "FullFT of the same matrices": t.restricted,
    }
    series = []
    for side, (label, arms) in enumerate(kinds.items()):
        shown = [(order[a.layers], _speed(a, t)) for a in arms if a.layers in order and t.full]
        shown = sorted(shown, key=lambda x: x[0])
        apart = 0.16 * (side - 1)  # so that intervals do not cover each other
        x, speeds = [k + apart for k, _ in shown], [e for _, e in shown]
        series.append(Series.of(label, x, speeds, style="o"))
    short = [
        s.replace("attention", "attn").replace("unembedding", "head").replace("+", "\n+")
        for s in here
    ]
    return Panel(
        title(t.arms[0].optimum.curve).replace(" on ", " on\n", 1),
        "layer set",
        "rho: FullFT's updates / the arm's",
        series,
        log_y=True,
        ticks=[(float(k), s) for k, s in enumerate(short)],
        lines={"full fine-tuning": 1.0},
    )


def _by_rank(t: Task, high: bool) -> list[Arm]:
    top = {s: max(a.rank for a in t.lora if a.layers == s) for s in {a.layers for a in t.lora}}
    low = min((a.rank for a in t.lora), default=0)
    return [a for a in t.lora if (a.rank == top[a.layers] and a.rank > low) == high]
