"""Learning rates by the law: its scope, the prediction, and what `lorasweep rate` accepts."""

import dataclasses
import json
import math

import pytest

from analysis.measures import laws
from analysis.questions.base import fit
from analysis.report.report import law_rows
from lorasweep.advise import rates
from lorasweep.cli.actions import act, as_overrides, check
from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import World, arms, is_full, planted_table, smoke
from tests.world import compose_request, tiny_spec


def arm(method=None, **changes):
    return tiny_spec(method=method or LoRA(rank=8, alpha=4), steps=256, **changes)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (LoRA(rank=2), "rank=2"),
        (LoRA(rank=8, layers="attention"), "attention and MLP together"),
        (LoRA(rank=8, layers="mlp+unembedding"), "attention and MLP together"),
        (LoRA(rank=8, lr_b_ratio=16), "learning rates of A and B"),
        (LoRA(rank=8, init_scale=2), "initialisation"),
        (LoRA(rank=8, random_factor="b"), "initialisation"),
        (FullFT(scope="matrices", layers="mlp"), "attention and MLP together"),
        (LoRA(rank=4, layers="attention+mlp"), ""),
        (FullFT(), ""),
    ],
)
def test_the_scope(method, why):
    spec = arm(method)
    found = rates.outside(spec.model, method)
    assert (why in found) and bool(found) == bool(why)
    if why:
        assert rates.law(spec, arm(), 1e-3) is None and rates.law(arm(), spec, 1e-3) is None


def test_one_arm_from_another():
    known, lr = arm(), 4e-3  # hidden size 64: z is above 1
    width = known.model.hidden_size
    full = laws.full_lr(width, 4, 256, lr)
    assert rates.law(arm(FullFT()), known, lr) == pytest.approx(full)
    other = arm(LoRA(rank=16, alpha=8, scaling_by="sqrt_rank"))  # the output of alpha 32
    assert rates.law(other, known, lr) == pytest.approx(full * laws.ratio(width, 32, 256, full))
    assert rates.law(known, arm(FullFT()), full) is None  # only from LoRA
    assert rates.law(dataclasses.replace(known, objective="rl_is"), known, lr) is None
    assert rates.law(dataclasses.replace(known, schedule="cosine"), known, lr) is None
    still = arm(LoRA(rank=4, alpha=1024))  # A hardly moves, and rank 4 was not measured there
    assert rates.law(arm(FullFT()), still, 3e-5) is None
    still = arm(LoRA(rank=8, alpha=1024))
    assert rates.law(arm(LoRA(rank=16, alpha=1024)), still, 3e-5) is None
    assert rates.law(arm(LoRA(rank=8, alpha=512)), still, 3e-5) == pytest.approx(6e-5, rel=0.01)


def test_a_reports_table_has_only_ratios_of_two_arms_at_a_constant_rate():
    for full, lora, rows in (
        ({}, {}, 2),
        ({"schedule": "linear"}, {}, 0),
        ({"warmup_steps": 9}, {"warmup_steps": 9}, 0),
    ):
        specs = [
            dataclasses.replace(s, steps=64, **(full if is_full(s) else lora))
            for s in arms(smoke(), ranks=(8,), seeds=range(3))
        ]
        table = planted_table(World(), specs)
        assert len(law_rows(fit(table), table)) == rows


def said(capsys, *typed):
    assert act(compose_request(as_overrides(["rate", *typed], ["lr_ratio"]))) == 0
    return capsys.readouterr().out


