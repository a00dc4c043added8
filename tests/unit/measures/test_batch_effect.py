"""The batch effect on planted ln(rho): b comes back whatever f(updates) is, and its interval covers."""

import math

import numpy as np
import pytest

from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.batch_effect import Prefix, difference, effect, within

LENGTHS = {4: (8, 512), 16: (8, 256), 64: (8, 64), 256: (8, 16)}  # as in the shipped sweep
STEPS = [s for k in range(3, 10) for s in (2**k, 3 * 2 ** (k - 1))]
GRID = [(b, s) for b, (first, last) in LENGTHS.items() for s in STEPS if first <= s <= last]


def planted(b, rng, seeds=6, rank=16, common=None):
    """ln(rho) that falls steeply with updates; noise of a batch and seed is shared by its prefixes."""
    logs = {key: {} for key in GRID}
    for seed in range(seeds):
        whole = rng.normal(0, 0.1) if common is None else common[seed]
        own = {batch: rng.normal(0, 0.03) for batch in LENGTHS}
        for batch, steps in GRID:
            falls = -0.5 * math.log2(steps) + 0.02 * math.log2(steps) ** 2
            noise = own[batch] + rng.normal(0, 0.02)
            logs[batch, steps][seed] = whole + falls + b * math.log2(batch) + noise
    return [Prefix(batch, steps, rank, None, None, AtBest(v)) for (batch, steps), v in logs.items()]


@pytest.mark.parametrize("b", [0.0, -0.1])
def test_the_interval_over_six_seeds_covers_the_planted_effect(b):
    rng = np.random.default_rng(1)
    found = [over_seeds(effect(planted(b, rng))) for _ in range(1000)]
    covered = np.mean([e.low <= b <= e.high for e in found])
    assert 0.93 <= covered <= 0.97
    assert np.mean([e.value for e in found]) == pytest.approx(b, abs=1e-3)


def test_the_difference_of_two_ranks_is_paired_by_seed():
    rng = np.random.default_rng(3)
    common = rng.normal(0, 5, 6)  # cancels: seeds are blocks
    high, low = planted(-0.1, rng, common=common), planted(-0.02, rng, rank=1, common=common)
    e = difference(high, low)
    assert e.low < -0.08 < e.high and e.high - e.low < 0.08


def test_infinite_and_missing_values_and_lonely_prefixes_count_for_nothing():
    def prefix(batch, steps, logs):
        return Prefix(batch, steps, 4, None, None, AtBest(logs))

    grid = [
        prefix(4, 8, {0: 0.0, 1: 1.0}),
        prefix(16, 8, {0: -0.4, 1: 0.6}),
        prefix(4, 16, {0: -math.inf, 1: 0.3}),
        prefix(16, 16, {0: 7.0}),
        prefix(4, 512, {0: -9.0, 1: -9.0}),
    ]
    assert effect(grid).best == pytest.approx({0: -0.2, 1: -0.2})
    assert within([1, 2], np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
