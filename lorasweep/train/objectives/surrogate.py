"""The formulas of the policy gradient: advantages of rewards, and the loss of each token.

Shapes: P prompts, G answers to each, N members, M positions per member.
"""

import numpy as np
import torch

DEVIATION_EPS = 1e-4
"""Added to a group's standard deviation: TRL's value (trl.GRPOTrainer)."""


def advantages(reward_PG: np.ndarray, scale: str) -> np.ndarray:
    """Return each reward minus its group's mean, divided by the group's deviation if asked for.

    The deviation is that of TRL and of the paper's code: with G - 1 (arXiv 2402.03300).
    """
    centred = reward_PG - reward_PG.mean(1, keepdims=True)
    flat = (reward_PG == reward_PG[:, :1]).all(1)
    centred[flat] = 0.0  # exactly, whatever the mean rounded to
    if scale == "none":
        return centred
    return centred / (reward_PG.std(1, ddof=1, keepdims=True) + DEVIATION_EPS)


def surrogate(
    gap_NM: torch.Tensor,
    advantage_NM: torch.Tensor,
    answer_NM: torch.Tensor,
    weight_NM: torch.Tensor,
    level: str,
    clip: float | None,
) -> torch.Tensor:
    """Return the loss of each token, [N, M], whose gradient is the policy gradient.

    Args:
        gap_NM: log p_learner - log p_sampler of each token.
        answer_NM: number of the answer that a token belongs to.
        weight_NM: 1 for a token, 0 for filler.
        level: 'sequence': an answer's tokens share one ratio, the geometric mean of theirs, and its
            loss counts once (arXiv 2507.18071, eq. 5 and 7).
    """
    share_NM = weight_NM
    if level == "sequence":
        size = int(answer_NM.max()) + 1
        empty = gap_NM.new_zeros(len(gap_NM), size)
        lengths = empty.scatter_add(1, answer_NM, weight_NM).clamp(min=1)
        means = empty.scatter_add(1, answer_NM, gap_NM * weight_NM) / lengths
        gap_NM = means.gather(1, answer_NM)
        share_NM = weight_NM / lengths.gather(1, answer_NM)
    ratio = gap_NM.exp()
    gain = ratio * advantage_NM
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage_NM)
    return -gain * share_NM
