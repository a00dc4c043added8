"""The bound on the regret of the best learning rate, against planted valleys."""

import math

import numpy as np
import pytest

from analysis.optimum.fit import fit_all
from analysis.optimum.valley import linex
from tests.tables import lr_curve

STEPS = np.log(2) * np.array([-4, -2, -1, 0, 1, 2, 3])


def valley(x, best, curvature=0.1, steep=0.7):
    return curvature * float(linex(np.array(x - best), steep))


def curves(rng, noise, seeds=4):
    """Three curves with optima near the middle of the LRs, and their optima."""
    found, best = [], rng.normal(0, 0.5, 3)
    for k, m in enumerate(best):
        runs = [(x, s) for x in STEPS for s in range(seeds if abs(x) < 0.8 else 1)]
        x, seed = map(np.array, zip(*runs))
        y = np.array([2 + valley(v, m) + rng.normal(0, noise) for v in x])
        found.append(lr_curve(x - 7, y, seed, start=6.0, rank=4 * (k + 1)))
    return found, best


def test_without_noise_the_regret_is_nothing_and_without_a_fit_it_is_unknown():
    found, _ = curves(np.random.default_rng(1), noise=1e-6)
    assert all(o.regret_of_best(0.95) < 1e-3 for o in fit_all(found))
    edge = [lr_curve(c.x[c.x <= -7], c.y[c.x <= -7], c.seed[c.x <= -7], start=6.0) for c in found]
    assert {o.regret_of_best(0.95) for o in fit_all(edge)} == {None}


@pytest.mark.full
@pytest.mark.parametrize("noise, most", [(0.01, 0.004), (0.03, 0.015)])
def test_the_true_regret_lies_below_the_bound_as_often_as_stated(noise, most):
    rng, held, bounds = np.random.default_rng(2), [], []
    for _ in range(60):
        found, best = curves(rng, noise)
        for o, m in zip(fit_all(found), best):
            bound = o.regret_of_best(0.95)
            if bound is not None:
                held.append(valley(math.log(o.best_lr.value) + 7, m) <= bound)
                bounds.append(bound)
    assert np.mean(held) > 0.85 and len(held) > 120 and np.median(bounds) < most
