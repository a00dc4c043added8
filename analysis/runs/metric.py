"""Convert the metric of runs to a loss when a table is read.

So the rest of the analysis can assume that lower is better.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.table import TableError

LOSS, START = "test_nll", "nll_start"
"""Columns with the loss of a run, and of the model before training."""
COLLAPSED = "collapsed"
"""Column that `as_losses` adds for rewarded runs: whether a run collapsed."""
COLLAPSED_SHARE = 0.5
"""A rewarded run has collapsed if its last held-out reward is below this share of its best one. In
the sweep `rl`, runs that were stopped for divergence kept at most 0.30 of the best reward; other
runs kept at least 0.75."""


@dataclass(frozen=True)
class Shown:
    """How a loss is shown: the metric's name, and the sign that turns the loss back into it."""

    label: str = "test NLL (nats per token)"
    sign: int = 1
    """-1 if higher is better."""
    name: str = "NLL"
    """The metric in one word."""
    unit: str = " nats"


NLL = Shown()


def shown(runs: pd.DataFrame) -> Shown:
    """Return how to show the metric of these runs, which must share one metric."""
    if "metric" not in runs.columns or runs["metric"].isna().all():
        return NLL
    metric = json.loads(runs.dropna(subset="metric")["result"].iloc[0])["metric"]
    name = metric["label"].split()[-1]
    return Shown(metric["label"], -1 if metric["higher_is_better"] else 1, name, "")


def as_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with each run's metric as a loss, in all columns and its learning curve.

    A result names its metric and the direction, unless the metric is the held-out NLL. A metric of
    which higher is better is negated, and its runs get the column COLLAPSED. TableError if compared
    runs differ in metric.
    """
    if "metric" not in table.columns or table["metric"].isna().all():
        return _ended(table)
    objective = table["objective"].fillna("") if "objective" in table.columns else ""
    groups = [table["model"], table["dataset"], pd.Series(objective, table.index)]
    for (model, dataset, _), metrics in table["metric"].fillna(LOSS).groupby(groups):
        if metrics.nunique() > 1:
            raise TableError(
                f"the runs of {model!r} on {dataset!r} are measured by {metrics.nunique()} metrics "
                f"({', '.join(sorted(metrics.unique()))}), which cannot share a curve. Analyse "
                "them separately."
            )
    rows = []
    for row in table.to_dict("records"):
        result = json.loads(row["result"])
        metric = result.get("metric")
        if metric is None:
            rows.append(row)
            continue
        curve = [_with_loss(point, metric) for point in result.get("curve") or []]
        changed = _with_loss({**result, "curve": curve}, metric)
        start = curve[0].get(LOSS) if curve else None
        of_start = {} if start is None else {START: start}
        row = {**row, LOSS: changed.get(LOSS), **of_start}
        if metric["higher_is_better"]:
            # Compare rewards on the same held-out rows. The last evaluation uses more rows; it also
            # records the loss on the rows of the earlier ones (`_curve`).
            rewards = [-p.get(f"{LOSS}_curve", p[LOSS]) for p in curve if p.get(LOSS) is not None]
            lost = bool(rewards) and rewards[-1] < COLLAPSED_SHARE * max(rewards)
            row[COLLAPSED] = row["status"] == "diverged" or lost
        result = json.dumps({**changed, **of_start}, sort_keys=True)
        rows.append({**row, "result": result})
    return _ended(pd.DataFrame(rows, index=table.index))


def _ended(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with runs without a finite loss as diverged: others' tables have such."""
    lost = (table["status"] == "done") & ~np.isfinite(table[LOSS].astype(float))
    ended = {"status": table["status"].mask(lost, "diverged"), LOSS: table[LOSS].mask(lost)}
    return table.assign(**ended) if lost.any() else table


def _with_loss(values: dict[str, Any], metric: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the metric added as a loss, negated if higher is better."""
    name, sign = metric["name"], -1.0 if metric["higher_is_better"] else 1.0
    of = ((LOSS, name), (f"{LOSS}_curve", f"{name}_curve"))
    return values | {to: sign * values[k] for to, k in of if values.get(k) is not None}


def collapsed(runs: pd.DataFrame) -> pd.Series:
    """Return for each run whether its reward collapsed; False without rewards."""
    if COLLAPSED not in runs.columns:
        return pd.Series(False, runs.index)
    return runs[COLLAPSED].eq(True)
