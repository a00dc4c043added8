"""One Llama decoder layer on a CPU, with hand-written forward and backward.

On a CPU, transformers' forward spends most of a step in passes over memory, not in matrix products.
Here a layer is one autograd function: q/k/v are one product, activations are cast once, and frozen
weights get no gradient. Tests compare it with transformers' forward in float64.

Shapes: N members, X tokens per member, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.models.cpu_llama.attention import Heads, Rows, attention, attention_backward
from lorasweep.models.cpu_llama.linears import Cast, Group


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps), [..., 1] (Zhang & Sennrich, arXiv 1910.07467)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    r: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x and of the norm's weight (None if frozen).

    `residual`, the gradient of the residual stream, is added to the first.
    """
    dh = dh.to(x.dtype)
    n = x * r
    dw = (dh * n).view(-1, x.shape[-1]).sum(0) if weight.requires_grad else None
    dn = dh * weight
    dot = (dn * n).mean(-1, keepdim=True)
    dn.addcmul_(n, dot, value=-1)
    return dn.mul_(r) if residual is None else torch.addcmul(residual, dn, r), dw


# ---------------------------------------------------------------- one layer


class LayerWork:
    """What the forward and backward pass of a layer share: shapes, positions, linears."""

    def __init__(
        self, layer: Any, heads: Heads, eps: float, cast: Cast, dtype: torch.dtype, rows: Rows
    ) -> None:
        """Collect the parts of `layer`, a LlamaDecoderLayer; `cast` gives weights in `dtype`."""
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], cast, dtype)
        self.o = Group([attention.o_proj], cast, dtype)
        self.down = Group([mlp.down_proj], cast, dtype)
        # gate and up are separate: a product with a slice of wider rows would copy the slice first
        self.gate, self.up = (Group([m], cast, dtype) for m in (mlp.gate_proj, mlp.up_proj))
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.heads, self.eps, self.dtype, self.rows = heads, eps, dtype, rows
        self.keep = False
        """True: the forward pass keeps what the backward pass needs."""
        self.norms = [w for w in (self.norm1, self.norm2) if w.requires_grad]

    def params(self) -> list[torch.Tensor]:
        groups = (self.qkv, self.o, self.gate, self.up, self.down)
        return [*self.norms, *(p for g in groups for p in g.params)]


class Layer(torch.autograd.Function):
    """One layer, x [N, X, H] -> x [N, X, H]: the residual stream in the master type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: LayerWork, *params: torch.Tensor) -> torch.Tensor:
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
            ctx.attention = (x, r1, h1, low_qkv, kept, out, low_o)
            ctx.mlp = (x1, r2, h2, low_g, gate, low_u, up, swish, act, low_d)
            # autograd then raises if a parameter changes before the backward pass
            ctx.save_for_backward(*params)
        return x1 + down

    @staticmethod
    def backward(ctx: Any, dx2: torch.Tensor) -> tuple[Any, ...]:
        w: LayerWork = ctx.w
        _ = ctx.saved_tensors  # raises if a parameter has changed
        x, r1, h1, low_qkv, kept, out, low_o = ctx.attention
        x1, r2, h2, low_g, gate, low_u, up, swish, act, low_d = ctx.mlp
        ctx.attention = ctx.mlp = None
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


class Norm(torch.autograd.Function):
    """The norm before the unembedding, x [..., H] -> [..., H], in the master type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, r, weight)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[Any, ...]:
        x, r, weight = ctx.saved_tensors
        return *_norm_backward(dh, x, r, weight, None), None
