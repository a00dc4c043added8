"""Tables of runs: read one and check its columns."""

from pathlib import Path

import pandas as pd

REQUIRED = ("status", "model", "dataset", "method", "rank", "lr", "seed", "test_nll")
GROUP_KEYS = ("model", "dataset", "batch_size", "steps")
"""Arms are compared only between runs that agree in these."""
CURVE_KEYS = (
    *GROUP_KEYS,
    "method",
    "rank",
    "alpha",
    "layers",
    "scope",
    "scaling_by",
    "init_scale",
    "lr_b_ratio",
    "start",
    "init_seed",
    "schedule",
    "warmup_steps",
    "precision",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip_norm",
)
"""Runs that agree in these form one lr curve: they differ only in lr and seed."""


class TableError(ValueError):
    """The table cannot be used by the analysis."""


def read(path: Path) -> pd.DataFrame:
    """Read a sweep's own table, as written by `action=export` or by a report.

    Other people's tables are read by `analysis.runs.reading`.

    Raises:
        TableError: there is no such file.
    """
    if not path.is_file():
        raise TableError(
            f"no table {path}. Give a .parquet or .csv file with columns {', '.join(REQUIRED)}."
        )
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def check(table: pd.DataFrame) -> None:
    """Check that a table can be analysed.

    Raises:
        TableError: columns are missing, a lora run has no rank, a run is repeated, or one model
            name stands for different base weights.
    """
    missing = [c for c in REQUIRED if c not in table.columns]
    if missing:
        raise TableError(
            f"the table has no column {', '.join(missing)}. It has: {', '.join(table.columns)}."
        )
    lora = table[table["method"] == "lora"]
    if lora["rank"].isna().any():
        raise TableError(
            f"{int(lora['rank'].isna().sum())} lora run(s) have no rank. Fill it in, or drop the "
            "runs."
        )
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    twice = table[table.duplicated(keys, keep=False)]
    if len(twice):
        raise TableError(
            f"{len(twice)} rows describe the same run twice (same model, method, ..., lr and seed),"
            f" first: lr {twice.iloc[0]['lr']:g}, seed {twice.iloc[0]['seed']}. Drop one of each, "
            "or give each its own seed."
        )
    if "base_sha256" in table.columns:
        for model, shas in table.dropna(subset=["base_sha256"]).groupby("model")["base_sha256"]:
            if shas.nunique() > 1:
                shown = ", ".join(sorted(s[:8] for s in shas.unique()))
                raise TableError(
                    f"the runs of model {model!r} start from {shas.nunique()} different sets of "
                    f"base weights (sha256 {shown}), which cannot share a curve. Retrain the "
                    "smaller part, or give each base its own model name."
                )
