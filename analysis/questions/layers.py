"""Is LoRA on attention alone worse than on the MLP alone, at equal parameters, and does attention
add anything?

Step efficiency rho of each layer set against full fine-tuning of everything, each at its own best
rate, on every task; a verdict over tasks takes the one that is hardest on the claim. Full
fine-tuning of the same matrices stands beside it: where that shows the same order, the location and
not the parametrisation makes it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.inference.estimate import Estimate, Verdict, exp_of, number, signed, with_interval
from analysis.inference.seeds import PooledVariance, pooled_variance
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.efficiency import log_rho, rho
from analysis.measures.layer_sets import SETS, Arm, Task, equal_pair, tasks_of
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    claims_about,
    correct,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.questions.qualify import stalled

ESTIMANDS = ("attention_over_mlp", "mlp_over_both", "trace_correlation")
LOG_ESTIMANDS = ()
"""The ratios' margins may start at 0, so none is judged as a logarithm."""


def log_ratio(a: Arm, b: Arm, full: Arm) -> AtBest[float]:
    """Return ln of rho of a over rho of b, by seed; infinite or NaN where full fine-tuning does not
    get to one of them."""
    return log_rho(a.points, full.points).paired(log_rho(b.points, full.points), lambda x, y: x - y)


def ratio_of(logs: AtBest[float], pooled: PooledVariance | None = None) -> Estimate:
    """Return the ratio, with its interval over seeds and likely best rates; none where a seed has
    only a bound."""
    known = bool(logs.best) and all(map(math.isfinite, logs.best.values()))
    return exp_of(over_seeds(logs, pooled)) if known else Estimate(None, n=len(logs.best))


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge attention against MLP, MLP against both, and whether the gradient's shares tell: over
    all tasks, by the one that is hardest on the claim, and the first two for each task as well."""
    tasks = tasks_of(table)
    group = " and ".join(t.name for t in tasks) if len(tasks) < 3 else f"all {len(tasks)} tasks"
    told = [_compared(t) for t in tasks]
    each = [v for c in told if len(tasks) > 1 for v in _of_task(c, question)]
    used = [c for c in told if c.pair and c.joint]
    worse, both = [(c.task, c.worse) for c in used], [(c.task, c.both) for c in used]
    optima = [
        a.optimum for t in tasks for a in (*([t.full] if t.full else []), *t.restricted, *t.lora)
    ]
    hardest = max(
        (e for _, e in worse if e.value is not None), key=lambda e: e.value, default=Estimate(None)
    )
    lowest = min(
        (e for _, e in both if e.value is not None), key=lambda e: e.value, default=Estimate(None)
    )
    found: list[Verdict] = []
    for estimand, e, pick, of in (
        ("attention_over_mlp", hardest, _Compared.of_pair, lambda c: c.worse),
        ("mlp_over_both", lowest, _Compared.of_joint, lambda c: c.both),
    ):
        gates = [f"{c.task.name}: {g}" for c in told for g in _gates(c, pick(c), of(c))]
        found += [
            _by_task(v, [w for w in each if w.claim == v.claim])
            for v in _judged(
                question, estimand, e, gates, group, [o for c in used for o in pick(c)]
            )
        ]
    trace = _trace(used)
    few = (
        []
        if trace.n >= FEWEST
        else [f"task: {trace.n} layer sets over all tasks, a correlation needs {FEWEST}"]
    )
    rests = list({id(o): o for c in used for o in (*c.of_pair(), *c.of_joint())}.values())
    found += _judged(
        question,
        "trace_correlation",
        trace,
        few
        + [
            f"{c.task.name}: {g}"
            for c in told
            for g in _gates(c, [*c.of_pair(), *c.of_joint()], c.worse, c.both)
        ],
        group,
        rests,
    )
    order = list(question["claims"])
    found = sorted(found, key=lambda v: order.index(v.claim)) + each
    sections = [
        _over_tasks(worse, both),
        *(_arms(t) for t in tasks),
        Section(
            "Layer sets",
            figure="layers.png",
            panels=[_panel(t, t is tasks[-1]) for t in tasks],
            caption="step efficiency by layer set and task",
        ),
    ]
    measures = {
        "attention_over_mlp": {t.name: e.plain() for t, e in worse},
        "mlp_over_both": {t.name: e.plain() for t, e in both},
        "gradient_share": {t.name: {a.layers: a.share for a in t.lora} for t in tasks},
    }
    return Analysis(optima, correct(found, question), sections, measures, {group: rests})


FEWEST = 5
"""Layer sets over all tasks below which no correlation is told."""


UNKNOWN = Estimate(None)


@dataclass(frozen=True)
class _Compared:
    """What one task says: attention and MLP at equal parameters, MLP and both at equal rank."""

    task: Task
    pair: tuple[Arm, Arm] | None
    joint: tuple[Arm, Arm] | None
    """MLP, and attention+MLP of its rank."""
    worse: Estimate = UNKNOWN
    """rho of attention over rho of the MLP."""
    both: Estimate = UNKNOWN
    """rho of the MLP over rho of attention+MLP."""

    def of_pair(self) -> list[Optimum]:
        """The optima that `worse` rests on."""
        return [a.optimum for a in (self.task.full, *self.pair)] if self.pair else []

    def of_joint(self) -> list[Optimum]:
        """The optima that `both` rests on."""
        return [a.optimum for a in (self.task.full, *self.joint)] if self.joint else []


def _compared(task: Task) -> _Compared:
    """Compare a task's layer sets. Its own ratios say what spread over seeds is usual; another
    task's noise is another."""
    pair, both = equal_pair(task), task.get("attention+mlp")
    mlp = task.get("mlp", both.rank) if both else None
    if task.full is None or pair is None or mlp is None:
        return _Compared(task, None, None)
    logs = [log_ratio(*arms, task.full) for arms in (pair, (mlp, both))]
    pooled = pooled_variance([list(v.best.values()) for v in logs])
    return _Compared(task, pair, (mlp, both), *(ratio_of(v, pooled) for v in logs))


