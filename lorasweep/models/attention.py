"""Attention on a CPU, where torch's own backward pass is slow for short rows.

Shapes: R rows, T tokens, H query heads, K key heads, d head size.
"""

from typing import Any

import torch

NAME = "short_rows"
"""transformers' name of this attention: a value of attn_implementation."""
SHORT_BYTES = 1024
"""Rows are short if the T scores of a token need at most this: 512 tokens in bf16, 256 in fp32.
Forward and backward pass then take 0.2 to 0.9 of torch's time in bf16, and 0.8 to 1.0 in fp32; for
longer rows torch is faster (docs/log)."""
LEFT_TO_TORCH = ("softcap", "position_bias", "cache", "is_causal")
"""Arguments of transformers' attentions; with a value for one of them, torch computes."""


def use_short_rows(model: Any) -> None:
    """Let a model on a CPU compute short rows with `attention`, if it uses torch's (sdpa)."""
    from transformers import AttentionInterface, AttentionMaskInterface  # takes a second
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query_RHTd: torch.Tensor,
    key_RKTd: torch.Tensor,
    value_RKTd: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of rows, [R, T, H, d]; `mask`: where to attend, None: causal.

    Long rows, and new tokens after cached ones, are left to torch. In bf16, scores are rounded to
    bf16 before the softmax; torch keeps them in fp32.
    """
    rows, heads, length, d = query_RHTd.shape
    # rotary positions can leave queries and keys in fp32 under autocast
    all_three = (query_RHTd.to(value_RKTd), key_RKTd.to(value_RKTd), value_RKTd)
    is_plain = not more.get("dropout") and all(more.get(name) is None for name in LEFT_TO_TORCH)
    is_short = length * value_RKTd.element_size() <= SHORT_BYTES and length == key_RKTd.shape[2]
    if not (is_plain and is_short):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, *all_three, mask, scaling=scaling, **more)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    # not infinity: tokens of padding may attend to nothing, and must not become NaN
    bias = torch.zeros_like(mask, dtype=value_RKTd.dtype)
    bias.masked_fill_(~mask, torch.finfo(bias.dtype).min)
    # one product for all query heads of a key head, so that keys and values are not copied
    query, key, value = (x.reshape(rows * key_RKTd.shape[1], -1, d) for x in all_three)
    bias = bias.expand(rows, heads, length, length).reshape(len(query), -1, length)
    scores = torch.baddbmm(bias, query, key.mT, alpha=scaling or d**-0.5)
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(rows, heads, length, d).transpose(1, 2), None
