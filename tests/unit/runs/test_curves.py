"""Curves: tables that must be refused, and where learning curves end."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.runs.learning_curves import by_run, same_rows
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import TableError
from tests.tables import table

A, B = "a" * 64, "b" * 64


def two_arms(**changes):
    """Runs 0 to 6 of full fine-tuning and 7 to 13 of LoRA, on the same base and data."""
    full = table(lambda lr, s: 2.0).assign(method="fullft", rank=np.nan)
    both = pd.concat([full, table(lambda lr, s: 2.0)], ignore_index=True)
    both = both.assign(run_id=[f"run{k}" for k in range(14)], base_sha256=A, data_sha256=A)
    return both.assign(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_sha256": [A, B] * 7}, "cannot share a curve"),
        ({"data_sha256": [*[A] * 9, B, *[A] * 4]}, r"a in 13 runs, b{8} in 1 runs; runs run9\)"),
        ({"data_sha256": [A] * 7 + [B] * 7}, "which cannot share a curve"),  # of two arms
        ({"data_sha256": [*[A] * 3, None, None, *[A] * 9]}, r"2 of 14 runs \(runs run3, run4\)"),
    ],
)
def test_runs_of_different_or_unknown_bases_or_data_are_never_mixed(changes, words):
    with pytest.raises(TableError, match=words):
        lr_curves(two_arms(**changes))


def test_runs_of_one_base_and_one_data_set_are_and_so_is_anyones_table():
    assert len(lr_curves(two_arms())) == 2
    lr_curves(two_arms(data_sha256=[A] * 7 + [B] * 7, model=["m"] * 7 + ["n"] * 7, base_sha256=A))
    lr_curves(two_arms().drop(columns="data_sha256"))
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
