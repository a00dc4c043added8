"""Read and write tables of runs, and check their columns."""

from pathlib import Path

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
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table of runs as strongly compressed parquet: results are long, similar JSON."""
    table.to_parquet(path, index=False, compression="zstd", compression_level=12)


def check(table: pd.DataFrame) -> None:
    """Raise TableError unless a table can be analysed.

    A table is refused if columns are missing, a lora run has no rank, a run is repeated, a
    fingerprint of data is missing, or one name stands for different base weights or data.
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
    by_id = "run_id" in table.columns

    def some(runs: pd.DataFrame) -> str:
        names = [str(v) for v in (runs["run_id"] if by_id else runs.index)]
        more = ", ..." if len(names) > 3 else ""
        return f"{'runs' if by_id else 'rows'} {', '.join(names[:3])}{more}"

    for column, of in (("base_sha256", ["model"]), ("data_sha256", ["model", "dataset"])):
        if column not in table.columns or table[column].isna().all():
            continue
        unknown = table[column].isna() & (column == "data_sha256")
        if unknown.any():
            raise TableError(
                f"{int(unknown.sum())} of {len(table)} runs ({some(table[unknown])}) have no "
                "fingerprint of their data (column data_sha256). Train them again in a fresh run "
                "folder (exec.runs_dir=FOLDER), or drop these runs, or drop the column if the "
                "table was not made by lorasweep."
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
