"""Whether a task is fit to be asked about, from tables of planted runs."""

import json
import math
from types import SimpleNamespace

import pytest

from analysis.measures.speed import stalled
from analysis.runs.learning_curves import at_step, task_problems, while_unsolved
from lorasweep.store.table import load_runs
from tests.planted import GAIN, START

pytestmark = pytest.mark.slow  # fits hundreds of curves


def test_prefixes_are_the_first_part_of_a_curve(rank_answer):
    table = load_runs(rank_answer / "runs")
    short = at_step(table, 32)
    assert (short["steps"] == 32).all() and len(short) == len(table)
    first = json.loads(table.iloc[0]["result"])["curve"]
    assert short.iloc[0]["test_nll"] == next(p["test_nll"] for p in first if p["step"] == 32)


def test_runs_are_cut_where_their_task_is_over(rank_answer):
    """The planted loss falls by GAIN a doubling: by GAIN log2(1 + s) until step s."""
    whole = load_runs(rank_answer / "runs")
    plain = whole[(whole["method"] == "fullft") | (whole["init_seed"].fillna(0) == 0)]
    assert while_unsolved(plain)[1] == ""  # the fake tells no floor
    learned = GAIN * math.log2(1 + 40)  # so that a fifth is left near step 40
    part, said = while_unsolved(plain.assign(floor_nats=START - learned / 0.8))
    assert set(part["steps"]) == {32} and said.startswith("Cut at 32 of 96 updates")
    assert {while_unsolved(plain.assign(floor_nats=v))[1] for v in (0.0, 3.39)} == {""}


def test_a_task_is_fit_by_its_gain_over_the_noise_and_by_what_is_left():
    for *losses, noise, says in (
        (2.0, 1.0, 1.5, 0.01, ""),
        (2.0, 1.0, 1.5, 0.02, "the gain is 17.7 standard deviations"),  # 0.5 / (0.02 sqrt(2))
        (2.0, math.nan, 1.5, 0.01, ""),  # real text has no floor
        (2.0, 1.0, 1.5, math.nan, ""),
        (2.0, 1.0, 1.1, 0.01, "nearly solved"),
        (2.0, 1.9, 1.95, 1e-3, ""),  # little to learn, but well measured
    ):
        found = task_problems(*losses, noise=noise)
        assert len(found) == bool(says) and all(problem.startswith(says) for problem in found)
    # an arm has stalled if its last doubling does not clearly gain
    clear, unclear = [0.02, 0.025, 0.018], [0.01, -0.02, 0.015]
    for gains, stops in ((clear, False), (unclear, True), ([-0.01], True), ([0.01], False)):
        points = {seed: [(32, 2.0), (64, 2.0 - g)] for seed, g in enumerate(gains)}
        one = SimpleNamespace(curve=SimpleNamespace(name="fullft"))
        assert bool(stalled([one], [points])) == stops
