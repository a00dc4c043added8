"""What the page of all answers is made of, on planted answers: settings, averages over bases, units of
margins, the boundary, rates, the ledger and the sentences."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.inference.decide import look_level
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict
from analysis.inference.gates import Gate, GateCode
from analysis.report import plots_study
from analysis.report.study import details, findings, forest, ledger, load_map, page, rates
from analysis.report.study.answers import NO_CELL, Part, rows_of
from analysis.report.study.pooled import pooled
from analysis.report.study.setting import Setting, setting_of

ROOT = Path(__file__).resolve().parents[3]
RULES, LISTS = {"rule_shift": 0.25, "new_exceptions": 0}, {"rule_shift": 0.5}


def dialect(name="dialect", knobs=LISTS):
    return {"name": name, "location": "dialect", "source": "synthetic", "knobs": knobs}


DIALECT = (dialect(),)
GSM8K = {"name": "gsm8k", "location": "gsm8k", "source": "jsonl", "knobs": {}}
FACTS = {"name": "facts", "location": "facts", "source": "synthetic", "knobs": {}}


def verdict(value, half=0.1, outcome="REFUTED", group="b on dialect", level=0.95, **changes):
    e = Estimate(value, value - half, value + half, 5, level=level)
    v = Verdict("c", group, outcome, e, 1.0, (0.9, 1.1), True, "", log=False)
    return dataclasses.replace(v, **changes)


def answer(
    folder,
    *verdicts,
    sweep="rank",
    scale="tiny",
    base="b",
    seeds=(100, 101),
    data=DIALECT,
    **more,
):
    """An answer in its folder, with one run per seed and data set."""
    at = folder / f"{sweep}-{scale}"
    at.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "run_id": f"{scale}{seed}{d['name']}",
            "model": base,
            "seed": seed,
            "hidden_size": 64,
            **{"method": "lora", "rank": 8.0, "batch_size": 16, "steps": 256},
            "dataset": d["name"],
            "spec": json.dumps({"dataset": d}),
        }
        for seed in seeds
        for d in data
    ]
    pd.DataFrame(rows).to_parquet(at / "table.parquet")
    results = {"sweep": sweep, "scale": scale, "runs": len(rows), "curves": [], **more}
    says = {v.claim: {"says": f"{v.claim} holds", "whose": "study"} for v in verdicts}
    asked = {"name": sweep, "scale": scale, "question": f"{sweep}?", "source": "the study"}
    return Part(at, results, {**asked, "analysis": sweep, "claims": says}, list(verdicts))


# ---------------------------------------------------------------- settings, first study


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        ("b on low, batch 16, steps 256", Setting.IN_REGIME),
        ("b, 8 symbols, drawn anew", Setting.IN_REGIME),
        ("b on dialect", Setting.BEYOND),
        ("b, 16 symbols, drawn anew + 30% new exceptions", Setting.BEYOND),
        ("b on facts", Setting.BEYOND),
        ("b, gsm8k", Setting.REAL),
        ("b on low, batch 16, steps 256 and b on facts, batch 16, steps 128", Setting.BEYOND),
        ("all 4 tasks", Setting.REAL),  # names none: the hardest of all
    ],
)
def test_the_setting_follows_from_the_data_that_a_verdict_names(tmp_path, group, setting):
    part = answer(tmp_path, data=(dialect("low", RULES), dialect(), FACTS, GSM8K))
    assert setting_of(part.runs, group) is setting


def test_seeds_say_whether_an_answer_is_of_the_first_study(tmp_path):
    assert not answer(tmp_path, seeds=(100, 105)).first_study
    mixed = answer(tmp_path, seeds=(99, 100), scale="mixed")
    assert mixed.first_study and mixed.marked("REFUTED") == "REFUTED (first study)"


# ---------------------------------------------------------------- averages over bases


def bases(folder, verdicts, **changes):
    return [
        answer(
            folder,
            dataclasses.replace(v, group=f"b{k} on dialect"),
            scale=f"tiny_{k}",
            base=f"b{k}",
            **changes,
        )
        for k, v in enumerate(verdicts)
    ]


def test_three_bases_are_averaged_at_the_level_of_their_looks(tmp_path):
    level = look_level(3)
    values = (0.5, 0.6, 0.7)
    parts = bases(tmp_path, [verdict(v, 0.01, level=level) for v in values])
    (pool,) = pooled(parts)
    half = stats.t.ppf(0.5 + level / 2, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert pool.bases == ("b0", "b1", "b2") and pool.estimate.level == level
    assert pool.estimate.value == pytest.approx(0.6, abs=1e-3)
    assert pool.estimate.low == pytest.approx(0.6 - half, rel=0.02)
    # Ratios are averaged as logarithms.
    logs = bases(
        tmp_path,
        [
            verdict(math.exp(v), log=True, estimate=Estimate(*np.exp([v, v - 0.01, v + 0.01])))
            for v in values
        ],
    )
    (pool,) = pooled(logs)
    assert math.log(pool.estimate.value) == pytest.approx(0.6, abs=1e-3)


def test_what_is_no_replicate_is_not_averaged(tmp_path):
    three = [verdict(v) for v in (0.5, 0.6, 0.7)]
    assert len(pooled(bases(tmp_path, three))) == 1
    assert not pooled(bases(tmp_path, three[:2]))
    others = (
        {"estimate": Estimate(0.7, 0.7, 0.7)},  # a count
        {"estimate": Estimate(0.7, 0.6, 0.8, flags=(AT_LEAST,))},
        {"estimate": Estimate(0.7)},
    )
    for change in others:
        assert not pooled(bases(tmp_path, [*three[:2], dataclasses.replace(three[2], **change)]))
    last = three[2:]
    pair = bases(tmp_path, three[:2])
    fresh = bases(tmp_path / "first", last, seeds=(0, 1))[0]
    low = bases(tmp_path / "low", last, data=(dialect(knobs=RULES),))[0]
    other = dataclasses.replace(low, results={**low.results, "scale": "small"})
    for part in (fresh, low, other):
        assert not pooled([*pair, part])


def test_answers_that_must_not_be_judged_are_left_out_of_the_average(tmp_path):
    gate = Gate(GateCode.FLAGGED, place="lora r8: ", flags=("at_edge",))
    four = bases(
        tmp_path, [verdict(v, 0.01) for v in (0.5, 0.6, 0.7)] + [verdict(9, gates=(gate,))]
    )
    (pool,) = pooled(four)
    assert pool.estimate == pooled(four[:3])[0].estimate and pool.left_out == ("b3",)
    assert "(1 not to be judged: b3): c holds; 0.6" in "\n".join(
        details.questions(four, [pool], tmp_path)
    )
    # Too few are left: no average, and the page says why.
    (none,) = pooled(four[1:])
    assert none.estimate.value is None and none.left_out == ("b3",)
    text = "\n".join(details.questions(four, [none], tmp_path))
    assert "No average over bases (1 not to be judged: b3): c holds" in text
    (row,) = forest.rows_of(four[1:], [none])
    assert all(m.outcome for m in row.marks[Setting.BEYOND])
    # Another answer of that base, with fewer runs and no gate, stands for it.
    again = bases(tmp_path / "again", [verdict(0.8, 0.01)], seeds=(100,))[0]
    again = dataclasses.replace(again, results={**again.results, "scale": "tiny_3"})
    vars(again)["runs"] = four[3].runs
    assert pooled([*four, again])[0].bases == ("b0", "b1", "b2", "b3")


def test_the_average_over_bases_covers_a_planted_mean(tmp_path):
    """Bases differ, and each has Student's interval over five seeds."""
    rng, covered, n = np.random.default_rng(5), 0, 200
    parts = bases(tmp_path, [verdict(0.0)] * 3)
    for _ in range(n):
        made = []
        for part in parts:
            seeds = rng.normal(0, 0.1) + rng.normal(0, 0.1, 5)
            half = stats.t.ppf(0.975, 4) * seeds.std(ddof=1) / math.sqrt(5)
            v = dataclasses.replace(
                part.verdicts[0],
                estimate=Estimate(seeds.mean(), seeds.mean() - half, seeds.mean() + half),
            )
            made.append(dataclasses.replace(part, verdicts=[v]))
            vars(made[-1])["runs"] = part.runs  # read once
        e = pooled(made)[0].estimate
        covered += e.low <= 0 <= e.high
    assert covered >= 0.92 * n


