"""Sample completions from all runs of a pack together, with the KV cache of transformers.

Each completion has separate random numbers, so the other runs of the pack change it only by
rounding.

Shapes: N runs of the pack, A completions of a run (G of each of P prompts), R = N A completions in
the order of runs and prompts, L the maximum number of tokens of a completion.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasweep.errors import ModelError
from lorasweep.models.forward import COMPUTE_DTYPES, autocast
from lorasweep.models.sharding import Mesh, layers_together
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
    mesh: Mesh | None = None,
    forward_parts: int = 1,
) -> list[Completions]:
    """Sample completions at temperature 1, equally many prompts and completions for every run.

    Several processes share the prompts; each returns all completions.

    Args:
        prompts: token ids, for each run and prompt.
        uniforms_NAL: random numbers in [0, 1), float64; number t decides token t of a completion.
        ends: token sequences that end a completion; if empty, every completion has L tokens.
        forward_parts: see Exec.
    """
    n_prompts = len(prompts[0])
    total, longest = uniforms_NAL.shape[1:]
    group = total // n_prompts
    if mesh is not None and mesh.size > 1:
        # There is one run. Each process samples every size-th prompt. Prompts that are repeated for
        # equal numbers are dropped later.
        mine = [k % n_prompts for k in mesh.turns(n_prompts)]
        uniforms = uniforms_NAL.reshape(n_prompts, group, -1)[mine].reshape(1, -1, longest)
        own = [[prompts[0][k] for k in mine]]
        with layers_together(model):
            (found,) = sample(model, own, uniforms, ends, precision, None, forward_parts)
        every = _joined(mesh.gather(found))  # ordered by process
        at = np.arange(len(every.tokens)).reshape(mesh.size, -1, group).swapaxes(0, 1)
        by_prompt = at.flatten()[:total]
        tokens, log_p = ([held[k] for k in by_prompt] for held in (every.tokens, every.log_p))
        return [replace(every, tokens=tokens, log_p=log_p, ended=every.ended[by_prompt])]
    most = min(completions_at_once(model, prompts, longest, precision), total)
    size = max(1, most // forward_parts // group)
    with phase(SAMPLING, divisible=size > 1):
        by_part = [
            _together(
                model,
                [own[k : k + size] for own in prompts],
                uniforms_NAL[:, k * group : (k + size) * group],
                ends,
                precision,
            )
            for k in range(0, n_prompts, size)
        ]
    return [_joined(own) for own in zip(*by_part)]


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
    model: nn.Module,
    prompts: Sequence[Sequence[np.ndarray]],
    uniforms_NAL: np.ndarray,
    ends: Sequence[Sequence[int]],
    precision: str,
) -> list[Completions]:
    n, completions, most = uniforms_NAL.shape
    group = completions // len(prompts[0])
    step = _Steps(model, precision, [p for own in prompts for p in own], group, most > 1)
    uniforms_RL = torch.from_numpy(uniforms_NAL).reshape(n * completions, most)
    draw = _Draw(uniforms_RL.to(step.index.device), ends)
    alive_R = draw.next(step.logits, 0, step.index, torch.ones_like(step.index, dtype=torch.bool))
    for t in range(1, most):
        if not bool(alive_R.any()):
            break
        alive_R = step.without_ended(alive_R, n)
        alive_R = draw.next(step.next(draw.tokens[step.index, t - 1]), t, step.index, alive_R)
    return draw.by_run(n)


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


class _Steps:
    """The forward passes: one over the prompts, then one for each further token of completions."""

    def __init__(
        self, model: Any, precision: str, rows: Sequence[np.ndarray], group: int, more: bool
    ) -> None:
        """Run the model on the prompts `rows`; `more`: completions may have more than one token.

        Raises:
            ModelError: the forward pass has none of CACHE_ARGUMENTS. It would ignore an unknown
                argument, and every token would be drawn as if it were the first of its row.
        """
        from transformers import DynamicCache

        device, dtype = next(model.parameters()).device, COMPUTE_DTYPES[precision]

        class Cache(DynamicCache):
            """A transformers cache that stores keys and values in the type of matrix products.

            Under autocast keys are fp32 (before transformers 5.24 also values). Attention rounds
            them to bf16 at every token, so rounding them earlier changes no number. In bf16 the
            cache takes two thirds of the memory (before 5.24 half of it).
            """

            def update(  # type: ignore[override]
                self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
            ) -> Any:
                return super().update(keys.to(dtype), values.to(dtype), *args, **kwargs)

        taken = inspect.signature(model.forward).parameters
        names = [name for name in CACHE_ARGUMENTS if name in taken]
        if not names:
            raise ModelError(
                f"{type(model).__name__}.forward takes no cache of keys and values: none of its "
                f"arguments is named {' or '.join(CACHE_ARGUMENTS)}, so completions cannot be "
                "sampled. Use objective=sft, or another model."
            )
        self._model, self._precision, self._name = model, precision, names[0]
        self._length = max(map(len, rows))
        tokens = np.zeros((len(rows), self._length), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for k, row in enumerate(rows):  # padded on the left
            tokens[k, self._length - len(row) :] = row
            mask[k, self._length - len(row) :] = 1
        self._mask = None if mask.all() else torch.from_numpy(mask).to(device)
        self._cache = Cache(config=model.config) if more else None
        at = None if self._mask is None else (self._mask.cumsum(1) - 1).clamp(min=0)
        self._next_at = None if at is None else at[:, -1:].repeat_interleave(group, 0) + 1
        self.logits = self._forward(torch.from_numpy(tokens).to(device), at)
        self.index = torch.arange(len(tokens) * group, device=device)
        """For each row that is still computed, the number of its completion."""
        if self._cache is not None:
            self._cache.batch_repeat_interleave(group)
            if self._mask is not None:
                self._mask = self._mask.repeat_interleave(group, 0)

    def _forward(self, tokens: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        with autocast(self._precision, tokens.device):
            logits = self._model(
                input_ids=tokens,
                attention_mask=self._mask,
                position_ids=at,
                use_cache=self._cache is not None,
                logits_to_keep=1,
                **{self._name: self._cache},
            ).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits after one more token of every completion."""
        at = self._next_at
        if at is None:
            at = torch.full((len(tokens), 1), self._length, device=tokens.device)
            self._length += 1
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(at)], 1)
            self._next_at = at + 1
        return self._forward(tokens[:, None], at)

    def without_ended(self, alive_R: torch.Tensor, n: int) -> torch.Tensor:
        """Drop ended completions once half have ended in every run; keep equal rows per run."""
        alive_NA = alive_R.view(n, -1)
        keep = int(alive_NA.sum(1).max())
        if not 0 < 2 * keep <= alive_NA.shape[1]:
            return alive_R
        first = (~alive_NA).to(torch.int8).argsort(dim=1, stable=True)[:, :keep]
        rows = (first + torch.arange(n, device=first.device)[:, None] * alive_NA.shape[1]).flatten()
        self._cache.batch_select_indices(rows)
        self.index = self.index[rows]
        if self._next_at is not None:
            self._mask, self._next_at = self._mask[rows], self._next_at[rows]
        return alive_R[rows]


