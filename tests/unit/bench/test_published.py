"""The plan against published measurements: which rows it covers, and how well."""

import pytest

from lorasweep.bench import published_page
from lorasweep.bench.published import comparisons, fitted_share, not_covered, rows
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.time import TRAINING_SHARE


def covered(figure):
    name = {"memory": "memory_gib", "speed": "tokens_s"}[figure]
    return [r for r in rows() if getattr(r, name) and not_covered(r, figure) is None]


def test_enough_rows_and_sources_are_covered_by_their_settings():
    memory, speed = covered("memory"), covered("speed")
    assert len(memory) >= 20 and len(speed) >= 20
    assert len({r.source for r in memory + speed}) >= 6
    assert not any(r.precision != "bf16" or r.sharding == "other" for r in memory + speed)


@pytest.mark.parametrize("figure", ["memory", "speed"])
def test_the_plan_is_near_four_in_five_of_the_figures_it_covers(figure):
    found = [c for c in comparisons() if c.figure == figure and c.predicted is not None]
    assert sum(c.within for c in found) >= 0.8 * len(found)
    stated = {"memory": MEMORY_ERROR, "speed": SPEED_ERROR}[figure]
    assert published_page.nine_in_ten(figure) <= stated + 0.005


def test_the_plans_one_fitted_constant_is_the_one_that_fits():
    assert round(fitted_share(), 2) == TRAINING_SHARE


def test_the_kept_page_is_fresh():
    assert (published_page.FOLDER / "README.md").read_text() == published_page.page()
    assert (published_page.FOLDER / "table.csv").read_text() == published_page.table()
