"""`regime`: regret where little and where much is new; `rl`, `rl_bits`: points, optimal LRs, capacity. Every
gate on a planted table that has its reason and no other one: which gates a claim gets."""

import dataclasses
import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import GateCode
from analysis.questions.registry import analyse
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.request import question
from lorasweep.train.objectives.policy_gradient import bits_learned
from tests import planted
from tests.planted import (
    Gaps,
    Rewards,
    Valley,
    World,
    arms,
    ask,
    base,
    check,
    facts,
    is_full,
    layers,
    lost,
    rank_of,
    rewarded,
    smoke,
)
from tests.unit.questions.test_quadrature import ByLaw
from tests.unit.questions.test_quadrature import runs_of as law_runs
from tests.unit.questions.test_variants import Methods, one_seed, specs_of
from tests.world import compose_request

pytestmark = pytest.mark.slow  # fits dozens of curves

LOW = {"rule_shift": 0.25, "shift_rank": 2, "new_exceptions": 0.0}
BEYOND = {"rule_shift": 0.25, "shift_rank": 8, "new_exceptions": 0.3}
IN_LOW = "8 symbols, change of rank 2"
IN_BEYOND = "8 symbols, change of rank 8 + 30% new exceptions"
BATCH, PARAMETERS = 4, 5216
"""Parameters of rank 1 in tiny64: 4 x (2 x 128 + 2 x 80 + 3 x 288) + 96."""


def ask_regime(world, *novelties, ranks=(1, 8), steps=256):
    data = [base(**params) for params in novelties]
    specs = [s for of in data for s in arms(of, ranks, steps=steps, batch_size=BATCH)]
    return ask("regime", world, specs)


def by_novelty(world):
    """The answer, and the verdicts where only rules and where exceptions are new, by claim."""
    out, _ = ask_regime(world, LOW, BEYOND)
    return out, *(
        {v["claim"]: v for v in out["verdicts"] if v["group"].endswith(name)}
        for name in (IN_LOW, IN_BEYOND)
    )


def condition(out, name=IN_LOW):
    """The estimates of a condition by quantity and rank (None: of all ranks)."""
    mine = [r for r in out["rows"] if name in r["task"]]
    return {(r["quantity"], r.get("rank")): r["estimate"] for r in mine}


def by_rank(out, quantity):
    return {r: e["value"] for (of, r), e in condition(out).items() if of == quantity}


def needed(out, name=IN_LOW):
    e = condition(out, name)["needed_rank_between", None]
    return [e["low"], e["high"]]


def test_the_boundary_comes_back_by_condition_and_rank():
    """An eighth of tiny64's width is rank 8: better than full fine-tuning where only rules are new
    (on unchanged contexts), behind where exceptions are new; rank 1 is behind and falls back."""

    def gap(rank, step, exceptions):
        if exceptions:
            return 0.12
        return -0.02 if rank == 8 else 0.04 + 0.03 * math.log2(step / 64)

    out, low, beyond = by_novelty(Gaps(gap, part="unchanged"))
    check(low, **dict.fromkeys(("low", "better", "unchanged", "growth"), "SUPPORTED"))
    check(beyond, beyond="SUPPORTED")
    assert "beyond" not in low and not {"low", "better", "unchanged"} & beyond.keys()
    assert needed(out) == [1.0, 8.0] and needed(out, IN_BEYOND) == [8.0, None]
    assert by_rank(out, "regret_percent") == pytest.approx({8: -2, 1: 10}, abs=0.4)
    assert (low["growth"]["where"]["rank"], low["low"]["where"]["rank"]) == (1, 8)
    # rank 8 loses a tenth where only rules are new, nothing where exceptions are; the gap shrinks
    world = Gaps(lambda r, step, new: 0.0 if new else 0.25 - 0.05 * math.log2(step / 64))
    _, low, beyond = by_novelty(world)
    check(low, low="REFUTED", better="REFUTED", growth="REFUTED", unchanged="NO_ADVANTAGE")
    check(beyond, beyond="REFUTED")


