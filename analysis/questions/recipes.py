"""Question: how much popular recipes lose against tuned LoRA, and how much fine-tuning forgets.

A recipe's cost is the loss of its own runs at the rate it prescribes (interpolated in ln(rate)
between the tried rates around it), minus tuned LoRA's at its best rate, as a share of tuned LoRA's
gain over the base model. Paired by seed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, rate, signed, with_interval
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import (
    likely_rates,
    losses_at_best,
    over_seeds,
    values_at_best,
)
from analysis.measures.at_rate import AtRate, losses_at, lost_at
from analysis.measures.efficiency import at_best, rho
from analysis.measures.retention import at_equal_learning, frontier, retained
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Panel,
    Rows,
    Section,
    Series,
    correct,
    fewest_seeds,
    gates_on,
    gates_on_speed,
    judge_claims,
    lora_of,
    pooled_over,
    without_an_arm,
)
from analysis.runs.lr_curves import full_names, lr_curves

ESTIMANDS = (
    "attention_at_full_lr",
    "alpha_twice_rank",
    "default_rate",
    "original",
    "ten_times",
    "small_data_rank",
    "retention",
    "retention_equal",
)
LOG_ESTIMANDS = ("small_data_rank",)
RECIPES = {
    "attention_at_full_lr": "attention only,\nFullFT's rate",
    "alpha_twice_rank": "alpha = 2r",
    "default_rate": "attention and\nMLP at 2e-4",
    "original": "attention,\nalpha = r,\n2e-4, decayed",
    "ten_times": "10x FullFT's\nrate",
}
"""Names in the figure."""


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every recipe against tuned LoRA, rank on small data, and retention."""
    main = _main_dataset(table)
    is_main = table["dataset"] == main
    optima = fit_all(lr_curves(table[is_main]))
    few = [] if is_main.all() else fit_all(lr_curves(table[~is_main]))
    group = f"{table['model'].iloc[0]} on {main}"
    full = _one(optima, method="fullft")
    tuned = _one(
        optima, method="lora", layers="attention+mlp+unembedding", alpha=32.0, schedule="constant"
    )
    if full is None or tuned is None:
        missing = "fullft" if full is None else "lora, tuned"
        return without_an_arm(question, optima, missing, ESTIMANDS, LOG_ESTIMANDS, group)
    gain = tuned.curve.nll_start - (tuned.best_nll or math.nan)
    measured, recipes = _recipes(table, question, optima, full, tuned, gain)
    measured["small_data_rank"], few_rows = _few(table, few)
    of_retention, forgotten = _retention(table, optima, full, tuned)
    measured |= of_retention
    seeds = fewest_seeds([full, tuned])
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    sections = [recipes, Section("Few rows, many epochs", few_rows), forgotten]
    measures = {
        "shares": {k: e.plain() for k, (e, _) in measured.items()},
        "read": {"retention_equal": f"{measured['retention_equal'][0].n} seed(s)"},
    }
    return Analysis(optima + few, verdicts, sections, measures, {group: [full, tuned]})


def _main_dataset(table: pd.DataFrame) -> str:
    """Return the data set shared by tuned LoRA, the recipes and full fine-tuning.

    It is the one with the most arms.
    """
    arms = table.groupby("dataset").apply(
        lambda p: p[["method", "layers", "alpha", "schedule"]].drop_duplicates().shape[0]
    )
    return str(arms.idxmax())


def _one(optima: Sequence[Optimum], **wanted: Any) -> Optimum | None:
    def key(o: Optimum, k: str) -> Any:
        value = o.curve.key.get(k)
        return "attention+mlp+unembedding" if k == "layers" and value == "all" else value

    found = [o for o in optima if all(key(o, k) == v for k, v in wanted.items())]
    return max(found, key=lambda o: len(o.curve.x), default=None)


def _rates(o: Optimum, which: int) -> list[float]:
    """Return a curve's best rate and likely rates; empty if the best rate is unknown."""
    return [] if o.best_lr.value is None else [o.best_lr.value, *likely_rates(o, which)]


