"""Anyone's table of runs -> the table that the analysis knows. Refuses what it cannot read, with
row and column.

Knows file formats and other people's names for things; fits nothing.
"""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.table import TableError

NEEDED = ("model", "lr", "test_nll")
OPTIONAL = (
    "method",
    "rank",
    "status",
    "dataset",
    "batch_size",
    "seed",
    "hidden_size",
    "layers",
    "alpha",
    "steps",
    "nll_start",
    "scope",
    "schedule",
    "precision",
)
NUMBERS = (
    "lr",
    "test_nll",
    "rank",
    "seed",
    "batch_size",
    "steps",
    "hidden_size",
    "alpha",
    "nll_start",
)
WHOLE = ("rank", "seed", "batch_size", "steps", "hidden_size")
USUAL = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "peak_lr": "lr",
    "max_lr": "lr",
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "eval_loss": "test_nll",
    "test_loss": "test_nll",
    "val_loss": "test_nll",
    "valid_loss": "test_nll",
    "validation_loss": "test_nll",
    "loss": "test_nll",
    "nll": "test_nll",
    "eval_nll": "test_nll",
    "model_id": "model",
    "model_name": "model",
    "base_model": "model",
    "model_name_or_path": "model",
    "state": "status",
    "tuning": "method",
    "peft_type": "method",
    "lora_alpha": "alpha",
    "bs": "batch_size",
    "global_batch_size": "batch_size",
    "max_steps": "steps",
    "n_steps": "steps",
    "random_seed": "seed",
    "hidden": "hidden_size",
    "width": "hidden_size",
    "d_model": "hidden_size",
    "target_modules": "layers",
    "dataset_name": "dataset",
    "task": "dataset",
}
"""Names in use elsewhere: suggested, never taken silently."""
STATUS = {
    "done": "done",
    "finished": "done",
    "completed": "done",
    "complete": "done",
    "success": "done",
    "ok": "done",
    "diverged": "diverged",
    "nan": "diverged",
    "inf": "diverged",
    "failed": "failed",
    "crashed": "failed",
    "killed": "failed",
    "preempted": "failed",
    "running": "failed",
    "stopped": "failed",
    "cancelled": "failed",
}
"""Words for how a run ended, W&B's among them. `failed` says nothing of the learning rate: left
out."""
METHODS = {
    "full": "fullft",
    "fft": "fullft",
    "full_ft": "fullft",
    "full-ft": "fullft",
    "full_finetuning": "fullft",
    "full-finetuning": "fullft",
    "full fine-tuning": "fullft",
    "sft_full": "fullft",
}
EMPTY = {"", "none", "null", "-", "nan", "full", "n/a", "na"}
MAX_RATE_SPAN = 1e6


@dataclass(frozen=True)
class Reading:
    """A table as the analysis knows it, what was left out of it, and the metric's name and
    direction."""

    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    metric: str = "test_nll"
    sign: int = 1
    """-1: the metric is better when higher, and the table holds its negative."""


def load(path: Path) -> pd.DataFrame:
    """Read a table as it is: CSV, parquet, JSON or JSON lines (W&B's export with config and summary
    too)."""
    if not path.is_file():
        raise TableError(
            f"no file {path}. Give a .csv, .parquet, .json or .jsonl table with one run a row."
        )
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            rows = (
                json.loads(text)
                if text.lstrip().startswith("[")
                else [json.loads(v) for v in text.splitlines() if v]
            )
            table = pd.json_normalize(rows)
        else:
            head = path.read_text(encoding="utf-8-sig", errors="replace").split("\n", 1)[0]
            mark = max(
                ",;\t", key=head.count
            )  # the header's names hold the separator more often than any other of these
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, sep=mark, encoding="utf-8-sig"
            )
    except (ValueError, OSError) as error:
        raise TableError(
            f"{path} cannot be read as a table: {str(error).splitlines()[0]}"
        ) from None
    plain = {
        c: str(c).removeprefix("config.").removeprefix("summary.").removeprefix("config/").strip()
        for c in table.columns
    }
    table = table.rename(columns=plain)
    for column in table.columns[[isinstance(t, pd.CategoricalDtype) for t in table.dtypes]]:
        table[column] = table[column].astype(object)
    return table


