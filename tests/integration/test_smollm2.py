"""The real pretrained model: loads from GGUF, speaks, and is adapted as PEFT adapts it."""

import copy
import dataclasses
import os

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate
from lorasweep.data.examples import Example
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.describe import describe_model
from lorasweep.models.targets import find_targets
from lorasweep.train.objectives.nll import nll_sums
from tests.world import ROOT, compose_request, write_splits

WEIGHTS = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(
        not WEIGHTS.is_file() and not os.environ.get("CI"), reason="no weights: run `make weights`"
    ),
]


@pytest.fixture(scope="module")
def world():
    spec = compose_request(["scale=small", "+sweep=lr_ratio"]).points[-1].spec
    return spec, models.load(spec.model, [str(ROOT / "models")], "fp32")


def test_the_file_alone_describes_it(world):
    spec, _ = world
    found, models_dir = describe_model(str(WEIGHTS))
    assert models_dir == str(WEIGHTS.parent)
    same = {"name": spec.model.name, "context_length": 0}
    assert dataclasses.replace(found, **same) == spec.model


def test_it_knows_the_capital_of_france(world):
    _, base = world
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = base.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0])


def test_text_is_masked_to_the_answer(world, tmp_path):
    spec, base = world
    rows = [{"question": "What is 3 + 4?", "answer": "It is 7."}]
    write_splits(tmp_path / "gsm8k", rows)
    few = dataclasses.replace(spec.dataset, revision="", n_test_curve=1)
    e = data.load(few, [str(tmp_path)], base.tokenizer).test[0]
    assert base.tokenizer.decode(e.tokens[e.loss], skip_special_tokens=True) == "It is 7."
    assert e.tokens[-1] == base.tokenizer.eos_token_id


def test_one_step_equals_peft_in_float64_with_the_tied_head_adapted(world, norms_in_float64):
    from peft import LoraConfig, get_peft_model

    spec, base = world
    spec = dataclasses.replace(spec, method=LoRA(rank=4))
    model = copy.deepcopy(base.model).double()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    # PEFT would tie an adapter on a tied head to the embedding; the reference has a separate head
    reference = copy.deepcopy(model)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    reference.config.tie_word_embeddings = False
    config = LoraConfig(r=4, lora_alpha=32, target_modules=names, bias="none")
    reference = get_peft_model(reference, config).double()
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    targets = find_targets(model, spec.model, spec.method.target_layers())
    trainables = spec.method.attach(model, targets, [spec.method], [0])
    ours = trainables.parameters()
    assert sum(p.numel() for p in ours.values()) == spec.method.n_trainable(spec.model)
    parts = {n: trainables.part_of(n)[0] for n in ours}
    pair = {n: f"base_model.model.{p[:-2]}.lora_{p[-1]}.default.weight" for n, p in parts.items()}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for n, p in ours.items():
            if ".B" in n:  # away from zero, so that A gets a gradient too
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.01)
            theirs[pair[n]].copy_(p[0])
    ids = base.tokenizer("Question: What is 3 + 4?\nAnswer: It is 7.").input_ids
    example = Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 8)
    batch = collate([example])
    for m in (model, reference.get_base_model()):
        nll_sums(m, batch, "fp64").sum().backward()
    for n, p in ours.items():
        other = theirs[pair[n]].grad
        assert float(p.grad.abs().max()) > 0, n
        assert torch.allclose(p.grad[0], other, rtol=1e-9, atol=1e-9), n
    assert model.model.embed_tokens.weight.grad is None
