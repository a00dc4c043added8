"""Costs side by side: the planner's figures, and sums that can be done by hand."""

import dataclasses

import pytest

from lorasweep.customers.rules.costs import NOT_FASTER
from lorasweep.methods.lora import LoRA
from lorasweep.plan.placement import Placement, place
from lorasweep.plan.time import served_s
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import RunSpec
from tests.unit.customers.world import advice, known


def test_costs_are_those_of_the_plan_for_gpus():
    """The same model, batch and length through `place`: one number for both commands."""
    a = advice(examples=64_000, max_length=1024, tokens_per_example=409.6, batch_size=32)
    dataset = DatasetSpec(name="d", source="jsonl", location="d", max_length=1024)
    method = LoRA(rank=a.choice.rank)
    spec = RunSpec(model=a.model, dataset=dataset, method=method, batch_size=32, precision="bf16")
    found = place([spec], known().machines["h100"]())
    assert isinstance(found, Placement)
    lora = a.costs.lora
    assert lora.peak_gib == pytest.approx(found.memory_gib)
    assert lora.step_s == pytest.approx(found.step_s, rel=1e-3)
    assert lora.hours == pytest.approx(2000 * lora.step_s / 3600)
    assert lora.cost_usd == pytest.approx(lora.hours * lora.gpus * 2.95)


def test_prices_files_and_serving_by_hand():
    a = advice(examples=10_000, adapters_served=100, price_per_gpu_h=1.0)
    n, base = 16 * 2_753_792, 8_030_261_248  # parameters of rank 16 and of Llama-3.1-8B
    assert a.costs.lora.file_mib == pytest.approx(2 * n / 2**20)
    assert a.costs.lora.serving_gib == pytest.approx((2 * base + 100 * 2 * n) / 2**30)
    assert a.costs.full.serving_gib == pytest.approx(100 * 2 * base / 2**30)
    assert a.costs.full.cost_usd == pytest.approx(a.costs.full.hours * a.costs.full.gpus)


def test_full_fine_tuning_takes_more_gpus_and_too_few_give_a_warning():
    a = advice(examples=10_000, tokens_per_example=500)
    assert (a.costs.lora.gpus, a.costs.full.gpus) == (1, 4)
    assert a.costs.full.hours * a.costs.full.gpus > 1.3 * a.costs.lora.hours * a.costs.lora.gpus
    assert a.costs.flops_ratio == pytest.approx(0.672, abs=0.002)

    one, eight = advice(examples=10_000), advice(examples=10_000, gpus=8)
    assert eight.costs.lora.gpus == 8 == eight.costs.full.gpus
    assert eight.costs.lora.hours < one.costs.lora.hours / 4
    few = advice(examples=10_000, gpus=2)
    assert few.costs.lora.fits and not few.costs.full.fits
    assert any("full fine-tuning takes 4 h100 GPUs, and 2 are available" in w for w in few.warnings)


def test_where_lora_is_not_faster_or_full_fits_nowhere_a_warning_says_so():
    # so small that launching kernels takes all the time
    small = advice(model="tiny128", examples=4096, tokens_per_example=20)
    assert any("LoRA is not faster" in w for w in small.warnings)
    assert small.costs.lora.step_s > NOT_FASTER * small.costs.full.step_s
    large = advice(model="qwen3-235b-a22b-instruct-2507", examples=10_000, batch_size=2)
    assert any("full fine-tuning does not fit: " in w for w in large.warnings)
    assert large.costs.full.gpus is None and large.costs.full.cost_usd is None
    usual = " ".join(advice(examples=10_000).warnings)
    assert "not faster" not in usual and "not fit" not in usual


def test_sampling_is_in_the_price_of_reinforcement_learning():
    """By a serving engine on the same GPUs; the longer the answers, the more it takes."""
    shape = {"max_length": 2048, "batch_size": 512}
    rl = {"task": "rl", "episodes": 51_200}
    long = advice(tokens_per_example=512, **rl, **shape)
    short = advice(tokens_per_example=64, **rl, **shape)
    given = advice(tokens_per_example=512, examples=51_200, **shape)
    h100, rest = known().machines["h100"](), 0.4 * 2048 - 512
    mine, its = long.costs.full, given.costs.full
    sampled = served_s(long.model, h100, mine.gpus, 512, 16, rest, 512)
    assert mine.step_s == pytest.approx(its.step_s + sampled)
    assert mine.hours == pytest.approx(mine.step_s / 36)
    assert short.costs.full.hours < mine.hours and short.costs.lora.hours < long.costs.lora.hours
    assert any("include sampling" in w for w in long.warnings)


def test_a_serving_engine_reads_weights_keys_and_values_once_a_token():
    model, h100 = advice(examples=10_000).model, known().machines["h100"]()
    weights, cache = 2 * 7_504_658_432, 2 * 32 * 8 * 128 * 2
    one = served_s(model, h100, 1, 1, 1, 0, 100)
    assert one == pytest.approx(100 * (weights + cache * 50) / 3.35e12, rel=1e-6)
    room = 0.9 * 79.6 * 2**30 - 2 * 8_030_261_248
    rows = room / (cache * 8_192)  # at once; a finished answer makes room
    found = served_s(model, h100, 1, 2048, 16, 0, 8_192)
    token = (weights + rows * cache * 4_096) / 3.35e12
    assert found == pytest.approx(2048 / rows * 8_192 * token, rel=1e-6)
    assert served_s(model, h100, 8, 2048, 16, 0, 8_192) < found / 7
    small = dataclasses.replace(h100, gpu_memory_gib=16.0)
    assert served_s(model, small, 1, 8, 8, 0, 64) == float("inf")
