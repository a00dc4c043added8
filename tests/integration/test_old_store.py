"""A store, a table and answers written in November 2026, before the packages had sub-packages:
today's code reads them alike."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.questions.registry import analyse
from lorasweep.methods.registry import spec_from
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from tests.world import cli

OLD = Path(__file__).resolve().parent.parent / "fixtures" / "store_2026_11"
INTERRUPTED = "279a02a29be0"
SWEEP = ("+sweep=lr_ratio", "scale=smoke")


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD / "runs", tmp_path / "runs")
    return RunStore(tmp_path / "runs")


def test_states_and_specs_of_an_old_store_are_read(old):
    states = old.states(sorted(old.existing()))
    assert sorted(states.values()) == ["diverged", *["done"] * 6, "interrupted"]
    assert states[INTERRUPTED] == "interrupted"
    for rid in states:
        assert spec_from(old.spec(rid)).id == rid


def test_the_table_of_an_old_store_is_the_one_that_was_written_then(old):
    then = pd.read_parquet(OLD / "table.parquet").sort_values("run_id").reset_index(drop=True)
    now = load_runs(old.root, list(then["run_id"]))
    assert set(then.columns) <= set(now.columns)
    for column in then.columns.drop(["spec", "result"]):
        assert [str(v) for v in now[column].fillna("-")] == [
            str(v) for v in then[column].fillna("-")
        ], column
    for column in ("spec", "result"):
        for a, b in zip(now[column], then[column]):
            assert json.loads(b).items() <= json.loads(a).items()


def test_old_answers_are_given_again():
    question = json.loads((OLD / "question.json").read_text())
    then = json.loads((OLD / "results.json").read_text())["verdicts"]
    now = analyse(pd.read_parquet(OLD / "table.parquet"), question).verdicts
    assert [(v.claim, v.outcome) for v in now] == [(v["claim"], v["outcome"]) for v in then]
    for a, b in zip(now, then):
        assert a.estimate.value == pytest.approx(b["estimate"]["value"])


def test_asking_again_trains_nothing_and_an_interrupted_run_goes_on(old, tmp_path):
    before = {
        rid: (old.folder(rid) / "result.json").read_bytes()
        for rid in old.existing()
        if old.result(rid)
    }
    answer = json.loads(cli(*SWEEP, "format=json", cwd=tmp_path).stdout)
    assert {v["outcome"] for v in answer["verdicts"]} == {"UNDECIDED"}
    assert all(
        (old.folder(rid) / "result.json").read_bytes() == text for rid, text in before.items()
    )

    cli("scale=smoke", "method=lora", "method.rank=1", "steps=600", "lr=3e-3", cwd=tmp_path)
    result = RunStore(old.root).result(INTERRUPTED)
    alone = json.loads((OLD / f"uninterrupted_{INTERRUPTED}.json").read_text())["result"]
    resumed = json.loads((old.folder(INTERRUPTED) / "attempts" / "2" / "env.json").read_text())
    assert resumed["resumed_from_step"] > 0
    assert result["state"] == "done" and result["steps_done"] == 600
    # another processor rounds otherwise; a run from scratch or a lost optimizer state would differ
    # by far more
    assert result["test_nll"] == pytest.approx(alone["test_nll"], abs=1e-3)
