"""Write the interactive report.

Python collects the numbers; `report.js` draws and filters them. Everything from a table reaches the
page as JSON data and is shown as text, never as markup.
"""

import importlib.resources
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, Verdict
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import learning_curves
from analysis.runs.table import CURVE_KEYS

_FIT_POINTS = 80
_DETAILS = (
    "run_id",
    "status",
    "model",
    "dataset",
    "method",
    "rank",
    "alpha",
    "layers",
    "scope",
    "batch_size",
    "lr",
    "seed",
    "steps",
    "schedule",
    "precision",
    "test_nll",
    "test_bpb",
    "nll_start",
    "train_nll",
    "n_trainable",
    "norm_a",
    "norm_b",
    "norm_delta",
    "wall_s",
    "base_sha256",
    "data_sha256",
)
"""Columns shown first for a run, if the table has them; the others follow, except _LONG."""
_LONG = ("spec", "result", "block")


def write(
    path: Path,
    title: str,
    table: pd.DataFrame,
    optima: Sequence[Optimum],
    ratios: Sequence[tuple[str, str, Estimate]] = (),
    verdicts: Sequence[Verdict] = (),
    within: float = 0.01,
) -> None:
    """Write the report.

    Args:
        table: the runs to which the optima were fitted, one per row, their metric as a loss.
        ratios: (group, name, LoRA / FullFT) for the forest plot.
        within: extra loss allowed in the low-regret band.
    """
    where = {_key(o.curve.key): k for k, o in enumerate(optima)}
    used = {k: _used(o) for k, o in enumerate(optima)}
    learned = learning_curves(table).query("step >= 1").dropna(subset="test_nll")
    points = {
        run: [list(p) for p in zip(c["step"].tolist(), c["test_nll"].tolist())]
        for run, c in learned.groupby("run")
    }
    data = {
        "title": title,
        "within": within,
        "curves": [_curve(o, within) for o in optima],
        "runs": [
            _run(row, points.get(run, []), where, used, optima)
            for run, row in zip(table.index, table.to_dict("records"))
        ],
        "ratios": [
            {"group": g, "name": n, "value": e.value, "low": e.low, "high": e.high}
            for g, n, e in ratios
        ],
        "verdicts": [_verdict(v) for v in verdicts],
    }
    path.write_text(_filled(data))


def _verdict(v: Verdict) -> dict[str, Any]:
    e = v.estimate
    return {
        **{k: getattr(v, k) for k in ("claim", "group", "why", "needed")},
        "outcome": v.shown,
        **{k: getattr(e, k) for k in ("value", "low", "high")},
        "margin": list(v.margin),
    }


def _filled(data: dict[str, Any]) -> str:
    """Fill the page's template with its data, style, code and library."""
    here = importlib.resources.files("analysis.report.interactive")
    page = here.joinpath("report.html").read_text()
    library = importlib.resources.files("plotly").joinpath("package_data/plotly.min.js").read_text()
    parts = {
        "STYLE": here.joinpath("report.css").read_text(),
        "LIBRARY": library,
        "DATA": _json(data),
        "REPORT": here.joinpath("report.js").read_text(),
    }
    # A single pass, so that text from the table that looks like a placeholder is not replaced.
    return re.sub(r"/\*(STYLE|LIBRARY|DATA|REPORT)\*/", lambda mark: parts[mark.group(1)], page)


def _json(value: Any) -> str:
    """Return JSON that is safe in a script element: it cannot end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
    )


def _curve(o: Optimum, within: float) -> dict[str, Any]:
    key, e, band, sign = o.curve.key, o.best_lr, o.band(within), o.curve.shown.sign
    x = o.curve.unbroken
    fit = None
    if o.shape is not None and len(x):
        lr = np.exp(np.linspace(x.min(), x.max(), _FIT_POINTS))
        fit = {
            "lr": [float(f"{v:.5g}") for v in lr],
            "nll": [float(f"{sign * v:.6g}") for v in o.predict(lr)],
        }
    best = o.best_nll
    return {
        "name": o.curve.name,
        "group": o.curve.group,
        "metric": o.curve.shown.label,
        "sign": sign,
        "model": str(key["model"]),
        "rank": _plain(key.get("rank")),
        "method": str(key["method"]),
        "batch_size": _plain(key.get("batch_size")),
        "best_lr": e.value,
        "low": e.low,
        "high": e.high,
        "best_nll": None if best is None or not math.isfinite(best) else sign * best,
        "flags": list(o.flags),
        "band": band,
        "fit": fit,
    }


def _key(key: dict[str, Any]) -> tuple:
    return tuple(sorted((k, "" if v is None or v != v else str(v)) for k, v in key.items()))


def _used(o: Optimum) -> set[float]:
    """Return the fitted rates, ln(lr) rounded."""
    return {round(float(v), 9) for v in o.curve.x[o.curve.usable]}


def _run(
    row: dict[str, Any],
    points: list[list[float]],
    where: dict[tuple, int],
    used: dict[int, set[float]],
    optima: Sequence[Optimum],
) -> dict[str, Any]:
    curve = where.get(_key({k: row[k] for k in CURVE_KEYS if k in row}))
    sign = 1 if curve is None else optima[curve].curve.shown.sign
    nll = _plain(row.get("test_nll"))
    fitted = (
        curve is not None
        and row["status"] == "done"
        and round(math.log(row["lr"]), 9) in used[curve]
    )
    shown = [
        *(k for k in _DETAILS if k in row),
        *(k for k in row if k not in _DETAILS and k not in _LONG),
    ]
    return {
        "curve": curve,
        "lr": float(row["lr"]),
        "seed": _plain(row.get("seed")),
        "status": str(row["status"]),
        "nll": None if nll is None else sign * nll,
        "fitted": fitted,
        "learned": [[step, sign * value] for step, value in points],
        "details": {k: _plain(row[k]) for k in shown if _plain(row[k]) is not None},
    }


def _plain(value: Any) -> Any:
    """Convert a value for JSON; NaN, infinity and missing become None."""
    if value is None or value is pd.NA or value != value:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | bool) else str(value)
