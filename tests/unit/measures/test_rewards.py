"""Rewards at stable learning rates, those at which few runs collapse; and ranges of good ones."""

import math

import numpy as np
import pytest

from analysis.inference.decide import GateCode
from analysis.measures.at_best import over_seeds
from analysis.measures.rewards import (
    collapsed_at_best,
    gates_on_stable,
    good_range,
    stable,
)
from tests.tables import lr_curve

X = np.log([1, 1.41, 2, 2.83, 4, 5.66])
NAN = math.nan


def curve(losses, x=X):
    """A curve of losses [LRs, seeds]; NaN where a run collapsed, None where none was made."""
    every = [(at, v, s) for at, row in zip(x, losses) for s, v in enumerate(row)]
    lrs, y, seed = (np.array(v) for v in zip(*(run for run in every if run[1] is not None)))
    return lr_curve(lrs, y, seed, start=-0.1)


def test_the_top_of_a_parabola_comes_back():
    valley = 0.1 * (X - X[2] - 0.1) ** 2 - 0.6
    shifts = np.array([-0.02, 0.0, 0.02])
    c = curve([*(valley[:, None] + shifts), [NAN] * 3], [*X, math.log(8)])
    found = stable(c)
    assert found.x == pytest.approx(X[2], abs=1e-5)
    assert found.loss.best == pytest.approx({s: -0.6 + v for s, v in enumerate(shifts)}, abs=1e-5)
    assert not gates_on_stable([c])


@pytest.mark.parametrize(
    ("seeds", "lost", "steady"),
    [(6, 0, True), (6, 1, False), (12, 1, True), (12, 2, False), (24, 2, True), (24, 3, False)],
)
def test_an_lr_is_stable_by_its_share_of_collapses_at_any_number_of_seeds(seeds, lost, steady):
    losses = [[v] * seeds for v in (-0.4, -0.5, -0.6, -0.3)]
    losses[2][:lost] = [NAN] * lost
    c = curve(losses, X[:4])
    assert stable(c).x == pytest.approx(X[2 if steady else 1], abs=1e-5)
    assert collapsed_at_best(c) == ((lost, seeds) if steady else (0, seeds))


def test_the_interval_covers_the_choice_of_the_lr():
    """One seed decides whether the best LR is stable: none of six collapses there, or one.

    By hand: a sample of six has the seed that collapsed with probability 1 - (5/6)^6 = 0.665, and
    then the LR is not stable. So the estimate lies 0.335 of the way to the better LR, and the seed
    that collapsed moves it by far more than the others, which are all equal.
    """
    losses = [[-0.3] * 6, [-0.4] * 6, [-0.6] * 6]
    losses[2][3] = NAN
    whole = [*losses[:2], [-0.6] * 6]
    without, with_it = (over_seeds(stable(curve(whole[:k], X[:k])).loss).value for k in (2, 3))
    found = stable(curve(losses, X[:3]))
    share = (over_seeds(found.loss).value - without) / (with_it - without)
    assert share == pytest.approx((5 / 6) ** 6, abs=0.03)
    away = {s: abs(v - over_seeds(found.loss).value) for s, v in found.loss.best.items()}
    assert away[3] > 3 * max(v for s, v in away.items() if s != 3) > 0
    lrs, times = np.unique(found.draws.round(4), return_counts=True)
    assert (lrs == X[1:3].round(4)).all()
    assert times / times.sum() == pytest.approx([1 - (5 / 6) ** 6, (5 / 6) ** 6], abs=0.12)


def test_only_lrs_of_all_seeds_count():
    c = curve([[-0.4] * 3, [-0.5] * 3, [-0.9, None, None], [NAN] * 3], X[:4])
    assert stable(c).x == pytest.approx(X[1], abs=1e-5)
    assert stable(curve([[NAN] * 3, [-0.9, None, None]], X[:2])) is None
    # One that spoils every run does not bend the parabola.
    losses = [[-0.3] * 4, [-0.5] * 4, [-0.52] * 4, [-0.5] * 4, [-0.12] * 4]
    spoiled, rest = stable(curve(losses, X[:5])), stable(curve(losses[:4], X[:4]))
    assert over_seeds(spoiled.loss).value == pytest.approx(over_seeds(rest.loss).value, abs=1e-9)


