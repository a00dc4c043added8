"""Compute the result of each command as plain values, and format it for the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.inference.estimate import number, rate, row_interval
from analysis.measures.ratio import (
    MIN_RANK,
    Ratio,
    by_loss,
    gaps,
    lr_drift,
    pool_ratios,
    published,
    ratio_law,
    ratio_of,
    regret,
)
from analysis.optimum.fit import WITHIN, Optimum, fit_all
from analysis.optimum.valley import lowest_loss, rate_means
from analysis.questions.base import by_group, by_variant, lora_of
from analysis.report import interactive
from analysis.report.text import aligned, plain
from analysis.runs.lr_curves import lr_curves
from analysis.runs.reading import Reading
from analysis.runs.table import LOSS, NLL, Shown, TableError


def lines(result: Any, command: str = "", within: float = WITHIN) -> list[str]:
    """Format a command's result for the terminal: rows in columns, other values by name.

    The keys `low` and `high` join the key before them. `within`: see fit.
    """
    if command in ("fit", "ratio"):
        return _fit_lines(result, within) if command == "fit" else _ratio_lines(result)
    if isinstance(result, dict):
        parts = {f"{k}:": v for k, v in result.items()}
        shown = (
            (k, lines(v)) if _is_rows(v) else (f"{k} {_cell(v)}", []) for k, v in parts.items()
        )
        return [line for head, rows in shown for line in (head, *rows)]
    return aligned(table(result))


def _fit_lines(rows: Sequence[dict[str, Any]], within: float) -> list[str]:
    """Format one line per curve: its name in one cell, learning rates as 1.23e-3."""
    head = ["model", "data", "curve", "runs", "best LR [95%]", "best", f"within {within:g}"]
    out = [[*head, "flags"]]
    for r in rows:
        size = r["batch_size"] and f"batch {r['batch_size']}"
        words = [r["method"], r["rank"] and f"r{r['rank']}", r["layers"], size]
        best, band = row_interval(r, "best_lr", rate), " to ".join(map(rate, r["band"] or [None]))
        cells = [r["model"], r["dataset"], " ".join(filter(None, words)), r["n"], best]
        out.append(list(map(_cell, [*cells, r["best_nll"], band, r["flags"]])))
    return aligned(out)


def _ratio_lines(result: dict[str, Any]) -> list[str]:
    out = [["model and data", "rank", "ratio [95%]", "gap", "flags"]]
    for r in result["ratios"]:
        numbers = [_cell(r["rank"]), row_interval(r, "ratio"), number(r["gap"])]
        out.append([r["group"], *numbers, _cell(r["flags"])])
    if not (p := result["pooled"]):
        return aligned(out)
    text = (
        f"pooled over {p['groups']} groups (ranks of {MIN_RANK} and more, where there are such): "
        f"{row_interval(p, 'ratio')}; standard deviation between groups: a factor "
        f"{number(p['spread'])}; prediction interval for another group: "
        f"[{number(p['low_next'])}, {number(p['high_next'])}]"
    )
    return [*aligned(out), text]


def table(rows: Sequence[dict[str, Any]], *names: str) -> list[list[str]]:
    """Return the named values of rows as text (default: those that any row has), after a head."""
    cells = list(map(_cells, rows))
    names = names or tuple(k for k in (cells or [{}])[0] if any(row[k] != "-" for row in cells))
    head = [name.replace("_", " ") for name in names]
    return [head, *([row[k] for k in names] for row in cells)]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Format the values of a row."""
    valued = dict(zip(list(row)[1:], row)).get("low")
    kept = [k for k in row if k not in ("low", "high")]
    return {k: row_interval(row, k) if k == valued else _cell(row[k]) for k in kept}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        cells = _cells(value)
        named = (f"{k} {v}" for k, v in cells.items())
        if "value" in value or len(cells) == 1:
            return row_interval(value) if "value" in value else next(iter(cells.values()))
        return ", ".join(named)
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "-"
    return number(value, 4) if isinstance(value, float) or value is None else str(value)


