"""`experts` on planted runs: what each reading of the rank gives up, and its best rate."""

import math

import pandas as pd
import pytest

from analysis.questions.experts import QUESTION
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import TableError
from lorasweep.config.compose import compose_request
from lorasweep.sweep.request import question
from tests.planted import FULL, FULL_LR, GAIN, LORA, LORA_LR, World

pytestmark = pytest.mark.slow  # fits dozens of curves

GRIDS = (f"sweep.arms.fullft.lr={FULL_LR}", f"sweep.arms.lora.lr={LORA_LR}")
TOKENS = [[10, 20, 30, 40], [25, 25, 25, 25]]


def reading(method):
    if method.expert_alpha != method.alpha:
        return "divided_alpha"
    return "shared" if method.expert_outer == "shared" else method.expert_rank


class Readings(World):
    """LoRA lies `behind[reading]` of the whole gain behind full fine-tuning; its best rate is `best`
    times LORA for some readings."""

    def __init__(self, behind, best):
        super().__init__(
            lambda spec: 1.0,
            best=lambda spec, step: (
                FULL if spec.method.name == "fullft" else LORA * best.get(reading(spec.method), 1.0)
            ),
            more=lambda spec: {"expert_tokens": TOKENS, "n_trainable": 1000},
        )
        self.behind = behind

    def loss(self, spec, step):
        gap = 0.0
        if spec.method.name == "lora":
            gap = self.behind.get(reading(spec.method), 0.0)
        return super().loss(spec, step) + gap * GAIN * math.log2(1 + spec.steps)


def test_planted_gaps_and_rates_come_back(ask):
    world = Readings({"all": 0.1, "shared": -0.02}, {"divided_alpha": 2.0})
    out, verdicts = ask("experts", world, *GRIDS)
    outcomes = {name: v["outcome"] for name, v in verdicts.items()}
    assert outcomes == {
        "active": "SUPPORTED",
        "all_experts": "REFUTED",
        "whole": "SUPPORTED",
        "shared": "SUPPORTED",
        "dividing": "SUPPORTED",
        "ratio": "REFUTED",  # planted: 2
        "one_rate": "SUPPORTED",
        "same_scale": "REFUTED",
    }
    for name, value in (("ratio", 2), ("one_rate", 1), ("same_scale", 2)):
        assert verdicts[name]["estimate"]["value"] == pytest.approx(value, rel=0.15)
    (cell,) = out["cells"].values()
    assert cell["all"]["regret_percent"]["value"] == pytest.approx(10, abs=0.5)
    assert cell["all"]["token_shares"][0] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (
        len({(c["expert_rank"], c["expert_alpha"], c["expert_outer"]) for c in out["curves"]}) == 6
    )


def test_the_experts_adapters_are_counted_as_they_are_trained(capsys):
    """By the report and by the method, for every reading of the sweep."""
    request = compose_request(["+sweep=experts", "scale=smoke"])
    points = [p for p in request.points if p.arm == "lora"]
    of = {reading(p.spec.method): p.spec for p in points}
    assert set(of) == {"active", "all", "whole", "shared", "divided_alpha"}
    counts = {}
    for name, spec in of.items():
        layers = list(spec.model.matrices(("mlp",)))
        counts[name] = sum(spec.method.n_trained(spec.model, m) for m in layers)
    per_rank = 4 * 3 * (64 + 112)
    assert counts["active"] == 8 * 4 * per_rank and counts["whole"] == 8 * 8 * per_rank
    assert counts["all"] == 8 * per_rank and counts["shared"] == 8 * 4 * 3 * (64 + 8 * 112)


def test_an_arm_that_is_missing_leaves_its_claims_open(ask):
    _out, verdicts = ask(
        "experts", Readings({}, {}), *GRIDS, "sweep.arms.lora.reading=[{expert_rank:whole}]"
    )
    assert verdicts["whole"]["outcome"] == "SUPPORTED"
    for name in ("active", "dividing", "ratio", "one_rate"):
        assert verdicts[name]["outcome"] == "UNDECIDED"
    assert "no curve of rank / active experts" in str(verdicts["one_rate"])


def test_a_curve_is_named_by_how_its_experts_get_their_rank():
    row = {"model": "m", "dataset": "d", "method": "lora", "rank": 8, "status": "done"}
    kinds = [("active", "own"), ("whole", "shared"), (None, None)]
    runs = [
        {**row, "lr": 1.0, "seed": 0, "test_nll": 2.0, "expert_rank": rank, "expert_outer": outer}
        for rank, outer in kinds
    ]
    names = {c.name for c in lr_curves(pd.DataFrame(runs))}
    assert names == {"lora r8 (experts: active)", "lora r8 (experts: whole, shared)", "lora r8"}


def test_a_dense_model_is_refused():
    asked = question(compose_request(["+sweep=experts", "scale=smoke"]))
    row = {"model": "m", "dataset": "d", "method": "lora", "rank": 4, "status": "done"}
    runs = [
        {**row, "lr": lr, "seed": 0, "test_nll": 2 + abs(lr - 2), "n_trainable": 1} for lr in (1, 2)
    ]
    with pytest.raises(TableError, match="does not tell the rank of its experts"):
        QUESTION.analyse(pd.DataFrame(runs), asked)
