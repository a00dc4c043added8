"""A fully fine-tuned model as a folder of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasweep.errors import ModelError
from lorasweep.models.load import save_trained
from tests.customers import make_base, model_of


def test_the_measured_weights_become_a_folder_with_the_bases_tokenizer(tmp_path):
    base = make_base(tmp_path / "base")
    spec, dirs = model_of(base), [str(tmp_path)]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # changes far below a step of bf16, in which the base was published
    weights = {n: p.detach() * (1 + 1e-5) for n, p in before.named_parameters()}
    save_trained(spec, dirs, weights, tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == torch.float32
    for name, p in after.named_parameters():
        assert torch.equal(p, weights[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Yes, 7").input_ids == AutoTokenizer.from_pretrained(base)("Yes, 7").input_ids
    with pytest.raises(ModelError, match=r"has no parameters lm_head\.bias"):
        save_trained(spec, dirs, {"lm_head.bias": torch.zeros(1)}, tmp_path / "wrong")
