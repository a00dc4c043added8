"""Pages are rendered from the kept figures, and show each of them."""

import json

import pytest

from analysis.report.text import with_block
from benchmarks import fleet, outcomes, published, rewards, speed
from benchmarks.calibration import page as calibration_page
from benchmarks.harness import FIGURES, ROOT
from benchmarks.search import page as search_page
from lorasweep.advise.evidence import published as published_rules
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.time import TRAINING_SHARE

CALIBRATION = calibration_page.FOLDER / "calibration.json"
CASES = {
    "speed": (FIGURES / "bench.json", "README.md", speed, ("usage", "bench")),
    "fleet": (FIGURES / "fleet.json", "fleet.md", fleet, ("fleet", "fleet")),
    "rewards": (FIGURES / "rewards.json", "rewards.md", rewards, ()),
    "search": (search_page.FOLDER / "search.json", "README.md", search_page, ()),
    "calibration": (CALIBRATION, "README.md", calibration_page, ("answers", "calibration")),
}


@pytest.mark.parametrize("name", CASES)
def test_kept_pages_and_documents_are_rendered_from_the_kept_figures(name):
    path, page, module, document = CASES[name]
    figures = json.loads(path.read_text())
    assert (path.parent / page).read_text() == module.page(figures)
    if document:
        text = (ROOT / "docs" / f"{document[0]}.md").read_text()
        assert with_block(text, document[1], module.summary(figures)) == text


def test_the_kept_figures_are_enough():
    assert all(json.loads((FIGURES / "bench.json").read_text()).values())  # no part was left out
    assert min(r["cases"] for r in json.loads(CALIBRATION.read_text())["coverage"]) >= 2000


def covered(figure):
    name = {"memory": "memory_gib", "speed": "tokens_s"}[figure]
    rows = published.rows()
    return [r for r in rows if getattr(r, name) and published.not_covered(r, figure) is None]


def test_enough_rows_and_sources_are_covered_by_their_settings():
    memory, speed = covered("memory"), covered("speed")
    assert len(memory) >= 20 and len(speed) >= 20
    assert len({r.source for r in memory + speed}) >= 6
    assert not any(r.precision != "bf16" or r.sharding == "other" for r in memory + speed)


@pytest.mark.parametrize("figure, stated", [("memory", MEMORY_ERROR), ("speed", SPEED_ERROR)])
def test_the_plan_is_near_four_in_five_of_the_figures_it_covers(figure, stated):
    every = published.comparisons()
    found = [c for c in every if c.figure == figure and c.predicted is not None]
    assert sum(c.within for c in found) >= 0.8 * len(found)
    assert published.nine_in_ten(figure) <= stated + 0.005


def test_the_only_fitted_constant_of_the_plan_is_the_one_that_fits():
    assert round(published.fitted_share(), 2) == TRAINING_SHARE


def test_the_kept_page_of_the_plan_is_fresh():
    assert (published.FOLDER / "README.md").read_text() == published.page()
    assert (published.FOLDER / "table.csv").read_text() == published.table()


def test_the_kept_page_of_the_adviser_follows_the_rules_and_shows_its_misses():
    text = outcomes.PAGE.read_text()
    assert text == outcomes.page()
    misses = [j for j in (*outcomes.outcomes(), *outcomes.rates()) if j.verdict == "miss"]
    assert text.count("**miss**") == len(misses) > 0


def test_no_row_is_judged_by_its_own_source():
    where = published_rules().values["sources"] | outcomes.read()["sources"]
    for j in (*outcomes.outcomes(), *outcomes.rates()):
        source, kept = j.entry["source"], j.advice.known.published.values
        assert f"({source})" not in j.advice.rate.source and source in where
        entries = [e for name in ("rates", "least_rank") for e in kept[name]]
        assert source not in {e["source"] for e in entries}


def test_known_outcomes_stay():
    found = {(j.entry["source"], j.entry["what"]): j.says for j in outcomes.outcomes()}
    assert found["biderman", "Starcoder-Python, 20B tokens"] == "behind"
    assert found["biderman", "OpenWebMath, 14.7B tokens"] == "behind"
    assert found["biderman", "Magicoder-Evol-Instruct, 73M tokens"] == "close"
    assert found["opd", "OpenThoughts3, 400,000 prompts"] == "behind"
    assert found["study", "MATH, GRPO-like, 10,000 problems x 32"] == "close"
