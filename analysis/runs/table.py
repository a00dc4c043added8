"""Read and write tables of runs, check them, and turn every metric into a loss.

Tables of any program are read with `read_any`: its errors name the row and the column.
"""

import difflib
import hashlib
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
GROUP_KEYS = ("model", "dataset", "objective", "batch_size", "steps", "trainer")
"""Arms are compared only between runs that agree in these columns."""
CURVE_KEYS = (
    *GROUP_KEYS,
    *("method", "rank", "alpha", "layers", "scope", "scaling_by", "init_scale", "lr_b_ratio"),
    *("start", "init_seed", "expert_rank", "expert_alpha", "expert_outer", "schedule"),
    *("warmup_steps", "precision", "beta1", "beta2", "eps", "weight_decay", "clip_norm"),
    *("group_size", "max_new_tokens", "reward_scale", "ratio_level", "clip_ratio", "kl_weight"),
    *("early_stopping", "method_fields"),
)
"""Runs that agree in these columns form one LR curve: they differ only in lr and seed."""
PASSED = (
    *("lr", "steps", "batch_size", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2"),
    *("precision", "base_sha256", "data_sha256"),
)
"""Columns of which each other value must give other weights. Clipping may never act, and a change
of eps may be below the rounding of saved weights; of rank, alpha and layers the result tells."""
PLACES = {"base_sha256": "model", "data_sha256": "rows"}
"""Places of a foreign trainer's template that have other names than their columns."""
CUT_FROM = "cut_from_steps"
"""Column of runs cut to their first updates: the number of updates of the full run."""


class TableError(ValueError):
    """The table cannot be used by the analysis."""


def read(path: Path) -> pd.DataFrame:
    """Read a table that lorasweep wrote; TableError if missing. Others: `read_any`."""
    table = load(path, typed=True)
    check_columns(table)
    return table


def load(path: Path, typed: bool = False) -> pd.DataFrame:
    """Read a table without checks: CSV, parquet, JSON or JSON lines.

    Column names lose the prefixes `config` and `summary` of W&B. Cells of a CSV are text, unless
    `typed`. TableError if there is no such file or it cannot be parsed.
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
            is_list = text.lstrip().startswith("[")
            rows = json.loads(text) if is_list else [json.loads(v) for v in text.splitlines() if v]
            table = pd.json_normalize(rows)
        else:
            head = path.read_text(encoding="utf-8-sig", errors="replace").split("\n", 1)[0]
            look: Any = {"sep": max(",;\t", key=head.count)}  # the most frequent one in the header
            look |= {} if typed else {"dtype": str, "keep_default_na": False}
            # a comma at the end of rows shifts no column
            table = pd.read_csv(path, encoding="utf-8-sig", index_col=False, **look)
    except (ValueError, TypeError, OSError) as error:
        said = str(error).splitlines()[0]
        raise TableError(f"{path} cannot be read as a table: {said}") from None
    table = table if table.index.names == [None] else table.reset_index()
    prefixes = r"^config\.|^summary\.|^config/"
    table.columns = table.columns.astype(str).str.replace(prefixes, "", regex=True).str.strip()
    categories = table.columns[[isinstance(t, pd.CategoricalDtype) for t in table.dtypes]]
    return table.astype(dict.fromkeys(categories, object))


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


def own(path: Path, text: str, comment: str = "<!-- {} -->") -> bytes:
    """Return what to write to a file, ending in a comment with the SHA-256 of the lines before it.

    So a page is known in any folder. JSON has no comments ('' then): only the same text is written.
    Raises TableError: lorasweep did not write the file that is there, or it was changed since.
    """

    def marked(lines: bytes) -> bytes:
        mark = f"written by lorasweep, sha256 {hashlib.sha256(lines).hexdigest()}"
        return lines + f"{comment.format(mark)}\n".encode() if comment else lines

    new = marked(f"{text}\n".encode())
    if os.path.lexists(path):
        there = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        lines = there[: there.rstrip(b"\n").rfind(b"\n") + 1]
        if there != (marked(lines) if comment else new):
            raise TableError(
                f"{path} has other content, and nothing shows that lorasweep wrote it and nobody "
                f"changed it since. It stays: move it away, or name another with out=FILE."
            )
    return new


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table of runs as strongly compressed parquet: results are long, similar JSON."""
    with whole(path) as part:
        table.to_parquet(part, index=False, compression="zstd", compression_level=12)


def check(table: pd.DataFrame) -> None:
    """Raise TableError unless a table can be analysed.

    A table is refused if columns are missing, a lora run has no rank, a run is repeated, a
    fingerprint of data is missing, or one name stands for different base weights, data or versions.
    """
    check_columns(table)
    unranked = int(table.loc[table["method"] == "lora", "rank"].isna().sum())
    if unranked:
        raise TableError(f"{unranked} lora run(s) have no rank. Fill it in, or drop the runs.")
    keys = [k for k in (*CURVE_KEYS, "lr", "seed") if k in table.columns]
    if {"weights_sha256", "trainer"} <= {*table.columns}:  # of diverged runs all may be NaN
        equal = table[table["status"] == "done"].groupby(["trainer", "weights_sha256"])
        for (trainer, _), part in equal:
            for key in (k for k in PASSED if k in part.columns):
                values = [
                    f"{v:g}" if key == "lr" else f"{v}"[:12] for v in sorted({*part[key].dropna()})
                ]
                if len(values) > 1 and values != ["0", "1"]:  # one update of warm-up may be none
                    place = PLACES.get(key, key)
                    raise TableError(
                        f"trainer {trainer} left equal weights at {key} {values[0]} and "
                        f"{values[1]}: it ignores {key}. Correct its use of {{{place}}}."
                    )
    if len(twice := table[table.duplicated(keys, keep=False)]):
        raise TableError(
            f"{len(twice)} rows describe the same run twice (same model, method, ..., lr and seed),"
            f" first: lr {twice.iloc[0]['lr']:g}, seed {twice.iloc[0]['seed']}. Drop one of each, "
            "or give each its own seed."
        )

    def some(runs: pd.DataFrame) -> str:
        names = [str(v) for v in runs.get("run_id", runs.index)]
        return f"runs {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"

    same = {"base_sha256": ["model"], "data_sha256": ["model", "dataset"]}
    for column, of in {**same, "packages": ["model", "dataset", "method"]}.items():
        if column not in table.columns or table[column].isna().all():
            continue
        if column == "data_sha256" and len(unknown := table[table[column].isna()]):
            raise TableError(
                f"{len(unknown)} of {len(table)} runs ({some(unknown)}) have no fingerprint of "
                "their data (column data_sha256). Train them again in a fresh run folder "
                "(exec.runs_dir=FOLDER), drop them, or drop the column of a foreign table."
            )
        for name, part in table.groupby(of):
            counts = part[column].value_counts()
            if len(counts) > 1:
                digits = None if column == "packages" else 8
                shown = ", ".join(f"{v[:digits]} in {n} runs" for v, n in counts.items())
                fewest = some(part[part[column] == counts.index[-1]])
                raise TableError(
                    f"the runs of {', '.join(map(repr, name))} have {len(counts)} different "
                    f"values of {column} ({shown}; {fewest}): other base weights, data or code, "
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


# ---------------------------------------------------------------- tables of any program

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
    "rank": "lora_r lora_rank r",
}
"""Our columns -> names in other programs. Error messages suggest them; none is mapped silently."""
KNOWN = ("model", "method", "status", "dataset", *NUMBERS, *TEXTS)
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
FULL += ["full fine-tuning"]
"""Other names of full fine-tuning."""
EMPTY = {"", "none", "null", "-", "nan", "full", "n/a", "na"}
MAX_RATE_SPAN = 1e6
"""Learning rates further apart than this factor are taken to be in different units."""


@dataclass(frozen=True)
class Reading:
    """A table of any program's runs with the analysis's column names, and notes on dropped runs."""

    table: pd.DataFrame
    notes: list[str]
    metric: str = "test_nll"
    sign: int = 1
    """-1 if higher is better: the table then holds the negative of the metric."""


def read_any(
    path: Path, mapping: dict[str, str] | None = None, higher: str | None = None
) -> Reading:
    """Read a table of runs made by any program.

    Without a method, a run with a rank is lora and one with an empty rank is full fine-tuning.

    `mapping`: column in the file -> the analysis's name for it. `higher`: column to use as the
    metric, if higher is better. TableError: a column is missing or misnamed, or a cell has an
    impossible value.
    """
    table = _renamed(load(path), mapping or {}, higher)
    if not len(table):
        raise TableError(f"{path} has columns but no rows: there is nothing to fit.")
    table["_row"] = np.arange(1, len(table) + 1)
    notes: list[str] = []
    many = (list, dict, np.ndarray)
    table = table.loc[:, ~table.columns.duplicated()]  # those that are read were refused
    for column in [c for c in table if table[c].dtype == object]:  # such as a list of modules
        table[column] = table[column].map(lambda v: str(v) if isinstance(v, many) else v)
    for column in table.columns.intersection(NUMBERS):
        table[column] = _numbers(table, column)
    for column in table.columns.intersection(TEXTS):
        table[column] = _words(table[column]).replace("", np.nan)
    if "rank" not in table.columns:
        table["rank"] = np.nan
    blank = pd.Series("", table.index)
    name = _words(table.get("method", blank)).str.lower().replace(FULL, "fullft")
    table["method"] = name.where(name != "", np.where(table["rank"].isna(), "fullft", "lora"))
    unranked = (table["method"] == "lora") & table["rank"].isna()
    why = "a lora run without a rank. Fill it in, or leave method empty if it is full fine-tuning."
    _refuse(table, unranked, "rank", why)
    for column in table.columns.intersection(["rank", "alpha", "layers"]):
        kept = (column == "layers") & (table.get("scope", blank) == "matrices")
        table[column] = table[column].where(kept | (table["method"] != "fullft"))
    # Runs that failed or did not end say nothing about their learning rate.
    word = _words(table.get("status", blank)).str.lower()
    known = f"{{value}} is not known. Use one of {', '.join(STATUS)}."
    _refuse(table.assign(status=word), ~word.isin([*STATUS, ""]), "status", known)
    table["status"] = word.map(STATUS).fillna("done")
    empty = (table["status"] == "done") & table["test_nll"].isna()
    failed = table["status"] == "failed"
    why = "empty, although the run is done. Fill it in, or set status to diverged or failed."
    _refuse(table, empty & (word != ""), "test_nll", why)
    without = "without a value in column test_nll and without a status"
    for out, what in ((failed, "that failed or did not end"), (empty, without)):
        if out.any():
            notes.append(f"{out.sum()} run(s) {what} are left out (row {_rows_of(table, out)}).")
    table = table[~failed & ~empty].copy()
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
    sign = -1 if higher else 1
    table["test_nll"] = table["test_nll"] * sign
    table = _with_seeds(table, notes)
    point = table.groupby([c for c in ("lr", *CURVE_KEYS) if c in table], dropna=False).ngroup()
    unread = table.columns.difference([*({*KNOWN, *CURVE_KEYS, "_row"} - {"hidden_size"})])
    varied = {
        c: table[c].nunique() for c in unread if table.groupby(point)[c].nunique(False).gt(1).any()
    }
    if varied and not {"spec", "result", "run_id"} <= {*unread}:  # else an export of ours
        notes.append(
            f"not read: {', '.join(sorted(varied, key=lambda c: varied[c]))}, which differ in runs "
            "of one curve and learning rate. Is one a setting? These runs are merged: name it "
            "(lorasweep fit FILE +columns.alpha=lora_alpha), or keep one value per table."
        )
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
                f"there is no column {column!r}. Name yours: +columns.{column}={close[0]}. "
                f"The file has: {', '.join(there)}."
            )
    if twice := [c for c in table.columns[table.columns.duplicated()] if c in KNOWN + CURVE_KEYS]:
        raise TableError(
            f"two columns are called {twice[0]!r} after mapping. Map only one of them."
        )
    # In our own tables these name the metric and the blocks of runs; others' are not read.
    return table.rename(columns={name: f"column {name}" for name in ("metric", "block")})


def _with_seeds(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Assign seed numbers to repeats: runs of one configuration and learning rate.

    Runs with one seed are taken to share batches. Without a seed column, no runs are.
    """
    keys = [c for c in ("lr", *CURVE_KEYS) if c in table.columns]
    if "seed" not in table.columns or table["seed"].isna().all():
        if (repeated := table.duplicated(keys, keep=False)).any():
            rows = _rows_of(table, repeated)
            notes.append(f"{repeated.sum()} rows are repeats without a column seed (row {rows}).")
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
    notes.append(
        f"{repeated.sum()} rows have the settings and seed of another row but a different result: "
        f"taken as repeats (row {_rows_of(table, repeated)})."
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
