"""What a sweep must state, checked before anything starts."""

import dataclasses

import pytest

from lorasweep.cli.answer import check_claims
from lorasweep.errors import SpecError
from lorasweep.sweep import question
from lorasweep.sweep.question import Claim, Planning, Replicates, Sweep, check_sweep

VALID = Sweep(
    question="?",
    claims={"c": Claim(margin=[5, 20], estimand="lr_ratio")},
    arms={"a": {"method": "lora", "lr": [1e-3, 2e-3]}},
    analysis="lr_ratio",
)


def claim(**values):
    return {"claims": {"c": Claim(**{"margin": [0, 1], **values})}}


def added(stated, rounds=2):
    return {"arms": {"a": {"method": "lora", "added_after": stated}}, "rounds": rounds}


RUNS = {"what": "learning rate 2e-3", "why": "four were left"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": ""}, "no question"),
        ({"claims": {}}, "no claims"),
        ({"arms": {}}, "no arms"),
        ({"arms": {"a": {"lr": 1e-3}}}, "arm 'a': has no method"),
        ({"axes": {"seed": []}}, "axis 'seed' is empty"),
        ({"rounds": 6}, "rounds=6. Expected 1 to 5"),
        ({"parts": ["rank"]}, "has parts, so it cannot have arms"),
        ({"replicate": Replicates(arms=["b"])}, "replicate.arms names 'b'.* Its arms: a"),
        (claim(margin=[2, 1]), "low < high"),
        (claim(margin=[]), "margin="),
        (claim(source="x"), "source='x'. Allowed: study, popular, ours"),
        (claim(better="more"), "better='more'. Allowed: lower, higher"),
        (claim(except_models=["tiny46"]), "'c', except_models: model 'tiny46'.* mean 'tiny64'"),
        (claim(exploratory={"tiny": ""}), "claim 'c': exploratory="),
        (claim(planning={"tiny": Planning(sd=-0.1)}), r"planning\.tiny\.sd=-0.1"),
        (claim(planning={"all": Planning(units=0)}), r"planning\.all\.units=0"),
        (claim(underpowered="tiny"), "underpowered=tiny. Expected true or"),
        (added(RUNS, rounds=1), "arm 'a': .* but rounds=1. Write `rounds: 2`"),
        (added("2e-3"), "Expected {what: ..., why: ...}"),
        (added({**RUNS, "why": ""}), "Expected {what: ..., why: ...}"),
    ],
)
def test_a_sweep_that_is_not_complete_is_refused(change, words):
    check_sweep("x", VALID, ["tiny64"])
    check_sweep("x", dataclasses.replace(VALID, **added(RUNS)))
    with pytest.raises(SpecError, match=f"sweep 'x'.*{words}"):
        check_sweep("x", dataclasses.replace(VALID, **change), ["tiny64"])


def test_a_claim_that_contradicts_the_metrics_direction_is_refused():
    for better, objective in (("lower", "sft"), ("higher", "policy_gradient"), ("", "sft")):
        question.check_directions("x", Sweep(**claim(better=better)), [objective])
    with pytest.raises(SpecError, match=r"claim 'c': better=higher.*lower is better"):
        question.check_directions("x", Sweep(**claim(better="higher")), ["sft"])


def test_only_analyses_by_base_leave_bases_out():
    left_out = claim(estimand="lr_ratio", margin=[5, 20], except_models=["tiny64"])
    with pytest.raises(SpecError, match=r"analysis 'lr_ratio' cannot leave out bases"):
        check_claims(dataclasses.replace(VALID, **left_out))


def test_power_is_stated_for_a_scale_or_for_all():
    planning = {"all": Planning(sd=0.1), "tiny": Planning(sd=0.2, units=3)}
    stated = Claim(planning=planning, underpowered=["tiny"])
    assert dataclasses.astuple(stated.at("tiny")) == (0.2, 3, True)
    assert dataclasses.astuple(stated.at("small")) == (0.1, None, False)
