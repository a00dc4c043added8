"""Read and write tables of runs, check their columns, and turn every metric into a loss."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

REQUIRED = ("status", "model", "dataset", "method", "rank", "lr", "seed", "test_nll")
GROUP_KEYS = ("model", "dataset", "objective", "batch_size", "steps")
"""Arms are compared only between runs that agree in these columns."""
CURVE_KEYS = (
    *GROUP_KEYS,
    *("method", "rank", "alpha", "layers", "scope", "scaling_by", "init_scale", "lr_b_ratio"),
    *("start", "init_seed", "expert_rank", "expert_alpha", "expert_outer", "schedule"),
    *("warmup_steps", "precision", "beta1", "beta2", "eps", "weight_decay", "clip_norm"),
    *("group_size", "max_new_tokens", "reward_scale", "ratio_level", "clip_ratio", "kl_weight"),
    "early_stopping",
)
"""Runs that agree in these columns form one LR curve: they differ only in lr and seed."""
CUT_FROM = "cut_from_steps"
"""Column of runs cut to their first updates: the number of updates of the full run."""


class TableError(ValueError):
    """The table cannot be used by the analysis."""


def read(path: Path) -> pd.DataFrame:
    """Read a table that lorasweep wrote; TableError if missing. Others: `analysis.runs.reading`."""
    if not path.is_file():
        raise TableError(
            f"no table {path}. Give a .parquet or .csv file with columns {', '.join(REQUIRED)}."
        )
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except ValueError as error:
        raise TableError(f"{path} cannot be read as a table: {error}") from None
    check_columns(table)
    return table


def check_columns(table: pd.DataFrame) -> None:
    """Raise TableError if a column of REQUIRED is missing."""
    if missing := [c for c in REQUIRED if c not in table.columns]:
        raise TableError(
            f"the table has no column {', '.join(missing)}. It has: {', '.join(table.columns)}."
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write, which replaces `path` when it is written: a full disk leaves `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table of runs as strongly compressed parquet: results are long, similar JSON."""
    with whole(path) as part:
        table.to_parquet(part, index=False, compression="zstd", compression_level=12)


def check(table: pd.DataFrame) -> None:
    """Raise TableError unless a table can be analysed.

    A table is refused if columns are missing, a lora run has no rank, a run is repeated, a
    fingerprint of data is missing, or one name stands for different base weights or data.
    """
    check_columns(table)
    unranked = int(table.loc[table["method"] == "lora", "rank"].isna().sum())
    if unranked:
        raise TableError(f"{unranked} lora run(s) have no rank. Fill it in, or drop the runs.")
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    if len(twice := table[table.duplicated(keys, keep=False)]):
        raise TableError(
            f"{len(twice)} rows describe the same run twice (same model, method, ..., lr and seed),"
            f" first: lr {twice.iloc[0]['lr']:g}, seed {twice.iloc[0]['seed']}. Drop one of each, "
            "or give each its own seed."
        )

    def some(runs: pd.DataFrame) -> str:
        names = [str(v) for v in runs.get("run_id", runs.index)]
        return f"runs {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"

    for column, of in (("base_sha256", ["model"]), ("data_sha256", ["model", "dataset"])):
        if column not in table.columns or table[column].isna().all():
            continue
        if column == "data_sha256" and len(unknown := table[table[column].isna()]):
            raise TableError(
                f"{len(unknown)} of {len(table)} runs ({some(unknown)}) have no fingerprint of "
                "their data (column data_sha256). Train them again in a fresh run folder "
                "(exec.runs_dir=FOLDER), drop them, or drop the column if the table was not made "
                "by lorasweep."
            )
        for name, part in table.groupby(of):
            counts = part[column].value_counts()
            if len(counts) > 1:
                shown = ", ".join(f"{sha[:8]} in {n} runs" for sha, n in counts.items())
                fewest = some(part[part[column] == counts.index[-1]])
                raise TableError(
                    f"the runs of {' on '.join(map(repr, name))} have {len(counts)} different "
                    f"values of {column} ({shown}; {fewest}): other base weights or other data, "
                    "which cannot share a curve. Train the smaller part again, or give each its "
                    "own name."
                )


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
    which higher is better is negated, and its runs get the column COLLAPSED. Runs without a finite
    loss have diverged: others' tables have such. TableError if compared runs differ in metric.
    """
    if "metric" in table.columns and table["metric"].notna().any():
        objective = table["objective"].fillna("") if "objective" in table.columns else ""
        groups = [table["model"], table["dataset"], pd.Series(objective, table.index)]
        for (model, dataset, _), metrics in table["metric"].fillna(LOSS).groupby(groups):
            if metrics.nunique() > 1:
                raise TableError(
                    f"the runs of {model!r} on {dataset!r} are measured by several metrics "
                    f"({', '.join(sorted(metrics.unique()))}), which cannot share a curve. Analyse "
                    "them separately."
                )
        table = pd.DataFrame(map(_with_losses, table.to_dict("records")), index=table.index)
    lost = (table["status"] == "done") & ~np.isfinite(table[LOSS].astype(float))
    ended = {"status": table["status"].mask(lost, "diverged"), LOSS: table[LOSS].mask(lost)}
    return table.assign(**ended) if lost.any() else table


def _with_losses(row: dict[str, Any]) -> dict[str, Any]:
    """Return a run with its metric as a loss."""
    result = json.loads(row["result"])
    if (metric := result.get("metric")) is None:
        return row
    name, sign = metric["name"], -1.0 if metric["higher_is_better"] else 1.0
    of = ((LOSS, name), (f"{LOSS}_curve", f"{name}_curve"))

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        return values | {to: sign * values[k] for to, k in of if values.get(k) is not None}

    curve = [changed(point) for point in result.get("curve") or []]
    result = changed({**result, "curve": curve})
    start = curve[0].get(LOSS) if curve else None
    of_start = {} if start is None else {START: start}
    row = {**row, LOSS: result.get(LOSS), **of_start}
    if metric["higher_is_better"]:
        # Compare rewards on the same held-out rows. The last evaluation uses more rows; it also
        # records the loss on the rows of the earlier ones (`_curve`).
        rewards = [-p.get(f"{LOSS}_curve", p[LOSS]) for p in curve if p.get(LOSS) is not None]
        lost = bool(rewards) and rewards[-1] < COLLAPSED_SHARE * max(rewards)
        row[COLLAPSED] = row["status"] == "diverged" or lost
    return {**row, "result": json.dumps({**result, **of_start}, sort_keys=True)}


def collapsed(runs: pd.DataFrame) -> pd.Series:
    """Return for each run whether its reward collapsed; False without rewards."""
    return runs[COLLAPSED].eq(True) if COLLAPSED in runs else pd.Series(False, runs.index)