def test_the_change_of_the_needed_rank_is_counted_by_doubling_of_the_updates():
    """The rank that loses 5% of the gain is 2 after 64 updates, and 4 after 256."""

    def gap(rank, step, exceptions):
        gain = math.log2(1 + step) / math.log2(257)  # until then, of the whole gain
        return 0.05 * gain * (1 + math.log2({64: 2}.get(step, 4)) - math.log2(rank))

    _, found = ask_regime(Gaps(gap), LOW, ranks=(1, 2, 4, 8))
    check(found, needs_longer=("SUPPORTED", pytest.approx(0.5, abs=0.02)))


@pytest.mark.parametrize(("of_16", "outcome"), [(0.03, "SUPPORTED"), (-0.03, "REFUTED")])
def test_the_gaps_of_high_ranks_grow_only_if_each_does(of_16, outcome):
    """Rank 1 is no high rank; its gap shrinks. A rank without an interval leaves the claim open."""
    slopes = {1: -0.05, 8: 0.02, 16: of_16}
    world = Gaps(lambda r, step, e: 0.2 + slopes[r] * math.log2(step / 64))
    _, found = ask_regime(world, LOW, ranks=(1, 8, 16))
    expected = 2 * planted.GAIN * math.log2(257) * min(0.02, of_16)
    check(found, growth_high=(outcome, pytest.approx(expected, abs=2e-3)))


@pytest.mark.parametrize(
    ("share", "floor", "outcome"),
    [(0.6, 256, "SUPPORTED"), (1.0, 32, "REFUTED"), (1.3, 256, "REFUTED")],
)
def test_a_floor_is_told_from_slower_learning(share, floor, outcome):
    """Rank 1, whose load is 1.9, learns `share` of what full fine-tuning does up to update `floor`."""

    def also(spec, step):
        if rank_of(spec) != 1:
            return 0.0
        return planted.GAIN * (math.log2(1 + step) - share * math.log2(1 + min(step, floor)))

    _, found = ask_regime(Gaps(bits=2e4, also=also), BEYOND)
    expected = share if floor == 256 else 0.0
    check(found, no_floor=(outcome, pytest.approx(expected, abs=0.05)))


@pytest.mark.parametrize(
    ("gaps", "bits", "expected"),
    [
        ({1: -0.03, 8: -0.03}, 1e4, {"better": "SUPPORTED", "unchanged": "REFUTED"}),
        # A load of 0.96 for rank 1, of 0.48 for rank 2
        ({1: 0.1, 2: 0.1, 4: 0.0}, 1e4, {"fits": "REFUTED"}),
        # A load of 1.5 for rank 2, and of 0.7 for rank 4
        ({1: 0.2, 2: 0.1, 4: 0.05}, 3e4, {"overfull": "SUPPORTED"}),
        ({1: 0.2, 2: 0.0, 4: 0.05}, 3e4, {"overfull": "REFUTED"}),
    ],
)
def test_ranks_are_judged_at_their_load(gaps, bits, expected):
    world = Gaps(lambda r, s, e: gaps[r], bits=bits)
    out, found = ask_regime(world, LOW, ranks=tuple(gaps), steps=24)
    check(found, **expected)
    loads = {r: bits / (2 * PARAMETERS * r) for r in gaps}
    assert by_rank(out, "load, generator") == pytest.approx(loads)


def test_where_nothing_is_new_no_claim_of_load_is_made_and_missing_conditions_are_named():
    out, found = ask_regime(Gaps(), {"rule_shift": 0.0, "new_exceptions": 0.0})
    check(found, nothing="SUPPORTED")
    absent = [v for v in out["verdicts"] if v["group"] == "no cell"]
    assert {v["claim"] for v in absent} == {v["claim"] for v in out["verdicts"]} - {"nothing"}
    assert len(absent) >= 10 and {v["outcome"] for v in absent} == {"UNDECIDED"}