def _whole(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


def optima_of(reading: Reading, share: bool = False) -> list[Optimum]:
    """Fit every curve of a table, with noise and misfit pooled over the table."""
    name = reading.metric
    shown = NLL if name == LOSS else Shown(name, reading.sign, name, "")
    curves = [replace(c, shown=shown) for c in lr_curves(reading.table)]
    return fit_all(curves, share=share)


def fit(reading: Reading, share: bool = False, within: float = WITHIN) -> list[dict[str, Any]]:
    """Return one object per curve: the optimum with interval or bound, and the low-regret band.

    `within`: extra loss allowed in the band, in units of the metric. `share`: see fit_all.
    """
    rows = []
    for o in optima_of(reading, share):
        key, e, band = o.curve.key, o.best_lr, o.band(within)
        rows.append(
            {
                **{k: key[k] for k in ("model", "method")},
                "dataset": key.get("dataset"),
                **{k: _whole(key.get(k)) for k in ("rank", "batch_size")},
                **{k: plain(key.get(k)) for k in ("layers", "alpha")},
                **{"n": len(o.curve.x), "n_usable": int(o.curve.usable.sum())},
                **{"best_lr": e.value, "low": e.low, "high": e.high},
                "best_nll": None if o.best_nll is None else o.best_nll * reading.sign,
                **{"metric": reading.metric, "flags": list(o.flags)},
                "band": None if band is None else list(band),
            }
        )
    return rows


def ratio(reading: Reading, share: bool = False) -> dict[str, Any]:
    """Return LoRA's best LR / full fine-tuning's, by group and rank, and pooled over groups.

    Pooled are the ranks of MIN_RANK and more; of groups without these, all ranks. The pooled value
    has the standard deviation between groups (a factor) and the interval for another group.

    Raises:
        TableError: the table lacks an arm.
    """
    rows, overall = [], []
    optima = optima_of(reading, share)
    arms = {o.curve.key["method"] for o in optima}
    for arm, how in (("fullft", "rows with an empty rank"), ("lora", "rows with a rank")):
        if arm not in arms:
            raise TableError(
                f"the table has no {arm} run ({how}), which a ratio needs. "
                f"It has: {', '.join(sorted(arms))}. For one arm, use `fit`."
            )
    groups = arms_of(optima)
    for group, lora, full in groups:
        for o, g in zip(lora, gaps(lora, full)):
            e, key = ratio_of([o], full), o.curve.key
            rows.append(
                {
                    **{"group": group, "rank": _whole(key.get("rank"))},
                    "alpha": plain(key.get("alpha")),
                    **{"ratio": e.value, "low": e.low, "high": e.high},
                    "gap": None if g.value is None else g.value * reading.sign,
                    "flags": sorted({*o.flags, *full.flags}),
                }
            )
        overall.append(ratio_of(lora_of(lora, MIN_RANK) or lora, full))
    # Variants share full fine-tuning's curve, so their ratios are not independent.
    independent = len({id(full) for _, _, full in groups}) == len(overall)
    p = pool_ratios(overall) if independent else None
    pooled = p and {
        **{"ratio": math.exp(p.mean), "low": math.exp(p.low), "high": math.exp(p.high)},
        **{"groups": p.k, "spread": math.exp(p.tau), "i2": p.i2},
        **{"low_next": math.exp(p.low_next), "high_next": math.exp(p.high_next)},
    }
    return {"ratios": rows, "pooled": pooled, "metric": reading.metric}


def arms_of(optima: Sequence[Optimum]) -> list[tuple[str, list[Optimum], Optimum]]:
    """Return (group, LoRA's curves, full fine-tuning's curve) for each group and variant of LoRA.

    TableError if a group has more than one curve of full fine-tuning.
    """
    out = []
    for group, members in by_group(optima).items():
        full = [o for o in members if o.curve.key["method"] == "fullft"]
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} full fine-tuning curves (they differ in scope, schedule or "
                "precision), but a ratio needs one. Keep one per table."
            )
        lora = by_variant(lora_of(members), group) if full else {}
        out += [(name, curves, full[0]) for name, curves in lora.items()]
    return out


