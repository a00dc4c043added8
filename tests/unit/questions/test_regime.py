"""`regime` on planted runs: regret where little and where much is new."""

import json
import math

import numpy as np
import pytest

from analysis.measures.regret import UNSCORED
from analysis.optimum.valley import linex
from lorasweep.data.synthetic.dialect import load as load_dialect
from lorasweep.methods.fullft import FullFT
from tests.planted import CURVATURE, FULL, GAIN, LORA, World, arms, around, ask, base, runs

pytestmark = pytest.mark.slow  # fits dozens of curves

LOW = {"rule_shift": 0.25, "shift_rank": 2, "new_exceptions": 0.0}
BEYOND = {"rule_shift": 0.25, "shift_rank": 8, "new_exceptions": 0.3}
NULL = {"rule_shift": 0.0, "new_exceptions": 0.0}
SHARE = 0.4
"""Share of changed contexts."""
ROWS, BATCH = 256 * 4, 4


def data(**params):
    return base("tiny64", "dialect", **params)


def params(spec):
    return spec.plain()["dataset"]["knobs"]


class Gaps(World):
    """Full fine-tuning gains GAIN a doubling; LoRA lies `gap(rank, step, exceptions)` of the whole
    gain behind it, in the changed contexts only or in the unchanged ones only."""

    def __init__(self, gap, part="changed", bits=1e4):
        super().__init__(lambda spec: 1.0, more=self.results)
        self.gap, self.part, self.bits = gap, part, bits

    def behind(self, spec, step):
        if spec.method.name == "fullft":
            return 0.0
        exceptions = params(spec)["new_exceptions"]
        whole = GAIN * math.log2(1 + spec.steps)
        return whole * self.gap(spec.method.rank, step, exceptions)

    def loss(self, spec, step):
        return super().loss(spec, step) + self.behind(spec, step)

    def results(self, spec):
        behind, common = self.behind(spec, spec.steps), self.nll(spec)
        common -= behind
        apart = {"changed": SHARE, "unchanged": 1 - SHARE}
        extra = {k: behind / share if k == self.part else 0.0 for k, share in apart.items()}
        return {
            "bits_generator": self.bits if params(spec)["rule_shift"] else 0.0,
            "changed_share": SHARE,
            **{f"test_nll_{k}": common + more for k, more in extra.items()},
        }


def condition(out, name):
    return next(c for c in out["cells"] if name in c["cell"])


def verdicts(out, claim):
    mine = [v for v in out["verdicts"] if v["claim"] == claim]
    return {v["group"].split(", ", 1)[1]: v["outcome"] for v in mine}


def ask_regime(world, *novelties, ranks=(1, 8), steps=256, seeds=range(4), also=(), **changes):
    specs = [
        spec
        for params in novelties
        for spec in arms(
            data(**params), ranks, steps=steps, batch_size=BATCH, seeds=seeds, **changes
        )
    ]
    return ask("regime", world, [*specs, *also])[0]


def test_the_boundary_comes_back_by_condition_and_rank():
    """An eighth of tiny64's width is rank 8: better than full fine-tuning where only rules are new
    (on unchanged contexts), behind where exceptions are new; rank 1 is behind and falls back."""

    def gap(rank, step, exceptions):
        if exceptions:
            return 0.12
        return -0.02 if rank == 8 else 0.04 + 0.03 * math.log2(step / 64)

    out = ask_regime(Gaps(gap, part="unchanged"), LOW, BEYOND)
    low, beyond = "8 symbols, change of rank 2", "8 symbols, change of rank 8 + 30% new exceptions"
    assert verdicts(out, "low") == {low: "SUPPORTED"}
    assert verdicts(out, "beyond") == {beyond: "SUPPORTED"}
    assert verdicts(out, "better") == {low: "SUPPORTED"}
    assert verdicts(out, "unchanged") == {low: "SUPPORTED"}
    assert verdicts(out, "growth")[low] == "SUPPORTED"
    assert condition(out, low)["rank_needed"] == [1.0, 8.0]
    assert condition(out, beyond)["rank_needed"] == [8.0, None]
    found = {r["rank"]: r["regret_percent"]["value"] for r in condition(out, low)["ranks"]}
    assert found[8] == pytest.approx(-2, abs=0.4) and found[1] == pytest.approx(10, abs=0.4)