def read(
    path: Path,
    mapping: dict[str, str] | None = None,
    higher: str | None = None,
    broken: float | None = None,
) -> Reading:
    """Read anyone's runs.

    Args:
        path: the file, one run a row.
        mapping: their column -> ours.
        higher: name of a column to use as the metric, better when higher.
        broken: a metric at least as bad as this counts as diverged.

    Raises:
        TableError: a column is missing or misnamed, or a cell cannot be what it should be; names
            row and column.
    """
    table = load(path)
    table = _renamed(table, mapping or {}, higher)
    if not len(table):
        raise TableError(f"{path} has columns but no rows: there is nothing to fit.")
    table["_row"] = np.arange(1, len(table) + 1)
    notes: list[str] = []
    for column in [c for c in NUMBERS if c in table.columns]:
        table[column] = _numbers(table, column)
    table = _with_methods(table)
    table = _with_status(table, notes)
    sign = -1 if higher else 1
    _check_values(table, higher)
    table["test_nll"] = table["test_nll"] * sign
    if broken is not None:
        down = (table["status"] == "done") & (table["test_nll"] >= broken * sign)
        table.loc[down, "status"] = "diverged"
    table = _with_seeds(table, notes, sign)
    if "dataset" not in table.columns:
        table["dataset"] = "data"
    if not len(table):
        raise TableError(f"{path}: no finished or diverged run is left. " + " ".join(notes))
    return Reading(
        table.drop(columns="_row").reset_index(drop=True), notes, higher or "test_nll", sign
    )


def _renamed(table: pd.DataFrame, mapping: dict[str, str], higher: str | None) -> pd.DataFrame:
    known = (*NEEDED, *OPTIONAL)
    for theirs, ours in mapping.items():
        if theirs not in table.columns:
            raise TableError(
                f"--map {theirs}={ours}: there is no column {theirs!r}.{_like(theirs, list(table.columns))} "
                f"There are: {', '.join(map(str, table.columns))}."
            )
        if ours not in known:
            raise TableError(
                f"--map {theirs}={ours}: {ours!r} is no column of ours.{_like(ours, known)} "
                f"There are: {', '.join(known)}."
            )
    if higher is not None:
        if higher not in table.columns:
            raise TableError(
                f"--higher {higher}: there is no column {higher!r}.{_like(higher, list(table.columns))}"
            )
        mapping = {**mapping, higher: "test_nll"}
    taken = [o for o in mapping.values() if o in table.columns and o not in mapping]
    table = table.drop(columns=taken).rename(columns=mapping)
    if "status" not in table.columns and "State" in table.columns:  # W&B's own export writes it so
        table = table.rename(columns={"State": "status"})
    for column in NEEDED:
        if column not in table.columns:
            raise TableError(_missing(column, list(map(str, table.columns))))
    if "method" not in table.columns and "rank" not in table.columns:
        raise TableError(
            _missing("rank", list(map(str, table.columns)))
            + " Without rank there must be a column method."
        )
    twice = [c for c in table.columns[table.columns.duplicated()] if c in known]
    if twice:
        raise TableError(
            f"two columns are called {twice[0]!r} after mapping. Drop one, or map only one of them."
        )
    return table.copy()


def _missing(column: str, there: list[str]) -> str:
    usual_names = [t for t in there if USUAL.get(t.lower().replace(" ", "_")) == column]
    likely = usual_names or difflib.get_close_matches(column, there, 1, 0.5)
    hint = (
        f" The likely one is {likely[0]!r}: add --map {likely[0]}={column}."
        if likely
        else f" Name it: --map THEIR_COLUMN={column}."
    )
    return f"there is no column {column!r}.{hint} The file has: {', '.join(there)}."