def test_the_command_predicts_either_method_in_text_and_json(capsys):
    out = said(capsys, "smollm2-135m", "full_lr=1e-4", "alpha=128", "steps=30", "rank=16")
    assert "full fine-tuning: 1.00e-04 (given)" in out and "LoRA at alpha 128: 5.60e-04" in out
    assert "z = 0.66: A moves less than its random start; it moves more up to alpha 71" in out
    asked = ("lora_lr=1.3e-3", "at_alpha=32", "alpha=128", "at_steps=30", "rank=16", "format=json")
    found = json.loads(said(capsys, "smollm2-135m", *asked))
    full = laws.full_lr(576, 32, 30, 1.3e-3)
    assert found["full_lr"] == pytest.approx(full) and found["given"] == ""
    assert found["lora_lr"] == pytest.approx(laws.carried(576, 32, 128, 30, 1.3e-3))
    limit = laws.limit(576, found["moving_alpha"])  # there z is 1
    assert laws.movement(576, full, 30) * limit / math.sqrt(2) == pytest.approx(1)
    out = said(capsys, "llama-3.1-8b", "full_lr=1e-5", "steps=2000")
    assert "never measured: hidden size 4096" in out and "never measured: updates 2000" in out
    far = ("lora_lr=0.3", "at_alpha=0.01", "at_steps=30", "batch_size=512", "beta2=0.999")
    out = said(capsys, "smollm2-135m", *far)
    assert "measured: beta2 0.999 (from 0.95 to 0.95)" in out
    assert (
        "measured: batch 512 (from 4 to 256)" in out and "measured: alpha 0.01 (from 0.125" in out
    )
    out = said(capsys, "tiny64", "full_lr=3e-4", "alpha=1024", "steps=256", "rank=8")
    assert "A hardly moves; it moves more up to alpha" in out
    root = ("full_lr=1e-4", "alpha=16", "method.scaling_by=sqrt_rank", "steps=30", "rank=16")
    out = said(capsys, "smollm2-135m", *root)  # alpha 64 under alpha / rank
    assert (
        "LoRA at alpha 16: 9.15e-04" in out
        and "falls as 1 / sqrt(alpha)" in out
        and "0.14 in ln for LoRA's, 0.19 for full fine-tuning's" in out
    )
    still = json.loads(said(capsys, "smollm2-135m", *root, "format=json"))
    assert still["moving_alpha"] == pytest.approx(71 / 4, rel=0.01)


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        (("smollm2-135m", "full_lr=1e-4"), "and steps=N"),
        (("smollm2-135m", "steps=30"), "needs one of full_lr"),
        (("smollm2-135m", "full_lr=1e-4", "lora_lr=1e-3", "steps=30"), "needs one of full_lr"),
        (("smollm2-135m", "full_lr=1e-4", "at_alpha=8", "steps=30"), "needs one of full_lr"),
        (("smollm2-135m", "lora_lr=1e-3", "at_steps=30", "steps=60"), "Give both the same number"),
        (
            ("smollm2-135m", "full_lr=1e-4", "steps=30", "schedule=cosine"),
            "a constant learning rate",
        ),
        (("smollm2-135m", "full_lr=1e-4", "steps=30", "warmup_steps=20"), "a constant learning"),
        (("smollm2-135m", "full_lr=1e-4", "steps=30", "rank=2"), "rank=2: it is for ranks"),
        (("qwen3-30b-a3b", "full_lr=1e-5", "steps=30"), "mixtures of experts"),
        (("smollm2-135m", "full_lr=1e-4", "steps=30", "method=fullft"), "which rank of LoRA"),
        (
            ("tiny64", "full_lr=3e-4", "alpha=1024", "steps=256"),
            r"moves more up to alpha 7\.7\) and the ratio depends on the rank: there only rank 8",
        ),
        (("smollm2-135m", "full_lr=-1", "steps=30"), "full_lr"),
        (
            ("smollm2-135m", "full_lr=1e-4", "steps=30", "alpha=16,32"),
            "one value of method.alpha.$",
        ),
        (("smollm2-135m", "full_lr=1e300", "steps=30"), "full_lr"),
        (("smollm2-135m", "lora_lr=1e-3", "at_alpha=1e300", "steps=30"), "at_alpha"),
        (("full_lr=1e-3", "steps=256"), "needs model=MODEL"),
        (("tiny64", "lora_lr=3e-5", "at_alpha=1024", "rank=4", "steps=256"), "z is 0.011"),
    ],
)
def test_what_it_refuses(typed, why):
    with pytest.raises(SpecError, match=why):
        act(compose_request(as_overrides(["rate", *typed], ["lr_ratio"])))


def test_other_verbs_do_not_take_its_settings():
    with pytest.raises(SpecError, match="full_lr is only for action=rate"):
        check(compose_request(["+sweep=lr_ratio", "scale=smoke", "full_lr=1e-4"]))