def _speed(a: Arm, t: Task) -> Estimate:
    """rho of an arm, its spread over seeds no less than is usual among the task's arms."""
    pooled = pooled_variance(
        [list(log_rho(b.points, t.full.points).best.values()) for b in (*t.lora, *t.restricted)]
    )
    return rho(a.points, t.full.points, pooled)


def _gates(c: _Compared, used: Sequence[Optimum], *measured: Estimate) -> list[str]:
    """List what forbids a verdict on what was measured from these optima, and on nothing else."""
    if not used:
        return [
            "no curve of attention and mlp at equal parameters, or of attention+mlp at mlp's rank"
        ]
    gates = [*stalled([c.task.full.optimum], [c.task.full.points.best]), *gates_on(used)]
    if not gates and any(e.value is None for e in measured):
        gates.append(
            "full fine-tuning or a layer set is there at its first evaluation: only bounds"
        )
    return gates


def _judged(
    question: dict[str, Any],
    estimand: str,
    e: Estimate,
    gates: list[str],
    group: str,
    rests: Sequence[Optimum],
) -> list[Verdict]:
    """Judge the claims about one estimand, by the seeds at the optima that it rests on."""
    return judge_claims(
        claims_about(question, estimand), {estimand: (e, gates)}, (), group, fewest_seeds(rests)
    )


def _of_task(c: _Compared, question: dict[str, Any]) -> list[Verdict]:
    """Judge one task alone. Secondary: the claim is about all of them."""
    told = {"attention_over_mlp": (c.worse, c.of_pair()), "mlp_over_both": (c.both, c.of_joint())}
    secondary = {
        **question,
        "claims": {k: {**v, "primary": False} for k, v in question["claims"].items()},
    }
    return [
        v
        for estimand, (e, used) in told.items()
        for v in _judged(secondary, estimand, e, _gates(c, used, e), c.task.name, used)
    ]


def _by_task(v: Verdict, each: Sequence[Verdict]) -> Verdict:
    """Let a verdict over all tasks be SUPPORTED only where each task's is, and say where it depends
    on the task."""
    outcomes = sorted(w.outcome for w in each)
    if (
        not each
        or len(set(outcomes)) == 1
        or (v.outcome == "UNDECIDED" and not {"SUPPORTED", "REFUTED"} <= set(outcomes))
    ):
        return v
    why = f"by task: {', '.join(f'{o} on {outcomes.count(o)}' for o in sorted(set(outcomes)))}; {v.why}"
    return dataclasses.replace(
        v, why=why, outcome="UNDECIDED" if v.outcome == "SUPPORTED" else v.outcome
    )


