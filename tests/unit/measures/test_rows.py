"""Rows of answers: one key a row, curves told apart, and what was kept before is read alike."""

import json

import pandas as pd

from analysis.measures.rows import Setting, pick, rows_of
from analysis.questions.registry import read_question
from tests import planted


def test_every_kept_verdict_has_one_row_and_says_where_it_was_measured():
    rows, there = [], []
    for folder in planted.ANSWERS:
        results = json.loads((folder / "results.json").read_text())
        table = pd.read_parquet(folder / "table.parquet")
        rows += rows_of(results, read_question(folder), table)
        there += results["verdicts"]
    assert [r.verdict.plain() for r in rows if r.verdict] == there
    columns = ("sweep", "scale", "task", "quantity", "arm", "rank", "batch_size", "updates")
    keys = [(*(getattr(r, c) for c in columns), r.alpha, r.claim) for r in rows]
    assert len(set(keys)) == len(keys)
    regime, beyond, both = Setting.IN_REGIME, Setting.BEYOND, "tiny128 and tiny64-skills"
    for sweep, claim, *where in (
        ("regime", "low", "tiny128", "rank 16, 256 updates", regime),
        ("rank", "alike", "tiny128", "ranks 1 to 32, to update 256", regime),
        ("large_batches", "at_512", "tiny64", "rank 8, after 12,288 examples", regime),
        ("rl_matrices", "top_rank", "tiny64-skilled", "rank 16, 100 updates", beyond),
        ("layers", "attention_everywhere", both, "128 to 256 updates", beyond),
    ):
        row = pick(rows, sweep=sweep, claim=claim, scale="tiny")[0]
        assert [row.base, row.at, row.setting] == where


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
