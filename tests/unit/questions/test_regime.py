"""`regime` on planted runs: regret where little and where much is new."""

import math

import pytest

from tests.planted import FULL, GAIN, LORA, Gaps, arms, ask, base, check, is_full, rank_of

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
    expected = 2 * GAIN * math.log2(257) * min(0.02, of_16)
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
        return GAIN * (math.log2(1 + step) - share * math.log2(1 + min(step, floor)))

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
    world.best = lambda spec, step: 20 * FULL if is_full(spec) else LORA
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
        bits = 60_000 + 2_000 * math.log(spec.lr / FULL) if is_full(spec) else 1e9
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
