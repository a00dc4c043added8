"""Completions of prompts: rewards in training and on held-out rows, and batches for the learner.

Shapes: N runs of the pack, P prompts, G completions of each, M positions per run at which a token
of a completion is predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasweep.data.batches import Batch, eval_batches, merge, up, widen
from lorasweep.data.examples import Example, Rewards, prompt_of
from lorasweep.models.sharding import Mesh
from lorasweep.spec.streams import stream
from lorasweep.train.events import EVALUATION, Record, phase
from lorasweep.train.objectives.nll import more_than_a_row, row_nlls
from lorasweep.train.sampling import Completions, sample

EVAL_TOKENS = 4096
"""Padded tokens per run and forward pass in evaluation, in packs of any size."""
DEVIATION_EPS = 1e-4
"""Added to a group's standard deviation: TRL's value (trl.GRPOTrainer)."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    tokens: np.ndarray
    log_p: np.ndarray
    """log p of each token under the sampler, in nats."""
    advantage: float


@dataclass(frozen=True)
class Group:
    """The completions of one prompt."""

    prompt: np.ndarray
    completions: list[Completion]


@dataclass(frozen=True, kw_only=True)
class Rollouts(Batch):
    """A part of an update's completions, for all runs: the learner's micro-batch."""

    sampler_NM: np.ndarray
    """log p of each token under the sampler; float64, 0 at filler."""
    advantage_NM: np.ndarray
    completion_NM: np.ndarray
    """Number of the completion that a token belongs to, within its run; int64, 0 at filler."""
    episodes: int = 0
    """Divisor of each run's loss: in the first micro-batch the completions that the run sampled for
    the update, in the others 0."""


# ---------------------------------------------------------------- rewards


