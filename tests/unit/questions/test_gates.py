"""Every gate on a planted table that has its reason and no other one: which gates a claim gets."""

import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import GateCode
from analysis.questions.registry import analyse
from analysis.runs.table import read
from lorasweep.cli.answer import KEPT
from lorasweep.methods.lora import LoRA
from tests import planted
from tests.planted import Valley, World, arms, facts, is_full, layers, lost, rewarded, smoke

pytestmark = pytest.mark.slow  # fits dozens of curves
ASKED = {
    "drift": {"estimand": "lr_drift_per_doubling", "expected": 0, "margin": [-0.1, 0.1]},
    "ten_times_wide": {"estimand": "ten_times_regret", "expected": 0, "margin": [-20, 20]},
}
"""Claims that are not kept."""
NEW = {"rule_shift": 0.25, "shift_rank": 2, "new_exceptions": 0.0}
ON_TWO = ("tiny64", "tiny64-s1")


def ratio(valley, ranks=(4, 8), full=1.2e-3, **more):
    lora = planted.FULL_BEST * valley.ratio
    return "lr_ratio", valley, arms(smoke(), ranks, full, lora, steps=8, **more)


def even(spec):
    """Attention is slower on tiny64, and faster on another base."""
    of_attention = 0.5 if spec.model.name == "tiny64" else 0.9
    return {"attention": of_attention, "mlp": 0.8, "attention+mlp": 0.8}


def ranks(world, of=(1, 4), *more):
    return "rank", world, planted.rank_runs(of, *more)


def costs(world):
    return "compute", world, arms(smoke(), (1,), steps=384)


def recipes(default=2e-4, unlucky=0.0):
    """`unlucky`: what full fine-tuning learns less than LoRA with all seeds but one."""
    found, method = arms(smoke(), (8,), steps=96), LoRA(rank=8, layers="attention+mlp")
    found += planted.runs(smoke(), method, planted.around(default), steps=96)
    retained = {"retain_nll": 2.2, "retain_start": 2.0}
    world = lost(lambda s, t: unlucky * (is_full(s) and s.seed > 0), more=lambda s: retained)
    return "recipes", world, found


def two_batches(rho, off=1.0):
    """`off`: the optima of one batch are not bracketed; what the other says is not enough."""

    def best(spec, step):
        optimum = planted.FULL if is_full(spec) else planted.LORA
        return optimum * (off if spec.batch_size == 16 else 1)

    return "batch_size", World(rho, best), planted.batches((4,), {4: 64, 16: 32})


def novel(gap=0.0, noise=0.0, steps=256, ranks=(1, 8)):
    """LoRA is `gap` of the gain behind; the losses of full fine-tuning vary."""

    def also(spec, step):
        return np.random.default_rng(int(spec.id, 16)).normal(0, noise) * is_full(spec)

    specs = arms(planted.base(**NEW), ranks, steps=steps, batch_size=4)
    return "regime", planted.Gaps(lambda r, s, e: gap, also=also), specs


def climbs(spec, step):
    return 0.1 + 0.06 * math.log2(1 + step)


def judged(sweep, world, specs, claims=None, kept=None, **question):
    """The gates of each claim's verdicts, without their subjects; each as text."""
    table = specs if isinstance(specs, pd.DataFrame) else planted.planted_table(world, specs)
    found = {}
    for v in analyse(table, planted.kept_question(sweep, claims) | question, kept).verdicts:
        assert v.outcome == "UNDECIDED" or not v.gates or v.gates[0].code == GateCode.BY_TASK
        found.setdefault(v.claim, []).append(", ".join(f"{g.place}{g.code.name}" for g in v.gates))
    return found


def stops(of):
    """The loss of some arms stays where it is from 3/8 of the updates on."""

    def also(spec, step):
        last = 3 * spec.steps // 8
        return planted.GAIN * math.log2((1 + step) / (1 + min(step, last))) * of(spec)

    return also


def some_conditions(scale):
    table = read(KEPT / f"rate_law-{scale}" / "table.parquet")
    return "rate_law", None, table[table["alpha"].isin([math.nan, 2, 8])].reset_index(drop=True)


def mlp_at_edge(spec, step):
    best = planted.FULL if is_full(spec) else planted.LORA
    return best * (40 if not is_full(spec) and spec.method.layers == "mlp" else 1)


BUSY = World(lambda s: 1.0, more=lambda s: {"step_s": 0.1 * (1 + s.seed % 2)})
"""Every second run takes twice as long."""
NEAR_ONE = {"attention": 7, "mlp": 4, "attention+mlp": 4}
"""Attention has 87% of the parameters of the MLP."""


def at_once(spec, step):
    """Full fine-tuning is far below the start at its first evaluation."""
    return -0.8 * is_full(spec)


def case(claim, gates, make, *args, **more):
    return pytest.param(claim, gates, partial(make, *args, **more), id=f"{claim}: {gates}")