class _Draw:
    """The tokens drawn so far, with their log-probabilities."""

    def __init__(self, uniforms_RL: torch.Tensor, ends: Sequence[Sequence[int]]) -> None:
        self._uniforms, device = uniforms_RL, uniforms_RL.device
        self._ends = [torch.tensor(list(end), device=device) for end in ends]
        self.tokens = torch.zeros_like(uniforms_RL, dtype=torch.int64)
        self._log_p = torch.zeros_like(uniforms_RL)
        self._entropy = torch.zeros_like(uniforms_RL)
        self._largest = torch.zeros_like(uniforms_RL[:, 0])
        self._length = torch.zeros_like(self.tokens[:, 0])
        self._ended = torch.zeros_like(self._length, dtype=torch.bool)

    def next(
        self, logits: torch.Tensor, t: int, index: torch.Tensor, alive: torch.Tensor
    ) -> torch.Tensor:
        """Draw token t of the completions `index` that are alive; return which of them continue."""
        rows = len(logits)  # at token 0 there is one row per prompt
        log_p = torch.log_softmax(logits, -1)
        p = log_p.double().exp()
        # draw the first token at which the cumulative probability exceeds the random number
        cumulative = p.cumsum(-1)
        wanted = self._uniforms[index, t].view(rows, -1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[1] - 1)
        entropy = -(p * log_p.double().clamp(min=-1e3)).sum(-1)  # 0 times -inf counts as 0
        largest, share = logits.abs().amax(-1).double(), len(index) // rows
        at = index[alive]
        self._log_p[at, t] = log_p.gather(1, token).flatten()[alive].double()
        self._entropy[at, t] = entropy.repeat_interleave(share)[alive]
        self._largest[at] = torch.maximum(
            self._largest[at], largest.repeat_interleave(share)[alive]
        )
        drawn = token.flatten()
        self.tokens[at, t] = drawn[alive]
        self._length[at] = t + 1
        ended = torch.zeros_like(alive)
        for end in self._ends:
            if t + 1 >= len(end):
                last = self.tokens[index, t + 1 - len(end) : t + 1]
                ended |= alive & (last == end).all(1)
        self._ended[index[ended]] = True
        return alive & ~ended

    def by_run(self, n: int) -> list[Completions]:
        """Return the completions of each of the n runs."""
        held = self.tokens, self._log_p, self._entropy, self._length, self._ended, self._largest
        by_run = zip(*(x.view(n, -1, *x.shape[1:]).cpu().numpy() for x in held))
        return [
            Completions(
                [row[:m].astype(np.int32) for row, m in zip(tokens, length)],
                [row[:m] for row, m in zip(log_p, length)],
                float(entropy.sum() / length.sum()),
                float(largest.max()),
                ended,
            )
            for tokens, log_p, entropy, length, ended, largest in by_run
        ]
