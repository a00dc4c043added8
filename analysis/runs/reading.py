"""Read tables of runs from any program; errors name the row and the column.

Column `_row` counts the rows from 1.
"""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.runs.table import CURVE_KEYS, TableError

NEEDED = ("model", "lr", "test_nll")
WHOLE = ("rank", "seed", "batch_size", "steps", "hidden_size")
NUMBERS = (
    *WHOLE,
    *("lr", "test_nll", "alpha", "nll_start", "floor_nats", "init_scale", "lr_b_ratio"),
    *("init_seed", "warmup_steps", "beta1", "beta2", "eps", "weight_decay", "clip_norm"),
    "cut_from_steps",
)
TEXTS = ("layers", "scope", "scaling_by", "start", "schedule", "precision")
ALIASES = {
    "model": "model_id model_name base_model model_name_or_path",
    "lr": "learning_rate learningrate peak_lr max_lr",
    "test_nll": "eval_loss test_loss val_loss valid_loss validation_loss loss nll eval_nll",
    "method": "tuning peft_type",
    "rank": "lora_r lora_rank r",
    "status": "state",
    "dataset": "dataset_name task",
    "batch_size": "bs global_batch_size",
    "seed": "random_seed",
    "hidden_size": "hidden width d_model",
    "layers": "target_modules",
    "alpha": "lora_alpha",
    "steps": "max_steps n_steps",
}
"""Our columns -> names in other programs. Error messages suggest them; none is mapped silently."""
KNOWN = tuple(dict.fromkeys((*ALIASES, *NUMBERS, *TEXTS)))
STATUS = {
    **dict.fromkeys(("done", "finished", "completed", "complete", "success", "ok"), "done"),
    **dict.fromkeys(("diverged", "nan", "inf"), "diverged"),
    **dict.fromkeys(
        ["failed", "crashed", "killed", "preempted", "running", "stopped", "cancelled"], "failed"
    ),
}
"""Words for how a run ended, W&B's included. Failed runs are left out: they do not show whether the
learning rate was good."""
FULL = ["full", "fft", "full_ft", "full-ft", "full_finetuning", "full-finetuning", "sft_full"]
"""Other names of full fine-tuning, beside "full fine-tuning"."""
EMPTY = {"", "none", "null", "-", "nan", "full", "n/a", "na"}
MAX_RATE_SPAN = 1e6
"""Learning rates further apart than this factor are taken to be in different units."""


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

    Column names lose the prefixes `config` and `summary` of W&B. TableError if there is no such
    file or it cannot be parsed.
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
            whole = text.lstrip().startswith("[")
            rows = json.loads(text) if whole else [json.loads(v) for v in text.splitlines() if v]
            table = pd.json_normalize(rows)
        else:
            head = path.read_text(encoding="utf-8-sig", errors="replace").split("\n", 1)[0]
            separator = max(",;\t", key=head.count)  # the most frequent one in the header
            table = pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                sep=separator,
                encoding="utf-8-sig",
                index_col=False,  # a comma at the end of rows shifts no column
            )
    except (ValueError, TypeError, OSError) as error:
        said = str(error).splitlines()[0]
        raise TableError(f"{path} cannot be read as a table: {said}") from None
    prefixes = r"^config\.|^summary\.|^config/"
    table.columns = table.columns.astype(str).str.replace(prefixes, "", regex=True).str.strip()
    categories = table.columns[[isinstance(t, pd.CategoricalDtype) for t in table.dtypes]]
    return table.astype(dict.fromkeys(categories, object))


