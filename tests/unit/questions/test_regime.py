"""`regime` on planted runs: what LoRA gives up in cells with little and with much that is new."""

import json
import math

import numpy as np
import pytest

from analysis.optimum.valley import linex
from tests.planted import CURVATURE, FULL, GAIN, LORA, World

pytestmark = pytest.mark.slow  # fits hundreds of curves

SHORT, LONGER = (f"{{steps:{n},knobs:{{rule_shift:0.25,shift_rank:2}}}}" for n in (12, 24))
LOW, BEYOND, NULL = (
    "{steps:256,knobs:{rule_shift:0.25,shift_rank:2}}",
    "{steps:256,knobs:{rule_shift:0.25,shift_rank:8,new_exceptions:0.3}}",
    "{steps:256,knobs:{rule_shift:0.0}}",
)
FULL_LRS, LORA_LRS = ([best * 2.0**k for k in range(-3, 4)] for best in (FULL, LORA))
SHARE = 0.4
"""Share of changed contexts."""


class Cells(World):
    """Full fine-tuning gains GAIN a doubling; LoRA lies `gap(rank, step, exceptions)` of the whole
    gain behind it, in the changed contexts only or in the unchanged ones only."""

    def __init__(self, gap, part="changed", bits=1e4):
        super().__init__(lambda spec: 1.0, more=self.results)
        self.gap, self.part, self.bits = gap, part, bits

    def behind(self, spec, step):
        if spec.method.name == "fullft":
            return 0.0
        exceptions = spec.dataset.generator_params["new_exceptions"]
        whole = GAIN * math.log2(1 + spec.steps)
        return whole * self.gap(spec.method.rank, step, exceptions)

    def loss(self, spec, step):
        return super().loss(spec, step) + self.behind(spec, step)

    def results(self, spec):
        behind, common = self.behind(spec, spec.steps), self.nll(spec)
        common -= behind
        apart = {"changed": SHARE, "unchanged": 1 - SHARE}
        extra = {k: behind / share if k == self.part else 0.0 for k, share in apart.items()}
        if callable(self.bits):
            bits = self.bits(*new_of(spec))
            return {"bits_generator": bits, "bits_learnable": bits}
        return {
            "bits_generator": self.bits if spec.dataset.generator_params["rule_shift"] else 0.0,
            "changed_share": SHARE,
            **{f"test_nll_{k}": common + more for k, more in extra.items()},
        }


def new_of(spec):
    """Symbols with changed rules, and the rank of the change."""
    params = spec.dataset.generator_params
    return round(32 * params["rule_shift"]), int(params["shift_rank"])


class Needing(Cells):
    """LoRA's regret falls with its rank, to what is allowed at `needed(symbols, change of rank of change)`."""

    def __init__(self, needed):
        super().__init__(None, bits=lambda m, k: 10.0 * m * k)
        self.needed = needed

    def behind(self, spec, step):
        if spec.method.name == "fullft":
            return 0.0
        m, k = new_of(spec)
        whole = GAIN * math.log2(1 + spec.steps)
        moved = np.random.default_rng([spec.seed, m, k]).normal(0, 0.1)
        return whole * (0.05 + 0.02 * (math.log2(self.needed(m, k) / spec.method.rank) + moved))


def cell(out, name):
    return next(c for c in out["cells"] if name in c["cell"])


def verdicts(out, claim):
    return {
        v["group"].split(", ", 1)[1]: v["outcome"] for v in out["verdicts"] if v["claim"] == claim
    }


def ask_regime(ask, world, *cells, ranks="[1,8]", also=()):
    arms = []
    for arm, rates in (("fullft", FULL_LRS), ("lora", LORA_LRS)):
        shown = [f"{c[:-1]},lr:{rates}}}" for c in cells]
        arms.append(f"sweep.at.smoke.{arm}=[{','.join(shown)}]")
    return ask("regime", world, *arms, f"sweep.at.smoke.ranks={ranks}", *also)[0]


def test_the_boundary_comes_back_by_cell_and_rank(ask):
    """An eighth of tiny64's width is rank 8: better than full fine-tuning where only rules are new
    (on unchanged contexts), behind where exceptions are new; rank 1 is behind and falls back."""

    def gap(rank, step, exceptions):
        if exceptions:
            return 0.12
        return -0.02 if rank == 8 else 0.04 + 0.03 * math.log2(step / 64)

    out = ask_regime(ask, Cells(gap, part="unchanged"), LOW, BEYOND)
    low, beyond = "8 symbols, change of rank 2", "8 symbols, change of rank 8 + 30% new exceptions"
    assert verdicts(out, "low") == {low: "SUPPORTED"}
    assert verdicts(out, "beyond") == {beyond: "SUPPORTED"}
    assert verdicts(out, "better") == {low: "SUPPORTED"}
    assert verdicts(out, "unchanged") == {low: "SUPPORTED"}
    assert verdicts(out, "growth")[low] == "SUPPORTED"
    assert cell(out, low)["rank_needed"] == [1.0, 8.0]
    assert cell(out, beyond)["rank_needed"] == [8.0, None]
    found = {r["rank"]: r["regret_percent"]["value"] for r in cell(out, low)["ranks"]}
    assert found[8] == pytest.approx(-2, abs=0.4) and found[1] == pytest.approx(10, abs=0.4)


