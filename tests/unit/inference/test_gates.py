"""Gates: each code's sentence, what opens it, and which of them no run of the grid opens."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate
from analysis.inference.gates import Gate, GateCode, gate_of, remedy
from analysis.measures.next_runs import suggest
from analysis.optimum.fit import fit_all
from analysis.runs.lr_curves import lr_curves

SEEDS = "about 33 seeds at each optimum (now 3)"
MORE_RATES = "learning rates between the best one and the first that breaks down"
GATES = [
    (
        Gate(GateCode.FLAGGED, place="lora r8: ", flags=("few_points", "at_edge")),
        "lora r8: few_points, at_edge",
        "learning rates beyond the edge",
    ),
    (
        Gate(GateCode.FLAGGED, place="fullft: ", flags=("at_edge", "bounded_by_divergence")),
        "fullft: at_edge, bounded_by_divergence",
        MORE_RATES,
    ),
    (
        Gate(GateCode.FLAGGED, flags=("no_variance", "few_points")),
        "no_variance, few_points",
        "more learning rates",
    ),
    (
        Gate(GateCode.FLAGGED, flags=("no_usable_points", "no_variance")),
        "no_usable_points, no_variance",
        "more seeds or learning rates, to know the noise",
    ),
    (
        Gate(GateCode.FLAGGED, flags=("no_usable_points",)),
        "no_usable_points",
        "lower learning rates",
    ),
    (Gate(GateCode.FLAGGED, flags=("flat",)), "flat", SEEDS),
    (
        Gate(GateCode.FEW_SEEDS, 2, "512 facts x 100: "),
        "512 facts x 100: 2 seed(s), 3 needed",
        SEEDS,
    ),
    (
        Gate(GateCode.FEW_SEEDS_AT_BEST, 1, "fullft: ").at("batch 4, "),
        "batch 4, fullft: 1 seed(s) at the optimum, 3 needed",
        SEEDS,
    ),
    (Gate(GateCode.FEW_SEEDS_AT_RECIPE, 2), "2 seed(s) at the recipe's rate, 3 needed", SEEDS),
    (Gate(GateCode.FEW_SEEDS_AS_GOOD, "2 of 3"), "2 of 3 seed(s) with such a rate", SEEDS),
    (Gate(GateCode.RECIPE_OUTSIDE), "the recipe's rate lies outside the rates tried", SEEDS),
    (
        Gate(GateCode.RECIPE_BY_A_CLIFF, flags=("bounded_by_divergence",)),
        "bounded_by_divergence: the recipe's rate lies beside one that broke down",
        MORE_RATES,
    ),
    (
        Gate(GateCode.ONLY_A_BOUND, place="batch 4, rank 8: "),
        "batch 4, rank 8: full fine-tuning does not reach LoRA's loss, only a bound",
        SEEDS,
    ),
    (
        Gate(GateCode.ONLY_BOUNDS),
        "full fine-tuning or a layer set is there at its first evaluation: only bounds",
        SEEDS,
    ),
    (
        Gate(GateCode.NOT_REACHED),
        "LoRA does not reach the loss within its run",
        "longer runs, or higher ranks",
    ),
    (
        Gate(GateCode.NOT_CONVERGED, "1000 exposures still add 19% to 300"),
        "not converged: 1000 exposures still add 19% to 300",
        "more exposures of each fact",
    ),
    (
        Gate(GateCode.BUSY, "2.7"),
        "seconds of one arm differ by a factor 2.7: the machine did other work",
        "the same runs on a quiet machine",
    ),
    (
        Gate(GateCode.TASK, "nearly solved"),
        "task: nearly solved",
        "another task or model: more runs cannot help",
    ),
    (
        Gate(GateCode.BY_TASK, "REFUTED on 1, SUPPORTED on 2"),
        "by task: REFUTED on 1, SUPPORTED on 2",
        SEEDS,
    ),
    (Gate(GateCode.MISSING, "fullft"), "no curve of fullft", "the missing arm"),
    (Gate(GateCode.ONE_RANK), "one rank only", "another rank"),
    (
        Gate(GateCode.NOISY, "3.6%"),
        "the gap's standard error is 3.6% of the gain; at most 1.25% is judged",
        "more seeds, or more held-out rows",
    ),
    (
        Gate(GateCode.NO_CELL),
        "no cell that the claim is about was run",
        "the cells that the claim is about",
    ),
    (
        Gate(GateCode.NO_GAP),
        "LoRA is not behind here, so there is no gap to grow or shrink",
        "a cell in which LoRA is behind",
    ),
    (
        Gate(GateCode.NO_LAW),
        "too few cells whose needed rank lies inside the ranks tried",
        "more cells, or ranks on both sides of the one that is needed",
    ),
    (
        Gate(GateCode.NO_ADVANTAGE),
        "LoRA is not better here, so there is no advantage to place",
        "a cell in which LoRA is better",
    ),
    (
        Gate(GateCode.WITHDRAWN, "an arm is missing"),
        "withdrawn: an arm is missing",
        "other runs: the reason says which",
    ),
    (
        Gate(GateCode.NO_ORDER, "1, 2"),
        "rank(s) 1, 2 have left at the first evaluation: their order is not resolved",
        "a base that learns more slowly, or ranks nearer to full fine-tuning",
    ),
]
CLAIM = {"margin": [9.0, 11.0], "expected": 10}
INSIDE = Estimate(10.0, 8.0, 12.0)
"""Its interval is twice as wide as the margin allows: with 33 seeds it fits in 80% of cases."""


def judged(*gates):
    return judge("c", CLAIM, "g", INSIDE, gates, 3, log=False)


@pytest.mark.parametrize(
    ("gate", "sentence", "needed"), GATES, ids=[g.code.name for g, _, _ in GATES]
)
def test_every_gate_forbids_a_verdict_and_names_what_opens_it(gate, sentence, needed):
    verdict = judged(gate)
    assert (verdict.outcome, verdict.why) == ("UNDECIDED", sentence)
    assert verdict.needed == needed
    (written,) = json.loads(json.dumps(verdict.plain()))["gates"]
    assert written["code"] == gate.code.name and gate_of(written) == gate


def test_every_code_has_a_sentence_here():
    assert {gate.code for gate, _, _ in GATES} == set(GateCode)


def test_of_many_gates_the_one_that_more_runs_do_not_open_counts_first():
    edge = Gate(GateCode.FLAGGED, place="fullft: ", flags=("at_edge",))
    solved, rank = Gate(GateCode.TASK, "nearly solved"), Gate(GateCode.ONE_RANK)
    verdict = judged(edge, rank, solved)
    assert verdict.why == "fullft: at_edge; one rank only; task: nearly solved"
    assert verdict.needed == remedy([solved]) and verdict.gates == (edge, rank, solved)


@pytest.mark.parametrize("code", GateCode, ids=lambda code: code.name)
def test_runs_are_suggested_unless_no_run_of_the_grid_opens_the_gate(code):
    rows = [
        {
            "model": "m",
            "dataset": "d",
            "method": "lora",
            "rank": 4,
            "lr": lr,
            "seed": 0,
            "status": "done",
            "test_nll": 1 + 0.1 * np.log(lr / 8e-4) ** 2,
            "nll_start": 5.0,
        }
        for lr in 1e-4 * 2.0 ** np.arange(7)
    ]
    found = SimpleNamespace(
        verdicts=[judged(Gate(code, "no curve of it; task: words decide nothing"))],
        members={"g": fit_all(lr_curves(pd.DataFrame(rows)))},
        of_rates=False,
    )
    hopeless = code in (GateCode.TASK, GateCode.BY_TASK, GateCode.MISSING, GateCode.WITHDRAWN)
    assert bool(suggest(found)) != hopeless
