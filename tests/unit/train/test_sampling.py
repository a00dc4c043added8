"""Completions sampled with a cache are those that whole forward passes would give, run by run."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lorasweep.errors import ModelError
from lorasweep.methods.lora import LoRA
from lorasweep.models.load import Base, empty_model
from lorasweep.plan.load import cache_bytes
from lorasweep.train import sampling
from lorasweep.train.sampling import sample
from tests.training import pack_of, rewarded_world
from tests.world import tiny_spec

pytestmark = pytest.mark.usefixtures("norms_in_float64")
ENDS = ((0,), (5,), (3, 7))


@torch.no_grad()
def one_by_one(model, prompt, uniforms):
    """Draw one completion with a whole forward pass for every token, of a model that holds one run."""
    tokens, log_ps = list(map(int, prompt)), []
    for u in uniforms:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        log_p = logits.log_softmax(-1).numpy()
        token = int((np.cumsum(np.exp(log_p)) <= u * np.exp(log_p).sum()).sum())
        tokens.append(token)
        log_ps.append(log_p[token])
        if any(tuple(tokens[-len(end) :]) == end for end in ENDS):
            break
    return tokens[len(prompt) :], log_ps


def attached(spec, base, count=3):
    """Runs whose adapters do something."""
    methods = [LoRA(rank=r) for r in (1, 4, 4)[:count]]
    return pack_of(methods, base.model, spec.model, perturb=0.05)


def qwen3():
    """A run on a random Qwen3: another family than the shipped bases."""
    spec = tiny_spec(precision="fp64")
    shape = dataclasses.replace(spec.model, name="qwen3-tiny", n_layers=2, qk_norm=True)
    torch.manual_seed(0)
    base = Base(empty_model(shape).double().eval(), None, "random")
    return dataclasses.replace(spec, model=shape), base


def inputs_of(spec, runs, lengths, group, longest):
    """Random prompts of these lengths for each run, and the random numbers of their completions."""
    rng, vocab = np.random.default_rng(0), spec.model.vocab_size
    prompts = [[rng.integers(1, vocab, size=n) for n in lengths] for _ in range(runs)]
    return prompts, rng.random((runs, len(lengths) * group, longest))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal prompts", "ragged prompts"])
def test_a_pack_with_a_cache_draws_what_each_run_draws_alone_without(family, equal, monkeypatch):
    """Runs end their completions at different tokens, and ended rows are dropped on the way."""
    monkeypatch.setattr(sampling, "ROWS", 8)  # two rounds
    spec, base = qwen3() if family == "qwen3" else rewarded_world("words")[:2]
    prompts, uniforms = inputs_of(spec, 3, [5] * 4 if equal else [3, 9, 5, 4], 4, 7)
    trained = attached(spec, base)
    together = sample(base.model, prompts, uniforms, ENDS, "fp64")
    for n in (2, 0):
        trained.keep([n])
        for k in (0, 3, 5, 10, 15):
            tokens, log_p = one_by_one(base.model, prompts[n][k // 4], uniforms[n, k])
            assert together[n].tokens[k].tolist() == tokens
            assert np.abs(together[n].log_p[k] - log_p).max() < 1e-10
            assert together[n].ended[k] == any(tuple(tokens[-len(e) :]) == e for e in ENDS)
        trained.detach()
        trained = attached(spec, base)
    assert len({len(t) for own in together for t in own.tokens}) > 3


def test_the_entropy_is_the_policys_and_draws_are_repeatable():
    _, base, loaded = rewarded_world("bandit")
    prompt = loaded.test[0].tokens[:-1]
    uniforms = np.random.default_rng(1).random((1, 256, 1))
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor(prompt[None].astype(int))).logits[0, -1]
    p = logits.softmax(-1).numpy()
    one, other = (sample(base.model, [[prompt] * 4], uniforms, (), "fp64")[0] for _ in range(2))
    assert one.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-9)
    assert one.largest_logit == pytest.approx(float(logits.abs().max()), rel=1e-9)
    assert [t.tolist() for t in one.tokens] == [t.tolist() for t in other.tokens]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal prompts", "ragged prompts"])
def test_keys_are_cached_in_bf16_and_change_no_number(attention, equal, monkeypatch):
    """Autocast leaves rotated keys in fp32, and attention rounds them: so it may be done before."""
    spec, base, _ = rewarded_world("words", precision="bf16")
    attached(spec, base, 2)
    lengths = [6] * 3 if equal else [3, 9, 6]
    prompts, uniforms = inputs_of(spec, 2, lengths, 2, 5)
    update, drawn, held = DynamicCache.update, [], {}

    def watched(cache, keys, values, layer, *args, **kwargs):
        found = update(cache, keys, values, layer, *args, **kwargs)
        held[len(drawn), layer] = found
        return found

    monkeypatch.setattr(DynamicCache, "update", watched)
    base.model.set_attn_implementation(attention)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setitem(sampling.COMPUTE_DTYPES, "bf16", dtype)
        drawn.append(sample(base.model, prompts, uniforms, (), "bf16"))
    kept = [t for pair in held.values() for t in pair if t.dtype == torch.bfloat16]
    assert len(kept) == len(held)  # half of all keys and values
    tokens = 2 * 3 * 2 * (max(lengths) + 5 - 1)  # the last one drawn is never read
    assert sum(t.nbytes for t in kept) == tokens * cache_bytes(spec.model, 2)
    for one, other in zip(*drawn, strict=True):
        for ours, theirs in ((one.tokens, other.tokens), (one.log_p, other.log_p)):
            assert list(map(list, ours)) == list(map(list, theirs))
        assert one.entropy == other.entropy and one.largest_logit == other.largest_logit


@pytest.mark.parametrize("name", ["cache", "past_key_values", "another"])
def test_the_cache_is_passed_under_the_name_that_the_model_takes(name, monkeypatch):
    """transformers calls it `cache` from 5.24 on. A forward pass ignores unknown arguments."""
    _, base, loaded = rewarded_world("words")
    model, forward, given = base.model, base.model.forward, []

    def renamed(input_ids, **kwargs):
        given.append(kwargs.pop(name, None))
        return forward(input_ids=input_ids, past_key_values=given[-1], **kwargs)

    keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    renamed.__signature__ = inspect.Signature([keyword])
    monkeypatch.setitem(model.__dict__, "forward", renamed)
    asked = (model, [[loaded.test[0].tokens[:5]]], np.full((1, 1, 3), 0.5), (), "fp64")
    if name == "another":
        with pytest.raises(ModelError, match="cache of keys and values"):
            sample(*asked)
    else:
        sample(*asked)
        assert [isinstance(c, DynamicCache) for c in given] == [True] * 3
