"""The rules, and costs, against published counts, planted regrets, identities and sums by hand."""

import dataclasses
import math
from operator import attrgetter

import pytest

from lorasweep.advise import rules
from lorasweep.advise.advice import NOT_FASTER
from lorasweep.advise.evidence import Kept, Sure, line_of, published, read_kept
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.load import served_s
from lorasweep.plan.planner import place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from tests.unit.advise.world import advice, known

LLAMA = known().models["llama-3.1-8b"]()


def test_operations_are_two_thirds_and_twice_the_rank_over_the_width():
    """On a square matrix of width N at rank R: 2/3 + 2R/N."""
    n, r = 512, 32
    heads = {"n_layers": 1, "n_heads": 8, "n_kv_heads": 8, "head_size": 64}
    widths = {"hidden_size": n, "mlp_size": n, "vocab_size": n}
    square = ModelSpec(name="square", source="hub", location="x", **heads, **widths)
    ratio = LoRA(rank=r).step_flops(square, 1) / FullFT().step_flops(square, 1)
    assert ratio == pytest.approx(2 / 3 + 2 * r / n)


MOE = {"n_experts": 64, "n_active_experts": 6, "n_kv_heads": 16, "head_size": 128}
MOE |= {"hidden_size": 2048, "n_layers": 27, "n_heads": 16, "mlp_size": 1408, "vocab_size": 102_400}
RL = {"task": "rl"}
RATES = {"examples": 1_000_000, "epochs": 1, "tokens_per_example": 300}
TABLE = [  # columns, values of the advice, expected
    # an episode is a bit: the study's arithmetic on MATH; DeepSeek-R1's; 16 samples a problem
    ({**RL, "examples": 10_000, "episodes": 320_000}, "method rank rows", ("lora", 1, 320_000)),
    ({**RL, "episodes": 5_324_800}, "method rank rows", ("lora", 2, 5_324_800)),
    ({**RL, "examples": 1000, "epochs": 2}, "method rank bits", ("lora", 1, (32_000,) * 3)),
    ({**RL, "episodes": 320_000}, "load", 320_000 / (2 * 2_753_792)),
    # the smallest rank with room at the high end; smaller ranks were worse in public even so
    ({"examples": 200_000, "tokens_per_example": 500}, "rank", 128),
    ({"examples": 10}, "rank", 16),
    *(({"examples": 10**k, "tokens_per_example": 1000}, "method", "lora") for k in (3, 4, 5)),
    ({"examples": 10**6, "tokens_per_example": 1000}, "method", "open"),
    *(({"examples": 10**k, "tokens_per_example": 1000}, "method", "full") for k in (7, 8, 9)),
    ({}, "method load lora.hours", ("open", None, None)),
    ({"model": "tiny64-skills", "examples": 10}, "rank", 8),  # an eighth of the width
    ({"model": "mine", "examples": 1000, **MOE}, "rank", 24),  # a multiple of the experts
    # stated rows and updates give the batch; one that is not stated leaves enough updates
    ({**RATES, "steps": 1000}, "batch_size", 1000),
    ({**RL, "examples": 1000, "episodes": 320_000, "steps": 100}, "batch_size rows", (3200, 320_000)),
    ({**RL, "examples": 100, "episodes": 1000, "steps": 300}, "batch_size", 16),  # a group
    ({**RL, "examples": 10}, "batch_size largest_batch", (16, 16)),
    ({"examples": 1000}, "batch_size", 8),
    ({"examples": 100_000}, "batch_size", 32),
    # a hundred updates of 32 rows see 3,200 rows, of however many there are; epochs add nothing
    ({"examples": 3200, "steps": 100, "batch_size": 32, "bits_per_token": 1}, "method rank bits", ("lora", 16, (3200 * 409.6,) * 3)),
    ({"examples": 10**6, "steps": 100, "batch_size": 32, "bits_per_token": 1}, "method rank bits", ("lora", 16, (3200 * 409.6,) * 3)),
    ({"examples": 3200, "epochs": 3, "bits_per_token": 1}, "bits", (3200 * 409.6,) * 3),
    ({"examples": 3200, "epochs": 0.5, "bits_per_token": 1}, "bits", (1600 * 409.6,) * 3),
    # tinker-cookbook's get_lr, in RL the geometric mean, for full fine-tuning published ends
    ({"examples": 50_000}, "rate.rate lora_rate.rate", (pytest.approx(2.86e-4, rel=5e-3),) * 2),
    ({"examples": 10**8, "tokens_per_example": 1000}, "method rate.low rate.high", ("full", pytest.approx(2e-5 / 1.8), pytest.approx(1e-4 * 1.8))),
    # by hand: parameters of rank 16 and of Llama-3.1-8B
    ({"examples": 10_000}, "lora.file_mib", 2 * 16 * 2_753_792 / 2**20),
    ({"examples": 10_000, "adapters_served": 100}, "lora.serving_gib", (2 * 8_030_261_248 + 100 * 32 * 2_753_792) / 2**30),
    ({"examples": 10_000, "adapters_served": 100}, "full.serving_gib", 100 * 2 * 8_030_261_248 / 2**30),
    ({"examples": 10_000, "tokens_per_example": 500}, "lora.gpus full.gpus", (1, 4)),
    ({"examples": 10_000, "gpus": 8}, "lora.gpus full.gpus", (8, 8)),
    ({"examples": 10_000, "gpus": 2}, "lora.fits full.fits", (True, False)),
    ({"examples": 10_000}, "flops_ratio", pytest.approx(0.672, abs=0.002)),
]  # fmt: skip


