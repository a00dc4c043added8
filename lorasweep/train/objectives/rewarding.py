"""Reward sampled answers: the groups that the learner gets, and what is recorded of them.

Shapes: P prompts, G answers to each.
"""

import math
from collections.abc import Sequence

import numpy as np

from lorasweep.data.examples import Example, Rewards
from lorasweep.data.rewards import prompt_of
from lorasweep.train.events import Record
from lorasweep.train.objectives.rollouts import Answer, Group
from lorasweep.train.objectives.surrogate import advantages
from lorasweep.train.sampling import Answers


def rewarded(
    rows: Sequence[Example], answers: Answers, rewards: Rewards, scale: str
) -> tuple[list[Group], Record]:
    """Return a member's groups, one a row, and the record of its answers.

    `reward` is their mean, with its standard error over prompts, because answers to one prompt are
    alike. `flat_groups`: share of groups whose rewards are all equal. `entropy` in nats a token;
    `cut_off`: share of answers without an end; `unread`: of those that could not be read.
    """
    size = len(answers.tokens) // len(rows)
    given = _of_all(rows, answers, rewards, size)
    reward_PG = np.array([g or 0.0 for g in given]).reshape(-1, size)
    advantage = advantages(reward_PG, scale).ravel().tolist()
    drawn = list(map(Answer, answers.tokens, answers.log_p, advantage))
    groups = [Group(prompt_of(row), drawn[k * size : (k + 1) * size]) for k, row in enumerate(rows)]
    means = reward_PG.mean(1)
    return groups, {
        "reward": float(means.mean()),
        "reward_se": standard_error(means),
        "flat_groups": float((reward_PG == reward_PG[:, :1]).all(1).mean()),
        "entropy": answers.entropy,
        "answer_tokens": float(np.mean([len(t) for t in answers.tokens])),
        "cut_off": float(np.mean(~answers.ended)) if rewards.ends else 0.0,
        "unread": given.count(None) / len(given),
    }


def _of_all(
    rows: Sequence[Example], answers: Answers, rewards: Rewards, size: int
) -> list[float | None]:
    """Reward every answer; equal answers to one prompt are looked at once."""
    keys = [(k // size, tokens.tobytes()) for k, tokens in enumerate(answers.tokens)]
    first = dict(zip(keys, answers.tokens))
    given = rewards.of([(rows[k], tokens) for (k, _), tokens in first.items()])
    found = dict(zip(first, given, strict=True))
    return [found[key] for key in keys]


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of a mean; NaN of a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
