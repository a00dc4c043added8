"""`tune`: validation rows choose, test rows report."""

import dataclasses
import json
import math

import pytest

from analysis.questions.registry import question_named
from lorasweep.config.compose import compose_request
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import question
from lorasweep.sweep.search import arm_key, arm_names
from lorasweep.work.answer import look, open_questions
from tests.planted import FULL, LORA, World, analysed, arms, base, is_full, planted_table

ASKED = question(compose_request(["+sweep=tune", "scale=smoke"]))
SHIFT = 2.0
"""Factor between the optimum on validation rows and that on test rows."""


class Shifted(World):
    """On test rows, optimal learning rates are SHIFT times those on validation rows."""

    def __init__(self, lost=lambda spec: 0.0):
        super().__init__(rho=lambda spec: 1.0, more=self.chosen_by)
        self.lost = lost

    def loss(self, spec, step, shift=1.0):
        lost = 0.0 if is_full(spec) else self.lost(spec)
        return super().loss(dataclasses.replace(spec, lr=spec.lr * shift), step) + lost

    def chosen_by(self, spec):
        value = self.loss(spec, spec.steps, SHIFT)
        at = {"step": spec.steps, "test_nll": self.nll(spec), "test_nll_curve": value}
        curve = [*self.curve(spec)[:-1], at]
        return {"curve": curve, "test_nll_curve": value, "n_test": 30, "wall_s": 3.0}


def specs(**changes):
    spec = base("tiny64", "dialect")
    data = dataclasses.replace(
        spec.dataset, name="rows", source="jsonl", n_validation=30, n_test=30
    )
    return arms(dataclasses.replace(spec, dataset=data, steps=64, **changes), ranks=(2, 8))


def table_of(world, runs):
    """The table of a search, with the names of its arms."""
    points = [Point(s.method.name, s) for s in runs]
    names = arm_names([*{arm_key(p): p for p in points}.values()])
    return planted_table(world, runs).assign(arm=[names[arm_key(p)] for p in points])


def results(world, runs):
    return json.loads(analysed(table_of(world, runs), ASKED, None, True))


def by_rank(found):
    return {arm["rank"]: arm for arm in found["arms"]}


def test_validation_rows_choose_the_rate_and_test_rows_measure_the_loss_there():
    world = Shifted()
    found = results(world, specs())
    assert found["chosen_on"] == "validation" and found["n_test"] == 30
    for rank, best in ((None, FULL), (2, LORA), (8, LORA)):
        arm = by_rank(found)[rank]
        assert arm["best_lr"]["value"] == pytest.approx(best / SHIFT, rel=0.03)
        # the test loss half an optimum off, above that at the optimum of the test rows
        off = 0.06 * math.log(SHIFT) ** 2
        spec = next(s for s in specs() if s.method.name == arm["method"] and s.lr == best)
        assert arm["loss"] == pytest.approx(world.nll(spec) + off, abs=4e-3)
        assert arm["good"][0] < best / SHIFT < arm["good"][1] and arm["seconds"] == 3.0


def test_what_lora_gives_up_is_a_share_of_the_gain_on_test_rows():
    lost = {2: 0.1, 8: 0.002}
    found = results(Shifted(lambda s: lost[s.method.rank]), specs())
    gain = by_rank(found)[None]["gain"]
    for rank, nats in lost.items():
        gap = by_rank(found)[rank]["gap_percent"]
        assert gap["low"] < 100 * nats / gain + 0.3 and gap["high"] > 100 * nats / gain - 0.3
        assert gap["value"] == pytest.approx(100 * nats / gain, abs=0.3)
    assert found["best_rank"] == 8 and found["verdicts"][0]["outcome"] == "SUPPORTED"
    close = results(Shifted(lambda s: lost[8]), specs())
    assert close["best_rank"] == 2  # the smallest within 1% of the gain


def test_a_look_decides_or_says_what_is_open_and_asks_for_rates_at_an_edge():
    world = Shifted()
    decided, lrs = look(table_of(world, specs()), ASKED)
    assert decided and not any(lrs.values())
    low = [s for s in specs() if not is_full(s) or s.lr <= FULL / 4]
    table = table_of(world, low)
    decided, lrs = look(table, ASKED)
    full = set(table[table["method"] == "fullft"]["run_id"])
    assert not decided and [min(v) > FULL / 4 for k, v in lrs.items() if k in full] == [True]
    found = open_questions(results(world, low))
    assert found[0].startswith("the learning rate of full fine-tuning (")
    pair = "LoRA rank 8 on attention+mlp+unembedding against full fine-tuning"
    assert found[-1].startswith(f"{pair} (needed: ")
    one = [s for s in specs() if s.seed == 0]  # its missing variance asks for no rates
    decided, lrs = look(table_of(world, one), ASKED)
    assert not decided and not any(lrs.values())


def test_three_seeds_of_two_arms_decide_with_three_rates_in_the_arm_that_the_law_covers():
    around = {0: (0.5, 1, 2), 8: (0.25, 0.5, 1, 2, 4)}
    best = {0: FULL / SHIFT, 8: LORA / SHIFT}

    def is_tried(s):
        rank = getattr(s.method, "rank", 0)
        off = s.lr / best.get(rank, 1)
        rates = around.get(rank, ()) if s.seed == 0 else (0.5, 1, 2)
        return rank in best and s.seed < 3 and any(off == pytest.approx(k, rel=0.02) for k in rates)

    runs = [s for s in specs() if is_tried(s)]
    assert len(runs) == 3 + 5 + 2 * 6
    decided, lrs = look(table_of(Shifted(), runs), ASKED)
    assert decided and not any(lrs.values())


def test_lora_alone_is_answered_without_a_comparison():
    found = results(Shifted(), [s for s in specs() if not is_full(s)])
    assert by_rank(found).keys() == {2, 8} and by_rank(found)[8]["gap_percent"] is None
    assert open_questions(found) == [] and found["verdicts"][0]["outcome"] == "UNDECIDED"
    assert question_named("tune").names == ["over_allowed_top_rank"]
