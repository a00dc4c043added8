"""The question `second_model`: what the law's learning rate costs, and whether rank 16 matches."""

import dataclasses

import pytest

from analysis.measures import laws
from analysis.questions.registry import analyse
from lorasweep.config.compose import compose_request
from lorasweep.sweep.grid import second_stage
from lorasweep.sweep.request import question
from tests.planted import GAIN, World, check, is_full, planted_table

REQUEST = compose_request(["+sweep=second_model", "scale=small"])
FULL, SHAPE = 4.5e-5, (896, 32, 30)


class Second(World):
    """LoRA's best learning rate is `off` times the law's; it loses a share `behind` of the gain."""

    def __init__(self, off, behind=0.0):
        ratio = laws.ratio(*SHAPE, FULL, constants=(0.86, 4.2))
        best = {True: FULL, False: FULL * ratio * off}
        super().__init__(lambda spec: 1.0, lambda spec, step: best[is_full(spec)])
        self.behind = behind

    def loss(self, spec, step):
        lost = 0 if is_full(spec) else self.behind * GAIN * 4.95  # log2(31): the gain
        return super().loss(spec, step) + lost


def answer(world, **changes):
    points = REQUEST.points
    of = {p.id: p.spec for p in points}
    more = second_stage(points, REQUEST.sweep.replicate, lambda run: world.nll(of[run]))
    specs = [dataclasses.replace(p.spec, **changes) for p in (*points, *more)]
    found = analyse(planted_table(world, specs), question(REQUEST)).verdicts
    return {v.claim: v.plain() for v in found}


def test_a_rate_by_the_law_costs_nothing_where_the_law_holds_and_more_where_it_is_off():
    found = answer(Second(1.0))
    check(found, law_cost="SUPPORTED", match="SUPPORTED", ten_times="REFUTED")
    assert found["ten_times"]["estimate"]["value"] == pytest.approx(21, rel=0.1)
    found = answer(Second(2.5, behind=0.1))
    check(found, law_cost="REFUTED", match="REFUTED")
    assert found["law_cost"]["estimate"]["value"] == pytest.approx(7, abs=1.5)  # 0.06 ln(2.5)^2


def test_the_law_is_not_asked_where_it_was_not_measured():
    found = answer(Second(1.0), schedule="cosine")
    check(found, law_cost=("UNDECIDED", "TASK"), match="SUPPORTED")
