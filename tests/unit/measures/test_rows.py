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
        ("regime", "beyond", "tiny128", "256 updates", Setting.BEYOND),
        ("rank", "alike", "tiny128", "ranks 1 to 32, to update 256", Setting.IN_REGIME),
        ("large_batches", "at_512", "tiny64", "rank 8, after 12,288 examples", Setting.IN_REGIME),
        ("rl_matrices", "rank_1", "tiny64-skilled", "rank 1, 100 updates", Setting.BEYOND),
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


def test_four_arms_of_one_rank_have_each_their_own_ratio():
    """They were joined by group and rank once, so that all had the ratio of the last one."""
    common = {"model": "b", "dataset": "dialect", "batch_size": 4, "steps": 8, "flags": [], "n": 3}
    common |= {"low": None, "high": None, "best_nll": 2.0, "band": None}
    curves = [{**common, "method": "fullft", "rank": None, "best_lr": 1e-3, "layers": "all"}]
    layers = ("attention", "mlp", "attention+mlp", "unembedding")
    for k, layer in enumerate(layers, 1):
        arm = {"method": "lora", "rank": 4.0, "best_lr": k * 1e-3, "layers": layer}
        curves.append({**common, **arm, "alpha": 32.0})
    ratios = [
        {"group": "b on dialect, batch 4, steps 8", "rank": 4, "alpha": 32.0, "at": k}
        | {"ratio": {"value": float(k), "flags": []}, "regrets": {"10x": k / 100}}
        for k in (1, 2, 3, 4)
    ]
    results = {"sweep": "s", "scale": "tiny", "verdicts": [], "curves": curves, "ratios": ratios}
    found = rows_of(results, {"claims": {}}, pd.DataFrame())
    by_arm = {r.arm: r.estimate.value for r in pick(found, "lr_ratio")}
    assert by_arm == {f"lora r4, {layer}": float(k) for k, layer in enumerate(layers, 1)}
    for r in pick(found, "lr_ratio"):
        (best,) = pick(found, "best_lr", arm=r.arm)
        (lost,) = pick(found, "nats lost at 10x", arm=r.arm)
        assert best.estimate.value == r.estimate.value * 1e-3 == lost.estimate.value / 10
