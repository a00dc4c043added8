"""Every gate on a planted table that has its reason and no other one: which gates a claim gets."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from analysis.inference.gates import GateCode
from analysis.questions.registry import analyse
from analysis.runs.table import read
from lorasweep.cli.answer import KEPT
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import (
    FULL,
    FULL_BEST,
    GAIN,
    LORA,
    Rewards,
    Valley,
    World,
    arms,
    around,
    base,
    kept_question,
    planted_table,
    runs,
)

pytestmark = pytest.mark.slow  # fits dozens of curves
DRIFT = {"drift": {"estimand": "lr_drift_per_doubling", "expected": 0, "margin": [-0.1, 0.1]}}
PARITY = {"parity": {"estimand": "rho_top_rank", "expected": 1, "margin": [0.9, 1.11]}}
MORE = {"ten_times": {"estimand": "ten_times_regret", "expected": 0, "margin": [-20, 20]}}
NEW = {"rule_shift": 0.25, "shift_rank": 2, "new_exceptions": 0.0}
LISTS = {"rule_shift": 0.25, "shift_rank": 8, "new_exceptions": 0.3}
ON_TWO = ("tiny64", "tiny64-s1")


def is_full(spec):
    return spec.method.name == "fullft"


def lost(of, **world):
    """A world in which a run's loss is higher by `of(spec, step)`."""

    class Lost(World):
        def loss(self, spec, step):
            return super().loss(spec, step) + of(spec, step)

    return Lost(lambda spec: 1.0, **world)


def ratio(valley, ranks=(4, 8), full=1.2e-3, **more):
    spec, lora = base(dataset="dialect_smoke"), FULL_BEST * valley.ratio
    return "lr_ratio", valley, arms(spec, ranks, full, lora, steps=8, **more)


def ratio_over_updates(of):
    return "lr_ratio", lost(of), arms(base(dataset="dialect_smoke"), (4, 8), steps=64)


def apart(seeds):
    """Seeds 0 to 2 of full fine-tuning, others of LoRA."""
    sweep, world, full = ratio(Valley(3), (), seeds=range(3))
    return sweep, world, full + [s for s in ratio(Valley(3), seeds=seeds)[2] if not is_full(s)]


RANKS = {"attention": 8, "mlp": 4, "attention+mlp": 4}


def layers(speeds, models=("tiny64",), of=RANKS, also=lambda s, t: 0.0, **world):
    """LoRA of each layer set at the rank of the shipped sweep."""
    specs, ranks = [], of
    for spec in (base(model, "dialect_smoke") for model in models):
        specs += arms(spec, (), steps=64)
        for of, rank in ranks.items():
            specs += runs(spec, LoRA(rank=rank, layers=of), around(LORA), steps=64)
    world = lost(also, **world)
    world.rho = lambda s: speeds(s)[s.method.layers]
    return "layers", world, specs


def even(spec):
    return {"attention": 0.5, "mlp": 0.8, "attention+mlp": 0.8}


def ranks(world, of=(1, 4), steps=96, seeds=range(4)):
    spec = base(dataset="dialect_smoke")
    found = arms(spec, of, steps=steps, seeds=seeds)
    for rank in of:
        found += runs(spec, LoRA(rank=rank, init_seed=1), [LORA], seeds, steps=steps)
        found += runs(spec, LoRA(rank=rank, init_seed=2), [LORA], seeds, steps=steps)
    return "rank", world, found


def costs(world):
    return "compute", world, arms(base(dataset="dialect_smoke"), (1,), steps=384)


def timed(factor):
    """Seconds of an update, of which every second run takes `factor` times as many."""
    return lambda spec: {"step_s": 0.1 * (1 + (factor - 1) * (spec.seed % 2))}


