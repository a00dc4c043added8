"""Whether a rewarded run has something to learn from, and whether it has collapsed."""

import math
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import DataError, ModelError
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

COLLAPSED_SHARE, COLLAPSED_PATIENCE = 0.5, 8
"""A run has collapsed if the mean reward of its answers is below this share of the base's reward
(`Signal.base_reward`) for so many updates in a row. Assumption, not tuned."""
FIRST_UPDATES = 8
"""After so many updates without a single reward, or without a single miss, a run is stopped. From
their rewards comes the run's own measure of the base: see `Signal.base_reward`."""
RATIO_BOUND = 1e-3
"""Largest distance from 1 of p_learner / p_sampler in fp32: they are the same policy, so a larger
one is a mistake, or a run that has broken down."""
ROUNDING = 1e-5
"""Of the largest logit, which rounding may change a log-probability by: about 100 steps of fp32."""


@dataclass
class Signal:
    """What is kept of the rewards of one run between updates."""

    reward_start: float = math.nan
    """The base's held-out reward."""
    first_reward: float = -math.inf
    """The highest mean reward of the first 1, 2, ..., FIRST_UPDATES updates."""
    below: int = 0
    """Updates in a row with a reward far below the base's."""
    answers: int = 0
    rewarded: float = 0.0
    """Sum of all rewards of these answers."""
    best: float = -math.inf
    """Highest held-out reward so far."""
    last: Record = field(default_factory=dict)
    """What is recorded of the present update."""
    beyond_fp32: bool = False
    """Whether weights have grown until fp32 gives one token two probabilities."""

    @property
    def base_reward(self) -> float:
        """The reward that a collapse is judged by: the smaller of two measures of the base.

        They are its reward on held-out prompts, and `first_reward`. The second makes training
        prompts that are harder than the held-out ones no collapse. The base itself drew the answers
        of the first update only, so a mean over more is less noisy, and lower if the run collapses
        in them: hence the highest of these means.
        """
        return min(self.reward_start, self.first_reward)

    @property
    def collapsed(self) -> bool:
        """Whether the run has lost what the base could do."""
        return self.below >= COLLAPSED_PATIENCE

    @property
    def broken(self) -> bool:
        """Whether there is no use in going on."""
        return self.collapsed or self.beyond_fp32

    def note(self, record: Record, answers: int) -> None:
        """Take up an update's record of so many answers."""
        self.last = record
        self.answers += answers
        self.rewarded += record["reward"] * answers
        if self.answers <= FIRST_UPDATES * answers:
            self.first_reward = max(self.first_reward, self.rewarded / self.answers)
        is_below = record["reward"] < COLLAPSED_SHARE * self.base_reward
        self.below = self.below + 1 if is_below else 0

    def check(self, member: RunSpec) -> None:
        """Check, once after the first updates, that answers differ in their rewards.

        Raises:
            DataError: none was rewarded, or every one.
        """
        if self.answers != FIRST_UPDATES * member.batch_size:
            return
        if 0 < self.rewarded < self.answers:
            return
        which, remedy = "no", "easier data, or a base that is right at times"
        if self.rewarded:
            which, remedy = "every", "harder data"
        raise DataError(
            f"run {member.id}: {which} answer of the first {self.answers} was rewarded on dataset "
            f"{member.dataset.name!r}, so there is nothing to learn from. The base's held-out "
            f"reward is {self.reward_start:.3g}. Choose {remedy}."
        )

    def check_sampler(self, member: RunSpec, off: float) -> None:
        """Check that the learner is the policy that sampled.

        In a run's first update, of the base's weights, two policies are a mistake. Later they are a
        run that has broken down: its weights have grown until rounding decides.

        Args:
            off: largest distance from 1 of p_learner / p_sampler; NaN is a divergence.

        Raises:
            ModelError: they are two policies in the first update.
        """
        bound = max(RATIO_BOUND, ROUNDING * self.last["largest_logit"])
        if not off > bound:
            return
        self.beyond_fp32 = True
        if self.answers > member.batch_size:
            return
        raise ModelError(
            f"run {member.id}: the learner's probability of a sampled token is {off:.2g} off the "
            f"sampler's (bound {bound:.2g}), so they are not the same policy. "
            f"{member.model.name!r} computes something else with a cache than without: set "
            "objective=sft for it, or choose another model."
        )

    def state(self) -> dict[str, Any]:
        """Return the counts, as JSON values."""
        return {
            "below": self.below,
            "answers": self.answers,
            "rewarded": self.rewarded,
            "first_reward": _known(self.first_reward),
            "best_reward": self.best_known,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`.

        A checkpoint from before divergence rule 2 has no first rewards: the mean of all so far
        stands for them, and updates below the old bound are not counted.
        """
        self.answers, self.rewarded = state["answers"], state["rewarded"]
        self.below, best = state["below"], state["best_reward"]
        self.best = -math.inf if best is None else best
        first = state.get("first_reward")
        if "first_reward" not in state and self.answers:
            first, self.below = self.rewarded / self.answers, 0
        self.first_reward = -math.inf if first is None else first

    @property
    def best_known(self) -> float | None:
        """The highest held-out reward; None before the first evaluation."""
        return _known(self.best)


def _known(reward: float) -> float | None:
    return reward if math.isfinite(reward) else None