def test_a_best_lr_at_the_edge_of_those_tried_is_gated():
    for best in (0, 3):
        losses = [[-0.4 - 0.1 * abs(k - (3 - best))] * 3 for k in range(4)]
        (gate,) = gates_on_stable([curve(losses, X[:4])])
        assert gate.code == GateCode.FLAGGED and gate.flags == ("at_edge",)
        (gate,) = gates_on_stable([curve([row[:2] for row in losses], X[:4])])
        assert gate.code == GateCode.FEW_SEEDS
    # at the end of those with all seeds it is compared with the next, where two of five seeds ran
    for a, b, gated in (
        *((-0.7, -0.7, True), (-0.5, -0.5, False), (NAN, -0.7, False)),
        *((NAN, NAN, False), (None, None, True)),
    ):
        losses = [[-0.4] * 5, [-0.5] * 5, [-0.6] * 5, [a, b, None, None, None]]
        assert bool(gates_on_stable([curve(losses, X[:4])])) == gated


RISING = 0.05 * (X[-1] - X)
ARMS = {
    "plateau": (np.array([0.05, 0.01, 0, 0, 0, 0]), [0] * 6),
    "peak": (0.04 * (X - X[3]) ** 2, [0] * 6),
    "far": (RISING, [0, 0, 0, 0.02, 0.3, 0.9]),
    "near": (RISING, [0, 0, 0.04, 0.08, 0.4, 0.95]),
    "early": (RISING, [0, 0.04, 0.08, 0.2, 0.5, 1]),
}
"""By LR: loss above the lowest one, and the probability of a collapse (at most 0.1: stable)."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other", "counts"),
    [("plateau", "peak", [6]), *((one, "near", [6, 24]) for one in ("far", "early"))],
)
def test_the_interval_of_a_difference_covers_and_more_seeds_hardly_move_it(one, other, counts):
    """With what the seeds share and what they do not, as large as in real runs."""
    rng, means, covered = np.random.default_rng(1), [], []

    def drawn(name, n, shared):
        valley, lost = ARMS[name]
        losses = -0.55 + valley[:, None] + shared + rng.normal(0, 0.045, (6, n))
        gone = rng.random((6, n)) < np.array(lost)[:, None]
        return stable(curve(np.where(gone, NAN, losses))).loss

    best, its_best = (h[np.array(lost) <= 0.1].min() for h, lost in (ARMS[one], ARMS[other]))
    for n in counts:
        found = []
        for _ in range(150):
            shared = rng.normal(0, 0.04, n)
            mine, its = (drawn(name, n, shared) for name in (one, other))
            found.append(over_seeds(mine.paired(its, lambda a, b: a - b)))
        means.append(np.mean([e.value for e in found]))
        covered.append(np.mean([e.low <= best - its_best <= e.high for e in found]))
    assert max(means) - min(means) < 0.01 and min(covered) > 0.87, (means, covered)
    assert "near" in (one, other) or abs(means[0] - best + its_best) < 0.012


def test_the_range_of_good_lrs_ends_between_lrs_or_is_open():
    for reward, *wanted in (
        # .53 is crossed a quarter of the way from 1 to 0, and half of the way from 2 to 3
        ([0.50, 0.54, 0.55, 0.51, 0.20], 0.75, 2.5, False),
        ([0.50, 0.54, 0.55], 0.75, 2.0, True),
        ([0.0, 0.5, 0.0, 0.0, 0.5], 0.96, 1.04, False),  # one range, around the best LR
    ):
        found = good_range(np.arange(len(reward)) * 1.0, np.array(reward))
        assert [*found] == pytest.approx(wanted)
