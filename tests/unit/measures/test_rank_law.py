"""The rank that is needed and its law, on planted ones."""

import math

import numpy as np
import pytest

from analysis.measures.at_best import AtBest
from analysis.measures.laws.rank_law import Point, change_of_needed, crossing, rank_law

CELLS = [(m, k) for m in (8, 32) for k in (2, 8)]
RIVALS = {"bits": {"bits": 1.0}, "rank": {"rank": 1.0}, "none": {}}


def test_the_needed_rank_lies_where_the_gap_last_falls_to_what_is_allowed():
    x = [0.0, 2.0, 3.0, 4.0]
    assert crossing(x, [6.0, 2.0, 0.0, -2.0]) == pytest.approx(3)
    assert 2 < crossing(x, [6.0, 2.0, -2.0, -3.0]) < 3
    assert crossing(x, [-1.0, -1.0, -2.0, -2.0]) == -math.inf
    assert crossing(x, [3.0, 2.0, 1.0, 0.1]) == math.inf
    # A rank that does well between two that do not is chance: what counts is the last crossing.
    assert 3 < crossing(x, [3.0, -1.0, 1.0, -1.0]) < 4
    assert math.isnan(crossing(x, [3.0, math.nan, -1.0, -2.0]))


def points(rng, bits, rank, noise=0.3, seeds=6, misfit=0.0):
    """log2 r* = 1 + bits x log2(bits) + rank x log2(rank); a seed's draw moves each cell."""
    found = []
    for i, (m, k) in enumerate(CELLS):
        by = {"bits": math.log2(m * k), "rank": math.log2(k)}
        truth = 1 + bits * by["bits"] + rank * by["rank"] + misfit * (-1) ** i
        needed = {100 + s: truth + noise * rng.standard_normal() for s in range(seeds)}
        found.append(Point(f"{m}, {k}", by, AtBest(needed)))
    return found


@pytest.mark.parametrize(("bits", "rank", "true"), [(1, 0, "bits"), (0, 1, "rank"), (0, 0, "none")])
def test_a_planted_law_is_kept_and_its_rivals_are_out(bits, rank, true):
    law = rank_law(points(np.random.default_rng(1), bits, rank, 0.1), ["bits", "rank"], RIVALS)
    assert law is not None and law.cells == 4
    assert law.exponents["bits"].value == pytest.approx(bits, abs=0.1)
    assert law.exponents["rank"].value == pytest.approx(rank, abs=0.1)
    assert {n for n, p in law.rivals.items() if p >= 0.05} == {true}
    assert law.left_out < 0.3


def test_intervals_and_the_joint_test_hold_what_they_promise():
    rng, cases = np.random.default_rng(2), 400
    inside, kept = 0, 0
    for _ in range(cases):
        law = rank_law(
            points(rng, 0.5, 0.25), ["bits", "rank"], {"it": {"bits": 0.5, "rank": 0.25}}
        )
        e = law.exponents["bits"]
        inside += e.low <= 0.5 <= e.high
        kept += law.rivals["it"] >= 0.05
    assert inside / cases == pytest.approx(0.95, abs=0.03)
    assert kept / cases == pytest.approx(0.95, abs=0.03)


def test_a_law_that_cells_do_not_follow_shows_it_at_the_cell_left_out():
    law = rank_law(points(np.random.default_rng(3), 1, 0, 0.05, misfit=1.0), ["bits"], RIVALS)
    assert law.left_out > 0.5


def test_cells_outside_the_ranks_tried_and_too_few_of_them_give_no_law():
    mine = points(np.random.default_rng(4), 1, 0)
    outside = AtBest({**mine[0].needed.best, 100: math.inf})
    cut = [Point(mine[0].cell, mine[0].by, outside), *mine[1:]]
    law = rank_law(cut, ["bits", "rank"], RIVALS)
    assert law.cells == 3 and law.left_out is None
    assert rank_law(cut[:3], ["bits", "rank"], RIVALS) is None
    assert rank_law(mine[:1] * 4, ["bits"], RIVALS) is None
    assert change_of_needed(outside, mine[1].needed, 2) is None


def test_the_error_of_the_best_rates_widens_the_law():
    rng = np.random.default_rng(5)
    mine = points(rng, 1, 0, 0.1)

    def drawn(p):
        shifts = rng.standard_normal(120)
        likely = tuple({s: v + shift for s, v in p.needed.best.items()} for shift in shifts)
        return Point(p.cell, p.by, AtBest(p.needed.best, likely))

    narrow, wide = (rank_law(p, ["bits", "rank"], RIVALS) for p in (mine, [*map(drawn, mine)]))
    width = [law.exponents["bits"].high - law.exponents["bits"].low for law in (narrow, wide)]
    assert width[1] > 3 * width[0]
    assert wide.rivals["none"] > narrow.rivals["none"]
