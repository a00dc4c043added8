"""`regime`: regret where little and where much is new; `rl`, `rl_bits`: points, optimal LRs, capacity."""

import dataclasses
import math

import numpy as np
import pytest

from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.request import question
from lorasweep.train.objectives.policy_gradient import bits_learned
from tests import planted
from tests.planted import Gaps, Rewards, arms, ask, base, check, is_full, rank_of, rewarded
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
    return next(c for c in out["cells"] if name in c["cell"])


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
    assert condition(out)["rank_needed"] == [1.0, 8.0]
    assert condition(out, IN_BEYOND)["rank_needed"] == [8.0, None]
    found = {r["rank"]: r["regret_percent"]["value"] for r in condition(out)["ranks"]}
    assert found == pytest.approx({8: -2, 1: 10}, abs=0.4)
    # rank 8 loses a tenth where only rules are new, nothing where exceptions are; the gap shrinks
    world = Gaps(lambda r, step, new: 0.0 if new else 0.25 - 0.05 * math.log2(step / 64))
    _, low, beyond = by_novelty(world)
    check(low, low="REFUTED", better="REFUTED", growth="REFUTED", unchanged="NO_ADVANTAGE")
    check(beyond, beyond="REFUTED")


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
    loads = {r["rank"]: r["load"] for r in condition(out)["ranks"]}
    assert loads == pytest.approx({r: bits / (2 * PARAMETERS * r) for r in gaps})


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
    assert [r["gain_nats"] for r in condition(out)["ranks"]] == [None, None]
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
    assert found["bits"] == pytest.approx(expected, rel=0.02)
    for r in found["ranks"]:
        loads = {count: bits / (2 * PARAMETERS * r["rank"]) for count, bits in expected.items()}
        assert r["loads"] == pytest.approx(loads, rel=0.02)
    rank = found["rank_interpolated"]["value"]  # regret passes 5% between ranks 2 and 4
    needed = found["loads_needed"]["first_pass"]["value"]
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
    assert all(len(curves) == 2 for by in out["compared"].values() for curves in by.values())
    text = out["page"]  # in rewards and not in losses
    assert "| best reward |" in text and "NLL" not in text and "| 0 of 4 |" in text


def test_two_curves_of_one_rank_are_refused():
    """With and without an adapter of the unembedding: the difference may be large."""
    sweep, world, specs = rewarded(climbs, (1,))
    fewer = LoRA(rank=1, layers="attention+mlp")
    specs += [dataclasses.replace(s, method=fewer) for s in specs if not is_full(s)]
    with pytest.raises(TableError, match=r"two curves of lora r1.*attention"):
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
    _, found = ask("rl_bits", world, [s for s in bit_runs(64) if s.objective != "sft"])
    check(found, taught="no curve of fullft (objective sft)", tie="SUPPORTED")
    assert found["behind"]["group"] == "no cell"  # no condition beyond the capacity
