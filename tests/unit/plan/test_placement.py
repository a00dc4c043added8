"""Memory, time and place of runs on GPUs: components by hand, what fits, and what would."""

import dataclasses
from functools import cache

import pytest

from lorasweep.config.compose import shipped_model
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.load import layer_bytes, load_of
from lorasweep.plan.memory import Layout, memory_parts
from lorasweep.plan.placement import MEMORY_ERROR, Misfit, Placement, place
from lorasweep.plan.time import TRAINING_SHARE, step_parts, step_seconds
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


LLAMA = load_of(shipped_model("llama-3.1-8b"), FullFT())


def test_states_take_sixteen_bytes_a_trained_parameter_and_are_split():
    for gpus in (1, 8):
        parts = memory_parts(LLAMA, Layout(gpus, 1, True), 1024)
        states = sum(parts[name] for name in ("trained weights", "gradients", "moments"))
        assert states == pytest.approx(16 * 8_030_261_248 / gpus) and parts["frozen weights"] == 0
    lora = load_of(shipped_model("llama-3.1-8b"), LoRA(rank=256))
    parts = memory_parts(lora, Layout(1, 1, True), 1024, n_runs=2)
    assert parts["frozen weights"] == 2 * 8_030_261_248
    assert parts["moments"] == 2 * 8 * 704_970_752
    few, many = (memory_parts(LLAMA, Layout(1, rows), 1024)["logits"] for rows in (64, 128))
    assert few == many  # a chunk, whatever the batch


def test_a_layer_of_a_model_in_bf16_keeps_one_input_for_three_matrices_and_one_for_two():
    """Models in fp32: test_saved_tensors.py."""
    h, kv, f = 4096, 1024, 14336
    assert layer_bytes(LLAMA, stream=2) == 2 * 6 * h + 2 * 2 * h + 4 * (h + kv) + 8 * f
    whole = memory_parts(LLAMA, Layout(1, 2, False), 1000)["activations"]
    again = memory_parts(LLAMA, Layout(1, 2, True), 1000)["activations"]
    assert whole == 2000 * (32 * layer_bytes(LLAMA) + 3 * 4 * h)
    assert again == 2000 * (32 * 4 * h + layer_bytes(LLAMA) + 3 * 4 * h)


def test_copies_are_of_what_products_take_in_another_type():
    def copies(load, gpus, **how):
        return memory_parts(load, Layout(gpus, 1, False), 1024, **how)["copies and buffers"]

    lora = load_of(LLAMA.model, LoRA(rank=256))
    layer, outer = 6_979_321_856 / 32, 1_050_939_392  # weights of a layer and outside the layers
    assert copies(LLAMA, 1) == 2 * 7_504_658_432
    assert copies(lora, 1, n_runs=2) == 2 * 2 * 704_970_752  # bf16 of the adapters
    assert copies(lora, 1, frozen_bytes=4) == 2 * (7_504_658_432 + 704_970_752)
    # embedding and unembedding in fp32; two layers, and one of gradients in bf16 and in fp32
    held, head = 4 * outer + 4 * layer + 6 * layer, 128_256 * 4096
    # the unembedding's gradient, and what of the embedding's does not fit where activations were
    parts = memory_parts(LLAMA, Layout(4, 1, True), 64)
    left = parts["activations"] + parts["logits"]
    more = 4 * (outer - head) - left
    assert more > 1e9 and parts["copies and buffers"] == pytest.approx(held + 4 * head + more)
    assert copies(LLAMA, 4) == pytest.approx(held + 4 * head)
    added = 704_970_752 / 32
    assert copies(lora, 4) == pytest.approx(2 * outer + 4 * (layer + added) + 6 * added)