def read(
    path: Path,
    mapping: dict[str, str] | None = None,
    higher: str | None = None,
    broken: float | None = None,
) -> Reading:
    """Read a table of runs made by any program.

    Without a method, a run with a rank is lora and one with an empty rank is full fine-tuning.

    `mapping`: column in the file -> the analysis's name for it. `higher`: column to use as the
    metric, if higher is better. `broken`: a run with a metric at least as bad as this counts as
    diverged.

    Raises:
        TableError: a column is missing or misnamed, or a cell has an impossible value.
    """
    table = _renamed(load(path), mapping or {}, higher)
    if not len(table):
        raise TableError(f"{path} has columns but no rows: there is nothing to fit.")
    table["_row"] = np.arange(1, len(table) + 1)
    notes: list[str] = []
    many = (list, dict, np.ndarray)
    for column in table.columns.intersection(NUMBERS):
        table[column] = _numbers(table, column)
    for column in table.columns.intersection(TEXTS):
        table[column] = _words(table[column]).replace("", np.nan)
    for column in table.columns.intersection(CURVE_KEYS):
        if table[column].dtype == object:  # a list of data sets, for example
            table[column] = table[column].map(lambda v: str(v) if isinstance(v, many) else v)
    if "rank" not in table.columns:
        table["rank"] = np.nan
    name = _words(table["method"]) if "method" in table.columns else pd.Series("", table.index)
    name = name.str.lower().replace([*FULL, "full fine-tuning"], "fullft")
    table["method"] = name.where(name != "", np.where(table["rank"].isna(), "fullft", "lora"))
    unranked = (table["method"] == "lora") & table["rank"].isna()
    why = "a lora run without a rank. Fill it in, or leave method empty if it is full fine-tuning."
    _refuse(table, unranked, "rank", why)
    for column in table.columns.intersection(["rank", "alpha", "layers"]):
        table[column] = table[column].where(table["method"] != "fullft")
    # Runs that failed or did not end say nothing about their learning rate.
    word = pd.Series("", table.index)
    if "status" in table.columns:
        word = _words(table["status"]).str.lower()
    known = f"{{value}} is not known. Use one of {', '.join(STATUS)}."
    _refuse(table.assign(status=word), ~word.isin([*STATUS, ""]), "status", known)
    table["status"] = word.map(STATUS).fillna("done")
    empty, failed = (
        (table["status"] == "done") & table["test_nll"].isna(),
        table["status"] == "failed",
    )
    why = "empty, although the run is done. Fill it in, or set status to diverged or failed."
    _refuse(table, empty & (word != ""), "test_nll", why)
    without = "without a value in column test_nll and without a status"
    for out, what in ((failed, "that failed or did not end"), (empty, without)):
        if out.any():
            notes.append(f"{out.sum()} run(s) {what} are left out (row {_rows_of(table, out)}).")
    table = table[~failed & ~empty].copy()
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
    table = table.drop(columns="_row").reset_index(drop=True)
    return Reading(table, notes, higher or "test_nll", sign)


def _renamed(table: pd.DataFrame, mapping: dict[str, str], higher: str | None) -> pd.DataFrame:
    """Rename columns; TableError for a name that is unknown, missing or used twice."""
    mapping = {**mapping, **({higher: "test_nll"} if higher is not None else {})}
    there: list[str] = list(table.columns)
    for pair in mapping.items():
        for name, names in zip(pair, (there, KNOWN)):
            if name not in names:
                close = difflib.get_close_matches(name, names, 1, 0.5)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise TableError(f"no column {name!r}.{hint} One of: {', '.join(names)}.")
    taken = [name for name in mapping.values() if name in there and name not in mapping]
    table = table.drop(columns=taken).rename(columns=mapping)
    if "status" not in table.columns and "State" in table.columns:  # W&B's name of the column
        table = table.rename(columns={"State": "status"})
    there = list(table.columns)
    for column in (*NEEDED, *(() if "method" in there else ("rank",))):
        if column not in there:
            theirs = {n.lower().replace(" ", "_"): n for n in there}
            known = [theirs[a] for a in ALIASES[column].split() if a in theirs]
            close = known or difflib.get_close_matches(column, there, 1, 0.5) or ["YOUR_COLUMN"]
            raise TableError(
                f"there is no column {column!r}. Map one to it: --map {close[0]}={column}. "
                f"The file has: {', '.join(there)}."
            )
    if twice := [c for c in table.columns[table.columns.duplicated()] if c in KNOWN + CURVE_KEYS]:
        raise TableError(
            f"two columns are called {twice[0]!r} after mapping. Map only one of them."
        )
    # In our own tables these name the metric and the blocks of runs.
    return table.drop(columns=["metric", "block"], errors="ignore").copy()


