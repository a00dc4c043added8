"""Forward and backward of Llama-shaped decoders on a CPU, written out by hand: the same numbers in
half the time.

transformers' forward is a chain of small operations whose passes over memory, not the matrix
products, take most of a step on a CPU. Here a layer is one autograd function: q/k/v are one
product, activations are cast once, frozen weights get no gradient, and their bf16 copies are made
once. Tests hold it to transformers' forward in float64. Refuses other families: `lean_for` gives
None, and transformers' forward is used.
Shapes: N members, X tokens a member, H hidden.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F

from lorasweep.data.batches import Batch
from lorasweep.methods.stacked.linear import StackedLinear
from lorasweep.models.cpu_llama.attention import (
    Heads,
    Rows,
    attention,
    attention_backward,
    rotations,
    row_class,
)
from lorasweep.models.cpu_llama.linears import Group


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1] (Zhang & Sennrich, arXiv 1910.07467)."""
    return (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(eps)
        .rsqrt_()
    )


def _norm_backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    r: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x (that of the residual stream added) and of the norm's weight (None if frozen)."""
    dh = dh.to(x.dtype)
    n = x * r
    dw = (dh * n).view(-1, x.shape[-1]).sum(0) if weight.requires_grad else None
    dn = dh * weight
    dot = (dn * n).mean(-1, keepdim=True)
    dn.addcmul_(n, dot, value=-1)
    return dn.mul_(r) if residual is None else torch.addcmul(residual, dn, r), dw


# ---------------------------------------------------------------- one layer