def test_full_fine_tuning_of_loras_matrices_is_a_control_and_no_rank(ask):
    """It gives up 3% of the gain, and LoRA nothing."""
    world = Cells(lambda rank, step, exceptions: 0.0)
    same = world.behind

    def behind(spec, step):
        restricted = spec.method.name == "fullft" and spec.method.scope == "matrices"
        return 0.03 * GAIN * math.log2(1 + spec.steps) if restricted else same(spec, step)

    world.behind = behind
    world.rho = lambda spec: 1.0
    control = f"{LOW[:-1]},scope:matrices,lr:{FULL_LRS}}}"
    full = f"{LOW[:-1]},lr:{FULL_LRS}}}"
    out = ask_regime(ask, world, LOW, also=[f"sweep.at.smoke.fullft=[{full},{control}]"])
    low = "8 symbols, change of rank 2"
    assert verdicts(out, "same_matrices") == {low: "REFUTED"}
    (gap,) = [v["estimate"] for v in out["verdicts"] if v["claim"] == "same_matrices"]
    assert gap["value"] == pytest.approx(0.03 * GAIN * 8, abs=2e-3)
    assert verdicts(out, "low") == {low: "SUPPORTED"}
    assert [r["rank"] for r in cell(out, low)["ranks"]] == [1, 8]


def test_claims_about_the_regime_can_be_refuted(ask):
    """Rank 8 gives up a tenth where only rules are new, nothing where exceptions are; the gap
    shrinks."""

    def gap(rank, step, exceptions):
        return 0.0 if exceptions else 0.25 - 0.05 * math.log2(step / 64)

    out = ask_regime(ask, Cells(gap), LOW, BEYOND)
    low, beyond = "8 symbols, change of rank 2", "8 symbols, change of rank 8 + 30% new exceptions"
    assert verdicts(out, "low") == {low: "REFUTED"} == verdicts(out, "better")
    assert verdicts(out, "beyond") == {beyond: "REFUTED"}
    assert verdicts(out, "growth")[low] == "REFUTED"
    (place,) = [v for v in out["verdicts"] if v["claim"] == "unchanged"]
    assert place["outcome"] == "UNDECIDED" and "no advantage to place" in place["why"]


def test_an_advantage_on_changed_contexts_is_placed_there(ask):
    out = ask_regime(ask, Cells(lambda r, s, e: -0.03), LOW)
    assert verdicts(out, "better") == {"8 symbols, change of rank 2": "SUPPORTED"}
    assert verdicts(out, "unchanged") == {"8 symbols, change of rank 2": "REFUTED"}


def test_the_parts_of_no_gap_are_none_where_the_valley_is_no_parabola(ask):
    """LoRA's best rate lies between two tried ones, and its valley is asymmetric."""
    world = Cells(lambda r, s, e: 0.0)
    world.best = lambda spec, step: FULL if spec.method.name == "fullft" else 1.41 * LORA
    parabola = world.loss

    def loss(spec, step):
        off = math.log(spec.lr / world.best(spec, step))
        return parabola(spec, step) + 0.16 * float(linex(np.array(off), 0.7)) - CURVATURE * off**2

    world.loss = loss
    out = ask_regime(ask, world, SHORT)
    for rank in cell(out, "8 symbols")["ranks"]:
        parts = rank["parts_nats"]
        assert abs(parts["changed"] + parts["unchanged"] - rank["gap_nats"]["value"]) < 3e-4
        assert max(map(abs, parts.values())) < 4e-4


def test_a_rank_that_fits_by_two_bits_a_parameter_is_judged_at_its_load(ask):
    """1e4 bits are a load of 0.99 for rank 1 of tiny64 (5,072 parameters) and 0.5 for rank 2."""
    out = ask_regime(ask, Cells(lambda r, s, e: 0.1 if r < 4 else 0.0), LOW, ranks="[1,2,4]")
    loads = {r["rank"]: r["load"] for r in cell(out, "8 symbols")["ranks"]}
    assert loads[1] == pytest.approx(2 * loads[2], rel=1e-9) and loads[2] <= 0.5 < loads[1]
    assert verdicts(out, "fits") == {"8 symbols, change of rank 2": "REFUTED"}


