"""Question: does LoRA need 2/3 of full fine-tuning's compute, per update and to the same loss.

Operations are counted by the study's formula (2/3 + 2R/N, at the model's real shapes). Seconds are
each run's median update time; the fastest tenth of an arm's runs is used, since other load on the
machine can only slow a run down.

The loss to be reached is that of full fine-tuning after SHARE of the updates, at its best rate for
that length. LoRA too uses the rate that is best for the length at which it gets there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import (
    Estimate,
    exactly,
    exp_of,
    from_draws,
    number,
    rate,
    with_interval,
)
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import AtBest, values_at_best
from analysis.measures.efficiency import at_best, log_rho, rho
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    fewest_seeds,
    full_of,
    gates_on_speed,
    judge_claims,
    lora_of,
    missing_arm,
    pooled_over,
    without_an_arm,
)
from analysis.runs.learning_curves import Points, learning_curves
from analysis.runs.lr_curves import lr_curves, runs_of, title
from analysis.runs.prefixes import at_step, steps_seen, while_unsolved

ESTIMANDS = ("flops_per_step", "seconds_per_step", "flops_to_loss", "seconds_to_loss")
LOG_ESTIMANDS = ESTIMANDS
SHARE = 1 / 6
FASTEST = 0.1
QUIET = 1.5
"""If the 90% quantile of an arm's update times exceeds the 10% quantile by more than this factor,
the machine was busy with other work."""
MIN_RUNS = 5
"""An arm with fewer runs has no estimate of its time."""


def flops_ratio(spec: dict[str, Any], n_trainable: int) -> float:
    """Return the operations of a LoRA update over those of a full fine-tuning update.

    For the same tokens: (4 P + 6 T) / 6 P, with P the weights in matrix products, from the model's
    shape, and T the adapter's parameters (source: the study's section on compute).
    """
    m = spec["model"]
    h, q, kv = m["hidden_size"], m["n_heads"] * m["head_size"], m["n_kv_heads"] * m["head_size"]
    p = m["n_layers"] * (2 * h * q + 2 * h * kv + 3 * h * m["mlp_size"]) + h * m["vocab_size"]
    return (4 * p + 6 * n_trainable) / (6 * p)


@dataclass(frozen=True)
class _Reached:
    """How a rank reaches the loss of full fine-tuning's shorter runs."""

    optimum: Optimum
    length: int
    """Number of updates for which `optimum` is the best rate."""
    points: AtBest[Points]
    """Learning curves at that rate."""


HEAD = (
    "rank",
    "operations an update",
    "seconds an update [95%]",
    "best rate to FullFT's loss [95%]",
    "of runs of",
    "updates to it [95%]",
    "operations to it [95%]",
    "seconds to it [95%]",
)
LINES = {
    "flops_per_step": "operations an update",
    "seconds_per_step": "seconds an update",
    "flops_to_loss": "operations to FullFT's loss",
    "seconds_to_loss": "seconds to FullFT's loss",
}


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the highest rank's operations and seconds, per update and to the common loss."""
    table, cut = while_unsolved(table)
    optima = fit_all(lr_curves(table))
    full, lora, group = full_of(optima), lora_of(optima), optima[0].curve.group
    if full is None or not lora:
        missing = missing_arm(full, lora)
        return without_an_arm(question, optima, missing, ESTIMANDS, LOG_ESTIMANDS, group)
    last = table["steps"].max()
    short = max((s for s in steps_seen(table) if s <= last * SHARE), default=0)
    aim, goal = _goal(table, short)
    at_goal = [points[-1][1] for points in goal.best.values()]
    level = float(np.mean(at_goal)) if at_goal else -np.inf
    reached = _to_loss(table, optima, level)
    pooled = pooled_over(log_rho(goal, r.points) for r in reached.values())
    costs = {
        int(o.curve.key["rank"]): _costs(table, o, goal, reached[int(o.curve.key["rank"])], pooled)
        for o in lora
    }
    top = max(costs)
    rests = [*([aim] if aim else []), reached[top].optimum]
    absent = Gate(GateCode.MISSING, "full fine-tuning's shorter runs")
    gates = gates_on_speed(rests) if aim else [absent]
    highest = reached[top].points.best
    if any(highest[s][-1][1] > goal.best[s][-1][1] for s in highest.keys() & goal.best.keys()):
        gates = [*gates, Gate(GateCode.NOT_REACHED)]
    busy = _busy([_seconds(table, "fullft"), _seconds(table, "lora", top)])
    measured = {
        "flops_per_step": (costs[top]["flops_per_step"], []),
        "seconds_per_step": (costs[top]["seconds_per_step"], busy),
        "flops_to_loss": (costs[top]["flops_to_loss"], gates),
        "seconds_to_loss": (costs[top]["seconds_to_loss"], gates + busy),
    }
    seeds = fewest_seeds(rests)
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    to = f"rank {top}, the loss of full fine-tuning after {short} of {last:g} updates"
    measures = {
        "compute": {str(r): {k: e.plain() for k, e in v.items()} for r, v in costs.items()},
        "lengths": {str(rank): r.length for rank, r in reached.items()},
        "read": {
            **dict.fromkeys(ESTIMANDS, f"rank {top}"),
            "flops_to_loss": to,
            "seconds_to_loss": to,
        },
    }
    section = _section(costs, reached, top, short, [cut] if cut else [])
    return Analysis(optima, verdicts, [section], measures, {group: [full, *lora]})


