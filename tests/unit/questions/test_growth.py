"""The growth of a gap, by schedule, on planted runs: what was planted comes back."""

import dataclasses
import functools

import pytest

from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests import planted
from tests.planted import FULL, LORA, World, around, ask, check, is_full, runs, smoke

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


def specs(schedules=("constant", "cosine"), seeds=range(6), rank=4):
    cells = [(s, n) for s in schedules for n in (8, 64)]
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


def test_a_smaller_growth_under_a_decaying_rate_refutes_that_it_is_the_same():
    _, found = ask("growth", Behind(LESS), specs())
    check(found, same="REFUTED", grows="SUPPORTED")
    assert found["same"]["estimate"]["value"] == pytest.approx(-3, abs=0.3)


def test_without_one_schedule_or_with_two_ranks_there_is_no_answer():
    _, found = ask("growth", Behind(SAME), specs(("constant",)))
    check(found, same=("UNDECIDED", "MISSING"))
    higher = [s for s in specs(rank=8) if not is_full(s)]
    with pytest.raises(TableError, match="one rank is compared"):
        ask("growth", Behind(SAME), [*specs(), *higher])


def test_short_runs_may_have_more_seeds_than_long_ones():
    many = [s for s in specs(seeds=range(12)) if s.steps == 8 or s.seed < 5]
    _, found = ask("growth", Behind(SAME), many)
    _, few = ask("growth", Behind(SAME), [s for s in many if s.seed < 5])
    check(found, same="SUPPORTED")
    widths = [v["same"]["estimate"]["high"] - v["same"]["estimate"]["low"] for v in (found, few)]
    assert widths[0] < widths[1]
