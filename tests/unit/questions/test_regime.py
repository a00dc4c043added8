"""`regime` on planted runs: regret where little and where much is new."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate
from analysis.measures.regret import UNSCORED
from analysis.optimum.valley import linex
from analysis.questions import regime
from lorasweep.data.synthetic.dialect import load as load_dialect
from lorasweep.methods.fullft import FullFT
from tests.planted import (
    CURVATURE,
    FULL,
    GAIN,
    LORA,
    World,
    arms,
    around,
    ask,
    base,
    runs,
)

pytestmark = pytest.mark.slow  # fits dozens of curves

LOW = {"rule_shift": 0.25, "shift_rank": 2, "new_exceptions": 0.0}
BEYOND = {"rule_shift": 0.25, "shift_rank": 8, "new_exceptions": 0.3}
IN_LOW = "8 symbols, change of rank 2"
IN_BEYOND = "8 symbols, change of rank 8 + 30% new exceptions"
SHARE = 0.4
"""Share of changed contexts."""
BATCH = 4


def data(**params):
    return base("tiny64", "dialect", **params)


def is_full(spec):
    return spec.method.name == "fullft"


class Gaps(World):
    """LoRA lies `gap(rank, step, exceptions)` of full fine-tuning's whole gain behind it, in the
    changed contexts only or in the unchanged ones only. `also`: loss to add, of a run and step."""

    def __init__(
        self,
        gap=lambda r, s, e: 0.0,
        part="changed",
        bits=1e4,
        best=None,
        also=lambda spec, step: 0.0,
    ):
        super().__init__(lambda spec: 1.0, best, self.apart)
        self.gap, self.part, self.bits, self.also = gap, part, bits, also

    def behind(self, spec, step):
        if is_full(spec):
            return 0.0
        exceptions = spec.plain()["dataset"]["knobs"]["new_exceptions"]
        return GAIN * math.log2(1 + spec.steps) * self.gap(spec.method.rank, step, exceptions)

    def loss(self, spec, step):
        return super().loss(spec, step) + self.behind(spec, step) + self.also(spec, step)

    def apart(self, spec):
        behind = self.behind(spec, spec.steps)
        is_new = spec.plain()["dataset"]["knobs"]["rule_shift"] > 0
        parts = dict.fromkeys(("test_nll_changed", "test_nll_unchanged"), self.nll(spec) - behind)
        share = SHARE if self.part == "changed" else 1 - SHARE
        parts[f"test_nll_{self.part}"] += behind / share
        return {"bits_generator": self.bits * is_new, "changed_share": SHARE, **parts}


def condition(out, name=IN_LOW):
    return next(c for c in out["cells"] if name in c["cell"])


def verdict(out, claim):
    (found,) = [v for v in out["verdicts"] if v["claim"] == claim]
    return found


def verdicts(out, claim):
    mine = [v for v in out["verdicts"] if v["claim"] == claim]
    return {v["group"].split(", ", 1)[1]: v["outcome"] for v in mine}


def ask_regime(world, *novelties, ranks=(1, 8), steps=256, seeds=range(4), also=(), **changes):
    common = {"steps": steps, "batch_size": BATCH, "seeds": seeds, **changes}
    specs = [spec for params in novelties for spec in arms(data(**params), ranks, **common)]
    return ask("regime", world, [*specs, *also])[0]


def test_the_boundary_comes_back_by_condition_and_rank():
    """An eighth of tiny64's width is rank 8: better than full fine-tuning where only rules are new
    (on unchanged contexts), behind where exceptions are new; rank 1 is behind and falls back."""

    def gap(rank, step, exceptions):
        if exceptions:
            return 0.12
        return -0.02 if rank == 8 else 0.04 + 0.03 * math.log2(step / 64)

    out = ask_regime(Gaps(gap, part="unchanged"), LOW, BEYOND)
    for claim in ("low", "better", "unchanged"):
        assert verdicts(out, claim) == {IN_LOW: "SUPPORTED"}
    assert verdicts(out, "beyond") == {IN_BEYOND: "SUPPORTED"}
    assert verdicts(out, "growth")[IN_LOW] == "SUPPORTED"
    assert condition(out)["rank_needed"] == [1.0, 8.0]
    assert condition(out, IN_BEYOND)["rank_needed"] == [8.0, None]
    found = {r["rank"]: r["regret_percent"]["value"] for r in condition(out)["ranks"]}
    assert found == pytest.approx({8: -2, 1: 10}, abs=0.4)


def test_growth_at_all_ranks_is_open_while_one_rank_has_no_interval():
    (growth,) = [e for e in regime.ESTIMANDS if e.name == "gap_growth_high_ranks"]
    unread = Estimate(0.01, n=3, flags=("unread_at_likely_rates",))
    found = growth.measure(SimpleNamespace(growths={8: Estimate(0.02, 0.01, 0.03, 3), 32: unread}))
    judged = judge("growth", {"margin": [0, 10], "expected": 0.01}, "g", found, [], 3, False)
    assert judged.outcome == "UNDECIDED" and "unread" in judged.why


def test_claims_about_the_regime_can_be_refuted():
    """Rank 8 loses a tenth where only rules are new, nothing where exceptions are; the gap shrinks."""

    world = Gaps(lambda r, step, new: 0.0 if new else 0.25 - 0.05 * math.log2(step / 64))
    out = ask_regime(world, LOW, BEYOND)
    assert verdicts(out, "low") == {IN_LOW: "REFUTED"} == verdicts(out, "better")
    assert verdicts(out, "beyond") == {IN_BEYOND: "REFUTED"}
    assert verdicts(out, "growth")[IN_LOW] == "REFUTED"
    assert [g["code"] for g in verdict(out, "unchanged")["gates"]] == ["NO_ADVANTAGE"]


@pytest.mark.parametrize(
    ("of_8", "of_16", "outcome"),
    [(0.02, 0.03, "SUPPORTED"), (0.02, -0.03, "REFUTED")],
)
def test_the_gaps_of_high_ranks_grow_only_if_each_does(of_8, of_16, outcome):
    """Rank 1 is no high rank; its gap shrinks."""
    slopes = {1: -0.05, 8: of_8, 16: of_16}
    world = Gaps(lambda r, step, e: 0.2 + slopes[r] * math.log2(step / 64))
    found = verdict(ask_regime(world, LOW, ranks=(1, 8, 16)), "growth_high")
    assert found["outcome"] == outcome
    gain = GAIN * math.log2(257)
    assert found["estimate"]["value"] == pytest.approx(2 * gain * min(of_8, of_16), abs=2e-3)


@pytest.mark.parametrize(
    ("share", "floor", "outcome"),
    [(0.6, 256, "SUPPORTED"), (1.0, 32, "REFUTED"), (1.3, 256, "REFUTED")],
)
def test_a_floor_is_told_from_slower_learning(share, floor, outcome):
    """Rank 1 learns `share` of what full fine-tuning does at each update, up to update `floor`. Its
    load is 1.9."""

    def also(spec, step):
        if is_full(spec) or spec.method.rank > 1:
            return 0.0
        return GAIN * (math.log2(1 + step) - share * math.log2(1 + min(step, floor)))

    found = verdict(ask_regime(Gaps(bits=2e4, also=also), BEYOND), "no_floor")
    assert found["outcome"] == outcome
    expected = share if floor == 256 else 0.0
    assert found["estimate"]["value"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("of_code", "outcome"), [(0.5, "SUPPORTED"), (2.0, "REFUTED")])
def test_the_first_pass_is_compared_with_the_generators_bits(of_code, outcome):
    world = Gaps()

    def results(spec):
        bits = 1e4 / of_code + 100 * math.log(spec.lr / FULL) if is_full(spec) else 1e9
        return {**world.apart(spec), "code_nats": bits * math.log(2)}

    world.more = results
    found = verdict(ask_regime(world, LOW, steps=24), "first_pass")
    assert found["outcome"] == outcome
    assert found["estimate"]["value"] == pytest.approx(of_code, rel=0.02)


@pytest.mark.parametrize(
    ("gaps", "bits", "expected"),
    [
        ({1: -0.03, 8: -0.03}, 1e4, {"better": "SUPPORTED", "unchanged": "REFUTED"}),
        # A load of 0.96 for rank 1 of tiny64 (5,216 parameters), of 0.48 for rank 2
        ({1: 0.1, 2: 0.1, 4: 0.0}, 1e4, {"fits": "REFUTED"}),
        # A load of 1.5 for rank 2, and of 0.7 for rank 4
        ({1: 0.2, 2: 0.1, 4: 0.05}, 3e4, {"overfull": "SUPPORTED"}),
        ({1: 0.2, 2: 0.0, 4: 0.05}, 3e4, {"overfull": "REFUTED"}),
    ],
)
def test_ranks_are_judged_at_their_load(gaps, bits, expected):
    out = ask_regime(Gaps(lambda r, s, e: gaps[r], bits=bits), LOW, ranks=tuple(gaps), steps=24)
    assert {claim: verdicts(out, claim)[IN_LOW] for claim in expected} == expected
    loads = {r["rank"]: r["load"] for r in condition(out)["ranks"]}
    assert loads == pytest.approx({r: bits / (2 * 5216 * r) for r in gaps})


def test_full_fine_tuning_of_loras_matrices_is_a_control_and_no_rank():
    """Its regret is 3% of the gain, and LoRA has none."""

    def restricted(spec, step):
        control = is_full(spec) and spec.method.scope == "matrices"
        return control * 0.03 * GAIN * math.log2(1 + spec.steps)

    common = {"steps": 31, "batch_size": BATCH}
    control = runs(data(**LOW), FullFT(scope="matrices"), around(FULL), **common)
    out = ask_regime(Gaps(also=restricted), LOW, also=control, steps=31)
    assert verdicts(out, "same_matrices") == {IN_LOW: "REFUTED"}
    gap = verdict(out, "same_matrices")["estimate"]["value"]
    assert gap == pytest.approx(0.03 * GAIN * 5, abs=2e-3)
    assert verdicts(out, "low") == {IN_LOW: "SUPPORTED"}
    assert [r["rank"] for r in condition(out)["ranks"]] == [1, 8]


def test_the_parts_of_no_gap_are_none_where_the_valley_is_no_parabola():
    """LoRA's optimum lies between two tried LRs, and its valley is asymmetric."""

    def best(spec, step):
        return FULL if is_full(spec) else 1.41 * LORA

    def asymmetric(spec, step):
        off = math.log(spec.lr / best(spec, step))
        return 0.16 * float(linex(np.array(off), 0.7)) - CURVATURE * off**2

    out = ask_regime(Gaps(best=best, also=asymmetric), LOW, steps=12)
    for rank in condition(out)["ranks"]:
        parts = rank["parts_nats"]
        assert abs(parts["changed"] + parts["unchanged"] - rank["gap_nats"]["value"]) < 3e-4
        assert max(map(abs, parts.values())) < 4e-4