BEST, OF_BOTH = "FEW_SEEDS_AT_BEST", "FEW_SEEDS_OF_BOTH"
EDGES = "fullft: FLAGGED, lora r1: FLAGGED"
ONE = f"fullft: FLAGGED, fullft: {BEST}, lora r4: FLAGGED, lora r4: {BEST}, FEW_SEEDS_AT_RECIPE"
TWO = f"fullft: {BEST}, lora r8: {BEST}, all rates: FEW_SEEDS"
BOUNDS = "batch 4, rank 4: ONLY_A_BOUND, batch 16, rank 4: ONLY_A_BOUND"
AT_EDGE = "batch 4, MISSING, batch 16, fullft: FLAGGED, batch 16, lora r4: FLAGGED"
RANGE = "fullft: FLAGGED, lora r8: FLAGGED, range of good rates: FLAGGED"
CASES = [
    case("ratio", "fullft: FLAGGED", ratio, Valley(3), full=4e-5),
    case("ratio", "fullft: FLAGGED, lora r4: FLAGGED", ratio, Valley(3, cliff=0.9), (4,)),
    case("ratio", f"fullft: {BEST}, lora r4: {BEST}", ratio, Valley(3), (4,), seeds=range(2)),
    case("ten_times", ONE, ratio, Valley(10), (4,), seeds=(0,)),
    case("ten_times_wide", "RECIPE_BY_A_CLIFF", ratio, Valley(4, cliff=3.0), (4,)),
    case("ten_times", "", ratio, Valley(4, cliff=3.0), (4,)),
    case("drift", "ONE_RANK", ratio, Valley(3), (4,)),
    case("attention_worse", "ONLY_BOUNDS", layers, even, also=at_once),
    case("attention_worse", "TASK", layers, even, also=stops(is_full)),
    case("attention_worse", "", layers, even, also=stops(lambda s: not is_full(s))),
    case("attention_worse", "lora r4: FLAGGED", layers, even, best=mlp_at_edge),
    case("attention_loses", f"{OF_BOTH}, NOISY, lora r4: FLAGGED", layers, even, best=mlp_at_edge),
    case("attention_worse", "MISSING", layers, even, of=NEAR_ONE),
    case("attention_everywhere", "BY_TASK", layers, even, ON_TWO),
    case("parity", "TASK", ranks, lost(stops(lambda s: planted.rank_of(s) == 8)), (1, 8), 64),
    case("start", "NOT_APART", ranks, lost(lambda s, t: 0.0), (1, 4), 32),
    case("start", "FEW_SEEDS, NOT_APART", ranks, World(lambda s: 0.3), (1, 4), 32, range(2)),
    case("order", "NO_ORDER", ranks, World(lambda s: 0.05 * s.method.rank), (1, 4), 384),
    case("faster", "ONE_RANK", ranks, World(), (4,), 64),
    case("faster", "ONLY_BOUNDS", ranks, lost(at_once), (1, 4), 64),
    case("flops_to_loss", "NOT_REACHED", costs, World(lambda s: 0.1)),
    case("seconds_a_step", "BUSY", costs, BUSY),
    case("two_bits", "NOT_CONVERGED", facts, lambda n: n / 400),
    case("one_bit_at_100", "512 facts x 100: FEW_SEEDS", facts, lambda n: 1.0, seeds=range(2)),
    case("two_bits", "512 facts x 100: FLAGGED", facts, lambda n: 1.0, 2),
    case("two_bits", "TASK", facts, lambda n: 1.0, most=0.8),
    case("default_rate", "RECIPE_OUTSIDE", recipes, 8e-2),
    case("original", "MISSING", recipes),
    case("retention_equal", "FEW_SEEDS_AS_GOOD", recipes, unlucky=0.5),
    case("penalty", BOUNDS, two_batches, lambda s: 1e3),
    case("penalty", AT_EDGE, two_batches, lambda s: 0.5, 0.1),
    case("small_best", "MISSING", two_batches, lambda s: 0.5),
    case("low", "NOISY", novel, noise=0.016, steps=32),
    case("growth", "NO_GAP", novel, -0.05),
    case("unchanged", "NO_ADVANTAGE", novel, steps=32),
    case("needs_longer", "NO_LAW", novel, steps=32),
    case("low", "MISSING", novel, ranks=(1, 4), steps=32),
    case("real", "NO_CELL", novel, steps=32),
    case("rank_1", "TASK", rewarded, lambda s, t: 0.95),
    case("rank_1", "TASK", rewarded, climbs, start=0.01),
    case("rank_1", "fullft: FEW_SEEDS, lora r1: FEW_SEEDS", rewarded, climbs, seeds=range(2)),
    case("rank_1", EDGES, rewarded, climbs, lrs=2),
    case("progress", EDGES, rewarded, climbs, lrs=2),
    case("wider", RANGE, rewarded, climbs, lrs=3),
    case("wider", TWO, rewarded, climbs, seeds=range(2)),
    case("rank_1", "MISSING", rewarded, climbs, (8,)),
    case("rank_1_control", EDGES, rewarded, climbs, lrs=2, control=True),
    case("rank_1_control", OF_BOTH, rewarded, climbs, control=True, lora=(2, 3, 4, 5)),
    case("control", "MISSING", rewarded, climbs, control=False, sweep="rl_matrices"),
    case("law", "FEW_CONDITIONS", some_conditions, "tiny"),
]


@pytest.mark.parametrize(("claim", "gates", "make"), CASES)
def test_a_reason_is_a_gate(claim, gates, make):
    sweep, world, specs = make()
    asked = {claim: ASKED[claim]} if claim in ASKED else {}
    assert judged(sweep, world, specs, asked)[claim][0] == gates


def test_every_gate_has_a_case():
    named = {name for case in CASES for name in re.findall("[A-Z_]{4,}", case.values[1])}
    assert named == {c.name for c in GateCode} - {"ELSEWHERE", "WITHDRAWN"}


def test_a_law_of_two_scales_is_judged_once_and_a_withdrawn_question_not(tmp_path):
    (tmp_path / "rate_law-tiny").mkdir()
    some_conditions("tiny")[2].to_parquet(tmp_path / "rate_law-tiny" / "table.parquet")
    found = judged(*some_conditions("small"), kept=tmp_path, scale="small")
    assert found["law"] == ["ELSEWHERE"]
    found = judged(*ratio(Valley(3), (4,)), withdrawn="other arms")
    assert found["ratio"] == ["WITHDRAWN"]