def test_an_optimum_at_the_edge_leaves_no_nan():
    """Full fine-tuning's optimum lies far above the LRs tried: its gain is not known."""
    world = Gaps()
    world.best = lambda spec, step: 20 * planted.FULL if is_full(spec) else planted.LORA
    out, _ = ask_regime(world, LOW, steps=24)
    assert [*by_rank(out, "regret_percent").values()] == [None, None]
    assert all(v["outcome"] == "UNDECIDED" for v in out["verdicts"])


def test_growth_is_read_on_the_same_held_out_rows_at_both_lengths():
    """The final rows are harder for LoRA by 0.05 nats; on the earlier rows the gap is constant."""

    class Harder(Gaps):
        def nll(self, spec):
            return super().nll(spec) + 0.05 * (not is_full(spec))

        def curve(self, spec):
            points = super().curve(spec)
            points[-1] |= {"test_nll_curve": points[-1]["test_nll"], "test_nll": self.nll(spec)}
            return points

    _, found = ask_regime(Harder(lambda r, step, e: 0.1), LOW)
    check(found, growth=("UNDECIDED", pytest.approx(0, abs=2e-3)))


def test_bits_are_counted_three_ways_and_by_full_fine_tuning_alone():
    """Full fine-tuning at its optimum codes the rows in 60,000 bits, of which 50,000 are entropy:
    64 symbols a row, the first three without a loss."""
    floor = {"floor_nats": 50_000 * math.log(2) / (24 * BATCH * 61)}

    def stored(spec):
        bits = 60_000 + 2_000 * math.log(spec.lr / planted.FULL) if is_full(spec) else 1e9
        return {"code_nats": bits * math.log(2), **floor}

    world = Gaps(lambda r, s, e: {1: 0.2, 2: 0.1, 4: 0.0}[r], stored=stored)
    found = condition(ask_regime(world, LOW, ranks=(1, 2, 4), steps=24)[0])
    expected = {"generator": 1e4, "first_pass": 6e4, "above_floor": 1e4}
    for count, bits in expected.items():
        assert found[f"bits, {count}", None]["value"] == pytest.approx(bits, rel=0.02)
        for r in (1, 2, 4):
            load = pytest.approx(bits / (2 * PARAMETERS * r), rel=0.02)
            assert found[f"load, {count}", r]["value"] == load
    rank = found["needed_rank", None]["value"]  # regret passes 5% between ranks 2 and 4
    needed = found["load at the needed rank, first_pass", None]["value"]
    assert 2 < rank < 4 and needed == pytest.approx(6e4 / (2 * PARAMETERS * rank), rel=0.02)


START = Rewards.start_reward
FULL, LORA = 5.6e-4, 2.24e-3  # optimal LRs in a Bandit


def climbs(spec, step, rho=1.0, gain=0.06):
    """Rewards rise by `gain` a doubling of the updates; rank 1 makes `rho` of the progress."""
    return START + gain * math.log2(1 + (rho if rank_of(spec) == 1 else 1.0) * step)


@pytest.mark.parametrize(
    ("rho", "ratio", "bends", "outcomes"),
    [
        (0.5, 4, (0.04, 0.016), ("REFUTED", "SUPPORTED", "REFUTED", "SUPPORTED", "REFUTED")),
        (1.0, 10, (0.016, 0.04), ("SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED", "SUPPORTED")),
    ],
)
def test_planted_differences_come_back(rho, ratio, bends, outcomes):
    out, found = ask(*rewarded(lambda s, t: climbs(s, t, rho), ratio=ratio, bends=bends))
    claims = ("rank_1", "top_rank", "ratio", "wider", "progress")
    assert tuple(found[c]["outcome"] for c in claims) == outcomes
    behind = pytest.approx(6 * math.log2((1 + 64 * rho) / 65), abs=0.5)
    wider = pytest.approx(math.sqrt(bends[0] / bends[1]), rel=0.2)
    check(found, rank_1=behind, ratio=pytest.approx(ratio, rel=0.1), wider=wider)
    check(found, progress=pytest.approx(rho, rel=0.1))
    text = out["page"]  # in rewards and not in losses
    assert "| best reward |" in text and "NLL" not in text and "| 0 of 4 |" in text