class _Work:
    """What a layer's two passes share: shapes, positions, the linears."""

    def __init__(
        self, lean: "Lean", layer: Any, dtype: torch.dtype, rows: Rows, keep: bool
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        make = lambda modules: Group(modules, lambda w: lean.cast(w, dtype), dtype)  # noqa: E731
        self.qkv = make([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.down = make([attention.o_proj]), make([mlp.down_proj])
        # gate and up are apart, as a product with a slice of wider rows copies them first
        self.gate, self.up = make([mlp.gate_proj]), make([mlp.up_proj])
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.eps, self.dtype, self.rows, self.keep = lean.eps, dtype, rows, keep
        self.heads = lean.heads
        self.norms = [w for w in (self.norm1, self.norm2) if w.requires_grad]

    def params(self) -> list[torch.Tensor]:
        groups = (self.qkv, self.o, self.gate, self.up, self.down)
        return [*self.norms, *(p for g in groups for p in g.params)]


class _Layer(torch.autograd.Function):
    """x [N, X, H] -> x [N, X, H], the residual stream in the master type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: _Work, *params: torch.Tensor) -> torch.Tensor:
        r1 = _inverse_rms(x, w.eps)
        h1 = (x * r1).mul_(w.norm1).to(w.dtype)
        y, low_qkv = w.qkv.forward(h1)
        out, kept = attention(y, w.heads, w.rows, w.keep)
        o, low_o = w.o.forward(out)
        x1 = x + o
        r2 = _inverse_rms(x1, w.eps)
        h2 = (x1 * r2).mul_(w.norm2).to(w.dtype)
        gate, low_g = w.gate.forward(h2)
        up, low_u = w.up.forward(h2)
        swish = F.silu(gate)
        act = swish * up
        down, low_d = w.down.forward(act)
        if w.keep:
            ctx.w = w
            ctx.kept = (
                x,
                r1,
                h1,
                low_qkv,
                kept,
                out,
                low_o,
                x1,
                r2,
                h2,
                low_g,
                gate,
                low_u,
                up,
                swish,
                act,
                low_d,
            )
            ctx.save_for_backward(
                *params
            )  # autograd then notices if one is changed before the way back
        return x1 + down

    @staticmethod
    def backward(ctx: Any, dx2: torch.Tensor) -> tuple[Any, ...]:
        w: _Work = ctx.w
        _ = ctx.saved_tensors
        (
            x,
            r1,
            h1,
            low_qkv,
            kept,
            out,
            low_o,
            x1,
            r2,
            h2,
            low_g,
            gate,
            low_u,
            up,
            swish,
            act,
            low_d,
        ) = ctx.kept
        ctx.kept = None
        dact, g_down = w.down.backward(dx2.to(w.dtype), act, low_d)
        dh2, g_up = w.up.backward(dact * swish, h2, low_u)
        dgate = torch.ops.aten.silu_backward(dact.mul_(up), gate)
        dh2, g_gate = w.gate.backward(dgate, h2, low_g, into=dh2)
        dx1, dw2 = _norm_backward(dh2, x1, r2, w.norm2, dx2)
        dout, g_o = w.o.backward(dx1.to(w.dtype), out, low_o)
        dy = attention_backward(dout, kept, w.heads, w.rows)
        need = ctx.needs_input_grad[0] or w.norm1.requires_grad
        dh1, g_qkv = w.qkv.backward(dy, h1, low_qkv, need)
        dx = dw1 = None
        if need:
            dx, dw1 = _norm_backward(dh1, x, r1, w.norm1, dx1)
        norms = [g for g in (dw1, dw2) if g is not None]
        return dx, None, *norms, *g_qkv, *g_o, *g_gate, *g_up, *g_down


# ---------------------------------------------------------------- the model


class _Cast(NamedTuple):
    versions: list[int]
    frozen: bool
    weights: list[torch.Tensor]
    """Held, so that their ids are not reused."""
    w_OH: torch.Tensor
    w_HO: torch.Tensor


class Lean:
    """The lean passes of one loaded model. Reads its modules at each call, so adapters come and go
    at will."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._model = ref(
            model
        )  # not the model itself: the registry of these is keyed by it, weakly
        self.eps, d = config.rms_norm_eps, model.model.layers[0].self_attn.head_dim
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, d)
        self._casts: dict[tuple[int, ...], _Cast] = {}
        self._turns: dict[torch.dtype, torch.Tensor] = {}

    @property
    def body(self) -> Any:
        """The decoder below the unembedding."""
        return self._model().model

    @property
    def head(self) -> Any:
        """The unembedding's module."""
        return self._model().lm_head

    def cast(
        self, weights: list[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights under one another in the compute type, [O, H], and turned round, [H,
        O]; made again only when one has changed. Frozen ones in bf16 are turned round in memory,
        once: the forward product then takes two thirds of the time (LOG.md)."""
        if len(weights) == 1 and weights[0].dtype == dtype:
            return weights[0].detach(), weights[0].detach().T
        key, versions = (*map(id, weights), hash(dtype)), [w._version for w in weights]
        frozen = dtype == torch.bfloat16 and not any(w.requires_grad for w in weights)
        kept = self._casts.get(key)
        if kept is None or kept.versions != versions or kept.frozen != frozen:
            made = torch.cat([w.detach().to(dtype) for w in weights])
            turned = made.T.contiguous() if frozen else made.T
            kept = self._casts[key] = _Cast(versions, frozen, weights, made, turned)
        return kept.w_OH, kept.w_HO

    def hidden(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return the residual stream after the last layer, [N, X, H], in the master type."""
        x = self.body.embed_tokens(torch.from_numpy(batch.tokens_NX))
        length = row_class(max(max(lengths) for lengths in batch.lengths))
        rows, grad = Rows(batch, self._rotations(length, x, dtype)), torch.is_grad_enabled()
        for layer in self.body.layers:
            w = _Work(self, layer, dtype, rows, keep=False)
            params = w.params()
            w.keep = grad and (x.requires_grad or bool(params))
            x = _Layer.apply(x, w, *params)
        return x

    def _rotations(self, length: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rotary positions up to `length` as matrices in the compute type; made once a
        length."""
        if len(self._turns.get(dtype, ())) < length:
            cos, sin = (
                c[0].to(x.dtype) for c in self.body.rotary_emb(x, torch.arange(length)[None])
            )
            self._turns[dtype] = rotations(cos, sin, dtype)
        return self._turns[dtype]

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the final norm in the master type, with autograd."""
        return _Norm.apply(x, self.body.norm.weight, self.eps)

    def head_group(self, dtype: torch.dtype) -> Group:
        """Return the unembedding."""
        return Group([self.head], lambda w: self.cast(w, dtype), dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, r, weight)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[Any, ...]:
        x, r, weight = ctx.saved_tensors
        return *_norm_backward(dh, x, r, weight, None), None


_known: "WeakKeyDictionary[Any, Lean | None]" = WeakKeyDictionary()


def lean_for(model: Any) -> Lean | None:
    """Return the lean passes of `model`, or None where transformers' own forward must be used:
    another family, another device, or modules that are neither nn.Linear nor ours."""
    if model not in _known:
        _known[model] = Lean(model) if _is_plain_llama(model) else None
    lean = _known[model]
    return lean if lean is not None and _modules_are_known(lean) else None


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


def _modules_are_known(lean: Lean) -> bool:
    kinds = (torch.nn.Linear, StackedLinear)
    for layer in lean.body.layers:
        a, m = layer.self_attn, layer.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        if any(type(linear) not in kinds for linear in linears):
            return False
    return type(lean.head) in kinds
