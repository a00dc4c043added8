"""Question: is LoRA on attention only worse than on the MLP only, and does attention add anything.

Compares, on every task, the step efficiency rho of each layer set, each at its own best rate;
attention and MLP have equal parameters. A verdict over tasks uses the task that is worst for the
claim. Full fine-tuning of the same matrices shows whether the order comes from the location.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.correlation import within_groups
from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import pooled_variance
from analysis.measures.efficiency import log_rho, rho
from analysis.measures.layer_sets import SETS, Arm, Task, equal_pair, log_ratio, ratio_of, tasks_of
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
    gates_on,
    judge_claims,
)
from analysis.questions.qualify import stalled
from analysis.runs.lr_curves import title

ESTIMANDS = ("attention_over_mlp", "mlp_over_both", "trace_correlation")
LOG_ESTIMANDS = ()
"""The ratios' margins may start at 0, so none is judged as a logarithm."""
UNKNOWN = Estimate(None)


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge attention against MLP, MLP against both, and the correlation with gradient shares."""
    tasks = tasks_of(table)
    group = " and ".join(t.name for t in tasks) if len(tasks) < 3 else f"all {len(tasks)} tasks"
    compared = [_compared(t) for t in tasks]
    each = [v for c in compared if len(tasks) > 1 for v in _of_task(c, question)]
    used = [c for c in compared if c.pair and c.joint]
    found = []
    for pair in PAIRS:
        known = [e for c in used if (e := pair.of(c)).value is not None]
        hardest = pair.hardest(known, key=lambda e: e.value, default=UNKNOWN)
        gates = [g for c in compared for g in c.named(_gates(c, pair.optima(c), pair.of(c)))]
        rests = [o for c in used for o in pair.optima(c)]
        for v in _judged(question, pair.estimand, hardest, gates, group, rests):
            found.append(_by_task(v, [w for w in each if w.claim == v.claim]))
    rests = distinct(o for c in used for o in (*c.of_pair(), *c.of_joint()))
    trace, gates = _trace(used), []
    if trace.value is None:
        gates = [
            Gate(GateCode.TASK, f"{trace.n} layer sets over all tasks are too few to correlate")
        ]
    for c in compared:
        gates += c.named(_gates(c, [*c.of_pair(), *c.of_joint()], c.worse, c.both))
    found += _judged(question, "trace_correlation", trace, gates, group, rests)
    order = list(question["claims"])
    found = sorted(found, key=lambda v: order.index(v.claim)) + each
    panels = [_panel(t) for t in tasks]
    caption = "step efficiency by layer set and task"
    figure = Section("Layer sets", figure="layers.png", panels=panels, caption=caption)
    measures = {
        "attention_over_mlp": {c.task.name: c.worse.plain() for c in used},
        "mlp_over_both": {c.task.name: c.both.plain() for c in used},
        "gradient_share": {t.name: {a.layers: a.share for a in t.lora} for t in tasks},
    }
    optima = [a.optimum for t in tasks for a in t.arms]
    sections = [_over_tasks(used), *(_arms(t) for t in tasks), figure]
    return Analysis(optima, correct(found, question), sections, measures, {group: rests})


@dataclass(frozen=True)
class _Compared:
    """One task's comparisons: attention and MLP at equal parameters, MLP and both at equal rank."""

    task: Task
    pair: tuple[Arm, Arm] | None
    joint: tuple[Arm, Arm] | None
    """MLP, and attention+MLP of its rank."""
    worse: Estimate = UNKNOWN
    """rho of attention over rho of the MLP."""
    both: Estimate = UNKNOWN
    """rho of the MLP over rho of attention+MLP."""

    def of_pair(self) -> list[Optimum]:
        """Return the optima from which `worse` is computed."""
        return [a.optimum for a in (self.task.full, *self.pair)] if self.pair else []

    def of_joint(self) -> list[Optimum]:
        """Return the optima from which `both` is computed."""
        return [a.optimum for a in (self.task.full, *self.joint)] if self.joint else []

    def named(self, gates: list[Gate]) -> list[Gate]:
        """Return the gates with the task's name before their sentences."""
        return [gate.at(f"{self.task.name}: ") for gate in gates]


@dataclass(frozen=True)
class _Pair:
    """A claim about two layer sets, judged over tasks."""

    estimand: str
    of: Callable[[_Compared], Estimate]
    optima: Callable[[_Compared], list[Optimum]]
    hardest: Callable[..., Estimate]
    """`max` or `min`: picks the estimate that is worst for the claim."""


PAIRS = (
    _Pair("attention_over_mlp", lambda c: c.worse, _Compared.of_pair, max),
    _Pair("mlp_over_both", lambda c: c.both, _Compared.of_joint, min),
)


def _compared(task: Task) -> _Compared:
    """Compare a task's layer sets.

    The variance over seeds is pooled over this task's ratios only: tasks differ in noise.
    """
    pair, both = equal_pair(task), task.get("attention+mlp")
    mlp = task.get("mlp", both.rank) if both else None
    if task.full is None or pair is None or mlp is None:
        return _Compared(task, None, None)
    logs = [log_ratio(*arms, task.full) for arms in (pair, (mlp, both))]
    pooled = pooled_variance([list(v.best.values()) for v in logs])
    return _Compared(task, pair, (mlp, both), *(ratio_of(v, pooled) for v in logs))


def _speed(a: Arm, t: Task) -> Estimate:
    """Return rho of an arm; its variance over seeds is at least that pooled over all arms."""
    pooled = pooled_variance(
        [list(log_rho(b.points, t.full.points).best.values()) for b in (*t.lora, *t.restricted)]
    )
    return rho(a.points, t.full.points, pooled)


def _gates(c: _Compared, used: Sequence[Optimum], *measured: Estimate) -> list[Gate]:
    """List the gates of a measurement on these optima."""
    if not used:
        arms = "attention and mlp at equal parameters, or of attention+mlp at mlp's rank"
        return [Gate(GateCode.MISSING, arms)]
    gates = [*stalled([c.task.full.optimum], [c.task.full.points.best]), *gates_on(used)]
    if not gates and any(e.value is None for e in measured):
        gates.append(Gate(GateCode.ONLY_BOUNDS))
    return gates


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


def _of_task(c: _Compared, question: dict[str, Any]) -> list[Verdict]:
    """Judge one task alone, as secondary claims: the primary claim is about all tasks."""
    claims = {k: {**v, "primary": False} for k, v in question["claims"].items()}
    secondary = {**question, "claims": claims}
    found = []
    for pair in PAIRS:
        e, used = pair.of(c), pair.optima(c)
        gates = _gates(c, used, e)
        found += _judged(secondary, pair.estimand, e, gates, c.task.name, used)
    return found


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


def _trace(compared: Sequence[_Compared]) -> Estimate:
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


def _over_tasks(compared: Sequence[_Compared]) -> Section:
    rows = [
        [
            "task",
            "rho attention / rho mlp, equal parameters [95%]",
            "rho mlp / rho attention+mlp, equal rank [95%]",
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
        rows.append([c.task.name, with_interval(c.worse), with_interval(c.both), same])
    text = "A verdict over all tasks uses the task that is worst for the claim."
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
