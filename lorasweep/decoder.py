"""Forward and backward of Llama-shaped decoders on a CPU, written out by hand: the same numbers in half the time.

transformers' forward is a chain of small operations whose passes over memory, not the matrix products, take most of a
step on a CPU. Here a layer is one autograd function: q/k/v and gate/up are one product each, activations are cast once,
frozen weights get no gradient, and their bf16 copies are made once. Tests hold it to transformers' forward in float64.
Knows nn.Linear and StackedLinear modules. Refuses other families (`lean_for` gives None: transformers' forward is used).
Shapes: N members, X tokens a member, H hidden, O outputs of a group of linears that share their input; in attention R
rows of one length T, S = R x kv heads, G query heads a kv head, d head size.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from lorasweep.adapters import StackedLinear
from lorasweep.data.batches import Batch, rows_of_a_length

ATTENTION_BLOCK = 128
"""Queries at a time: the causal half of the scores is never computed, and a block stays in the cache (LOG.md)."""


class Group:
    """The linears of one layer that share an input, as one product: y_i = W_i h + s B_i A_i h."""

    def __init__(self, modules: list[Any], cast: Callable[[list[torch.Tensor]], torch.Tensor], dtype: torch.dtype):
        self.params: list[torch.Tensor] = []
        """What autograd must know of this group, in the order of the gradients that `backward` returns."""
        self.adapted: list[tuple[slice, StackedLinear]] = []
        self.weights: list[torch.Tensor] = []
        start = 0
        for module in modules:
            linear = module.base if isinstance(module, StackedLinear) else module
            self.weights.append(linear.weight)
            if isinstance(module, StackedLinear):
                self.adapted.append((slice(start, start + linear.out_features), module))
            start += linear.out_features
        self.trained = [w for w in self.weights if w.requires_grad]
        self.params = [*self.trained, *(m.A for _, m in self.adapted), *(m.B for _, m in self.adapted)]
        self.w_OH, self.dtype = cast(self.weights), dtype
        if self.adapted:
            self.a_NrH = torch.cat([m.A.detach() for _, m in self.adapted], 1).to(dtype)
            self.b = [m.B.detach().to(dtype) for _, m in self.adapted]
            self.rank = self.adapted[0][1].A.shape[1]

    def forward(self, h_NXH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return y [N, X, O], and the scaled low-rank activations [N, X, r of all] that backward needs."""
        n, x, _ = h_NXH.shape
        y = torch.mm(h_NXH.view(n * x, -1), self.w_OH.T).view(n, x, -1)
        if not self.adapted:
            return y, None
        low = torch.bmm(h_NXH, self.a_NrH.mT)
        for k, (where, module) in enumerate(self.adapted):
            part = low[..., k * self.rank : (k + 1) * self.rank]
            part.mul_(module.scaling_N.view(-1, 1, 1))
            y[..., where].baddbmm_(part, self.b[k].mT)
        return y, low

    def backward(
        self, dy_NXO: torch.Tensor, h_NXH: torch.Tensor, low: torch.Tensor | None, need_input: bool = True,
        into: torch.Tensor | None = None, weights: bool = True,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Return the gradient of h (None if not needed; added to `into` if given) and of `params`, trained
        weights left out without `weights`."""
        n, x, _ = dy_NXO.shape
        dy_2d, dh = dy_NXO.view(n * x, -1), into
        if into is not None:
            into.view(n * x, -1).addmm_(dy_2d, self.w_OH)
        elif need_input:
            dh = torch.mm(dy_2d, self.w_OH).view(n, x, -1)
        grads: list[torch.Tensor] = []
        if self.trained and weights:
            whole = torch.mm(dy_2d.T, h_NXH.view(n * x, -1))
            parts = whole.split([w.shape[0] for w in self.weights])
            grads += [part.to(w.dtype) for w, part in zip(self.weights, parts) if w.requires_grad]
        if self.adapted:
            assert low is not None
            dlow = torch.empty_like(low)
            db = []
            for k, (where, module) in enumerate(self.adapted):
                r = slice(k * self.rank, (k + 1) * self.rank)
                dy = dy_NXO[..., where]
                dlow[..., r] = torch.bmm(dy, self.b[k]).mul_(module.scaling_N.view(-1, 1, 1))
                # the narrow factor is the one turned round: a transposed dy would be copied whole
                db.append(torch.bmm(low[..., r].mT, dy).mT.to(module.B.dtype, memory_format=torch.contiguous_format))
            da = torch.bmm(dlow.mT, h_NXH).to(self.adapted[0][1].A.dtype)
            if dh is not None:
                dh.baddbmm_(dlow, self.a_NrH)
            grads += [*da.split(self.rank, 1), *db]
        return dh, grads


# ---------------------------------------------------------------- norms, positions, attention


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1] (Zhang & Sennrich, arXiv 1910.07467)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(
    dh: torch.Tensor, x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x (that of the residual stream added) and of the norm's weight (None if frozen)."""
    dh = dh.to(x.dtype)
    n = x * r
    dw = (dh * n).view(-1, x.shape[-1]).sum(0) if weight.requires_grad else None
    dn = dh * weight
    dot = (dn * n).mean(-1, keepdim=True)
    dn.addcmul_(n, dot, value=-1)
    return dn.mul_(r) if residual is None else torch.addcmul(residual, dn, r), dw


def _half_turn(d: int, like: torch.Tensor) -> torch.Tensor:
    """The [d, d] matrix P with x P = rotate_half(x) = (-x2, x1): exact in any precision, as it only moves and negates."""
    half, eye = d // 2, torch.eye(d // 2, dtype=like.dtype, device=like.device)
    turn = torch.zeros(d, d, dtype=like.dtype, device=like.device)
    turn[half:, :half], turn[:half, half:] = -eye, eye
    return turn


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, list[Any]]:
    """Causal attention. q [S, G, T, d], k and v [S, T, d]; the softmax works in the master type.

    Returns the output [S, G, T, d] and each block's (range, queries, probabilities) for the way back.
    """
    s_, g, t, d = q.shape
    out, kept = torch.empty_like(q), []
    for t0 in range(0, t, ATTENTION_BLOCK):
        t1 = min(t, t0 + ATTENTION_BLOCK)
        block = q[:, :, t0:t1].reshape(s_, -1, d) * scale
        scores = torch.bmm(block, k[:, :t1].mT).view(s_, g, t1 - t0, t1)
        scores[..., t0:].add_(torch.full((t1 - t0, t1 - t0), -torch.inf, dtype=q.dtype, device=q.device).triu_(1))
        p = torch.softmax(scores, -1).view(s_, -1, t1)
        out[:, :, t0:t1] = torch.bmm(p, v[:, :t1]).view(s_, g, t1 - t0, d)
        kept.append((t0, t1, block, p))
    return out, kept


