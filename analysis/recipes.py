"""What do popular recipes lose against tuned LoRA, and what does fine-tuning make the model forget?

A recipe's loss is that of its own runs at the rate it prescribes (the tried rate nearest to it, or the fit between the tried
ones), less tuned LoRA's, as a share of what tuned LoRA gains over the base. Paired by seed where both have runs there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import judging, plots
from analysis.findings import Findings, Section
from analysis.lr_optimum import Optimum, fit_all
from analysis.plots import Panel, Series
from analysis.results import Estimate, from_sample, number, rate, signed, with_interval
from analysis.step_efficiency import at_best, rho, runs_at_best
from analysis.table import curves

ESTIMANDS = ("attention_at_full_lr", "alpha_twice_rank", "default_rate", "original", "ten_times", "small_data_rank",
             "retention")  # fmt: skip
LOG_ESTIMANDS = ("small_data_rank",)
NEAR = math.log(1.5)
"""A recipe's rate is read from runs within this of it."""


def find(table: pd.DataFrame, question: dict[str, Any]) -> Findings:
    """Judge every recipe against tuned LoRA, rank on small data, and retention."""
    main = _main_dataset(table)
    optima = fit_all(curves(table[table["dataset"] == main]))
    few = fit_all(curves(table[table["dataset"] != main])) if (table["dataset"] != main).any() else []
    group = f"{table['model'].iloc[0]} on {main}"
    full = _one(optima, method="fullft")
    tuned = _one(optima, method="lora", layers="attention+mlp+unembedding", alpha=32.0, schedule="constant")
    missing = "fullft" if full is None else "lora, tuned" if tuned is None else ""
    if missing:
        none = dict.fromkeys(ESTIMANDS, (Estimate(None), judging.gates([], missing)))
        return Findings(optima, judging.verdicts(question, none, LOG_ESTIMANDS, group))
    rank, gates = float(tuned.curve.key["rank"]), judging.gates([full, tuned])
    wanted: dict[str, tuple[Optimum | None, float | None]] = {
        "attention_at_full_lr": (_one(optima, method="lora", layers="attention", schedule="constant"), full.best_lr.value),
        "alpha_twice_rank": (_one(optima, method="lora", alpha=2 * rank), tuned.best_lr.value),
        "default_rate": (_one(optima, method="lora", layers="attention+mlp"), 2e-4),
        "original": (_one(optima, method="lora", schedule="linear"), 2e-4),
        "ten_times": (tuned, 10 * full.best_lr.value if full.best_lr.value else None),
    }
    gain = tuned.curve.nll_start - (tuned.best_nll or math.nan)
    reference = {int(r["seed"]): float(r["test_nll"]) for r in runs_at_best(table, [tuned])[0]}
    measured: dict[str, tuple[Estimate, list[str]]] = {}
    rows = [["recipe", "rate", "loss given up (nats)", "share of tuned LoRA's gain [95%]", "seeds",
             "at its own best rate (nats)"]]  # fmt: skip
    for name, (o, at) in wanted.items():
        share, stops = _share(table, o, at, reference, gain)
        measured[name] = (share, [*gates, *stops])
        own = None if o is None or o.best_nll is None or o is tuned else o.best_nll - tuned.best_nll
        rows.append([name.replace("_", " "), rate(at), signed(None if share.value is None else share.value * gain),
                     with_interval(share), str(share.n), signed(own)])  # fmt: skip
    measured["small_data_rank"], few_rows = _few(table, few)
    measured["retention"], kept_rows, panel = _retention(table, optima, full, tuned)
    verdicts = judging.corrected(
        judging.verdicts(question, measured, LOG_ESTIMANDS, group, judging.seeds([full, tuned])), question
    )
    text = [f"Tuned LoRA (rank {rank:g}) gains {number(gain)} nats over the base. A recipe whose rate was not tried is read "
            "from the fit of its own valley, and has no interval then."]  # fmt: skip
    sections = [
        Section("Recipes", rows, text, "recipes.png", lambda p: plots.panels([_bars(measured)], p), "what recipes give up"),
        Section("Few rows, many epochs", few_rows),
        Section("What is forgotten", kept_rows, figure="retention.png" if panel else "",
                draw=(lambda p: plots.panels([panel], p)) if panel else None,
                caption="loss on the pretraining task over the loss on the new one"),
    ]  # fmt: skip
    measures = {"shares": {k: e.plain() for k, (e, _) in measured.items()}}
    return Findings(optima + few, verdicts, sections, measures, {group: [full, tuned]})


def _main_dataset(table: pd.DataFrame) -> str:
    """The data set that tuned LoRA, the recipes and full fine-tuning share: that of most arms."""
    arms = table.groupby("dataset").apply(lambda p: p[["method", "layers", "alpha", "schedule"]].drop_duplicates().shape[0])
    return str(arms.idxmax())


