"""The growth of a gap, by schedule, on planted runs: what was planted comes back."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from analysis.inference.rows import pick, rows_of
from analysis.questions import base
from analysis.questions.growth import BOTH, Schedules
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests import planted
from tests.planted import FULL, LORA, World, around, ask, check, is_full, planted_table, runs, smoke

SAME = {("constant", 8): -0.01, ("constant", 64): 0.03, ("cosine", 8): 0.0, ("cosine", 64): 0.04}
LESS = {**SAME, ("cosine", 64): 0.01}


class Behind(World):
    """LoRA lies a share of full fine-tuning's gain behind it: `of` (schedule, updates)."""

    def __init__(self, of):
        super().__init__(lambda spec: 1.0)
        self.of = of

    def loss(self, spec, step):
        whole = planted.START - super().loss(dataclasses.replace(spec, lr=self.best(spec, 0)), step)
        share = 0 if is_full(spec) else self.of[spec.schedule, spec.steps]
        return super().loss(spec, step) + share * whole


class Noisy(Behind):
    """Each run has an error of its own."""

    def loss(self, spec, step):
        own = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        return super().loss(spec, step) + own


def specs(schedules=("constant", "cosine"), seeds=range(6), rank=4, lengths=(8, 64)):
    cells = [(s, n) for s in schedules for n in lengths]
    arms = ((FullFT(), FULL), (LoRA(rank=rank), LORA))
    more = [functools.partial(runs, smoke(), schedule=s, steps=n) for s, n in cells]
    return [spec for run in more for m, lr in arms for spec in run(m, around(lr, 5), seeds)]


def test_growth_by_schedule_is_measured_in_percent_of_the_gain():
    out, found = ask("growth", Behind(SAME), specs())
    check(found, same="SUPPORTED", grows="SUPPORTED", grows_constant="SUPPORTED")
    assert found["same"]["estimate"]["value"] == pytest.approx(0, abs=0.3)
    assert found["grows"]["estimate"]["value"] == pytest.approx(4, abs=0.3)
    check(found, none_at_end="SUPPORTED")
    assert "| cosine | 64 |" in out["page"]


def test_growth_is_measured_from_length_to_length_so_that_a_lost_lead_is_told_from_later_losses():
    lead = {(s, n): v for s in BOTH for n, v in ((8, -0.05), (16, 0.0), (64, 0.01))}
    out, _ = ask("growth", Behind(lead), specs(lengths=(8, 16, 64)))
    every = rows_of(out, {"claims": {}})
    found = {(r.arm, r.updates, r.at): r.estimate for r in pick(every, "regret_growth_percent")}
    wanted = {(16, "since 8 updates"): 5, (64, "since 16 updates"): 1}
    assert {k: pytest.approx(e.value, abs=0.3) for k, e in found.items()} == {
        (f"lora r4, {s}", *k): v for s in BOTH for k, v in wanted.items()
    }
    last = next(line for line in out["page"].splitlines() if line.startswith("| cosine | 16 |"))
    assert "growth since the length above" in out["page"] and last.split(" | ")[-1][0] in "45"


def test_a_smaller_growth_under_a_decaying_rate_refutes_that_it_is_the_same():
    _, found = ask("growth", Behind(LESS), specs())
    check(found, same="REFUTED", grows="SUPPORTED")
    assert found["same"]["estimate"]["value"] == pytest.approx(-3, abs=0.3)


def test_without_one_schedule_or_with_two_ranks_there_is_no_answer():
    _, found = ask("growth", Behind(SAME), specs(("constant",)))
    check(found, same=("UNDECIDED", "MISSING"))
    longest = ("lora", "cosine", 64)
    left = [s for s in specs() if (s.method.name, s.schedule, s.steps) != longest]
    _, found = ask("growth", Behind(SAME), left)  # not judged at shorter lengths than the others
    check(found, same=("UNDECIDED", "MISSING"), none_at_end=("UNDECIDED", "MISSING"))
    higher = [s for s in specs(rank=8) if not is_full(s)]
    one_arm = "lora r[48].*, and lora r[48].*: only one of them can be compared"
    with pytest.raises(TableError, match=one_arm):
        ask("growth", Behind(SAME), [*specs(), *higher])
    short = [s for s in specs() if is_full(s) or s.steps < 64]
    with pytest.raises(TableError, match=one_arm):  # short runs of one rank, long ones of another
        ask("growth", Behind(SAME), [*short, *(s for s in higher if s.steps == 64)])


def test_short_runs_may_have_more_seeds_than_long_ones():
    many = [s for s in specs(seeds=range(12)) if s.steps == 8 or s.seed < 5]
    _, found = ask("growth", Behind(SAME), many)
    _, few = ask("growth", Behind(SAME), [s for s in many if s.seed < 5])
    check(found, same="SUPPORTED")
    widths = [v["same"]["estimate"]["high"] - v["same"]["estimate"]["low"] for v in (found, few)]
    assert widths[0] < widths[1]


def test_a_curve_gates_the_claims_that_rest_on_it_and_is_named_with_schedule_and_updates():
    few = [s for s in specs() if not (s.schedule == "constant" and s.steps == 8 and s.seed > 1)]
    _, found = ask("growth", Behind(SAME), few)
    check(found, same="UNDECIDED", grows_constant="UNDECIDED", grows="SUPPORTED")
    check(found, none_at_end="SUPPORTED")
    assert found["same"]["gates"][0]["place"].startswith("constant, 8 updates: ")


def test_the_optima_of_two_schedules_err_independently():
    (c,) = base.whole(Schedules)(planted_table(Noisy(SAME), specs()))

    def spread(gap):
        return float(np.std([np.mean([*by_seed.values()]) for by_seed in gap.draws]))

    parts = [spread(c.percent(64, schedule)) for schedule in BOTH]
    assert min(parts) > 0
    assert spread(c.apart(64)) == pytest.approx(math.hypot(*parts), rel=0.2)