def facts(stored, lrs=3, seeds=range(4), most=1.0):
    """`stored(updates)`: bits per parameter that LoRA stores; full fine-tuning: a share of all."""
    parameters = 4 * (127 + 79 + 79 + 127)

    class Facts(World):
        def loss(self, spec, step):
            bits = most * 16 * 512 if is_full(spec) else stored(spec.steps) * parameters
            off = 0.05 * math.log(spec.lr / (3e-3 if is_full(spec) else 1e-2)) ** 2
            return math.log(16) - bits / 512 / 4 * math.log(2) + off

    spec, lora = base("tiny64-facts", "facts", facts=512.0), LoRA(rank=1, layers="attention")
    arms = ((FullFT(), around(3e-3, lrs)), (lora, around(1e-2, lrs)))
    of = [s for n in (200, 400) for m, lrs in arms for s in runs(spec, m, lrs, seeds, steps=n)]
    return "capacity", Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": 2.8}), of


def recipes(default=2e-4, forgotten=0.2, behind=lambda spec: 0.0):
    spec, common = base(dataset="dialect_smoke"), {"steps": 96}
    found = arms(spec, (8,), **common)
    found += runs(spec, LoRA(rank=8, layers="attention+mlp"), around(default), **common)
    world = lost(lambda s, t: behind(s), more=lambda s: {"retain_nll": 2.2, "retain_start": 2.0})
    return "recipes", world, found


def batches(rho):
    spec, found = base(dataset="dialect_smoke"), []
    for size, steps in {4: 64, 16: 32}.items():
        found += arms(spec, (4,), n=5, seeds=range(3), batch_size=size, steps=steps)
    return "batch_size", World(rho), found


def novel(gap=lambda rank, step: 0.0, noise=0.0, steps=256, ranks=(1, 8), new=NEW):
    """LoRA is `gap(rank, step)` of the gain behind; the losses of full fine-tuning vary."""

    def of(spec, step):
        gain = GAIN * math.log2(1 + spec.steps)
        if is_full(spec):
            return np.random.default_rng(int(spec.id, 16)).normal(0, noise)
        return gain * gap(spec.method.rank, step)

    parts = {"bits_generator": 1e4, "changed_share": 0.4}

    def more(spec):
        return parts | dict.fromkeys(("test_nll_changed", "test_nll_unchanged"), 2.5)

    spec = base("tiny64", "dialect", **new)
    return "regime", lost(of, more=more), arms(spec, ranks, steps=steps, batch_size=4)


def rewarded(top, ranks=(1, 8), lrs=5, start=0.1, seeds=range(4), lora=None, control=False):
    """`lora`: LoRA's seeds; `control`: with full fine-tuning of LoRA's matrices."""
    sizes = ("objective=policy_gradient", "batch_size=64", "group_size=8", "max_new_tokens=6")
    spec, steps = base("tiny64-skilled", "words", *sizes), {"steps": 64}
    found = arms(spec, (), 1e-4, n=lrs, seeds=seeds, **steps)
    for rank in ranks:
        found += runs(spec, LoRA(rank=rank), around(4e-4, lrs), lora or seeds, **steps)
    if control:
        found += runs(spec, FullFT(scope="matrices"), around(1e-4, lrs), seeds, **steps)
    world = Rewards(top, lambda s: 1e-4 * (1 if is_full(s) else 4), lambda s: 0.03)
    world.start_reward = start
    return "rl_matrices" if control else "rl", world, found


def climbs(spec, step):
    return 0.1 + 0.06 * math.log2(1 + step)


def judged(sweep, world, specs, claims=None, kept=None, **question):
    """The gates of each claim's verdicts, without their subjects; each as text."""
    table = specs if isinstance(specs, pd.DataFrame) else planted_table(world, specs)
    found = {}
    for v in analyse(table, kept_question(sweep, claims) | question, kept).verdicts:
        assert v.outcome == "UNDECIDED" or not v.gates or v.gates[0].code == GateCode.BY_TASK
        found.setdefault(v.claim, []).append(", ".join(f"{g.place}{g.code.name}" for g in v.gates))
    return found


def stops(of):
    """The loss of some arms stays where it is from 3/8 of the updates on."""

    def also(spec, step):
        last = 3 * spec.steps // 8
        return GAIN * math.log2((1 + step) / (1 + min(step, last))) * of(spec)

    return also


def some_conditions(scale):
    """The kept runs at two alphas of the law's seven."""
    table = read(KEPT / f"rate_law-{scale}" / "table.parquet")
    return "rate_law", None, table[table["alpha"].isin([math.nan, 2, 8])].reset_index(drop=True)