def test_full_fine_tuning_of_loras_matrices_is_a_control_and_no_rank():
    """Its regret is 3% of the gain, and LoRA has none."""
    world = Gaps(lambda rank, step, exceptions: 0.0)
    same = world.behind

    def behind(spec, step):
        restricted = spec.method.name == "fullft" and spec.method.scope == "matrices"
        return 0.03 * GAIN * math.log2(1 + spec.steps) if restricted else same(spec, step)

    world.behind = behind
    world.rho = lambda spec: 1.0
    common = {"steps": 256, "batch_size": BATCH}
    control = runs(data(**LOW), FullFT(scope="matrices"), around(FULL), **common)
    out = ask_regime(world, LOW, also=control)
    low = "8 symbols, change of rank 2"
    assert verdicts(out, "same_matrices") == {low: "REFUTED"}
    (gap,) = [v["estimate"] for v in out["verdicts"] if v["claim"] == "same_matrices"]
    assert gap["value"] == pytest.approx(0.03 * GAIN * 8, abs=2e-3)
    assert verdicts(out, "low") == {low: "SUPPORTED"}
    assert [r["rank"] for r in condition(out, low)["ranks"]] == [1, 8]


def test_claims_about_the_regime_can_be_refuted():
    """Rank 8 loses a tenth where only rules are new, nothing where exceptions are; the gap shrinks."""

    def gap(rank, step, exceptions):
        return 0.0 if exceptions else 0.25 - 0.05 * math.log2(step / 64)

    out = ask_regime(Gaps(gap), LOW, BEYOND)
    low, beyond = "8 symbols, change of rank 2", "8 symbols, change of rank 8 + 30% new exceptions"
    assert verdicts(out, "low") == {low: "REFUTED"} == verdicts(out, "better")
    assert verdicts(out, "beyond") == {beyond: "REFUTED"}
    assert verdicts(out, "growth")[low] == "REFUTED"
    (place,) = [v for v in out["verdicts"] if v["claim"] == "unchanged"]
    assert place["outcome"] == "UNDECIDED" and "no advantage to place" in place["why"]


def test_an_advantage_on_changed_contexts_is_placed_there():
    out = ask_regime(Gaps(lambda r, s, e: -0.03), LOW)
    assert verdicts(out, "better") == {"8 symbols, change of rank 2": "SUPPORTED"}
    assert verdicts(out, "unchanged") == {"8 symbols, change of rank 2": "REFUTED"}


def test_the_parts_of_no_gap_are_none_where_the_valley_is_no_parabola():
    """LoRA's optimum lies between two tried LRs, and its valley is asymmetric."""
    world = Gaps(lambda r, s, e: 0.0)
    world.best = lambda spec, step: FULL if spec.method.name == "fullft" else 1.41 * LORA
    parabola = world.loss

    def loss(spec, step):
        off = math.log(spec.lr / world.best(spec, step))
        return parabola(spec, step) + 0.16 * float(linex(np.array(off), 0.7)) - CURVATURE * off**2

    world.loss = loss
    out = ask_regime(world, LOW, steps=12)
    for rank in condition(out, "8 symbols")["ranks"]:
        parts = rank["parts_nats"]
        assert abs(parts["changed"] + parts["unchanged"] - rank["gap_nats"]["value"]) < 3e-4
        assert max(map(abs, parts.values())) < 4e-4


def test_a_rank_that_fits_by_two_bits_a_parameter_is_judged_at_its_load():
    """1e4 bits are a load of 0.96 for rank 1 of tiny64 (5,216 parameters) and 0.48 for rank 2."""
    out = ask_regime(Gaps(lambda r, s, e: 0.1 if r < 4 else 0.0), LOW, ranks=(1, 2, 4))
    loads = {r["rank"]: r["load"] for r in condition(out, "8 symbols")["ranks"]}
    assert loads[1] == pytest.approx(2 * loads[2], rel=1e-9) and loads[2] <= 0.5 < loads[1]
    assert verdicts(out, "fits") == {"8 symbols, change of rank 2": "REFUTED"}


