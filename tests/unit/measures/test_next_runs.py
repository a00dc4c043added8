"""Runs that are suggested for a claim whose interval is over seeds, or over something else."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import from_draws
from analysis.inference.seeds import from_sample
from analysis.inference.spread import Spread
from analysis.measures.next_runs import suggest
from analysis.optimum.fit import fit_all
from analysis.runs.lr_curves import lr_curves
from tests.tables import GRID, table

CLAIM = {"estimand": "rho", "expected": 1, "margin": [0.9, 1.11]}


@pytest.fixture(scope="module")
def optimum():
    """One curve with three seeds at every rate and a sure optimum."""
    rng = np.random.default_rng(0)

    def loss(lr, seed):
        return 2 + 0.1 * math.log(lr / 8e-4) ** 2 + 1e-3 * rng.standard_normal()

    (found,) = fit_all(lr_curves(table(loss, seeds=(0, 1, 2))))
    return found


def asked(optimum, verdict, of_rates=False):
    found = SimpleNamespace(verdicts=[verdict], members={"g": [optimum]}, of_rates=of_rates)
    return suggest(found)


def test_as_many_seeds_are_suggested_as_the_claim_lacks(optimum):
    over_seeds = from_sample([0.75, 0.82, 0.9], log=True)
    verdict = judge("c", {**CLAIM, "margin": [0.95, 1.2]}, "g", over_seeds, [], 3, True)
    assert verdict.outcome == "UNDECIDED" and 1 <= verdict.missing <= 5
    for of_rates in (False, True):  # an interval over seeds has no use for more rates
        wanted = asked(optimum, verdict, of_rates)
        assert len(wanted) == 3 and {len(s.seeds) for s in wanted} == {verdict.missing}
        assert {s.lr for s in wanted} <= {float(f"{lr:.2e}") for lr in GRID}


def test_no_run_of_the_grid_adds_layer_sets(optimum):
    draws = 1 + 0.2 * np.random.default_rng(1).standard_normal(4000)
    estimate = from_draws(draws, 12, spread=Spread(12, "layer sets"))
    verdict = judge("c", CLAIM, "g", estimate, [], 3, False)
    assert "layer sets" in verdict.needed and asked(optimum, verdict) == []