def is_top(spec):
    return not is_full(spec) and spec.method.rank == 8


def mlp_at_edge(spec, step):
    best = FULL if is_full(spec) else LORA
    return best * (40 if not is_full(spec) and spec.method.layers == "mlp" else 1)


def two_speeds(spec):
    return even(spec) | {"attention": 0.4 if spec.model.name == "tiny64" else 0.9}


NEAR_ONE = {"attention": 7, "mlp": 4, "attention+mlp": 4}
"""Attention has 87% of the parameters of the MLP."""
ONE_SEED = ", ".join(
    f"{a}: {g}" for a in ("fullft", "lora r4") for g in ("FLAGGED", "FEW_SEEDS_AT_BEST")
)
CASES = [
    ("ratio", "fullft: FLAGGED", lambda: ratio(Valley(3), full=4e-5)),
    (
        "ratio",
        "fullft: FLAGGED, lora r4: FLAGGED, lora r8: FLAGGED",
        lambda: ratio(Valley(3, cliff=0.9)),
    ),
    (
        "ratio",
        "fullft: FEW_SEEDS_AT_BEST, lora r4: FEW_SEEDS_AT_BEST",
        lambda: ratio(Valley(3), (4,), seeds=range(2)),
    ),
    ("no_regret", "FEW_SEEDS_OF_BOTH", lambda: apart((1, 2, 3))),
    ("no_regret", "", lambda: apart((0, 1, 2))),
    ("ten_times", f"{ONE_SEED}, FEW_SEEDS_AT_RECIPE", lambda: ratio(Valley(10), (4,), seeds=(0,))),
    ("ten_times", "RECIPE_BY_A_CLIFF", lambda: (*ratio(Valley(4, cliff=3.0), (4,)), MORE)),
    ("ten_times", "", lambda: ratio(Valley(4, cliff=3.0), (4,))),
    ("drift", "ONE_RANK", lambda: (*ratio(Valley(3), (4,)), DRIFT)),
    ("parity", "TASK", lambda: (*ratio_over_updates(stops(is_top)), PARITY)),
    ("attention_worse", "ONLY_BOUNDS", lambda: layers(even, also=lambda s, t: -0.8 * is_full(s))),
    ("attention_worse", "TASK", lambda: layers(even, also=stops(is_full))),
    ("attention_worse", "", lambda: layers(even, also=stops(lambda s: not is_full(s)))),
    ("attention_worse", "lora r4: FLAGGED", lambda: layers(even, best=mlp_at_edge)),
    (
        "attention_loses",
        "FEW_SEEDS_OF_BOTH, NOISY, lora r4: FLAGGED",
        lambda: layers(even, best=mlp_at_edge),
    ),
    ("attention_worse", "MISSING", lambda: layers(even, of=NEAR_ONE)),
    ("attention_everywhere", "BY_TASK", lambda: layers(two_speeds, ON_TWO)),
    ("parity", "TASK", lambda: ranks(lost(stops(is_top)), (1, 8), 64)),
    ("start", "NOT_APART", lambda: ranks(lost(lambda s, t: 0.0), (1, 4), 32)),
    ("start", "FEW_SEEDS, NOT_APART", lambda: ranks(World(lambda s: 0.3), (1, 4), 32, range(2))),
    ("order", "NO_ORDER", lambda: ranks(World(lambda s: 0.05 * s.method.rank), (1, 4), 384)),
    ("faster", "ONE_RANK", lambda: ranks(World(lambda s: 0.5), (4,), 64)),
    ("faster", "ONLY_BOUNDS", lambda: ranks(lost(lambda s, t: -0.8 * is_full(s)), (1, 4), 64)),
    ("flops_to_loss", "NOT_REACHED", lambda: costs(World(lambda s: 0.1))),
    ("seconds_a_step", "BUSY", lambda: costs(World(lambda s: 1.0, more=timed(2)))),
    ("two_bits", "NOT_CONVERGED", lambda: facts(lambda n: n / 400)),
    ("one_bit_at_100", "512 facts x 100: FEW_SEEDS", lambda: facts(lambda n: 1.0, seeds=range(2))),
    ("two_bits", "512 facts x 50: FLAGGED", lambda: facts(lambda n: 1.0, 2)),
    ("two_bits", "TASK", lambda: facts(lambda n: 1.0, most=0.8)),
    ("default_rate", "RECIPE_OUTSIDE", lambda: recipes(8e-2)),
    ("original", "MISSING", recipes),
    (
        "retention_equal",
        "FEW_SEEDS_AS_GOOD",
        lambda: recipes(behind=lambda s: 0.5 if is_full(s) and s.seed else 0.0),
    ),
    (
        "penalty",
        "batch 4, rank 4: ONLY_A_BOUND, batch 16, rank 4: ONLY_A_BOUND",
        lambda: batches(lambda s: 1e3),
    ),
    ("low", "NOISY", lambda: novel(noise=0.016, steps=32)),
    ("growth", "NO_GAP", lambda: novel(lambda r, t: -0.05)),
    ("unchanged", "NO_ADVANTAGE", lambda: novel(steps=32)),
    ("needs_longer", "NO_LAW", lambda: novel(steps=32)),
    ("low", "MISSING", lambda: novel(ranks=(1, 4), steps=32)),
    ("real", "NO_CELL", lambda: novel(steps=32)),
    ("rank_1", "TASK", lambda: rewarded(lambda s, t: 0.95)),
    ("rank_1", "TASK", lambda: rewarded(climbs, start=0.01)),
    ("rank_1", "fullft: FEW_SEEDS, lora r1: FEW_SEEDS", lambda: rewarded(climbs, seeds=range(2))),
    ("rank_1", "fullft: FLAGGED, lora r1: FLAGGED", lambda: rewarded(climbs, lrs=2)),
    ("progress", "fullft: FLAGGED, lora r1: FLAGGED", lambda: rewarded(climbs, lrs=2)),
    (
        "wider",
        "fullft: FLAGGED, lora r8: FLAGGED, range of good rates: FLAGGED",
        lambda: rewarded(climbs, lrs=3),
    ),
    (
        "wider",
        "fullft: FEW_SEEDS_AT_BEST, lora r8: FEW_SEEDS_AT_BEST, all rates: FEW_SEEDS",
        lambda: rewarded(climbs, seeds=range(2)),
    ),
    ("rank_1", "MISSING", lambda: rewarded(climbs, (8,))),
    (
        "rank_1_control",
        "fullft: FLAGGED, lora r1: FLAGGED",
        lambda: rewarded(climbs, lrs=2, control=True),
    ),
    (
        "rank_1_control",
        "FEW_SEEDS_OF_BOTH",
        lambda: rewarded(climbs, control=True, lora=(2, 3, 4, 5)),
    ),
    ("rank_1_control", "MISSING", lambda: ("rl_matrices", *rewarded(climbs)[1:])),
    ("law", "FEW_CONDITIONS", lambda: some_conditions("tiny")),
]


@pytest.mark.parametrize(
    ("claim", "gates", "of"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_reason_is_a_gate(claim, gates, of):
    sweep, world, specs, *more = of()
    found = judged(sweep, world, specs, *more)[claim]
    assert found[0] == gates


def test_every_gate_has_a_case():
    with_cases = {name for _, gates, _ in CASES for name in re.findall("[A-Z_]{4,}", gates)}
    assert with_cases == {c.name for c in GateCode} - {"ELSEWHERE", "WITHDRAWN"}


def test_a_law_of_two_scales_is_judged_once_and_a_withdrawn_question_not(tmp_path):
    _, _, table = some_conditions("tiny")
    (tmp_path / "rate_law-tiny").mkdir()
    table.to_parquet(tmp_path / "rate_law-tiny" / "table.parquet")
    _, _, small = some_conditions("small")
    found = judged("rate_law", None, small, kept=tmp_path, scale="small")
    assert found["law"] == ["ELSEWHERE"]
    found = judged(*ratio(Valley(3), (4,)), withdrawn="other arms")
    assert found["ratio"] == ["WITHDRAWN"]