def _like(name: str, there: Any) -> str:
    close = difflib.get_close_matches(name, list(map(str, there)), 1, 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as floats, empty cells as NaN."""
    if pd.api.types.is_numeric_dtype(table[column]) and not pd.api.types.is_bool_dtype(
        table[column]
    ):
        values = table[column].astype(float)
    else:
        text = table[column].map(lambda v: "" if v is None or v != v else str(v).strip())
        empty = text.str.lower().isin(EMPTY)
        values = pd.to_numeric(text.where(~empty), errors="coerce").astype(float)
        bad = values.isna() & ~empty
        if bad.any():
            row = table.index[bad][0]
            raise TableError(
                f"row {table.at[row, '_row']}, column {column}: {text[row]!r} is not a number. "
                "Write plain numbers, such as 3e-4 or 128, without units."
            )
    if column in WHOLE:
        odd = values.notna() & (values != values.round())
        if odd.any():
            row = table.index[odd][0]
            raise TableError(
                f"row {table.at[row, '_row']}, column {column}: {values[row]:g} is not a whole number."
            )
    return values


def _with_methods(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in method and rank: no method means lora, an empty rank full fine-tuning, which has no
    rank, alpha or layers."""
    if "rank" not in table.columns:
        table["rank"] = np.nan
    if "method" not in table.columns:
        table["method"] = ""
    name = table["method"].map(lambda v: "" if v is None or v != v else str(v).strip().lower())
    name = name.map(lambda v: METHODS.get(v, v))
    table["method"] = name.where(name != "", np.where(table["rank"].isna(), "fullft", "lora"))
    bare = (table["method"] == "lora") & table["rank"].isna()
    if bare.any():
        rows = ", ".join(map(str, table.loc[bare, "_row"].head(3)))
        raise TableError(
            f"row {rows}, column rank: a lora run without a rank. Fill it in, or leave method empty if it "
            "is full fine-tuning."
        )
    full = table["method"] == "fullft"
    for column in [c for c in ("rank", "alpha", "layers") if c in table.columns]:
        table[column] = table[column].where(~full)
    return table


def _with_status(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Bring status to done or diverged; leave out what says nothing of its learning rate."""
    if "status" in table.columns:
        word = table["status"].map(lambda v: "" if v is None or v != v else str(v).strip().lower())
        unknown = ~word.isin([*STATUS, ""])
        if unknown.any():
            row = table.index[unknown][0]
            raise TableError(
                f"row {table.at[row, '_row']}, column status: {word[row]!r} is not known. "
                f"Use one of {', '.join(STATUS)}."
            )
        table["status"] = word.map(lambda v: STATUS.get(v, "done"))
        empty = (table["status"] == "done") & table["test_nll"].isna()
        if (empty & (word != "")).any():
            row = table.index[empty & (word != "")][0]
            raise TableError(
                f"row {table.at[row, '_row']}, column test_nll: empty, although the run's status is "
                f"{word[row]!r}. Fill it in, or set status to diverged or failed."
            )
    else:
        table["status"] = "done"
    out = table["status"] == "failed"
    if out.any():
        notes.append(
            f"{int(out.sum())} run(s) that failed or did not end are left out (row {_rows(table, out)})."
        )
    empty = (table["status"] == "done") & table["test_nll"].isna()
    if empty.any():
        notes.append(
            f"{int(empty.sum())} run(s) without a value in column test_nll and without a status are left out "
            f"(row {_rows(table, empty)}): nothing says whether they diverged."
        )
    return table[~out & ~empty].copy()


def _rows(table: pd.DataFrame, mask: pd.Series) -> str:
    rows = list(table.loc[mask, "_row"])
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _check_values(table: pd.DataFrame, higher: str | None) -> None:
    """Raise TableError where a value cannot be what it should be, or a column mixes units."""
    lr = table["lr"]
    for bad, why in ((lr.isna(), "empty"), (~(lr > 0), "not above 0"), (np.isinf(lr), "infinite")):
        if bad.any():
            raise TableError(
                f"row {_rows(table, bad)}, column lr: {why}. Every run needs its learning rate."
            )
    if (lr >= 1).any() or lr.max() / lr.min() > MAX_RATE_SPAN:
        row = lr.idxmax()
        raise TableError(
            f"row {table.at[row, '_row']}, column lr: {lr[row]:g} beside {lr.min():g} looks like mixed "
            "units. Give every learning rate as the optimizer's plain number."
        )
    low = table["rank"] < 1
    if low.any():
        raise TableError(
            f"row {_rows(table, low)}, column rank: {table.loc[low, 'rank'].iloc[0]:g} is below 1. Leave "
            "it empty for full fine-tuning."
        )
    done = table[table["status"] == "done"]
    infinite = np.isinf(done["test_nll"])
    if infinite.any():
        raise TableError(
            f"row {_rows(done, infinite)}, column test_nll: infinite. Set status to diverged."
        )
    value = done["test_nll"]
    if (
        higher
        and len(value)
        and value.min() >= 0
        and value.max() > 1.5
        and (value <= 1).mean() > 0.2
        and (value > 1.5).mean() > 0.2
    ):
        row = value.idxmax()
        raise TableError(
            f"row {table.at[row, '_row']}, column {higher}: {value[row]:g} beside values of at most 1 looks "
            "like mixed units (percent and fractions)."
        )
    if not higher and (value < 0).any():
        row = value.idxmin()
        raise TableError(
            f"row {table.at[row, '_row']}, column test_nll: {value[row]:g} is below 0, which no loss in "
            "nats a token is. If the metric is better when higher, name it: --higher COLUMN."
        )
    for column in ("model",):
        blank = table[column].map(lambda v: v is None or v != v or str(v).strip() == "")
        if blank.any():
            raise TableError(f"row {_rows(table, blank)}, column {column}: empty.")


def _with_seeds(table: pd.DataFrame, notes: list[str], sign: int) -> pd.DataFrame:
    """Number repeats of a cell. A seed column means that a seed's runs share batches; without one
    none do."""
    keys = [
        "model",
        "method",
        "rank",
        "lr",
        *(
            c
            for c in OPTIONAL
            if c in table.columns
            and c not in ("method", "rank", "status", "seed", "nll_start", "hidden_size")
        ),
    ]
    if "seed" in table.columns and table["seed"].notna().all():
        repeated = table.duplicated([*keys, "seed"], keep=False)
        same = table.duplicated([*keys, "seed", "test_nll", "status"], keep="first")
        if same.any():
            notes.append(
                f"{int(same.sum())} row(s) say again what another says and are left out "
                f"(row {_rows(table, same)})."
            )
        table = table[~same].copy()
        repeated = table.duplicated([*keys, "seed"], keep=False)
        if not repeated.any():
            return table
        first = table[repeated].sort_values([*keys, "seed"]).iloc[:2]
        notes.append(
            f"{int(repeated.sum())} rows have a cell and a seed in common with another but different results, "
            f"as rows {first['_row'].iloc[0]} and {first['_row'].iloc[1]} in column test_nll "
            f"({sign * first['test_nll'].iloc[0]:g}, {sign * first['test_nll'].iloc[1]:g}): "
            "taken as repeats."
        )
    elif "seed" in table.columns and table["seed"].notna().any():
        bad = table["seed"].isna()
        raise TableError(
            f"row {_rows(table, bad)}, column seed: empty, though other rows have one. Fill it in, or drop "
            "the column: repeats of a cell are then seeds."
        )
    table["block"] = 0 if "seed" not in table.columns else table["seed"].astype(int)
    table["seed"] = table.groupby(keys, dropna=False).cumcount()
    return table
