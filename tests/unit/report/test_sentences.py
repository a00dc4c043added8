"""The answer in sentences: yes, no or open, the number with its unit and place, what to do."""

import dataclasses
import json
import re

import pytest
import yaml

from analysis.inference.decide import Gate, GateCode
from analysis.questions.registry import analyse, question_named
from analysis.report import report
from analysis.report.sentences import lines_of, sentences_of, worded
from lorasweep.work.answer import KEPT
from tests.planted import kept_answer
from tests.world import ROOT

SWEEPS = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "sweeps").glob("*.yaml")}
DO = ("if_supported", "if_refuted", "if_open")
NUMBER = (
    r"\d|\b(two|three|four|five|six|seven|eight|nine|ten|twice|half|third|dozen|hundred|percent)\b"
)


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_a_shipped_sweep_says_what_to_do_without_a_number(name):
    for claim in (c for c in SWEEPS[name].get("claims", {}).values() if c.get("primary")):
        said = [claim[key] for key in DO]
        assert len({*said}) == 3 and all(re.fullmatch(r"[A-Z].*\.", text) for text in said)
        assert not re.search(NUMBER, " ".join(said).lower())


@pytest.fixture(scope="module")
def ratio():
    """The kept answer on the ratio: its runs, its question, its analysis."""
    table, question = kept_answer(KEPT / "lr_ratio-tiny")
    return table, question, analyse(table, question, KEPT)


def said(ratio, changes=None, claim="ratio", **asked):
    """The objects and the lines of an answer with changed verdicts on a claim, or another question."""
    table, question, found = ratio
    question = {**question, **asked}
    verdicts = [
        dataclasses.replace(v, primary=v.claim == claim, **(changes or {})) for v in found.verdicts
    ]
    found = dataclasses.replace(found, verdicts=verdicts)
    answer = sentences_of(found, question, report.results_of(found, question, table))
    return answer, lines_of(answer, question)