@pytest.mark.parametrize(("gap", "outcome"), [(0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_a_rank_without_room_by_two_bits_a_parameter_is_judged_as_well(ask, gap, outcome):
    """3e4 bits are a load of 1.5 for rank 2, and of 0.7 for rank 4."""
    world = Cells(lambda r, s, e: {1: 0.2, 2: gap, 4: 0.05}[r], bits=3e4)
    out = ask_regime(ask, world, LOW, ranks="[1,2,4]")
    assert verdicts(out, "overfull") == {"8 symbols, change of rank 2": outcome}


def test_where_nothing_is_new_no_claim_of_load_is_made_and_missing_cells_are_said(ask):
    out = ask_regime(ask, Cells(lambda r, s, e: 0.0), NULL)
    assert verdicts(out, "nothing") == {"nothing new": "SUPPORTED"}
    missing = [v for v in out["verdicts"] if v["group"] == "no cell"]
    assert {v["claim"] for v in missing} == {v["claim"] for v in out["verdicts"]} - {"nothing"}
    assert len(missing) >= 10
    assert all(v["outcome"] == "UNDECIDED" for v in missing)


@pytest.mark.parametrize("arm", ["fullft", "lora"])
def test_a_noisy_cell_is_shown_and_not_judged(ask, arm):
    """Full fine-tuning's noise alone says so: what is judged must not choose where it is judged."""
    world = Cells(lambda r, s, e: 0.0)
    quiet = world.loss

    def loud(spec, step):
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 0.03)
        return quiet(spec, step) + (noise if spec.method.name == arm else 0.0)

    world.loss = loud
    out = ask_regime(ask, world, SHORT)
    low = next(v for v in out["verdicts"] if v["claim"] == "low")
    assert low["outcome"] == "UNDECIDED"
    assert ("standard error" in low["why"]) == (arm == "fullft")


def test_an_advantage_that_gets_smaller_is_no_growing_gap_and_a_sixteenth_no_eighth(ask):
    """LoRA is better at both lengths, by less at the end; the highest rank is 4 of a width of 64."""
    world = Cells(lambda r, step, e: -0.06 + 0.03 * math.log2(step / 128))
    out = ask_regime(ask, world, LOW, ranks="[1,4]")
    why = {v["claim"]: v["why"] for v in out["verdicts"] if v["outcome"] == "UNDECIDED"}
    assert "no gap to grow" in why["growth"]
    assert all("no curve of a rank of 1/8" in why[c] for c in ("low", "better", "unchanged"))
    assert verdicts(out, "fits") == {"8 symbols, change of rank 2": "SUPPORTED"}


def test_cells_of_other_lengths_are_told_apart_and_two_seeds_bound_no_rank(ask):
    few = ["sweep.at.smoke.fresh_seeds=[1]"]
    out = ask_regime(ask, Cells(lambda r, s, e: 0.0), SHORT, LONGER, also=few)
    groups = {v["group"] for v in out["verdicts"]} - {
        "no cell",
        "tiny64, all cells",
        "tiny64, only rules new",
    }
    assert sorted(g.rsplit(", ", 1)[1] for g in groups) == ["12 updates", "24 updates"]
    assert [c["rank_needed"] for c in out["cells"]] == [[0.0, None]] * 2
    assert all(r["gap_nats"]["high"] is not None for c in out["cells"] for r in c["ranks"])


def test_an_optimum_at_the_edge_and_a_schedule_leave_no_number_that_is_none(ask):
    """Full fine-tuning's best rate lies far above those tried: its gain is not known."""
    world = Cells(lambda r, s, e: 0.0)
    world.best = lambda spec, step: 20 * FULL if spec.method.name == "fullft" else LORA
    out = ask_regime(ask, world, LOW, also=["schedule=linear"])
    json.dumps(out, allow_nan=False)
    assert [r["gain_nats"] for r in cell(out, "8 symbols")["ranks"]] == [None, None]
    assert all(v["outcome"] == "UNDECIDED" for v in out["verdicts"])


def test_growth_is_read_on_the_same_held_out_rows_at_both_lengths(ask):
    """The final rows are harder for LoRA by 0.05 nats; on the rows of the way the gap is constant."""
    world = Cells(lambda r, step, e: 0.1)
    on_the_way = world.curve

    def loss(spec, step):
        harder = 0.05 if step == spec.steps and spec.method.name == "lora" else 0.0
        return Cells.loss(world, spec, step) + harder

    def curve(spec):
        points = on_the_way(spec)
        points[-1]["test_nll_curve"] = Cells.loss(world, spec, spec.steps)
        return points

    world.loss, world.curve = loss, curve
    out = ask_regime(ask, world, LOW)
    grown = next(v for v in out["verdicts"] if v["claim"] == "growth")
    assert grown["estimate"]["value"] == pytest.approx(0, abs=2e-3)
    assert grown["outcome"] == "UNDECIDED"


RULES = [
    f"{{steps:256,knobs:{{rule_shift:{m / 32},shift_rank:{k}}}}}" for m in (8, 32) for k in (2, 8)
]


def test_what_the_needed_rank_grows_with_comes_back(ask):
    """Here with the rank of the change alone, whatever the bits."""
    world = Needing(lambda m, k: 2.0 * (k / 2) ** 0.8)
    out = ask_regime(ask, world, *RULES, ranks="[1,2,4,8]")
    found = {v["claim"]: v for v in out["verdicts"] if v["group"].endswith("only rules new")}
    assert found["needs_bits"]["outcome"] == "UNDECIDED"
    assert found["needs_rank"]["outcome"] == "REFUTED"
    assert found["needs_rank"]["estimate"]["value"] == pytest.approx(0.8, abs=0.2)
