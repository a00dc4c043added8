"""Held-out reward of every member: the expected one where it can be enumerated, else of samples.

Shapes: N members.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorasweep.data.batches import eval_batches
from lorasweep.data.examples import Example, Rewards
from lorasweep.data.rewards import prompt_of
from lorasweep.models.sharding import Mesh
from lorasweep.spec.streams import stream
from lorasweep.train.events import EVALUATION, phase
from lorasweep.train.objectives.held_out import more_than_a_row, row_nlls
from lorasweep.train.objectives.rewarding import standard_error
from lorasweep.train.sampling import sample

if TYPE_CHECKING:
    from torch import nn

EVAL_TOKENS = 4096
"""Padded tokens per member and evaluation forward. It does not depend on the pack size."""


@torch.no_grad()
def measure(
    model: "nn.Module",
    rows_N: Sequence[Sequence[Example]],
    rewards_N: Sequence[Rewards],
    max_new_tokens: int,
    precision: str,
    join_rows: bool = False,
    mesh: Mesh | None = None,
    forward_parts: int = 1,
) -> list[tuple[float, float, float]]:
    """Return each member's mean reward on its rows, its standard error, and the share unreadable.

    Where only the row's own answer is rewarded, the reward of a row is that answer's probability:
    the expected reward of the policy. Elsewhere it is that of one answer, drawn with the same
    random numbers in every run and at every step. `forward_parts`: see Exec.
    """
    if all(r.exact for r in rewards_N):
        most = max(1, EVAL_TOKENS // forward_parts)
        batches_N = [eval_batches(rows, most, join_rows) for rows in rows_N]
        with phase(EVALUATION, more_than_a_row(batches_N)):
            values_N = [np.exp(-nll) for nll in row_nlls(model, rows_N, batches_N, precision)]
        return [(float(v.mean()), standard_error(v), 0.0) for v in values_N]
    found_N = _sampled(model, rows_N, rewards_N, max_new_tokens, precision, mesh, forward_parts)
    found = []
    for own in found_N:
        values = np.array([v or 0.0 for v in own])
        found.append((float(values.mean()), standard_error(values), own.count(None) / len(own)))
    return found


def _sampled(
    model: "nn.Module",
    rows_N: Sequence[Sequence[Example]],
    rewards_N: Sequence[Rewards],
    most: int,
    precision: str,
    mesh: Mesh | None,
    forward_parts: int,
) -> list[list[float | None]]:
    """Return the reward of one answer to each row's prompt; None: it cannot be read."""
    count = max(map(len, rows_N))
    uniforms = stream("sample", "held out").random((count, most))
    # a member with fewer rows repeats its own, which do not count
    prompts_N = [[prompt_of(rows[i % len(rows)]) for i in range(count)] for rows in rows_N]
    uniforms_NPL = np.repeat(uniforms[None], len(rows_N), 0)
    answers_N = sample(
        model, prompts_N, uniforms_NPL, rewards_N[0].ends, precision, mesh, forward_parts
    )
    return [
        rewards.of(list(zip(rows, answers.tokens)))
        for rows, rewards, answers in zip(rows_N, rewards_N, answers_N)
    ]


def bits_learned(reward: float, choices: int) -> float:
    """Return the least information about one label that reaches this expected reward, in bits.

    The label is one of `choices` equally likely ones, and the reward is the probability of naming
    it: the rate-distortion function of a uniform source under Hamming distortion (Cover & Thomas,
    Elements of Information Theory, 2nd ed., problem 10.5). 0 at chance and below.
    """
    miss = 1 - reward
    if miss >= 1 - 1 / choices:
        return 0.0
    entropy = sum(-p * math.log2(p) for p in (reward, miss) if p > 0)
    return math.log2(choices) - entropy - miss * math.log2(choices - 1)
