"""The question `ties`: arms of one real model against LoRA, in percent of the gain."""

import math

import pytest

from analysis.questions.registry import analyse
from lorasweep.config.compose import compose_request
from lorasweep.sweep.grid import second_stage
from lorasweep.sweep.request import question
from tests.planted import GAIN, World, check, is_full, planted_table

REQUEST = compose_request(["+sweep=ties", "scale=small"])
BEST = {"fullft": 9.9e-5, "lora": 1.3e-3, "dora": 1.5e-3, "pissa": 3e-4}


class Behind(World):
    """`of`: method, or alpha -> the share of the gain that it loses."""

    def __init__(self, of):
        super().__init__(lambda spec: 1.0, lambda spec, step: self.optimum(spec))
        self.of = of

    def optimum(self, spec):
        return BEST[spec.method.name] * (0.42 if getattr(spec.method, "alpha", 0) == 128 else 1)

    def loss(self, spec, step):
        share = 0 if is_full(spec) else self.of.get(spec.method.name, 0)
        share += self.of.get(getattr(spec.method, "alpha", None), 0)
        return super().loss(spec, step) + share * GAIN * math.log2(1 + spec.steps)


def answer(world, without=()):
    points = [p for p in REQUEST.points if p.spec.method.name not in without]
    of = {p.id: p.spec for p in points}
    more = second_stage(points, REQUEST.sweep.replicate, lambda run: world.nll(of[run]))
    table = planted_table(world, [p.spec for p in (*points, *more)])
    return {v.claim: v.plain() for v in analyse(table, question(REQUEST)).verdicts}


def test_equal_arms_tie_and_one_that_loses_three_percent_does_not():
    check(answer(Behind({})), alpha="SUPPORTED", dora="SUPPORTED", pissa="SUPPORTED")
    found = answer(Behind({"pissa": 0.04, 128.0: -0.03}))
    check(found, alpha="REFUTED", dora="SUPPORTED", pissa="REFUTED")
    assert found["pissa"]["estimate"]["value"] == pytest.approx(4, abs=0.5)
    assert found["alpha"]["estimate"]["value"] == pytest.approx(-3, abs=0.5)


def test_without_full_fine_tuning_there_is_no_gain_and_no_verdict():
    check(answer(Behind({}), without=("fullft",)), dora=("UNDECIDED", "MISSING"))