def _costs(
    table: pd.DataFrame,
    o: Optimum,
    goal: AtBest[Points],
    reached: _Reached,
    pooled: PooledVariance | None,
) -> dict[str, Estimate]:
    """Return a rank's costs relative to full fine-tuning's, by estimand."""
    row = runs_of(table, o.curve).iloc[0]
    operations = exactly(flops_ratio(json.loads(row["spec"]), int(row["n_trainable"])))
    rank = int(o.curve.key["rank"])
    seconds = _ratio_of_times(_seconds(table, "lora", rank), _seconds(table, "fullft"))
    steps = rho(goal, reached.points, pooled)  # LoRA's updates over full fine-tuning's
    return {
        "flops_per_step": operations,
        "seconds_per_step": seconds,
        "steps": steps,
        "flops_to_loss": _times(steps, operations),
        "seconds_to_loss": _times(steps, seconds),
    }


def _section(
    costs: dict[int, dict[str, Estimate]],
    reached: dict[int, _Reached],
    top: int,
    short: int,
    notes: list[str],
) -> Section:
    rows = [list(HEAD)]
    for rank, cost in costs.items():
        rows.append(
            [
                str(rank),
                number(cost["flops_per_step"].value),
                with_interval(cost["seconds_per_step"]),
                with_interval(reached[rank].optimum.best_lr, rate),
                str(reached[rank].length),
                *(with_interval(cost[k]) for k in ("steps", "flops_to_loss", "seconds_to_loss")),
            ]
        )
    text = (
        f"The claims are judged at rank {top}. The loss to be reached is full fine-tuning's after "
        f"{short} updates; if a rank does not reach it, the lowest loss that both reach. Each "
        "method uses the rate that is best for runs of the length at which it reaches that loss. "
        "Peak memory is measured in the benchmark and compared with the plan's estimate."
    )
    ranks = sorted(costs)
    panel = Panel(
        title(reached[top].optimum.curve, length=False),
        "rank",
        "LoRA / FullFT",
        [Series.of(name, ranks, [costs[r][k] for r in ranks]) for k, name in LINES.items()],
        log_x=True,
        log_y=True,
        band=(0.6, 0.75),
        ticks=[(r, str(r)) for r in ranks],
        lines={"equal": 1.0},
    )
    caption = "operations and seconds, LoRA over full fine-tuning"
    return Section("Compute", rows, [text, *notes], "compute.png", [panel], caption)


def _seconds(table: pd.DataFrame, method: str, rank: int | None = None) -> list[float]:
    """Return the median seconds per update of an arm's runs, where recorded."""
    if "step_s" not in table:
        return []
    part = table[(table["method"] == method) & table["step_s"].notna()]
    return list((part if rank is None else part[part["rank"] == rank])["step_s"])


def _goal(table: pd.DataFrame, length: int) -> tuple[Optimum | None, AtBest[Points]]:
    """Return full fine-tuning's optimum after `length` updates, and its learning curves by seed."""
    if not length:
        return None, AtBest({})
    optima = fit_all(lr_curves(at_step(table, length)))
    (k,) = (k for k, o in enumerate(optima) if o.curve.key["method"] == "fullft")
    return optima[k], _read(table, optima, length, length)[k]