def _attend_backward(dout: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: list[Any], scale: float):
    """Gradients of q [S, G, T, d], k and v [S, T, d]."""
    s_, g, t, d = dout.shape
    dq, dk, dv = torch.empty_like(dout), torch.zeros_like(k), torch.zeros_like(v)
    for t0, t1, block, p in kept:
        do = dout[:, :, t0:t1].reshape(s_, -1, d)
        dv[:, :t1] += torch.bmm(p.mT, do)
        dp = torch.bmm(do, v[:, :t1].mT)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        torch.mul(torch.bmm(ds, k[:, :t1]).view(s_, g, t1 - t0, d), scale, out=dq[:, :, t0:t1])
        dk[:, :t1] += torch.bmm(ds.mT, block)  # the block holds the scale
    return dq, dk, dv


# ---------------------------------------------------------------- one layer


class _Work:
    """What a layer's two passes share: shapes, positions, the linears."""

    def __init__(self, lean: "Lean", layer: Any, dtype: torch.dtype, rows: "Rows", keep: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        make = lambda modules: Group(modules, lambda w: lean.cast(w, dtype), dtype)  # noqa: E731
        self.qkv = make([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.down = make([attention.o_proj]), make([mlp.down_proj])
        # gate and up are apart, as a product with a slice of wider rows copies them first
        self.gate, self.up = make([mlp.gate_proj]), make([mlp.up_proj])
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.eps, self.dtype, self.rows, self.keep = lean.eps, dtype, rows, keep
        self.heads, self.kv, self.d = lean.heads, lean.kv_heads, lean.head_size
        self.norms = [w for w in (self.norm1, self.norm2) if w.requires_grad]

    def params(self) -> list[torch.Tensor]:
        groups = (self.qkv, self.o, self.gate, self.up, self.down)
        return [*self.norms, *(p for g in groups for p in g.params)]


class Rows:
    """Where the rows of each length are in the flattened tokens, and the rotary positions."""

    def __init__(self, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """cos, sin: [1, longest row, d], in the master type."""
        whole = batch.tokens_NX.size
        self.cos, self.sin, self.turn = cos, sin, _half_turn(cos.shape[-1], cos)
        self.spans = [
            (length, None if len(at) == whole else torch.from_numpy(at)) for length, at in rows_of_a_length(batch).items()
        ]


class _Layer(torch.autograd.Function):
    """x [N, X, H] -> x [N, X, H], the residual stream in the master type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: _Work, *params: torch.Tensor) -> torch.Tensor:
        r1 = _inverse_rms(x, w.eps)
        h1 = (x * r1).mul_(w.norm1).to(w.dtype)
        y, low_qkv = w.qkv.forward(h1)
        out, kept = _attention(y, w)
        o, low_o = w.o.forward(out)
        x1 = x + o
        r2 = _inverse_rms(x1, w.eps)
        h2 = (x1 * r2).mul_(w.norm2).to(w.dtype)
        gate, low_g = w.gate.forward(h2)
        up, low_u = w.up.forward(h2)
        swish = F.silu(gate)
        down, low_d = w.down.forward(swish * up)
        if w.keep:
            ctx.w = w
            ctx.kept = (x, r1, h1, low_qkv, kept, out, low_o, x1, r2, h2, low_g, gate, low_u, up, swish, low_d)
            ctx.save_for_backward(*params)  # autograd then notices if one is changed before the way back
        return x1 + down

    @staticmethod
    def backward(ctx: Any, dx2: torch.Tensor) -> tuple[Any, ...]:
        w: _Work = ctx.w
        _ = ctx.saved_tensors
        x, r1, h1, low_qkv, kept, out, low_o, x1, r2, h2, low_g, gate, low_u, up, swish, low_d = ctx.kept
        ctx.kept = None
        dact, g_down = w.down.backward(dx2.to(w.dtype), swish * up, low_d)
        dh2, g_up = w.up.backward(dact * swish, h2, low_u)
        dgate = torch.ops.aten.silu_backward(dact.mul_(up), gate)
        dh2, g_gate = w.gate.backward(dgate, h2, low_g, into=dh2)
        dx1, dw2 = _norm_backward(dh2, x1, r2, w.norm2, dx2)
        dout, g_o = w.o.backward(dx1.to(w.dtype), out, low_o)
        dy = _attention_backward(dout, kept, w)
        need = ctx.needs_input_grad[0] or w.norm1.requires_grad
        dh1, g_qkv = w.qkv.backward(dy, h1, low_qkv, need)
        dx = dw1 = None
        if need:
            dx, dw1 = _norm_backward(dh1, x, r1, w.norm1, dx1)
        norms = [g for g in (dw1, dw2) if g is not None]
        return dx, None, *norms, *g_qkv, *g_o, *g_gate, *g_up, *g_down


def _attention(y_NXO: torch.Tensor, w: _Work) -> tuple[torch.Tensor, list[Any]]:
    """From the q/k/v products to the heads' output [N, X, heads * d], and what the way back needs."""
    d, kv, groups = w.d, w.kv, w.heads // w.kv
    flat = y_NXO.view(-1, (w.heads + 2 * kv) * d)
    whole, kept = torch.empty(len(flat), w.heads * d, dtype=flat.dtype, device=flat.device), []
    for length, where in w.rows.spans:
        part = flat if where is None else flat.index_select(0, where)
        part = part.view(-1, length, w.heads + 2 * kv, d).transpose(1, 2)  # [R, heads + 2 kv, T, d]
        q = _turned(part[:, : w.heads], w).view(-1, groups, length, d)
        k = _turned(part[:, w.heads : w.heads + kv], w).view(-1, length, d)
        v = part[:, w.heads + kv :].reshape(-1, length, d)
        if w.keep:
            out, blocks = _attend(q, k, v, d**-0.5)
            kept.append((k, v, blocks))
        else:
            out = F.scaled_dot_product_attention(q, k[:, None], v[:, None], is_causal=True, enable_gqa=True)
        out = out.view(-1, w.heads, length, d).transpose(1, 2).reshape(-1, w.heads * d)
        if where is None:
            whole = out
        else:
            whole.index_copy_(0, where, out)
    return whole.view(*y_NXO.shape[:2], -1), kept


def _attention_backward(dout: torch.Tensor, kept: list[Any], w: _Work) -> torch.Tensor:
    """Gradient of the q/k/v products, [N, X, O]."""
    d, kv = w.d, w.kv
    flat = dout.view(-1, w.heads * d)
    whole = torch.empty(len(flat), (w.heads + 2 * kv) * d, dtype=flat.dtype, device=flat.device)
    for (length, where), (k, v, blocks) in zip(w.rows.spans, kept):
        part = flat if where is None else flat.index_select(0, where)
        part = part.view(-1, length, w.heads, d).transpose(1, 2).reshape(len(k), -1, length, d)
        dq, dk, dv = _attend_backward(part, k, v, blocks, d**-0.5)
        dy = whole if where is None else torch.empty(len(where), whole.shape[1], dtype=flat.dtype, device=flat.device)
        view = dy.view(-1, length, w.heads + 2 * kv, d).transpose(1, 2)
        view[:, : w.heads] = _turned_back(dq.view(-1, w.heads, length, d), w)
        view[:, w.heads : w.heads + kv] = _turned_back(dk.view(-1, kv, length, d), w)
        view[:, w.heads + kv :] = dv.view(-1, kv, length, d)
        if where is not None:
            whole.index_copy_(0, where, dy)
    return whole.view(*dout.shape[:2], -1)


def _turned(y: torch.Tensor, w: _Work) -> torch.Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) on [R, heads, T, d], contiguous in the compute type."""
    cos, sin = w.rows.cos[:, : y.shape[2]], w.rows.sin[:, : y.shape[2]]
    y = y.to(cos.dtype, memory_format=torch.contiguous_format, copy=True)
    turned = torch.matmul(y, w.rows.turn)
    return y.mul_(cos).addcmul_(turned, sin).to(w.dtype)


def _turned_back(dy: torch.Tensor, w: _Work) -> torch.Tensor:
    cos, sin = w.rows.cos[:, : dy.shape[2]], w.rows.sin[:, : dy.shape[2]]
    dy = dy.to(cos.dtype)
    return torch.matmul(dy * sin, w.rows.turn.T).addcmul_(dy, cos)


# ---------------------------------------------------------------- the model


class Lean:
    """The lean passes of one loaded model. Reads its modules at each call, so adapters come and go at will."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.body, self.head = model.model, model
        self.eps, self.heads, self.kv_heads = config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
        self.head_size = model.model.layers[0].self_attn.head_dim
        self._casts: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor], torch.Tensor]] = {}

    def cast(self, weights: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the weights under one another in the compute type; made again only when one has changed."""
        if len(weights) == 1 and weights[0].dtype == dtype:
            return weights[0].detach()
        key, versions = (*map(id, weights), hash(dtype)), [w._version for w in weights]
        kept = self._casts.get(key)
        if kept is None or kept[0] != versions:
            made = torch.cat([w.detach().to(dtype) for w in weights])
            kept = self._casts[key] = (versions, weights, made)  # holding the weights keeps their ids from reuse
        return kept[2]

    def hidden(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Return the residual stream after the last layer, [N, X, H], in the master type."""
        x = self.body.embed_tokens(torch.from_numpy(batch.tokens_NX))
        positions = torch.arange(max(max(lengths) for lengths in batch.lengths))[None]
        cos, sin = (c.to(x.dtype) for c in self.body.rotary_emb(x, positions))
        rows, grad = Rows(batch, cos, sin), torch.is_grad_enabled()
        for layer in self.body.layers:
            w = _Work(self, layer, dtype, rows, keep=False)
            params = w.params()
            w.keep = grad and (x.requires_grad or bool(params))
            x = _Layer.apply(x, w, *params)
        return x

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the final norm in the master type, with autograd."""
        return _Norm.apply(x, self.body.norm.weight, self.eps)

    def head_group(self, dtype: torch.dtype) -> Group:
        """Return the unembedding."""
        return Group([self.head.lm_head], lambda w: self.cast(w, dtype), dtype)


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
    """Return the lean passes of `model`, or None where transformers' own forward must be used: another family,
    another device, or modules that are neither nn.Linear nor ours."""
    if model not in _known:
        _known[model] = Lean(model) if _is_plain_llama(model) else None
    lean = _known[model]
    return lean if lean is not None and _modules_are_known(lean) else None


def _is_plain_llama(model: Any) -> bool:
    from transformers import LlamaForCausalLM

    if type(model) is not LlamaForCausalLM or next(model.parameters()).device.type != "cpu":
        return False
    c = model.config
    return c.hidden_act == "silu" and not c.attention_bias and not c.mlp_bias and not c.attention_dropout


def _modules_are_known(lean: Lean) -> bool:
    kinds = (torch.nn.Linear, StackedLinear)
    for layer in lean.body.layers:
        a, m = layer.self_attn, layer.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        if any(type(linear) not in kinds for linear in linears):
            return False
    return type(lean.head.lm_head) in kinds
