"""Write the interactive report: one HTML file with its data and its plotting library inside.

Python collects the numbers; `templates/report.js` draws and filters them with plotly. Text from
a table is shown as text, never as markup.
"""

import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Verdict
from analysis.inference.estimate import Estimate
from analysis.optimum.fit import Optimum
from analysis.report.text import check_installed, plain, rendered
from analysis.runs.learning_curves import learning_curves
from analysis.runs.lr_curves import runs_of

NEEDED = ("plotly", "jinja2")
"""Packages that the page is made with."""
_FIT_POINTS = 80
_LONG = ("spec", "result", "block")
"""Columns that are not shown with a run."""


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
        table: runs to which the optima were fitted, one per row, with the metric as a loss.
        ratios: (group, name, LoRA / FullFT) for the forest plot.
        within: extra loss allowed in the low-regret band.

    Raises:
        TableError: plotly or jinja2 is not installed.
    """
    check_installed("the interactive page", *NEEDED)
    learned = learning_curves(table).query("step >= 1").dropna(subset="test_nll")
    points = {
        run: list(zip(c["step"].tolist(), c["test_nll"].tolist()))
        for run, c in learned.groupby("run")
    }
    where = {run: k for k, o in enumerate(optima) for run in runs_of(table, o.curve).index}
    used = [{round(float(v), 9) for v in o.curve.x[o.curve.usable]} for o in optima]
    runs = []
    for run, row in zip(table.index, table.to_dict("records")):
        curve = where.get(run)
        sign = 1 if curve is None else optima[curve].curve.shown.sign
        nll, is_used = plain(row.get("test_nll")), False
        if curve is not None and row["status"] == "done":
            is_used = round(math.log(row["lr"]), 9) in used[curve]
        details = {k: plain(v) for k, v in row.items() if k not in _LONG}
        runs.append(
            {
                "curve": curve,
                "lr": float(row["lr"]),
                "seed": plain(row.get("seed")),
                "status": str(row["status"]),
                "nll": None if nll is None else sign * nll,
                "fitted": is_used,
                "learned": [[step, sign * value] for step, value in points.get(run, ())],
                "details": {k: v for k, v in details.items() if v is not None},
            }
        )
    data = {
        "title": title,
        "within": within,
        "curves": [_curve(o, within) for o in optima],
        "runs": runs,
        "ratios": [
            {"group": g, "name": n, "value": e.value, "low": e.low, "high": e.high}
            for g, n, e in ratios
        ],
        "verdicts": [
            {
                **{k: getattr(v, k) for k in ("claim", "group", "why", "needed")},
                "outcome": v.shown,
                **{k: getattr(v.estimate, k) for k in ("value", "low", "high")},
                "margin": list(v.margin),
            }
            for v in verdicts
        ],
    }
    files = importlib.resources.files
    library = files("plotly").joinpath("package_data/plotly.min.js").read_text()
    style, code = (
        files("analysis.report").joinpath("templates", name).read_text()
        for name in ("report.css", "report.js")
    )
    page = rendered("report.html", data=data, style=style, code=code, library=library)
    path.write_text(page)


def _curve(o: Optimum, within: float) -> dict[str, Any]:
    key, e, sign, x = o.curve.key, o.best_lr, o.curve.shown.sign, o.curve.unbroken
    fit: dict[str, list[float]] | None = None
    best = o.best_nll
    if o.shape is not None and len(x):
        lr = np.exp(np.linspace(x.min(), x.max(), _FIT_POINTS))
        fit = {
            "lr": [float(f"{v:.5g}") for v in lr],
            "nll": [float(f"{sign * v:.6g}") for v in o.predict(lr)],
        }
    return {
        **{"name": o.curve.name, "group": o.curve.group, "metric": o.curve.shown.label},
        **{"sign": sign, "model": str(key["model"]), "rank": plain(key.get("rank"))},
        **{"method": str(key["method"]), "batch_size": plain(key.get("batch_size"))},
        **{"best_lr": e.value, "low": e.low, "high": e.high},
        "best_nll": None if best is None or not math.isfinite(best) else sign * best,
        **{"flags": list(o.flags), "band": o.band(within), "fit": fit},
    }
