"""What supervised runs measure, which runs have diverged, and which have collapsed."""

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
from tests.training import Trained, as_alone, results, small_world


@pytest.fixture(scope="module")
def world():
    spec, base, _ = small_world(lr=1e-2, steps=12)
    return spec, base


def test_runs_measure_their_own_held_out_rows_and_retention(world, other_weights):
    spec, base = world
    few = {"n_test": 24, "n_test_curve": 16}
    theirs = dataclasses.replace(spec.dataset, name="theirs", **few, n_retain=8)
    ours = dataclasses.replace(spec.dataset, name="ours", n_test=20, n_test_curve=16)
    with_retain = data.load(theirs, [])
    rows = [with_retain.test[0], *data.load(spec.dataset, []).test[1:20]]
    pack = [dataclasses.replace(spec, steps=1, dataset=dataset) for dataset in (ours, theirs)]
    without = dataclasses.replace(with_retain, test=rows, retain=())
    both = {pack[0].id: without, pack[1].id: with_retain}
    found = as_alone(pack, base, both, other_weights(base))
    first, second = (found.results[one.id] for one in pack)
    assert "retain_nll" not in first
    # the base knows its own language better than the dialect
    assert second["retain_start"] < second["nll_start"] != first["nll_start"]


def test_without_rows_for_a_curve_runs_are_measured_at_start_and_end_alone(world):
    """And end as they do with one: measuring changes nothing."""
    spec, base = world
    with_curve = dataclasses.replace(spec, steps=6)
    no_rows = dataclasses.replace(spec.dataset, n_test_curve=0)
    without = dataclasses.replace(with_curve, dataset=no_rows)
    rows = data.load(spec.dataset, [])
    (a,), (b,) = (results([run], base, rows) for run in (with_curve, without))
    assert [p["step"] for p in a["curve"]] == [0, 1, 2, 3, 4, 6]
    assert [p["step"] for p in b["curve"]] == [0, 6]
    assert a["test_nll"] == b["test_nll"] == b["test_nll_curve"]


@pytest.fixture(scope="module")
def hard_world():
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
def test_only_a_far_too_high_rate_diverges_on_rows_harder_than_the_held_out_ones(hard_world, rate):
    """Resumed, it ends as uninterrupted."""
    spec, base, hard = hard_world
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


def collapsed_after(signal, given):
    for k, reward in enumerate(given, 1):
        signal.note({"reward": reward}, 32)
        if signal.collapsed:
            return k


@pytest.mark.parametrize(
    "given, after",
    [
        ([0.15, 0.1, *[0.15, 0.2] * 10], None),  # prompts harder than the held-out ones
        ([0.4, 0.3, *[0.1] * 8], 10),
        ([0.15] * 12 + [0.05] * 8, 20),
        ([0.4, 0.1, *[0.0] * 20], 9),  # in its first updates
        # the first updates alone count: one that has learned and falls back is no worse than the base
        ([0.15] * 8 + [0.9] * 20 + [0.1] * 20, None),
    ],
)
def test_a_collapse_is_judged_by_the_first_updates_and_resumed(given, after):
    assert collapsed_after(Signal(0.4), given) == after and FIRST_UPDATES == 8
    first, second = Signal(0.4), Signal(0.4)
    assert collapsed_after(first, given[:6]) is None
    second.load(json.loads(json.dumps(first.state())))
    assert collapsed_after(second, given[6:]) == (after and after - 6)
