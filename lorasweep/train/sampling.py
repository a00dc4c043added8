"""Sample completions from all runs of a pack together, with the KV cache of transformers.

Each completion has separate random numbers, so the other runs of the pack change it only by
rounding.

Shapes: N runs of the pack, A completions of a run (G of each of P prompts), R = N A completions in
the order of runs and prompts, L the maximum number of tokens of a completion.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lorasweep.errors import ModelError
from lorasweep.models.forward import COMPUTE_DTYPES, autocast
from lorasweep.models.sharding import ALONE, Mesh, layers_together
from lorasweep.train.events import SAMPLING, phase


@dataclass
class Completions:
    """The A completions that one run sampled, prompt by prompt."""

    tokens: list[np.ndarray]
    """Tokens of each completion, including the end."""
    log_p: list[np.ndarray]
    """Log-probability of each token, in nats, under the policy that drew it."""
    entropy: float
    """Mean entropy of the distributions that the tokens were drawn from, in nats."""
    largest_logit: float
    ended: np.ndarray
    """bool [A]; False: the completion was cut off before its end."""


ROWS = 1024
"""Maximum number of completions of a run that are sampled at once."""
CACHE_SHARE = 0.3
"""Share of a GPU's total memory for cached keys and values. With a share of the free memory, a
resumed run might draw another number of completions at once."""
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Argument of forward passes for cached keys and values: its name from transformers 5.24 on, and
its earlier name."""


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[np.ndarray]],
    uniforms_NAL: np.ndarray,
    ends: Sequence[Sequence[int]],
    precision: str,
    mesh: Mesh = ALONE,
    forward_parts: int = 1,
) -> list[Completions]:
    """Sample completions at temperature 1, equally many prompts and completions for every run.

    Several processes share the prompts; each returns all completions.

    Args:
        prompts: token ids, for each run and prompt.
        uniforms_NAL: random numbers in [0, 1), float64; number t decides token t of a completion.
            NaN: the most probable token, as at temperature 0.
        ends: token sequences that end a completion; if empty, every completion has L tokens.
        forward_parts: see Exec.
    """
    n_prompts = len(prompts[0])
    total, longest = uniforms_NAL.shape[1:]
    group = total // n_prompts
    if mesh.size > 1:
        # There is one run. Each process samples every size-th prompt. Prompts that are repeated for
        # equal numbers are dropped later.
        mine = [k % n_prompts for k in mesh.turns(n_prompts)]
        uniforms = uniforms_NAL.reshape(n_prompts, group, -1)[mine].reshape(1, -1, longest)
        own = [[prompts[0][k] for k in mine]]
        with layers_together(model):
            (found,) = sample(model, own, uniforms, ends, precision, ALONE, forward_parts)
        every = _joined(mesh.gather(found))  # ordered by process
        at = np.arange(len(every.tokens)).reshape(mesh.size, -1, group).swapaxes(0, 1)
        by_prompt = at.flatten()[:total]
        tokens, log_p = ([held[k] for k in by_prompt] for held in (every.tokens, every.log_p))
        return [replace(every, tokens=tokens, log_p=log_p, ended=every.ended[by_prompt])]
    most = min(completions_at_once(model, prompts, longest, precision), total)
    size = max(1, most // forward_parts // group)
    parts = []
    with phase(SAMPLING, divisible=size > 1):
        for k in range(0, n_prompts, size):
            some = [own[k : k + size] for own in prompts]
            uniforms = uniforms_NAL[:, k * group : (k + size) * group]
            parts.append(_together(model, some, uniforms, ends, precision))
    return [_joined(of_run) for of_run in zip(*parts)]


def completions_at_once(
    model: Any, prompts: Sequence[Sequence[np.ndarray]], most: int, precision: str
) -> int:
    """Return how many completions of a run are sampled at once; the GPU's memory limits this."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return ROWS
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    word = COMPUTE_DTYPES[precision].itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * word
    longest = max(len(p) for own in prompts for p in own) + most
    room = CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return min(ROWS, int(room / (len(prompts) * longest * token)))


def _together(
    model: Any,
    prompts: Sequence[Sequence[np.ndarray]],
    uniforms_NAL: np.ndarray,
    ends: Sequence[Sequence[int]],
    precision: str,
) -> list[Completions]:
    """Sample by one forward pass over the prompts, then one for each further token."""
    (n, total, most), device = uniforms_NAL.shape, next(model.parameters()).device
    rows = [torch.from_numpy(p.astype(np.int64)) for own in prompts for p in own]
    length, group = max(map(len, rows)), total // len(prompts[0])
    tokens_RT, mask_RT = (
        pad_sequence(some, batch_first=True, padding_side="left").to(device)
        for some in (rows, list(map(torch.ones_like, rows)))
    )
    (forward, cache), at = (
        _forward(model, precision, most > 1),
        (mask_RT.cumsum(1) - 1).clamp(min=0),
    )
    if min(map(len, rows)) == length:
        mask_RT = at = None
    logits = forward(tokens_RT, mask_RT, at)
    if cache is not None:
        cache.batch_repeat_interleave(group)
    if at is not None:
        at, mask_RT = at[:, -1:].repeat_interleave(group, 0), mask_RT.repeat_interleave(group, 0)

    uniforms_RL = torch.from_numpy(uniforms_NAL).reshape(n * total, most).to(device)
    ends_ = [torch.tensor(list(end), device=device) for end in ends]
    drawn_RL = torch.zeros_like(uniforms_RL, dtype=torch.int64)
    log_p_RL, entropy_RL = torch.zeros_like(uniforms_RL), torch.zeros_like(uniforms_RL)
    largest_R, length_R = torch.zeros_like(uniforms_RL[:, 0]), torch.zeros_like(drawn_RL[:, 0])
    ended_R = torch.zeros_like(length_R, dtype=torch.bool)
    index = torch.arange(n * total, device=device)  # of each computed row: its completion
    alive = torch.ones_like(index, dtype=torch.bool)
    for t in range(most):
        if t:
            alive_NA = alive.view(n, -1)
            keep, held = int(alive_NA.sum(1).max()), alive_NA.shape[1]
            if not keep:
                break
            if 2 * keep <= held:
                # drop ended completions once half have ended in every run; equal rows per run
                first = (~alive_NA).to(torch.int8).argsort(dim=1, stable=True)[:, :keep]
                some = (first + torch.arange(n, device=device)[:, None] * held).flatten()
                cache.batch_select_indices(some)
                index, alive = index[some], alive[some]
                if at is not None:
                    mask_RT, at = mask_RT[some], at[some]
            if at is not None:
                at, mask_RT = at + 1, torch.cat([mask_RT, torch.ones_like(at)], 1)
            here = torch.full((len(index), 1), length + t - 1, device=device) if at is None else at
            logits = forward(drawn_RL[index, t - 1][:, None], mask_RT, here)
        # draw the first token at which the cumulative probability exceeds the random number
        log_p = torch.log_softmax(logits, -1)
        p = log_p.double().exp()
        cumulative = p.cumsum(-1)
        wanted = uniforms_RL[index, t].view(len(logits), -1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[1] - 1)
        token = torch.where(wanted.isnan(), log_p.argmax(-1, keepdim=True), token)
        entropy = -(p * log_p.double().clamp(min=-1e3)).sum(-1)  # 0 times -inf counts as 0
        share, at_R = len(index) // len(logits), index[alive]  # at token 0 one row per prompt
        largest = logits.abs().amax(-1).double().repeat_interleave(share)[alive]
        log_p_RL[at_R, t] = log_p.gather(1, token).flatten()[alive].double()
        entropy_RL[at_R, t] = entropy.repeat_interleave(share)[alive]
        largest_R[at_R] = torch.maximum(largest_R[at_R], largest)
        drawn_RL[at_R, t] = token.flatten()[alive]
        length_R[at_R] = t + 1
        ended = torch.zeros_like(alive)
        for end in ends_:
            if t + 1 >= len(end):
                last = drawn_RL[index, t + 1 - len(end) : t + 1]
                ended |= alive & (last == end).all(1)
        ended_R[index[ended]] = True
        alive = alive & ~ended
    held_R = drawn_RL, log_p_RL, entropy_RL, length_R, ended_R, largest_R
    by_run = zip(*(x.view(n, -1, *x.shape[1:]).cpu().numpy() for x in held_R))
    return [
        Completions(
            [row[:m].astype(np.int32) for row, m in zip(tokens, lengths)],
            [row[:m] for row, m in zip(log_p, lengths)],
            float(entropy.sum() / lengths.sum()),
            float(largest.max()),
            ended,
        )
        for tokens, log_p, entropy, lengths, ended, largest in by_run
    ]


def _forward(model: Any, precision: str, cached: bool) -> tuple[Callable[..., torch.Tensor], Any]:
    """Return the function (tokens, mask, positions) -> logits at the last token, and its cache.

    The cache holds keys and values in the type of matrix products. Under autocast keys are fp32
    (before transformers 5.24 also values). Attention rounds them to bf16 at every token, so
    rounding them earlier changes no number. In bf16 the cache takes two thirds of the memory
    (before 5.24 half of it).

    ModelError: the forward pass has none of CACHE_ARGUMENTS. It would ignore an unknown argument,
    and every token would be drawn as if it were the first of its row.
    """
    from transformers import DynamicCache

    dtype = COMPUTE_DTYPES[precision]

    class Cache(DynamicCache):
        def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().update(keys.to(dtype), values.to(dtype), *args, **kwargs)

    taken = inspect.signature(model.forward).parameters
    names = [name for name in CACHE_ARGUMENTS if name in taken]
    if not names:
        raise ModelError(
            f"{type(model).__name__}.forward takes no cache of keys and values: none of its "
            f"arguments is named {' or '.join(CACHE_ARGUMENTS)}, so completions cannot be sampled. "
            "Use objective=sft, or another model."
        )
    cache = Cache(config=model.config) if cached else None
    how = {"use_cache": cached, "logits_to_keep": 1, names[0]: cache}

    def forward(
        tokens: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor | None
    ) -> torch.Tensor:
        with autocast(precision, tokens.device):
            found = model(input_ids=tokens, attention_mask=mask, position_ids=at, **how)
        logits = found.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    return forward, cache


def _joined(parts: Sequence[Completions]) -> Completions:
    if len(parts) == 1:
        return parts[0]
    counts = [sum(map(len, p.tokens)) for p in parts]
    return Completions(
        [t for p in parts for t in p.tokens],
        [x for p in parts for x in p.log_p],
        float(np.average([p.entropy for p in parts], weights=counts)),
        max(p.largest_logit for p in parts),
        np.concatenate([p.ended for p in parts]),
    )
