"""The pages of all answers, on planted ones: figures, findings, ledger, and golden pages."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter

import pandas as pd
import pytest
import yaml

from analysis.inference.decide import Gate, GateCode, Verdict
from analysis.inference.estimate import Estimate
from analysis.measures import next_runs
from analysis.measures.regret import COUNTS
from analysis.measures.rows import Setting, pick
from analysis.questions.registry import analyse
from analysis.report import plots_study, report
from analysis.report.report import question_hash
from analysis.report.study import answers, page
from analysis.report.study.answers import NO_CELL, claims_table, read_answers
from analysis.runs.table import TableError
from lorasweep.cli.answer import KEPT
from tests.planted import kept_answer
from tests.world import ROOT

GOLDEN = ROOT / "tests" / "golden" / "study"
WITHDRAWN = (Gate(GateCode.WITHDRAWN, "an arm is missing"),)


def dialect(name="dialect", **params):
    return {"name": name, "location": "dialect", "source": "synthetic", "knobs": params}


RULES = (dialect(rule_shift=0.25, new_exceptions=0),)
LISTS = (dialect(rule_shift=0.5),)
GSM8K = {"name": "gsm8k", "location": "gsm8k", "source": "jsonl", "knobs": {}}
FACTS = {"name": "facts", "location": "facts", "source": "synthetic", "knobs": {}}


def verdict(value, half=0.1, outcome="REFUTED", group="b on dialect", **changes):
    e = Estimate(value, value - half, value + half, 5)
    v = Verdict("c", group, outcome, e, 1.0, (0.9, 1.1), True, "", log=False)
    return dataclasses.replace(v, **changes)


def curve(model, dataset="dialect", **more):
    found = {"model": model, "dataset": dataset, "method": "lora", "rank": 8.0, "steps": 256}
    found |= {"batch_size": 16, "alpha": 32.0, "n": 5, "flags": [], "band": None}
    return {**found, **dict.fromkeys(("best_lr", "low", "high", "best_nll")), **more}


def answer(folder, *verdicts, sweep="rank", scale="tiny", base="b", data=LISTS, **more):
    """Write an answer with one run per seed and data set; `more`: keys of results or question."""
    at = folder / f"{sweep}-{scale}"
    at.mkdir(parents=True, exist_ok=True)
    rows = [
        {"run_id": f"{scale}{seed}{d['name']}", "seed": seed, "spec": json.dumps({"dataset": d})}
        | {"hidden_size": 64, "n_trainable": 5120, **curve(base, d["name"])}
        for seed in (100, 101)
        for d in data
    ]
    table = pd.DataFrame(rows).drop(columns=["flags", "band"])
    table.to_parquet(at / "table.parquet")
    says = {v.claim: {"text": f"{v.claim} holds", "source": "study"} for v in verdicts}
    asked = {"name": sweep, "scale": scale, "question": f"{sweep}?", "source": "the study"}
    asked |= {"analysis": sweep, "claims": says}
    asked |= {k: more.pop(k) for k in ("withdrawn", "added_after") if k in more}
    results = {"sweep": sweep, "scale": scale, "runs": len(table), "curves": [], **more}
    results["verdicts"] = [v.plain() for v in verdicts]
    (at / "results.json").write_text(json.dumps(results))
    (at / "question.json").write_text(json.dumps(asked))
    return answers.Answer(at, results, asked)


def pages(found, folder):
    return page.pages(found, folder / "study.md")


def test_a_verdict_is_the_one_of_its_own_report(reports):
    """All ranks of the planted runs need 1 / 0.7 as many updates, whatever the length."""
    (kept,) = read_answers([reports])
    assert {r[0].split(":")[0] for r in claims_table([kept])[1:]} == {"rank"}
    rows = plots_study.speed_rows([kept])
    found = pick(rows, "speed")  # along the run, at each length's best rate
    assert {r.updates for r in found} >= {16, 32, 64} and len({r.rank for r in found}) > 1
    assert [r.estimate.value for r in found] == pytest.approx([0.7] * len(found), abs=0.05)
    assert all(abs(r.estimate.value) < 8 for r in pick(rows, "speed_rise"))
    assert {r.setting for r in rows} == {Setting.BEYOND}
    results = json.loads((path := reports / "rank-smoke/results.json").read_text())
    assert any(v.gates for _, v in kept.judged)
    for v in results["verdicts"]:
        v["outcome"], v["p"] = "SUPPORTED", 0.04
        del v["gates"]  # older answers have none
    path.write_text(json.dumps(results))
    (kept,) = read_answers([reports])
    # The report has corrected its two primary claims; the page corrects nothing again.
    assert sum(v.primary for _, v in kept.judged) == 2
    assert {(v.outcome, v.gates) for _, v in kept.judged} == {("SUPPORTED", ())}
    assert "**SUPPORTED** at `smoke`" in pages([kept], reports)["ledger.md"]


def test_pages_replace_earlier_ones_once_all_of_them_can_be_written(reports, tmp_path, monkeypatch):
    shutil.copytree(reports / "rank-smoke", tmp_path / "kept" / "rank-smoke")
    found = read_answers([reports, tmp_path / "kept"])  # the first of one name is used
    assert [a.folder for a in found] == [reports / "rank-smoke"]
    before = {
        page.MAP: "of an answer that is gone",
        "questions/gone.md": "gone. How to read: [ledger](../ledger.md)",
        "questions/notes.md": "mine",
    }
    (tmp_path / "questions").mkdir()
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    # a text that cannot be made, a figure, and a full disk
    for broken in ("ledger", "plots_study.forest", "Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(f"analysis.report.study.page.{broken}", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                page.write(found, tmp_path / "study.md")
        assert {n: (tmp_path / n).read_text() for n in before} == before
    page.write(found, tmp_path / "study.md")
    texts = pages(found, tmp_path)
    assert {n: (tmp_path / n).read_text() for n in texts} == texts
    beside = {"ledger.md", "rows.csv", "questions/README.md", "questions/rank.md"}
    assert set(texts) == {"study.md", *beside}
    assert f"]({page.FOREST})" in texts["study.md"] and (tmp_path / page.FOREST).is_file()
    assert page.MAP not in texts["study.md"] and not (tmp_path / page.MAP).exists()
    assert not (tmp_path / "questions" / "gone.md").exists()
    assert (tmp_path / "questions" / "notes.md").read_text() == "mine"
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)#]+)", text):
            there = ((tmp_path / name).parent / target).exists()
            assert target.startswith("http") or there, (name, target)


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("name", ["table.parquet", "results.json", "question.json"])
def test_a_broken_report_leaves_the_others(tmp_path, capsys, name, content):
    for sweep in ("recipes-tiny", "invariance-tiny"):
        shutil.copytree(KEPT / sweep, tmp_path / sweep)
    (tmp_path / "recipes-tiny" / name).write_text(content)
    assert [a.sweep for a in read_answers([tmp_path])] == ["invariance"]
    assert "left out" in capsys.readouterr().err
    page.write([], tmp_path / "none" / "study.md")  # all of a study's parts may be broken


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
    found = answer(tmp_path, verdict(1, group=group), data=(low, *LISTS, FACTS, GSM8K))
    assert found.judged[0][0].setting is setting


def bases(folder, verdicts):
    named = [dataclasses.replace(v, group=f"b{k} on dialect") for k, v in enumerate(verdicts)]
    return [answer(folder, v, scale=f"tiny_{k}", base=f"b{k}") for k, v in enumerate(named)]


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("expected", "margin", "log", "value", "place", "band"),
    [
        (10, (5, 20), True, 2.5, -2, (-1, 1)),
        (0, (-0.1, 0.1), False, 0.05, 0.5, (-1, 1)),
        (0.7, (0, 0.9), True, 0.9, 1, (-math.inf, 1)),
        (1, (1, 1000), True, 0.25, -2, (0, math.inf)),  # a factor of 2 is the unit
        (0, (-10, 0), False, 0.03, 3, (-math.inf, 0)),  # 0.01 nats are the unit
        (1, (0.5, 1), False, 0.75, -0.5, (-1, 0)),  # a correlation: 1 is the most there is
    ],
)
def test_values_are_placed_in_units_of_the_margin(expected, margin, log, value, place, band):
    v = verdict(value, expected=float(expected), margin=margin, log=log)
    at, of_margin = plots_study.scale_for(v)
    assert at(value) == pytest.approx(place) and of_margin == pytest.approx(band)


def test_the_figure_of_claims_has_the_primary_verdicts_that_count(tmp_path):
    made = bases(tmp_path, [verdict(v) for v in (0.5, 0.6, 0.7)])
    nothing = verdict(0.0, estimate=Estimate(None), group=NO_CELL)
    out = [{"exploratory": "later"}, {"primary": False}, {"gates": WITHDRAWN}]
    left = [verdict(0.9, claim=f"c{k}", **change) for k, change in enumerate(out)]
    made.append(answer(tmp_path, nothing, *left, sweep="other"))
    ours = answer(tmp_path, verdict(0.9, claim="ours"), sweep="another")
    ours.question["claims"]["ours"]["source"] = "ours"
    rows = plots_study.claim_rows([*made, ours])
    assert [r.value for r in rows] == pytest.approx([-5, -4, -3])
    assert (rows[0].margin, rows[0].outcome) == ("0.9 to 1.1", "REFUTED")
    many = answer(tmp_path, *(verdict(0.5, claim=f"c{k}") for k in range(14)))
    assert "and 2 of 14 for want of room." in pages([many], tmp_path)["study.md"]
    assert "for want" not in pages(made[:1], tmp_path)["study.md"]


def plain(value, half=1.0):
    return Estimate(value, value - half, value + half).plain()


def condition(name, *ranks):
    """A condition of `regime`: (rank, regret in percent), and loads of the needed rank by count."""
    by_count = dict(zip(COUNTS, (0.01, 6.0, 0.4)))
    return {
        **{"cell": name, "batch_size": 16, "updates": 256, "rank_interpolated": plain(5.0)},
        "bits": {count: 100 * load for count, load in by_count.items()},
        "loads_needed": {count: plain(load, 0.1) for count, load in by_count.items()},
        "ranks": [
            {"rank": r, "loads": by_count, "regret_percent": plain(percent), "gain_nats": 0.5}
            for r, percent in ranks
        ],
    }


def test_regret_is_drawn_a_line_a_condition_with_the_other_bases_control(tmp_path):
    low = condition("b, 8 symbols, drawn anew", (1, 20.0), (8, 0.05))
    cells = [condition("b, nothing new", (8, 30.0)), low]
    regime = answer(tmp_path, sweep="regime", data=RULES, cells=cells)
    regrets = [
        {"batch_size": b, "updates": n, "rank": 8, "regret_percent": plain(v, 2.5)}
        for b, n, v in [(32, 384, 7.8), (512, 24, 9.0)]
    ]
    v = verdict(0.01, claim="at_32", group="c on dialect")
    control = answer(tmp_path, v, sweep="large_batches", base="c", data=RULES, regrets=regrets)
    lines = plots_study.regret_lines([regime, control])
    values = {line.name: {r: e.value for r, e in line.regrets.items()} for line in lines}
    assert values == {
        "b, 256 updates of 16:\n8 symbols, drawn anew": {1: 20.0, 8: 0.05},
        "c, 384 updates of 32:\n8 symbols, drawn anew": {8: 7.8},
    }
    assert {line.setting for line in lines} == {Setting.IN_REGIME}
    plots_study.regret_map(lines, tmp_path / "map.png")


# ---------------------------------------------------------------- the ledger


def outcomes_of(made, sentence):
    (row,) = [r for r in answers.ledger(made) if sentence in r[0]]
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
    blocks = yaml.safe_load(answers.SENTENCES.read_text())
    lines = [s for block in blocks for s in block["sentences"]]
    named = [c for s in lines for c in answers.claims_of(s)]
    assert {tuple(c.split(": ")) for c in named} <= asked and len(named) == len(set(named))
    assert len(lines) == len({s["says"] for s in lines}) > 60


def test_the_ledger_counts_outcomes_by_setting_and_names_the_scale(tmp_path):
    outcomes = ("REFUTED", "REFUTED", "UNDECIDED")
    made = bases(tmp_path, [verdict(0.5, outcome=o, claim="parity") for o in outcomes])
    made.append(answer(tmp_path, verdict(1.0)))
    counted = "**REFUTED** 2 of 3, **UNDECIDED** 1 of 3 at `tiny`"
    assert outcomes_of(made, "High ranks learn as fast") == ["", counted, ""]
    assert outcomes_of(made, "Start with rank 256")[0] == answers.NOT_TESTED
    assert answers.ledger(made)[-1] == ["C holds", "", "**REFUTED** at `tiny`", ""]  # no sentence


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


# ---------------------------------------------------------------- the findings


def entry(**changes):
    """A finding on one claim and one number."""
    said = {"sweep": "rank", "lead": "It holds", "said": "it is {one}.", "more": "Also {one}."}
    said |= {"rests": {"rank-tiny: c": ["REFUTED"]}, "numbers": {"one": {"of": "rank-tiny: c"}}}
    return [{**said, **changes}]


def test_a_finding_is_marked_filled_and_stale_once_an_outcome_or_a_number_changes(
    tmp_path, monkeypatch
):
    path = tmp_path / "findings.yaml"
    monkeypatch.setattr(answers, "TEXTS", path)

    def made(v, *texts):
        path.write_text(yaml.safe_dump(texts or entry()))
        return answers.findings(answer(tmp_path, v).rows)

    (found,) = made(verdict(0.5))
    wanted = ("**It holds**: it is 0.5 [0.4, 0.6].", "Also 0.5 [0.4, 0.6].")
    assert (found.text, found.more) == wanted
    (later,) = made(verdict(0.5, exploratory="seen"), *entry(rests={}))
    assert "(exploratory)" in later.text
    for v, texts, words in (
        (verdict(0.5, outcome="UNDECIDED"), (), r"rank-tiny: c \['REFUTED'\].*\['UNDECIDED'\]"),
        (verdict(0.5, exploratory="seen"), (), "exploratory"),
        (verdict(0.5), entry(numbers={"one": {"of": "rank-tiny: d"}}), "0 rows are rank-tiny: d"),
    ):
        with pytest.raises(TableError, match=words):
            made(v, *texts)


def test_every_number_that_a_finding_writes_out_is_one_of_its_rows():
    """Numbers of places stand in the text: ranks, updates, batches, alphas, widths and counts."""
    found = read_answers([KEPT])
    rows, texts = page.rows_of(found), yaml.safe_load(answers.TEXTS.read_text())
    # ahead; bits a parameter, margins, the post's ratio, the first evaluation, points, exp(0.15)
    constants = {"0", "2", "3", "5", "0.9", "15", "64", "100", "1.16"}
    for text, made in zip(texts, answers.findings(rows), strict=True):
        mine = {(r.sweep, r.scale) for r in made.used}
        near = [r for r in rows if (r.sweep, r.scale) in mine]
        known = {getattr(r, k) for r in near for k in ("rank", "updates", "batch_size", "alpha")}
        known = {f"{v:g}" for v in known if v is not None} | constants
        known |= {f"{h:g}" for a in found if (a.sweep, a.scale) in mine for h in a.runs.hidden_size}
        counts = [Counter((r.sweep, r.quantity) for r in of) for of in (near, made.used)]
        counts = (str(n) for count in counts for n in count.values())
        words = " ".join([*(r.at + r.data + r.base for r in near), *counts])
        known |= set(re.findall(r"\d+(?:\.\d+)?", words))
        known |= {str(len(outcomes)) for outcomes in text.get("rests", {}).values()}
        said = " ".join(str(text.get(k, "")) for k in ("lead", "said", "more"))
        bare = re.sub(r"\{.*?\}|\b(tiny\d+(-\w+)?|SmolLM2)\b", "", said)
        written = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", bare))
        assert written <= known, (text["lead"], written - known)


# ---------------------------------------------------------------- golden pages


def test_pages_of_planted_answers_are_the_golden_ones(tmp_path):
    """Exploratory and withdrawn verdicts, a mixed claim, runs added after a look.

    To write them again: delete tests/golden/study, and run this test twice.
    """
    low = condition("b, 8 symbols, drawn anew", (4, 9.0), (8, 2.0))
    mark = {"exploratory": "stated later"}
    regime = [
        verdict(-0.01, outcome="SUPPORTED", claim="low", group="b, 8 symbols, drawn anew"),
        verdict(0.2, outcome="UNDECIDED", claim="growth_high", group="b, lists", why="too wide"),
        verdict(0.3, claim="growth_high", group="b, 8 symbols, drawn anew", **mark),
    ]
    ratios = [
        {"group": "b on dialect, batch 16, steps 100", "rank": 8, "alpha": 32.0, "at": k}
        | {"ratio": plain(2.0 + k), "regrets": {"10 x FullFT's best LR": 0.02 * k}}
        for k in (1, 2)
    ]
    arms = (("fullft", None, 1e-3), ("lora", 4.0, 3e-3), ("lora", 8.0, 5e-3))
    curves = [curve("b", method=m, rank=r, best_lr=lr, steps=100) for m, r, lr in arms]
    added = [{"arm": "lora", "what": "learning rate 1e-3", "why": "four were left"}]
    gone = verdict(-20.0, claim="tie", outcome="UNDECIDED", gates=WITHDRAWN)
    made = [
        answer(tmp_path, *regime, sweep="regime", data=RULES, cells=[low]),
        answer(tmp_path, sweep="lr_ratio", curves=curves, ratios=ratios, added_after=added),
        *bases(tmp_path, [verdict(v, claim="parity") for v in (0.5, 0.6, 0.7)]),
        answer(tmp_path, gone, sweep="rl_bits", data=(FACTS,), withdrawn="an arm is missing, so"),
    ]
    read = read_answers([tmp_path])
    assert [r for a in read for r in a.rows] == [r for a in made for r in a.rows]
    texts = pages(made, tmp_path)
    texts.pop("ledger.md")  # the sentences of ledger.yaml, mostly not tested
    if not GOLDEN.is_dir():
        for name, text in texts.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_text(text)
        pytest.fail("the golden pages were written: read them")
    files = (p for p in GOLDEN.rglob("*") if p.is_file())
    assert {str(p.relative_to(GOLDEN)): p.read_text() for p in files} == texts


def test_what_a_sweeps_file_says_of_its_answer_is_in_the_verdicts(reports):
    table, asked = kept_answer(reports / "rank-smoke")
    as_asked, plain = question_hash(asked), analyse(table, asked)
    first = next(iter(asked["claims"]))
    asked["claims"][first]["exploratory"] = {"smoke": "the rule came later", "tiny": "no"}
    asked["withdrawn"] = "an arm is missing"
    found = analyse(table, asked)
    assert {v.claim for v in found.verdicts if v.exploratory} == {first}
    for v, as_judged in zip(found.verdicts, plain.verdicts):
        assert (v.outcome, v.shown) == ("UNDECIDED", "WITHDRAWN")
        assert [g["code"] for g in v.plain()["gates"]][:1] == ["WITHDRAWN"]
        assert v.estimate.plain() == as_judged.estimate.plain()
    assert next_runs.suggest(found) == []  # more seeds do not bring it back
    text = report.render(found, asked, table)
    assert "**WITHDRAWN**: an arm is missing." in text and "**REFUTED" not in text
    asked["claims"][first]["not_withdrawn"] = True
    again = {v.claim: v.shown for v in analyse(table, asked).verdicts}
    assert again.pop(first).endswith(" (exploratory)") and set(again.values()) == {"WITHDRAWN"}
    asked["claims"][first] |= {"text": "other", "planning": {"smoke": {"sd": 0.5, "units": 7}}}
    assert question_hash(asked) == as_asked
    asked["claims"][first]["margin"] = [0.0, 1e9]
    assert question_hash(asked) != as_asked
