"""The table of finished runs goes out and into another store, whole or not at all."""

import json
from contextlib import nullcontext

import pandas as pd
import pytest

from lorasweep.errors import StoreError
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import import_table, load_runs
from tests.unit.store.test_store import work
from tests.world import tiny_spec


@pytest.fixture
def table(tmp_path):
    """Three finished runs."""
    store = RunStore(tmp_path / "a")
    for k in range(3):
        work(store, tiny_spec(seed=k))
    return load_runs(store.root)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_goes_out_and_into_another_store(tmp_path, table, ending):
    path = tmp_path / f"table.{ending}"
    table.to_parquet(path) if ending == "parquet" else table.to_csv(path, index=False)
    assert import_table(tmp_path / "b", path) == 3
    assert import_table(tmp_path / "b", path) == 0
    again = load_runs(tmp_path / "b")
    for column in ("run_id", "test_nll"):
        assert list(again[column]) == list(table[column])
    assert again["imported"].all()
    other = RunStore(tmp_path / "b")
    assert all(other.claim(tiny_spec(seed=k)) is None for k in range(3))


def changed(row, **values):
    return {**row, "result": json.dumps({**json.loads(row["result"]), **values})}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"state": "failed"}, r"row 4: the state of run \w+ is 'failed'.*done or diverged"),
        ({"state": None}, "row 4: the state"),
        ({"run_id": "0" * 12}, "row 4: the spec belongs to run"),
        ({"test_nll": 9.0}, "row 4.*another result in an earlier row"),
        ({}, None),  # the same row twice
    ],
)
def test_a_table_with_a_bad_row_adds_nothing(tmp_path, table, values, problem):
    rows = table.to_dict("records")
    pd.DataFrame([*rows, changed(rows[0], **values)]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(StoreError, match=problem) if problem else nullcontext():
        assert import_table(tmp_path / "b", tmp_path / "t.csv") == 3
    assert len(RunStore(tmp_path / "b").existing()) == (0 if problem else 3)
