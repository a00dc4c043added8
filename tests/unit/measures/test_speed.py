"""Learning curves compared: rho, falling behind, straightness, batches; values at the best LR."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.measures import speed
from analysis.measures.at_best import AtBest, over_seeds, weights
from analysis.measures.regret import change_of_needed, crossing
from analysis.measures.speed import Prefix, difference, effect, stalled, within
from analysis.runs.curves import at_step, task_problems, while_unsolved
from lorasweep.store.table import load_runs
from tests.planted import GAIN, START

STEPS = [2**k for k in range(7)]
RANKS, LAST, FIRST = (1, 2, 4, 8), 256.0, 1.0


def curve(factor, shift=0.0):
    return [(s, 3.0 - 0.5 * math.log(s * factor) + shift) for s in STEPS]


def test_rho_comes_back_as_planted_and_is_a_bound_where_a_curve_begins_below():
    full = AtBest({s: curve(1.0, 0.01 * s) for s in range(4)})
    e = speed.rho(AtBest({s: curve(0.8, 0.01 * s) for s in range(4)}), full)
    assert e.value == pytest.approx(0.8) and e.low == pytest.approx(0.8) and e.n == 4
    one = AtBest({0: curve(1.0), 1: curve(1.0, 1e-9)})
    assert speed.rho(AtBest({0: curve(1.5), 1: curve(1.5)}), one).value == pytest.approx(1.5)
    far = speed.rho(AtBest({0: curve(100.0), 1: curve(100.0)}), one)
    assert far.value is None and far.low == pytest.approx(64) and far.flags
    no_common_seed = speed.rho(AtBest({0: curve(0.8)}), AtBest({1: curve(1.0)}))
    assert no_common_seed.value is None


def test_the_error_of_the_optimum_widens_an_interval_over_seeds():
    def lora(factor):
        return {s: curve(factor * 1.01**s) for s in range(3)}

    full = AtBest({s: curve(1.0) for s in range(3)})
    draws = tuple(lora(0.5 * 1.2**z) for z in np.linspace(-2, 2, 40))
    sure, unsure = speed.rho(AtBest(lora(0.5)), full), speed.rho(AtBest(lora(0.5), draws), full)
    assert unsure.value == pytest.approx(sure.value, rel=0.02)
    assert sure.high / sure.low < 1.06 and 1.9 < unsure.high / unsure.low < 2.3


def test_departure_of_a_known_curve():
    full = [(2.0**k, 3.0 - 0.2 * k) for k in range(9)]  # gains 1.6 nats: a lack of 0.08 counts
    at = speed.departure([(s, v + (0.16 if s >= 64 else 0.0)) for s, v in full], full, 3.0)
    assert at.low == at.high == pytest.approx(math.exp(math.log(32) + 0.5 * math.log(2)))
    assert speed.departure(full, full, 3.0) == speed.Departure(256.0, math.inf)
    assert speed.departure([(s, v + 0.2) for s, v in full], full, 3.0) == speed.Departure(0.0, 1.0)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_ranks_that_never_fall_behind_do_not_bias_the_slope(slope):
    """Leaving out the 29% of curves behind after the run gave 0.33 for 0.5, and 84% coverage."""
    rng, found = np.random.default_rng(5), []
    never = speed.Departure(LAST, math.inf)
    for _ in range(150):  # departures at exp(4.3 + slope log2(rank)), seen from FIRST to LAST
        left = {r: {} for r in RANKS}
        for s in range(6):
            shared = 0.2 * rng.standard_normal()
            for r in RANKS:
                t = math.exp(4.3 + shared + slope * math.log2(r) + 0.6 * rng.standard_normal())
                inside = speed.Departure(0.0, FIRST) if t < FIRST else speed.Departure(t, t)
                left[r][s] = never if t > LAST else inside
        found.append(speed.slope_of({r: AtBest(v) for r, v in left.items()}))
    assert np.mean([e.value for e in found]) == pytest.approx(slope, abs=0.04)
    assert np.mean([e.low <= slope <= e.high for e in found]) > 0.9
    one = {r: AtBest(dict.fromkeys(range(3), never)) for r in RANKS}
    one[1] = AtBest({s: speed.Departure(9.0 + s, 9.0 + s) for s in range(3)})
    assert "one_rank_departs" in speed.slope_of(one).flags


def falling(fall, steps=(1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 100, 128)):
    return [(s, 3.0 - fall(math.log(s))) for s in steps]


def test_of_two_curves_the_one_further_from_a_line_is_taken():
    steps = [2**k for k in range(8)]  # at the ends 128, 32 and 8
    squared = speed.bend(falling(lambda x: 0.1 * x**2, steps))
    assert math.exp(squared) == pytest.approx((7**2 - 5**2) / (5**2 - 3**2))
    for short in ([], falling(lambda x: -x), falling(lambda x: x, (16, 32, 64))):
        assert math.isnan(speed.bend(short))
    line, bent = (AtBest({s: falling(f) for s in range(3)}) for f in (lambda x: 0.1 * x, math.sqrt))
    assert speed.least_straight(line).value == pytest.approx(1)
    assert speed.least_straight(line, bent).value == speed.least_straight(bent).value < 0.9
    assert speed.least_straight(line, AtBest({0: falling(lambda x: x, (64,))})).value is None


BATCH_LENGTHS = {4: 512, 16: 256, 64: 64, 256: 16}  # as in the shipped sweep
BATCH_STEPS = [s for k in range(3, 10) for s in (2**k, 3 * 2 ** (k - 1))]
GRID = [(b, s) for b, last in BATCH_LENGTHS.items() for s in BATCH_STEPS if s <= last]


def planted(b, rng, rank=16, common=None):
    """ln(rho) that falls steeply with updates; prefixes share the noise of a batch and seed."""
    logs = {key: {} for key in GRID}
    for seed in range(6):
        whole = rng.normal(0, 0.1) if common is None else common[seed]
        own = {batch: rng.normal(0, 0.03) for batch in BATCH_LENGTHS}
        for batch, steps in GRID:
            falls = -0.5 * math.log2(steps) + 0.02 * math.log2(steps) ** 2
            noise = own[batch] + rng.normal(0, 0.02)
            logs[batch, steps][seed] = whole + falls + b * math.log2(batch) + noise
    return [Prefix(batch, steps, rank, None, None, AtBest(v)) for (batch, steps), v in logs.items()]


@pytest.mark.parametrize("b", [0.0, -0.1])
def test_the_interval_over_six_seeds_covers_the_planted_effect(b):
    rng = np.random.default_rng(1)
    found = [over_seeds(effect(planted(b, rng))) for _ in range(400)]
    assert 0.92 <= np.mean([e.low <= b <= e.high for e in found]) <= 0.98
    assert np.mean([e.value for e in found]) == pytest.approx(b, abs=2e-3)
    rng = np.random.default_rng(3)
    common = rng.normal(0, 5, 6)  # cancels: the difference of two ranks is paired by seed
    high, low = planted(b, rng, common=common), planted(b + 0.08, rng, rank=1, common=common)
    e = difference(high, low)
    assert e.low < -0.08 < e.high and e.high - e.low < 0.08
    # infinite and missing values, and lonely prefixes, count for nothing
    logs = {(4, 8): {0: 0.0, 1: 1.0}, (16, 8): {0: -0.4, 1: 0.6}, (4, 512): {0: -9.0, 1: -9.0}}
    logs |= {(4, 16): {0: -math.inf, 1: 0.3}, (16, 16): {0: 7.0}}
    found = effect([Prefix(*at, 4, None, None, AtBest(v)) for at, v in logs.items()])
    assert found.best == pytest.approx({0: -0.2, 1: -0.2})
    assert within([1, 2], np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None


def test_weights_are_lagranges_and_keep_away_from_a_cliff():
    tried = [math.log(r) for r in (1e-3, 2e-3, 4e-3, 8e-3)]
    at = math.log(2.8e-3)
    for heights in ({x: -x for x in tried}, {x: x for x in tried}):
        found = weights(tried, at, heights)
        assert len(found) == 3 and sum(found.values()) == pytest.approx(1)
        parabola = sum(w * (x - 1) ** 2 for x, w in found.items())
        assert parabola == pytest.approx((at - 1) ** 2)
    assert min(found) == tried[0]  # the loss falls towards lower rates, so the third one lies there
    assert weights(tried, math.log(0.5e-3), heights) == {tried[0]: 1.0}
    assert weights(tried, tried[1], heights) == {tried[1]: 1.0}
    assert set(weights(tried[:2], math.log(1.5e-3), heights)) == {*tried[:2]}


def test_the_needed_rank_lies_where_the_gap_last_falls_to_what_is_allowed():
    x = [0.0, 2.0, 3.0, 4.0]
    for y, low, high in (
        ([6.0, 2.0, 0.0, -2.0], 3, 3),
        ([6.0, 2.0, -2.0, -3.0], 2, 3),
        # A rank that does well between two that do not is chance: the last crossing counts.
        ([3.0, -1.0, 1.0, -1.0], 3, 4),
        ([-1.0, -1.0, -2.0, -2.0], -math.inf, -math.inf),
        ([3.0, 2.0, 1.0, 0.1], math.inf, math.inf),
    ):
        assert low - 1e-9 <= crossing(x, y) <= high + 1e-9
    assert math.isnan(crossing(x, [3.0, math.nan, -1.0, -2.0]))
    first, last = AtBest({100: 2.0, 101: 3.0}), AtBest({100: 3.0, 101: 5.0})
    assert change_of_needed(first, last, 2).best == {100: 0.5, 101: 1.0}
    assert change_of_needed(first, AtBest({100: 3.0, 101: math.inf}), 2) is None


@pytest.mark.slow
def test_prefixes_are_the_first_part_of_a_curve_and_end_where_the_task_is_over(rank_answer):
    """The planted loss falls by GAIN a doubling: by GAIN log2(1 + s) until step s."""
    table = load_runs(rank_answer / "runs")
    short = at_step(table, 32)
    assert (short["steps"] == 32).all() and len(short) == len(table)
    points = json.loads(table.iloc[0]["result"])["curve"]
    assert short.iloc[0]["test_nll"] == next(p["test_nll"] for p in points if p["step"] == 32)
    plain = table[table["init_seed"].fillna(0) == 0]
    # runs are cut where their task is over: a fifth is left near step 40
    assert while_unsolved(plain)[1] == ""
    part, said = while_unsolved(plain.assign(floor_nats=START - GAIN * math.log2(1 + 40) / 0.8))
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
