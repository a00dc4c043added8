"""The analysis on anyone's runs: what `fit`, `ratio`, `drift` and `law` print of a table, and their
JSON.

Takes a Reading and returns rows; reads no file and prints nothing.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.inference.estimate import Estimate, number, rate, with_interval
from analysis.inference.meta import Drift, drift
from analysis.measures import lr_law
from analysis.measures.ratio import gap, pool_ratios, ratio_of
from analysis.measures.ratio_law import Ratio, ratio_law
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.report.interactive import page
from analysis.report.text import aligned, plain
from analysis.runs.lr_curves import LrCurve, lr_curves
from analysis.runs.reading import Reading
from analysis.runs.table import TableError

WITHIN = 0.01
"""Loss, in units of the metric, within which a rate belongs to the low-regret band."""


def optima_of(reading: Reading, share: bool = False) -> list[Optimum]:
    """Fit every curve of a table; noise and misfit are pooled over it."""
    return fit_all(lr_curves(reading.table), share=share)


def fit(reading: Reading, within: float = WITHIN, share: bool = False) -> list[dict[str, Any]]:
    """Return one object a curve: the optimum with its interval, or the bound, and the low-regret
    band."""
    return [_fitted(o, within, reading) for o in optima_of(reading, share)]


def _fitted(o: Optimum, within: float, reading: Reading) -> dict[str, Any]:
    key, e, band = o.curve.key, o.best_lr, o.band(within)
    best = None if o.best_nll is None else o.best_nll * reading.sign
    return {
        "model": key["model"],
        "dataset": key.get("dataset"),
        "method": key["method"],
        "rank": _int(key.get("rank")),
        "layers": plain(key.get("layers")),
        "batch_size": _int(key.get("batch_size")),
        "alpha": plain(key.get("alpha")),
        "n": len(o.curve.x),
        "n_usable": int(o.curve.usable.sum()),
        "best_lr": e.value,
        "low": e.low,
        "high": e.high,
        "best_nll": best,
        "metric": reading.metric,
        "flags": list(o.flags),
        "band": None if band is None else list(band),
    }


def _int(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


def fit_lines(rows: Sequence[dict[str, Any]], within: float = WITHIN) -> list[str]:
    """Write the fits for the terminal, one line a curve."""
    head = [
        "model",
        "data",
        "curve",
        "runs",
        "best LR [95%]",
        "best",
        f"within {within:g}",
        "flags",
    ]
    out = [head]
    for r in rows:
        name = (
            r["method"]
            + (f" r{r['rank']}" if r["rank"] else "")
            + (f" {r['layers']}" if r["layers"] else "")
        )
        name += f" batch {r['batch_size']}" if r["batch_size"] else ""
        best = Estimate(r["best_lr"], r["low"], r["high"])
        band = "-" if r["band"] is None else f"{rate(r['band'][0])} to {rate(r['band'][1])}"
        out.append(
            [
                str(r["model"]),
                str(r["dataset"]),
                name,
                str(r["n"]),
                with_interval(best, rate),
                number(r["best_nll"], 4),
                band,
                ", ".join(r["flags"]) or "-",
            ]
        )
    return aligned(out)


# ---------------------------------------------------------------- ratio and drift


def ratio(reading: Reading, share: bool = False) -> dict[str, Any]:
    """Return LoRA's best rate over full fine-tuning's, by group and rank, and pooled over groups.

    Raises:
        TableError: an arm is missing everywhere.
    """
    rows, overall = [], []
    optima = optima_of(reading, share)
    arms = {o.curve.key["method"] for o in optima}
    for arm, how in (("fullft", "rows with an empty rank"), ("lora", "rows with a rank")):
        if arm not in arms:
            raise TableError(
                f"the table has no {arm} run ({how}), so there is no ratio. It has: {', '.join(sorted(arms))}. "
                "Use `fit` for one arm."
            )
    for group, lora, full in _arms(optima):
        for o in lora:
            e = ratio_of([o], full)
            g = gap(o, full)
            rows.append(
                {
                    "group": group,
                    "rank": _int(o.curve.key.get("rank")),
                    "alpha": plain(o.curve.key.get("alpha")),
                    **_ends(e),
                    "gap": None if g.value is None else g.value * reading.sign,
                    "flags": sorted({*o.flags, *full.flags}),
                }
            )
        overall.append(ratio_of(lora, full))
    independent = len({id(full) for _, _, full in _arms(optima)}) == len(
        overall
    )  # variants share full fine-tuning's curve
    pooled = pool_ratios(overall) if independent else None
    told = (
        None
        if pooled is None
        else {
            "ratio": math.exp(pooled.mean),
            "low": math.exp(pooled.low),
            "high": math.exp(pooled.high),
            "groups": pooled.k,
            "spread": math.exp(pooled.tau),
            "i2": pooled.i2,
            "low_next": math.exp(pooled.low_next),
            "high_next": math.exp(pooled.high_next),
        }
    )
    return {"ratios": rows, "pooled": told, "metric": reading.metric}


def _ends(e: Estimate) -> dict[str, float | None]:
    return {"ratio": e.value, "low": e.low, "high": e.high}


def _arms(optima: Sequence[Optimum]) -> list[tuple[str, list[Optimum], Optimum]]:
    groups: dict[str, list[Optimum]] = {}
    for o in optima:
        groups.setdefault(o.curve.group, []).append(o)
    out = []
    for group, members in groups.items():
        full = [o for o in members if o.curve.key["method"] == "fullft"]
        variants: dict[str, list[Optimum]] = {}
        for o in members:
            if o.curve.key["method"] == "lora":
                variants.setdefault(o.curve.variant, []).append(o)
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} full fine-tuning curves (they differ in scope, schedule or precision); "
                "keep one a table."
            )
        for variant, lora in variants.items():
            if full:
                out.append((group if len(variants) == 1 else f"{group}; {variant}", lora, full[0]))
    return out


def ratio_lines(told: dict[str, Any]) -> list[str]:
    """Write the ratios for the terminal."""
    rows = [["model and data", "rank", "ratio [95%]", "gap", "flags"]]
    for r in told["ratios"]:
        rows.append(
            [
                r["group"],
                str(r["rank"]),
                with_interval(Estimate(r["ratio"], r["low"], r["high"])),
                number(r["gap"]),
                ", ".join(r["flags"]) or "-",
            ]
        )
    out = aligned(rows)
    if told["pooled"]:
        p = told["pooled"]
        out.append(
            f"pooled over {p['groups']} groups: {number(p['ratio'])} [{number(p['low'])}, {number(p['high'])}]; "
            f"groups spread by a factor {number(p['spread'])}, the next would lie in [{number(p['low_next'])}, "
            f"{number(p['high_next'])}]"
        )
    return out


def drifts(reading: Reading, share: bool = False) -> list[dict[str, Any]]:
    """Return how the best rate moves with the rank, per group: slope with interval and tests, and
    the tried rates."""
    groups: dict[str, list[Optimum]] = {}
    lora = [o for o in optima_of(reading, share) if o.curve.key["method"] == "lora"]
    several = len({o.curve.variant for o in lora}) > 1
    for o in lora:
        groups.setdefault(
            f"{o.curve.group}; {o.curve.variant}" if several else o.curve.group, []
        ).append(o)
    if not groups:
        raise TableError(
            "the table has no lora run (rows with a rank), so there is no drift with the rank."
        )
    rows = []
    for group, members in groups.items():
        members = sorted(members, key=lambda o: o.curve.key["rank"])
        known = [o for o in members if o.best_lr.draws is not None]
        d = drift(
            [o.curve.key["rank"] for o in known],
            [np.log(o.best_lr.draws) for o in known],
            sum(o.best_lr.n for o in known),
        )
        tried = {int(o.curve.key["rank"]): _best_tried(o.curve) for o in members}
        rows.append(
            {
                "group": group,
                "slope": d.slope.value,
                "low": d.slope.low,
                "high": d.slope.high,
                "p_slope": d.p_slope,
                "p_equal": d.p_equal,
                "ranks": list(tried),
                "best_tried": list(tried.values()),
                "known": len(known),
                "bounds": len(members) - len(known),
                "flags": _drift_flags(d, members, known),
            }
        )
    return rows


def _drift_flags(d: Drift, members: Sequence[Optimum], known: Sequence[Optimum]) -> list[str]:
    return [
        *d.slope.flags,
        *(["ranks at an edge left out"] if 2 <= len(known) < len(members) else []),
    ]


def _best_tried(curve: LrCurve) -> float | None:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        return None
    return math.exp(min(np.unique(x), key=lambda v: y[x == v].mean()))


def drift_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the drifts for the terminal."""
    out = [
        [
            "model and data",
            "ranks: best tried LR",
            "slope of ln LR a doubling [95%]",
            "p (no slope)",
            "p (equal)",
            "flags",
        ]
    ]
    for r in rows:
        tried = ", ".join(
            f"{k}: {v:g}" if v else f"{k}: -" for k, v in zip(r["ranks"], r["best_tried"])
        )
        out.append(
            [
                r["group"],
                tried,
                with_interval(Estimate(r["slope"], r["low"], r["high"])),
                number(r["p_slope"], 2),
                number(r["p_equal"], 2),
                ", ".join(r["flags"]) or "-",
            ]
        )
    return aligned(out)


