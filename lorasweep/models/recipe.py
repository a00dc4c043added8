"""The base model of a recipe: its weights file and its untrained model.

Refuses to know how it is trained: `lorasweep.train.pretrain` does that.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED = Path(__file__).parent / "bases"
"""Weights that come with the package."""


def file_name(spec: ModelSpec) -> str:
    """Name the weights file of a recipe: model name and a hash of the recipe and the shape."""
    fields = spec.plain()
    for name in ("location", "revision", "attention", "mlp", "unembedding", "weights_dtype"):
        fields.pop(name, None)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{spec.name}-{digest[:10]}.safetensors"


def find_weights(spec: ModelSpec, models_dirs: Sequence[str]) -> Path | None:
    """Find the weights of a recipe in the package or a models folder; None if there are none."""
    folders = [SHIPPED, *(Path(d).expanduser() for d in models_dirs)]
    return next((f / file_name(spec) for f in folders if (f / file_name(spec)).is_file()), None)


def empty_model(spec: ModelSpec) -> "PreTrainedModel":
    """Build an untrained model of the described shape, with transformers' random weights.

    A Llama; with experts a Qwen3-MoE.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp_size,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if not spec.n_experts:
        return LlamaForCausalLM(LlamaConfig(**shape))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **shape,
            num_experts=spec.n_experts,
            num_experts_per_tok=spec.n_active_experts,
            moe_intermediate_size=spec.mlp_size,
            norm_topk_prob=True,
        )
    )