# ---------------------------------------------------------------- units of margins


@pytest.mark.parametrize(
    ("expected", "margin", "log", "value", "place", "band"),
    [
        (10, (5, 20), True, 20, 1, (-1, 1)),
        (10, (5, 20), True, 2.5, -2, (-1, 1)),
        (0, (-0.1, 0.1), False, 0.05, 0.5, (-1, 1)),
        (0.7, (0, 0.9), True, 0.9, 1, (-math.inf, 1)),
        (-0.1, (-2, -0.03), False, 0.04, 2, (-math.inf, 1)),
        (1.5, (1, 100), True, 1, -1, (-1, math.inf)),
        (1, (1, 1000), True, 0.25, -2, (0, math.inf)),  # a factor of 2 is the unit
        (0, (-10, 0), False, 0.03, 3, (-math.inf, 0)),  # 0.01 nats are the unit
        (1, (0.5, 1), False, 0.75, -0.5, (-1, 0)),  # a correlation: 1 is the most there is
    ],
)
def test_values_are_placed_in_units_of_the_margin(expected, margin, log, value, place, band):
    v = verdict(value, expected=float(expected), margin=margin, log=log)
    scale = forest.scale_for(v)
    assert scale.at(value) == pytest.approx(place)
    assert scale.band == pytest.approx(band)


