"""When a run is called diverged: compared with the base on its own first rows, not on others."""

import dataclasses
import json

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data.examples import Data, Example, shuffled
from lorasweep.launch.trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.spec.streams import stream
from lorasweep.train.objectives.policy_gradient import FIRST_UPDATES, Signal
from lorasweep.train.objectives.sft import Divergence
from tests.training import Trained, rewarded_world, small_world


@pytest.fixture(scope="module")
def world():
    """A base, and a run whose training rows are noise, while its held-out rows are what it knows."""
    spec, base, _ = small_world(method=LoRA(rank=8), batch_size=8, steps=24, eps=1e-8)
    language = {"rule_shift": 0.0, "new_exceptions": 0.0}
    dataset = dataclasses.replace(spec.dataset, generator_params=language)
    rng = stream("noise", "train")
    rows = [Example(rng.integers(0, 32, 24).astype(np.int32), np.arange(24) > 8) for _ in range(64)]
    hard = Data(shuffled(dataset, rows), data.load(dataset, []).test, 64)
    spec = dataclasses.replace(spec, dataset=dataset)
    return spec, base, hard


@pytest.mark.parametrize("rate", [5e-3, 3.0])
def test_only_a_far_too_high_rate_diverges_on_rows_harder_than_the_held_out_ones(world, rate):
    """Resumed, it ends as uninterrupted; an old checkpoint calls nothing falsely."""
    spec, base, hard = world
    spec = dataclasses.replace(spec, lr=rate)

    def trained(resume=None):
        base.at_start.clear()
        found = Trained(finetune([spec], base, hard, resume=resume), at=(5,))
        nlls = [r["train_nll"] for r in found.records[spec.id]]
        return found.ends[spec.id], found.results[spec.id], nlls, found.at.get(5)

    state, result, losses, middle = trained()
    assert result["divergence_rule"] == 2
    if rate == 3.0:  # at the first update with eight losses in a row above the bound
        above = [loss > 1.5 * max(losses[0], result["nll_start"]) for loss in losses]
        full = [step for step in range(8, len(above) + 1) if all(above[step - 8 : step])]
        assert state == "diverged" and full == [len(losses)] and len(losses) < 14
    else:
        assert state == "done" and result["steps_done"] == spec.steps
        assert min(losses[:9]) > 1.5 * result["nll_start"]  # the first nine: once called diverged
        assert losses[-1] < losses[0] - 0.5
    assert json.loads(json.dumps(middle[spec.id]["meta"]["first_nll"])) == losses[0]
    again = trained(middle)
    assert again[0] == state and again[2] == losses[5:]
    del middle[spec.id]["meta"]["first_nll"]  # as rule 1 wrote it, seven updates above its bound
    middle[spec.id]["meta"]["above"] = 7
    again = trained(middle)
    assert len(again[2]) >= 8 and (again[0] == "done" or rate == 3.0)


def test_by_hand():
    def judged(held_out, losses):
        rule = Divergence(held_out)
        return next((k for k, nll in enumerate(losses, 1) if rule.note(nll)), None)

    assert judged(2.0, [2.0] + [3.1] * 8) == 9  # above 3 from the second update on
    assert judged(2.0, [2.0] + [3.0] * 50) is None
    assert judged(2.0, [2.0, *[9.0] * 7, 2.9, *[9.0] * 8]) == 17  # eight in a row
    assert judged(2.0, [4.81, 4.7, 4.6, *[4.5] * 20, 4.03]) is None
    assert judged(2.0, [4.0, *[6.1] * 8]) == 9
    assert judged(2.0, [0.9] + [2.0] * 20) is None  # one easy batch is not what the base can do


def rewards(signal, given):
    """The update after which the run has collapsed."""
    for k, reward in enumerate(given, 1):
        signal.note({"reward": reward}, 32)
        if signal.collapsed:
            return k


def test_prompts_harder_than_the_held_out_ones_are_no_collapse():
    assert rewards(Signal(0.4), [0.15, 0.1, *[0.15, 0.2] * 10]) is None
    assert rewards(Signal(0.4), [0.4, 0.3, *[0.1] * 8]) == 10
    assert rewards(Signal(0.4), [0.15] * 12 + [0.05] * 8) == 20
    assert rewards(Signal(0.4), [0.4, 0.1, *[0.0] * 20]) == 9  # in its first updates
    # the first updates alone count: a run that has learned and falls back is no worse than the base
    assert rewards(Signal(0.4), [0.15] * 8 + [0.9] * 20 + [0.1] * 20) is None


def test_signals_are_resumed_and_those_of_old_checkpoints_call_nothing_falsely():
    given = [0.15] * 5 + [0.16] * 7 + [0.05] * 8
    whole, first, second = Signal(0.4), Signal(0.4), Signal(0.4)
    assert rewards(whole, given) == 20 and rewards(first, given[:6]) is None
    second.load(json.loads(json.dumps(first.state())))
    assert rewards(second, given[6:]) == 14 and second.state() == whole.state()
    old = {k: v for k, v in first.state().items() if k != "first_reward"}
    third, fourth = Signal(0.4), Signal(0.4)
    third.load({**old, "below": 6})  # as rule 1 counted them
    assert rewards(third, given[6:12]) is None and rewards(third, given[12:]) == 8
    fourth.load({"below": 0, "answers": 0, "rewarded": 0.0, "best_reward": None})
    assert rewards(fourth, given) == 20
    assert FIRST_UPDATES == 8


def test_a_rewarded_run_on_harder_prompts_ends_done(norms_in_float64):
    """The base is said to be better on held-out prompts than it is on the run's own."""
    spec, base, loaded = rewarded_world("words")
    spec = dataclasses.replace(spec, steps=12, lr=1e-5)
    key = f"{spec.dataset.canonical}/{spec.precision}/{spec.max_new_tokens}/reward"
    base.at_start[key] = {"test_reward": 0.9, "test_reward_se": 0.0}
    ended = {}
    for event in finetune([spec], base, loaded):
        assert event.records[spec.id]["reward"] < 0.45
        ended |= event.ended
    state, result = ended[spec.id]
    assert state == "done" and not result["collapsed"] and result["divergence_rule"] == 2