def _recipes(
    table: pd.DataFrame,
    question: dict[str, Any],
    optima: Sequence[Optimum],
    full: Optimum,
    tuned: Optimum,
    gain: float,
) -> tuple[Measured, Section]:
    """Return what each recipe loses as a share of tuned LoRA's gain, and the report's section."""
    rank, gates = float(tuned.curve.key["rank"]), gates_on([full, tuned])
    of_full, of_tuned = _rates(full, 1), _rates(tuned, 0)
    attention = _one(optima, method="lora", layers="attention", schedule="constant")
    arms: dict[str, tuple[Optimum | None, list[float]]] = {
        "attention_at_full_lr": (attention, of_full),
        "alpha_twice_rank": (_one(optima, method="lora", alpha=2 * rank), of_tuned),
        "default_rate": (_one(optima, method="lora", layers="attention+mlp"), [2e-4]),
        "original": (_one(optima, method="lora", schedule="linear"), [2e-4]),
        "ten_times": (tuned, [10 * lr for lr in of_full]),
    }
    (reference,) = losses_at_best([tuned])
    losses = {name: losses_at(o, at) for name, (o, at) in arms.items()}
    given_up = {
        name: at.losses.paired(reference, lambda a, b: (a - b) / gain)
        for name, at in losses.items()
    }
    pooled = pooled_over(given_up.values())
    highest = {c["estimand"]: float(c["margin"][1]) for c in question["claims"].values()}
    measured: Measured = {}
    head = ["recipe", "rate", "read at", "loss given up (nats)", "share of tuned LoRA's gain [95%]"]
    rows: Rows = [[*head, "seeds", "at its own best rate (nats)"]]
    for name, (o, at) in arms.items():
        share, stops = lost_at(o, losses[name], given_up[name], highest.get(name, math.inf), pooled)
        measured[name] = (share, [*gates, *stops])
        own = None if o is None or o.best_nll is None or o is tuned else o.best_nll - tuned.best_nll
        rows.append(
            [
                name.replace("_", " "),
                rate(at[0]) if at else "-",
                _read_at(losses[name]),
                signed(None if share.value is None else share.value * gain),
                with_interval(share),
                str(share.n),
                signed(own),
            ]
        )
    text = (
        f"Tuned LoRA (rank {rank:g}) gains {number(gain)} nats over the base. A recipe whose rate "
        "was not tried is interpolated in ln(rate) between the rates around it. Next to a rate "
        "that diverged the nearest rate counts, and the recipe gives up at least that much."
    )
    panels, caption = [_bars(measured)], "what recipes give up"
    return measured, Section("Recipes", rows, [text], "recipes.png", panels, caption)


def _read_at(at: AtRate) -> str:
    near = []
    if any(at.near_broken):
        share = f"{np.mean(at.near_broken):.0%}"
        near = [f"next to a rate that diverged, at {share} of the likely rates"]
    return ", ".join([*map(rate, at.read_at), *near]) or "-"


def _few(table: pd.DataFrame, few: Sequence[Optimum]) -> tuple[tuple[Estimate, list[Gate]], Rows]:
    """Return rho of the lowest rank against the highest on few rows, its gates, and a table."""
    lora = lora_of(few)
    if len(lora) < 2:
        return (Estimate(None), [Gate(GateCode.MISSING, "two ranks on few rows")]), []
    low, high = at_best(table, [lora[0], lora[-1]])
    rows = [["curve", "best LR [95%]", "best NLL", "flags"]]
    for o in few:
        flags = ", ".join(o.flags) or "-"
        rows.append([o.curve.name, with_interval(o.best_lr, rate), number(o.best_nll, 5), flags])
    return (rho(low, high), gates_on_speed([lora[0], lora[-1]])), rows