PLACE = "on tiny128 (only rules new; rank 16, 128 updates)"
RATIO = f"{PLACE} the best learning rate of LoRA is 4.2 [3.4, 5.2] times that of full fine-tuning; "
RATIO += "7.1 to 14.1 counts as agreement with \"LoRA's best learning rate is 10 times full fine-tuning's\""
COST = (
    "10 times the best learning rate of full fine-tuning costs LoRA 9.6% [4.7, 14.5] of what full"
)
EDGE = {
    "outcome": "UNDECIDED",
    "why": "lora r16: at_edge",
    "needed": "learning rates beyond the edge",
}
EDGE |= {"gates": (Gate(GateCode.FLAGGED, place="lora r16: ", flags=("at_edge",)),)}
GONE = {
    "outcome": "UNDECIDED",
    "gates": (Gate(GateCode.WITHDRAWN, "runs 0, 1 and 2 had other rows. So"),),
}
CASES = {  # changes of the verdict -> the begin of the sentence, what else it has, what it lacks
    "no": ({}, f"No: {RATIO}.", (COST, "if_refuted"), "Needed"),
    "yes": ({"outcome": "SUPPORTED"}, f"Yes: {RATIO}.", (COST, "if_supported"), "Needed"),
    "open": (
        {"outcome": "UNDECIDED", "why": "too wide", "needed": "9 seeds"},
        f"Open: {RATIO}. Not decided: too wide. Needed: 9 seeds.",
        (COST, "if_open"),
        "Exploratory",
    ),
    "exploratory": (
        {"exploratory": "asked later"},
        f"Exploratory: no, {RATIO}. It is exploratory: asked later.",
        ("if_open",),
        "Do not take",
    ),
    "gate": (EDGE, f"Open: \"LoRA's best learning rate is 10 times full fine-tuning's\" is not decided {PLACE}: LoRA rank 16: at edge.", ("if_open",), "4.2"),
    "better": ({"why": "not met: it is on the better side"}, "No: ", ("and this is better. 10 times", "if_supported"), "Do not take"),
    "withdrawn": (GONE, "Open: \"LoRA's", ("The answer is withdrawn: runs 0, 1 and 2 had other rows. Until", "if_open"), "4.2"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_says_yes_no_or_open_with_the_number_or_the_reason(ratio, case):
    changes, begin, has, lacks = CASES[case]
    (one,), lines = said(ratio, changes)
    texts = SWEEPS["lr_ratio"]["claims"]["ratio"]
    assert one["sentence"].startswith(begin) and lacks not in one["sentence"]
    assert all(texts.get(part, part) in one["sentence"] for part in has)
    assert lines == [one["sentence"], "Brackets: 97.1% intervals."]
    assert one["outcome"] == changes.get("outcome", "REFUTED") and one["claim"] == "ratio"


def test_a_loss_is_in_percent_of_the_gain_where_one_curve_measures_the_gain(ratio):
    table, question, found = ratio
    (one,), _ = said(ratio, claim="no_regret")
    gap = next(s for s in found.sections if s.rows).rows[2]  # LoRA's row
    (percent,) = re.findall(r" is (-?[\d.]+)% \[.*; up to 5% counts", one["sentence"])
    assert float(percent) == pytest.approx(float(gap[7].split()[0]), abs=0.06)
    (bare,), _ = said((table, question, dataclasses.replace(found, members={})), claim="no_regret")
    assert "is -0.012 [-0.0219, -0.00213] nats; -10 to 0 counts" in bare["sentence"]


TOP, SPEED = {"measure": "best_lr", "of": {"rank": "top"}, "over": "full"}, {"measure": "speed"}
BANDITS = "rl_unembedding-tiny"
TAUGHT = {"rank": 1, "layers": "fewest", "objective": "sft"}
DECLARED = {  # a sweep's own estimand: its answer, the margin -> what the sentence has
    "small": ("lr_ratio-tiny", {**TOP, "of": "full", "over": {"rank": "top"}}, [0.0707, 0.141], "is 0.24 [0.19, 0.29] times that of LoRA; 0.0707 to 0.141 counts"),
    "methods": (BANDITS, {"measure": "labels_known", "of": TAUGHT, "over": {"method": "fullft", "objective": "sft"}, "load": [0, 1]}, [-10, 10], "LoRA of rank 1 on the fewest matrices (objective sft) learns, minus that of full fine-tuning (objective sft), is"),
    "settings": ("lr_ratio-tiny", {**TOP, "of": {"rank": 16, "alpha": 32}}, [5, 20], "of LoRA of rank 16 (alpha 32) is 4.2"),
    "speed_of_all": ("layers-tiny", {"every_task": "other", "worst": "min"}, [0.9, 1.11], "LoRA on MLP has 0.61 [0.49, 0.75] times the speed of LoRA on attention and MLP (speed: full fine-tuning's updates to an arm's loss, over the arm's), on the task where this is minimal; 0.9 to 1.11 counts"),
    "gap": ("lr_ratio-tiny", {**TOP, "measure": "over_allowed"}, [-0.02, 0.4], "; -3.6 to 177.4% counts"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_estimand_is_said_with_its_arms_and_a_margin_in_its_unit(name):
    folder, said_, margin, has = DECLARED[name]
    table, question = kept_answer(KEPT / folder)
    both = {**SPEED, "of": {"layers": "mlp", "like": "rank"}, "over": {"layers": "attention+mlp"}}
    estimands = {"other": both, name: said_}
    claim = {"text": "a", "estimand": name, "expected": 1, "margin": margin, "primary": True}
    asked = {**question, "analysis": "arms", "estimands": estimands, "variants": {}}
    asked["claims"] = {"c": claim}
    answer = json.loads(report.judge_and_report(table, asked, None, as_json=True))["answer"]
    assert has in answer[0]["sentence"]


@pytest.mark.parametrize(
    ("folder", "rank", "has"),
    [
        ("rl_matrices-tiny", 1, "by rewards; 100 updates): no curve of LoRA rank 1"),
        ("regime-tiny", 16, "change of rank 2; rank 32, 256 updates) the loss of LoRA"),
    ],
)
def test_a_rank_that_was_not_run_is_not_named(folder, rank, has):
    table, question = kept_answer(KEPT / folder)
    assert has in report.judge_and_report(table[table["rank"] != rank], question, None)


def test_of_many_groups_three_are_said_and_the_others_counted(ratio):
    table, question, found = ratio
    (v,) = (v for v in found.verdicts if v.claim == "ratio")
    group = f"{v.group.removesuffix('batch 16, steps 128')}batch {{}}, steps 128"
    groups = [group.format(k) for k in (1, 2, 4, 8)]
    places = [dataclasses.replace(v.where, task=g) for g in groups]
    many = [dataclasses.replace(v, group=g, where=w) for g, w in zip(groups, places)]
    many[2] = dataclasses.replace(many[2], outcome="SUPPORTED")
    asked = table, question, dataclasses.replace(found, verdicts=many)
    answer, lines = said(asked)
    assert len({a["sentence"] for a in answer}) == 4
    assert all(f"batch {k}, " in line for k, line in zip((1, 2, 4), lines))
    assert [bool(re.search("use the measured factor", line)) for line in lines] == [0, 1, 0, 0, 0]
    assert lines[3:] == ["And 1 more in the table: 1 no.", "Brackets: 97.1% intervals."]


def test_a_question_says_what_its_own_file_says_and_the_shipped_one_fills_the_rest(ratio):
    table, question, _ = ratio
    asked = json.loads(json.dumps(question))
    mine = asked["claims"]["ratio"]
    mine["if_refuted"] = "Stop."
    assert worded(asked)["ratio"]["if_refuted"] == "Stop."
    assert worded(asked)["ratio"]["if_open"] == SWEEPS["lr_ratio"]["claims"]["ratio"]["if_open"]
    del mine["if_refuted"]
    mine["text"] = "the ratio is ten"
    (one,), _ = said((table, asked, analyse(table, asked)))
    assert one["do"] == "" and one["sentence"].endswith('agreement with "the ratio is ten".')
    (none,), _ = said(ratio, name="../lr_ratio")
    assert none["do"] == ""
    assert question_named("lr_ratio") and "cost" not in mine


def test_every_kept_answer_has_a_sentence_for_each_primary_claim_that_is_about_a_run():
    for folder in (p.parent for p in KEPT.glob("*/report.md")):
        question = json.loads((folder / "question.json").read_text())
        head, _, rest = (folder / "report.md").read_text().partition("\nQuestion: ")
        _, *sentences, brackets = [line for line in head.splitlines() if line]
        results = json.loads((folder / "results.json").read_text())
        primary = [v for v in results["verdicts"] if v["primary"]]
        not_asked = {"NO_CELL", "ELSEWHERE"}
        of_runs = [v for v in primary if not not_asked & {g["code"] for g in v["gates"]}]
        primary = of_runs or primary
        assert {re.match(r"\w+", s)[0] for s in sentences} <= {
            "Yes",
            "No",
            "Open",
            "Exploratory",
            "And",
        }
        assert len(sentences) >= len({v["claim"] for v in primary}) and brackets.startswith(
            "Brackets: "
        )
        for claim in {v["claim"] for v in primary}:
            assert (
                f'"{question["claims"][claim]["text"]}"' in head and f"({claim}, primary)" in rest
            )


def test_what_all_rows_share_of_their_place_is_said_once():
    groups = (
        "m on d(a=1, b=2), batch 4, steps 8",
        "m on d(a=1, b=2), batch 16, steps 8",
        "no cell",
    )

    def place(*groups):
        return report.apart([["x", "model and data", "y"], *(["1", g, "2"] for g in groups)])

    line, rows = place(*groups)
    assert line == ["All rows: m on d(a=1, b=2), steps 8."]
    assert [row[1] for row in rows] == ["model and data", "batch 4", "batch 16", "no cell"]
    assert place(groups[0], groups[0]) == (
        [f"All rows: {groups[0]}."],
        [["x", "y"], ["1", "2"], ["1", "2"]],
    )
    assert place("a on b", "c on d")[0] == [] and place() == ([], [["x", "y"]])


def test_every_text_of_an_answer_begins_with_the_sentence(ratio, tmp_path):
    table, question, _ = ratio
    question = json.loads(json.dumps(question))
    question["claims"]["ratio"]["text"] = "<b>ten</b> & 'more'"
    text = report.judge_and_report(table, question, tmp_path)
    first = text.splitlines()[0]
    assert first.startswith(f"No: {PLACE}") and "<b>ten</b> & 'more'" in first
    answer = json.loads(report.judge_and_report(table, question, None, as_json=True))["answer"]
    assert [a["sentence"] for a in answer] == [first]
    assert (tmp_path / "report.md").read_text().splitlines()[2] == first
    page = (tmp_path / "report.html").read_text()
    escaped = (
        first.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
    )
    assert f"<p>{escaped}</p>".replace("'", "&#39;") in page
