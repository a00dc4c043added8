"""Rows end to end in one sequence: the loss and gradients of rows apart, on transformers' passes."""

import numpy as np
import pytest
import torch

from lorasweep.data.batches import collate, merge
from lorasweep.data.examples import Example
from lorasweep.errors import ModelError
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.head import check_rows_stay_apart
from lorasweep.spec.execution import Exec
from lorasweep.train.objectives import held_out, nll, sft
from tests.training import EPS, ROUNDING
from tests.unit.train.test_logits_in_chunks import LIMIT, attached, loss_and_gradients
from tests.unit.train.test_logits_in_chunks import model_of as dense
from tests.world import tiny_spec

VOCAB = 64
EXPERTS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "experts_implementation": "eager",  # the grouped product has no float64
}
LORA = [LoRA(rank=2, layers="attention"), LoRA(rank=3, layers="attention")]


@pytest.fixture(autouse=True)
def on_transformers_passes(monkeypatch):
    for module in (nll, held_out, sft):
        monkeypatch.setattr(module, "cpu_llama_for", lambda model: None)


def model_of(family):
    if family != "Qwen3Moe":
        return dense(family)
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**EXPERTS))
    return model.double().eval()


def batch_of(members, join_rows, changed=0):
    """Members with rows of 300 to 5 tokens; `changed` changes all rows but each member's second."""
    rng = np.random.default_rng(0)
    parts = []
    for k in range(members):
        rows = [rng.integers(VOCAB - 1, size=n).astype(np.int32) for n in (300 - 9 * k, 70, 5)]
        rows = [r + changed * (i != 1) for i, r in enumerate(rows)]
        examples = [Example(r, np.arange(len(r)) >= 3 + k) for r in rows]
        parts.append(collate(examples, join_rows))
    return merge(parts)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Qwen3Moe"])
@pytest.mark.parametrize("methods", [LORA, [FullFT()]], ids=["lora", "fullft"])
def test_loss_and_gradients_are_those_of_padded_rows(monkeypatch, family, methods, chunked):
    model = model_of(family)
    trainables = attached(model, methods)
    if chunked:
        monkeypatch.setattr(nll, "LOGITS", LIMIT)
    apart, wanted = loss_and_gradients(model, trainables, batch_of(len(methods), False))
    together, got = loss_and_gradients(model, trainables, batch_of(len(methods), True))
    assert torch.allclose(together, apart, rtol=1e-13, atol=0)
    assert any(float(gradient.abs().max()) > 0 for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, rtol=1e-9, atol=1e-13), name
    a, b = (
        held_out.log_probabilities(model, batch_of(len(methods), join), "fp64")
        for join in (False, True)
    )
    assert all(torch.allclose(x, y, rtol=1e-11, atol=1e-12) for x, y in zip(a, b))


def test_a_row_does_not_see_the_tokens_of_another():
    model = model_of("Qwen3")
    row = slice(297, 297 + 67)  # loss tokens of the second row of the first member
    a, b = (
        held_out.log_probabilities(model, batch_of(1, True, changed), "fp64")[0]
        for changed in (0, 1)
    )
    assert torch.equal(a[row], b[row]) and not torch.equal(a[:297], b[:297])


def test_a_model_that_does_not_keep_rows_apart_is_refused(monkeypatch):
    from transformers import masking_utils

    model = model_of("Qwen3")
    check_rows_stay_apart(model)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ModelError, match=r"attend to each other.*Set exec\.join_rows=false"):
        check_rows_stay_apart(model)


def test_exec_join_rows_reaches_training_and_evaluation(monkeypatch, tmp_path, norms_in_float64):
    """A run of the shipped base: the same losses, in one sequence a forward pass."""
    changes = {"batch_size": 3, "precision": "fp64", "method": LoRA(rank=2), "lr": 1e-2, "eps": EPS}
    pack = [tiny_spec(steps=2, **changes)]
    shapes, ended, inputs = {}, {}, nll.inputs

    def watched(batch, device):
        found = inputs(batch, device)
        shapes.setdefault(join_rows, set()).add(len(found[0]))
        return found

    monkeypatch.setattr(nll, "inputs", watched)
    for join_rows in (False, True):
        exec_ = Exec(runs_dir=str(tmp_path), models_dir=[str(tmp_path)], join_rows=join_rows)
        *_, last = TorchTrainer()(pack, exec_, None)
        ended[join_rows] = last.ended[pack[0].id][1]
    assert shapes[True] == {1} and 3 in shapes[False] and 1 not in shapes[False]
    for name in ("test_nll", "code_nats", "nll_start"):
        assert ended[True][name] == pytest.approx(ended[False][name], rel=ROUNDING[10]), name


def test_each_layer_keeps_a_mask_of_its_own_of_joined_rows():
    """What the plan's memory counts (plan/gpu/memory.py)."""
    model, batch = dense("Qwen3"), batch_of(2, True)
    entries = batch.laid_out**2 * 2
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().nbytes() == entries * tensor.element_size():
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll.nll_sums(model, batch, "fp64").sum()
    assert len(set(kept)) == model.config.num_hidden_layers