def test_claims_that_say_the_same_share_a_row_and_averages_have_no_verdict(tmp_path):
    parts = bases(tmp_path, [verdict(v) for v in (0.5, 0.6, 0.7)])
    nothing = verdict(0.0, estimate=Estimate(None), group=NO_CELL)
    parts.append(answer(tmp_path, nothing, sweep="other"))
    (row,) = forest.rows_of(parts, pooled(parts))
    assert [m.outcome for m in row.marks[Setting.BEYOND]] == ["REFUTED"] * 3 + [""]
    assert row.marks[Setting.BEYOND][0].value == pytest.approx(-5)
    plots_study.forest([row], tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000


# ---------------------------------------------------------------- the map


def cell(name, *ranks, needed=(1.0, 8.0)):
    """Ranks as (rank, load, regret in percent)."""
    return {
        "cell": name,
        "rank_needed": list(needed),
        "ranks": [
            {"rank": r, "load": load, "regret_percent": Estimate(p, p - 1, p + 1).plain()}
            for r, load, p in ranks
        ],
    }


def test_the_regime_ends_between_what_keeps_up_and_what_falls_behind(tmp_path):
    def boundary(*regrets):
        cells = [cell("b, x", *((1, load, p) for load, p in regrets))]
        points = load_map.points_of([answer(tmp_path, sweep="regime", cells=cells)])
        found = load_map.boundary_of(points)
        plots_study.load_map(points, found, tmp_path / "map.png")
        return found and (found.low, found.high, found.clean)

    assert boundary((0.1, 0), (0.2, 1), (0.3, 5), (0.4, 20)) == (0.2, 0.4, True)
    assert boundary((0.1, 0), (0.2, 9), (0.3, 1), (0.4, 20)) == (0.2, 0.3, False)
    assert boundary((0.1, 0), (0.2, 1)) is None
    assert boundary((0.0, 30), (0.1, 0), (0.2, 9)) == (0.1, 0.2, True)  # nothing new: no load


def test_the_map_comes_first_where_the_regime_was_measured(tmp_path):
    def headings(*parts):
        return [x for x in page.page(parts, tmp_path, kept=True).splitlines() if x.startswith("#")]

    rest = ["Sentence by sentence", "What was not tested", "How to read it"]
    rest = [f"## {title}" for title in [*rest, "What changed after a look", "Details"]]
    low = verdict(-0.01, claim="low", group="b, x")
    cells = [cell("b, x", (8, 0.1, 1.0))]
    regime = answer(tmp_path, low, sweep="regime", cells=cells)
    assert headings(regime)[1:-1] == ["## Where the regime ends", "## The claims", *rest]
    assert headings(answer(tmp_path, verdict(0.5)))[1:-1] == ["## The claims", *rest]


# ---------------------------------------------------------------- rates


def test_regret_is_drawn_over_multiples_of_full_fine_tunings_best_rate(tmp_path):
    rng, rows = np.random.default_rng(3), []
    arms = (("fullft", None, 1e-3, 2.0), ("lora", 4.0, 3e-3, 2.2), ("lora", 8.0, 5e-3, 2.1))
    for method, rank, best, lowest in arms:
        for k, seed in [*((k, 100) for k in range(-3, 4)), *((k, 101) for k in (-1, 0, 1))]:
            nll = lowest + 0.05 * k**2 + rng.normal(0, 1e-3)
            rows.append({"method": method, "rank": rank, "lr": best * 2.0**k, "seed": seed})
            rows[-1] |= {"test_nll": nll, "run_id": str(len(rows))}
    common = {"model": "b", "dataset": "dialect", "batch_size": 16, "steps": 100, "alpha": 32.0}
    table = pd.DataFrame(rows).assign(
        **common, status="done", nll_start=3.1, spec=json.dumps({"dataset": dialect()})
    )
    curves = [{"method": m, "best_lr": best} for m, _, best, _ in arms]
    part = answer(tmp_path, sweep="lr_ratio", curves=curves)
    table.to_parquet(part.folder / "table.parquet")
    assert rates.has_curves([part])
    (curve,) = rates.rate_curves([part])
    assert curve.label == "b, rank 8, beyond the regime"
    # 10 times full fine-tuning's best rate is twice LoRA's: 0.05 of a gain of 1 nat.
    at_ten = np.interp(10, curve.fitted_times, curve.fitted_percent)
    assert at_ten == pytest.approx(5, abs=0.5) and curve.fitted_percent.min() < 0.3
    assert curve.times[4] == pytest.approx(10, rel=0.03)
    assert curve.percent[4] == pytest.approx(5, abs=0.5)
    plots_study.rates([curve], tmp_path / "rates.png")
    assert not rates.has_curves([answer(tmp_path, sweep="rank", curves=curves)])


# ---------------------------------------------------------------- the ledger


def test_every_claim_that_the_ledger_names_is_asked_by_a_sweep_or_was():
    asked = {
        (path.stem, claim)
        for path in (ROOT / "sweeps").glob("*.yaml")
        for claim in yaml.safe_load(path.read_text()).get("claims", {})
    }
    for path in (ROOT / "analysis" / "results").glob("*/question.json"):
        question = json.loads(path.read_text())
        asked |= {(question["name"], claim) for claim in question["claims"]}
    named = [c for block in ledger.sentences().values() for s in block for c in s.claims]
    assert {tuple(c.split(": ")) for c in named} <= asked and len(named) == len(set(named))
    texts = [s.says for block in ledger.sentences().values() for s in block]
    assert len(texts) == len(set(texts)) > 60


def test_the_ledger_counts_outcomes_by_setting_and_names_the_scale(tmp_path):
    outcomes = ("REFUTED", "REFUTED", "UNDECIDED")
    made = [verdict(0.5, outcome=o, claim="parity") for o in outcomes]
    lines = ledger.ledger([*bases(tmp_path, made, seeds=(0,)), answer(tmp_path, verdict(1.0))])
    line = next(text for text in lines if "High ranks learn as fast" in text)
    counted = "**REFUTED** 2 of 3, **UNDECIDED** 1 of 3 at `tiny` (first study)"
    assert line.split(" | ")[1:] == ["", counted, " |"]
    untried = next(text for text in lines if "Start with rank 256" in text)
    assert untried.split(" | ")[1] == ledger.NOT_TESTED
    # A claim that no sentence names has a line of its own.
    assert lines[-1].startswith("| C holds |  | **REFUTED** at `tiny` |")


# ---------------------------------------------------------------- the sentences


def test_sentences_follow_the_verdicts_and_are_left_out_without_an_answer(tmp_path):
    def first(*outcomes):
        made = [
            verdict(-0.01, outcome=o, claim="low", group=f"b, {k}") for k, o in enumerate(outcomes)
        ]
        cells = [cell(f"b, {k}", (4, 0.1, 9.0), (8, 0.1, 2.0 + k)) for k in range(len(outcomes))]
        part = answer(tmp_path, *made, sweep="regime", data=(dialect(knobs=RULES),), cells=cells)
        (said,) = findings.sentences([part])
        return said

    held = first("SUPPORTED", "SUPPORTED")
    assert held.startswith("**LoRA without regret is real where little is new**")
    # The rank of an eighth of the width of 64, over both data sets.
    assert "on 2 data sets" in held and "gave up 2.0% to 3.0% of" in held
    assert "first study" not in held
    assert "not to be had" in first("REFUTED")
    assert "on some data" in first("SUPPORTED", "UNDECIDED")
    assert "stays open" in first("UNDECIDED")
    assert findings.sentences([]) == []
    one_seed = verdict(2.0, outcome="UNDECIDED", claim="rank_1", estimate=Estimate(2.0))
    assert findings.sentences([answer(tmp_path, one_seed, sweep="rl")]) == []


def test_the_sentence_about_batches_says_at_which_lora_falls_behind(tmp_path):
    def said(below_256, at_32, at_512):
        rules = (dialect(knobs=RULES),)
        made = [verdict(-0.05, outcome="UNDECIDED", claim="penalty")]
        made += [verdict(0.0, outcome=below_256, claim="below_256")]
        small = answer(tmp_path, *made, sweep="batch_size", data=rules)
        group = "b on dialect, batch 32, steps 8"
        made = [verdict(0.01, outcome=at_32, claim="at_32", group=group)]
        made += [verdict(0.01, outcome=at_512, claim="at_512", group=group)]
        (sentence,) = findings.sentences(
            [small, answer(tmp_path, *made, sweep="large_batches", data=rules)]
        )
        return sentence

    text = said("SUPPORTED", "REFUTED", "SUPPORTED")
    assert "in batches of 256 its highest rank gave up nothing in the regime" in text
    assert text.endswith("An eighth of b's width fell behind in batches of 32 and 512.")
    text = said("UNDECIDED", "SUPPORTED", "SUPPORTED")
    assert "gave up nothing" not in text and text.endswith("fell behind in batches of 512.")
    assert "fell behind" not in said("SUPPORTED", "SUPPORTED", "REFUTED")


def test_the_smallest_rank_without_regret_is_a_range_over_the_data_sets(tmp_path):
    def needed(*ranges):
        cells = [cell(f"b, {k}", needed=r) for k, r in enumerate(ranges)]
        made = [verdict(0.1, claim="fits", group=c["cell"]) for c in cells]
        (said,) = findings.sentences([answer(tmp_path, *made, sweep="regime", cells=cells)])
        assert said.startswith("**Counting bits does not say where it ends**")
        return said.partition("; ")[2]

    assert needed((1.0, 8.0), (4.0, 16.0)) == "it took a rank above 1 and of at most 16."
    assert needed((0.0, 4.0)) == "it took a rank of at most 4."
    assert "on some data above every rank tried" in needed((1.0, 8.0), (32.0, None))


# ---------------------------------------------------------------- exploratory and withdrawn


def test_exploratory_and_withdrawn_verdicts_are_marked_wherever_they_are_shown(tmp_path):
    made = verdict(-9.0, claim="rank_1", exploratory="the rule was written later")
    explores = answer(tmp_path, made, verdict(-8.0, claim="rank_1"), sweep="rl", data=(FACTS,))
    gone = Gate(GateCode.WITHDRAWN, "an arm is missing")
    away = verdict(-20.0, claim="tie", outcome="UNDECIDED", gates=(gone,))
    withdrawn = answer(tmp_path, away, sweep="rl_bits", data=(FACTS,))
    withdrawn.question["withdrawn"] = "an arm is missing"
    parts = [explores, withdrawn]
    shown = [r[4] for r in rows_of(parts)[1:]]
    assert shown == ["REFUTED (exploratory)", "REFUTED", "WITHDRAWN"]
    lines = ledger.ledger(parts)
    (line,) = [text for text in lines if "rank 1 reaches full fine-tuning's accuracy" in text]
    assert "**REFUTED** at `tiny`<br>**REFUTED** at `tiny` (exploratory)" in line
    (line,) = [text for text in lines if "it ties with full fine-tuning" in text]
    assert "**WITHDRAWN** at `tiny`" in line and "UNDECIDED" not in line
    item = details.verdict(explores, made)
    assert "**REFUTED (exploratory)**" in item and "the rule was written later" in item
    said = findings.sentences(parts)
    assert said[-1] == "**The answer of `rl_bits` is withdrawn**: an arm is missing."
    assert not any("-20" in text for text in said)
    (alone, _) = findings.sentences([answer(tmp_path, made, sweep="rl", data=(FACTS,)), withdrawn])
    assert "-9.0 points on generated tasks (exploratory)." in alone
    (row,) = forest.rows_of(parts, [])  # no withdrawn number is in the figure
    assert [m.explores for marks in row.marks.values() for m in marks] == [True, False]
    text = page.page(parts, tmp_path)
    assert "**WITHDRAWN**: an arm is missing." in text
