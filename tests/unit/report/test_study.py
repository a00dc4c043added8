"""The page of all answers, on planted ones: settings, averages, figures, findings, ledger."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.inference.decide import look_level
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict, fixed, number
from analysis.inference.gates import Gate, GateCode
from analysis.measures import next_runs
from analysis.measures.regret import COUNTS
from analysis.questions.registry import OLDER_KEYS, analyse, read_question
from analysis.report import plots_study, report
from analysis.report.report import question_hash
from analysis.report.study import answers, figures, findings, ledger, page
from analysis.report.study.answers import NO_CELL, Answer, Setting, pooled, read_answers, rows_of
from lorasweep.cli.answer import KEPT
from lorasweep.config.compose import composer
from lorasweep.sweep.request import question
from tests.planted import kept_answer
from tests.world import ROOT


def dialect(name="dialect", **knobs):
    return {"name": name, "location": "dialect", "source": "synthetic", "knobs": knobs}


RULES = (dialect(rule_shift=0.25, new_exceptions=0),)
LISTS = (dialect(rule_shift=0.5),)
GSM8K = {"name": "gsm8k", "location": "gsm8k", "source": "jsonl", "knobs": {}}
FACTS = {"name": "facts", "location": "facts", "source": "synthetic", "knobs": {}}


def verdict(value, half=0.1, outcome="REFUTED", group="b on dialect", level=0.95, **changes):
    e = Estimate(value, value - half, value + half, 5, level=level)
    v = Verdict("c", group, outcome, e, 1.0, (0.9, 1.1), True, "", log=False)
    return dataclasses.replace(v, **changes)


def answer(
    folder, *verdicts, sweep="rank", scale="tiny", base="b", seeds=(100, 101), data=LISTS, **more
):
    """An answer in its folder, with one run per seed and data set."""
    at = folder / f"{sweep}-{scale}"
    at.mkdir(parents=True, exist_ok=True)
    rows = [
        {"run_id": f"{scale}{seed}{d['name']}", "seed": seed, "spec": json.dumps({"dataset": d})}
        | {"hidden_size": 64, **curve(base, d["name"])}
        for seed in seeds
        for d in data
    ]
    pd.DataFrame(rows).to_parquet(at / "table.parquet")
    results = {"sweep": sweep, "scale": scale, "runs": len(rows), "curves": [], **more}
    says = {v.claim: {"text": f"{v.claim} holds", "source": "study"} for v in verdicts}
    asked = {"name": sweep, "scale": scale, "question": f"{sweep}?", "source": "the study"}
    return Answer(at, results, {**asked, "analysis": sweep, "claims": says}, list(verdicts))


def pages(found, folder):
    return page.pages(found, folder / "README.md", kept=True)


def curve(model, dataset="dialect", **more):
    found = {"model": model, "dataset": dataset, "method": "lora", "rank": 8.0, "steps": 256}
    return {**found, "batch_size": 16, **more}


def test_a_verdict_is_the_one_of_its_own_report(reports):
    path = reports / "rank-smoke/results.json"
    (kept,) = read_answers([reports])
    assert {r[0].split(":")[0] for r in rows_of([kept])[1:]} == {"rank"}
    results = json.loads(path.read_text())
    assert [v.plain() for v in kept.verdicts] == results["verdicts"]
    assert any(v.gates for v in kept.verdicts)
    for v in results["verdicts"]:
        v["outcome"], v["p"] = "SUPPORTED", 0.04
        del v["gates"]  # older answers have none
    path.write_text(json.dumps(results))
    (kept,) = read_answers([reports])
    # The report has corrected its two primary claims; the page corrects nothing again.
    assert sum(v.primary for v in kept.verdicts) == 2
    assert {(v.outcome, v.gates) for v in kept.verdicts} == {("SUPPORTED", ())}
    assert "**SUPPORTED** at `smoke`" in pages([kept], reports)["ledger.md"]


def test_the_page_is_written_with_its_figures_and_none_that_is_out_of_date(reports, tmp_path):
    shutil.copytree(reports / "rank-smoke", tmp_path / "kept" / "rank-smoke")
    found = read_answers([reports, tmp_path / "kept"])  # the first of one name is used
    assert [a.folder for a in found] == [reports / "rank-smoke"]
    (tmp_path / page.MAP).write_bytes(b"of an answer that is gone")
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "gone.md").write_text("gone. How to read: [ledger](../ledger.md)")
    (tmp_path / "questions" / "notes.md").write_text("mine")
    page.write(found, tmp_path / "study.md")
    texts = page.pages(found, tmp_path / "study.md")
    assert {n: (tmp_path / n).read_text() for n in texts} == texts
    assert set(texts) == {"study.md", "ledger.md", "questions/README.md", "questions/rank.md"}
    assert f"]({page.FOREST})" in texts["study.md"] and (tmp_path / page.FOREST).is_file()
    assert f"](../{page.SPEED})" in texts["questions/rank.md"] and (tmp_path / page.SPEED).is_file()
    assert page.MAP not in texts["study.md"] and not (tmp_path / page.MAP).exists()
    assert not (tmp_path / "questions" / "gone.md").exists()
    assert (tmp_path / "questions" / "notes.md").read_text() == "mine"
    assert "../reports/rank-smoke/report.md" in texts["questions/rank.md"]
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)#]+)", text):
            there = ((tmp_path / name).parent / target).exists()
            assert target.startswith("http") or there, (name, target)


def test_speed_is_measured_along_the_run_at_each_lengths_best_rate(reports):
    """All ranks of the planted runs need 1 / 0.7 as many updates, whatever the length."""
    (kept,) = read_answers([reports])
    found = figures.speeds(kept.runs, figures.doublings(96))
    assert found and all(set(mine) >= {16, 32, 64} for mine in found.values())
    values = [e.value for mine in found.values() for e in mine.values()]
    assert values == pytest.approx([0.7] * len(values), abs=0.05)
    assert set(figures.speed_answers([kept])) == {Setting.BEYOND}


def test_words_are_no_part_of_what_is_hashed_and_every_claim_has_some():
    words = {"text": "other words", "measure": "metres", "note": "the point"}
    known = {"planning": {"smoke": {"sd": 0.5, "units": 7}}, "underpowered": True}
    with composer() as compose:
        questions = [question(compose([f"+sweep={n}", "scale=smoke"])) for n in answers.ORDER]
    for asked in questions:
        claims = asked["claims"]
        assert asked["how"] and all(c["text"] and c["measure"] for c in claims.values())
        first = next(iter(claims))
        other = {**asked, "claims": {**claims, first: {**claims[first], **words, **known}}}
        assert question_hash(other) == question_hash(asked)
        other["claims"][first]["margin"] = [0.0, 1e9]
        assert question_hash(other) != question_hash(asked)


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        ("b on low, batch 16, steps 256", Setting.IN_REGIME),
        ("b, 8 symbols, drawn anew", Setting.IN_REGIME),
        ("b on dialect", Setting.BEYOND),
        ("b, gsm8k", Setting.REAL),
        ("b on low, batch 16, steps 256 and b on facts, batch 16, steps 128", Setting.BEYOND),
        ("all 4 tasks", Setting.REAL),  # names none: the hardest of all
    ],
)
def test_the_setting_follows_from_the_data_that_a_verdict_names(tmp_path, group, setting):
    low = dialect("low", rule_shift=0.25, new_exceptions=0)
    assert answer(tmp_path, data=(low, *LISTS, FACTS, GSM8K)).setting(group) is setting


def test_a_verdict_says_where_it_was_measured_as_far_as_that_is_known(tmp_path):
    group = "b on dialect, batch 16, steps 256"
    arms = [curve("b", rank=r) for r in (None, 1.0, 8.0)]
    made = answer(tmp_path, curves=arms)
    assert made.where(verdict(1, group=group)) == "b (dialect; rank 8, 256 updates)"
    assert made.where(verdict(1, group=group), min) == "b (dialect; rank 1, 256 updates)"
    short = answer(tmp_path, curves=[curve("b", rank=1.0, steps=25), *arms])
    assert short.where(verdict(1, group=group)) == "b (dialect; rank 8, 256 updates)"
    full = answer(tmp_path, curves=arms[:1])
    assert full.where(verdict(1, group=group)) == "b (dialect; 256 updates)"
    facts = answer(tmp_path, sweep="capacity", cells=[{"facts": 64}])  # of another form
    assert facts.where(verdict(1, group="b, facts of 16 bits")) == "b, facts of 16 bits"
    regime = answer(tmp_path, sweep="regime", cells=[condition("b, x", (8, 1.0))])
    regime.question["claims"]["low"] = {"estimand": "eighth"}
    regime.results["read"] = {"eighth": "rank of 0.125 of the width"}
    v = verdict(1, claim="low", group="b, x")
    assert regime.where(v) == "b, x (rank 8, 256 updates)"


def bases(folder, verdicts, **changes):
    named = [dataclasses.replace(v, group=f"b{k} on dialect") for k, v in enumerate(verdicts)]
    return [
        answer(folder, v, scale=f"tiny_{k}", base=f"b{k}", **changes) for k, v in enumerate(named)
    ]


def test_three_bases_are_averaged_at_the_level_of_their_looks(tmp_path):
    level = look_level(3)
    values = (0.5, 0.6, 0.7)
    (pool,) = pooled(bases(tmp_path, [verdict(v, 0.01, level=level) for v in values]))
    half = stats.t.ppf(0.5 + level / 2, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert pool.bases == ("b0", "b1", "b2") and pool.estimate.level == level
    assert pool.estimate.value == pytest.approx(0.6, abs=1e-3)
    assert pool.estimate.low == pytest.approx(0.6 - half, rel=0.02)
    # Ratios are averaged as logarithms.
    ends = [Estimate(*np.exp([v, v - 0.01, v + 0.01])) for v in values]
    (pool,) = pooled(bases(tmp_path, [verdict(1, log=True, estimate=e) for e in ends]))
    assert math.log(pool.estimate.value) == pytest.approx(0.6, abs=1e-3)


def test_what_is_no_replicate_is_not_averaged(tmp_path):
    three = [verdict(v) for v in (0.5, 0.6, 0.7)]
    assert len(pooled(bases(tmp_path, three))) == 1
    assert not pooled(bases(tmp_path, three[:2]))
    others = (
        {"estimate": Estimate(0.7, 0.7, 0.7)},  # a count
        {"estimate": Estimate(0.7, 0.6, 0.8, flags=(AT_LEAST,))},
        {"estimate": Estimate(0.7)},
        {"exploratory": "early seeds"},
    )
    for change in others:
        assert not pooled(bases(tmp_path, [*three[:2], dataclasses.replace(three[2], **change)]))
    pair = bases(tmp_path, three[:2])
    low = bases(tmp_path / "low", three[2:], data=RULES)[0]
    small = dataclasses.replace(low, results={**low.results, "scale": "small"})
    assert not pooled([*pair, low]) and not pooled([*pair, small])


def test_answers_that_must_not_be_judged_are_left_out_of_the_average(tmp_path):
    gate = Gate(GateCode.FLAGGED, place="lora r8: ", flags=("at_edge",))
    made = [verdict(v, 0.01) for v in (0.5, 0.6, 0.7)] + [verdict(9, gates=(gate,))]
    four = bases(tmp_path, made)
    (pool,) = pooled(four)
    assert pool.estimate == pooled(four[:3])[0].estimate and pool.left_out == ("b3",)
    # Too few are left: no average.
    (none,) = pooled(four[1:])
    assert none.estimate.value is None and none.left_out == ("b3",)
    (text,) = (t for n, t in pages(four[1:], tmp_path).items() if n == "questions/rank.md")
    assert "No average over bases (1 not to be judged: b3): c holds" in text
    # Another answer of that base, with fewer runs and no gate, stands for it.
    again = bases(tmp_path / "again", [verdict(0.8, 0.01)], seeds=(100,))[0]
    again = dataclasses.replace(again, results={**again.results, "scale": "tiny_3"})
    vars(again)["runs"] = four[3].runs
    assert pooled([*four, again])[0].bases == ("b0", "b1", "b2", "b3")


# ---------------------------------------------------------------- figures


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
    scale = figures.scale_for(verdict(value, expected=float(expected), margin=margin, log=log))
    assert scale.at(value) == pytest.approx(place)
    assert scale.band == pytest.approx(band)


def test_the_figure_of_claims_has_the_primary_verdicts_that_count_with_their_numbers(tmp_path):
    made = bases(tmp_path, [verdict(v) for v in (0.5, 0.6, 0.7)])
    nothing = verdict(0.0, estimate=Estimate(None), group=NO_CELL)
    gone = Gate(GateCode.WITHDRAWN, "an arm is missing")
    out = [{"exploratory": "later"}, {"primary": False}, {"gates": (gone,)}]
    left = [verdict(0.9, claim=f"c{k}", **change) for k, change in enumerate(out)]
    made.append(answer(tmp_path, nothing, *left, sweep="other"))
    ours = answer(tmp_path, verdict(0.9, claim="ours"), sweep="another")
    ours.question["claims"]["ours"]["source"] = "ours"
    rows = figures.claim_rows([*made, ours])
    assert [r.value for r in rows] == pytest.approx([-5, -4, -3])
    one = rows[0]
    assert (one.measured, one.margin, one.outcome) == ("0.5 [0.4, 0.6]", "0.9 to 1.1", "REFUTED")
    assert one.says == "c holds" and one.where.startswith("b0 on dialect")
    open_end = figures.claim_rows([answer(tmp_path, verdict(-1.0, margin=(-10, 0), expected=0.0))])
    assert open_end[0].margin == "up to 0"  # the open end is no number
    plots_study.forest(rows, tmp_path / "forest.png")


def test_the_page_shows_twelve_claims_at_most_and_says_of_how_many(tmp_path):
    many = answer(tmp_path, *(verdict(0.5, claim=f"c{k}") for k in range(14)))
    text = pages([many], tmp_path)["README.md"]
    assert "withdrawn verdicts, and 2 of 14 for want of room." in text
    assert "for want" not in pages([answer(tmp_path, verdict(0.5))], tmp_path)["README.md"]


def plain(value, half=1.0):
    return Estimate(value, value - half, value + half).plain()


def condition(name, *ranks, rank=5.0, loads=(0.01, 6.0, 0.4), updates=256, first=None):
    """Ranks as (rank, regret in percent); `loads` of the needed rank, by the three counts.

    `first`: the gap after 64 updates, in percent of a gain of half a nat.
    """
    early = None if first is None else plain(first / 200, 1 / 200)
    by_count = dict(zip(COUNTS, loads))
    return {
        "cell": name,
        "batch_size": 16,
        "updates": updates,
        "bits": {count: 100 * load for count, load in by_count.items()},
        "rank_interpolated": plain(rank),
        "loads_needed": {count: plain(load, 0.1) for count, load in by_count.items()},
        "ranks": [
            {
                "rank": r,
                "loads": by_count,
                "regret_percent": plain(percent),
                "gain_nats": 0.5,
                "gap_nats_first": early,
            }
            for r, percent in ranks
        ],
    }


def batches(folder, regret, outcome="REFUTED"):
    """`large_batches` on another base: the control, and a batch of 512."""
    outcomes, group = {"at_32": outcome, "at_512": "SUPPORTED"}, "c on dialect"
    made = [verdict(0.01, outcome=o, claim=c, group=group) for c, o in outcomes.items()]
    regrets = [
        {"batch_size": b, "updates": n, "rank": 8, "regret_percent": plain(v, 2.5)}
        for b, n, v in [(32, 384, regret), (512, 24, 9.0)]
    ]
    curves = [curve("c", rank=8.0, batch_size=32, steps=384)]
    more = {"regrets": regrets, "curves": curves}
    return answer(folder, *made, sweep="large_batches", base="c", data=RULES, **more)


def test_regret_is_drawn_a_line_a_condition_with_the_other_bases_control(tmp_path):
    low = condition("b, 8 symbols, change of rank 2", (1, 20.0), (8, 0.05))
    cells = [condition("b, nothing new", (8, 30.0)), low]
    regime = answer(tmp_path, sweep="regime", cells=cells)
    lines = figures.regret_lines([regime, batches(tmp_path, 7.8)])
    values = {line.name: {r: e.value for r, e in line.regrets.items()} for line in lines}
    assert values == {
        "b, 256 updates of 16:\n8 symbols, change of rank 2": {1: 20.0, 8: 0.05},
        "c, 384 updates of 32:\n8 symbols, drawn anew": {8: 7.8},
    }
    assert [line.setting for line in lines] == [Setting.BEYOND, Setting.IN_REGIME]
    plots_study.regret_map(lines, tmp_path / "map.png")


def test_regret_is_drawn_over_multiples_of_full_fine_tunings_best_rate(tmp_path):
    rng, rows = np.random.default_rng(3), []
    arms = (("fullft", None, 1e-3, 2.0), ("lora", 4.0, 3e-3, 2.2), ("lora", 8.0, 5e-3, 2.1))
    for method, rank, best, lowest in arms:
        for k, seed in [*((k, 100) for k in range(-3, 4)), *((k, 101) for k in (-1, 0, 1))]:
            nll = lowest + 0.05 * k**2 + rng.normal(0, 1e-3)
            rows.append({"method": method, "rank": rank, "lr": best * 2.0**k, "seed": seed})
            rows[-1] |= {"test_nll": nll, "run_id": str(len(rows))}
    common = {"model": "b", "dataset": "dialect", "batch_size": 16, "steps": 100, "alpha": 32.0}
    common |= {"status": "done", "nll_start": 3.1, "hidden_size": 64}
    common |= {"spec": json.dumps({"dataset": LISTS[0]})}
    curves = [{"method": m, "best_lr": best} for m, _, best, _ in arms]
    made = answer(tmp_path, sweep="lr_ratio", curves=curves)
    pd.DataFrame(rows).assign(**common).to_parquet(made.folder / "table.parquet")
    assert figures.has_rate_curves([made])
    (found,) = figures.rate_curves([made])
    assert found.label == "b (hidden size 64), rank 8, alpha 32, 100 updates"
    assert found.ratio.value == pytest.approx(5, rel=0.1) and found.ratio.has_interval()
    assert found.setting is Setting.BEYOND
    # 10 times full fine-tuning's best rate is twice LoRA's: 0.05 of a gain of 1 nat.
    at_ten = np.interp(10, found.fitted_times, found.fitted_percent)
    assert at_ten == pytest.approx(5, abs=0.5) and found.fitted_percent.min() < 0.3
    assert found.times[4] == pytest.approx(10, rel=0.03)
    assert found.percent[4] == pytest.approx(5, abs=0.5)
    plots_study.rates([found], tmp_path / "rates.png")
    assert not figures.has_rate_curves([answer(tmp_path, sweep="rank", curves=curves)])


def test_a_rate_that_was_added_later_is_on_the_page_and_no_empty_section_is(tmp_path):
    one = answer(tmp_path, verdict(0.5))
    added = {"arm": "lora", "what": "learning rate 1e-3", "why": "four were left"}
    one.question["added_after"] = [added]
    texts = pages([one], tmp_path)
    assert "- `rank-tiny`, arm lora: learning rate 1e-3; four were left" in texts["changes.md"]
    text = texts["README.md"]
    assert "## The post's primary claims" in text and "## Regret over rank" not in text


@pytest.mark.parametrize(
    ("outcome", "start"),
    [
        ("SUPPORTED", "A law fixed beforehand predicts LoRA's best learning rate from"),
        ("REFUTED", "A law fixed beforehand does not predict LoRA's best learning rate from"),
        ("UNDECIDED", "It is undecided whether a law fixed beforehand predicts LoRA's best"),
    ],
)
def test_the_law_is_a_finding_with_its_error_and_its_best_rivals(outcome, start, tmp_path):
    def error(value):
        return Estimate(value, value - 0.1, value + 0.1, 4).plain()

    off = {("tiny64-3m", 0.5): 1.1, ("b", 0.5): 0.9, ("tiny64-3m", 2048): 0.6, ("b", 2048): 0.75}
    cells = [
        {"base": b, "alpha": a, "steps": 512, "ratio": 2 * v, "law": 2.0}
        for (b, a), v in off.items()
    ]
    errors = {"the law": error(0.2), "constant": error(1.0), "power law": error(0.5)}
    judged = verdict(0.1, outcome=outcome, claim="law")
    more = {"cells": cells, "errors": errors, "best_rival": "power law"}
    made = answer(tmp_path, judged, sweep="rate_law", **more)
    (found,) = findings.main([made])
    assert found.lead.startswith(start) and found.said == (
        "its rms error is 1.22-fold [1.11, 1.35] in 4 conditions, its best rival's (power law) "
        "1.65-fold [1.49, 1.82]: tiny64-3m and b (alpha 0.5 to 2048; 512 updates)"
    )
    assert "right up to a factor of 1.16" in found.more
    assert "at alpha 2048, where the measured ratios are 0.6 to 0.75 times its own" in found.more


def test_the_laws_figure_takes_the_place_of_the_learning_rates_once_it_has_runs(tmp_path):
    rates = [{"method": m, "best_lr": 1e-3} for m in ("fullft", "lora")]
    both = [answer(tmp_path, sweep="lr_ratio", curves=[])]
    both[0].results["curves"] = rates
    vars(both[0])["runs"] = both[0].runs.assign(method="lora", n_trainable=1, alpha=32.0)
    law = {"figures": [["law.png", "measured over predicted"]], "sweep": "rate_law"}
    shown = []
    for e in (Estimate(None), Estimate(-0.05, -0.08, -0.02)):
        made = answer(tmp_path, verdict(0.0, claim="law", estimate=e), **law)
        (made.folder / "law.png").write_bytes(b"drawn")
        shown.append(page.law_figure([made], tmp_path))
    assert shown == ["", "rate_law-tiny/law.png"]
    assert page.law_figure([], tmp_path) == ""


def test_the_table_of_bases_has_the_ranges_of_all_their_runs(tmp_path):
    def runs(sweep, **columns):
        made = answer(tmp_path, sweep=sweep)
        vars(made)["runs"] = pd.DataFrame({"model": "tiny64", "hidden_size": 64, **columns})
        return made

    lora = {"method": "lora", "rank": [1.0, 4.0, 8.0, 16.0], "alpha": 32.0, "n_trainable": 9}
    full = {"method": ["fullft"], "rank": math.nan, "alpha": math.nan, "n_trainable": 217_664}
    both = [runs("a", **lora, steps=16), runs("b", **full, steps=2000)]
    head, row = page.base_rows(page.base_runs(both), [])
    shown = dict(zip(head, row))
    assert shown["base"] == "tiny64" and shown["parameters"] == "0.218M"
    assert shown["what it is"].startswith("small Llama")
    assert (shown["ranks"], shown[page.ALPHA], shown["updates"]) == ("1 to 16", "32", "16 to 2,000")
    # A base that a finding of the page names comes first, however large it is.
    both.append(runs("c", **{**full, "n_trainable": 10**8}, steps=16))
    both[-1].runs["model"] = "smollm2-135m-instruct"
    named = findings.Finding("rank", "It is faster on SmolLM2", "by 1%")
    for main, order in (([], ["tiny64", "SmolLM2"]), ([named], ["SmolLM2", "tiny64"])):
        assert [r[0] for r in page.base_rows(page.base_runs(both), main)[1:]] == order


# ---------------------------------------------------------------- the ledger


def outcomes_of(made, sentence):
    (row,) = [r for r in ledger.ledger(made) if sentence in r[0]]
    return row[1:]


def test_every_claim_that_the_ledger_names_is_asked_by_a_sweep_or_was():
    asked = {
        (path.stem, claim)
        for path in (ROOT / "sweeps").glob("*.yaml")
        for claim in yaml.safe_load(path.read_text()).get("claims", {})
    }
    for path in KEPT.glob("*/question.json"):
        kept = json.loads(path.read_text())
        asked |= {(kept["name"], claim) for claim in kept["claims"]}
    lines = [s for block in ledger.sentences().values() for s in block]
    named = [c for s in lines for c in s.claims]
    assert {tuple(c.split(": ")) for c in named} <= asked and len(named) == len(set(named))
    assert len(lines) == len({s.says for s in lines}) > 60


def test_the_ledger_counts_outcomes_by_setting_and_names_the_scale(tmp_path):
    outcomes = ("REFUTED", "REFUTED", "UNDECIDED")
    made = bases(tmp_path, [verdict(0.5, outcome=o, claim="parity") for o in outcomes])
    made.append(answer(tmp_path, verdict(1.0)))
    counted = "**REFUTED** 2 of 3, **UNDECIDED** 1 of 3 at `tiny`"
    assert outcomes_of(made, "High ranks learn as fast") == ["", counted, ""]
    assert outcomes_of(made, "Start with rank 256")[0] == ledger.NOT_TESTED
    # A claim that no sentence names has a line of its own.
    assert ledger.ledger(made)[-1] == ["C holds", "", "**REFUTED** at `tiny`", ""]


@pytest.mark.parametrize(
    ("value", "outcome", "gates", "shown"),
    [
        (0.002, "REFUTED", (), "SUPPORTED"),  # respects "at most one", though far from one
        (8.0, "REFUTED", (), "REFUTED"),
        (2.1, "UNDECIDED", (), "UNDECIDED"),
        (0.002, "UNDECIDED", (Gate(GateCode.FEW_SEEDS_AT_BEST, 1),), "UNDECIDED"),
    ],
)
def test_a_bound_is_judged_by_its_upper_end_alone(tmp_path, value, outcome, gates, shown):
    claim = {"claim": "one_bit", "margin": (0.5, 2.0), "log": True}
    v = verdict(value, value / 2, outcome=outcome, gates=gates, **claim)
    made = [answer(tmp_path, v, sweep="rl_bits")]
    assert f"**{shown}** at `tiny`" in "".join(outcomes_of(made, "at most about one bit"))


def test_the_studys_condition_on_rewards_is_shown_with_the_verdict(tmp_path):
    """100 updates of 256 completions, 5,120 parameters of rank 1: 0.2 parameters an episode."""
    group = "b on words, policy gradient, batch 256, steps 100"
    arms = [{"rank": r, "steps": 100, "batch_size": 256} for r in (1.0, 16.0)]
    curves = [curve("b", "words", objective="policy_gradient", **a) for a in arms]
    words = {"name": "words", "location": "skills", "source": "synthetic", "knobs": {}}
    v = verdict(-8.6, 3.0, claim="rank_1", group=group)
    made = answer(tmp_path, v, sweep="rl", data=(words,), curves=curves)
    common = {"seed": 100, "hidden_size": 64, "spec": json.dumps({"dataset": words})}
    rows = [{**c, **common, "n_trainable": 5120 * int(c["rank"])} for c in curves]
    pd.DataFrame(rows).to_parquet(made.folder / "table.parquet")
    (shown,) = filter(None, outcomes_of([made], "rank 1 reaches full"))
    assert shown == "**REFUTED** at `tiny`<br>at 0.2 parameters an episode"
    (said,) = findings.others([made])
    place = "b (exercises under new names, by rewards; rank 1, 100 updates)"
    of_study = "The post's rank 1 has more than one parameter per episode; ours has 0.2."
    assert said.text.endswith(f"is -8.6 points [-11.6, -5.6] on {place}. {of_study}")
    asked = verdict(-11.0, 3.0, claim="tie", group="c on bandit_drawn, policy gradient")
    arms = [curve("c", "bandit_drawn", rank=1.0, steps=400)]
    labels = {"name": "bandit_drawn", "location": "bandit", "source": "synthetic", "knobs": {}}
    bandit = answer(tmp_path, asked, sweep="rl_unembedding", data=(labels,), curves=arms)
    v = dataclasses.replace(v, exploratory="asked after a look")
    looked = Answer(made.folder, made.results, made.question, [v])
    (both,) = findings.others([looked, bandit])
    assert both.sweep == "rl_unembedding" and not both.exploratory
    labels = "-11.0 points [-14.0, -8.0] on c (hidden labels, by rewards; rank 1, 400 updates)"
    assert f"is {labels} and -8.6 points" in both.text and "; exploratory)" in both.text


# ---------------------------------------------------------------- the findings


def test_the_first_finding_names_every_base_rank_and_length(tmp_path):
    def first(*outcomes, control=None, beyond="SUPPORTED"):
        made = [
            verdict(-0.01, outcome=o, claim="low", group=f"b, {k}") for k, o in enumerate(outcomes)
        ]
        made.append(verdict(0.01, outcome=beyond, claim="beyond", group="b, lists"))
        cells = [condition(f"b, {k}", (4, 9.0), (8, 2.0 + k)) for k in range(len(outcomes))]
        cells.append(condition("b, lists", (8, 6.0)))
        parts = [answer(tmp_path, *made, sweep="regime", data=RULES, cells=cells)]
        parts += [batches(tmp_path, 7.8, control)] if control else []
        return findings.main(parts)[0]

    held = first("SUPPORTED", "SUPPORTED")
    # The rank of an eighth of the width of 64; of two data sets the one with more regret.
    assert held.lead.endswith("LoRA of rank 8 matches full fine-tuning on b")
    most = "the largest regret of 2 data sets is 3.0% [2.0, 4.0] (256 updates, batch 16)"
    lists = "with lists to memorise"
    behind = f". W{lists[1:]} LoRA falls behind: up to 6.0% [5.0, 7.0]"
    assert held.said == most + behind
    # Never more than the verdict says.
    open_one = first("SUPPORTED", "SUPPORTED", beyond="UNDECIDED")
    assert open_one.said == f"{most}. It is undecided {lists} (up to 6.0% [5.0, 7.0])"
    assert f"on b**, as the post says: {held.said}." in held.text
    # The question's page has all data sets, those with lists apart.
    each = "2.0% [1.0, 3.0] and 3.0% [2.0, 4.0] on b (rank 8, 256 updates, 2 data sets)"
    assert f"{each}; where lists to memorise are new too, it is 6.0% [5.0, 7.0]" in held.more
    # Another base of the same share of the width is named apart, with its own numbers.
    both = first("SUPPORTED", "SUPPORTED", control="REFUTED")
    assert both.lead == held.lead and both.post == held.post
    assert ". Rank 8 on c does not: 7.8% [5.3, 10.3] (384 updates, batch 32)" in both.said
    unclear = "It is undecided for rank 8 on c (384 updates, batch 32; 7.8% [5.3, 10.3])"
    assert first("SUPPORTED", control="UNDECIDED").said.endswith(unclear)
    assert ". Rank 8 on c matches as well: 7.8%" in first("SUPPORTED", control="SUPPORTED").said
    assert "LoRA of rank 8 does not match full fine-tuning on b" in first("REFUTED").lead
    assert first("REFUTED").said == f"the regret is 2.0% [1.0, 3.0] (256 updates, batch 16){behind}"
    assert first("REFUTED").post.startswith("against the post, for which LoRA ends at the same")
    assert "undecided whether LoRA" in first("UNDECIDED").lead
    mixed = first("SUPPORTED", "REFUTED")  # data sets of one base that differ
    assert "undecided whether LoRA" in mixed.lead
    assert mixed.post.startswith("undecided for the post")
    assert mixed.said == held.said
    # Conditions that differ in updates alone have full titles.
    titles = [f"b on dialect (a, b), batch 16, {n} updates" for n in (128, 256)]
    made = [verdict(0.1, claim="low", group=title) for title in titles]
    cells = [condition(t, (8, 9.0), updates=n) for t, n in zip(titles, (128, 256))]
    titled = answer(tmp_path, *made, sweep="regime", data=RULES, cells=cells)
    (long, *_) = findings.main([titled])
    assert long.lead.endswith("LoRA of rank 8 does not match full fine-tuning on b")
    assert long.post.startswith("against the post")
    low = verdict(-0.01, claim="low", group="b, 0")
    regime = answer(tmp_path, low, sweep="regime", data=RULES, cells=[condition("b, 0", (8, 2.0))])
    assert findings.first_pass_loads([regime]) == "6 times what rank 8 can hold"
    assert findings.first_pass_loads([]) == ""
    one_seed = verdict(2.0, outcome="UNDECIDED", claim="rank_1", estimate=Estimate(2.0))
    made = [answer(tmp_path, one_seed, sweep="rl")]
    assert findings.main(made) == findings.others(made) == []


def test_each_base_has_the_rank_of_an_eighth_of_its_own_width(tmp_path):
    groups = ("b, x", "wide, x")
    made = [verdict(0.1, claim="low", group=g) for g in groups]
    cells = [condition(g, (8, 9.0), (16, 3.0)) for g in groups]
    both = answer(tmp_path, *made, sweep="regime", data=RULES, cells=cells)
    wide = both.runs.assign(model="wide", hidden_size=128)
    vars(both)["runs"] = pd.concat([both.runs, wide])
    (found, *_) = findings.main([both])
    assert found.lead.endswith("LoRA of rank 8 does not match full fine-tuning on b")
    assert found.said.endswith("Rank 16 on wide does not: 3.0% [2.0, 4.0] (256 updates, batch 16)")
    both.question["claims"]["low"]["estimand"] = "eighth"
    both.results["read"] = {"eighth": "rank of 0.125 of the width"}
    assert [both.where(v) for v in made] == [
        f"{g} (rank {r}, 256 updates)" for g, r in zip(groups, (8, 16))
    ]


def test_a_claim_is_true_in_some_settings_only_if_it_is_refuted_in_others(tmp_path):
    def lead(*outcomes):
        made = [verdict(0.7, claim="flops_to_loss", outcome=o) for o in outcomes]
        found = [(answer(tmp_path, v, sweep="compute"), v) for v in made]
        return findings.lead(found, "LoRA saves", "LoRA does not save")

    assert lead("SUPPORTED", "REFUTED") == "LoRA saves in some settings only"
    assert lead("SUPPORTED", "UNDECIDED") == "LoRA saves in some settings"


def test_growth_has_the_numbers_of_the_least_growth_that_was_shown(tmp_path):
    def second(*outcomes, mark="stated later"):
        numbers = {"b, x": (-2.0, 1.0), "b, y": (-1.0, 1.0), "b, z": (0.5, 1.0)}
        cells = [condition(c, (8, last), first=first) for c, (first, last) in numbers.items()]
        asked = [
            verdict(0.0, claim="growth_high", group=c, outcome=o, exploratory=mark)
            for c, o in zip(numbers, outcomes)
        ]
        asked += [verdict(0.0, claim=c, group="b, x") for c in ("low", "growth")]
        read = {"gap": "ranks 8 to 16, update 64 to the last"}
        made = answer(tmp_path, *asked, sweep="regime", data=RULES, cells=cells, read=read)
        made.question["claims"]["growth_high"]["estimand"] = "gap"
        return next(f for f in findings.main([made]) if "training" in f.lead or "grow" in f.lead)

    grown = second("SUPPORTED", "SUPPORTED", "UNDECIDED")
    least = "at rank 8 from -1.0% [-2.0, 0.0] after 64 updates to 1.0% [0.0, 2.0] after 256"
    outcomes = "That it grows at all ranks 8 to 16 is supported on 2 data sets, undecided on 1"
    assert grown.said == f"{least}, a match. {outcomes}"
    assert grown.lead == "On b the regret grows with training where only rules are new"
    post = "** (exploratory), which the post expects only beyond an adapter's capacity: at"
    assert post in grown.text
    assert "(exploratory" not in second("SUPPORTED", "SUPPORTED", "SUPPORTED", mark="").text
    assert all(f"b, {c}: from " in grown.more for c in "xyz")
    assert "asked beforehand, and not shown on 1 of 1" in grown.more
    none = second("REFUTED", "REFUTED", "REFUTED")
    assert "does not grow" in none.lead and not none.post
    assert (
        "It is undecided whether on b the regret grows"
        in second("UNDECIDED", "UNDECIDED", "UNDECIDED").lead
    )
    assert len(findings.main([answer(tmp_path, sweep="regime", cells=[])])) == 0


def test_learning_rates_name_every_base_and_the_cost_of_ten_times(tmp_path):
    def said(*ratios, mark=""):
        made = []
        for k, (value, half, outcome) in enumerate(ratios):
            group = f"b{k} on dialect, batch 16, steps 256"
            own = [
                verdict(value, half, outcome, group, claim="ratio", exploratory=mark if k else ""),
                verdict(9.0, 5.0, claim="ten_times", group=group),
            ]
            curves = [curve(f"b{k}", rank=16.0)]
            made.append(
                answer(tmp_path, *own, sweep="lr_ratio", scale=f"s{k}", base=f"b{k}", curves=curves)
            )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(findings, "rate_curves", lambda answers: [])
            (found,) = findings.main(made)
        return found

    low, near = (4.0, 1.0, "REFUTED"), (12.0, 3.0, "UNDECIDED")
    apart = said(low, near, mark="early seeds")
    assert apart.lead == "On b0 LoRA's best learning rate is not ten times full fine-tuning's"
    assert "the ratio is 4.0 [3.0, 5.0] on b0 (dialect; rank 16, 256 updates) and" in apart.said
    second = "12.0 [9.0, 15.0], which includes ten, on b1 (dialect; rank 16, 256 updates; "
    assert apart.said.endswith(f"{second}exploratory)")
    cost = "9.0% [4.0, 14.0] of the gain"
    assert apart.more == f"Exactly ten times costs {cost} on b0 and {cost} on b1."
    assert said(low, low).lead.endswith("is not ten times full fine-tuning's")
    held = (10.0, 1.0, "SUPPORTED")
    assert said(held, held).lead.endswith("is about ten times full fine-tuning's")
    assert said(held, near).lead.startswith("On b0 LoRA's best learning rate is about ten times")
    assert "undecided whether" in said(near).lead


@pytest.mark.parametrize("mark", ["", "asked of runs that had been seen"])
def test_a_finding_on_runs_that_had_been_seen_says_so(tmp_path, mark):
    group = "b on dialect, batch 16, steps 256"
    slope = verdict(0.24, 0.02, claim="alike", group=group, exploratory=mark)
    made = answer(tmp_path, slope, data=RULES, curves=[curve("b")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "speed_answers", lambda answers: {})  # no learning curves here
        (found,) = findings.main([made])
    shown = " (exploratory)" if mark else ""
    lead = "**The higher the rank, the faster LoRA learns**"
    post = "which the post expects only beyond an adapter's capacity"
    assert found.text.startswith(f"{lead}{shown}, {post}: each doubling raises speed on average")
    assert "27% [25, 30] on b (only rules new; rank 8, 256 updates)." in found.text


def test_the_speeds_of_the_lowest_and_the_highest_rank_stand_in_the_finding(tmp_path):
    group = "b on dialect, batch 16, steps 256"
    own = [verdict(0.24, 0.02, claim="alike", group=group)]
    own.append(verdict(1.05, 0.07, claim="parity", group=group))
    made = answer(tmp_path, *own, data=RULES, curves=[curve("b")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "speed_answers", lambda answers: {Setting.IN_REGIME: made})
        at_end = {r: {256: Estimate(v)} for r, v in ((32, 1.04), (1, 0.31), (8, 0.7))}
        patch.setattr(findings, "speeds", lambda runs, steps: at_end)
        (found,) = findings.main([made])
    # The two ends, not the average alone: the rise falls with the rank.
    ends = "by 31% from rank 1 to 8 and by 22% from rank 8 to 32"
    assert found.said.startswith(f"a doubling raises the speed {ends} on b (")
    assert found.more.endswith("Each doubling raises speed on average by 27% [25, 30].")
    assert found.said.endswith(". The speed is 0.31 (rank 1) and 1.05 [0.98, 1.12] (rank 32)")


@pytest.mark.parametrize("name", ["README.md", "analysis/results/README.md"])
def test_a_finding_of_the_pages_is_a_few_short_sentences(name):
    block = (ROOT / name).read_text().partition("\n## Findings\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\d\. (.*?)(?: \[Details\].*)?$", block, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        numbers_as_one = re.sub(r"\[[^]]*\]", "", line)  # an interval is read with its number
        assert len(numbers_as_one.split()) <= 60 and len(re.findall(r"\.(?:\s|$)", line)) <= 2, line
        assert re.search(r"\[[-\d.]+, [-\d.]+\]", line) and re.search(r"\bupdates?\b", line)


def test_loads_are_compared_on_one_base_after_one_length(tmp_path):
    def second(*cells):
        low = [verdict(-0.01, claim="low", group=c["cell"]) for c in cells]
        made = [answer(tmp_path, *low, sweep="regime", cells=list(cells))]
        return [f.text for f in findings.others(made) if "bits of the data are counted" in f.text]

    one = condition("b, x", (8, 1.0))
    (said,) = second(one, condition("b, y", (8, 1.0), rank=14.0, loads=(0.2, 3.0, 0.5)))
    assert "regret is 5% (ranks of 5 to 14 on 2 data sets; b, 256 updates), the data have" in said
    assert "0.01 to 0.2 by what the generator of the data changed, 3 to 6 by" in said
    assert "0.4 to 0.5 by that loss without their randomness" in said
    same = condition("b, z", (8, 1.0), loads=(0.4, 0.4, 0.4))
    assert "hardly depends" in second(same, one)[0]
    assert second(one) == second(one, condition("c, y", (8, 1.0))) == []
    assert second(one, condition("b, y", (8, 1.0), updates=64)) == []


def test_the_effect_of_the_batch_is_told_apart_from_its_margin(tmp_path):
    def said(value, half, outcome):
        margin = {"margin": (-2.0, -0.03), "outcome": outcome, "claim": "penalty"}
        read = {"batch_effect": "rank 16, batches of 4 to 256 after 8 to 256 updates; rank 1: -1"}
        other = {"1": Estimate(-0.1, -0.2, 0.0).plain(), "16": Estimate(-0.01, -0.02, 0.01).plain()}
        more = {"curves": [curve("b", rank=16.0)], "read": read}
        more["batch_effect_at_equal_examples"] = other
        made = verdict(value, half, **margin)
        small = answer(tmp_path, made, sweep="batch_size", data=RULES, **more)
        small.question["claims"]["penalty"]["estimand"] = "batch_effect"
        (found,) = findings.main([small])
        return found

    slower = "After equally many updates, larger batches slow LoRA more than full fine-tuning"
    slower += "; after equally many examples this is not shown"
    close = said(-0.05, 0.04, "UNDECIDED")
    where = "on b (only rules new; rank 16, batches of 4 to 256 after 8 to 256 updates)"
    assert close.lead == slower
    each = "each doubling lowers LoRA's speed by 4.9% [1.0, 8.6]"
    examples = "After equally many examples, which the post compares, it is 1.0% [-1.0, 2.0]"
    assert close.said == f"{each} {where}. {examples} (exploratory)"
    assert close.more == "Whether this exceeds the 3% fixed beforehand as relevant is undecided."
    clear = said(-0.1, 0.02, "SUPPORTED")
    assert clear.lead == slower and not clear.more
    small = said(-0.015, 0.01, "REFUTED")
    assert small.lead == slower
    assert small.more == "On b the effect is less than the 3% fixed beforehand as relevant."
    none = said(0.0, 0.01, "REFUTED")
    assert "larger batches do not slow LoRA" in none.lead and "examples" not in none.lead
    assert said(0.0, 0.05, "UNDECIDED").lead.startswith("It is undecided whether after equally")


def test_batches_are_no_evidence_where_their_control_fails(tmp_path):
    def said(outcome):
        return [f.text for f in findings.others([batches(tmp_path, 7.8, outcome)])]

    assert said("SUPPORTED") == []
    (text,) = said("REFUTED")
    assert "in batches of 32, LoRA has regret on c (rank 8, 384 updates: 7.8% [5.3, 10.3])" in text
    assert "LoRA may have regret on c" in said("UNDECIDED")[0]


def test_nothing_is_shown_as_minus_zero():
    shown = findings.with_unit(findings.signed, "%")(Estimate(-0.04, -0.2, 0.1))
    assert shown == "+0.0% [-0.2, +0.1]"
    assert findings.percent(-0.01) == "0.0" and number(-0.0) == "0"
    assert fixed(-0.00001, 4, "+") == "+0.0000"


def test_exploratory_and_withdrawn_verdicts_are_marked_wherever_they_are_shown(tmp_path):
    made = verdict(-9.0, claim="rank_1", exploratory="the rule was written later")
    explores = answer(tmp_path, made, verdict(-8.0, claim="rank_1"), sweep="rl", data=(FACTS,))
    gone = Gate(GateCode.WITHDRAWN, "an arm is missing")
    away = verdict(-20.0, claim="tie", outcome="UNDECIDED", gates=(gone,))
    withdrawn = answer(tmp_path, away, sweep="rl_bits", data=(FACTS,))
    withdrawn.question["withdrawn"] = "an arm is missing, and more"
    both = [explores, withdrawn]
    assert [r[4] for r in rows_of(both)[1:]] == ["REFUTED (exploratory)", "REFUTED", "WITHDRAWN"]
    shown = "".join(outcomes_of(both, "rank 1 reaches full fine-tuning's accuracy"))
    assert "**REFUTED** at `tiny`<br>**REFUTED** at `tiny` (exploratory)" in shown
    shown = "".join(outcomes_of(both, "it ties with full fine-tuning"))
    assert "**WITHDRAWN** at `tiny`" in shown and "UNDECIDED" not in shown
    assert page.verdict_row(explores, made)[4] == "**REFUTED (exploratory)**"
    said = [f.text for f in (*findings.main(both), *findings.others(both))]
    assert said and not any("-20" in text for text in said)
    (row,) = figures.claim_rows(both)  # no withdrawn or exploratory number is in the figure
    assert row.measured.startswith("-8 ")
    texts = pages(both, tmp_path)
    line = "- **Withdrawn on b**: [rl_bits?](questions/rl_bits.md) An arm is missing.\n"
    assert line in texts["README.md"]
    why = "answer at scale `tiny` is withdrawn (WITHDRAWN)**: an arm is missing, and more."
    assert why in texts["questions/rl_bits.md"]


def test_the_low_rank_is_named_as_the_cause_only_if_the_control_shows_it(tmp_path):
    def asked(outcome, matrices="SUPPORTED"):
        behind = verdict(-9.4, claim="rank_1", outcome="REFUTED")
        control = verdict(-9.7, claim="rank_1_control", outcome=outcome)
        same = verdict(0.3, claim="control", outcome=matrices)
        return answer(tmp_path, behind, control, same, sweep="rl_matrices", data=(FACTS,))

    def found(*answers):
        return next(f for f in findings.others(answers) if f.sweep == "rl_matrices")

    own = "Against full fine-tuning of LoRA's own matrices it is -9.7 points"
    shown, open_ = (found(asked(outcome)).said for outcome in ("REFUTED", "UNDECIDED"))
    assert own in shown and shown.endswith("not the choice of matrices")
    assert own not in open_ and "-9.4 points" in open_
    unsure = found(asked("REFUTED", "UNDECIDED")).said
    assert own in unsure and unsure.endswith("so the low rank is the cause")
    # LoRA's matrices hold the unembedding; another answer has rank 1 without an adapter of it.
    alone = answer(tmp_path, verdict(-3.0, 4.0, claim="rank_1"), sweep="rl_layers", data=(FACTS,))
    both = [asked("REFUTED"), alone]
    without = "Without an adapter of the unembedding the difference from full fine-tuning is -3.0"
    assert without in found(*both).said and without not in shown
    texts = pages(both, tmp_path)
    assert "[rl_layers](questions/rl_layers.md)" in texts["README.md"]
    assert without in texts["questions/rl_layers.md"]


def test_layers_are_named_with_the_ranks_that_a_claim_compares(tmp_path):
    task = "b on dialect, batch 16, steps 256"
    ranks = {"attention": {"attention": 8, "mlp": 4}, "mlp": {"mlp": 4, "attention+mlp": 4}}
    asked = [verdict(0.5, claim=c, group=task) for c in ("slower", "enough")]
    arms = [curve("b", rank=r) for r in (4.0, 8.0)]
    made = answer(tmp_path, *asked, sweep="layers", ranks={task: ranks}, curves=arms)
    made.question["claims"]["slower"]["estimand"] = "attention_over_mlp"
    made.question["claims"]["enough"]["estimand"] = "mlp_over_both"
    slower, enough = (made.where(v) for v in asked)
    assert "; attention at rank 8 and the MLP at rank 4, 256 updates)" in slower
    assert enough.endswith("; rank 4, 256 updates)")


def test_a_withdrawn_answer_is_named_with_its_base_and_the_others_stand(tmp_path):
    v, bases = verdict(-9.0, claim="rank_1"), {"small": "smollm2-135m-instruct", "tiny": "b"}
    made = [
        answer(tmp_path, v, sweep="rl", scale=scale, data=(FACTS,), base=base)
        for scale, base in bases.items()
    ]
    made[0].question["withdrawn"] = "too few seeds, and more"
    for found in (made, made[::-1]):
        texts = pages(found, tmp_path)
        assert texts["README.md"].count("Withdrawn") == 1
        stands = "Too few seeds. The answer on b stands.\n"
        named = "- **Withdrawn on SmolLM2**: [rl?](questions/rl.md)"
        assert f"{named} {stands}" in texts["README.md"]
        assert "- **In reinforcement learning rank 1 does not learn" in texts["README.md"]
        assert texts["questions/rl.md"].count("is withdrawn") == 1


def test_two_sweeps_with_one_analysis_have_a_page_and_a_line_each(tmp_path):
    """`rl_matrices` is judged by the analysis of `rl`; its answer here is that of `rl`, renamed."""
    for name in ("rl_matrices", "rl"):
        shutil.copytree(KEPT / "rl-small", at := tmp_path / "kept" / f"{name}-small")
        asked = json.loads((at / "question.json").read_text())
        assert asked["analysis"] == "rl"
        changed = {"name": name, "question": f"Of {name}?", "withdrawn": ""}
        (at / "question.json").write_text(json.dumps({**asked, **changed}))
    page.render_answers(tmp_path / "kept")
    found = read_answers([tmp_path / "kept"])
    assert [a.sweep for a in found] == ["rl", "rl_matrices"]
    texts = pages(found, tmp_path)
    lines = texts["questions/README.md"].splitlines()
    for name, other in (("rl", "rl_matrices"), ("rl_matrices", "rl")):
        text = texts[f"questions/{name}.md"]
        assert text.startswith(f"# Of {name}?") and f"(`{name}: rank_1`" in text
        assert f"`{other}: " not in text and f"../kept/{name}-small/" in text
        assert sum(line.startswith(f"| [{name}]({name}.md): Of {name}?") for line in lines) == 1
    (claimed,) = outcomes_of(found, "full fine-tuning of LoRA's matrices alone reaches")[:1]
    assert claimed in ("", ledger.NOT_TESTED)  # no claim of one is counted as the other's


def test_claims_are_tallied_once_with_the_exploratory_ones_among_them(tmp_path):
    gone = (Gate(GateCode.WITHDRAWN, "an arm is missing"),)
    own = [verdict(1, outcome="SUPPORTED", claim="held", group=g) for g in "xy"]
    own += [verdict(1, claim="held_later", outcome="SUPPORTED", exploratory="stated later")]
    own += [verdict(1, outcome=o, claim="both", group=o) for o in ("SUPPORTED", "UNDECIDED")]
    own += [verdict(1, outcome="UNDECIDED", claim=c, gates=gone) for c in ("gone", "half")]
    own += [verdict(1, claim="half"), verdict(1, claim="not_run", group=NO_CELL)]
    shown = "2 supported (1 exploratory), 1 refuted, 1 mixed, 1 withdrawn"
    assert page.tally([answer(tmp_path, *own)]) == shown


def test_a_margin_of_rounding_is_shown_in_words():
    assert answers.within((-1e-9, 1e-9)) == "0, to rounding"
    assert answers.within((-0.002, 0.002)) == "-0.002 to 0.002"
    assert answers.within((0.0, 1e-9)) == "0 to 1e-09"


def test_what_a_sweeps_file_says_of_its_answer_is_in_the_verdicts(reports):
    table, asked = kept_answer(reports / "rank-smoke")
    as_asked = question_hash(asked)
    plain = analyse(table, asked)
    first = next(iter(asked["claims"]))
    asked["claims"][first]["exploratory"] = {"smoke": "the rule came later", "tiny": "no"}
    known = {v.claim: v for v in analyse(table, asked).verdicts}
    assert {c for c, v in known.items() if v.exploratory} == {first}
    assert known[first].plain()["exploratory"] == "the rule came later"
    outcome = next(v.outcome for v in plain.verdicts if v.claim == first)
    assert known[first].shown == f"{outcome} (exploratory)"
    asked["withdrawn"] = "an arm is missing"
    found = analyse(table, asked)
    for v, as_judged in zip(found.verdicts, plain.verdicts):
        assert (v.outcome, v.shown) == ("UNDECIDED", "WITHDRAWN")
        assert [g["code"] for g in v.plain()["gates"]][:1] == ["WITHDRAWN"]
        assert v.estimate.plain() == as_judged.estimate.plain()
    assert next_runs.suggest(found) == []  # more seeds do not bring it back
    text = report.render(found, asked, table)
    assert "**WITHDRAWN**: an arm is missing." in text and "**REFUTED" not in text
    asked["claims"][first]["not_withdrawn"] = True
    again = {v.claim: v.shown for v in analyse(table, asked).verdicts}
    assert again.pop(first) == f"{outcome} (exploratory)" and set(again.values()) == {"WITHDRAWN"}
    assert question_hash(asked) == as_asked


def test_a_report_of_version_0_2_has_the_hash_that_it_states(tmp_path):
    """Its claims have older keys, among them the spread that power was planned with."""
    older = {new: old for old, new in OLDER_KEYS.items()}
    for path in (KEPT / "rank-tiny", KEPT / "lr_scale-tiny"):
        asked = json.loads((path / "question.json").read_text())
        for name, claim in asked["claims"].items():
            then = {older.get(k, k): v for k, v in claim.items() if k != "planning"}
            asked["claims"][name] = {**then, "sd": {"tiny": 0.1}, "units": None}
        (tmp_path / "question.json").write_text(json.dumps(asked))
        stated = json.loads((path / "results.json").read_text())["claims_hash"]
        assert question_hash(read_question(tmp_path)) == stated
