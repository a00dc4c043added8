"""Convert and check the cells of a table: numbers, methods, statuses and seeds.

Every error names its row and column. Rows are counted from 1, in column `_row`.
"""

import numpy as np
import pandas as pd

from analysis.runs.names import METHODS, OPTIONAL, STATUS
from analysis.runs.table import TableError

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
    "floor_nats",
    "init_scale",
    "lr_b_ratio",
    "init_seed",
    "warmup_steps",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip_norm",
)
WHOLE = ("rank", "seed", "batch_size", "steps", "hidden_size")
TEXTS = ("layers", "scope", "scaling_by", "start", "schedule", "precision")
EMPTY = {"", "none", "null", "-", "nan", "full", "n/a", "na"}
MAX_RATE_SPAN = 1e6
"""Learning rates that differ by more than this factor are taken to be in different units."""


def check(table: pd.DataFrame, bad: pd.Series, column: str, why: str) -> None:
    """Raise TableError if `bad` holds in any row; the message names the first such rows.

    `{value}` in `why` is replaced by the first offending value.
    """
    if bad.any():
        value = table.loc[bad, column].iloc[0] if column in table.columns else ""
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise TableError(
            f"row {rows_of(table, bad)}, column {column}: {why.replace('{value}', shown)}"
        )


def rows_of(table: pd.DataFrame, mask: pd.Series) -> str:
    """List the numbers of the rows where a mask is true, five at most."""
    rows = list(table.loc[mask, "_row"])
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column as floats, empty cells as NaN."""
    cells = table[column]
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        values = cells.astype(float)
    else:
        text = _words(cells)
        empty = text.str.lower().isin(EMPTY)
        values = pd.to_numeric(text.where(~empty), errors="coerce").astype(float)
        check(
            table.assign(**{column: text}),
            values.isna() & ~empty,
            column,
            "{value} is not a number. Write plain numbers, such as 3e-4 or 128, without units.",
        )
    if column in WHOLE:
        odd = values.notna() & (values != values.round())
        check(table.assign(**{column: values}), odd, column, "{value} is not a whole number.")
    return values


def texts(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column of text, empty cells as NaN."""
    text = _words(table[column])
    return text.where(text != "", np.nan)


def _words(cells: pd.Series) -> pd.Series:
    return cells.map(lambda v: "" if v is None or v != v else str(v).strip())