def test_two_curves_of_one_rank_are_refused():
    """With and without an adapter of the unembedding: the difference may be large."""
    sweep, world, specs = rewarded(climbs, (1,))
    fewer = LoRA(rank=1, layers="attention+mlp")
    specs += [dataclasses.replace(s, method=fewer) for s in specs if not is_full(s)]
    with pytest.raises(TableError, match=r"lora r1, .*attention.*: only one"):
        ask(sweep, world, specs)


@pytest.mark.parametrize("fewer", [0.0, 0.12])
def test_a_control_separates_the_rank_from_the_choice_of_matrices(fewer):
    """Training fewer matrices costs `fewer` of reward, and rank 1 costs .1 more; rank 8 nothing."""

    def top(spec, step):
        behind = 0.1 * (rank_of(spec) == 1) + fewer * (spec.method != FullFT())
        return climbs(spec, step) - behind * step / spec.steps

    _, world, specs = rewarded(top, control=True)
    claims = question(compose_request(["+sweep=rl_matrices", "scale=smoke"]))["claims"]

    def points(outcome, value):
        return outcome, pytest.approx(value, abs=0.3)

    def of(kept=lambda s: True):
        return ask("rl", world, [s for s in specs if kept(s)], claims)

    out, found = of()
    check(
        found,
        control=points("REFUTED" if fewer else "SUPPORTED", -100 * fewer),
        rank_1=points("REFUTED", -10 - 100 * fewer),
        rank_1_control=points("REFUTED", -10),
        top_rank_control=points("SUPPORTED", 0),
    )
    assert "| fullft, scope matrices" in out["page"]
    if fewer:
        others = of(lambda s: s.method != FullFT())[1]
        check(others, rank_1="UNDECIDED", rank_1_control=points("REFUTED", -10))
        absent = ("no curve of lora r1", "no curve of lora")
        check(of(is_full)[1], rank_1_control=absent[0], top_rank_control=absent[1])


def bit_runs(*contexts):
    sizes = ("objective=policy_gradient", "batch_size=1024", "group_size=16", "max_new_tokens=1")
    grid = {"full": FULL, "lora": LORA, "n": 5, "steps": 64}
    found = []
    for n in contexts:
        found += arms(base("tiny64-knows", "bandit", *sizes, contexts=n), (1, 4), **grid)
        found += arms(base("tiny64-knows", "bandit", contexts=n), (1,), **grid)  # supervised
    return found


def contexts_of(spec):
    return int(spec.plain()["dataset"]["knobs"]["contexts"])


class Bandit(Rewards):
    """`reward[contexts]`, less `behind[contexts]` for rank 1, which knows .97 of the labels."""

    def __init__(self, reward, behind):
        def top(spec, step):
            return reward[contexts_of(spec)] - behind[contexts_of(spec)] * (rank_of(spec) == 1)

        def best(spec):
            return FULL if is_full(spec) else LORA

        super().__init__(top, best, lambda s: 0.04 if is_full(s) else 0.016)

    def nll(self, spec):
        if spec.objective != "sft":
            return super().nll(spec)
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        off = math.log(spec.lr / self.best(spec))
        return math.log(16) * (0.02 if is_full(spec) else 0.03) + 0.02 * off**2 + noise

    def curve(self, spec):
        ends = [{"step": 0, "test_nll": 2.8}, {"step": spec.steps, "test_nll": self.nll(spec)}]
        return ends if spec.objective == "sft" else super().curve(spec)

    def results(self, spec):
        if spec.objective == "sft":
            return {"nll_start": 2.8}
        found = super().results(spec)
        bits = contexts_of(spec) * bits_learned(found["test_reward"], 16)
        return {**found, "bits_per_answer": bits / (spec.steps * spec.batch_size)}


