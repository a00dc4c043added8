"""The real pretrained model: loads from GGUF, speaks, and is adapted as PEFT adapts it."""

import copy
import dataclasses
import os

import numpy as np
import pytest
import torch

from lorasweep.data.examples import Example, collate
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.describe import describe_model
from lorasweep.train.objectives.nll import nll_sums
from tests.training import beside_peft, pack_of
from tests.world import ROOT, compose_request

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


def test_the_file_alone_describes_it_and_it_knows_the_capital_of_france(world):
    spec, base = world
    found, models_dir = describe_model(str(WEIGHTS))
    assert models_dir == str(WEIGHTS.parent)
    same = {"name": spec.model.name, "context_length": 0}
    assert dataclasses.replace(found, **same) == spec.model
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = base.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0])


def test_one_step_equals_peft_in_float64_with_the_tied_head_adapted(world, norms_in_float64):
    spec, base = world
    method, model = LoRA(rank=4), copy.deepcopy(base.model).double()
    # PEFT would tie an adapter on a tied head to the embedding; the reference has a separate head
    reference = copy.deepcopy(model)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    reference.config.tie_word_embeddings = False
    trainables = pack_of([method], model, spec.model, perturb=0.01)
    reference, pairs = beside_peft(trainables, reference, method)
    assert sum(p.numel() for p, _ in pairs) == method.n_trainable(spec.model)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours[0])
    ids = base.tokenizer("Question: What is 3 + 4?\nAnswer: It is 7.").input_ids
    batch = collate([Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 8)])
    for m in (model, reference.get_base_model()):
        nll_sums(m, batch, "fp64").sum().backward()
    for ours, theirs in pairs:
        assert float(theirs.grad.abs().max()) > 0
        assert torch.allclose(ours.grad[0], theirs.grad, rtol=1e-9, atol=1e-9)
    assert model.model.embed_tokens.weight.grad is None
