"""The comparison of tune with a grid and Optuna: what a method chose, when it was right, and small runs of each part."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.search import page, tables
from benchmarks.search.methods import (
    N_GRID,
    Trial,
    additive,
    chosen,
    course,
    regret_at,
    until_right,
)
from benchmarks.search.real import CASES, Case
from benchmarks.search.run import main
from benchmarks.search.simulated import SHAPES, coverage
from lorasweep.store import files


def full(lr, loss, seed=0):
    return Trial(lr, seed, 8, loss)


def test_full_runs_choose_the_vertex_of_the_parabola_or_the_best_of_them():
    lrs = [1e-3, 2e-3, 4e-3]
    valley = [(math.log(lr / 1.7e-3)) ** 2 for lr in lrs]
    assert chosen(map(full, lrs, valley)) == pytest.approx(1.7e-3)
    assert chosen(map(full, lrs, [1.0, 2.0, 3.0])) == 1e-3
    assert chosen(map(full, lrs, [2.0, 1.0, math.inf])) == 2e-3
    assert chosen([]) is None
    # A seed with higher losses, at two of the learning rates only, does not move the choice.
    more = [full(lr, v + 5, 1) for lr, v in zip(lrs[1:], valley[1:])]
    assert chosen([*map(full, lrs, valley), *more]) == pytest.approx(1.7e-3)


def test_shifts_of_seeds_are_found_where_runs_are_missing():
    whole = np.array([3.0, 1.0, 2.0]) + np.array([[-0.5], [0.5]])
    seen = whole.copy()
    seen[1, 0] = np.nan
    rate, shift = additive(seen)
    assert rate[:, None].T + shift[:, None] == pytest.approx(whole, abs=1e-6)


def test_updates_count_until_the_choice_stays_right():
    truth = SimpleNamespace(regret=lambda lr: 100 * abs(math.log(lr)))
    trials = [Trial(1.0, 0, 2, None), full(1.0, 3.0), full(2.0, 2.0), full(0.996, 1.0)]
    path = course(trials, 8, truth)
    assert [u for u, _ in path] == [0.25, 1.25, 2.25, 3.25]
    assert until_right(path) == 3.25 and until_right(path[:3]) == math.inf
    assert regret_at(path, 1.25) == 0 and regret_at(path, 1) == math.inf


@pytest.mark.parametrize("name", tables.TABLES)
def test_replays_have_the_losses_of_the_table(name):
    data = tables.kept(name)
    for truth, losses in zip(data.truths, data.losses):
        curve = truth.optimum.curve
        first = curve.usable & (curve.seed == min(curve.seed))
        for x, y in zip(curve.x[first], curve.y[first]):
            assert losses(math.exp(x), data.points[0].spec.steps, 0) == pytest.approx(y)
        assert truth.regret(truth.optimum.best_lr.value) < 1e-3


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_part_runs_and_gives_a_page(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    short = ("scale=tiny", "steps=24", "sweep.arms.lora.rank=16")
    monkeypatch.setitem(CASES, "tiny", Case(short, 0, 4, ("Optuna",)))
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    main(["replays:3", "coverage:1", "tiny"])
    content = files.read_json(tmp_path / "search.json")
    for row in content["replays"]:
        assert row["methods"]["tune"]["right"] == 1
        assert row["methods"]["tune"]["end"] < row["methods"]["plain grid"]["end"] == N_GRID
    for name in (page.TUNE, page.GRID):
        assert max(content["tiny"]["methods"][name]["regrets"]) < 5
    assert (tmp_path / "README.md").read_text() == page.page(content)
    assert (tmp_path / "search.png").stat().st_size > 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_intervals_of_whole_searches_hold_known_optima():
    rows = coverage(print, 2)
    assert len(rows) == len(SHAPES) and all(r["right"] == 1 for r in rows)
    for key in ("lr", "gap"):
        n, held = (sum(r[k][key] for r in rows) for k in ("intervals", "held"))
        assert held >= 0.85 * n > 0
