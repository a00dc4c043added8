"""Shapes of the models: published sizes and published counts of trained parameters."""

import dataclasses

import pytest

from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.spec.revision import is_unpinned
from lorasweep.spec.run import validate
from tests.world import compose_request, tiny_spec

PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-8b-base": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-base": 30_532_122_624,
    "qwen3-30b-a3b-instruct-2507": 30_532_122_624,
    "qwen3-235b-a22b-instruct-2507": 235_093_634_560,
}
"""The fourteen models of the study's fit of learning rates, with the sizes that the hub shows."""

PER_RANK = {
    "llama-3.2-1b": (491_520, 212_992, 130_304),
    "llama-3.2-3b": (946_176, 573_440, 131_328),
    "llama-3.1-8b": (1_769_472, 851_968, 132_352),
    "llama-3.1-70b": (8_847_360, 4_096_000, 136_448),
    "qwen3-4b-instruct-2507": (1_327_104, 737_280, 154_496),
    "qwen3-8b": (1_769_472, 958_464, 156_032),
    "qwen3-30b-a3b": (6_488_064, 835_584, 153_984),
}
"""Trained parameters a unit of rank for mlp, attention and unembedding: the table of the study's
team, but for the experts of the last, which it counts with shared factors. Theirs is the study's
text: an adapter an expert, of rank / 8."""


def model_of(name):
    return compose_request([f"model={name}", "dataset=gsm8k_hub"]).points[0].spec.model


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_a_model_has_its_published_size_and_is_pinned(name, count):
    model = model_of(name)
    assert model.n_params == count
    assert model.location.split("/")[1].lower() == model.name == name
    assert not is_unpinned(model) and model.problem is None


@pytest.mark.parametrize(("name", "counts"), PER_RANK.items())
def test_lora_trains_the_published_number_of_parameters(name, counts):
    model, rank = model_of(name), 8
    sets = ("mlp", "attention", "unembedding")
    assert [LoRA(rank=rank, layers=s).n_trainable(model) / rank for s in sets] == list(counts)
    assert LoRA(rank=rank).n_trainable(model) == rank * sum(counts)


def test_tokens_pass_through_the_active_experts_only():
    """The 30B model is published as one with 3.3B active parameters, embedding included."""
    model = model_of("qwen3-30b-a3b")
    embedding = model.vocab_size * model.hidden_size
    norms = model.n_params - model.n_matmul_params - embedding
    assert model.n_active_params + embedding + norms == 3_353_032_704
    assert FullFT().step_flops(model, 1) == 6 * model.n_active_params
    adapters = (LoRA(rank=8).step_flops(model, 1) - 4 * model.n_active_params) / 6
    of_experts = 48 * 8 * 3 * (2048 + 768)  # 8 experts of rank 1 in each of 48 layers
    assert adapters == of_experts + 8 * (835_584 + 153_984)
    dense = tiny_spec().model
    assert dense.n_active_params == dense.n_matmul_params
    assert "n_experts" not in dense.canonical and "n_active_experts" not in dense.canonical


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_rank_that_experts_cannot_share_is_refused(rank):
    spec = dataclasses.replace(tiny_spec(), model=model_of("qwen3-30b-a3b-base"))
    with pytest.raises(SpecError, match=r"expert_rank=active\. Expected a multiple of 8: 8, 16"):
        validate(dataclasses.replace(spec, method=LoRA(rank=rank)))
    validate(dataclasses.replace(spec, method=LoRA(rank=rank, layers="attention")))


@pytest.mark.parametrize("counts", [(8, 0), (0, 2), (4, 8), (-1, -1)])
def test_active_experts_are_some_of_all(counts):
    model = dataclasses.replace(tiny_spec().model, n_experts=counts[0], n_active_experts=counts[1])
    assert "expected 1 to n_experts" in model.problem
