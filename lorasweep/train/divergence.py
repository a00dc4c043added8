"""When a run counts as diverged or collapsed, and what is known of it beside its weights."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorasweep.errors import DataError, ModelError
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

DIVERGED_NLL_FACTOR, DIVERGED_PATIENCE = 1.5, 8
"""See Measured. Assumptions, not tuned."""
COLLAPSED_SHARE, COLLAPSED_PATIENCE = 0.5, 8
"""A run has collapsed if its mean reward is below COLLAPSED_SHARE times the base's reward for
COLLAPSED_PATIENCE updates in a row. Assumptions, not tuned."""
FIRST_UPDATES = 8
"""A run fails if in its first FIRST_UPDATES updates no completion is rewarded, or every one is."""
RATIO_BOUND, ROUNDING = 1e-3, 1e-5
"""Accepted distance of p_learner / p_sampler from 1 in fp32, where both are the same policy; and of
a log-probability, as a share of the largest logit: about 100 times the precision of fp32."""


@dataclass
class Measured:
    """What is known of a run beside its weights, and the rule that decides whether it diverged.

    A run has diverged if its train NLL is above DIVERGED_NLL_FACTOR times the base's NLL for
    DIVERGED_PATIENCE updates in a row. The base's NLL is the larger of two values. One is on the
    rows of the first update, because training rows may be harder. The other is on the held-out
    rows, because a small first batch may be easy. Losses of later updates are no reference: a far
    too high learning rate raises even the second one. A late decision costs time; a false one
    costs the run.
    """

    held_out: float = math.nan
    """NLL of the held-out rows before training."""
    first: float | None = None
    """NLL of the first update; None before it."""
    above: int = 0
    """Updates in a row above the bound."""
    start: Record = field(default_factory=dict)
    """Measures of the base."""
    rows: np.ndarray | None = None
    """Summed NLLs of held-out rows under the base, if they are needed."""
    retain: float = math.nan
    """NLL of the rows of the pretraining task under the base."""
    on_first: float | None = None
    """Final NLL on the first held-out rows, for a run with the weights of a trial."""
    code_nats: float = 0.0
    n_loss: int = 0
    """Loss tokens of the present update."""

    def note(self, nll: float) -> bool:
        """Add the train NLL of an update; return whether the run has diverged."""
        if self.first is None:
            self.first = nll
        bound = DIVERGED_NLL_FACTOR * max(self.held_out, self.first)
        self.above = self.above + 1 if nll > bound else 0
        return self.above >= DIVERGED_PATIENCE


@dataclass
class Signal:
    """The rewards of one run so far. They show whether the run can learn, or has collapsed.

    A collapse is judged by the smaller of two estimates of the base's reward. One is the held-out
    reward. The other is `first_reward`, because training prompts may be harder: the highest of the
    means over the first 1, 2, ..., FIRST_UPDATES updates. After an early collapse, only the means
    over few updates are still high.
    """

    reward_start: float = math.nan
    """The base's held-out reward."""
    first_reward: float = -math.inf
    below: int = 0
    """Number of updates in a row with a reward below COLLAPSED_SHARE times the base's reward."""
    completions: int = 0
    rewarded: float = 0.0
    """Sum of the rewards of all `completions`."""
    last: Record = field(default_factory=dict)
    """The record of the present update."""
    beyond_fp32: bool = False
    """Whether the weights are so large that fp32 rounding errors dominate: see check_sampler."""

    @property
    def collapsed(self) -> bool:
        """Whether the run is far worse than the base."""
        return self.below >= COLLAPSED_PATIENCE

    def note(self, record: Record, completions: int) -> None:
        """Add the record of an update with this number of completions."""
        self.last = record
        self.completions += completions
        self.rewarded += record["reward"] * completions
        if self.completions <= FIRST_UPDATES * completions:
            self.first_reward = max(self.first_reward, self.rewarded / self.completions)
        base_reward = min(self.reward_start, self.first_reward)
        self.below = self.below + 1 if record["reward"] < COLLAPSED_SHARE * base_reward else 0

    def check(self, run: RunSpec) -> None:
        """Raise DataError if no completion of the first updates was rewarded, or every one."""
        judged = self.completions == FIRST_UPDATES * run.batch_size
        if judged and not 0 < self.rewarded < self.completions:
            which, remedy = "no", "easier data, or a base that is right at times"
            if self.rewarded:
                which, remedy = "every", "harder data"
            raise DataError(
                f"run {run.id}: {which} completion of the first {self.completions} was rewarded on "
                f"dataset {run.dataset.name!r}, so there is nothing to learn from. The base's "
                f"held-out reward is {self.reward_start:.3g}. Choose {remedy}."
            )

    def check_sampler(self, run: RunSpec, off: float) -> None:
        """Check that learner and sampler are the same policy; ModelError in the first update.

        Later, a difference means that the run has broken down: its weights are so large that
        rounding errors dominate. `off`: largest distance of p_learner / p_sampler from 1.
        """
        bound = max(RATIO_BOUND, ROUNDING * self.last["largest_logit"])
        self.beyond_fp32 = self.beyond_fp32 or off > bound
        if off > bound and self.completions <= run.batch_size:
            raise ModelError(
                f"run {run.id}: for a sampled token, p_learner / p_sampler differs from 1 by "
                f"{off:.2g} (bound {bound:.2g}), so learner and sampler are not the same policy. "
                f"{run.model.name!r} computes something else with a cache than without: set "
                "objective=sft for it, or choose another model."
            )

    def state(self) -> dict[str, Any]:
        """Return the values for a checkpoint; `first_reward` is None before the first update."""
        first = self.first_reward if math.isfinite(self.first_reward) else None
        counts = {"below": self.below, "answers": self.completions, "rewarded": self.rewarded}
        return {**counts, "first_reward": first}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`."""
        self.below, self.completions = state["below"], state["answers"]
        first, self.rewarded = state["first_reward"], state["rewarded"]
        self.first_reward = -math.inf if first is None else first
