"""`experts` on planted runs: the regret of each reading of the rank, and its optimal LR."""

import math

import pytest

from analysis.questions.experts import QUESTION, READINGS
from analysis.runs.table import TableError
from lorasweep.methods.lora import LoRA as Lora
from tests import planted
from tests.planted import FULL, GAIN, LORA, World, ask, base, check, kept_question, planted_table

pytestmark = pytest.mark.slow  # fits dozens of curves
TOKENS = [[10, 20, 30, 40], [25, 25, 25, 25]]
METHODS = {
    "active": Lora(rank=8, layers="mlp"),
    "all": Lora(rank=8, layers="mlp", expert_rank="all"),
    "whole": Lora(rank=8, layers="mlp", expert_rank="whole"),
    "shared": Lora(rank=8, layers="mlp", expert_rank="whole", expert_outer="shared"),
    "divided_alpha": Lora(rank=8, layers="mlp", expert_alpha=16.0),
}


def reading_runs():
    spec = base("tiny64-experts", "dialect_smoke")
    found = planted.arms(spec, (), seeds=range(4), steps=64)
    for method in METHODS.values():
        found += planted.runs(spec, method, planted.around(LORA), steps=64)
    return found


class Readings(World):
    """LoRA lies `behind[reading]` of the whole gain behind full fine-tuning; its optimum is `best`
    times LORA for some readings."""

    def __init__(self, behind, best):
        super().__init__(
            lambda spec: 1.0,
            best=lambda s, step: FULL if s.method.name == "fullft" else LORA * of(best, s, 1.0),
            more=lambda spec: {"expert_tokens": TOKENS, "n_trainable": 1000},
        )
        self.behind = behind

    def loss(self, spec, step):
        gap = of(self.behind, spec, 0.0)
        return super().loss(spec, step) + gap * GAIN * math.log2(1 + spec.steps)


def of(values, spec, default):
    name = next((r for r, method in METHODS.items() if method == spec.method), "")
    return values.get(name, default)


def test_planted_gaps_and_optima_come_back():
    world = Readings({"all": 0.1, "shared": -0.02}, {"divided_alpha": 2.0})
    out, verdicts = ask("experts", world, reading_runs())
    refuted = {"all_experts", "ratio", "same_scale"}  # planted ratio: 2
    outcomes = {name: v["outcome"] for name, v in verdicts.items()}
    assert outcomes == {k: "REFUTED" if k in refuted else "SUPPORTED" for k in outcomes}
    ratios = {"ratio": 2, "one_rate": 1, "same_scale": 2}
    check(verdicts, **{name: pytest.approx(v, rel=0.15) for name, v in ratios.items()})
    (found,) = out["cells"].values()
    assert found["all"]["regret_percent"]["value"] == pytest.approx(10, abs=0.5)
    assert found["all"]["token_shares"][0] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_experts_adapters_are_counted_as_they_are_trained():
    """By the report and by the method, for every reading."""
    world = Readings({}, {})
    table, spec = planted_table(world, reading_runs()), base("tiny64-experts", "dialect_smoke")
    found = QUESTION.analyse(table, kept_question("experts"))
    (counts,) = [s.rows for s in found.sections if s.title == "What is trained in the experts"]
    shown = {row[0]: int(row[2].replace(",", "")) for row in counts[1:]}
    matrices = list(spec.model.matrices(("mlp",)))
    for reading, method in METHODS.items():
        trained = sum(method.n_trained(spec.model, m) for m in matrices)
        assert shown[READINGS[reading]] == trained
    assert shown[READINGS["whole"]] == 8 * 8 * 4 * 3 * (64 + 112)


def test_a_dense_model_is_refused():
    dense = planted.runs(base(dataset="dialect_smoke"), Lora(rank=4), [LORA])
    table = planted_table(World(), dense)
    with pytest.raises(TableError, match="has no known rank of its experts"):
        QUESTION.analyse(table, kept_question("experts"))
