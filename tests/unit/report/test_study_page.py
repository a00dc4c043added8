"""The page of all answers: verdicts as their reports give them, details, and words that are no part of
a claim."""

import json
import shutil
from pathlib import Path

import pytest

from analysis.measures import next_runs
from analysis.questions.registry import analyse
from analysis.report import report
from analysis.report.report import question_hash
from analysis.report.study import answers, page, speed
from analysis.report.study.setting import Setting
from analysis.runs.table import read
from lorasweep.sweep.request import question

KEPT = Path(answers.__file__).resolve().parents[2] / "results"


def test_a_verdict_is_the_one_of_its_own_report(reports):
    parts = answers.parts_of([reports])
    rows = answers.rows_of(parts)
    assert rows[0] == list(answers.HEAD) and {r[0].split(":")[0] for r in rows[1:]} == {"rank"}
    results = json.loads((reports / "rank-smoke/results.json").read_text())
    for v in results["verdicts"]:
        v["outcome"], v["p"] = "SUPPORTED", 0.04
    (reports / "rank-smoke/results.json").write_text(json.dumps(results))
    (part,) = answers.parts_of([reports])
    # The report has corrected its two primary claims; the page corrects nothing again.
    assert sum(v.primary for v in part.verdicts) == 2
    assert {v.outcome for v in part.verdicts} == {"SUPPORTED"}
    flipped = page.page([part], reports, kept=True)
    assert "**SUPPORTED** at `smoke`" in flipped
    assert "What was not tested" in flipped  # of the kept answers
    assert "What was not tested" not in page.page([part], reports)


def test_gates_are_read_back_as_codes_and_older_answers_have_none(reports):
    path = reports / "rank-smoke/results.json"
    (part,) = answers.parts_of([reports])
    assert any(v.gates for v in part.verdicts)
    for v in part.verdicts:
        assert not v.gates or v.why == "; ".join(g.sentence for g in v.gates)
    results = json.loads(path.read_text())
    assert [v.plain() for v in part.verdicts] == results["verdicts"]
    for v in results["verdicts"]:
        del v["gates"]
    path.write_text(json.dumps(results))
    (part,) = answers.parts_of([reports])
    assert not any(v.gates for v in part.verdicts)


def test_the_page_is_written_with_its_figures_and_none_that_is_out_of_date(reports, tmp_path):
    (tmp_path / page.REGRET).write_bytes(b"of an answer that is gone")
    page.write(answers.parts_of([reports]), tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert f"]({page.FOREST})" in text and (tmp_path / page.FOREST).is_file()
    assert page.REGRET not in text and not (tmp_path / page.REGRET).exists()
    assert f"]({page.SPEED})" in text and (tmp_path / page.SPEED).is_file()
    assert "reports/rank-smoke/report.md" in text


def test_the_kept_page_can_be_read_at_once():
    text = page.page(answers.parts_of([KEPT]), KEPT, kept=True)
    before, details = text.split("## Details")
    assert len(before.splitlines()) <= 260  # with the table of bits by three counts
    assert details.count("<details>") == details.count("</details>") > 3
    assert text.count("\n# ") == 0 and "rule_shift" not in text


def test_an_answer_of_the_same_name_in_the_first_folder_is_used(reports, tmp_path):
    shutil.copytree(reports / "rank-smoke", tmp_path / "kept" / "rank-smoke")
    parts = answers.parts_of([tmp_path / "kept", reports])
    assert [p.folder for p in parts] == [tmp_path / "kept" / "rank-smoke"]


def test_words_are_no_part_of_what_is_hashed_and_every_claim_has_some(compose):
    for name in answers.ORDER:
        asked = question(compose(f"+sweep={name}", "scale=smoke"))
        assert asked["how"] and all(c["says"] and c["measure"] for c in asked["claims"].values()), (
            name
        )
        first = next(iter(asked["claims"]))
        other = {
            **asked,
            "claims": {
                **asked["claims"],
                first: {
                    **asked["claims"][first],
                    "says": "other words",
                    "measure": "metres",
                    "beside": "the point",
                    "sd": {"smoke": 0.5},
                    "units": 7,
                    "underpowered": True,
                },
            },
        }
        assert question_hash(other) == question_hash(asked)
        other["claims"][first]["margin"] = [0.0, 1e9]
        assert question_hash(other) != question_hash(asked)


def test_speed_is_measured_along_the_run_at_each_lengths_best_rate(reports):
    """All ranks of the planted runs need 1 / 0.7 as many updates, whatever the length."""
    (part,) = answers.parts_of([reports])
    found = speed.speeds(part.runs, 96)
    assert found and all(set(mine) >= {16, 32, 64} for mine in found.values())
    values = [e.value for mine in found.values() for e in mine.values()]
    assert values == pytest.approx([0.7] * len(values), abs=0.05)
    assert set(speed.chosen([part])) == {Setting.BEYOND}


def test_what_a_sweeps_file_says_of_its_answer_is_in_the_verdicts(reports):
    """Judged again from the same runs: first as they are, then with one claim as exploratory, then
    with the whole answer withdrawn."""
    folder = reports / "rank-smoke"
    table = read(folder / "table.parquet")
    asked = json.loads((folder / "question.json").read_text())
    plain = analyse(table, asked)
    assert not any(v.exploratory or v.is_withdrawn for v in plain.verdicts)
    first = next(iter(asked["claims"]))
    asked["claims"][first]["exploratory"] = {"smoke": "the rule came later", "tiny": "no"}
    known = {v.claim: v for v in analyse(table, asked).verdicts}
    assert {c for c, v in known.items() if v.exploratory} == {first}
    assert known[first].plain()["exploratory"] == "the rule came later"
    outcome = next(v.outcome for v in plain.verdicts if v.claim == first)
    assert known[first].outcome == outcome and known[first].shown == f"{outcome} (exploratory)"
    assert question_hash(asked) == plain_hash(folder)
    asked["withdrawn"] = "an arm is missing"
    found = analyse(table, asked)
    for v, as_judged in zip(found.verdicts, plain.verdicts):
        assert v.outcome == "UNDECIDED" and v.shown == "WITHDRAWN"
        assert v.plain()["why"].startswith("withdrawn: an arm is missing")
        assert v.plain()["gates"][0]["code"] == "WITHDRAWN"
        assert v.estimate.plain() == as_judged.estimate.plain()
    assert {v.outcome for v in plain.verdicts} != {"UNDECIDED"}
    assert next_runs.suggest(found) == []  # more seeds do not bring it back
    text = report.render(found, asked, table)
    assert "**WITHDRAWN**: an arm is missing." in text and "**REFUTED" not in text
    asked["claims"][first]["stands"] = True
    again = {v.claim: v.shown for v in analyse(table, asked).verdicts}
    assert again.pop(first) == f"{outcome} (exploratory)" and set(again.values()) == {"WITHDRAWN"}
    assert question_hash(asked) == plain_hash(folder)


def plain_hash(folder):
    """The hash of the question as it was asked."""
    return json.loads((folder / "results.json").read_text())["claims_hash"]
