"""Anyone's runs: what is read, what is refused, and that no message leaves row and column out."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.runs.lr_curves import lr_curves
from analysis.runs.reading import read
from analysis.tables import commands
from tests.tables import planted, run, write
from tests.world import ROOT


def test_our_own_csv_export_fits_like_the_parquet(tmp_path):
    """Its optional columns (floor_nats, clip_norm, ...) are empty cells in the CSV."""
    kept = pd.read_parquet(ROOT / "analysis/results/lr_ratio-small" / "table.parquet")
    table = tmp_path / "table.csv"
    kept.to_csv(table, index=False)
    kept.to_parquet(table.with_suffix(".parquet"))
    assert read(table).table["floor_nats"].isna().all()
    from_csv, from_parquet = (commands.fit(read(p)) for p in (table, table.with_suffix(".parquet")))
    assert len(from_csv) == 2 and from_csv == from_parquet
    assert all(not c.variant.endswith((" ", ",")) for c in lr_curves(read(table).table))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "--map learning_rate=lr"),
        (["learning_rate=lr"], "--map eval_loss=test_nll"),
        (["learning_rat=lr"], "Did you mean 'learning_rate'?"),
        (["learning_rate=lrr"], "Did you mean 'lr'?"),
        (["learning_rate"], "--map learning_rate"),
        (["learning_rate=lr", "eval_loss=test_nll"], ""),
    ],
)
def test_other_peoples_names_are_mapped_and_suggested(tmp_path, capsys, pairs, words):
    theirs = {"lr": "learning_rate", "test_nll": "eval_loss"}
    path = write(tmp_path, planted(seeds=(0,)).rename(columns=theirs))
    code, _, err = run(capsys, "fit", path, *(v for pair in pairs for v in ("--map", pair)))
    assert code == (2 if words else 0) and words in err


def test_wandb_exports(tmp_path, capsys):
    csv = planted(seeds=(0,)).rename(columns={"status": "State"})
    csv["State"] = ["crashed" if k == 5 else "finished" for k in range(len(csv))]
    code, _, err = run(capsys, "fit", write(tmp_path, csv))
    assert code == 0 and "1 run(s)" in err and "row 6" in err
    keys = ["lr", "rank", "model", "seed"]
    rows = planted(seeds=(0,)).assign(model="m").astype(object).replace({np.nan: None})
    objects = [
        {"state": "finished", "config": dict(row[keys]), "summary": {"test_nll": row["test_nll"]}}
        for _, row in rows.iterrows()
    ]
    (tmp_path / "export.json").write_text(json.dumps(objects))
    code, text, _ = run(capsys, "fit", tmp_path / "export.json", "--map", "state=status", "--json")
    assert code == 0 and len(json.loads(text)) == 3


def test_repeats_without_a_seed_are_seeds_that_share_nothing(tmp_path):
    reading = read(write(tmp_path, planted(seeds=(0, 1)).drop(columns="seed")))
    assert set(reading.table["seed"]) == {0, 1} and set(reading.table["block"]) == {0}
    (full, *_) = lr_curves(reading.table)
    assert len(set(full.block)) == 1 and len(full.x) == 14


def broken(row=3, **values):
    def change(table):
        ((column, value),) = values.items()
        table = table.astype(object)
        table.loc[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="model"), ["no column 'model'", "--map"]),
        (lambda t: t.drop(columns="rank"), ["no column 'rank'"]),
        (lambda t: t.iloc[:0], ["no rows"]),
        (broken(lr="fast"), ["row 4", "column lr", "'fast' is not a number"]),
        (broken(lr=""), ["row 4", "column lr", "empty"]),
        (broken(lr=-1e-4), ["row 4", "column lr", "not above 0"]),
        (broken(lr=30), ["row 4", "column lr", "mixed units"]),
        (broken(test_nll="2.1 nats"), ["row 4", "column test_nll", "not a number"]),
        (broken(test_nll=""), ["row 4", "column test_nll", "empty", "done"]),
        (broken(test_nll="nan"), ["row 4", "column test_nll"]),
        (broken(test_nll="inf"), ["row 4", "column test_nll", "infinite"]),
        (broken(test_nll=-0.5), ["row 4", "column test_nll", "--higher"]),
        (broken(status="perhaps"), ["row 4", "column status", "'perhaps'"]),
        (broken(rank="4.5"), ["row 4", "column rank", "whole number"]),
        (broken(rank=0), ["row 4", "column rank", "below 1"]),
        (broken(seed=""), ["row 4", "column seed", "empty"]),
        (broken(model=""), ["row 4", "column model", "empty"]),
        (lambda t: t.assign(method="lora"), ["row 1", "column rank", "without a rank"]),
    ],
)
def test_bad_tables_are_refused_with_row_and_column(tmp_path, capsys, change, words):
    code, out, err = run(capsys, "fit", write(tmp_path, change(planted())))
    assert code == 2 and not out and all(word in err for word in words), err


def test_what_is_left_out_or_taken_otherwise_is_noted_with_its_rows(tmp_path, capsys):
    table = planted()
    again = pd.concat([table, table.iloc[[8]].assign(test_nll=2.5), table.iloc[[0]]])
    code, _, err = run(capsys, "fit", write(tmp_path, again))
    assert code == 0 and "rows 9 and 64" in err and "taken as repeats" in err
    assert "repeat another row" in err and "row 65" in err
    unknown = broken(2, test_nll="")(table.drop(columns="status"))
    code, _, err = run(capsys, "fit", write(tmp_path, unknown))
    assert code == 0 and "row 3" in err and "column test_nll" in err


def test_other_ways_to_write_the_same_table(tmp_path, capsys):
    table = planted()
    words = table.assign(method=np.where(table["rank"].isna(), "Full", "LoRA")).fillna({"rank": 0})
    typed = table.astype({"rank": "Int64", "model": "category"})
    typed["seed"] = typed["seed"].astype(str)
    paths = [write(tmp_path, words, "words.csv"), write(tmp_path, typed, "typed.parquet")]
    look = {"encoding": "utf-8-sig", "lineterminator": "\r\n", "quoting": 1, "index": False}
    for name, separator in (("tabs.csv", "\t"), ("semicolons.csv", ";")):
        paths.append(tmp_path / name)
        table.to_csv(paths[-1], sep=separator, **look)
    for path in paths:
        code, text, _ = run(capsys, "fit", path, "--json")
        assert code == 0 and [r["rank"] for r in json.loads(text)] == [None, 4, 16]


def test_percent_beside_fractions_is_refused(tmp_path, capsys):
    table = planted(higher=True)
    table.loc[table.index % 2 == 0, "test_nll"] *= 100
    code, _, err = run(capsys, "fit", write(tmp_path, table), "--higher", "test_nll")
    assert code == 2 and "mixed units" in err and "row" in err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "no file"),
        ("x.parquet", "not parquet", "cannot be read"),
        ("x.json", "[1, 2", "cannot be read"),
    ],
)
def test_no_file_and_no_table(tmp_path, capsys, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, _, err = run(capsys, "fit", tmp_path / name)
    assert code == 2 and words in err