FORGOTTEN = (
    "curve",
    "at LR",
    "test NLL on the new task",
    "NLL on the pretraining task",
    "before",
    "forgotten (nats) [95%]",
)
LOSSES = ("test", "after", "before")


def _retention(
    table: pd.DataFrame, optima: Sequence[Optimum], full: Optimum, tuned: Optimum
) -> tuple[Measured, Section]:
    """Return what tuned LoRA forgets of the pretraining task over what full fine-tuning forgets.

    With full fine-tuning at its best rate, and at the lower rate at which it has learned as much.
    """
    title = "What is forgotten"
    if "retain_nll" not in table or table["retain_nll"].isna().all():
        nothing = (Estimate(None), [Gate(GateCode.MISSING, "the pretraining task")])
        return {"retention": nothing, "retention_equal": nothing}, Section(title)
    rows: Rows = [list(FORGOTTEN)]
    series: list[Series] = []
    found = dict(zip(map(id, optima), values_at_best(table, optima, retained)))
    lost = {key: runs.map(lambda v: v["lost"]) for key, runs in found.items()}
    pooled = pooled_variance([list(v.best.values()) for v in lost.values()])
    for o, name in zip(optima, full_names([o.curve for o in optima])):
        runs = found[id(o)].best.values()
        if not runs:
            continue
        mean = {k: float(np.mean([v[k] for v in runs])) for k in LOSSES}
        cells = [name, rate(o.best_lr.value), *(number(mean[k], 4) for k in LOSSES)]
        rows.append([*cells, with_interval(over_seeds(lost[id(o)], pooled))])
        if o in (full, tuned):
            series += _path(o.curve.name, frontier(table, o), mean, len(series))
    share = over_seeds(lost[id(tuned)].paired(lost[id(full)], lambda x, y: x / y))
    equal = at_equal_learning(table, full, tuned)
    alike = over_seeds(equal.map(lambda v: v["lora"] / v["lost"]))
    for seed, v in equal.best.items():
        name = (
            "full fine-tuning at the lower rate at which it has learned as much as tuned LoRA: "
            f"seed {seed}, for which LoRA forgot {number(v['lora'])}"
        )
        cells = [name, rate(v["lr"]), *(number(v[k], 4) for k in LOSSES)]
        rows.append([*cells, number(v["lost"])])
    gates = gates_on([full, tuned])
    needed = max(len(lost[id(tuned)].best.keys() & lost[id(full)].best.keys()), MIN_SEEDS)
    few = [Gate(GateCode.FEW_SEEDS_AS_GOOD, f"{alike.n} of {needed}")] if alike.n < needed else []
    learned, kept = "test NLL on the new task (nats)", "NLL on the pretraining task (nats)"
    panel = Panel("one point a rate, mean over seeds", learned, kept, series)
    caption = "what is left of the pretraining task, against what is learned of the new one"
    panels = [panel] if series else []
    return (
        {"retention": (share, gates), "retention_equal": (alike, gates + few)},
        Section(title, rows, [], "retention.png", panels, caption),
    )


def _path(
    name: str, path: Sequence[dict[str, float]], mean: dict[str, float], colour: int
) -> list[Series]:
    """Return series of a curve's losses on both tasks, over its rates and at its best rate."""
    label, best = f"{name}, low to high rate", f"{name} at its best rate"
    learned, left = [v["test"] for v in path], [v["after"] for v in path]
    return [
        Series(label, learned, left, colour=colour),
        Series(best, [mean["test"]], [mean["after"]], style="*", colour=colour, size=15),
    ]


def _bars(measured: Measured) -> Panel:
    shown = [(k, e) for k, (e, _) in measured.items() if k in RECIPES]
    bars = Series.of("", range(len(shown)), [e for _, e in shown], style="o", colour=1)
    ticks = [(float(i), RECIPES[k]) for i, (k, _) in enumerate(shown)]
    title, margin = "share of tuned LoRA's gain that is given up", (-0.05, 0.05)
    return Panel(title, "", "share", [bars], band=margin, ticks=ticks)