def test_where_nothing_is_new_no_claim_of_load_is_made_and_missing_conditions_are_named():
    out = ask_regime(Gaps(), {"rule_shift": 0.0, "new_exceptions": 0.0})
    assert verdicts(out, "nothing") == {"nothing new": "SUPPORTED"}
    absent = [v for v in out["verdicts"] if v["group"] == "no cell"]
    assert {v["claim"] for v in absent} == {v["claim"] for v in out["verdicts"]} - {"nothing"}
    assert len(absent) >= 10 and {v["outcome"] for v in absent} == {"UNDECIDED"}


def test_conditions_of_other_lengths_are_told_apart_and_two_seeds_bound_no_rank():
    two = {"batch_size": BATCH, "seeds": range(2)}
    longer = arms(data(**LOW), (1, 8), steps=24, **two)
    out = ask_regime(Gaps(), LOW, steps=12, seeds=range(2), also=longer)
    groups = {v["group"] for v in out["verdicts"]} - {"no cell", "tiny64, all cells"}
    assert sorted(g.rsplit(", ", 1)[1] for g in groups) == ["12 updates", "24 updates"]
    assert [c["rank_needed"] for c in out["cells"]] == [[0.0, None]] * 2
    assert all(r["gap_nats"]["high"] is not None for c in out["cells"] for r in c["ranks"])


