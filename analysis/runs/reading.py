"""Read other people's tables of runs; refuse a bad one with a message that names row and column.

Knows file formats. Column names used elsewhere are in `names`, checks of cells in `cells`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.runs.cells import (
    NUMBERS,
    TEXTS,
    check_values,
    numbers,
    texts,
    with_methods,
    with_seeds,
    with_status,
)
from analysis.runs.names import NEEDED, OPTIONAL, did_you_mean, missing
from analysis.runs.table import TableError


@dataclass(frozen=True)
class Reading:
    """A table with the analysis's column names, notes on dropped runs, and the metric."""

    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    metric: str = "test_nll"
    sign: int = 1
    """-1 if higher is better: the table then holds the negative of the metric."""


def load(path: Path) -> pd.DataFrame:
    """Read a table without checks: CSV, parquet, JSON or JSON lines.

    The `config` and `summary` prefixes of W&B's exports are removed from column names.

    Raises:
        TableError: the file does not exist or cannot be parsed.
    """
    if not path.is_file():
        raise TableError(
            f"no file {path}. Give a .csv, .parquet, .json or .jsonl table with one run per row."
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
            separator = max(",;\t", key=head.count)  # the most frequent one in the header
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig"
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
    """Read a table of runs made by any program.

    Args:
        path: the file, one run per row.
        mapping: column in the file -> the analysis's name for it.
        higher: column to use as the metric, if higher is better.
        broken: a run with a metric at least as bad as this counts as diverged.

    Raises:
        TableError: a column is missing or misnamed, or a cell has an impossible value; the message
            names row and column.
    """
    table = load(path)
    table = _renamed(table, mapping or {}, higher)
    if not len(table):
        raise TableError(f"{path} has columns but no rows: there is nothing to fit.")
    table["_row"] = np.arange(1, len(table) + 1)
    notes: list[str] = []
    for column in [c for c in NUMBERS if c in table.columns]:
        table[column] = numbers(table, column)
    for column in [c for c in TEXTS if c in table.columns]:
        table[column] = texts(table, column)
    table = with_methods(table)
    table = with_status(table, notes)
    sign = -1 if higher else 1
    check_values(table, higher)
    table["test_nll"] = table["test_nll"] * sign
    if broken is not None:
        down = (table["status"] == "done") & (table["test_nll"] >= broken * sign)
        table.loc[down, "status"] = "diverged"
    table = with_seeds(table, notes, sign)
    if "dataset" not in table.columns:
        table["dataset"] = "data"
    if not len(table):
        raise TableError(f"{path}: no finished or diverged run is left. " + " ".join(notes))
    return Reading(
        table.drop(columns="_row").reset_index(drop=True), notes, higher or "test_nll", sign
    )


def _renamed(table: pd.DataFrame, mapping: dict[str, str], higher: str | None) -> pd.DataFrame:
    known = (*NEEDED, *OPTIONAL)
    for theirs, column in mapping.items():
        if theirs not in table.columns:
            raise TableError(
                f"--map {theirs}={column}: the file has no column {theirs!r}."
                f"{did_you_mean(theirs, table.columns)} "
                f"It has: {', '.join(map(str, table.columns))}."
            )
        if column not in known:
            raise TableError(
                f"--map {theirs}={column}: the analysis has no column {column!r}."
                f"{did_you_mean(column, known)} "
                f"Use one of: {', '.join(known)}."
            )
    if higher is not None:
        if higher not in table.columns:
            raise TableError(
                f"--higher {higher}: the file has no column {higher!r}."
                f"{did_you_mean(higher, table.columns)}"
            )
        mapping = {**mapping, higher: "test_nll"}
    taken = [o for o in mapping.values() if o in table.columns and o not in mapping]
    table = table.drop(columns=taken).rename(columns=mapping)
    if "status" not in table.columns and "State" in table.columns:  # as W&B exports it
        table = table.rename(columns={"State": "status"})
    for column in NEEDED:
        if column not in table.columns:
            raise TableError(missing(column, list(map(str, table.columns))))
    if "method" not in table.columns and "rank" not in table.columns:
        raise TableError(
            missing("rank", list(map(str, table.columns)))
            + " Without a rank, there must be a column method."
        )
    twice = [c for c in table.columns[table.columns.duplicated()] if c in known]
    if twice:
        raise TableError(
            f"two columns are called {twice[0]!r} after mapping. Drop one, or map only one of them."
        )
    return table.copy()
