"""Tables of runs: read one and check its columns."""

from pathlib import Path

import pandas as pd

REQUIRED = ("status", "model", "dataset", "method", "rank", "lr", "seed", "test_nll")
GROUP_KEYS = ("model", "dataset", "batch_size", "steps")
"""What arms are compared under."""
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
"""Runs equal in these are one lr curve: they differ in lr and seed only."""


class TableError(ValueError):
    """A table that the analysis cannot use."""


def read(path: Path) -> pd.DataFrame:
    """Read a sweep's own table, as `action=export` or a report wrote it. Anyone else's:
    `analysis.runs.reading`."""
    if not path.is_file():
        raise TableError(
            f"no table {path}. Give a .parquet or .csv file with columns {', '.join(REQUIRED)}."
        )
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def check(table: pd.DataFrame) -> None:
    """Raise TableError if columns are missing or two different bases are mixed under one model
    name."""
    missing = [c for c in REQUIRED if c not in table.columns]
    if missing:
        raise TableError(
            f"the table has no column {', '.join(missing)}. It has: {', '.join(table.columns)}."
        )
    lora = table[table["method"] == "lora"]
    if lora["rank"].isna().any():
        raise TableError(
            f"{int(lora['rank'].isna().sum())} lora run(s) have no rank. Fill the column, or drop "
            "the runs."
        )
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    twice = table[table.duplicated(keys, keep=False)]
    if len(twice):
        raise TableError(
            f"{len(twice)} rows repeat one run (same model, method, ..., lr and seed), first: lr "
            f"{twice.iloc[0]['lr']:g}, seed {twice.iloc[0]['seed']}. Drop them, or give repeats "
            "seeds of their own."
        )
    if "base_sha256" in table.columns:
        for model, shas in table.dropna(subset=["base_sha256"]).groupby("model")["base_sha256"]:
            if shas.nunique() > 1:
                shown = ", ".join(sorted(s[:8] for s in shas.unique()))
                raise TableError(
                    f"the runs of model {model!r} start from {shas.nunique()} different bases "
                    f"(sha256 {shown}): two bases are never mixed in one curve. Retrain the "
                    "smaller part, or give the bases names of their own."
                )
