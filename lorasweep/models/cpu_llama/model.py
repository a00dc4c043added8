"""The entry to the hand-written Llama: from a batch to summed losses, on a CPU.

Weights are cast to the compute type once, and again only after a change. For other model families
and devices `cpu_llama_for` returns None, and transformers' forward is used.

Shapes: N members, X tokens per member, M loss positions per member, H hidden, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch.distributed.fsdp import FSDPModule

from lorasweep.data.batches import Batch
from lorasweep.methods.stacked.linear import StackedLinear
from lorasweep.models.cpu_llama.attention import Heads, Rows, rotations, row_class
from lorasweep.models.cpu_llama.decoder import Layer, LayerWork, Norm
from lorasweep.models.cpu_llama.head import HeadLogP, HeadNll
from lorasweep.models.cpu_llama.linears import Group


class _CastWeights(NamedTuple):
    versions: list[int]
    frozen: bool
    weights: list[torch.Tensor]
    """Kept alive, so that their ids are not reused."""
    w_OH: torch.Tensor
    w_HO: torch.Tensor


class CpuLlama:
    """The hand-written passes of one loaded model.

    Reads the model's modules at each call, so adapters may be attached and detached in between.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        # a weak reference, because the registry below is keyed weakly by the model
        self._model = ref(model)
        self.eps, d = config.rms_norm_eps, model.model.layers[0].self_attn.head_dim
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, d)
        self._casts: dict[tuple[int, ...], _CastWeights] = {}
        self._turns: dict[torch.dtype, torch.Tensor] = {}

    @property
    def body(self) -> Any:
        """Decoder below the unembedding."""
        return self._loaded.model

    @property
    def head(self) -> Any:
        """Module of the unembedding."""
        return self._loaded.lm_head

    @property
    def _loaded(self) -> Any:
        model = self._model()
        assert model is not None, "the model was deleted while its passes are still used"
        return model

    def cast(
        self, weights: list[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenate weights in the compute type; return them as [O, H] and transposed as [H, O].

        The result is cached until a weight changes. Frozen bf16 weights are transposed in memory,
        which cuts the time of the forward product by a third (LOG.md).
        """
        frozen = dtype == torch.bfloat16 and not any(w.requires_grad for w in weights)
        if len(weights) == 1 and weights[0].dtype == dtype and not frozen:
            return weights[0].detach(), weights[0].detach().T
        key, versions = (*map(id, weights), hash(dtype)), [w._version for w in weights]
        kept = self._casts.get(key)
        if kept is None or kept.versions != versions or kept.frozen != frozen:
            parts = [w.detach().to(dtype) for w in weights]
            made = torch.cat(parts) if len(parts) > 1 else parts[0]
            turned = made.T.contiguous() if frozen else made.T
            kept = self._casts[key] = _CastWeights(versions, frozen, weights, made, turned)
        return kept.w_OH, kept.w_HO

    def nll_sums(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return the summed NLL in nats of each member, [N], computed in `dtype`.

        Logits are computed at the loss positions only.
        """
        h_NMH = self._at_loss_positions(batch, dtype)
        group = self._head_group(dtype)
        return HeadNll.apply(
            h_NMH,
            group,
            torch.from_numpy(batch.targets_NM),
            torch.from_numpy(batch.weight_NM).to(h_NMH.dtype),
            torch.is_grad_enabled(),
            *group.params,
        )

    def token_log_p(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return log p of each target in nats, [N, M], computed in `dtype`."""
        h_NMH, group = self._at_loss_positions(batch, dtype), self._head_group(dtype)
        return HeadLogP.apply(h_NMH, group, torch.from_numpy(batch.targets_NM), *group.params)

    def log_probabilities(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return log q of every symbol at the loss positions, [N, M, V], without gradient."""
        h_NMH = self._at_loss_positions(batch, dtype)
        logits_NMV, _ = self._head_group(dtype).forward(h_NMH.to(dtype))
        return torch.log_softmax(logits_NMV, -1, dtype=h_NMH.dtype)

    def _head_group(self, dtype: torch.dtype) -> Group:
        return Group([self.head], partial(self.cast, dtype=dtype), dtype)

    def _at_loss_positions(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return the normed residual stream at the loss positions, [N, M, H]."""
        n, x = batch.tokens_NX.shape
        hidden_NXH = self.hidden(batch, dtype)
        at = torch.from_numpy(batch.loss_positions_NM) + torch.arange(n)[:, None] * x
        picked = hidden_NXH.flatten(0, 1).index_select(0, at.flatten())
        normed = Norm.apply(picked, self.body.norm.weight, self.eps)
        return normed.view(n, at.shape[1], -1)

    def hidden(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return the residual stream after the last layer, [N, X, H], in the master type."""
        x = self.body.embed_tokens(torch.from_numpy(batch.tokens_NX))
        length = row_class(max(max(lengths) for lengths in batch.lengths))
        rows, grad = Rows(batch, self._rotations(length, x, dtype)), torch.is_grad_enabled()
        cast = partial(self.cast, dtype=dtype)
        for layer in self.body.layers:
            work = LayerWork(layer, self.heads, self.eps, cast, dtype, rows)
            params = work.params()
            work.keep = grad and (x.requires_grad or bool(params))
            x = Layer.apply(x, work, *params)
        return x

    def _rotations(self, length: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rotary positions up to `length` as matrices in the compute type, cached."""
        if len(self._turns.get(dtype, ())) < length:
            both = self.body.rotary_emb(x, torch.arange(length)[None])
            cos, sin = (c[0].to(x.dtype) for c in both)
            self._turns[dtype] = rotations(cos, sin, dtype)
        return self._turns[dtype]


_known: "WeakKeyDictionary[Any, CpuLlama | None]" = WeakKeyDictionary()


def cpu_llama_for(model: Any) -> CpuLlama | None:
    """Return the hand-written passes of `model`, or None if transformers' forward must be used.

    That is so for another model family, another device, modules that are neither nn.Linear nor
    StackedLinear, or a model that is spread over processes.
    """
    if model not in _known:
        _known[model] = CpuLlama(model) if _is_plain_llama(model) else None
    passes = _known[model]
    return passes if passes is not None and _modules_are_known(passes) else None


def _is_plain_llama(model: Any) -> bool:
    from transformers import LlamaForCausalLM

    if type(model) is not LlamaForCausalLM or next(model.parameters()).device.type != "cpu":
        return False
    c = model.config
    if (c.rope_parameters or {}).get("rope_type", "default") in ("dynamic", "longrope"):
        return False  # their rotations depend on the longest row
    return (
        c.hidden_act == "silu"
        and not c.attention_bias
        and not c.mlp_bias
        and not c.attention_dropout
    )


def _modules_are_known(passes: CpuLlama) -> bool:
    kinds = (torch.nn.Linear, StackedLinear)
    if any(isinstance(layer, FSDPModule) for layer in passes.body.layers):
        return False
    for layer in passes.body.layers:
        a, m = layer.self_attn, layer.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        if any(type(linear) not in kinds for linear in linears):
            return False
    return type(passes.head) in kinds
