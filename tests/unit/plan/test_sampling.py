"""Memory and time of sampling completions: components by hand, and the plan of RL runs."""

import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorasweep.config.compose import shipped_model
from lorasweep.plan import load as shapes
from lorasweep.plan import memory, time
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import evaluated_completions, load_of, run_flops, train_flops
from lorasweep.plan.memory import pack_bytes
from lorasweep.plan.placement import Placement, place
from lorasweep.plan.time import LAUNCH_S, TRAINING_SHARE, step_seconds
from lorasweep.train import sampling
from tests.unit.plan.test_placement import card
from tests.world import compose_request

WEIGHTS = 7_504_658_432  # of Llama-3.1-8B in products
SPEED = 9.89e14 * 0.801 * TRAINING_SHARE


@cache
def runs():
    """The first run of each task and method: (data set, method) -> spec."""
    points = compose_request(["+sweep=rl", "scale=paper"]).points
    return {(p.spec.dataset.name, p.spec.method.name): p.spec for p in reversed(points)}


def gsm8k(method="lora", **changes):
    spec = runs()["gsm8k_boxed_reward", method]
    return dataclasses.replace(spec, **changes)


def seconds(spec, answers=None, gpus=1, n_runs=1, group=16, hardware=None):
    count = (n_runs, gpus, answers or spec.batch_size, group)
    return time.sampling_s(load_of(spec.model, spec.method), spec, hardware or card(), *count)


def test_the_plan_and_the_sampler_draw_as_many_answers_at_once(monkeypatch):
    assert (memory.ROWS, memory.CACHE_SHARE) == (sampling.ROWS, sampling.CACHE_SHARE)
    spec, card_bytes = gsm8k(), card().gpu_memory_gib * 2**30
    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config = SimpleNamespace(**shape, num_attention_heads=32)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config),
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]),
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=card_bytes)
    )
    for n_runs in (1, 4):
        prompts = [[np.zeros(768 - 256, dtype=int)]] * n_runs
        at_once = sampling.completions_at_once(model, prompts, 256, "bf16")
        rows, rounds = memory.rounds_of(spec, card(), n_runs, 1, 2048, 16)
        assert rows == at_once // 16 * 16 > 0 and rows * rounds >= 2048
    one = [[np.zeros(2, dtype=int)]]
    assert sampling.completions_at_once(model, one, 1, "bf16") == sampling.ROWS


def test_keys_and_values_of_the_answers_at_once_are_part_of_the_peak():
    spec = gsm8k()
    assert shapes.cache_bytes(spec.model, 2) == 2 * 32 * 8 * 128 * 2
    rows, _ = memory.rounds_of(spec, card(), 1, 1, 2048, 16)
    parts = memory.sampling_memory(load_of(spec.model, spec.method), spec, card(), 1, 1, 2)
    assert parts["keys and values"] == rows * 768 * 131_072 <= 0.3 * 79.6 * 2**30
    assert parts["frozen weights"] == 2 * 8_030_261_248
    full = gsm8k("fullft")
    parts = memory.sampling_memory(load_of(full.model, full.method), full, card(), 1, 4, 2)
    # put together in each: layers in bf16, embedding and unembedding as they are trained
    assert parts["copies and buffers"] == 2 * 6_979_321_856 + 4 * 1_050_939_392
    assert parts["trained weights"] + parts["moments"] == 12 * 8_030_261_248 / 4
    long = runs()["deepmath_reward", "fullft"]
    found = place([long], card())
    assert isinstance(found, Placement) and "keys and values" in found.memory


def test_a_token_takes_as_long_as_memory_or_products_or_launches_need():
    prefill = 2 * WEIGHTS * 0.4 * 512 / SPEED  # of one prompt
    one = gsm8k(group_size=2)
    kernels = 45 * 32 + 6 * 225 + 40
    drawn = seconds(one, answers=2, group=2)
    assert drawn == pytest.approx(256 * kernels * LAUNCH_S + prefill, rel=1e-3)
    slow = dataclasses.replace(card(), bandwidth_bytes_s=1e11)
    cache, logits = 3 * 131_072 * (0.4 * 512 + 0.2 * 256), 150 * 128_256
    token = (2 * WEIGHTS + 0.4 * 2 * (cache + logits)) / 1e11
    assert seconds(one, answers=2, group=2, hardware=slow) == pytest.approx(256 * token + prefill)
    weak = dataclasses.replace(card(), matmul_flops_s={"bf16": 1e12})
    share = 0.801 * TRAINING_SHARE
    token = 2 * WEIGHTS * 0.4 * 240 / (1e12 * share)
    found = seconds(gsm8k(), answers=240, hardware=weak)
    assert found == pytest.approx(256 * token + 15 * prefill * SPEED / (1e12 * share))
    # weights of fp32 that are rounded at every token, unless several GPUs send them rounded
    full = gsm8k("fullft", group_size=2)
    alone = seconds(full, answers=2, group=2, hardware=slow)
    assert alone / seconds(one, answers=2, group=2, hardware=slow) > 3.9
    assert seconds(full, 2, 2, hardware=slow) < alone / 3