def html(reading: Reading, path: Path, within: float = WITHIN, share: bool = False) -> None:
    """Write the interactive page of a table."""
    optima = optima_of(reading, share)
    ratios = [
        (group, o.curve.name, ratio_of([o], full))
        for group, lora, full in _arms(optima)
        for o in lora
    ]
    metric = "test NLL (nats per token)" if reading.metric == "test_nll" else reading.metric
    page.write(
        path,
        f"{path.stem}: {len(reading.table)} runs",
        reading.table,
        optima,
        ratios,
        (),
        within,
        metric,
        reading.sign,
    )


# ---------------------------------------------------------------- laws


def law(reading: Reading, share: bool = False) -> dict[str, Any]:
    """Return the law of the rate by family, fitted both ways, its published constants' regret, and
    the ratio's law.

    Raises:
        TableError: no model has a hidden size.
    """
    table = reading.table
    if "hidden_size" not in table.columns or not table["hidden_size"].notna().any():
        raise TableError(
            "the law needs a column hidden_size (the model's width). Add it, or map it: "
            "--map d_model=hidden_size."
        )
    hidden = (
        table.dropna(subset=["hidden_size"])
        .groupby("model")["hidden_size"]
        .first()
        .astype(float)
        .to_dict()
    )
    parts = lr_curves(table)
    optima = fit_all(parts, share=share)
    costs = []
    for c in parts:
        lr = lr_law.published(c, hidden.get(c.key["model"], math.nan))
        if lr is not None:
            costs.append(
                {
                    "model": c.key["model"],
                    "curve": c.name,
                    "lr": lr,
                    "percent": lr_law.regret(c, lr).percent,
                }
            )
    log_ratios = []
    for _, lora, full in _arms(optima):
        known = [o for o in lora if o.best_lr.draws is not None]
        h, a = hidden.get(full.curve.key["model"]), lora[0].curve.key.get("alpha")
        if known and full.best_lr.draws is not None and h and a is not None and a == a:
            logs = np.log(
                ratio_of(known, full).draws
            )  # one row a model and alpha: its ranks share full fine-tuning's curve
            log_ratios.append(
                Ratio(full.curve.key["model"], h, float(a), float(logs.mean()), float(logs.std()))
            )
    return {
        "by_loss": [_law(v) for v in lr_law.by_loss(parts, hidden)],
        "by_optima": [_law(v) for v in lr_law.by_optima(optima, hidden)],
        "published_regret": costs,
        "ratio_law": _ratio_law(log_ratios),
        "models_without_hidden_size": sorted(set(table["model"]) - set(hidden)),
    }


