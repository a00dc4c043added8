"""The page of all answers: claims corrected over all sweeps, and sorted by what became of them."""

import itertools
import json
from pathlib import Path

import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import exactly
from analysis.report import study, study_claims, study_page
from analysis.report.report import question_hash
from lorasweep.sweep.request import question


def test_the_studys_table_corrects_primary_claims_and_names_what_is_needed(reports):
    parts = study.parts_of([reports])
    rows = study.rows_of(parts)
    assert rows[0] == list(study.HEAD) and {r[0].split(":")[0] for r in rows[1:]} == {"rank"}
    told = json.loads((reports / "rank-smoke/results.json").read_text())
    for v in told["verdicts"]:  # a flipped result flips the page
        v["outcome"], v["p"] = "SUPPORTED", 0.04
    (reports / "rank-smoke/results.json").write_text(json.dumps(told))
    flipped = study_page.page(study.parts_of([reports]))
    assert "**SUPPORTED**" in flipped and "What was not tested" in flipped  # of the kept answers
    assert "What was not tested" not in study_page.page(study.parts_of([reports]), "../")
    n = sum(v["primary"] for v in told["verdicts"])
    assert n == 2 and "after Holm" not in flipped.split("|")[0]
    outcomes = [v.outcome for p in study.parts_of([reports]) for v in p.verdicts if v.primary]
    assert outcomes == ["UNDECIDED", "UNDECIDED"]  # p 0.04 twice does not survive 0.05 / 2


def test_claims_are_sorted_by_what_became_of_them_over_their_scales(reports):
    folder = reports / "rank-smoke"
    told, question = (
        json.loads((folder / name).read_text()) for name in ("results.json", "question.json")
    )
    other = reports / "rank-tiny_s1"
    other.mkdir()
    (other / "question.json").write_text(json.dumps(question))
    assert told["verdicts"][1]["claim"] == "parity"
    for scale, outcome in (("smoke", "REFUTED"), ("tiny_s1", "UNDECIDED")):
        told["scale"] = scale
        for v in told["verdicts"]:
            v["outcome"], v["p"] = (outcome if v["claim"] == "parity" else "SUPPORTED"), 1e-9
        (reports / f"rank-{scale}/results.json").write_text(json.dumps(told))
    (other / "table.csv").write_bytes((folder / "table.csv").read_bytes())
    asked = study_claims.claims_of(study.parts_of([reports]))
    fates = study_claims.by_fate(asked)
    mixed = "Refuted in one answer, undecided in another"
    assert {name: len(mine) for name, mine in fates.items()} == {
        "Supported on every base": 3,
        mixed: 1,
    }
    head, _, row = study_claims.glance(fates[mixed], study_claims.bases(asked))
    assert head == "| claim | counts as yes | tiny64 |" and "as fast as full fine-tuning" in row
    assert (
        "**REFUTED** (`smoke`)" in row
        and "**UNDECIDED** (`tiny_s1`)" in row
        and "*rho of the highest rank*" in row
    )


@pytest.mark.parametrize(
    "outcomes", [c for n in (1, 2, 3) for c in itertools.combinations(study_claims.OUTCOMES, n)]
)
def test_every_claim_has_exactly_one_fate(outcomes):
    assert [is_so(set(outcomes)) for _, is_so in study_claims.FATES].count(True) == 1


def test_a_refuted_claim_says_why_only_where_the_tasks_disagree():
    claim = {"margin": [0.9, 1.1], "expected": 1}

    def line(analysis, *values):
        mine = [judge("c", claim, f"task {v}", exactly(v), [], 3, True) for v in (2.0, *values)]
        asked = {"analysis": analysis, "claims": {"c": claim}}
        part = study.Part(Path(), {"sweep": analysis, "scale": "tiny"}, asked, mine)
        return study_page._verdict(part, mine[0])

    assert "do not meet" in line("layers", 1.0, 2.0)
    assert "do not meet" not in line("layers", 2.0, 3.0)  # all tasks refute it
    assert "do not meet" not in line("lr_ratio", 1.0, 2.0)  # verdicts on models, none over all


def test_words_are_no_part_of_what_is_hashed_and_every_claim_has_some(compose):
    for name in study.ORDER:
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
                },
            },
        }
        assert question_hash(other) == question_hash(asked)
        other["claims"][first]["margin"] = [0.0, 1e9]
        assert question_hash(other) != question_hash(asked)