@pytest.mark.parametrize(("gap", "outcome"), [(0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_a_rank_without_room_by_two_bits_a_parameter_is_judged_as_well(gap, outcome):
    """3e4 bits are a load of 1.5 for rank 2, and of 0.7 for rank 4."""
    world = Gaps(lambda r, s, e: {1: 0.2, 2: gap, 4: 0.05}[r], bits=3e4)
    out = ask_regime(world, LOW, ranks=(1, 2, 4))
    assert verdicts(out, "overfull") == {"8 symbols, change of rank 2": outcome}


def test_where_nothing_is_new_no_claim_of_load_is_made_and_missing_conditions_are_said():
    out = ask_regime(Gaps(lambda r, s, e: 0.0), NULL)
    assert verdicts(out, "nothing") == {"nothing new": "SUPPORTED"}
    missing = [v for v in out["verdicts"] if v["group"] == "no cell"]
    assert {v["claim"] for v in missing} == {v["claim"] for v in out["verdicts"]} - {"nothing"}
    assert len(missing) >= 10
    assert all(v["outcome"] == "UNDECIDED" for v in missing)


@pytest.mark.parametrize("arm", ["fullft", "lora"])
def test_a_noisy_condition_is_shown_and_not_judged(arm):
    """Full fine-tuning's noise alone says so: what is judged must not choose where it is judged."""
    world = Gaps(lambda r, s, e: 0.0)
    quiet = world.loss

    def loud(spec, step):
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 0.03)
        return quiet(spec, step) + (noise if spec.method.name == arm else 0.0)

    world.loss = loud
    out = ask_regime(world, LOW, steps=12)
    low = next(v for v in out["verdicts"] if v["claim"] == "low")
    assert low["outcome"] == "UNDECIDED"
    assert ("standard error" in low["why"]) == (arm == "fullft")


def test_an_advantage_that_gets_smaller_is_no_growing_gap_and_a_sixteenth_no_eighth():
    """LoRA is better at both lengths, by less at the end; the highest rank is 4 of a width of 64."""
    world = Gaps(lambda r, step, e: -0.06 + 0.03 * math.log2(step / 128))
    out = ask_regime(world, LOW, ranks=(1, 4))
    why = {v["claim"]: v["why"] for v in out["verdicts"] if v["outcome"] == "UNDECIDED"}
    assert "no gap to grow" in why["growth"]
    assert all("no curve of a rank of 1/8" in why[c] for c in ("low", "better", "unchanged"))
    assert verdicts(out, "fits") == {"8 symbols, change of rank 2": "SUPPORTED"}


def test_conditions_of_other_lengths_are_told_apart_and_two_seeds_bound_no_rank():
    two = {"batch_size": BATCH, "seeds": range(2)}
    longer = arms(data(**LOW), (1, 8), steps=24, **two)
    out = ask_regime(Gaps(lambda r, s, e: 0.0), LOW, steps=12, seeds=range(2), also=longer)
    groups = {v["group"] for v in out["verdicts"]} - {"no cell", "tiny64, all cells"}
    assert sorted(g.rsplit(", ", 1)[1] for g in groups) == ["12 updates", "24 updates"]
    assert [c["rank_needed"] for c in out["cells"]] == [[0.0, None]] * 2
    assert all(r["gap_nats"]["high"] is not None for c in out["cells"] for r in c["ranks"])


def test_an_optimum_at_the_edge_and_a_schedule_leave_no_number_that_is_none():
    """Full fine-tuning's optimum lies far above the LRs tried: its gain is not known."""
    world = Gaps(lambda r, s, e: 0.0)
    world.best = lambda spec, step: 20 * FULL if spec.method.name == "fullft" else LORA
    out = ask_regime(world, LOW, schedule="linear")
    json.dumps(out, allow_nan=False)
    assert [r["gain_nats"] for r in condition(out, "8 symbols")["ranks"]] == [None, None]
    assert all(v["outcome"] == "UNDECIDED" for v in out["verdicts"])


def test_growth_is_read_on_the_same_held_out_rows_at_both_lengths():
    """The final rows are harder for LoRA by 0.05 nats; on the rows of the way the gap is constant."""
    world = Gaps(lambda r, step, e: 0.1)
    on_the_way = world.curve

    def loss(spec, step):
        harder = 0.05 if step == spec.steps and spec.method.name == "lora" else 0.0
        return Gaps.loss(world, spec, step) + harder

    def curve(spec):
        points = on_the_way(spec)
        points[-1]["test_nll_curve"] = Gaps.loss(world, spec, spec.steps)
        return points

    world.loss, world.curve = loss, curve
    out = ask_regime(world, LOW)
    grown = next(v for v in out["verdicts"] if v["claim"] == "growth")
    assert grown["estimate"]["value"] == pytest.approx(0, abs=2e-3)
    assert grown["outcome"] == "UNDECIDED"


def test_bits_are_counted_three_ways_and_by_full_fine_tuning_alone():
    """Full fine-tuning at its optimum codes the rows in 60,000 bits, of which 50,000 are entropy:
    64 symbols a row, the first three without a loss. Rank 1 of tiny64 has
    4 x (2 x 128 + 2 x 80 + 3 x 288) + 96 = 5,216 parameters."""
    world = Gaps(lambda r, s, e: {1: 0.2, 2: 0.1, 4: 0.0}[r])
    apart = world.results

    def results(spec):
        assert spec.batch_size * spec.steps == ROWS
        bits = 60_000 + 2_000 * math.log(spec.lr / FULL) if spec.method.name == "fullft" else 1e9
        floor = 50_000 * math.log(2) / (ROWS * 61)
        return {**apart(spec), "code_nats": bits * math.log(2), "floor_nats": floor}

    world.more = results
    found = condition(ask_regime(world, LOW, ranks=(1, 2, 4)), "8 symbols")
    expected = {"generator": 1e4, "first_pass": 6e4, "above_floor": 1e4}
    assert found["bits"] == pytest.approx(expected, rel=0.02)
    for r in found["ranks"]:
        loads = {count: bits / (2 * 5216 * r["rank"]) for count, bits in expected.items()}
        assert r["loads"] == pytest.approx(loads, rel=0.02)
    # Regret falls from 10% at rank 2 to 0 at rank 4 and passes 5% between them.
    rank = found["rank_interpolated"]["value"]
    assert 2 < rank < 4
    needed = found["loads_needed"]["first_pass"]["value"]
    assert needed == pytest.approx(6e4 / (2 * 5216 * rank), rel=0.02)


def test_the_first_pass_ends_where_rows_come_again():
    """48 rows, seen twice in 24 updates of 4; each costs one bit the first time, and half after."""
    world = Gaps(lambda r, s, e: 0.0)
    apart, on_the_way = world.results, world.curve
    world.more = lambda spec: {**apart(spec), "n_train": 48, "code_nats": 72 * math.log(2)}

    def curve(spec):
        rows = [(p, p["step"] * spec.batch_size) for p in on_the_way(spec)]
        cost = [(p, n, min(n, 48) + max(0, n - 48) / 2) for p, n in rows]
        return [{**p, "examples": n, "code_nats": c * math.log(2)} for p, n, c in cost]

    world.curve = curve
    found = condition(ask_regime(world, LOW, steps=24), "8 symbols")
    assert found["bits"]["first_pass"] == pytest.approx(48)


def test_symbols_without_a_full_context_bear_no_loss(compose):
    spec = compose("model=tiny64", "dataset=dialect_shift").points[0].spec.dataset
    rows = load_dialect(spec).train(0, 0, 4)
    assert sum(int(row.loss.sum()) for row in rows) == 4 * (spec.max_length - UNSCORED)
