"""Attention of short rows on a CPU against torch's, in float64."""

from unittest.mock import Mock, patch

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lorasweep.models import load
from lorasweep.models.attention import SHORT_BYTES, attention
from tests.world import tiny_spec


@pytest.mark.parametrize("tokens", [48, 1 + SHORT_BYTES // 8])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_torchs(tokens, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 16).double().requires_grad_() for n in (6, 2, 2))
    some = torch.rand(2, 1, tokens, tokens).lt(0.5) | torch.eye(tokens).bool()
    mask, module = some if masked else None, Mock(num_key_value_groups=3, is_causal=True)
    want = sdpa(q, k, v, mask, is_causal=mask is None, scale=0.3, enable_gqa=True).transpose(1, 2)
    outputs = attention(module, q, k, v, mask, scaling=0.3)[0], want
    found = [[out, *torch.autograd.grad(out.square().sum(), (q, k, v))] for out in outputs]
    torch.testing.assert_close(*found)
    with patch("transformers.integrations.sdpa_attention.sdpa_attention_forward") as left:
        attention(module, q, k, v, mask, scaling=0.3, softcap=20.0)
    assert left.call_args.kwargs == {"scaling": 0.3, "softcap": 20.0}  # it cannot compute these


def test_a_softcap_of_scores_is_not_dropped():
    """On transformers 5.8 Gemma 2 takes torch's attention, which has none."""
    from transformers import Gemma2Config

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    spec = tiny_spec().model
    for softcap, kinds in ((20.0, {"eager"}), (None, {"eager", "short_rows"})):
        config = Gemma2Config(**small, **heads, attn_logit_softcapping=softcap)
        assert load.without_weights(config, spec, "fp32").config._attn_implementation in kinds
