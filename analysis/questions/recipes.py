"""What do popular recipes lose against tuned LoRA, and what does fine-tuning make the model forget?

A recipe's loss is that of its own runs at the rate it prescribes (interpolated in ln(rate) between
the tried ones around it), less tuned LoRA's at its best, as a share of what tuned LoRA gains over
the base. Paired by seed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS
from analysis.inference.estimate import AT_LEAST, Estimate, number, rate, signed, with_interval
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import (
    NEAR,
    AtBest,
    likely_rates,
    mixed,
    over_seeds,
    values_at_best,
    weights,
)
from analysis.measures.efficiency import at_best, rho
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.runs.lr_curves import full_names, lr_curves, runs_of

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
STEPS = 200
"""Rates at which equal learning is looked for."""
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
    optima = fit_all(lr_curves(table[table["dataset"] == main]))
    few = (
        fit_all(lr_curves(table[table["dataset"] != main]))
        if (table["dataset"] != main).any()
        else []
    )
    group = f"{table['model'].iloc[0]} on {main}"
    full = _one(optima, method="fullft")
    tuned = _one(
        optima, method="lora", layers="attention+mlp+unembedding", alpha=32.0, schedule="constant"
    )
    missing = "fullft" if full is None else "lora, tuned" if tuned is None else ""
    if missing:
        none = dict.fromkeys(ESTIMANDS, (Estimate(None), gates_on([], missing)))
        return Analysis(optima, judge_claims(question, none, LOG_ESTIMANDS, group))
    gain = tuned.curve.nll_start - (tuned.best_nll or math.nan)
    measured, rows = _given_up(table, question, optima, full, tuned, gain)
    measured["small_data_rank"], few_rows = _few(table, few)
    kept, kept_rows, panel = _retention(table, optima, full, tuned)
    measured |= kept
    verdicts = correct(
        judge_claims(question, measured, LOG_ESTIMANDS, group, fewest_seeds([full, tuned])),
        question,
    )
    text = [
        f"Tuned LoRA (rank {tuned.curve.key['rank']:g}) gains {number(gain)} nats over the base. A recipe whose rate was "
        "not tried is interpolated in ln(rate) between those around it; next to one that broke down, the nearest "
        "counts, and what is given up is at least that."
    ]
    sections = [
        Section(
            "Recipes",
            rows,
            text,
            "recipes.png",
            [_bars(measured)],
            "what recipes give up",
        ),
        Section("Few rows, many epochs", few_rows),
        Section(
            "What is forgotten",
            kept_rows,
            figure="retention.png",
            panels=[panel] if panel else [],
            caption="what is left of the pretraining task, against what is learned of the new one",
        ),
    ]
    measures = {
        "shares": {k: e.plain() for k, (e, _) in measured.items()},
        "read": {"retention_equal": f"{measured['retention_equal'][0].n} seed(s)"},
    }
    return Analysis(optima + few, verdicts, sections, measures, {group: [full, tuned]})


def _given_up(
    table: pd.DataFrame,
    question: dict[str, Any],
    optima: Sequence[Optimum],
    full: Optimum,
    tuned: Optimum,
    gain: float,
) -> tuple[dict[str, tuple[Estimate, list[str]]], list[list[str]]]:
    """What each recipe gives up, as a share of what tuned LoRA gains, with its gates; and a table."""
    rank, gates = float(tuned.curve.key["rank"]), gates_on([full, tuned])
    of_full, of_tuned = _rates(full, 1), _rates(tuned, 0)
    wanted: dict[str, tuple[Optimum | None, list[float]]] = {
        "attention_at_full_lr": (
            _one(optima, method="lora", layers="attention", schedule="constant"),
            of_full,
        ),
        "alpha_twice_rank": (_one(optima, method="lora", alpha=2 * rank), of_tuned),
        "default_rate": (_one(optima, method="lora", layers="attention+mlp"), [2e-4]),
        "original": (_one(optima, method="lora", schedule="linear"), [2e-4]),
        "ten_times": (tuned, [10 * lr for lr in of_full]),
    }
    (at_tuned,) = values_at_best(table, [tuned], lambda row: {"nll": float(row["test_nll"])})
    reference = at_tuned.map(lambda v: v["nll"])
    losses = {name: _losses(o, at) for name, (o, at) in wanted.items()}
    shares = {
        name: loss.paired(reference, lambda a, b: (a - b) / gain)
        for name, (loss, *_) in losses.items()
    }
    highest = {c["estimand"]: float(c["margin"][1]) for c in question["claims"].values()}
    pooled = pooled_variance([list(s.best.values()) for s in shares.values()])
    measured: dict[str, tuple[Estimate, list[str]]] = {}
    rows = [
        [
            "recipe",
            "rate",
            "read at",
            "loss given up (nats)",
            "share of tuned LoRA's gain [95%]",
            "seeds",
            "at its own best rate (nats)",
        ]
    ]
    for name, (o, at) in wanted.items():
        _, read_at, beside = losses[name]
        share = over_seeds(shares[name], pooled, (AT_LEAST,) if beside[:1] == [True] else ())
        outside = [] if share.n else ["the recipe's rate lies outside the rates tried"]
        stops = ["no curve of the recipe"] if o is None else outside
        if 0 < share.n < MIN_SEEDS:
            stops = [*stops, f"{share.n} seed(s) at the recipe's rate, {MIN_SEEDS} needed"]
        if any(beside) and share.has_interval() and share.low <= highest.get(name, math.inf):
            stops = [
                *stops,
                "bounded_by_divergence: the recipe's rate lies beside one that broke down",
            ]
        measured[name] = (share, [*gates, *stops])
        own = None if o is None or o.best_nll is None or o is tuned else o.best_nll - tuned.best_nll
        given_up = None if share.value is None else share.value * gain
        near = (
            [f"beside a breakdown at {np.mean(beside):.0%} of the likely rates"]
            if any(beside)
            else []
        )
        rows.append(
            [
                name.replace("_", " "),
                rate(at[0]) if at else "-",
                ", ".join([*map(rate, read_at), *near]) or "-",
                signed(given_up),
                with_interval(share),
                str(share.n),
                signed(own),
            ]
        )
    return measured, rows


def _main_dataset(table: pd.DataFrame) -> str:
    """The data set that tuned LoRA, the recipes and full fine-tuning share: that of most arms."""
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
    """Return a curve's best rate, and rates that are as likely to be it; nothing where it is not
    known."""
    return [] if o.best_lr.value is None else [o.best_lr.value, *likely_rates(o, which)]


def _losses(
    o: Optimum | None, rates: Sequence[float]
) -> tuple[AtBest[float], list[float], list[bool]]:
    """Return a recipe's loss by seed at the first of the rates and at the others, which are as
    likely; the tried rates that the first was read from; and of each whether it lies next to one
    that broke down, so that the loss there may be higher."""
    found = [_losses_at(o, at) for at in rates] if o is not None else []
    if not found:
        return AtBest({}), [], []
    losses = AtBest(found[0][0], tuple(by_seed for by_seed, *_ in found[1:]))
    return losses, sorted(found[0][1]), [beside for *_, beside in found]


def _losses_at(o: Optimum, at: float) -> tuple[dict[int, float], set[float], bool]:
    c, losses, used, beside = o.curve, {}, set(), False
    heights = {x: float(np.mean(c.y[c.usable & (c.x == x)])) for x in c.x[c.usable]}
    for seed in sorted(set(c.seed)):
        of_seed = c.seed == seed
        mine = dict(zip(c.x[of_seed], zip(c.y[of_seed], c.usable[of_seed])))
        found = weights(list(mine), math.log(at), {x: heights.get(x, math.inf) for x in mine})
        broken = not all(mine[x][1] for x in found)
        if len(found) == 1 or broken:  # at a tried rate, outside of them, or beside a broken one
            nearest = min(mine, key=lambda x: abs(x - math.log(at)))
            if abs(nearest - math.log(at)) > NEAR:
                continue
            found, beside = {nearest: 1.0}, beside or (broken and mine[nearest][1])
        # one that broke down: the base would do, so it gives up the whole gain
        losses[int(seed)] = sum(
            w * (mine[x][0] if mine[x][1] or mine[x][0] < c.nll_start else c.nll_start)
            for x, w in found.items()
        )
        used |= {math.exp(x) for x in found}
    return losses, used, beside


def _few(
    table: pd.DataFrame, few: Sequence[Optimum]
) -> tuple[tuple[Estimate, list[str]], list[list[str]]]:
    """How fast the lowest rank learns few rows against the highest: rho of the one against the
    other."""
    lora = [o for o in few if o.curve.key["method"] == "lora"]
    if len(lora) < 2:
        return (Estimate(None), ["no curve of two ranks on few rows"]), []
    low, high = at_best(table, [lora[0], lora[-1]])
    speed = rho(low, high)
    rows = [["curve", "best LR [95%]", "best NLL", "flags"]]
    rows += [
        [
            o.curve.name,
            with_interval(o.best_lr, rate),
            number(o.best_nll, 5),
            ", ".join(o.flags) or "-",
        ]
        for o in few
    ]
    return (speed, gates_on([lora[0], lora[-1]])), rows


def _retention(
    table: pd.DataFrame, optima: Sequence[Optimum], full: Optimum, tuned: Optimum
) -> tuple[dict[str, tuple[Estimate, list[str]]], list[list[str]], Panel | None]:
    """What tuned LoRA forgets of the pretraining task, as a share of what full fine-tuning forgets:
    at its best rate, and at the lower rate at which it has learned as much."""
    if "retain_nll" not in table or table["retain_nll"].isna().all():
        nothing = (Estimate(None), ["no curve of the pretraining task"])
        return {"retention": nothing, "retention_equal": nothing}, [], None
    rows = [
        [
            "curve",
            "at LR",
            "test NLL on the new task",
            "NLL on the pretraining task",
            "before",
            "forgotten (nats) [95%]",
        ]
    ]
    lost: dict[int, AtBest[float]] = {}
    found = values_at_best(table, optima, _retained)
    pooled = pooled_variance([[v["lost"] for v in runs.best.values()] for runs in found])
    series = []
    for o, name, runs in zip(optima, full_names([o.curve for o in optima]), found):
        if not runs.best:
            continue
        lost[id(o)] = runs.map(lambda v: v["lost"])
        mean = {
            k: float(np.mean([v[k] for v in runs.best.values()]))
            for k in ("test", "after", "before")
        }
        rows.append(
            [
                name,
                rate(o.best_lr.value),
                *(number(mean[k], 4) for k in ("test", "after", "before")),
                with_interval(over_seeds(lost[id(o)], pooled)),
            ]
        )
        if o in (full, tuned):
            path = _frontier(table, o)
            series += [
                Series(
                    f"{o.curve.name}, low to high rate",
                    [v["test"] for v in path],
                    [v["after"] for v in path],
                    colour=len(series),
                ),
                Series(
                    f"{o.curve.name} at its best rate",
                    [mean["test"]],
                    [mean["after"]],
                    style="*",
                    colour=len(series),
                    size=15,
                ),
            ]
    a, b = lost.get(id(tuned), AtBest({})), lost.get(id(full), AtBest({}))
    share = over_seeds(a.paired(b, lambda x, y: x / y))
    equal = _at_equal_learning(table, full, tuned)
    alike = over_seeds(equal.map(lambda v: v["lora"] / v["lost"]))
    for seed, v in equal.best.items():
        rows.append(
            [
                f"full fine-tuning at a lower rate, where it has learned what tuned LoRA learns: seed {seed}, LoRA's own "
                f"there {number(v['lora'])} forgotten",
                rate(v["lr"]),
                *(number(v[k], 4) for k in ("test", "after", "before")),
                number(v["lost"]),
            ]
        )
    panel = Panel(
        "one point a rate, mean over seeds",
        "test NLL on the new task (nats)",
        "NLL on the pretraining task (nats)",
        series,
    )
    gates = gates_on([full, tuned])
    asked = len(a.best.keys() & b.best.keys())
    few = (
        [f"{alike.n} of {max(asked, MIN_SEEDS)} seed(s) with such a rate"]
        if alike.n < max(asked, MIN_SEEDS)
        else []
    )
    return (
        {"retention": (share, gates), "retention_equal": (alike, gates + few)},
        rows,
        panel if series else None,
    )


def _retained(row: pd.Series) -> dict[str, float]:
    if pd.isna(row["retain_nll"]):
        return {}
    return {
        "test": float(row["test_nll"]),
        "after": float(row["retain_nll"]),
        "before": float(row["retain_start"]),
        "lost": float(row["retain_nll"] - row["retain_start"]),
    }


def _frontier(table: pd.DataFrame, o: Optimum, seed: int | None = None) -> list[dict[str, float]]:
    """What a curve's finished runs learn and forget, mean over the seeds of a rate (or of one
    seed), by rising rate."""
    found: dict[float, list[dict[str, float]]] = {}
    for _, row in runs_of(table[table["status"] == "done"], o.curve).iterrows():
        if seed in (None, row["seed"]) and (retained := _retained(row)):
            found.setdefault(float(row["lr"]), []).append(retained)
    return [
        {"lr": lr, **{k: float(np.mean([v[k] for v in found[lr]])) for k in found[lr][0]}}
        for lr in sorted(found)
    ]


def _at_equal_learning(
    table: pd.DataFrame, full: Optimum, tuned: Optimum
) -> AtBest[dict[str, float]]:
    """What full fine-tuning forgets, by seed, at the rate up to its best at which its loss on the
    new task is tuned LoRA's of that seed. Seeds without such a rate are left out, and so are likely
    rates at which other seeds have one: which seeds have depends on what they learned."""
    (runs,) = values_at_best(table, [tuned], _retained)
    paths = {s: {v["lr"]: v for v in _frontier(table, full, s)} for s in runs.best}
    if full.best_lr.value is None:
        return AtBest({})

    def equal(by_seed: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        found = {
            s: _where_equal(paths[s], full.best_lr.value, mine)
            for s, mine in by_seed.items()
            if paths.get(s)
        }
        return {s: v for s, v in found.items() if v}

    best = equal(runs.best)
    return AtBest(
        best, tuple(w if w.keys() == best.keys() else {} for w in map(equal, runs.likely))
    )


def _where_equal(
    path: dict[float, dict[str, float]], best: float, mine: dict[str, float]
) -> dict[str, float]:
    """Return what full fine-tuning has learned and forgotten at the lowest rate up to its best at
    which its loss is that of `mine`, interpolated in ln(rate); empty if there is none."""
    tried = [math.log(lr) for lr in path]
    heights = {math.log(lr): v["test"] for lr, v in path.items()}
    before: dict[str, float] = {}
    for x in np.linspace(min(tried), math.log(best), STEPS):
        share = weights(tried, float(x), heights)
        here = {
            k: v
            for k, v in mixed({math.log(lr): v for lr, v in path.items()}, share).items()
            if k != "lr"
        }
        if here["test"] <= mine["test"]:
            return {**here, "lr": math.exp(x), "lora": mine["lost"]} if before else {}
        before = here
    return {}


def _bars(measured: dict[str, tuple[Estimate, list[str]]]) -> Panel:
    told = [(k, e) for k, (e, _) in measured.items() if k in RECIPES and e.value is not None]
    ends = ([getattr(e, k) for _, e in told] for k in ("value", "low", "high"))
    return Panel(
        "share of tuned LoRA's gain that is given up",
        "",
        "share",
        [Series("", range(len(told)), *ends, style="o", colour=1)],
        band=(-0.05, 0.05),
        ticks=[(float(i), RECIPES[k]) for i, (k, _) in enumerate(told)],
    )
