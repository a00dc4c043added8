"""The best reward of the rates at which no run collapses."""

import math

import numpy as np
import pytest

from analysis.inference.gates import GateCode
from analysis.measures.at_best import over_seeds
from analysis.questions.rl.stable import gates_on_stable, stable
from analysis.runs.lr_curves import LrCurve

X = np.log([1, 1.41, 2, 2.83, 4, 5.66])
NAN = math.nan


def curve(losses, x=X):
    """A curve of losses [rates, seeds]; NaN where a run collapsed, None where none was made."""
    made = [
        (at, NAN if v is None else v, s)
        for at, row in zip(x, losses)
        for s, v in enumerate(row)
        if v is not None
    ]
    rates, y, seed = (np.array(v) for v in zip(*made))
    key = {"model": "m", "dataset": "d", "method": "lora", "rank": 1.0}
    seed = seed.astype(int)
    return LrCurve(key, rates, y, seed, seed, np.isfinite(y), -0.1, NAN)


def test_the_top_of_a_parabola_comes_back():
    valley = 0.1 * (X - X[2] - 0.1) ** 2 - 0.6
    shifts = np.array([-0.02, 0.0, 0.02])
    c = curve([*(valley[:, None] + shifts), [NAN] * 3], [*X, math.log(8)])
    found = stable(c)
    assert found.rate == pytest.approx(X[2], abs=1e-5)
    assert found.loss.best == pytest.approx({s: -0.6 + v for s, v in enumerate(shifts)}, abs=1e-5)
    assert not gates_on_stable([c])


def test_where_rewards_rise_up_to_the_cliff_the_last_stable_rate_counts():
    rising = -0.5 - 0.1 * X
    losses = [[v] * 3 for v in rising]
    losses[-1][2] = NAN  # one seed of three collapses at the highest rate
    c = curve(losses)
    assert stable(c).rate == pytest.approx(X[-2], abs=1e-5)
    assert over_seeds(stable(c).loss).value == pytest.approx(rising[-2], abs=1e-6)
    assert not gates_on_stable([c])


def test_only_rates_of_all_seeds_count():
    c = curve([[-0.4] * 3, [-0.5] * 3, [-0.9, None, None], [NAN] * 3], X[:4])
    assert stable(c).rate == pytest.approx(X[1], abs=1e-5)
    assert stable(curve([[NAN] * 3, [-0.9, None, None]], X[:2])) is None


@pytest.mark.parametrize("best", [0, 3])
def test_a_best_rate_at_the_edge_of_those_tried_is_said(best):
    losses = [[-0.4 - 0.1 * abs(k - (3 - best))] * 3 for k in range(4)]
    (gate,) = gates_on_stable([curve(losses, X[:4])])
    assert gate.code == GateCode.FLAGGED and gate.flags == ("at_edge",)
    (gate,) = gates_on_stable([curve([row[:2] for row in losses], X[:4])])
    assert gate.code == GateCode.FEW_SEEDS


SHAPES = {
    "plateau": np.array([0.05, 0.01, 0, 0, 0, 0]),
    "peak": 0.04 * (X - X[3]) ** 2,
    "to the cliff": 0.08 * (X[-1] - X),
}


@pytest.mark.parametrize("other", ["plateau", "peak"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_of_a_difference_covers_the_truth(shape, other):
    """Six seeds, with what the seeds share and what they do not, as large as in real runs."""
    rng, inside, off = np.random.default_rng(0), 0, []

    def drawn(name):
        shared, own = rng.normal(0, 0.04, 6), rng.normal(0, 0.045, (6, 6))
        return stable(curve(-0.55 + SHAPES[name][:, None] + shared + own)).loss

    for _ in range(300):
        e = over_seeds(drawn(shape).paired(drawn(other), lambda a, b: a - b))
        inside += e.low <= 0 <= e.high
        off.append(e.value)
    assert inside / 300 > 0.91 and abs(np.mean(off)) < 0.012
