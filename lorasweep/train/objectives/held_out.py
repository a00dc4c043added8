"""Held-out NLL of every member: over the sampled next symbols, or over their true distribution.

Shapes: N members, M loss positions per member, L loss tokens of one member, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorasweep.data.batches import Batch, by_length, merge
from lorasweep.data.examples import Example
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.precision import COMPUTE_DTYPES, autocast
from lorasweep.models.sharding import Mesh
from lorasweep.train.events import Record
from lorasweep.train.objectives.nll import inputs, nll_sums, token_log_p

if TYPE_CHECKING:
    from torch import nn

PARTS = ("", "_changed", "_unchanged")
"""Endings of the measures of exact_loss: over all contexts, and by whether fine-tuning changes
them."""


@torch.no_grad()
def evaluate(
    model: "nn.Module", batches: Sequence[list[Batch]], precision: str, mesh: Mesh | None = None
) -> list[float]:
    """Return each member's NLL in nats per loss token, from its list of held-out batches.

    It is the summed NLL divided by the token count. A member with fewer batches than another
    repeats its own; the repeats do not count. Several processes share the batches.
    """
    mesh = mesh or Mesh()
    device = next(model.parameters()).device
    total = torch.zeros(len(batches), dtype=torch.float64, device=device)
    for k in mesh.turns(max(map(len, batches))):
        merged = merge([own[k % len(own)] for own in batches])
        sums = nll_sums(model, merged, precision).double()
        if not all(k < len(own) for own in batches):
            counts = torch.tensor([k < len(own) for own in batches], device=device)
            sums = torch.where(counts, sums, 0.0)
        total += sums
    mesh.sum_(total)
    n_loss = torch.tensor([sum(b.n_loss for b in own) for own in batches], device=device)
    return (total / n_loss).tolist()


def more_than_a_row(batches_N: Sequence[list[Batch]]) -> bool:
    """Return whether a forward pass holds several rows of a member, so that it can hold fewer."""
    return any(len(batch.lengths[0]) > 1 for own in batches_N for batch in own)


@torch.no_grad()
def row_nlls(
    model: "nn.Module",
    rows_N: Sequence[Sequence[Example]],
    batches_N: Sequence[list[Batch]],
    precision: str,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Return the summed NLL in nats of each row of each member, in the order of `by_length`.

    `batches_N`: the rows, as `eval_batches` lays them out. Several processes share the batches.
    """
    mesh = mesh or Mesh()
    counts_N = [[int(rows[i].loss.sum()) for i in by_length(rows)] for rows in rows_N]
    ends_N = [np.cumsum([len(b.lengths[0]) for b in own]) for own in batches_N]
    found_N = [torch.zeros(len(rows), dtype=torch.float64) for rows in rows_N]
    for k in mesh.turns(max(map(len, batches_N))):
        merged = merge([own[k % len(own)] for own in batches_N])
        log_p_NM = token_log_p(model, merged, precision).double().cpu().numpy()
        for n, own in enumerate(batches_N):
            if k < len(own):
                rows = slice(ends_N[n][k] - len(own[k].lengths[0]), ends_N[n][k])
                starts = np.cumsum([0, *counts_N[n][rows][:-1]])
                sums = np.add.reduceat(log_p_NM[n, : own[k].n_loss], starts)
                found_N[n][rows] = torch.from_numpy(-sums)
    mesh.sum_(*found_N)
    return [found.numpy() for found in found_N]


def gain_se(
    before: np.ndarray,
    after: np.ndarray,
    tokens: np.ndarray,
    prompts: Sequence[int] | None = None,
) -> float:
    """Return the standard error of a gain in nats per token: of sum(before - after) / sum(tokens).

    `before`, `after`, `tokens` [rows]: a row's summed NLL under the base and under the adapter,
    and its loss tokens. `prompts` [rows]: the number of a row's prompt; None: each has its own.
    Prompts are the unit that is drawn, and both models read the same rows, so their differences
    are what varies (Miller, arXiv 2411.00640, on clustered errors and on paired differences). A
    ratio of two sums over units is not a mean: its jackknife over units (Cochran, Sampling
    Techniques, 3rd ed., chapter 6). NaN for fewer than two units.
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
    model: "nn.Module",
    batches: Sequence[list[Batch]],
    precision: str,
    name: str,
    mesh: Mesh | None = None,
) -> list[Record]:
    """Return each member's expected NLL over the true distributions, by PARTS.

    For each context it is -sum_v p(v) log q(v), whose mean over sampled symbols is the NLL that
    `evaluate` returns. Keys are `name` with each ending of PARTS; NaN for a part without contexts.
    """
    mesh = mesh or Mesh()
    sums = torch.zeros(len(batches), len(PARTS), dtype=torch.float64)
    counts = torch.zeros(len(batches), len(PARTS), dtype=torch.float64)
    for k in mesh.turns(max(map(len, batches))):
        merged = merge([own[k % len(own)] for own in batches])
        for n, (own, log_q) in enumerate(zip(batches, log_probabilities(model, merged, precision))):
            truth = own[k].truth if k < len(own) else None
            if truth is None:
                continue
            true = torch.from_numpy(truth.probabilities).to(log_q)
            nll_L = -(true * log_q).sum(-1).double().cpu()
            changed_L = torch.from_numpy(truth.changed)
            for part, chosen_L in enumerate((torch.ones_like(changed_L), changed_L, ~changed_L)):
                sums[n, part] += nll_L[chosen_L].sum()
                counts[n, part] += chosen_L.sum()
    mesh.sum_(sums, counts)
    means = (sums / counts).tolist()  # 0 / 0 is NaN
    return [{f"{name}{end}": value for end, value in zip(PARTS, row)} for row in means]


def floors(examples: Sequence[Example], name: str) -> Record:
    """Return the lowest possible value of each measure of `evaluate_exact`, and how often.

    Keys: `name` with each ending of PARTS but the first, in nats (the mean entropy of the true
    distributions), and `changed_share`, the share of contexts that fine-tuning changes. Empty for
    examples without a truth.
    """
    truths = [e.truth for e in examples if e.truth is not None]
    if not truths:
        return {}
    p = np.concatenate([t.probabilities for t in truths]).astype(np.float64)
    changed = np.concatenate([t.changed for t in truths])
    # a probability below the range of float32 is 0 there, and adds nothing
    entropies = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    found = {"changed_share": float(changed.mean())}
    for end, chosen in zip(PARTS[1:], (changed, ~changed)):
        found[name + end] = float(entropies[chosen].mean()) if chosen.any() else math.nan
    return found


def log_probabilities(model: "nn.Module", batch: Batch, precision: str) -> list[torch.Tensor]:
    """Return each member's log q at its loss tokens, [L, V], in nats.

    The full logits are in memory: for small vocabularies only.
    """
    passes = cpu_llama_for(model)
    if passes is not None:
        log_q_NMV = passes.log_probabilities(batch, COMPUTE_DTYPES[precision])
        real_NM = torch.from_numpy(batch.weight_NM > 0)
        return [log_q[real] for log_q, real in zip(log_q_NMV, real_NM)]
    device = next(model.parameters()).device
    tokens, positions, _, weight, at = inputs(batch, device)
    with autocast(precision, device):
        logits = model(
            input_ids=tokens, position_ids=at, logits_to_keep=positions, use_cache=False
        ).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    log_q = torch.log_softmax(logits, -1).unflatten(0, (len(batch.lengths), -1))
    return [own[real] for own, real in zip(log_q, (weight > 0).unflatten(0, (log_q.shape[0], -1)))]
