"""Tables of runs: read one and check its columns."""

from pathlib import Path

import pandas as pd

REQUIRED = ("status", "model", "dataset", "method", "rank", "lr", "seed", "test_nll")
GROUP_KEYS = ("model", "dataset", "objective", "batch_size", "steps")
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
    "expert_rank",
    "expert_alpha",
    "expert_outer",
    "schedule",
    "warmup_steps",
    "precision",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip_norm",
    "group_size",
    "max_new_tokens",
    "reward_scale",
    "ratio_level",
    "clip_ratio",
    "kl_weight",
)
"""Runs that agree in these form one lr curve: they differ only in lr and seed."""
CUT_FROM = "cut_from_steps"
"""Column of runs that were cut to their first updates: the updates of the whole run."""


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
        TableError: columns are missing, a lora run has no rank, a run is repeated, one model name
            stands for different base weights, or one data set's name for different data.
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
    if "data_sha256" in table.columns:
        _check_data(table)


def _check_data(table: pd.DataFrame) -> None:
    """Check the fingerprints of the data.

    A model and a data set have one; tokens are the model's. Within a curve none is mixed with an
    unknown one, of a run from before results had it.

    Raises:
        TableError: two are mixed.
    """
    for (model, dataset), part in table.groupby(["model", "dataset"]):
        counts = part["data_sha256"].value_counts()
        if len(counts) > 1:
            shown = ", ".join(f"{sha[:8]} in {n} runs" for sha, n in counts.items())
            raise TableError(
                f"the runs of {model!r} on {dataset!r} were trained on {len(counts)} different "
                f"data sets of that name (sha256 {shown}; {_some_runs(part, counts.index[-1])}), "
                "which cannot share a curve. Train the smaller part again, or give each data set "
                "its own name."
            )
    unknown = table["data_sha256"].isna()
    if unknown.all() or not unknown.any():
        return
    keys = [k for k in CURVE_KEYS if k in table.columns]
    for _, part in table.groupby(keys, dropna=False):
        n_unknown = int(part["data_sha256"].isna().sum())
        if 0 < n_unknown < len(part):
            first = part.iloc[0]
            raise TableError(
                f"{n_unknown} of {len(part)} runs of a curve ({first['method']} of "
                f"{first['model']!r} on {first['dataset']!r}; {_some_runs(part, None)}) do not "
                "tell on which data they were trained, and are never mixed with runs that do. "
                "Train the whole curve anew in a fresh run folder (exec.runs_dir=FOLDER), or drop "
                "either kind."
            )


def _some_runs(part: pd.DataFrame, sha256: str | None) -> str:
    """Name up to three runs that have this fingerprint; None: those that have none."""
    data = part["data_sha256"]
    mine = part[data.isna() if sha256 is None else data == sha256]
    by_id = "run_id" in part.columns
    names = [str(v) for v in (mine["run_id"] if by_id else mine.index)]
    return f"{'runs' if by_id else 'rows'} {', '.join(names[:3])}" + (", ..." * (len(names) > 3))