def _with_seeds(table: pd.DataFrame, notes: list[str], sign: int) -> pd.DataFrame:
    """Assign seed numbers to repeats: runs of one configuration and learning rate.

    Runs with one seed are taken to share batches. Without a seed column, no runs are.
    """
    keys = [c for c in ("lr", *CURVE_KEYS) if c in table.columns]
    if "seed" not in table.columns or table["seed"].isna().all():
        return table.assign(block=0, seed=table.groupby(keys, dropna=False).cumcount())
    why = "empty, though other rows have one. Fill it in, or drop the column: repeats are then "
    _refuse(table, table["seed"].isna(), "seed", f"{why}numbered as seeds.")
    same = table.duplicated([*keys, "seed", "test_nll", "status"], keep="first")
    if same.any():
        rows = _rows_of(table, same)
        notes.append(f"{same.sum()} row(s) repeat another row and are left out (row {rows}).")
    table = table[~same].copy()
    repeated = table.duplicated([*keys, "seed"], keep=False)
    if not repeated.any():
        return table
    first = table[repeated].sort_values([*keys, "seed"])[["_row", "test_nll"]].values[:2]
    (one, a), (two, b) = first
    notes.append(
        f"{repeated.sum()} rows have the settings and the seed of another row but a different "
        f"result, such as rows {one:.0f} and {two:.0f} in column test_nll "
        f"({sign * a:g}, {sign * b:g}): taken as repeats."
    )
    number = table.groupby(keys, dropna=False).cumcount()
    return table.assign(block=table["seed"].astype(int), seed=number)


def _refuse(table: pd.DataFrame, bad: pd.Series, column: str, why: str) -> None:
    """Raise TableError if a row is `bad`; {value} in `why` stands for the first bad cell."""
    if bad.any():
        value = table.loc[bad, column].iloc[0] if column in table.columns else ""
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise TableError(
            f"row {_rows_of(table, bad)}, column {column}: {why.replace('{value}', shown)}"
        )


def _rows_of(table: pd.DataFrame, mask: pd.Series) -> str:
    """List the numbers of the masked rows, five at most."""
    rows = list(table.loc[mask, "_row"])
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as floats, empty cells as NaN."""
    cells = table[column]
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        values = cells.astype(float)
    else:
        text = _words(cells)
        empty = text.str.lower().isin(EMPTY)
        values = pd.to_numeric(text.where(~empty), errors="coerce").astype(float)
        why = "{value} is not a number. Write plain numbers, such as 3e-4 or 128, without units."
        _refuse(table.assign(**{column: text}), values.isna() & ~empty, column, why)
    if column in WHOLE:
        odd = values.notna() & (values % 1 != 0)  # infinity too
        _refuse(table.assign(**{column: values}), odd, column, "{value} is not a whole number.")
    return values


def _words(cells: pd.Series) -> pd.Series:
    return cells.map(lambda v: "" if v is None or v != v else str(v).strip())


def _check_values(table: pd.DataFrame, higher: str | None) -> None:
    """Raise TableError where a value is impossible or a column mixes units."""
    lr, done = table["lr"], table[table["status"] == "done"]
    value = done["test_nll"]
    mixed = (lr >= 1) | (lr > MAX_RATE_SPAN * lr.min())
    units = f"{{value}} next to {lr.min():g} looks like mixed units. Give plain learning rates."
    negative = "{value} is below 0, but a loss in nats per token cannot be negative. If higher is "
    negative += "better, give the metric's column: --higher COLUMN."
    fractions, percents = value.between(0, 1, "right"), value.between(1.5, 100, "right")
    blend = min(fractions.mean(), percents.mean()) > 0.2 and value.between(0, 100).all()
    scales = f"{higher} {{value}} next to {value.min():g}: percent and fractions are mixed units."
    for part, bad, column, why in (
        (table, ~((lr > 0) & (lr < np.inf)), "lr", "no learning rate: give a number above 0."),
        (table, mixed, "lr", units),
        (table, table["rank"] < 1, "rank", "{value} is below 1. Empty: full fine-tuning."),
        (done, np.isinf(value), "test_nll", "infinite. Set status to diverged."),
        (table, _words(table["model"]) == "", "model", "empty."),
        (done, (value < 0) & (higher is None), "test_nll", negative),
        (done, percents & bool(higher and blend), "test_nll", scales),
    ):
        _refuse(part, bad, column, why)
