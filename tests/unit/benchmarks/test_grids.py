"""The arithmetic of the time to an answer."""

import pytest

from benchmarks import grids, speed
from lorasweep.config.compose import compose_request

CURVES = [
    {"start_s": 5.0, "run_s": 5.0, "sampled": 3},
    {"start_s": 5.0, "run_s": 15.0, "sampled": 3},
]


def test_an_answer_is_compared_with_both_plain_grids():
    found = grids.versus(200.0, CURVES)
    assert (found["plain_grid_s"], found["same_interval_s"]) == (21 * 30, 14 * 30)
    assert found["vs_plain_grid"] == pytest.approx(3.15)
    assert found["vs_same_interval"] == pytest.approx(2.1)


def test_the_answer_is_timed_whole_and_processes_are_multiplied_up(monkeypatch):
    points = compose_request(["+sweep=lr_ratio", "scale=tiny"]).points
    timed, logged = [], []

    def process(kind, sample, values, runs, folder):
        timed.append((kind, sample[0].id, runs))
        return {"start_s": 4.0, "train_s": 5.0, "eval_s": 1.0, "run_s": 6.0}

    whole = {"wall_s": 100.0, "runs": len(points)}
    monkeypatch.setattr(grids, "run_answer", lambda scale, home: (dict(whole), points))
    monkeypatch.setattr(grids, "baseline", process)
    found = grids.time_answer("tiny", {}, logged.append)
    assert [p["rank"] for p in found["processes"]] == [None, 16]
    assert len({i for _, i, _ in timed}) == len(timed) == 2 * grids.SAMPLES
    assert {(kind, runs) for kind, _, runs in timed} == {("trl", 1)}
    assert found["vs_plain_grid"] == pytest.approx(2 * 21 * 10 / 100)
    assert "3 TRL processes of each curve timed, and multiplied up" in logged[-1]


def test_the_page_shows_the_time_to_an_answer():
    found = {"runs": 39, "wall_s": 200.0, "value": 3.8, "low": 2.7, "high": None}
    text = "\n".join(speed.answer_table(found | grids.versus(200.0, CURVES)))
    assert "| 39 | 200 s | 3.8 [2.7, -] | 630 s: **3.1x** | 420 s: **2.1x** |" in text
    assert "3 of each curve were timed" in text
    assert speed.answer_table(None) == []
