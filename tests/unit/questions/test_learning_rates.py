"""`lr_ratio`, `lr_scale` and `short_runs`: planted optima come back, and each verdict can be reached."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.optimum.valley import linex
from analysis.questions.registry import analyse, question_named
from analysis.runs.table import TableError
from tests import planted
from tests.planted import FULL, LORA, Valley, World, arms, ask, base, check, is_full, kept_question

pytestmark = pytest.mark.slow  # fits dozens of curves

SMOKE = {"dataset": "dialect_smoke"}
GAINED = planted.START - 2.0


def ask_ratio(valley, full=1.2e-3, folder=None, claims=None):
    lora = planted.FULL_BEST * valley.ratio
    specs = arms(base(**SMOKE), (4, 8, 16), full, lora, seeds=range(5), steps=8)
    return ask("lr_ratio", valley, specs, folder, claims)


def check_ratio(out, verdicts, ratio, expected):
    """Check the ratio, and what 10 times full fine-tuning's optimal LR costs LoRA."""
    estimate = verdicts["ratio"]["estimate"]
    assert estimate["low"] <= ratio <= estimate["high"]
    assert abs(math.log(estimate["value"] / ratio)) < math.log(1.15)
    assert all(c["low"] < c["best_lr"] < c["high"] for c in out["curves"])
    check(verdicts, **expected)
    if "ten_times" in expected:
        lost = 0.16 * float(linex(np.array(math.log(10 / ratio)), Valley(ratio).steep))
        found = verdicts["ten_times"]["estimate"]
        assert found["low"] <= 100 * lost / GAINED <= found["high"]


REFUTED = {"ratio": "REFUTED", "order": "REFUTED"}


@pytest.mark.parametrize(
    ("ratio", "cliff", "expected"),
    [
        *((1, None, REFUTED), (3, None, REFUTED | {"ten_times": "REFUTED"}), (6, None, {})),
        (20, 3.0, {"ratio": "REFUTED"}),  # a cliff beyond the valley leaves the optimum
    ],
)
def test_planted_ratio_comes_back(ratio, cliff, expected):
    out, found = ask_ratio(Valley(ratio, cliff=cliff))
    check_ratio(out, found, ratio, expected)
    assert found["ratio"]["outcome"] != "SUPPORTED"


def test_a_ratio_of_ten_is_supported_up_to_the_report_and_a_flipped_table_flips_it(tmp_path):
    folder = tmp_path / "reports" / "lr_ratio-smoke"
    claims = dict.fromkeys(("ratio", "order", "ten_times"), "SUPPORTED")
    check_ratio(*ask_ratio(Valley(10), folder=folder), 10, claims)
    assert "**SUPPORTED**" in (folder / "report.md").read_text()
    table = pd.read_parquet(folder / "table.parquet")
    table.loc[table["method"] == "lora", "lr"] /= 5
    table.to_csv(tmp_path / "flipped.csv", index=False)
    places = ("--reports-dir", tmp_path / "reports", "--out", tmp_path / "again")
    assert main(["lr_ratio", *map(str, places), "--table", f"{tmp_path}/flipped.csv"]) == 0
    text = (tmp_path / "again" / "report.md").read_text()
    primary = next(line for line in text.splitlines() if line.startswith("| ratio (primary)"))
    assert "**REFUTED**" in primary


SPEED = {"measure": "speed", "of": {"rank": "top"}, "over": "full"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"measure": "sped"}, r"estimands.a: unknown measure 'sped'. Use one of: speed, "),
        ({"over": "fullft"}, r"estimands.a.over: unknown arm 'fullft'. Use one of: full, control"),
        ({"of": {"layer": "mlp"}}, r"estimands.a.of: unknown setting 'layer'"),
        ({"marge": 1}, r"estimands.a: unknown key 'marge'"),
        ({"every_task": "b", "worst": "max"}, r"estimands.a: unknown"),
        (None, r"lr_ratio measures lr_ratio, .* not 'rho'"),  # a claim about an unknown estimand
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused(changes, named):
    with pytest.raises(TableError, match=named):
        if changes:
            question_named("mine", {"a": {**SPEED, **changes}}, {})
        asked = kept_question("lr_ratio", {"ratio": {"estimand": "rho", "margin": [0, 1]}})
        analyse(planted.planted_table(World(), arms(base(), (4,), n=1, seeds=[0])), asked)


def test_a_comparison_of_ones_own_is_a_few_lines_of_a_sweeps_file():
    """Rank 4 against rank 8, over which no shipped question asks; both are those of a variant."""
    said = {"estimands": {"low": {**SPEED, "of": {"rank": 4}, "over": {"rank": 8}}}}
    claim = {"low": {"estimand": "low", "expected": 0.5, "margin": [0.4, 0.6]}}
    world = World(lambda s: s.method.rank / 8)
    table = planted.planted_table(world, arms(base(**SMOKE), (4, 8), steps=64))
    (v,) = analyse(table, {"analysis": "mine", "claims": claim, **said}).verdicts
    assert v.outcome == "SUPPORTED" and v.estimate.value == pytest.approx(0.5, rel=0.05)


BASES = ("tiny64-3m", "tiny64", "tiny64-s1", "tiny128-3m", "tiny128-4m", "tiny256-3m")


@pytest.mark.parametrize(("power", "outcome"), [(0.0, "SUPPORTED"), (1.0, "REFUTED")])
def test_the_law_of_the_ratio(power, outcome, tmp_path):
    def best(spec, step):
        widths = (spec.model.hidden_size / 64) ** power
        return 1.6e-3 if is_full(spec) else 6.4e-3 * 32 / spec.method.alpha * widths

    specs = {}
    for model in BASES:
        for alpha in (8.0, 32.0, 128.0):
            lora = {"lora": 6.4e-3 * 32 / alpha, "alpha": alpha, "seeds": range(3)}
            found = arms(base(model, **SMOKE), (4,), 1.6e-3, steps=16, **lora)
            specs |= {s.id: s for s in found}
    world = World(best=best, more=lambda s: {"retain_start": 2.0, "retain_nll": 2.1})
    _, found = ask("lr_scale", world, specs.values(), tmp_path if power else None)
    check(found, hidden=(outcome, pytest.approx(power, abs=0.15)), alpha="SUPPORTED")


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_short_runs_and_norms(factor, outcome, tmp_path):
    def best(spec, step):
        return FULL if is_full(spec) else LORA * (factor if step <= 24 else 1.0)

    def more(spec):
        norms = {"delta": 2.0} if is_full(spec) else {"a": 0.5, "b": 1.0, "delta": 3.0}
        return {"spectra": {"model.layers.0.q_proj": norms, "lm_head": norms}}

    folder = tmp_path if outcome == "SUPPORTED" else None
    specs = arms(base(**SMOKE), (4, 8), steps=384)
    _, found = ask("short_runs", World(best=best, more=more), specs, folder)
    check(found, short_over_long=(outcome, pytest.approx(factor, rel=0.15)))
    check(found, b_grows=pytest.approx(2.0), same_movement=pytest.approx(1.5))