def _to_loss(table: pd.DataFrame, whole: Sequence[Optimum], level: float) -> dict[int, _Reached]:
    """Return, for every rank, how it reaches a loss in the fewest updates.

    Its length is the first evaluated step after which runs at the best rate for that length have
    reached the loss. Learning curves go on to twice that length, since single seeds may get there
    later. A rank that does not reach the loss has the optimum of whole runs. All optima of one
    length, including full fine-tuning's, are fitted together, so that they share one noise level.

    Args:
        whole: optima of the whole runs.
        level: the loss to be reached, in nats.
    """
    found: dict[int, _Reached] = {}
    seen = steps_seen(table)
    for length in seen:
        optima = fit_all(lr_curves(at_step(table, length)))
        there = {
            int(o.curve.key["rank"]): k
            for k, o in enumerate(optima)
            if o.curve.key["method"] == "lora" and _lowest(o) <= level
        }
        if there.keys() - found.keys():
            twice = next((s for s in seen if s >= 2 * length), seen[-1])
            each = _read(table, optima, length, twice)
            found = {r: _Reached(optima[k], length, each[k]) for r, k in there.items()} | found
    for o, runs in zip(whole, at_best(table, whole)):
        if o.curve.key["method"] == "lora":
            found.setdefault(int(o.curve.key["rank"]), _Reached(o, int(table["steps"].max()), runs))
    return found


def _lowest(o: Optimum) -> float:
    """Return the loss at a curve's optimum; without one, the lowest mean at a usable rate."""
    if o.best_nll is not None:
        return o.best_nll
    c = o.curve
    return min(
        (float(np.mean(c.y[c.usable & (c.x == x)])) for x in set(c.x[c.usable])), default=np.inf
    )


def _read(
    table: pd.DataFrame, optima: Sequence[Optimum], length: int, until: int
) -> list[AtBest[Points]]:
    """Return learning curves up to update `until`, at the best rates of runs of `length` updates.

    The last evaluation is kept: all evaluations of a run that was cut use the same held-out rows.
    """
    longer = at_step(table, until).assign(steps=length)  # so that they match the optima's curves
    learned = learning_curves(longer).query("step >= 1")
    read = {
        run: dict(zip(c["step"].tolist(), c["test_nll"].tolist()))
        for run, c in learned.groupby("run")
    }
    return [
        runs.map(lambda points: sorted(points.items()))
        for runs in values_at_best(longer, optima, lambda run: read.get(run.name, {}))
    ]


def _busy(arms: list[list[float]]) -> list[Gate]:
    """Return a gate if an arm's update times vary too much to reflect only the method."""
    apart = max((float(np.quantile(v, 0.9) / np.quantile(v, 0.1)) for v in arms if v), default=1.0)
    return [] if apart <= QUIET else [Gate(GateCode.BUSY, f"{apart:.2g}")]


def _ratio_of_times(a: list[float], b: list[float]) -> Estimate:
    """Return the ratio of two arms' 10% quantiles of time, bootstrapped over runs."""
    if len(a) < MIN_RUNS or len(b) < MIN_RUNS:
        return Estimate(None)
    rng = np.random.default_rng(20251125)
    x, y = (np.quantile(rng.choice(v, (4000, len(v))), FASTEST, axis=1) for v in (a, b))
    return exp_of(from_draws(np.log(x) - np.log(y), len(a) + len(b)))


def _times(a: Estimate, b: Estimate) -> Estimate:
    """Return the product of two independent estimates; a bound stays a bound."""
    if a.value is None or b.value is None:
        low, high = (None if v is None or b.value is None else v * b.value for v in (a.low, a.high))
        return Estimate(None, low, high, n=a.n, flags=a.flags)
    if a.draws is None or b.draws is None:
        return Estimate(a.value * b.value, n=a.n)
    few = b.draws if len(b.draws) == len(a.draws) else np.full(len(a.draws), b.value)
    logs = np.log(a.draws) + np.log(np.random.default_rng(7).permutation(few))
    spread = a.spread and a.spread.sharing(float(np.std(np.log(few))))
    return exp_of(from_draws(logs, a.n, spread=spread))
