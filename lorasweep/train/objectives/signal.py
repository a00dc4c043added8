"""Whether a rewarded run has something to learn from, and whether it has collapsed."""

import math
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import DataError, ModelError
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

COLLAPSED_SHARE, COLLAPSED_PATIENCE = 0.5, 8
"""A run has collapsed if the mean reward of its answers is below this share of the base's reward
for so many updates in a row. Assumption, not tuned."""
FIRST_UPDATES = 8
"""After so many updates without a single reward, or without a single miss, a run is stopped."""
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
        is_below = record["reward"] < COLLAPSED_SHARE * self.reward_start
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
        counts = {"below": self.below, "answers": self.answers, "rewarded": self.rewarded}
        return {**counts, "best_reward": self.best_known}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`."""
        self.below, self.answers = state["below"], state["answers"]
        self.rewarded, best = state["rewarded"], state["best_reward"]
        self.best = -math.inf if best is None else best

    @property
    def best_known(self) -> float | None:
        """The highest held-out reward; None before the first evaluation."""
        return self.best if math.isfinite(self.best) else None