def _one(optima: Sequence[Optimum], **wanted: Any) -> Optimum | None:
    def key(o: Optimum, k: str) -> Any:
        value = o.curve.key.get(k)
        return "attention+mlp+unembedding" if k == "layers" and value == "all" else value

    found = [o for o in optima if all(key(o, k) == v for k, v in wanted.items())]
    return max(found, key=lambda o: len(o.curve.x), default=None)


def _share(
    table: pd.DataFrame, o: Optimum | None, at: float | None, reference: dict[int, float], gain: float
) -> tuple[Estimate, list[str]]:
    if o is None or at is None:
        return Estimate(None), ["no curve of the recipe"] if o is None else []
    c = o.curve
    there = np.abs(c.x - math.log(at)) < NEAR
    if there.any():
        x = c.x[there][np.argmin(np.abs(c.x[there] - math.log(at)))]
        mine = {int(s): min(float(y), c.nll_start) if np.isfinite(y) else c.nll_start  # broken down: the base would do
                for s, y, v in zip(c.seed, c.y, c.x) if abs(v - x) < 1e-9}  # fmt: skip
        both = sorted(mine.keys() & reference.keys())
        return from_sample([(mine[s] - reference[s]) / gain for s in both]), []
    fitted = o.predict(np.array([at]))
    if fitted is None or not min(c.x) <= math.log(at) <= max(c.x):
        return Estimate(None), ["the recipe's rate lies outside the rates tried"]
    return Estimate(float(fitted[0] - np.mean(list(reference.values()))) / gain, n=1), []


def _few(table: pd.DataFrame, few: Sequence[Optimum]) -> tuple[tuple[Estimate, list[str]], list[list[str]]]:
    """How fast the lowest rank learns few rows against the highest: rho of the one against the other."""
    lora = [o for o in few if o.curve.key["method"] == "lora"]
    if len(lora) < 2:
        return (Estimate(None), ["no curve of two ranks on few rows"]), []
    low, high = at_best(table, [lora[0], lora[-1]])
    speed = rho(low, high)
    rows = [["curve", "best LR [95%]", "best NLL", "flags"]]
    rows += [[o.curve.name, with_interval(o.best_lr, rate), number(o.best_nll, 5), ", ".join(o.flags) or "-"] for o in few]
    return (speed, judging.gates([lora[0], lora[-1]])), rows


def _retention(
    table: pd.DataFrame, optima: Sequence[Optimum], full: Optimum, tuned: Optimum
) -> tuple[tuple[Estimate, list[str]], list[list[str]], Panel | None]:
    """What tuned LoRA forgets of the pretraining task, as a share of what full fine-tuning forgets."""
    if "retain_nll" not in table or table["retain_nll"].isna().all():
        return (Estimate(None), ["no curve of the pretraining task"]), [], None
    rows = [["curve", "at LR", "NLL on the pretraining task", "before", "forgotten (nats) [95%]"]]
    lost: dict[int, dict[int, float]] = {}
    series = []
    for o, runs in zip(optima, runs_at_best(table, optima)):
        known = [r for r in runs if pd.notna(r["retain_nll"])]
        if not known:
            continue
        lost[id(o)] = {int(r["seed"]): float(r["retain_nll"] - r["retain_start"]) for r in known}
        name = f"{o.curve.name} {o.curve.key['layers'] if o.curve.key['method'] == 'lora' else ''}".strip()
        after = number(np.mean([r["retain_nll"] for r in known]), 4)
        rows.append([name, rate(known[0]["lr"]), after, number(known[0]["retain_start"], 4),
                     with_interval(from_sample(list(lost[id(o)].values())))])  # fmt: skip
        mine = table[(table["method"] == o.curve.key["method"]) & (table["dataset"] == o.curve.key["dataset"])
                     & (table["alpha"].isna() | (table["alpha"] == o.curve.key["alpha"])) & (table["status"] == "done")
                     & (table["layers"] == o.curve.key["layers"])].sort_values("lr")  # fmt: skip
        if o in (full, tuned):
            mean = mine.groupby("lr")[["test_nll", "retain_nll"]].mean()
            series.append(Series(f"{o.curve.name}, low to high rate", list(mean["test_nll"]), list(mean["retain_nll"])))
    a, b = lost.get(id(tuned), {}), lost.get(id(full), {})
    share = from_sample([a[s] / b[s] for s in sorted(a.keys() & b.keys()) if b[s] > 0])
    panel = Panel("one point a rate", "test NLL on the new task (nats)", "NLL on the pretraining task (nats)", series)
    return (share, judging.gates([full, tuned])), rows, panel if series else None


def _bars(measured: dict[str, tuple[Estimate, list[str]]]) -> Panel:
    told = [(k, e) for k, (e, _) in measured.items() if k not in ("small_data_rank", "retention") and e.value is not None]
    ends = ([getattr(e, k) for _, e in told] for k in ("value", "low", "high"))
    return Panel("share of tuned LoRA's gain that is given up", "", "share", [
        Series("", range(len(told)), *ends, style="o", colour=1)
    ], band=(-0.05, 0.05), ticks=[(float(i), k.replace("_", "\n")) for i, (k, _) in enumerate(told)])  # fmt: skip