def test_on_a_cpu_keys_and_values_are_part_of_the_peak_too():
    """1,024 held-out prompts of GSM8K, drawn at once."""
    fields = ("objective=policy_gradient", "group_size=8", "max_new_tokens=128", "method=lora")
    asked = ("scale=small", "dataset=gsm8k_reward", "batch_size=32", *fields)
    spec = compose_request(asked).points[0].spec
    given = dataclasses.replace(spec, objective="sft", group_size=0, max_new_tokens=0)
    box = Hardware("box", cores=2, memory_gib=64.0)
    sampled = pack_bytes(1, spec, box, 1)
    cache = 1024 * 512 * 2 * 30 * 3 * 64 * 2
    assert cache < sampled - pack_bytes(1, given, box, 1) + 2**30 < 1.5 * cache


def test_more_gpus_share_the_answers_and_a_pack_shares_the_weights():
    # 9 rounds of 15 prompts or fewer, and 3
    assert seconds(gsm8k(), gpus=1) / seconds(gsm8k(), gpus=4) == pytest.approx(3)
    few = gsm8k(batch_size=32)
    assert seconds(few, n_runs=4) < 1.1 * seconds(few)


def test_of_experts_those_that_are_hit_are_read():
    model = shipped_model("qwen3-30b-a3b-base")
    assert shapes.read_params(model, 1) == pytest.approx(model.n_active_params)
    assert shapes.read_params(model, 1e4) == pytest.approx(model.n_matmul_params)
    assert model.n_active_params < shapes.read_params(model, 8) < model.n_matmul_params


def test_a_rewarded_run_samples_learns_and_is_evaluated():
    spec = gsm8k()
    tokens = 2048 * 0.4 * 256 + 128 * 0.4 * 512
    sampled = 2 * WEIGHTS * tokens
    learned = spec.method.step_flops(spec.model, 2048 * round(0.4 * 768))
    assert train_flops(spec) == pytest.approx(spec.steps * (sampled + learned))
    assert evaluated_completions(spec) == [1319, *[256] * 8, 1319, 256]
    n = 2 * 1319 + 9 * 256
    evaluated = 2 * WEIGHTS * n * 0.4 * 768
    assert run_flops(spec) - train_flops(spec) == pytest.approx(evaluated, rel=1e-3)
    words = compose_request(["+sweep=rl", "scale=tiny"]).points[0].spec
    assert evaluated_completions(words) == [] and run_flops(words) > train_flops(words)
    found = place([spec], card())
    rest = {k: v for k, v in found.step.items() if k != "sampling"}
    assert found.step_s == pytest.approx(step_seconds(rest) + found.step["sampling"])
    evaluation = time.evaluation_s(load_of(spec.model, spec.method), spec, card(), 1, 1)
    assert found.seconds == pytest.approx(spec.steps * found.step_s + evaluation)
    assert found.sampling_s == pytest.approx(spec.steps * found.step["sampling"] + evaluation)
    given = dataclasses.replace(spec, objective="sft", group_size=0, max_new_tokens=0)
    assert place([given], card()).sampling_s == 0


def test_the_plan_of_the_studys_rewards_says_what_sampling_takes(command):
    asked = ("+sweep=rl", "scale=paper", "action=plan", "hardware=h100")
    (rl,) = json.loads(command(*asked, "format=json").stdout)["sweeps"]
    assert rl["runs"] == 3 * 3 * 7 + 3 * 3 * 3 * 2 and rl["fits"] and rl["gpus_a_run"] == [1, 8]
    assert 0.5 < rl["gpu_hours_of_sampling"] / rl["gpu_hours"] < 1
    assert f"{rl['gpu_hours_of_sampling']:,.0f} of the GPU-hours" in command(*asked).stdout
