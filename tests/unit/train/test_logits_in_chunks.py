"""Logits in chunks on transformers' passes: the same loss and gradients, and never whole in memory."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasweep.data.batches import PAD_TO, collate, merge
from lorasweep.data.examples import Example
from lorasweep.errors import ModelError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.cpu_llama import head
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.head import logits_of
from lorasweep.plan import memory
from lorasweep.train.objectives import nll

VOCAB, LIMIT = 2048, 1 << 14
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": False},
    # a plain head; one tied to the embedding with a softcap; two that scale their logits
    "Qwen3": {"tie_word_embeddings": False},
    "Gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 0.5},
    "Cohere": {"tie_word_embeddings": True, "logit_scale": 0.3},
    "Granite": {"tie_word_embeddings": False, "logits_scaling": 3.0},
}


@pytest.fixture(autouse=True)
def on_transformers_passes(monkeypatch):
    monkeypatch.setattr(nll, "cpu_llama_for", lambda model: None)


def model_of(family):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


def batch_of(members):
    """Members with rows of different lengths, and different numbers of loss tokens."""
    rng = np.random.default_rng(0)
    parts = []
    for k in range(members):
        lengths = (40 + 5 * k, 17)
        rows = [rng.integers(VOCAB, size=n).astype(np.int32) for n in lengths]
        parts.append(collate([Example(r, np.arange(len(r)) >= 3 + k) for r in rows]))
    return merge(parts)


def attached(model, methods):
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    trainables = methods[0].attach(model, linears, methods, list(range(len(methods))))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainables.parameters().values():
            p.add_(torch.randn_like(p), alpha=0.02)
    return trainables


def loss_and_gradients(model, trainables, batch):
    sums = nll.nll_sums(model, batch, "fp64")
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in trainables.parameters().items()}
    for p in trainables.parameters().values():
        p.grad = None
    return sums.detach(), gradients


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Cohere", "Granite"])
@pytest.mark.parametrize(
    "methods", [[LoRA(rank=2), LoRA(rank=3)], [FullFT()]], ids=["lora", "fullft"]
)
def test_loss_and_gradients_are_those_of_the_whole(monkeypatch, family, methods):
    model, batch = model_of(family), batch_of(len(methods))
    trainables = attached(model, methods)
    whole, wanted = loss_and_gradients(model, trainables, batch)
    monkeypatch.setattr(nll, "LOGITS", LIMIT)
    parts, got = loss_and_gradients(model, trainables, batch)
    assert torch.allclose(parts, whole, rtol=1e-13, atol=0)
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 0, name
        assert torch.allclose(got[name], gradient, rtol=1e-9, atol=1e-14), name
    with torch.no_grad():
        assert torch.allclose(nll.nll_sums(model, batch, "fp64"), whole, rtol=1e-13, atol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize(
    "methods", [[LoRA(rank=2), LoRA(rank=3)], [FullFT()]], ids=["lora", "fullft"]
)
def test_logits_are_never_whole(monkeypatch, methods):
    """Forward and backward: nothing is larger than a chunk or a weight."""
    model, batch = model_of("Qwen3"), batch_of(len(methods))
    trainables = attached(model, methods)
    rows, width = 2 * len(methods), 37
    sizes = {}
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(nll, "LOGITS", limit)
        with Largest() as largest:
            loss_and_gradients(model, trainables, batch)
        sizes[limit] = largest.numel
    whole = rows * width * VOCAB
    assert sizes[1 << 24] >= whole > 3 * sizes[LIMIT]
    assert sizes[LIMIT] <= max(LIMIT, VOCAB * SHAPE["hidden_size"])
    assert memory.CHUNK_LOGITS == nll.GPU_LOGITS  # what a plan counts


@pytest.mark.parametrize(
    "methods", [[LoRA(rank=2), LoRA(rank=3)], [FullFT()]], ids=["lora", "fullft"]
)
def test_nor_are_those_of_our_own_passes(monkeypatch, methods):
    model, batch = model_of("Llama"), batch_of(len(methods))
    trainables, passes = attached(model, methods), cpu_llama_for(model)
    found = {}
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(head, "LOGITS", limit)
        with Largest() as largest:
            sums = passes.nll_sums(batch, torch.float64)
            sums.sum().backward()
        found[limit] = [sums.detach(), *(p.grad for p in trainables.parameters().values())]
        for p in trainables.parameters().values():
            p.grad = None
    whole = batch.targets_NM.size * VOCAB
    assert whole > largest.numel and largest.numel <= len(methods) * PAD_TO * VOCAB
    for one, other in zip(*found.values()):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)


def test_a_model_that_does_not_call_its_decoder_is_refused():
    class Other(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.model, self.head = nn.Identity(), nn.Linear(4, 8)

        def forward(self, inputs_embeds, use_cache):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.head(inputs_embeds))

    model = Other()
    decoder = model.model
    with pytest.raises(ModelError, match="smaller exec"):
        logits_of(model, torch.zeros(1, 2, 4))
    assert model.model is decoder