def test_an_optimum_at_the_edge_and_a_schedule_leave_no_nan():
    """Full fine-tuning's optimum lies far above the LRs tried: its gain is not known."""
    world = Gaps(best=lambda spec, step: 20 * FULL if is_full(spec) else LORA)
    out = ask_regime(world, LOW, steps=24, schedule="linear")
    json.dumps(out, allow_nan=False)
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

    out = ask_regime(Harder(lambda r, step, e: 0.1), LOW)
    grown = verdict(out, "growth")
    assert grown["estimate"]["value"] == pytest.approx(0, abs=2e-3)
    assert grown["outcome"] == "UNDECIDED"


def test_bits_are_counted_three_ways_and_by_full_fine_tuning_alone():
    """Full fine-tuning at its optimum codes the rows in 60,000 bits, of which 50,000 are entropy:
    64 symbols a row, the first three without a loss. Rank 1 of tiny64 has
    4 x (2 x 128 + 2 x 80 + 3 x 288) + 96 = 5,216 parameters."""
    world, rows = Gaps(lambda r, s, e: {1: 0.2, 2: 0.1, 4: 0.0}[r]), 24 * BATCH
    floor = {"floor_nats": 50_000 * math.log(2) / (rows * 61)}

    def results(spec):
        bits = 60_000 + 2_000 * math.log(spec.lr / FULL) if is_full(spec) else 1e9
        return {**world.apart(spec), "code_nats": bits * math.log(2), **floor}

    world.more = results
    found = condition(ask_regime(world, LOW, ranks=(1, 2, 4), steps=24))
    expected = {"generator": 1e4, "first_pass": 6e4, "above_floor": 1e4}
    assert found["bits"] == pytest.approx(expected, rel=0.02)
    for r in found["ranks"]:
        loads = {count: bits / (2 * 5216 * r["rank"]) for count, bits in expected.items()}
        assert r["loads"] == pytest.approx(loads, rel=0.02)
    rank = found["rank_interpolated"]["value"]  # regret passes 5% between ranks 2 and 4
    assert 2 < rank < 4
    needed = found["loads_needed"]["first_pass"]["value"]
    assert needed == pytest.approx(6e4 / (2 * 5216 * rank), rel=0.02)


def test_the_first_pass_ends_where_rows_come_again():
    """48 rows, seen twice in 24 updates of 4; each costs one bit the first time, and half after."""

    class Repeated(Gaps):
        def apart(self, spec):
            return {**super().apart(spec), "n_train": 48, "code_nats": 72 * math.log(2)}

        def curve(self, spec):
            seen = [(p, p["step"] * BATCH) for p in super().curve(spec)]
            cost = [(p, n, min(n, 48) + max(0, n - 48) / 2) for p, n in seen]
            return [{**p, "examples": n, "code_nats": c * math.log(2)} for p, n, c in cost]

    found = condition(ask_regime(Repeated(), LOW, steps=24))
    assert found["bits"]["first_pass"] == pytest.approx(48)


def test_symbols_without_a_full_context_bear_no_loss(compose):
    spec = compose("model=tiny64", "dataset=dialect_shift").points[0].spec.dataset
    rows = load_dialect(spec).train(0, 0, 4)
    assert sum(int(row.loss.sum()) for row in rows) == 4 * (spec.max_length - UNSCORED)
