"""Logits in chunks, never whole in memory, and joined rows change neither loss nor gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasweep.data.examples import Example, collate, merge
from lorasweep.errors import ModelError
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.forward import check_rows_stay_apart, logits_of, set_numerics
from lorasweep.plan import load as memory
from lorasweep.spec.execution import Exec
from lorasweep.train.objectives import nll
from tests.training import EPS, ROUNDING, apart, family_model, pack_of, saved_for_backward
from tests.world import tiny_spec

VOCAB, LIMIT = 2048, 1 << 14
FAMILIES = {
    # plain heads; one tied to the embedding with a softcap; two that scale their logits; experts
    "Llama": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": False},
    "Gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 0.5},
    "Cohere": {"tie_word_embeddings": True, "logit_scale": 0.3},
    "Granite": {"tie_word_embeddings": False, "logits_scaling": 3.0},
    "Qwen3Moe": {
        **{"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        "experts_implementation": "eager",  # the grouped product has no float64
    },
}
LENGTHS = (150, 70, 5)
LORA = [LoRA(rank=2, layers="attention"), LoRA(rank=3, layers="attention")]
both_methods = pytest.mark.parametrize("methods", [LORA, [FullFT()]], ids=["lora", "fullft"])


def model_of(family):
    return family_model(family, vocab_size=VOCAB, **FAMILIES[family]).double()


def batch_of(n_runs, lengths=(40, 17), join_rows=False):
    rng = np.random.default_rng(0)
    parts = []
    for k in range(n_runs):
        rows = [rng.integers(VOCAB - 1, size=n + 5 * k).astype(np.int32) for n in lengths]
        examples = [Example(r, np.arange(len(r)) >= 3 + k) for r in rows]
        parts.append(collate(examples, join_rows))
    return merge(parts)


def loss_and_gradients(model, trainables, batch):
    sums = nll.nll_sums(model, batch, "fp64")
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    gradients = {n: p.grad for n, p in trainables.parameters().items()}
    model.zero_grad()
    return sums.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@both_methods
def test_chunks_and_joined_rows_have_the_loss_and_gradients_of_padded_rows(
    monkeypatch, family, methods
):
    """In chunks, with rows joined, and both."""
    model, n = model_of(family), len(methods)
    trainables = pack_of(methods, model, perturb=0.02)
    padded, joined = (batch_of(n, LENGTHS, join) for join in (False, True))
    loss, gradients = loss_and_gradients(model, trainables, padded)
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    log_p = nll.token_log_p(model, padded, "fp64").detach()
    log_q = nll.log_probabilities(model, padded, "fp64")
    for chunked, batch in ((True, padded), (False, joined), (True, joined)):
        # their norms are in float32
        rounding = 1e-7 if family in ("Gemma2", "Cohere") and batch is joined else 1e-12
        monkeypatch.setattr(nll, "LOGITS", LIMIT if chunked else 1 << 24)
        found, own = loss_and_gradients(model, trainables, batch)
        assert apart(found, loss) < rounding
        assert max(apart(own[name], g) for name, g in gradients.items()) < 1e3 * rounding
        for one, other in zip(nll.log_probabilities(model, batch, "fp64"), log_q, strict=True):
            assert apart(one, other) < 10 * rounding
        if batch is padded:
            with torch.no_grad():
                assert apart(nll.nll_sums(model, batch, "fp64"), loss) < 1e-13
            assert apart(nll.token_log_p(model, batch, "fp64"), log_p) < 1e-13


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@both_methods
def test_logits_are_never_whole(monkeypatch, methods):
    model, batch = model_of("Qwen3"), batch_of(len(methods))
    trainables, sizes = pack_of(methods, model, perturb=0.02), {}
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(nll, "LOGITS", limit)
        with Largest() as largest:
            loss_and_gradients(model, trainables, batch)
            nll.evaluate(model, [[batch_of(1)]] * len(methods), "fp64")
        sizes[limit] = largest.numel
    whole = 2 * len(methods) * 37 * VOCAB
    assert sizes[1 << 24] >= whole > 3 * sizes[LIMIT]
    assert sizes[LIMIT] <= max(LIMIT, VOCAB * 16)
    assert memory.CHUNK_LOGITS == nll.GPU_LOGITS  # the plan's


def test_a_model_that_hides_its_decoder_or_does_not_keep_rows_apart_is_refused(monkeypatch):
    class Other(nn.ModuleDict):
        base_model_prefix = "model"

        def forward(self, inputs_embeds, use_cache):
            return SimpleNamespace(logits=self.head(inputs_embeds))

    decoder = nn.Identity()
    other = Other({"model": decoder, "head": nn.Linear(4, 8)})
    with pytest.raises(ModelError, match="Choose another model"):
        logits_of(other, torch.zeros(1, 2, 4))
    assert other.model is decoder
    model, in_bf16 = model_of("Qwen3"), model_of("Qwen3").float()
    set_numerics(in_bf16, "bf16", False)  # its matrices are in fp32 until autocast rounds them
    for one, precision in ((model, "fp64"), (in_bf16, "bf16")):
        check_rows_stay_apart(one, precision)
    finds = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(finds, lambda position_ids: None)
    with pytest.raises(ModelError, match=r"attend to each other.*Set exec\.join_rows=false"):
        check_rows_stay_apart(model, "fp64")


def test_exec_join_rows_reaches_training_and_evaluation(monkeypatch, tmp_path, norms_in_float64):
    changes = {"batch_size": 3, "precision": "fp64", "method": LoRA(rank=2), "lr": 1e-2, "eps": EPS}
    pack = [tiny_spec(steps=2, **changes)]
    shapes, ended, inputs = {}, {}, nll.inputs

    def watched(model, batch):
        found = inputs(model, batch)
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


def test_padded_rows_need_no_mask_and_each_layer_keeps_a_mask_of_joined_rows():
    """The plan counts these masks (plan/gpu/memory.py). Without one, attention takes its fast path."""
    model, n_layers = model_of("Qwen3"), 2
    for join_rows, expected in ((True, n_layers), (False, 0)):
        batch = batch_of(2, LENGTHS, join_rows)
        side = batch.tokens_NX.shape[1] if join_rows else max(max(x) for x in batch.lengths)
        rows = 2 if join_rows else 2 * len(LENGTHS)
        saved = saved_for_backward(model, lambda b=batch: nll.nll_sums(model, b, "fp64"))
        entries = [t.untyped_storage().nbytes() // t.element_size() for t in saved]
        assert entries.count(rows * side**2) == expected