def reward_groups(
    rows: Sequence[Example], completions: Completions, rewards: Rewards, scale: str
) -> tuple[list[Group], Record]:
    """Return a run's groups, one per row, and the record of its completions.

    `reward`: mean over completions. `reward_se`: its standard error over prompts, because
    completions of one prompt are similar. `flat_groups`: share of groups with equal rewards.
    `entropy`: in nats per token. `cut_off`, `unread`: shares of completions that were cut off
    before their end, and that the verifier could not read.
    """
    size = len(completions.tokens) // len(rows)
    # equal completions of one prompt are rewarded once
    keys = [(k // size, tokens.tobytes()) for k, tokens in enumerate(completions.tokens)]
    first = dict(zip(keys, completions.tokens))
    given = rewards.of([(rows[k], tokens) for (k, _), tokens in first.items()])
    by_key = dict(zip(first, given, strict=True))
    found = [by_key[key] for key in keys]
    reward_PG = np.array([r or 0.0 for r in found]).reshape(-1, size)
    advantage = advantages(reward_PG, scale).ravel().tolist()
    drawn = list(map(Completion, completions.tokens, completions.log_p, advantage))
    groups = [Group(prompt_of(row), drawn[k * size : (k + 1) * size]) for k, row in enumerate(rows)]
    means = reward_PG.mean(1)
    return groups, {
        "reward": float(means.mean()),
        "reward_se": standard_error(means),
        "flat_groups": float((reward_PG == reward_PG[:, :1]).all(1).mean()),
        "entropy": completions.entropy,
        "answer_tokens": float(np.mean([len(t) for t in completions.tokens])),
        "cut_off": float(np.mean(~completions.ended)) if rewards.ends else 0.0,
        "unread": found.count(None) / len(found),
    }


def advantages(reward_PG: np.ndarray, scale: str) -> np.ndarray:
    """Return each reward minus the group's mean; with scale 'group' divided by the group's spread.

    The spread is the standard deviation plus DEVIATION_EPS. The variance has the divisor G - 1, as
    in TRL and in the code of GRPO (arXiv 2402.03300).
    """
    centred = reward_PG - reward_PG.mean(1, keepdims=True)
    flat = (reward_PG == reward_PG[:, :1]).all(1)
    centred[flat] = 0.0  # exactly, also where the mean is rounded
    if scale == "none":
        return centred
    return centred / (reward_PG.std(1, ddof=1, keepdims=True) + DEVIATION_EPS)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


@torch.no_grad()
def held_out_rewards(
    model: nn.Module,
    rows_N: Sequence[Sequence[Example]],
    rewards_N: Sequence[Rewards],
    max_new_tokens: int,
    precision: str,
    join_rows: bool = False,
    mesh: Mesh | None = None,
    forward_parts: int = 1,
) -> list[tuple[float, float, float]]:
    """Return each run's mean reward on its rows, standard error, and share of unread completions.

    If only the gold answer is rewarded, the reward of a row is the probability of that answer,
    which is the expected reward. Otherwise it is the reward of one sampled completion; every run
    and every step use the same random numbers. `forward_parts`: see Exec.
    """
    if all(r.exact for r in rewards_N):
        most = max(1, EVAL_TOKENS // forward_parts)
        batches_N = [eval_batches(rows, most, join_rows) for rows in rows_N]
        with phase(EVALUATION, more_than_a_row(batches_N)):
            values_N = [np.exp(-nll) for nll in row_nlls(model, rows_N, batches_N, precision)]
        return [(float(v.mean()), standard_error(v), 0.0) for v in values_N]
    count = max(map(len, rows_N))
    uniforms = stream("sample", "held out").random((count, max_new_tokens))
    # a run with fewer rows repeats some; the repetitions do not count
    prompts_N = [[prompt_of(rows[i % len(rows)]) for i in range(count)] for rows in rows_N]
    uniforms_NPL, ends = np.repeat(uniforms[None], len(rows_N), 0), rewards_N[0].ends
    completions_N = sample(model, prompts_N, uniforms_NPL, ends, precision, mesh, forward_parts)
    found = []
    for rows, rewards, completions in zip(rows_N, rewards_N, completions_N):
        own = rewards.of(list(zip(rows, completions.tokens)))
        values = np.array([v or 0.0 for v in own])
        found.append((float(values.mean()), standard_error(values), own.count(None) / len(own)))
    return found


def bits_learned(reward: float, choices: int) -> float:
    """Return the fewest bits of information about a label that allow this expected reward.

    The reward is the probability of naming the label, one of `choices` equally likely ones. This is
    the rate-distortion function of a uniform source under Hamming distortion (Cover & Thomas,
    Elements of Information Theory, 2nd ed., problem 10.5). 0 at chance and below.
    """
    miss = 1 - reward
    if miss >= 1 - 1 / choices:
        return 0.0
    entropy = sum(-p * math.log2(p) for p in (reward, miss) if p > 0)
    return math.log2(choices) - entropy - miss * math.log2(choices - 1)


# ---------------------------------------------------------------- rows for the learner


def collate_rollouts(
    groups_N: Sequence[Sequence[Group]],
    rows: int,
    episodes: int,
    join_rows: bool,
    processes: int = 1,
) -> list[Rollouts]:
    """Return micro-batches of at most `rows` completions (or one group) per run.

    Every process gets equally many. `groups_N`: each run's groups with a gradient; a run that has
    no more of them takes part with weight 0. `episodes`: completions of a run in the update.
    """

    def longest(group: Group) -> int:
        return len(group.prompt) + max(len(c.tokens) for c in group.completions)

    parts_N: list[list[list[Group]]] = []
    for groups in groups_N:  # split into parts of at most `rows` completions, or of one group
        parts: list[list[Group]] = []
        count = 0
        for group in sorted(groups, key=longest):
            if not parts or count + len(group.completions) > rows:
                parts.append([])
                count = 0
            parts[-1].append(group)
            count += len(group.completions)
        parts_N.append(parts)
    some = next(parts[0] for parts in parts_N if parts)
    micro_batches = []
    for k in range(max(map(len, parts_N))):
        own = [
            _collate(parts[k], join_rows) if k < len(parts) else _silent(some, join_rows, False)
            for parts in parts_N
        ]
        batch = merge(own)
        width = batch.weight_NM.shape[1]
        more: dict[str, Any] = {
            name: np.concatenate([widen(getattr(part, name), width) for part in own])
            for name in ("sampler_NM", "advantage_NM", "completion_NM")
        }
        shared: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Batch)}
        micro_batches.append(Rollouts(**shared, **more, episodes=0 if k else episodes))
    while len(micro_batches) % processes:  # equally many per process
        micro_batches.append(_silent(some, join_rows, True))
    return micro_batches


def _silent(groups: Sequence[Group], join_rows: bool, weight: bool) -> Rollouts:
    """Return a micro-batch of one run with advantages 0; `weight`: keep the weights of tokens."""
    found = _collate(groups[:1], join_rows)
    changes: dict[str, Any] = {"advantage_NM": np.zeros_like(found.advantage_NM), "tokens_N": (0,)}
    if not weight:
        changes["weight_NM"] = np.zeros_like(found.weight_NM)
    return replace(found, **changes)


def _collate(groups: Sequence[Group], join_rows: bool) -> Rollouts:
    """Collate one run's completions; in a group, those equal up to the last token share a row."""
    tokens: list[np.ndarray] = []
    completions: list[Completion] = []
    firsts: list[int] = []
    lengths: list[int] = []
    n_tokens = 0
    for group in groups:
        # nothing is predicted from the last token
        sharing: dict[bytes, list[Completion]] = {}
        for completion in group.completions:
            sharing.setdefault(completion.tokens[:-1].tobytes(), []).append(completion)
        for own in sharing.values():
            row = np.concatenate([group.prompt, own[0].tokens[:-1]])
            firsts += [sum(lengths) + len(group.prompt) - 1] * len(own)
            completions += own
            lengths.append(up(len(row)))
            tokens.append(np.pad(row, (0, lengths[-1] - len(row))))
            n_tokens += len(row)
    sizes = np.array([len(c.tokens) for c in completions])
    count = int(sizes.sum())
    within = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def wide(values: np.ndarray) -> np.ndarray:
        return widen(values[None], up(count))

    return Rollouts(
        tokens_NX=np.concatenate(tokens).astype(np.int64)[None],
        lengths=(tuple(lengths),),
        loss_positions_NM=wide(np.repeat(firsts, sizes) + within),
        targets_NM=wide(np.concatenate([c.tokens for c in completions]).astype(np.int64)),
        weight_NM=wide(np.ones(count, dtype=np.float32)),
        tokens_N=(n_tokens,),
        join_rows=join_rows,
        sampler_NM=wide(np.concatenate([c.log_p for c in completions])),
        advantage_NM=wide(np.repeat([c.advantage for c in completions], sizes)),
        completion_NM=wide(np.repeat(range(len(completions)), sizes)),
    )
