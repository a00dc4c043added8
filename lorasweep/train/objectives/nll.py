"""NLL of the runs of a pack: summed for training, token by token, and on held-out rows.

Logits are computed at the loss positions only, and never more than a chunk of them at once.

Shapes: N runs of the pack, R rows of all runs, T tokens of a row, P loss positions of a row, M loss
positions of a run, L loss tokens of a run, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasweep.data.examples import Batch, Example, by_length, merge, padded
from lorasweep.models.forward import autocast, hidden_states, logits_of
from lorasweep.models.sharding import ALONE, Mesh
from lorasweep.train.events import EVALUATION, Record, phase

LOGITS, GPU_LOGITS = 1 << 24, 1 << 26
"""Maximum number of logits computed at once, on a CPU and on a GPU. On a GPU that is about 500
positions of a vocabulary of 128,256, and 1.3 GB with loss buffers (assumed, not measured)."""
PARTS = ("", "_changed", "_unchanged")
"""Suffixes of exact measures: over all contexts, over the contexts with `Truth.changed`, over the
other contexts."""


def nll_sums(model: nn.Module, batch: Batch, precision: str) -> torch.Tensor:
    """Return the summed NLL in nats of each run, [N], on the model's device."""

    def sums(
        logits_RPV: torch.Tensor, targets_RP: torch.Tensor, weight_RP: torch.Tensor
    ) -> torch.Tensor:
        nll_RP = -_log_p(logits_RPV, targets_RP, weight_RP)
        # the rows of a run are neighbours
        return (nll_RP * weight_RP.to(nll_RP.dtype)).view(len(batch.tokens_N), -1).sum(1)

    parts = _by_chunks(model, inputs(model, batch), precision, sums)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def token_log_p(model: nn.Module, batch: Batch, precision: str) -> torch.Tensor:
    """Return log p of each target in nats, [N, M], on the model's device; 0 at filler."""
    given = inputs(model, batch)
    log_p_RP = torch.cat(_by_chunks(model, given, precision, _log_p), 1)
    real_NM = torch.from_numpy(batch.weight_NM > 0).to(log_p_RP.device)
    # rows are in the order of the runs, and positions in the order of the rows
    log_p_NM = torch.zeros(real_NM.shape, dtype=log_p_RP.dtype, device=log_p_RP.device)
    return log_p_NM.masked_scatter(real_NM, log_p_RP[given[3] > 0])


def log_probabilities(model: nn.Module, batch: Batch, precision: str) -> list[torch.Tensor]:
    """Return for each run log q of all V symbols at its L loss tokens, [L, V], in nats."""
    given = inputs(model, batch)
    parts = _by_chunks(model, given, precision, lambda logits, *_: _wide(logits).log_softmax(-1))
    log_q_NRPV = torch.cat(parts, 1).unflatten(0, (len(batch.tokens_N), -1))
    real_NRP = (given[3] > 0).unflatten(0, (len(batch.tokens_N), -1))
    return [log_q[real] for log_q, real in zip(log_q_NRPV, real_NRP)]


def inputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Move a batch to the model's device, `padded`: tokens, positions, targets and weights."""
    device = next(model.parameters()).device
    return [torch.from_numpy(a).to(device) for a in padded(batch)]