def test_rank_1_behaves_as_its_capacity_says():
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.0, 4096: 0.3})
    out, _ = ask("rl_bits", world, bit_runs(64, 4096))
    few, many = ({}, {})
    for v in out["verdicts"]:
        (few if "contexts=64)" in v["group"] else many)[v["claim"]] = v
    assert few.keys() == {"tie", "taught", "wider", "one_bit", "ratio"}
    assert many.keys() == {"behind", "wider", "one_bit", "ratio"}
    taught = ("SUPPORTED", pytest.approx(-1, abs=0.3))
    check(few, tie="SUPPORTED", taught=taught, wider="SUPPORTED", one_bit="REFUTED")
    bits = pytest.approx(4096 * bits_learned(0.6, 16) / 65536, rel=0.02)
    behind = ("SUPPORTED", pytest.approx(-30, abs=0.5))
    check(many, behind=behind, wider="SUPPORTED", one_bit=("REFUTED", bits))
    assert {v["ratio"]["outcome"] for v in (few, many)} == {"REFUTED"}  # planted: 4
    text = out["page"]  # of rewards and of losses
    assert "of reward at the optimum" in text and "nats at the optimum" in text
    assert f"capacity of rank 1: {4 * 64 / (2 * 5232):.2g}." in text
    alone = [s for s in bit_runs(64) if s.objective != "sft" and rank_of(s) != 4]
    one_rank = ask("rl_bits", world, alone)[1]  # what is of full fine-tuning names no rank
    where = one_rank["one_bit"]["where"]
    assert "rank" not in where and where["at"] == "full fine-tuning, 64 updates"
    assert one_rank["tie"]["where"]["rank"] == 1
    _, found = ask("rl_bits", world, [s for s in bit_runs(64) if s.objective != "sft"])
    check(found, taught="no curve of fullft (objective sft)", tie="SUPPORTED")
    assert found["behind"]["group"] == "no cell"  # no condition beyond the capacity


ASKED = {
    "drift": {"estimand": "lr_drift_per_doubling", "expected": 0, "margin": [-0.1, 0.1]},
    "ten_times_wide": {"estimand": "ten_times_regret", "expected": 0, "margin": [-20, 20]},
}
"""Claims that are not kept."""
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

    specs = arms(planted.base(**LOW), ranks, steps=steps, batch_size=4)
    return "regime", planted.Gaps(lambda r, s, e: gap, also=also), specs


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
    world = ByLaw()
    keep = {"tiny": lambda s: s.model.name == "tiny64-s1", "small": lambda s: True}[scale]
    return "quadrature", None, planted.planted_table(world, law_runs(world, scale, keep))


class Noisy(Methods):
    """Methods whose runs differ by a few percent of the gain, at all learning rates alike."""

    def loss(self, spec, step):
        return super().loss(spec, step) + np.random.default_rng(int(spec.id, 16)).normal(0, 0.01)


def methods(world, *keep):
    return "variants", world, specs_of(world, *keep)


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
LISTS = "LoRA+, dialect_shift (all exceptions new, no new rules), rank"
NOWHERE = ", ".join([f"{LISTS} {r}: FEW_SEEDS_AT_BEST" for r in (4, 16)] + ["NOT_SHARED"] * 4)
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
    case("needs_longer", "NO_LAW", novel),
    case("needs_longer", "MISSING", novel, ranks=(8,)),
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
    case("predicts", "FEW_CONDITIONS", some_conditions, "tiny"),
    case("reversed", NOWHERE, methods, Methods(), one_seed),
    case("reversed", "OPEN_ORDERS", methods, Noisy()),
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
    for scale in ("tiny", "small"):
        (tmp_path / f"quadrature-{scale}").mkdir()
        some_conditions(scale)[2].to_parquet(tmp_path / f"quadrature-{scale}/table.parquet")
    found = judged(*some_conditions("small"), kept=tmp_path, scale="small")
    assert found["predicts"] == ["ELSEWHERE"]
    found = judged(*ratio(Valley(3), (4,)), withdrawn="other arms")
    assert found["ratio"] == ["WITHDRAWN"]
