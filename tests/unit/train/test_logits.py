"""Logits in chunks, never whole in memory, change neither loss nor gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasweep.data.examples import Example, collate, merge
from lorasweep.errors import ModelError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.forward import logits_of
from lorasweep.plan import load as memory
from lorasweep.train.objectives import nll
from tests.training import apart, family_model, pack_of, saved_for_backward

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


def batch_of(n_runs, lengths=(40, 17)):
    rng = np.random.default_rng(0)
    parts = []
    for k in range(n_runs):
        rows = [rng.integers(VOCAB - 1, size=n + 5 * k).astype(np.int32) for n in lengths]
        examples = [Example(r, np.arange(len(r)) >= 3 + k) for r in rows]
        parts.append(collate(examples))
    return merge(parts)


def loss_and_gradients(model, trainables, batch):
    sums = nll.nll_sums(model, batch, "fp64")
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    gradients = [p.grad for p in trainables.parameters().values()]
    model.zero_grad()
    return sums.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@both_methods
def test_chunks_have_the_loss_and_gradients_of_whole_logits(monkeypatch, family, methods):
    model, batch = model_of(family), batch_of(len(methods), LENGTHS)
    trainables, found = pack_of(methods, model, perturb=0.02), []
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(nll, "LOGITS", limit)
        loss, gradients = loss_and_gradients(model, trainables, batch)
        with torch.no_grad():
            assert apart(nll.nll_sums(model, batch, "fp64"), loss) < 1e-13
        log_p = nll.token_log_p(model, batch, "fp64")
        found.append([loss, log_p, *nll.log_probabilities(model, batch, "fp64"), *gradients])
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert max(map(apart, *found)) < 1e-9 and apart(found[0][0], found[1][0]) < 1e-12


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


def test_a_model_that_hides_its_decoder_is_refused():
    class Other(nn.ModuleDict):
        base_model_prefix = "model"

        def forward(self, inputs_embeds, use_cache):
            return SimpleNamespace(logits=self.head(inputs_embeds))

    decoder = nn.Identity()
    other = Other({"model": decoder, "head": nn.Linear(4, 8)})
    with pytest.raises(ModelError, match="Choose another model"):
        logits_of(other, torch.zeros(1, 2, 4))
    assert other.model is decoder


def test_padded_rows_need_no_mask():
    """Without one, attention takes its fast path, and the plan counts none."""
    model, batch = model_of("Qwen3"), batch_of(2, LENGTHS)
    saved = saved_for_backward(model, lambda: nll.nll_sums(model, batch, "fp64"))
    entries = [t.untyped_storage().nbytes() // t.element_size() for t in saved]
    rows, side = 2 * len(LENGTHS), batch.tokens_NRT.shape[2]
    assert rows * side**2 not in entries and max(entries) > rows * side
