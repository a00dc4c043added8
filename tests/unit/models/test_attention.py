"""Attention of short rows on a CPU against torch's, in float64."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lorasweep.models.attention import SHORT_BYTES, attention


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
    with pytest.raises(ValueError, match="softcap"):  # what it cannot compute is left to torch
        attention(module, q, k, v, mask, scaling=0.3, softcap=20.0)