def with_methods(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in method and rank.

    Without a method, a run with a rank is lora and one with an empty rank is full fine-tuning,
    which has no rank, alpha or layers.
    """
    if "rank" not in table.columns:
        table["rank"] = np.nan
    if "method" not in table.columns:
        table["method"] = ""
    name = _words(table["method"]).str.lower().map(lambda v: METHODS.get(v, v))
    table["method"] = name.where(name != "", np.where(table["rank"].isna(), "fullft", "lora"))
    check(
        table,
        (table["method"] == "lora") & table["rank"].isna(),
        "rank",
        "a lora run without a rank. Fill it in, or leave method empty if it is full fine-tuning.",
    )
    full = table["method"] == "fullft"
    for column in [c for c in ("rank", "alpha", "layers") if c in table.columns]:
        table[column] = table[column].where(~full)
    return table


def with_status(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Reduce status to done or diverged, and drop failed and unfinished runs.

    A failed run does not tell whether its learning rate was good.
    """
    word = _words(table["status"]).str.lower() if "status" in table.columns else None
    if word is None:
        table["status"] = "done"
    else:
        known = f"{{value}} is not known. Use one of {', '.join(STATUS)}."
        check(table.assign(status=word), ~word.isin([*STATUS, ""]), "status", known)
        table["status"] = word.map(lambda v: STATUS.get(v, "done"))
        empty = (table["status"] == "done") & table["test_nll"].isna() & (word != "")
        ended = repr(next(iter(word[empty]), ""))
        why = (
            f"empty, although the run's status is {ended}. "
            "Fill it in, or set status to diverged or failed."
        )
        check(table, empty, "test_nll", why)
    out = table["status"] == "failed"
    if out.any():
        notes.append(
            f"{int(out.sum())} run(s) that failed or did not end are left out "
            f"(row {rows_of(table, out)})."
        )
    empty = (table["status"] == "done") & table["test_nll"].isna()
    if empty.any():
        notes.append(
            f"{int(empty.sum())} run(s) without a value in column test_nll and without a status "
            f"are left out (row {rows_of(table, empty)}): it is unknown whether they diverged."
        )
    return table[~out & ~empty].copy()


def check_values(table: pd.DataFrame, higher: str | None) -> None:
    """Raise TableError where a value is impossible or a column mixes units.

    Args:
        higher: the metric's name if higher is better, else None.
    """
    lr = table["lr"]
    for bad, why in ((lr.isna(), "empty"), (~(lr > 0), "not above 0"), (np.isinf(lr), "infinite")):
        check(table, bad, "lr", f"{why}. Every run needs its learning rate.")
    if (lr >= 1).any() or lr.max() / lr.min() > MAX_RATE_SPAN:
        check(
            table,
            table.index == lr.idxmax(),
            "lr",
            f"{{value}} next to {lr.min():g} looks like mixed units. Give every learning rate as "
            "the optimizer's plain number.",
        )
    low = "{value} is below 1. Leave it empty for full fine-tuning."
    check(table, table["rank"] < 1, "rank", low)
    done = table[table["status"] == "done"]
    value = done["test_nll"]
    check(done, np.isinf(value), "test_nll", "infinite. Set status to diverged.")
    if higher and _percent_and_fractions(value):
        raise TableError(
            f"row {table.at[value.idxmax(), '_row']}, column {higher}: {value.max():g} next to "
            "values of at most 1 looks like mixed units (percent and fractions)."
        )
    if not higher:
        check(
            done,
            value == value[value < 0].min(),
            "test_nll",
            "{value} is below 0, but a loss in nats per token cannot be negative. If higher is "
            "better, give the metric's column: --higher COLUMN.",
        )
    check(table, _words(table["model"]) == "", "model", "empty.")


def _percent_and_fractions(value: pd.Series) -> bool:
    return (
        len(value) > 0
        and value.min() >= 0
        and value.max() > 1.5
        and (value <= 1).mean() > 0.2
        and (value > 1.5).mean() > 0.2
    )


def with_seeds(table: pd.DataFrame, notes: list[str], sign: int) -> pd.DataFrame:
    """Assign seed numbers to repeats: runs of one configuration and learning rate.

    With a seed column, runs of one seed are taken to share their batches; without one, no two
    runs are.

    Args:
        sign: -1 if the table holds the negative of the metric.
    """
    not_keys = ("method", "rank", "status", "seed", "nll_start", "hidden_size")
    others = [c for c in OPTIONAL if c in table.columns and c not in not_keys]
    keys = ["model", "method", "rank", "lr", *others]
    if "seed" not in table.columns or table["seed"].isna().all():
        table["block"] = 0
        table["seed"] = table.groupby(keys, dropna=False).cumcount()
        return table
    check(
        table,
        table["seed"].isna(),
        "seed",
        "empty, though other rows have one. Fill it in, or drop the column: repeats are then "
        "numbered as seeds.",
    )
    same = table.duplicated([*keys, "seed", "test_nll", "status"], keep="first")
    if same.any():
        notes.append(
            f"{int(same.sum())} row(s) repeat another row and are left out "
            f"(row {rows_of(table, same)})."
        )
    table = table[~same].copy()
    repeated = table.duplicated([*keys, "seed"], keep=False)
    if not repeated.any():
        return table
    (one, a), (two, b) = (
        table[repeated].sort_values([*keys, "seed"])[["_row", "test_nll"]].values[:2]
    )
    notes.append(
        f"{int(repeated.sum())} rows have the settings and the seed of another row but a different "
        f"result, such as rows {one:.0f} and {two:.0f} in column test_nll "
        f"({sign * a:g}, {sign * b:g}): taken as repeats."
    )
    table["block"] = table["seed"].astype(int)
    table["seed"] = table.groupby(keys, dropna=False).cumcount()
    return table
