"""`rate_law`: the kept ratios, the law and its rivals, the rule, and what the rule can decide."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import judge, look_level
from analysis.inference.estimate import N_DRAWS
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.questions import base, rate_law
from analysis.questions.rate_law import (
    BETA,
    COUNTED,
    KEPT,
    RATE_LAW,
    RIVALS,
    WITHIN,
    Cell,
    Cells,
    G,
    K,
)
from analysis.questions.registry import analyse
from analysis.report import report
from analysis.runs.learning_curves import at_step
from analysis.runs.table import read
from lorasweep.sweep.request import question
from tests import planted
from tests.planted import World, planted_table
from tests.world import ROOT, compose_request

ALPHAS = (0.5, 2, 8, 32, 128, 512, 2048)
FULL = {64: 6.5e-4, 128: 5e-4, 256: 4e-4}
"""Full fine-tuning's optima after 512 updates, as the sweep's grids assume."""
CONDITIONS = [
    *((f"tiny{h}-3m", h, a, 512, full) for h, full in FULL.items() for a in ALPHAS),
    *(("smollm2-135m-instruct", 576, a, 30, 9.9e-5) for a in (8, 128)),
    ("smollm2-135m-instruct", 576, 32, 120, 7e-5),
]
HIGHEST = ("hidden / alpha", 0.5)
CLAIM = {"estimand": "worst_criterion", "expected": -0.09, "margin": [-10, 0]}


# ---------------------------------------------------------------- the kept ratios and their fit


DATA = {
    "rules and lists": "dialect_shift(new_exceptions=0.3, rule_shift=0.25, shift_rank=8)",
    "lists": "dialect_shift(new_exceptions=1, rule_shift=0)",
    "rules of rank 8": "dialect_shift(rule_shift=0.25, shift_rank=8)",
    "all rules, rank 2": "dialect_shift(rule_shift=1, shift_rank=2)",
}


ADDED_LATER = (9.9e-4, 1.98e-3, 3.96e-3, 7.92e-3)
"""Learning rates of `short_runs` that were added after the ratios had been read."""
LATER_COLUMNS = ["expert_rank", "expert_alpha", "expert_outer"]
"""Empty columns of its newer table: the random stream of a curve depends on them."""


@pytest.mark.slow
@pytest.mark.parametrize("answer", sorted({c.answer for c in KEPT}))
def test_the_kept_ratios_are_those_of_the_kept_tables(answer):
    """`regime` is fitted with all of its conditions: they share one noise."""
    wanted = [c for c in KEPT if c.answer == answer]
    table = read(planted.answer.KEPT / answer / "table.parquet")
    table = table[table["schedule"] == "constant"].reset_index(drop=True)
    if answer == "short_runs-tiny":
        table = table[~table["lr"].isin(ADDED_LATER)].drop(columns=LATER_COLUMNS)
        table = table.reset_index(drop=True)
    for steps in dict.fromkeys(c.steps for c in wanted):
        cut = table if steps == table["steps"].max() else at_step(table, steps)
        found = {}
        for mine in base.by_group(base.fit(cut)).values():
            if (full := base.full_of(mine)) is None:
                continue
            lora = [o for o in base.lora_of(mine, MIN_RANK) if o.best_lr.draws is not None]
            lora = [o for o in lora if o.curve.key["layers"] == "attention+mlp+unembedding"]
            key = mine[0].curve.key
            for alpha in {o.curve.key["alpha"] for o in lora}:
                same = [o for o in lora if o.curve.key["alpha"] == alpha]
                found[key["model"], key["dataset"], alpha] = (full, ratio_of(same, full))
        for c in (c for c in wanted if c.steps == steps):
            data = DATA.get(c.data)
            at = [k for k in found if (k[0], k[2]) == (c.base, c.alpha) and data in (None, k[1])]
            full, ratio = found[at[0]]
            assert full.best_lr.value == pytest.approx(c.full, rel=1e-3)
            assert ratio.value == pytest.approx(c.ratio, rel=1e-3)
            assert ratio.log_draws.std() == pytest.approx(c.sd, abs=1e-3)


def test_the_law_fits_the_kept_ratios_and_the_power_law_does_not():
    assert len(KEPT) == 26 and {c.hidden for c in KEPT} == {64, 128, 256, 576}
    assert (G, K, BETA) == (1.33, 5.7, 0.45)  # frozen
    frozen = rate_law.rms(rate_law.misses(KEPT, rate_law.the_law))
    ln_g, ln_k, beta = rate_law.fitted_law(KEPT)
    assert math.exp(ln_g) == pytest.approx(1.32, abs=0.005)
    assert math.exp(ln_k) == pytest.approx(5.59, abs=0.01)
    assert beta == pytest.approx(0.52, abs=0.005) and frozen == pytest.approx(0.076, abs=5e-4)
    errors = {
        name: rate_law.rms(rate_law.misses(KEPT, predict))
        for name, predict in rate_law.predictions().items()
    }
    wanted = dict(zip(RIVALS, (0.495, 0.411, 0.324, 0.217, 0.171)))
    assert errors == pytest.approx({RATE_LAW: frozen, **wanted}, abs=1e-3)


def test_the_law_and_its_limits():
    """rho (1 + q rho) = L; it falls as 1 / alpha or 1 / sqrt(alpha); SmolLM2 as predicted."""
    rho = rate_law.law(128, 8, 512, 4.5e-4)
    moved = K * 128 * 4.5e-4 * 4**BETA
    assert rho * (1 + moved * rho) == pytest.approx(G * math.sqrt(3) * 128 / 8)
    assert rate_law.from_lora(128, 8, 512, rho * 4.5e-4) == pytest.approx(rho)
    for alpha, power in ((1e-8, -0.5), (1e8, -1)):
        low, high = (rate_law.law(128, a, 512, 4.5e-4) for a in (alpha, 2 * alpha))
        assert math.log2(high / low) == pytest.approx(power, abs=1e-3)
    for alpha, expected in ((8, 28.5), (128, 5.41)):
        assert rate_law.law(576, alpha, 30, 9.9e-5) == pytest.approx(expected, rel=2e-3)
    for low, expected in ((0.5, -0.52), (512, -0.88)):
        ends = [rate_law.law(128, a, 512, 4.5e-4) for a in (low, 4 * low)]
        assert math.log(ends[1] / ends[0]) / math.log(4) == pytest.approx(expected, abs=5e-3)


def test_with_noisy_gradients_the_law_gives_what_was_published():
    """Qwen3-1.7B with GRPO: 50 updates, alpha 32, full fine-tuning best at 2e-5."""
    start, moved = G * math.sqrt(3) / 32, K * (50 / 128) ** BETA * 2e-5

    def ratio(size):
        return 2 * start * size / (1 + math.sqrt(1 + 4 * moved * start * size**2))

    assert ratio(2048) == pytest.approx(28, abs=0.5) and "28" in str(rate_law.PUBLIC[0])
    assert ratio(math.sqrt(2048)) == pytest.approx(3.2, abs=0.05) and "3.2" in rate_law.PERHAPS


def test_each_grid_holds_what_the_law_and_most_rivals_predict():
    """All but the constants, which the kept ratios refute, and hidden / alpha at alpha 0.5."""
    points = compose_request(["+sweep=rate_law", "scale=tiny"]).points
    rivals = rate_law.predictions()
    curves = {}
    for spec in (p.spec for p in points):
        at = spec.model.hidden_size, getattr(spec.method, "alpha", 0)
        curves.setdefault(at, []).append(spec.lr)
    assert len(curves) == 24 and {len(lrs) for lrs in curves.values()} == {7}
    for (hidden, alpha), lrs in curves.items():
        cell = Cell("", hidden, alpha or 1, 512, FULL[hidden], 1, 0)
        for name, predict in rivals.items() if alpha else ():
            ratio = math.exp(predict(cell, FULL[hidden], 0))
            held = min(lrs) < ratio * FULL[hidden] < max(lrs)
            outside = name in ("constant", "sqrt(hidden)") or (name, alpha) == HIGHEST
            assert held or outside, (hidden, alpha, name)
        if alpha:  # the law well inside
            assert (
                3 * lrs[0] < rate_law.law(hidden, alpha, 512, FULL[hidden]) * FULL[hidden] < lrs[5]
            )


# ---------------------------------------------------------------- the rule


def planted_cells(rng, truth=RATE_LAW, noise=0.078, base_sd=0.04, cell_sd=0.05, off=0.0):
    """The 24 conditions with measured optima.

    noise: standard deviation of ln(optimum), whose draws have it, too; base_sd and cell_sd: how far
    the truth lies from the prediction; off: added to every ln(ratio).
    """
    predict = rate_law.predictions()[truth]
    of_base = {c[0]: rng.normal(0, base_sd) for c in CONDITIONS}
    full = {(c[0], c[3]): c[4] * math.exp(rng.normal(0, 0.2)) for c in CONDITIONS}
    seen = {at: math.log(lr) + rng.normal(0, noise) for at, lr in full.items()}
    found = []
    for name, hidden, alpha, steps, _ in CONDITIONS:
        at = (name, steps)
        cell = Cell(name, hidden, alpha, steps, full[at], 1, 0)
        ratio = float(predict(cell, full[at], full[at])) + of_base[name] + off
        lora = math.log(full[at]) + ratio + rng.normal(0, cell_sd) + rng.normal(0, noise)
        logs = np.array([[seen[at]], [lora]]) + rng.normal(0, noise, (2, 400))
        shown = (math.exp(seen[at]), math.exp(lora - seen[at]), noise * math.sqrt(2))
        found.append(Cell(name, hidden, alpha, steps, *shown, logs=logs))
    return found


def outcome(cells):
    condition = Cells("all", pd.DataFrame(), [], cells, cells, [])
    gates = condition.gates()
    return judge("law", CLAIM, "all", condition.worst, gates, 0, False, look_level(2)).outcome


def test_an_open_verdict_asks_for_bases_and_not_for_seeds():
    rng = np.random.default_rng(3)
    cells = next(
        c for c in iter(lambda: planted_cells(rng, cell_sd=0.12), None) if outcome(c) == "UNDECIDED"
    )
    worst = Cells("all", pd.DataFrame(), [], cells, cells, []).worst
    needed = judge("law", CLAIM, "all", worst, [], 0, False, look_level(2)).needed
    assert needed.endswith("bases (now 4)") or needed.endswith("bases")


def simulate(n, seed=0, **truth):
    """Share of the three verdicts in n simulated sweeps."""
    rng = np.random.default_rng(seed)
    counts = Counter(outcome(planted_cells(rng, **truth)) for _ in range(n))
    return {k: counts[k] / n for k in ("SUPPORTED", "REFUTED", "UNDECIDED")}


def test_the_law_is_supported_where_it_holds():
    assert simulate(30)["SUPPORTED"] >= 0.7


@pytest.mark.parametrize("rival", RIVALS)
def test_the_law_is_refuted_where_a_rival_holds(rival):
    assert simulate(10, truth=rival)["REFUTED"] >= 0.9


@pytest.mark.parametrize("wrong", [{"cell_sd": 0.2}, {"off": math.log(1.25)}])
def test_a_law_that_misses_by_more_is_not_supported(wrong):
    found = simulate(20, **wrong)
    assert found["SUPPORTED"] <= 0.1


def test_fewer_conditions_give_no_verdict():
    cells = planted_cells(np.random.default_rng(1), noise=0.02)
    assert outcome(cells) == "SUPPORTED" and outcome(cells[:-1]) == "UNDECIDED"
    (gate,) = Cells("all", pd.DataFrame(), [], cells[:-1], [], []).gates()
    assert gate.sentence == f"only 23 of {COUNTED} conditions were measured"


def test_the_error_is_the_rms_without_the_variance_of_the_measurement():
    rng = np.random.default_rng(2)
    at = [("a", 0.3), ("a", -0.1), ("b", 0.2)]
    cells = []
    for name, off in at:
        full = math.log(5e-4) + 0 * rng.normal(size=N_DRAWS)
        lora = full + math.log(rate_law.law(128, 8, 512, 5e-4)) + off
        lora += np.tile([-0.1, 0.1], N_DRAWS // 2)  # variance 0.01
        cells.append(Cell(name, 128, 8, 512, 5e-4, 1, 0.1, logs=np.stack([full, lora])))
    squares = rate_law.squared_errors(cells, rate_law.the_law)
    assert squares == pytest.approx([0.08, 0, 0.03])
    # four equally likely resamples of two bases: a a, a b, b a, b b
    wanted = np.sqrt([0.04, 0.11 / 3, 0.11 / 3, 0.03])
    assert sorted(rate_law.resampled(cells, squares)) == pytest.approx(sorted(wanted))


@pytest.mark.parametrize(
    ("own", "rival", "sign"),
    [(0.05, 0.2, -1), (0.05, 0.03, 1), (0.2, 0.5, 1), ([0.1, 0.2], 0.5, 0), (0.1, [0, 0.2], 0)],
)
def test_the_worst_criterion_is_all_criteria_or_one_of_them(own, rival, sign):
    errors = {k: np.resize(np.array(v, float), 256) for k, v in ((RATE_LAW, own), ("r", rival))}
    worst = rate_law.worst_of(errors)
    criteria = [errors[RATE_LAW] - WITHIN, errors[RATE_LAW] - errors["r"]]
    assert worst.low == pytest.approx(max(np.quantile(c, 0.025) for c in criteria), abs=0.01)
    assert worst.high == pytest.approx(max(np.quantile(c, 0.975) for c in criteria), abs=0.01)
    assert (worst.high < 0, worst.low > 0) == (sign < 0, sign > 0)


# ---------------------------------------------------------------- from a table of runs to a report


def planted_scale(scale, predict):
    """A request of one scale, and its table where a prediction holds."""

    def best(spec, step):
        at = (spec.model.hidden_size, spec.steps)
        full = FULL.get(at[0]) or {30: 9.9e-5, 120: 7e-5}[at[1]]
        if spec.method.name == "fullft":
            return full
        cell = Cell("", at[0], spec.method.alpha, at[1], full, 1, 0)
        return full * math.exp(predict(cell, full, 0))

    request = compose_request(["+sweep=rate_law", f"scale={scale}"])
    fresh = request.sweep.replicate.seeds
    specs = {p.id: p.spec for p in request.points}
    for spec in [s for s in specs.values() if s.seed == 120]:
        more = [dataclasses.replace(spec, seed=seed) for seed in fresh]
        specs |= {s.id: s for s in more}
    return request, planted_table(World(best=best), specs.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (RATE_LAW, "SUPPORTED"),
        pytest.param("sqrt(hidden / alpha)", "REFUTED", marks=pytest.mark.full),
    ],
)
def test_both_scales_are_judged_together(truth, expected, tmp_path):
    predict = rate_law.predictions()[truth]
    small, table = planted_scale("small", predict)
    folder = tmp_path / "rate_law-small"
    report.judge_and_report(table, question(small), folder, kept=tmp_path / "nothing")
    (alone,) = json.loads((folder / "results.json").read_text())["verdicts"]
    assert alone["outcome"] == "UNDECIDED" and "only 3 of 24" in alone["why"]
    tiny, table = planted_scale("tiny", predict)
    report.judge_and_report(table, question(tiny), tmp_path / "rate_law-tiny", kept=tmp_path)
    out = json.loads((tmp_path / "rate_law-tiny" / "results.json").read_text())
    assert out["verdicts"][0]["outcome"] == expected and len(out["cells"]) == COUNTED
    assert (out["errors"][truth]["high"] < 0.1) and out["from_lora"]["kept"] < 0.2
    rivals = {name: out["errors"][name]["value"] for name in RIVALS}
    assert out["best_rival"] == min(rivals, key=rivals.get)
    text = (tmp_path / "rate_law-tiny" / "report.md").read_text()
    for title in ("The law and its rivals", "The slope over alpha", "Shorter runs", "Fitted again"):
        assert f"## {title}" in text
    assert rate_law.PERHAPS in text and "These are 97.1% intervals, as the verdict's" in text
    found = analyse(read(folder / "table.parquet"), question(small), tmp_path)
    (v,) = found.verdicts  # the verdict is given once
    assert v.group == base.NO_CELL and "judged in another scale's answer" in v.why
    assert not any(s.figure == "law.png" for s in found.sections)


def test_full_fine_tuning_of_smollm2_has_the_kept_runs():
    kept = read(planted.answer.KEPT / "lr_ratio-small" / "table.parquet")
    points = compose_request(["+sweep=rate_law", "scale=small"]).points
    mine = {p.id for p in points if p.arm == "full_30"}
    assert mine == set(kept.loc[kept["method"] == "fullft", "run_id"])
    assert (ROOT / "conf" / "sweep" / "rate_law.yaml").is_file()