@pytest.mark.parametrize("columns, values, expected", TABLE)
def test_the_advice_is_that_of_the_published_counts(columns, values, expected):
    found = attrgetter(*values.split())(advice(**columns))
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_reasons_and_conditions_say_what_was_assumed():
    assert "Rank 16 suffices for 4.4e+07 tokens" in advice().why
    formula = advice(**RATES, steps=1000).reasons["batch_size"].formula
    assert formula.endswith("stated rows or episodes / steps")
    few = advice(**RL, examples=10)
    assert {c["condition"]: c["state"] for c in few.conditions}["a small batch"] == "met"
    formula = advice(examples=10**6, steps=100, batch_size=32).reasons["bits"].formula
    assert formula.startswith("rows trained on (3,200 of 1,000,000 examples) x tokens")
    models = known().models
    assert rules.ranks_of(models["llama-3.2-1b"]())[-1] == 256
    assert rules.ranks_of(models["qwen3-30b-a3b"]())[0] == 8
    assert rules.ranks_of(advice(model="mine", examples=1, **MOE).model)[:3] == (6, 12, 24)
    loads = {r: 1 / rules.trained(LLAMA, r) for r in rules.RANKS}
    a = advice(examples=200_000, tokens_per_example=500)
    assert a.rank == min(r for r, load in loads.items() if load * a.bits[2] / 2 <= 0.5)


def rows(*planted):
    """Kept results with these cells, of a model of width 128."""
    columns = {"sweep", "scale", "base", "data", "task", "arm", "rank", "quantity", "claim"}
    empty = dict.fromkeys(columns | {"outcome", "exploratory"}, "")
    empty |= dict.fromkeys(("value", "low", "high"))
    common = {"scale": "tiny", "base": "tiny128", "task": "tiny128, rules"}
    return Kept([{**empty, **common, **cells} for cells in planted], {"tiny128": 128})


def regret(rank, load, value, count="first_pass"):
    """The two rows of a rank's regret, in percent, at a load."""
    place = {"sweep": "regime", "rank": str(rank), "task": f"tiny128, {load}"}
    loads = {**place, "quantity": f"load, {count}", "value": load}
    ends = {"value": value, "low": value - 1, "high": value + 1}
    return [loads, {**place, "quantity": "regret_percent", **ends}]


def test_kept_loads_are_by_the_first_pass_as_customers_bits_are():
    """The generator's count is up to 1,300 times smaller; a load by it would pass for room."""
    found = rows(*regret(4, 0.0057, 5.0, "generator"), *regret(4, 7.5, 5.0)).covering(128)
    assert found == {4: [(7.5, 5.0, 4.0, 6.0)]}


def test_planted_regrets_are_followed_where_they_cover_the_case_and_nowhere_else():
    """Regret 1% and 7% at loads a factor 16 apart: half-way in the logarithm it is 4%."""
    load = 0.04
    bits = load * 2 * 8 * rules.trained(known().models["tiny128"](), 1)
    planted = ((8, load / 4, 1.0), (8, load * 4, 7.0), (4, load, 9.0), (4, 3 * load, 9.0))
    kept = rows(*(row for each in planted for row in regret(*each)))
    world = dataclasses.replace(known(None), kept=kept)
    columns = {"model": "tiny128", "examples": 1, "tokens_per_example": 1000}
    for allowed, method, rank in ((5.5, "lora", 8), (2, "full", 8), (4, "open", 8)):
        a = advice(world, **columns, bits_per_token=bits / 1000, max_regret=allowed)
        assert (a.method, a.by, a.rank) == (method, rules.BY_REGRET, rank)
        assert "rank 8 4 [3, 5]" in a.why and "rank 4 9 [8, 10]" in a.why
        assert a.reasons["method"].sure is Sure.MEASURED
    assert advice(world, **columns, bits_per_token=bits / 1000 * 1e-3).by == "capacity"
    assert advice(world, examples=1000).by == "capacity"  # 8B is not covered by width 128
    # the rows of a kept cell: 2.67 bits a token on the first pass
    a = advice(model="tiny128", examples=4096, tokens_per_example=61, bits_per_token=2.67)
    assert (a.by, a.method) == (rules.BY_REGRET, "lora")