def _trace(told: Sequence[_Compared]) -> Estimate:
    """Spearman's correlation between ln of rho and ln of the gradient's share over the layer sets
    that are compared, each task's own mean taken out; bootstrap over tasks is pointless at three,
    so the interval is Fisher's."""
    x, y = [], []
    for c in told:
        arms = [a for a in (*c.pair, c.joint[1]) if a.share]
        speeds = [_mean_log(log_rho(a.points, c.task.full.points).best) for a in arms]
        logs = [(math.log(a.share), v) for a, v in zip(arms, speeds) if v is not None]
        if len(logs) > 1:
            centre = np.mean(logs, axis=0)
            x += [v - centre[0] for v, _ in logs]
            y += [v - centre[1] for _, v in logs]
    if len(x) < FEWEST:
        return Estimate(None, n=len(x))
    r = float(stats.spearmanr(x, y).statistic)
    z = math.atanh(min(max(r, -0.999), 0.999)) + stats.norm.ppf(
        (np.arange(4000) + 0.5) / 4000
    ) * 1.06 / math.sqrt(len(x) - 3)
    draws = np.tanh(z)
    return Estimate(
        r, float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)), len(x), draws=draws
    )


def _mean_log(logs: dict[int, float]) -> float | None:
    known = [v for v in logs.values() if math.isfinite(v)]
    return float(np.mean(known)) if known and len(known) == len(logs) else None


def _over_tasks(
    worse: Sequence[tuple[Task, Estimate]], both: Sequence[tuple[Task, Estimate]]
) -> Section:
    rows = [
        [
            "task",
            "rho attention / rho mlp, equal parameters [95%]",
            "rho mlp / rho attention+mlp, equal rank [95%]",
            "the same order under full fine-tuning of the matrices",
        ]
    ]
    for (t, a), (_, b) in zip(worse, both):
        location = {r.layers: r.nll for r in t.restricted}
        same = "-"
        if None not in (location.get("attention"), location.get("mlp")) and a.value is not None:
            gap = location["attention"] - location["mlp"]
            same = f"{'yes' if (gap > 0) == (a.value < 1) else 'no'}: attention {signed(gap)} nats against mlp"
        rows.append([t.name, with_interval(a), with_interval(b), same])
    return Section(
        "Over the tasks",
        rows,
        ["A verdict over tasks rests on the task that is hardest on the claim."],
    )


def _arms(t: Task) -> Section:
    rows = [
        [
            "arm",
            "trained parameters",
            "rho [95%]",
            "best NLL",
            "gap to FullFT (nats)",
            "share of the squared gradient",
        ]
    ]
    for a in [*([t.full] if t.full else []), *t.restricted, *t.lora]:
        full = a is t.full
        name = (
            "full fine-tuning"
            if full
            else f"FullFT of {a.layers}"
            if a.rank is None
            else f"LoRA r{a.rank} on {a.layers}"
        )
        alone = full or t.full is None
        speed = "-" if alone else with_interval(_speed(a, t))
        gap = None if alone or a.nll is None or t.full.nll is None else a.nll - t.full.nll
        rows.append(
            [name, f"{a.n_trainable:,}", speed, number(a.nll, 5), signed(gap), number(a.share)]
        )
    return Section(t.name, rows)


def _panel(t: Task, legend: bool) -> Panel:
    here = [s for s in SETS if any(a.layers == s for a in (*t.lora, *t.restricted))]
    order = {s: k for k, s in enumerate(here)}
    series = []
    kinds = {
        "LoRA, rank raised to the MLP's parameters": _by_rank(t, True),
        "LoRA, one rank": _by_rank(t, False),
        "FullFT of the same matrices": t.restricted,
    }
    for side, (label, arms) in enumerate(kinds.items()):
        told = [(order[a.layers], _speed(a, t)) for a in arms if a.layers in order and t.full]
        told = sorted((k, e) for k, e in told if e.value is not None)
        beside = 0.16 * (side - 1)  # so that intervals do not cover each other
        series.append(
            Series(
                label,
                [k + beside for k, _ in told],
                [e.value for _, e in told],
                [e.low for _, e in told],
                [e.high for _, e in told],
                style="o",
            )
        )
    short = [
        s.replace("attention", "attn").replace("unembedding", "head").replace("+", "\n+")
        for s in here
    ]
    return Panel(
        t.name.partition(", batch")[0],
        "layer set",
        "rho: FullFT's updates / the arm's",
        series,
        log_y=True,
        ticks=[(float(k), s) for k, s in enumerate(short)],
        lines={"full fine-tuning": 1.0},
        legend=legend,
    )


def _by_rank(t: Task, high: bool) -> list[Arm]:
    top = {s: max(a.rank for a in t.lora if a.layers == s) for s in {a.layers for a in t.lora}}
    low = min((a.rank for a in t.lora), default=0)
    return [a for a in t.lora if (a.rank == top[a.layers] and a.rank > low) == high]
