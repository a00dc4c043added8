"""Memory, time and place of runs on GPUs, some of which sample: by hand, and of whole sweeps."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorasweep.config.compose import shipped_model
from lorasweep.errors import SpecError
from lorasweep.launch.slurm.submit import hardware_of
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan import load as shapes
from lorasweep.plan.detect import Hardware
from lorasweep.plan.load import (
    LAUNCH_S,
    TRAINING_SHARE,
    Layout,
    evaluated_completions,
    layer_bytes,
    load_of,
    memory_parts,
    run_flops,
    step_parts,
    step_seconds,
    train_flops,
)
from lorasweep.plan.planner import MEMORY_ERROR, Planner, costs
from lorasweep.plan.planner import place as place_on
from lorasweep.spec.execution import Exec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Replicates
from lorasweep.train import sampling
from tests.world import compose_request


@cache
def card(name="h100"):
    return hardware_of(compose_request([f"hardware={name}", "action=plan"]))


@cache
def paper():
    return compose_request(["scale=paper", "method=lora", "model=llama-3.1-8b"]).points[0].spec


def spec_of(model="llama-3.1-8b", method=None, **changes):
    method = method or LoRA(rank=16)
    return dataclasses.replace(paper(), model=shipped_model(model), method=method, **changes)


def place(spec, hardware=None, **how):
    return place_on(
        spec, hardware or card(), **{"gpus": None, "checkpointing": (False, True), **how}
    )


LLAMA, LORA = (load_of(shipped_model("llama-3.1-8b"), m) for m in (FullFT(), LoRA(rank=256)))
N_PARAMS, WEIGHTS, ADAPTERS = 8_030_261_248, 7_504_658_432, 704_970_752
"""Parameters of Llama-3.1-8B, its weights in products, and adapters of rank 256."""
SPEED = 9.89e14 * 0.801 * TRAINING_SHARE


def parts_of(load, *layout, length=1024, **how):
    return memory_parts(load, Layout(*layout), length, **how)


def test_states_take_sixteen_bytes_a_trained_parameter_and_are_split():
    for gpus in (1, 8):
        parts = parts_of(LLAMA, gpus, 1, True)
        states = sum(parts[name] for name in ("trained weights", "gradients", "moments"))
        assert states == pytest.approx(16 * N_PARAMS / gpus) and parts["frozen weights"] == 0
    parts = parts_of(LORA, 1, 1, True, n_runs=2)
    assert parts["frozen weights"] == 2 * N_PARAMS and parts["moments"] == 2 * 8 * ADAPTERS
    few, many = (parts_of(LLAMA, 1, rows)["logits"] for rows in (64, 128))
    assert few == many  # a chunk, whatever the batch
    # activations are of all layers, or of one and the inputs of all (one: test_saved_tensors.py)
    layer, width = layer_bytes(LLAMA), 4 * 4096
    for checkpointing, kept in ((False, 32 * layer), (True, 32 * width + layer)):
        found = parts_of(LLAMA, 1, 2, checkpointing, length=1000)["activations"]
        assert found == 2000 * (kept + 3 * width)


def test_an_update_takes_its_products_at_the_share_of_the_peak_and_more():
    one, again, two, across = (
        step_parts(LLAMA, Layout(gpus, 4, checkpointing, 2), 1024, card())
        for gpus, checkpointing in ((1, False), (1, True), (2, False), (16, False))
    )
    flops = 6 * LLAMA.model.n_active_params * 8 * 1024
    assert one["products"] == pytest.approx(flops / SPEED)
    assert one["communication"] == 0 and step_seconds(one) > one["products"]
    assert 1.28 < again["products"] / one["products"] < 4 / 3  # the head is not computed again
    wires = 2 * 2 * N_PARAMS + 4 * N_PARAMS
    assert two["communication"] == pytest.approx(2 * wires / 2 / (0.8 * 4.5e11))
    assert across["communication"] > 1.7 * two["communication"]
    tiny = step_parts(load_of(LLAMA.model, LoRA(rank=1)), Layout(1, 1, False), 4, card())
    assert step_seconds(tiny) == tiny["launch"]


def test_a_run_gets_the_fewest_gpus_that_hold_it_and_what_fits_nowhere_says_what_would():
    for model, method, name, gpus in (
        ("llama-3.1-8b", LoRA(rank=16), "a100", 1),
        ("llama-3.1-8b", FullFT(), "h200", 2),
        ("qwen3-235b-a22b-instruct-2507", FullFT(), "h100", 128),
    ):
        spec, hardware = spec_of(model, method), card(name)
        found = place(spec, hardware)
        layout = found.layout
        assert not found.why and layout.gpus == gpus
        assert found.memory_gib * (1 + MEMORY_ERROR) <= hardware.gpu_memory_gib
        assert layout.gpus * layout.rows * layout.accumulation == spec.batch_size
        assert gpus == 1 or place(spec, hardware, gpus=gpus // 2).why
    long = dataclasses.replace(paper().dataset, max_length=2_000_000)
    found = place(spec_of(method=FullFT(), dataset=long, batch_size=12))
    assert "fullft of llama-3.1-8b takes" in found.why
    assert "max_length below 2000000" in found.remedy and "(12 given" in found.remedy
    for name in ("a100", "h100", "h200", "l40s"):  # the study has runs in each precision
        assert [*card(name).matmul_flops_s] == ["bf16", "fp32", "fp64"]
    hardware = dataclasses.replace(card(), matmul_flops_s={"bf16": 1e14})
    with pytest.raises(SpecError, match=r"matmul_flops_s\.fp32"):
        Planner(hardware, Exec()).kind(spec_of(precision="fp32"))


def points(arm, method=None, model="llama-3.1-8b", **changes):
    rates = (1e-4, 2e-4, 4e-4)
    return [Point(arm, spec_of(model, method, lr=lr, **changes)) for lr in rates]


def forecast(runs, **settings):
    return Planner(card(), Exec(**settings)).forecast(runs, Replicates())


def cost(runs, **settings):
    return costs("mine", forecast(runs, **settings), card(), 120)


def test_a_sweep_takes_what_its_runs_take_alone():
    runs = points("lora")
    found, (kind,) = cost(runs), set(forecast(runs).values())
    assert [found[k] for k in ("runs", "packs", "jobs")] == [3, 3, 3] and not found["misfits"]
    assert found["gpu_hours"] == pytest.approx(3 * kind.place.seconds / 3600)
    spec = runs[0].spec
    assert found["tokens"] == 3 * spec.steps * spec.batch_size * round(0.4 * 1024)
    assert found["cost_usd"] == pytest.approx(2.95 * found["gpu_hours"])
    small = points("lora", batch_size=8)
    (packed,), (alone,) = (set(forecast(small, pack_size=n).values()) for n in (None, 1))
    assert packed.pack_size > 1 and cost(small)["packs"] == 1 and alone.hours >= packed.hours
    found = cost(points("fullft", FullFT(), batch_size=3))
    (misfit,) = found["misfits"]
    assert (misfit["kind"], misfit["runs"]) == ("fullft of llama-3.1-8b", 3)
    assert found["runs"] == 0


def test_runs_beyond_the_limit_are_left_out():
    small, large = points("lora"), points("fullft", FullFT(), "llama-3.1-70b")
    for most, kept in ((1, small), (16, small), (32, [*small, *large])):
        assert Planner(card(), Exec(max_gpus=most)).without_too_large([*small, *large]) == kept


def test_settings_are_the_plans_unless_the_user_set_them():
    runs = [*points("lora"), *points("fullft", FullFT())]
    (one, adapters), (four, full) = Planner(card(), Exec(runs_dir="mine")).settings(runs)
    assert (adapters, full) == (runs[:3], runs[3:]) and one.runs_dir == "mine"
    assert (one.world_size, four.world_size, four.activation_checkpointing) == (1, 4, True)
    for spec, exec_ in ((adapters[0].spec, one), (full[0].spec, four)):
        layout = Planner(card(), Exec()).kind(spec).place.layout
        assert (exec_.micro_batch_size, exec_.world_size) == (layout.rows, layout.gpus)
    ((eight, both),) = Planner(card(), Exec(world_size=8, micro_batch_size=1)).settings(runs)
    assert both == runs and (eight.world_size, eight.micro_batch_size) == (8, 1)
    assert Planner(Hardware("box", gpus=8), Exec()).settings(runs) == [(Exec(), runs)]
    with pytest.raises(SpecError, match=r"a larger exec\.world_size"):
        Planner(card(), Exec(world_size=2)).settings(runs)


# ---------------------------------------------------------------- runs that sample


@cache
def reward_runs():
    """The first run of each task and method: (data set, method) -> spec."""
    points = compose_request(["+sweep=rl", "scale=paper"]).points
    return {(p.spec.dataset.name, p.spec.method.name): p.spec for p in reversed(points)}


def gsm8k(method="lora", **changes):
    return dataclasses.replace(reward_runs()["gsm8k_boxed_reward", method], **changes)


def seconds(spec, answers=None, gpus=1, n_runs=1, group=16, hardware=None):
    count = (n_runs, gpus, answers or spec.batch_size, group)
    return shapes.sampling_s(spec, hardware or card(), *count)


def test_the_plan_and_the_sampler_draw_as_many_answers_at_once(monkeypatch):
    assert (shapes.ROWS, shapes.CACHE_SHARE) == (sampling.ROWS, sampling.CACHE_SHARE)
    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config = SimpleNamespace(**shape, num_attention_heads=32)
    config.get_text_config = lambda: config
    on_card = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(config=config, parameters=lambda: iter([on_card]))
    properties = SimpleNamespace(total_memory=card().gpu_memory_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for n_runs in (1, 4):
        prompts = [[np.zeros(768 - 256, dtype=int)]] * n_runs
        at_once = sampling.completions_at_once(model, prompts, 256, "bf16")
        rows, rounds = shapes.rounds_of(gsm8k(), card(), n_runs, 1, 2048, 16)
        assert rows == at_once // 16 * 16 > 0 and rows * rounds >= 2048
    one = [[np.zeros(2, dtype=int)]]
    assert sampling.completions_at_once(model, one, 1, "bf16") == sampling.ROWS


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
    model = shipped_model("qwen3-30b-a3b-base")  # experts that are hit are read
    one, some, all_ = (shapes.read_params(model, n) for n in (1, 8, 1e4))
    assert (one, all_) == pytest.approx((model.n_active_params, model.n_matmul_params))
    assert one < some < all_


def test_a_rewarded_run_samples_learns_and_is_evaluated():
    spec = gsm8k()
    tokens = 2048 * 0.4 * 256 + 128 * 0.4 * 512
    learned = spec.method.step_flops(spec.model, 2048 * round(0.4 * 768))
    assert train_flops(spec) == pytest.approx(spec.steps * (2 * WEIGHTS * tokens + learned))
    assert evaluated_completions(spec) == [1319, *[256] * 8, 1319, 256]
    evaluated = 2 * WEIGHTS * (2 * 1319 + 9 * 256) * 0.4 * 768
    assert run_flops(spec) - train_flops(spec) == pytest.approx(evaluated, rel=1e-3)
    found = place(spec)
    rest = {**found.step}
    assert found.step_s == pytest.approx(rest.pop("sampling") + step_seconds(rest))
    evaluation = sum(seconds(spec, n, group=1) for n in evaluated_completions(spec))
    assert found.seconds == pytest.approx(spec.steps * found.step_s + evaluation)
    assert found.sampling_s == pytest.approx(spec.steps * found.step["sampling"] + evaluation)
