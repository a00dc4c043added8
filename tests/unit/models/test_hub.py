"""Weights of the hub, from a cache as `huggingface_hub` lays it out."""

import dataclasses

import pytest

from lorasweep.models.load import load
from tests.bpe import qwen_like
from tests.world import compose_request

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repository org/tiny as it was downloaded; returns the spec of its model."""
    from huggingface_hub import constants
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    sizes = {"hidden_size": 16, "vocab_size": len(qwen_like())}
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        **sizes,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(snapshot)  # as the described one is
    qwen_like().save_pretrained(snapshot)
    model = compose_request(["model=smollm2-135m"]).points[0].spec.model
    shape = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_size": 8, "mlp_size": 32}
    return dataclasses.replace(
        model, name="tiny", location="org/tiny", tied=False, **shape, **sizes
    )


def test_the_commit_that_a_name_stood_for_is_known(hub):
    unpinned = load(dataclasses.replace(hub, revision=""), [])
    pinned = load(dataclasses.replace(hub, revision=COMMIT), [])
    assert unpinned.commit == pinned.commit == COMMIT
    assert unpinned.sha256 == pinned.sha256 and unpinned.tokenizer is not None