def drifts(reading: Reading, share: bool = False) -> list[dict[str, Any]]:
    """Return each group's slope of ln(best LR) over log2(rank), and the best LR tried by rank.

    TableError if the table has no lora run.
    """
    groups: dict[str, list[Optimum]] = {}
    for group, mine in by_group(lora_of(optima_of(reading, share))).items():
        groups |= by_variant(mine, group)
    if not groups:
        raise TableError(
            "the table has no lora run (rows with a rank), which a drift with the rank needs."
        )
    rows = []
    for group, members in groups.items():
        members = sorted(members, key=lambda o: o.curve.key["rank"])
        known = [o for o in members if o.best_lr.draws is not None]
        d = lr_drift(known)
        tried = {int(o.curve.key["rank"]): rate_means(o.curve) for o in members}
        best = [math.exp(x[lowest_loss(y)]) if len(x) else None for x, y in tried.values()]
        left_out = ["ranks at an edge left out"] if 2 <= len(known) < len(members) else []
        rows.append(
            {
                "group": group,
                **{"slope": d.slope.value, "low": d.slope.low, "high": d.slope.high},
                **{"p_slope": d.p_slope, "p_equal": d.p_equal},
                **{"ranks": list(tried), "best_tried": best},
                **{"known": len(known), "bounds": len(members) - len(known)},
                "flags": [*d.slope.flags, *left_out],
            }
        )
    return rows


def law(reading: Reading, share: bool = False) -> dict[str, Any]:
    """Fit power laws of the LR and of the ratio; return them and the published formula's regret.

    The law of the LR is fitted to the losses of each model family.
    TableError without hidden sizes.
    """
    table = reading.table
    if "hidden_size" not in table.columns or not table["hidden_size"].notna().any():
        raise TableError(
            "the law needs a column hidden_size (the model's width). Add it, or map it: "
            "--map d_model=hidden_size."
        )
    widths = table.dropna(subset=["hidden_size"]).groupby("model")["hidden_size"]
    hidden = widths.first().astype(float).to_dict()
    curves, costs = lr_curves(table), []
    optima = fit_all(curves, share=share)
    for c in curves:
        lr = published(c, hidden.get(c.key["model"], math.nan))
        if lr is not None:
            cost = {"lr": lr, "percent": regret(c, lr)}
            costs.append({"model": c.key["model"], "curve": c.name, **cost})
    log_ratios = []
    for _, lora, full in arms_of(optima):
        judged = lora_of(lora, MIN_RANK) or lora
        known = [o for o in judged if o.best_lr.draws is not None]
        h, a = hidden.get(full.curve.key["model"]), lora[0].curve.key.get("alpha")
        if known and full.best_lr.draws is not None and h and a is not None and a == a:
            # One row per model and alpha, because ranks share full fine-tuning's curve.
            logs, model = np.log(ratio_of(known, full).draws), full.curve.key["model"]
            log_ratios.append(Ratio(model, h, float(a), float(logs.mean()), float(logs.std())))
    fitted = ratio_law(log_ratios) if len(log_ratios) >= 2 else None
    return {
        "by_loss": [v.plain() for v in by_loss(curves, hidden)],
        "published_regret": costs,
        "ratio_law": fitted
        and {
            "ratio_at_1000_32": fitted.at_reference.plain(),
            **{"p": fitted.p.plain(), "q": fitted.q.plain()},
            **{"spread": math.exp(fitted.tau), "rivals": fitted.rivals},
            **{"flags": list(fitted.flags), "n": len(log_ratios)},
        },
        "models_without_hidden_size": sorted(set(table["model"]) - set(hidden)),
    }


COMMANDS: dict[str, Callable[..., Any]] = {"fit": fit, "ratio": ratio, "drift": drifts, "law": law}


def html(reading: Reading, path: Path, within: float = WITHIN, share: bool = False) -> None:
    """Write an interactive page about a table of runs."""
    optima = optima_of(reading, share)
    arms = [(g, o, full) for g, lora, full in arms_of(optima) for o in lora]
    ratios = [(group, o.curve.name, ratio_of([o], full)) for group, o, full in arms]
    title = f"{path.stem}: {len(reading.table)} runs"
    interactive.write(path, title, reading.table, optima, ratios, (), within)
