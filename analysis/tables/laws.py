"""The command `law` on a table of runs made by any program.

Fits the best rate as a law of the hidden size, by family, and LoRA's ratio to full fine-tuning as a
law of the hidden size and alpha.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import Estimate, number, rate, with_interval
from analysis.measures import lr_law
from analysis.measures.ratio import Ratio, ratio_law, ratio_of
from analysis.optimum.fit import fit_all
from analysis.report.text import aligned
from analysis.runs.lr_curves import lr_curves
from analysis.runs.reading import Reading
from analysis.runs.table import TableError
from analysis.tables.commands import arms_of


def law(reading: Reading, share: bool = False) -> dict[str, Any]:
    """Return the laws of the rate and of the ratio, and the regret of the published formula.

    The law of the rate is fitted by family, both by loss and by optima.

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
    for _, lora, full in arms_of(optima):
        known = [o for o in lora if o.best_lr.draws is not None]
        h, a = hidden.get(full.curve.key["model"]), lora[0].curve.key.get("alpha")
        if known and full.best_lr.draws is not None and h and a is not None and a == a:
            # One row per model and alpha: its ranks share full fine-tuning's curve.
            logs = np.log(ratio_of(known, full).draws)
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


HEAD = ("family", "method", "fitted by", "LR at hidden 2000 [95%]", "exponent p [95%]", "models")


def law_lines(result: dict[str, Any]) -> list[str]:
    """Format the laws for the terminal."""
    rows = [[*HEAD, "regret %", "flags"]]
    for how in ("by_loss", "by_optima"):
        for v in result[how]:
            at, p = _estimate(v["lr_at_2000"]), _estimate(v["p"])
            names = [v["family"], v["method"], how.replace("by_", "")]
            numbers = [with_interval(at, rate), with_interval(p), str(v["models"])]
            flags = ", ".join(v["flags"]) or "-"
            rows.append([*names, *numbers, number(v["regret_percent"]), flags])
    out = aligned(rows)
    costs = result["published_regret"]
    known = [c["percent"] for c in costs if c["percent"] is not None]
    if costs:
        mean = number(float(np.mean(known)) if known else None)
        out.append(
            f"published formula: regret {mean}% on average, at most "
            f"{number(max(known) if known else None)}%, over {len(known)} of {len(costs)} curves "
            "where its rate lies within those tried"
        )
    if result["ratio_law"]:
        out += _ratio_lines(result["ratio_law"])
    without = result["models_without_hidden_size"]
    if without:
        out.append(f"without a hidden size, left out: {', '.join(without)}")
    return out


def _estimate(plain: dict[str, Any]) -> Estimate:
    return Estimate(plain["value"], plain["low"], plain["high"])


def _ratio_lines(fitted: dict[str, Any]) -> list[str]:
    p, q, at = (with_interval(_estimate(fitted[k])) for k in ("p", "q", "ratio_at_1000_32"))
    flags = f"; {', '.join(fitted['flags'])}" if fitted["flags"] else ""
    out = [
        f"ratio = {at} x (hidden/1000)^p x (alpha/32)^q, p {p}, q {q} ({fitted['n']} ratios{flags})"
    ]
    for name, v in fitted["rivals"].items():
        test = "no test" if v is None else f"p {v:.2g}" + (" (rejected)" if v < 0.05 else "")
        out.append(f"  {name}: {test}")
    return out
