"""Forward passes of transformers models in two halves (hidden states, logits), and number types.

Shapes: R rows, T tokens, P positions, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorasweep.errors import ModelError

MASTER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the trained weights. With bf16 they are fp32, under autocast."""
COMPUTE_DTYPES = {**MASTER_DTYPES, "bf16": torch.bfloat16}
"""Type of activations and weight copies in matrix products."""
EXPERT_STACKS = ("gate_up_proj", "down_proj")
"""Parameters of a module of experts, [experts, outputs, inputs]."""
GEMMA_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
"""Norms whose factor is 1 + weight."""
ROUNDING = 0.03
"""Accepted difference of outputs, as a share of the largest one: above bf16 rounding, far below the
effect of tokens of another row."""


def backend(model: nn.Module, processes: int = 1) -> str:
    """Name the backend as results record it: 'transformers on cuda, 8 processes'.

    Older results may say 'cpu_llama on cpu': a hand-written forward pass, since removed.
    """
    more = f", {processes} processes" if processes > 1 else ""
    return f"transformers on {next(model.parameters()).device.type}{more}"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


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
    for p in bf16_matrices(model).values():
        p.data = p.data.to(torch.bfloat16)
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.register_forward_hook(lambda module, args, out: out.float())
        elif _is_embedding(module):
            module.forward = partial(_scaled_rows, module)


def _is_embedding(module: nn.Module) -> bool:
    """Return whether a module looks up rows; Gemma's also multiplies them with `embed_scale`."""
    scaled = isinstance(getattr(module, "embed_scale", None), torch.Tensor)
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)


def _scaled_rows(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    rows = F.embedding(tokens, module.weight, module.padding_idx)
    return rows.float() * module.embed_scale.float()


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
    """Let a model compute in a precision: matrices and norms in bf16, or norms in float64."""
    if precision == "bf16":
        if published_in_bf16:
            hold_in_bf16(model)
        norms_to_bf16(model)
    if precision == "fp64":
        norms_in_float64(model)


def norms_to_bf16(model: nn.Module) -> None:
    """Convert the outputs of norms of fp32 states to bf16.

    Autocast would convert them again in each of the matrix products that follow. The gradients of
    these products are then added in bf16 instead of fp32.
    """

    def convert(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.to(torch.bfloat16) if args[0].dtype == torch.float32 else out

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(convert)


def are_bf16(values: torch.Tensor) -> bool:
    """Return whether bf16 represents all values exactly."""
    return all(torch.equal(part.to(torch.bfloat16).to(part), part) for part in values.split(8192))


def norms_in_float64(model: nn.Module) -> None:
    """Compute RMS norms in float64: transformers computes them in float32 for any input."""

    def rms_norm(module: Any, eps: float, offset: float, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (module.weight + offset) * (x * scale)

    known: Any
    for known in model.modules():
        name = type(known).__name__
        if name.endswith("RMSNorm") and hasattr(known, "variance_epsilon"):
            known.forward = partial(rms_norm, known, known.variance_epsilon, 0.0)
        elif name in GEMMA_NORMS:
            known.forward = partial(rms_norm, known, known.eps, 1.0)


def hidden_states(
    model: Any,
    tokens_RT: torch.Tensor,
    positions_RP: torch.Tensor,
    position_ids_RT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the decoder's output [R, P, H]; `position_ids_RT` for joined rows (`data.batches`)."""
    states_RTH = model.base_model(
        input_ids=tokens_RT, position_ids=position_ids_RT, use_cache=False
    ).last_hidden_state
    at = positions_RP[..., None].expand(-1, -1, states_RTH.shape[-1])
    return states_RTH.gather(1, at)


def logits_of(model: Any, hidden_RPH: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [R, P, V] for its decoder's output [R, P, H].

    This runs the model's forward pass with its softcaps, scalings and adapters, but no decoder.

    Raises:
        ModelError: the forward pass of the model does not call the decoder.
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


@torch.no_grad()
def check_rows_stay_apart(model: Any) -> None:
    """Raise ModelError if, in joined rows, the output at a token depends on another row."""
    tokens_RT = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 3, 2, 4, 5, 6]])  # the second row is the same
    device = next(model.parameters()).device
    position_ids_RT = torch.arange(3).repeat(2, 2).to(device)
    second_RP = torch.tensor([[3, 4, 5]] * 2, device=device)
    one, other = hidden_states(model, tokens_RT.to(device), second_RP, position_ids_RT).float()
    if not torch.allclose(one, other, rtol=0.0, atol=ROUNDING * float(one.abs().max())):
        raise ModelError(
            f"{type(model).__name__} lets joined rows attend to each other with "
            f"attn_implementation={model.config._attn_implementation!r}. Set exec.join_rows=false."
        )
