"""Forward passes of transformers models in two halves (hidden states, logits), and number types.

Also attention of short rows on a CPU, where torch's own backward pass is slow. Shapes: R rows, T
tokens, P positions, H hidden (in attention: query heads), K key heads, d head size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lorasweep.errors import ModelError

MASTER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the trained weights. With bf16 they are fp32, under autocast."""
COMPUTE_DTYPES = {**MASTER_DTYPES, "bf16": torch.bfloat16}
"""Type of activations and weight copies in matrix products."""
EXPERT_STACKS = ("gate_up_proj", "down_proj")
"""Parameters of a module of experts, [experts, outputs, inputs]."""
ROUNDING = 0.03
"""Accepted difference of outputs, as a share of the largest one: above bf16 rounding, far below the
effect of another attention."""
SHORT_ROWS = "short_rows"
"""transformers' name of `attention`: a value of attn_implementation."""
SHORT_BYTES = 1024
"""Rows are short if the T scores of a token need at most this: 512 tokens in bf16, 256 in fp32.
Forward and backward pass then take 0.2 to 0.9 of torch's time in bf16, and 0.8 to 1.0 in fp32; for
longer rows torch is faster (docs/log/2026-11-28.md)."""
LEFT_TO_TORCH = ("softcap", "position_bias", "cache", "is_causal")
"""Arguments of transformers' attentions; with a value for one of them, torch computes."""


def backend(model: nn.Module, processes: int = 1) -> str:
    """Name the backend as results record it: 'transformers on cuda, 8 processes'."""
    more = f", {processes} processes" if processes > 1 else ""
    return f"transformers on {next(model.parameters()).device.type}{more}"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# ---------------------------------------------------------------- number types


def bf16_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices that can be held in bf16 under autocast without changing a result.

    Autocast rounds the weights of nn.Linear, and `experts_forward` those of experts, to bf16
    anyway; `hold_in_bf16` converts the output of embeddings to fp32. Other modules may use their
    weights differently, so their matrices are left out.
    """
    found: dict[str, nn.Parameter] = {}
    others: set[int] = set()
    for name, module in model.named_modules():
        for kind, p in module.named_parameters(recurse=False, remove_duplicate=False):
            is_plain = kind == "weight" and (type(module) is nn.Linear or _is_embedding(module))
            if is_plain or (kind in EXPERT_STACKS and p.dim() == 3):
                found[f"{name}.{kind}"] = p
            else:
                others.add(id(p))
    return {name: p for name, p in found.items() if id(p) not in others}


def hold_in_bf16(model: nn.Module) -> None:
    """Convert `bf16_matrices` to bf16, which must be exact; embeddings then output fp32."""

    def rows_of(module: Any, tokens: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(tokens, module.weight, module.padding_idx).float()
        return rows if type(module) is nn.Embedding else rows * module.embed_scale.float()

    for p in bf16_matrices(model).values():
        p.data = p.data.to(torch.bfloat16)
    module: Any
    for module in filter(_is_embedding, model.modules()):
        module.forward = partial(rows_of, module)


def _is_embedding(module: nn.Module) -> bool:
    """Return whether a module looks up rows; Gemma's also multiplies them with `embed_scale`."""
    scaled = isinstance(getattr(module, "embed_scale", None), torch.Tensor)
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)


@contextmanager
def frozen_in_bf16(model: nn.Module, precision: str) -> Iterator[None]:
    """Hold the frozen fp32 matrices of a bf16 model in bf16, in addition to the fp32 ones.

    Autocast would round them to the same values again in every forward pass.
    """
    exact: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for module in model.modules() if precision == "bf16" else ():
        for kind, p in list(module.named_parameters(recurse=False)):
            multiplies = kind in EXPERT_STACKS or (kind == "weight" and type(module) is nn.Linear)
            if multiplies and not p.requires_grad and p.dtype == torch.float32:
                exact[module, kind] = p
                setattr(module, kind, nn.Parameter(p.to(torch.bfloat16), requires_grad=False))
    try:
        yield
    finally:
        for (module, kind), p in exact.items():
            setattr(module, kind, p)


def set_numerics(model: nn.Module, precision: str, published_in_bf16: bool) -> None:
    """Let a model compute in a precision: matrices and norms in bf16, or everything in float64.

    In bf16 the outputs of norms of fp32 states are converted once: autocast would convert them in
    each of the matrix products that follow. The gradients of these products are then added in bf16
    instead of fp32. transformers computes norms, rotary positions and routers in float32 for any
    input, also float64, and two devices' float32 cosines differ.
    """

    def in_float64(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return forward(*args, **kwargs)

    def convert(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.to(torch.bfloat16) if args[0].dtype == torch.float32 else out

    if precision == "bf16" and published_in_bf16:
        hold_in_bf16(model)
    part: Any
    for part in model.modules():
        if precision == "bf16" and type(part).__name__.endswith("RMSNorm"):
            part.register_forward_hook(convert)
        theirs = type(part).__module__.startswith("transformers") and not [*part.children()]
        if precision == "fp64" and theirs:  # not whole layers: each may be computed again, alone
            part.forward = partial(in_float64, part.forward)


class _Float64(TorchFunctionMode):
    """Computes in float64 what asks for float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wider, args), **{k: wider(v) for k, v in (kwargs or {}).items()})


# ---------------------------------------------------------------- forward passes


def hidden_states(model: Any, tokens_RT: torch.Tensor, positions_RP: torch.Tensor) -> torch.Tensor:
    """Return the decoder's output [R, P, H]."""
    states_RTH = model.base_model(input_ids=tokens_RT, use_cache=False).last_hidden_state
    at = positions_RP[..., None].expand(-1, -1, states_RTH.shape[-1])
    return states_RTH.gather(1, at)


def logits_of(model: Any, hidden_RPH: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [R, P, V] for its decoder's output [R, P, H].

    This runs the model's forward pass with its softcaps, scalings and adapters, but no decoder.
    ModelError: the forward pass does not call the decoder.
    """
    name = model.base_model_prefix
    decoder, computed = getattr(model, name), _Computed(hidden_RPH)
    setattr(model, name, computed)
    try:
        logits = model(inputs_embeds=hidden_RPH, use_cache=False).logits
    finally:
        setattr(model, name, decoder)
    if not computed.called:
        raise ModelError(
            f"{type(model).__name__} does not compute logits from the output of its module "
            f"{name!r}, so they cannot be computed for some positions only. Choose another model."
        )
    return logits


class _Computed(nn.Module):
    """Stand in for a decoder and return an output that was computed before."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden, self.called = hidden, False
        self.__dict__["decoder"] = self  # OPT's forward pass calls a decoder inside the decoder

    def forward(self, *_: Any, **more: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        self.called = True
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)  # dense models read less


def use_short_rows(model: Any) -> None:
    """Let a model on a CPU compute short rows with `attention`, if it uses torch's (sdpa)."""
    from transformers import AttentionInterface, AttentionMaskInterface  # takes a second
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHORT_ROWS, attention)
        AttentionMaskInterface.register(SHORT_ROWS, sdpa_mask)
        model.set_attn_implementation(SHORT_ROWS)


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
