"""Pages are rendered from the kept figures, and show each of them."""

import json

import pytest

from benchmarks import calibration, fleet, outcomes, published, rewards, search, speed
from lorasweep.advise.rules import texts
from lorasweep.plan.load import TRAINING_SHARE
from lorasweep.plan.planner import MEMORY_ERROR, SPEED_ERROR


@pytest.mark.parametrize("module", [speed, fleet, rewards, search, calibration])
def test_kept_pages_are_rendered_from_the_kept_figures(module):
    page = module.PAGE
    figures = json.loads(page.figures.read_text())
    assert all(figures.values())  # no part was left out
    assert (page.figures.parent / page.name).read_text() == page.render(figures)
    if module is calibration:
        assert min(r["cases"] for r in figures["coverage"]) >= 2000


@pytest.mark.parametrize("figure, stated", [("memory", MEMORY_ERROR), ("speed", SPEED_ERROR)])
def test_the_plan_is_near_four_in_five_of_the_figures_it_covers(figure, stated):
    found = published.covered(figure)
    assert len(found) >= 20 and found["within"].mean() >= 0.8
    assert not any(r.precision != "bf16" or r.sharding == "other" for r in found["row"])
    assert published.nine_in_ten(figure) <= stated + 0.005
    # one constant is fitted, and to the other sources for each row
    assert round(published.fitted_share(), 2) == TRAINING_SHARE


def test_the_kept_page_of_the_plan_is_fresh():
    assert (published.FOLDER / "README.md").read_text() == published.page()
    assert (published.FOLDER / "table.csv").read_text() == published.table()
    assert published.comparisons().dropna(subset="predicted")["source"].nunique() >= 6


def test_the_kept_page_of_the_adviser_follows_the_rules_and_shows_its_misses():
    text, judged = outcomes.TARGET.read_text(), (*outcomes.outcomes(), *outcomes.rates())
    assert text == outcomes.page()
    assert text.count("**miss**") == len([j for j in judged if j.verdict == "miss"]) > 0
    where = texts("published")["sources"] | outcomes.read()["sources"]
    for j in judged:  # none by its own source
        source, kept = j.entry["source"], j.advice.known.published
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
