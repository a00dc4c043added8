"""Rows of answers: one key a row, curves told apart, and what was kept before is read alike."""

import json

import pandas as pd
import pytest

from analysis.measures.rows import Setting, pick, rows_of
from analysis.questions.registry import read_question
from tests import planted


def of_folder(folder):
    results = json.loads((folder / "results.json").read_text())
    return rows_of(results, read_question(folder), pd.read_parquet(folder / "table.parquet"))


@pytest.fixture(scope="module")
def kept():
    return [r for folder in planted.ANSWERS for r in of_folder(folder)]


def test_every_kept_verdict_has_one_row_and_no_two_rows_have_one_key(kept):
    judged = [r for r in kept if r.verdict]
    there = [json.loads((f / "results.json").read_text())["verdicts"] for f in planted.ANSWERS]
    assert [r.verdict.plain() for r in judged] == [v for of in there for v in of]
    columns = ("sweep", "scale", "task", "quantity", "arm", "rank", "batch_size", "updates")
    keys = [(*(getattr(r, c) for c in columns), r.alpha, r.claim) for r in kept]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("sweep", "claim", "base", "at", "setting"),
    [
        ("regime", "low", "tiny128", "rank 16, 256 updates", Setting.IN_REGIME),
        ("rank", "alike", "tiny128", "ranks 1 to 32, to update 256", Setting.IN_REGIME),
        ("large_batches", "at_512", "tiny64", "rank 8, after 12,288 examples", Setting.IN_REGIME),
        ("rl_matrices", "top_rank", "tiny64-skilled", "rank 16, 100 updates", Setting.BEYOND),
        (
            *("layers", "attention_everywhere", "tiny128 and tiny64-skills"),
            *("128 to 256 updates", Setting.BEYOND),
        ),
    ],
)
def test_a_verdict_says_where_it_was_measured(kept, sweep, claim, base, at, setting):
    row = pick(kept, sweep=sweep, claim=claim, scale="tiny")[0]
    assert (row.base, row.at, row.setting) == (base, at, setting)


def test_arms_of_one_rank_have_each_their_own_ratio():
    """They were joined by group and rank once, so that all had the ratio of the last one."""
    common = {"model": "b", "dataset": "dialect", "batch_size": 4, "steps": 8, "flags": [], "n": 3}
    common |= {"low": None, "high": None, "best_nll": 2.0, "band": None, "method": "lora"}
    curves = [{**common, "method": "fullft", "rank": None, "best_lr": 1e-3, "layers": "all"}]
    ratios, places = [], {"attention": 1, "mlp": 2, "attention+mlp": 3}
    for layers, k in places.items():
        curves.append({**common, "rank": 4.0, "alpha": 32.0, "layers": layers, "best_lr": k * 1e-3})
        at = {"group": "b on dialect, batch 4, steps 8", "rank": 4, "alpha": 32.0, "at": k}
        found = {"ratio": {"value": float(k), "flags": []}, "regrets": {"10x": k / 100}}
        ratios.append(at | found)
    results = {"sweep": "s", "scale": "tiny", "verdicts": [], "curves": curves, "ratios": ratios}
    found = rows_of(results, {"claims": {}}, pd.DataFrame())
    for quantity, unit in (("lr_ratio", 1), ("best_lr", 1e-3), ("nats lost at 10x", 0.01)):
        values = {r.arm: r.estimate.value for r in pick(found, quantity) if r.arm != "fullft"}
        assert values == {f"lora r4, {layers}": k * unit for layers, k in places.items()}
