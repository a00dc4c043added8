"""Gates: each code's sentence, what opens it, and which of them no run of the grid opens."""

import json
from types import SimpleNamespace

import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate
from analysis.inference.gates import REMEDIES, Gate, GateCode, gate_of, remedy
from analysis.measures.next_runs import suggest
from analysis.optimum.fit import fit_all
from analysis.runs.lr_curves import lr_curves
from tests.tables import table

SEEDS = "about 33 seeds at each optimum (now 3)"
BY_SEEDS = (
    *(GateCode.FEW_SEEDS, GateCode.FEW_SEEDS_AT_BEST, GateCode.FEW_SEEDS_AT_RECIPE),
    *(GateCode.FEW_SEEDS_AS_GOOD, GateCode.RECIPE_OUTSIDE, GateCode.ONLY_A_BOUND),
    *(GateCode.ONLY_BOUNDS, GateCode.BY_TASK),
)
"""Codes that more seeds open; all others name another remedy."""
FLAGS = [
    (("few_points", "at_edge"), REMEDIES["at_edge"]),
    (("at_edge", "bounded_by_divergence"), REMEDIES["bounded_by_divergence"]),
    (("no_variance", "few_points"), REMEDIES["few_points"]),
    (("no_usable_points", "no_variance"), REMEDIES["no_variance"]),
    (("no_usable_points",), REMEDIES["no_usable_points"]),
    (("flat",), SEEDS),
]
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
    by_seeds = code in (*BY_SEEDS, GateCode.FLAGGED, GateCode.RECIPE_BY_A_CLIFF)
    assert verdict.needed == (SEEDS if by_seeds else REMEDIES[code])
    (written,) = json.loads(json.dumps(verdict.plain()))["gates"]
    assert written["code"] == code.name and gate_of(written) == gate


@pytest.mark.parametrize(("flags", "needed"), FLAGS)
def test_the_remedy_follows_from_the_flags_of_an_optimum(flags, needed):
    verdict = judged(Gate(GateCode.FLAGGED, place="fullft: ", flags=flags))
    assert verdict.why == f"fullft: {', '.join(flags)}" and verdict.needed == needed


def test_of_many_gates_the_one_that_more_runs_do_not_open_counts_first():
    edge = Gate(GateCode.FLAGGED, place="fullft: ", flags=("at_edge",))
    solved, rank = Gate(GateCode.TASK, "nearly solved"), Gate(GateCode.ONE_RANK)
    verdict = judged(edge, rank, solved)
    assert verdict.why == "; ".join(g.sentence for g in (edge, rank, solved))
    assert verdict.needed == remedy([solved]) and verdict.gates == (edge, rank, solved)


@pytest.mark.parametrize("code", GateCode, ids=lambda code: code.name)
def test_runs_are_suggested_unless_no_run_of_the_grid_opens_the_gate(code):
    optima = fit_all(lr_curves(table(lambda lr, s: 1 + 0.1 * (lr / 8e-4 - 1) ** 2)))
    gate = Gate(code, "no curve of it; task: words decide nothing")
    found = SimpleNamespace(verdicts=[judged(gate)], members={"g": optima}, of_rates=False)
    hopeless = code in (GateCode.TASK, GateCode.BY_TASK, GateCode.MISSING, GateCode.WITHDRAWN)
    assert bool(suggest(found)) != hopeless
