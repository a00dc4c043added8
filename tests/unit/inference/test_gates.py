"""Gates: each code's sentence, what opens it, and the runs that are suggested for a claim."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.inference.decide import REMEDIES, Gate, GateCode, gate_of, judge, remedy
from analysis.inference.estimate import Estimate, from_sample
from analysis.measures.next_runs import suggest
from analysis.optimum.fit import fit_all
from analysis.runs.lr_curves import lr_curves
from tests.tables import GRID, table

SEEDS = "about 33 seeds at each optimum (now 3)"
BY_SEEDS = {
    *("FEW_SEEDS", "FEW_SEEDS_AT_BEST", "FEW_SEEDS_AT_RECIPE", "FEW_SEEDS_OF_BOTH", "FLAGGED"),
    *("FEW_SEEDS_AS_GOOD", "RECIPE_OUTSIDE", "RECIPE_BY_A_CLIFF", "ONLY_A_BOUND", "ONLY_BOUNDS"),
    "BY_TASK",
}
"""Codes that more seeds open; all others name another remedy."""
CLAIM = {"margin": [9.0, 11.0], "expected": 10}
INSIDE = Estimate(10.0, 8.0, 12.0)
"""Its interval is twice as wide as the margin allows: with 33 seeds it fits in 80% of cases."""


def judged(*gates):
    return judge("c", CLAIM, "g", INSIDE, gates, 3, log=False)


@pytest.mark.parametrize("code", GateCode, ids=lambda code: code.name)
def test_every_gate_forbids_a_verdict_and_names_what_opens_it(code):
    flags = ("flat", "other") if "{1}" in code else ()
    gate = Gate(code, "7 of 9", "lora r8: ", flags).at("batch 4, ")
    verdict = judged(gate)
    assert verdict.outcome == "UNDECIDED" and verdict.why.startswith("batch 4, lora r8: ")
    assert ("7 of 9" in verdict.why) == ("{0}" in code)
    assert ("flat, other" in verdict.why) == ("{1}" in code)
    assert verdict.needed == (SEEDS if code.name in BY_SEEDS else REMEDIES[code])
    (written,) = json.loads(json.dumps(verdict.plain()))["gates"]
    assert written["code"] == code.name and gate_of(written) == gate


def test_the_remedy_follows_from_the_flags_and_from_what_more_runs_do_not_open():
    for flags, first in (
        (("few_points", "at_edge"), "at_edge"),
        (("at_edge", "bounded_by_divergence"), "bounded_by_divergence"),
        (("no_usable_points", "no_variance"), "no_variance"),
        (("flat",), None),
    ):
        verdict = judged(Gate(GateCode.FLAGGED, place="fullft: ", flags=flags))
        assert verdict.why == f"fullft: {', '.join(flags)}"
        assert verdict.needed == (REMEDIES[first] if first else SEEDS)
    edge = Gate(GateCode.FLAGGED, place="fullft: ", flags=("at_edge",))
    solved, rank = Gate(GateCode.TASK, "nearly solved"), Gate(GateCode.ONE_RANK)
    verdict = judged(edge, rank, solved)
    assert verdict.why == "; ".join(g.sentence for g in (edge, rank, solved))
    assert verdict.needed == remedy([solved]) and verdict.gates == (edge, rank, solved)


@pytest.fixture(scope="module")
def asked():
    """Runs that are suggested for a verdict, from a curve with three seeds at every rate."""
    rng = np.random.default_rng(0)

    def loss(lr, seed):
        return 2 + 0.1 * math.log(lr / 8e-4) ** 2 + 1e-3 * rng.standard_normal()

    optima = {"g": fit_all(lr_curves(table(loss, seeds=(0, 1, 2))))}

    def suggested(verdict, of_rates=False):
        return suggest(SimpleNamespace(verdicts=[verdict], members=optima, of_rates=of_rates))

    return suggested


def test_as_many_seeds_are_suggested_as_the_claim_lacks(asked):
    over_seeds = from_sample([0.75, 0.82, 0.9], log=True)
    verdict = judge("c", {"expected": 1, "margin": [0.95, 1.2]}, "g", over_seeds, [], 3, True)
    assert verdict.outcome == "UNDECIDED" and 1 <= verdict.missing <= 5
    for of_rates in (False, True):  # an interval over seeds has no use for more rates
        wanted = asked(verdict, of_rates)
        assert len(wanted) == 3 and {len(s.seeds) for s in wanted} == {verdict.missing}
        assert {s.lr for s in wanted} <= {float(f"{lr:.2e}") for lr in GRID}


def test_runs_are_suggested_unless_no_run_of_the_grid_opens_the_gate(asked):
    hopeless = {"TASK", "BY_TASK", "MISSING", "WITHDRAWN"}
    gates = [Gate(code, "no curve of it; task: words decide nothing") for code in GateCode]
    assert {g.code.name for g in gates if not asked(judged(g))} == hopeless