@pytest.mark.parametrize(
    "family, hidden, rate",
    [("llama", 4096, 2.86e-4), ("llama", 2048, 4.91e-4), ("qwen", 4096, 4.73e-4)],
)
def test_the_published_law_gives_its_published_rates(family, hidden, rate):
    """tinker-cookbook's get_lr: 2.86e-4 for Llama-3.1-8B, 4.91e-4 for 3.2-1B, 4.73e-4 for Qwen3-8B."""
    for method, expected in (("lora", rate), ("full", rate / 10)):
        found = rules.law_rate(published(), family, hidden, method)
        assert found == pytest.approx(expected, rel=5e-3)


def test_a_rate_measured_on_a_small_model_is_never_advice_for_another():
    short, long = (advice(examples=1000, steps=steps) for steps in (30, 300))
    assert short.rate.high == pytest.approx(1.5 * long.rate.high)
    assert any("fewer than 100 updates" in w for w in short.warnings)
    assert advice(examples=50_000).rate == advice(known(None), examples=50_000).rate
    mine = advice(model="tiny128", examples=64, tokens_per_example=10)
    assert "lr_ratio at tiny" in mine.rate.source
    assert mine.rate.rate == pytest.approx(1.83e-3, rel=0.02)
    assert "lr_ratio" not in advice(model="tiny64-knows", examples=4096).rate.source
    inside, below = (advice(task="rl", examples=1000, lr=lr) for lr in (1e-5, 1e-6))
    assert inside.conditions[2]["state"] == "met"
    said = ["full fine-tuning's learning rate" in " ".join(a.warnings) for a in (inside, below)]
    assert said == [False, True]
    shape = {"hidden_size": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}
    shape |= {"head_size": 128, "mlp_size": 14336, "vocab_size": 32000}
    source = advice(model="mistral-7b", examples=1000, **shape).rate.source
    assert "law of llamas" in source and "law of qwens" in source


def test_the_largest_batch_obeys_the_allowed_regret():
    """Slower by exp(-0.1) for each of two doublings, over e^5 updates: 100 x 0.2 / 5 = 4%."""
    regret_of = rules.regret_of_batch
    assert regret_of(128, 128 * math.exp(5), -0.1) == pytest.approx(4.0)
    assert regret_of(32, 1e6, -0.1) == regret_of(512, 1e6, 0.1) == 0
    each = {"sweep": "batch_size", "quantity": "batch_effect"}
    effects = (("tiny", "1", -0.2), ("tiny", "16", -0.05), ("other", "8", 0.02))
    kept = rows(*({**each, "scale": s, "rank": r, "value": v} for s, r, v in effects))
    assert kept.batch_effects() == {"tiny": -0.05, "other": 0.02}
    world = dataclasses.replace(known(None), kept=kept)
    for allowed in (1, 2, 5):
        most = advice(world, examples=10**6, max_regret=allowed).largest_batch
        assert regret_of(most, 1e6, -0.05) <= allowed < regret_of(2 * most, 1e6, -0.05)
    assert advice(world, examples=100, max_regret=0.1).largest_batch == 32
    assert advice(known(None), examples=10**6, max_regret=50).largest_batch == 32  # nothing kept


def test_sources_are_described_and_can_be_taken_out():
    values = published()
    assert values["law"]["source"] == "tinker_law" and "zhu" in {
        e["source"] for e in values["rates"]
    }
    left = {**values, "law": None, "rates": [e for e in values["rates"] if e["source"] != "zhu"]}
    assert rules.law_rate(left, "llama", 4096, "lora") is None
    world = dataclasses.replace(known(None), published=left)
    assert "zhu" not in advice(world, examples=1000).rate.source
    for entries in (v for v in values.values() if isinstance(v, list)):
        assert {e["source"] for e in entries} <= values["sources"].keys()
    assert {values["law"]["source"], values["best_rates"]["source"]} <= values["sources"].keys()