def _law(v: lr_law.Law) -> dict[str, Any]:
    return {
        "family": v.family,
        "method": v.method,
        "lr_at_2000": v.at_2000.plain(),
        "p": v.p.plain(),
        "models": v.n_models,
        "regret_percent": v.regret,
        "flags": list(v.flags),
    }


def _ratio_law(rows: Sequence[Ratio]) -> dict[str, Any] | None:
    if len(rows) < 2:
        return None
    fitted = ratio_law(rows)
    return {
        "ratio_at_1000_32": fitted.at_reference.plain(),
        "p": fitted.p.plain(),
        "q": fitted.q.plain(),
        "spread": math.exp(fitted.tau),
        "rivals": fitted.rivals,
        "flags": list(fitted.flags),
        "n": len(rows),
    }


def law_lines(told: dict[str, Any]) -> list[str]:
    """Write the laws for the terminal."""
    rows = [
        [
            "family",
            "method",
            "fitted by",
            "LR at hidden 2000 [95%]",
            "exponent p [95%]",
            "models",
            "regret %",
            "flags",
        ]
    ]
    for how in ("by_loss", "by_optima"):
        for v in told[how]:
            at, p = (
                Estimate(v[k]["value"], v[k]["low"], v[k]["high"]) for k in ("lr_at_2000", "p")
            )
            rows.append(
                [
                    v["family"],
                    v["method"],
                    how.replace("by_", ""),
                    with_interval(at, rate),
                    with_interval(p),
                    str(v["models"]),
                    number(v["regret_percent"]),
                    ", ".join(v["flags"]) or "-",
                ]
            )
    out = aligned(rows)
    known = [c["percent"] for c in told["published_regret"] if c["percent"] is not None]
    if told["published_regret"]:
        out.append(
            f"published formula: regret {number(float(np.mean(known)) if known else None)}% on average, at most "
            f"{number(max(known) if known else None)}%, over {len(known)} of {len(told['published_regret'])} curves "
            "where its rate lies within those tried"
        )
    law_ = told["ratio_law"]
    if law_:
        p, q, at = (
            Estimate(law_[k]["value"], law_[k]["low"], law_[k]["high"])
            for k in ("p", "q", "ratio_at_1000_32")
        )
        out.append(
            f"ratio = {with_interval(at)} x (hidden/1000)^p x (alpha/32)^q, p {with_interval(p)}, q {with_interval(q)}"
            f" ({law_['n']} ratios{'; ' + ', '.join(law_['flags']) if law_['flags'] else ''})"
        )
        out += [
            f"  {name}: {'no test' if v is None else f'p {v:.2g}' + (' (out)' if v < 0.05 else '')}"
            for name, v in law_["rivals"].items()
        ]
    if told["models_without_hidden_size"]:
        out.append(
            f"without a hidden size, left out: {', '.join(told['models_without_hidden_size'])}"
        )
    return out
