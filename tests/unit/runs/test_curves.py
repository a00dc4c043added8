"""Curves: tables that must be refused, and where learning curves end."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.runs.learning_curves import by_run, same_rows
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import TableError
from tests.tables import table


def test_two_bases_are_never_mixed():
    frame = table(lambda lr, s: 2.0, seeds=(0, 1))
    frame["base_sha256"] = np.where(frame["seed"] == 0, "a" * 64, "b" * 64)
    with pytest.raises(TableError, match="cannot share a curve"):
        lr_curves(frame)


def two_arms(sha_full, sha_lora):
    full = table(lambda lr, s: 2.0).assign(method="fullft", rank=np.nan, data_sha256=sha_full)
    lora = table(lambda lr, s: 2.0).assign(data_sha256=sha_lora)
    both = pd.concat([full, lora], ignore_index=True)
    return both.assign(run_id=[f"run{k}" for k in range(len(both))])


def test_two_versions_of_a_data_set_are_never_mixed():
    """Not in one curve, and not in two arms that are compared."""
    assert len(lr_curves(two_arms("a" * 64, "a" * 64))) == 2
    frame = two_arms("a" * 64, "a" * 64)
    frame.loc[9, "data_sha256"] = "b" * 64
    with pytest.raises(TableError, match=r"aaaaaaaa in 13 runs, bbbbbbbb in 1 runs; runs run9\)"):
        lr_curves(frame)
    with pytest.raises(TableError, match="which cannot share a curve"):
        lr_curves(two_arms("a" * 64, "b" * 64))
    lr_curves(two_arms("a" * 64, "b" * 64).assign(model=["m"] * 7 + ["n"] * 7))  # other tokens


def test_runs_without_a_fingerprint_of_their_data_are_refused():
    frame = two_arms("a" * 64, "a" * 64)
    frame.loc[[3, 4], "data_sha256"] = None
    with pytest.raises(TableError, match=r"2 of 14 runs \(runs run3, run4\)"):
        lr_curves(frame)
    lr_curves(frame.drop(columns="data_sha256"))  # anyone's table


def test_a_missing_column_is_named():
    with pytest.raises(TableError, match="test_nll"):
        lr_curves(pd.DataFrame({"model": ["m"]}))


POINTS = [(0, 3.0), (1, 2.5), (2, 2.0), (4, 1.5)]


@pytest.mark.parametrize(
    ("at_end", "wanted"),
    [
        ({"test_nll_curve": 1.6}, [(1, 2.5), (2, 2.0), (4, 1.6)]),
        ({}, [(1, 2.5), (2, 2.0)]),  # the last loss is on more rows
    ],
)
def test_a_curve_is_read_to_its_end_where_the_same_rows_were_evaluated_there(at_end, wanted):
    curve = [{"step": s, "test_nll": y} for s, y in POINTS]
    curve[-1] |= at_end
    table = pd.DataFrame([{"result": json.dumps({"curve": curve})}])
    assert same_rows(by_run(table)[0]) == wanted and same_rows(None) == []