def test_withdrawn_verdicts_are_not_read_and_exploratory_ones_say_so(tmp_path):
    assert read_kept(tmp_path, {}).rows == []  # an installed package without the table
    columns = "sweep,scale,claim,task,outcome,exploratory,gates,value,low,high\n"
    one = "rl,tiny,rank_1,b on words,REFUTED,seen,,-9.0,-12.0,-6.0\n"
    gone = "rl,tiny,rank_1,b on words,UNDECIDED,seen,FLAGGED WITHDRAWN,,,\n"
    (tmp_path / "rows.csv").write_text(columns + one + gone)
    (found,) = read_kept(tmp_path, {}).about("rl", "rank_1", "top_rank")
    said = "rl: rank_1 REFUTED (exploratory) -9 [-12, -6] at tiny (b on words)"
    assert line_of(found) == said


def test_costs_are_those_of_the_plan_for_gpus():
    """The same model, batch and length through `place`: one number for both commands."""
    a = advice(examples=64_000, max_length=1024, tokens_per_example=409.6, batch_size=32)
    dataset = DatasetSpec(name="d", source="jsonl", location="d", max_length=1024)
    method = LoRA(rank=a.rank)
    spec = RunSpec(model=a.model, dataset=dataset, method=method, batch_size=32, precision="bf16")
    found, lora = place(spec, known().machines["h100"](), gpus=None), a.lora
    assert not found.why and lora.peak_gib == pytest.approx(found.memory_gib)
    assert lora.step_s == pytest.approx(found.step_s, rel=1e-3)
    assert lora.hours == pytest.approx(2000 * lora.step_s / 3600)
    assert lora.cost_usd == pytest.approx(lora.hours * lora.gpus * 2.95)


def test_gpus_change_hours_and_where_a_method_does_not_fit_a_warning_says_so():
    one, eight, few = (advice(examples=10_000, gpus=gpus) for gpus in ("", 8, 2))
    assert one.full.hours * one.full.gpus > 1.3 * one.lora.hours * one.lora.gpus
    assert eight.lora.hours < one.lora.hours / 4
    assert any("full fine-tuning takes 4 h100 GPUs, and 2 are available" in w for w in few.warnings)
    # so small that launching kernels takes all the time
    small = advice(model="tiny128", examples=4096, tokens_per_example=20)
    assert any("LoRA is not faster" in w for w in small.warnings)
    assert small.lora.step_s > NOT_FASTER * small.full.step_s
    large = advice(model="qwen3-235b-a22b-instruct-2507", examples=10_000, batch_size=2)
    (said,) = (w for w in large.warnings if "full fine-tuning does not fit: " in w)
    assert "max_length" in said and "dataset." not in said  # a column of the table
    assert large.full.gpus is None and large.full.cost_usd is None
    usual = " ".join(one.warnings)
    assert "not faster" not in usual and "not fit" not in usual


def test_sampling_is_in_the_price_of_reinforcement_learning():
    shape = {"max_length": 2048, "batch_size": 512}
    rl = {"task": "rl", "episodes": 51_200}
    long = advice(tokens_per_example=512, **rl, **shape)
    short = advice(tokens_per_example=64, **rl, **shape)
    its = advice(tokens_per_example=512, examples=51_200, **shape).full
    h100, rest, mine = known().machines["h100"](), 0.4 * 2048 - 512, long.full
    sampled = served_s(long.model, h100, mine.gpus, 512, 16, rest, 512)
    assert mine.step_s == pytest.approx(its.step_s + sampled)
    assert mine.hours == pytest.approx(mine.step_s / 36)
    assert short.full.hours < mine.hours and short.lora.hours < long.lora.hours
    assert any("include sampling" in w for w in long.warnings)


def test_a_serving_engine_reads_weights_keys_and_values_once_a_token():
    h100 = known().machines["h100"]()
    weights, cache = 2 * 7_504_658_432, 2 * 32 * 8 * 128 * 2
    one = served_s(LLAMA, h100, 1, 1, 1, 0, 100)
    assert one == pytest.approx(100 * (weights + cache * 50) / 3.35e12, rel=1e-6)
    room = 0.9 * 79.6 * 2**30 - 2 * 8_030_261_248
    rows = room / (cache * 8_192)  # at once; a finished answer makes room
    found = served_s(LLAMA, h100, 1, 2048, 16, 0, 8_192)
    token = (weights + rows * cache * 4_096) / 3.35e12
    assert found == pytest.approx(2048 / rows * 8_192 * token, rel=1e-6)
    assert served_s(LLAMA, h100, 8, 2048, 16, 0, 8_192) < found / 7
    small = dataclasses.replace(h100, gpu_memory_gib=16.0)
    assert served_s(LLAMA, small, 1, 8, 8, 0, 64) == float("inf")