def _by_chunks(
    model: Any, given: list[torch.Tensor], precision: str, measure: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Return `measure` of each chunk of positions, with gradient.

    It gets logits [R, p, V], targets [R, p] and weights [R, p].
    """
    tokens_RT, positions_RP, targets_RP, weight_RP = given
    rows, width = positions_RP.shape
    most = LOGITS if tokens_RT.device.type == "cpu" else GPU_LOGITS
    step = max(1, most // (rows * model.config.get_text_config().vocab_size))
    with autocast(precision, tokens_RT.device):
        hidden_RPH = hidden_states(model, tokens_RT, positions_RP)
        if step >= width:
            return [measure(logits_of(model, hidden_RPH), targets_RP, weight_RP)]

    def part(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with autocast(precision, hidden.device):
            # contiguous: the product with a slice would copy the weight once per row
            return measure(logits_of(model, hidden.contiguous()), targets, weight)

    # The backward pass recomputes the logits of each chunk, so memory never holds all logits.
    return [
        checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(x.split(step, 1) for x in (hidden_RPH, targets_RP, weight_RP)))
    ]


def _log_p(
    logits_RPV: torch.Tensor, targets_RP: torch.Tensor, weight_RP: torch.Tensor
) -> torch.Tensor:
    """Return log p of each target, [R, P]."""
    logits = _wide(logits_RPV).flatten(0, 1)
    nll = F.cross_entropy(logits, targets_RP.flatten(), reduction="none")
    return -nll.view_as(targets_RP)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---------------------------------------------------------------- held-out rows


def _merged(batches_N: Sequence[list[Batch]], mesh: Mesh) -> Iterator[tuple[int, Batch, list[int]]]:
    """Yield this process's share of the batches of all runs together: number, batch, who counts.

    A run with fewer batches than another repeats some; the repetitions do not count.
    """
    for k in mesh.turns(max(map(len, batches_N))):
        who = [n for n, own in enumerate(batches_N) if k < len(own)]
        yield k, merge([own[k % len(own)] for own in batches_N]), who


@torch.no_grad()
def evaluate(
    model: nn.Module, batches_N: Sequence[list[Batch]], precision: str, mesh: Mesh = ALONE
) -> list[float]:
    """Return each run's NLL in nats per loss token, from its list of held-out batches.

    Several processes share the batches.
    """
    device = next(model.parameters()).device
    total_N = torch.zeros(len(batches_N), dtype=torch.float64, device=device)
    for _, batch, who in _merged(batches_N, mesh):
        total_N[who] += nll_sums(model, batch, precision).double()[who]
    mesh.sum_(total_N)
    n_loss_N = torch.tensor([sum(b.n_loss for b in own) for own in batches_N], device=device)
    return (total_N / n_loss_N).tolist()


def in_evaluation(batches_N: Sequence[list[Batch]]) -> AbstractContextManager[None]:
    """Return the phase of evaluation, divisible if a batch has several rows of a run."""
    divisible = any(batch.tokens_NRT.shape[1] > 1 for own in batches_N for batch in own)
    return phase(EVALUATION, divisible)


@torch.no_grad()
def row_nlls(
    model: nn.Module,
    rows_N: Sequence[Sequence[Example]],
    batches_N: Sequence[list[Batch]],
    precision: str,
    mesh: Mesh = ALONE,
) -> list[np.ndarray]:
    """Return the summed NLL in nats of each row of each run, in the order of `by_length`.

    `batches_N`: the rows, as `eval_batches` groups them. Several processes share the batches.
    """
    counts_N = [[int(rows[i].loss.sum()) for i in by_length(rows)] for rows in rows_N]
    ends_N = [np.cumsum([b.tokens_NRT.shape[1] for b in own]) for own in batches_N]
    found_N = [torch.zeros(len(rows), dtype=torch.float64) for rows in rows_N]
    for k, batch, who in _merged(batches_N, mesh):
        log_p_NM = token_log_p(model, batch, precision).double().cpu().numpy()
        for n in who:
            own = batches_N[n][k]
            rows = slice(ends_N[n][k] - own.tokens_NRT.shape[1], ends_N[n][k])
            starts = np.cumsum([0, *counts_N[n][rows][:-1]])
            sums = np.add.reduceat(log_p_NM[n, : own.n_loss], starts)
            found_N[n][rows] = torch.from_numpy(-sums)
    mesh.sum_(*found_N)
    return [found.numpy() for found in found_N]


def gain_se(
    before: np.ndarray, after: np.ndarray, tokens: np.ndarray, prompts: Sequence[int] | None = None
) -> float:
    """Return the standard error of a gain in nats per token: of sum(before - after) / sum(tokens).

    The differences are paired, and errors are clustered by prompt (Miller, arXiv 2411.00640): a
    jackknife over prompts of a ratio of sums (Cochran, Sampling Techniques, 3rd ed., chapter 6).
    NaN for fewer than two prompts. All arguments are [rows]: summed NLLs under the base and under
    the trained model, loss tokens, number of the prompt (None: every row has a different prompt).
    """
    differences = before - after
    if prompts is not None:
        differences, tokens = (np.bincount(prompts, x) for x in (differences, tokens))
    n = len(tokens)
    if n < 2:
        return math.nan
    left_out = (differences.sum() - differences) / (tokens.sum() - tokens)
    return float(np.sqrt((n - 1) * left_out.var()))


@torch.no_grad()
def evaluate_exact(
    model: nn.Module,
    batches_N: Sequence[list[Batch]],
    precision: str,
    name: str,
    mesh: Mesh = ALONE,
) -> list[Record]:
    """Return each run's expected NLL over the true distributions, for each of PARTS.

    The expected NLL in a context is -sum_v p(v) log q(v). It is the expectation of the NLL that
    `evaluate` returns. Keys: `name` with each suffix of PARTS; NaN for a part without contexts.
    """
    sums, counts = torch.zeros(2, len(batches_N), len(PARTS), dtype=torch.float64)
    for k, batch, who in _merged(batches_N, mesh):
        log_q_N = log_probabilities(model, batch, precision)
        for n in who:
            truth: Any = batches_N[n][k].truth
            true = torch.from_numpy(truth.probabilities).to(log_q_N[n])
            nll_L = -(true * log_q_N[n]).sum(-1).double().cpu()
            changed_L = torch.from_numpy(truth.changed)
            for part, chosen_L in enumerate((torch.ones_like(changed_L), changed_L, ~changed_L)):
                sums[n, part] += nll_L[chosen_L].sum()
                counts[n, part] += chosen_L.sum()
    mesh.sum_(sums, counts)
    means = (sums / counts).tolist()  # 0 / 0 is NaN
    return [{f"{name}{end}": value for end, value in zip(PARTS, row)} for row in means]