def test_joined_rows_are_kept_apart_by_a_mask_in_every_layer_that_is_kept():
    def masks(rows, checkpointing, joined=True):
        layout = Layout(1, rows, checkpointing, joined=joined)
        return memory_parts(LLAMA, layout, 1000, n_runs=2)["attention masks"]

    assert masks(4, False) == 2 * 4000**2 * (1 + 2 * 32) and masks(4, True) == 2 * 4000**2 * 3
    assert masks(1, False) == masks(4, False, joined=False) == 0  # one sequence needs none
    spec = spec_of(batch_size=32)
    apart, joined = place([spec], card()), place([spec], card(), join_rows=True)
    masked = joined.memory["attention masks"]
    assert joined.layout.rows == apart.layout.rows > 1 and masked > 2**30
    assert joined.memory_gib - apart.memory_gib == pytest.approx(masked / 2**30)


def test_an_update_takes_its_products_at_the_share_of_the_peak_and_more():
    layout = Layout(1, 4, False, 2)
    parts = step_parts(LLAMA, layout, 1024, card())
    flops = 6 * LLAMA.model.n_active_params * 8 * 1024
    assert parts["products"] == pytest.approx(flops / (9.89e14 * 0.801 * TRAINING_SHARE))
    assert parts["communication"] == 0 and step_seconds(parts) > parts["products"]
    again = step_parts(LLAMA, dataclasses.replace(layout, checkpointing=True), 1024, card())
    assert 1.28 < again["products"] / parts["products"] < 4 / 3  # the head is not computed again
    two = step_parts(LLAMA, dataclasses.replace(layout, gpus=2), 1024, card())
    wires = 2 * 2 * 8_030_261_248 + 4 * 8_030_261_248
    assert two["communication"] == pytest.approx(2 * wires / 2 / (0.8 * 4.5e11))
    across = step_parts(LLAMA, dataclasses.replace(layout, gpus=16), 1024, card())
    assert across["communication"] > 1.7 * two["communication"]
    tiny = step_parts(load_of(LLAMA.model, LoRA(rank=1)), Layout(1, 1, False), 4, card())
    assert step_seconds(tiny) == tiny["launch"]


@pytest.mark.parametrize(
    ("model", "method", "name", "gpus"),
    [
        ("llama-3.2-1b", FullFT(), "h100", 1),
        ("llama-3.1-8b", LoRA(rank=16), "a100", 1),
        ("llama-3.1-8b", FullFT(), "h100", 4),
        ("llama-3.1-8b", FullFT(), "h200", 2),
        ("llama-3.1-70b", LoRA(rank=16), "h100", 4),
        ("llama-3.1-70b", FullFT(), "h100", 32),
        ("qwen3-30b-a3b-base", LoRA(rank=16), "h100", 1),
        ("qwen3-235b-a22b-instruct-2507", FullFT(), "h100", 128),
    ],
)
def test_a_run_gets_the_fewest_gpus_that_hold_it(model, method, name, gpus):
    spec, hardware = spec_of(model, method), card(name)
    found = place([spec], hardware)
    assert isinstance(found, Placement) and found.layout.gpus == gpus
    assert found.memory_gib * (1 + MEMORY_ERROR) <= hardware.gpu_memory_gib
    layout = found.layout
    assert layout.gpus * layout.rows * layout.accumulation == spec.batch_size
    if gpus > 1:
        assert isinstance(place([spec], hardware, most_gpus=gpus // 2), Misfit)


def test_what_fits_nowhere_says_what_would():
    long = dataclasses.replace(paper().dataset, max_length=2_000_000)
    found = place([spec_of(method=FullFT(), dataset=long)], card())
    assert "fullft of llama-3.1-8b takes" in found.why and "h100 has 80 GiB" in found.why
    odd = place([spec_of("llama-3.1-70b", FullFT(), batch_size=12)], card())
    few = place([spec_of(method=FullFT())], card(), most_gpus=2)
    remedies = ("max_length below 2000000", "power of two divides (12 given)", "more than 2 GPU(s)")
    for misfit, words in zip((found, odd, few), remedies, strict=True):
        assert isinstance(misfit, Misfit) and words in misfit.remedy
