"""Policy gradient: sample completions, reward them, and raise the probability of the better ones.

The loss of a completion is -ratio * advantage, summed over its tokens (including the end). The
ratio is p_learner / p_sampler, the advantage is the reward minus the mean reward of the group. The
study has the same loss: `importance_sampling` of github.com/thinking-machines-lab/tinker-cookbook.
Except for the sign, its gradient is the gradient of the expected reward (Williams 1992) times
(G - 1) / G, because the mean contains the completion itself. Groups with equal rewards have no
gradient, so the learner skips them. They count in the number of completions that the loss is
divided by.

Shapes: N runs of the pack, M positions per run, G completions of a prompt.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasweep.data.examples import Data, Example, Rewards, prompt_of
from lorasweep.data.rewards import check_available, check_rows
from lorasweep.errors import DataError, ModelError
from lorasweep.models.load import Base
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.train.events import Record
from lorasweep.train.objectives import rollouts
from lorasweep.train.objectives.base import Objective
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.objectives.rollouts import Rollouts
from lorasweep.train.sampling import sample

COLLAPSED_SHARE, COLLAPSED_PATIENCE = 0.5, 8
"""A run has collapsed if its mean reward is below COLLAPSED_SHARE times `Signal.base_reward` for
COLLAPSED_PATIENCE updates in a row. Assumptions, not tuned."""
FIRST_UPDATES = 8
"""A run fails if in its first FIRST_UPDATES updates no completion is rewarded, or every one is."""
RATIO_BOUND = 1e-3
"""Accepted distance of p_learner / p_sampler from 1 in fp32, where both are the same policy."""
ROUNDING = 1e-5
"""Accepted rounding error of a log-probability, as a share of the largest logit: about 100 times
the precision of fp32."""


class PolicyGradient(Objective):
    """Policy gradient on sampled completions, which the data set of the run rewards."""

    metric = METRICS["policy_gradient"]

    def __init__(self, data: Mapping[str, Data], *settings: Any, **more: Any) -> None:
        super().__init__(data, *settings, **more)
        self._signals = {run_id: Signal() for run_id in data}
        self._reference: nn.Module | None = None
        self._pack: Sequence[RunSpec] = ()
        """The runs of the present update."""
        self._sampled_per_s = math.nan
        self._gap_NK: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Per micro-batch: sum of log p_sampler - log p_learner, [N], and number of tokens, [N]."""

    def start(self, base: Base, runs: Sequence[RunSpec]) -> list[Record]:
        """Check the data (DataError), and measure the base's reward on each data set, once."""
        found, name, on_part = super().start(base, runs), self.metric.name, self.metric.on_part
        for run in runs:
            data, rows = self._data[run.id], f"{run.dataset.canonical}/{run.draw}"
            key = f"{rows}/{self._precision}/{run.max_new_tokens}/reward"
            if key not in base.at_start:
                if self._mesh.rank == 0:  # other processes wait for process 0, and fail with it
                    check_available(run.dataset)
                    check_rows(run.dataset, data, run.max_new_tokens)
                (at_start,) = self._measure(base.model, [run], [data.test])
                first = self.curve_rows(run)
                if len(first) < len(data.test):
                    at_start[on_part] = self._measure(base.model, [run], [first])[0][name]
                base.at_start[key] = {on_part: at_start[name], **at_start}
            found.append(dict(base.at_start[key]))
            self._signals[run.id].reward_start = found[-1][name]
        if any(run.kl_weight for run in runs):
            self._reference = copy.deepcopy(base.model).requires_grad_(False)
        return found

    def batches(self, model: nn.Module, step: int, runs: Sequence[RunSpec]) -> list[Rollouts]:
        """Sample the completions of update `step` and return the learner's micro-batches."""
        self._pack, self._gap_NK = runs, []
        first = runs[0]  # the shape of an update is the same for all runs of a pack
        n_prompts = first.batch_size // first.group_size
        rows_N = [self._data[r.id].train(r.seed, step * n_prompts, n_prompts) for r in runs]
        started, shape = time.perf_counter(), (first.batch_size, first.max_new_tokens)
        completions_N = self._mesh.run(
            sample,
            model,
            [[prompt_of(row) for row in rows] for rows in rows_N],
            np.stack([stream("sample", r.seed, step).random(shape) for r in runs]),
            self._data[first.id].rewards.ends,
            self._precision,
            self._mesh,
            self._forward_parts,
        )
        seconds = time.perf_counter() - started
        self._sampled_per_s = sum(len(t) for own in completions_N for t in own.tokens) / seconds
        groups_N, kept_N = [], []
        for run, rows, completions in zip(runs, rows_N, completions_N):
            rewards = self._rewards_of(run)
            groups, record = rollouts.reward_groups(rows, completions, rewards, run.reward_scale)
            record["largest_logit"] = completions.largest_logit
            self._signals[run.id].note(record, run.batch_size)
            groups_N.append(groups)
            kept_N.append(
                [g for g in groups if run.kl_weight or any(c.advantage for c in g.completions)]
            )
        if not any(kept_N):
            kept_N[0] = groups_N[0][:1]  # an update needs a micro-batch, even without a gradient
        share = -(-first.batch_size // self._mesh.size)
        most = min(self._micro_batch_size or share, share)
        more = (first.batch_size, self._join_rows, self._mesh.size)
        return rollouts.collate_rollouts(kept_N, most, *more)

    def _rewards_of(self, run: RunSpec) -> Rewards:
        """Return Rewards that process 0 computes and broadcasts.

        A program that checks completions may have a time limit, so two processes could disagree.
        """
        rewards, mesh = self._data[run.id].rewards, self._mesh
        if mesh.size == 1:
            return rewards
        first = mesh.rank == 0
        return dataclasses.replace(
            rewards, of=lambda pairs: mesh.broadcast(rewards.of(pairs) if first else None)
        )

    def weights(self, batch: Rollouts) -> torch.Tensor:
        """Return the number of completions that each run's loss is divided by, [N]."""
        return torch.full((len(batch.tokens_N),), float(batch.episodes), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Rollouts) -> torch.Tensor:
        """Return the summed loss of each run, [N].

        Also note the KL from sampler to learner, and (not in bf16) check that they are one policy:
        ModelError if in fp32 the learner is not the policy that sampled the first completions.
        """
        first = self._pack[0]
        log_p_NM = token_log_p(model, batch, self._precision)
        arrays = (batch.sampler_NM, batch.advantage_NM, batch.weight_NM)
        sampler_NM, advantage_NM, weight_NM = (torch.from_numpy(a).to(log_p_NM) for a in arrays)
        completion_NM = torch.from_numpy(batch.completion_NM).to(log_p_NM.device)
        gap_NM = log_p_NM - sampler_NM
        noted_NM = gap_NM.detach() * weight_NM
        self._gap_NK.append((-noted_NM.sum(1), weight_NM.sum(1)))
        if self._precision != "bf16":
            for run, off in zip(self._pack, noted_NM.abs().amax(1).expm1().tolist()):
                self._signals[run.id].check_sampler(run, off)
        loss_NM = surrogate(
            gap_NM, advantage_NM, completion_NM, weight_NM, first.ratio_level, first.clip_ratio
        )
        if first.kl_weight:
            with torch.no_grad():
                reference_NM = token_log_p(self._reference, batch, self._precision)
            away_NM = reference_NM - log_p_NM
            loss_NM = loss_NM + first.kl_weight * (away_NM.exp() - away_NM - 1) * weight_NM
        return loss_NM.sum(1)

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return the record of this update for each run: the keys of reward_groups, and more.

        `surrogate`: the mean loss. `sampler_kl`: mean of log p_sampler - log p_learner over loss
        tokens. `sampled_tokens_per_s`: of the whole pack. DataError: see Signal.check.
        """
        kl_N, count_N = (sum(x.double() for x in xs) for xs in zip(*self._gap_NK))
        self._mesh.sum_(kl_N, count_N)
        kls = (kl_N / count_N.clamp(min=1)).tolist()
        speed = {"sampled_tokens_per_s": self._sampled_per_s}
        records = []
        for run, loss, kl in zip(self._pack, losses, kls):
            signal = self._signals[run.id]
            signal.beyond_fp32 = self._mesh.any(signal.beyond_fp32)
            signal.check(run)
            records.append({"surrogate": loss, **signal.last, **speed, "sampler_kl": kl})
        return records

    def diverged(self, run_id: str, loss: float) -> bool:
        """Return whether the run has broken down. The loss is no sign: it is always near 0."""
        return self._signals[run_id].collapsed or self._signals[run_id].beyond_fp32

    def evaluate(
        self, model: nn.Module, runs: Sequence[RunSpec], final: bool
    ) -> list[tuple[Record, int]]:
        """Return each run's held-out reward with the standard error: see held_out_rewards.

        Sampled rewards come with the share of unreadable completions, which count as wrong. If the
        number of choices is known, the bits learned are added, in all and per completion. The final
        evaluation adds the reward on the rows of earlier evaluations.
        """
        tests = [self._data[run.id].test for run in runs]
        firsts = [self.curve_rows(run) for run in runs]
        rows = tests if final else firsts
        found = at_first = self._measure(model, runs, rows)
        if final and any(len(f) < len(t) for f, t in zip(firsts, tests)):
            at_first = self._measure(model, runs, firsts)
        name = self.metric.name
        for run, measures, first in zip(runs, found, at_first):
            if final:
                measures[self.metric.on_part] = first[name]
            signal, data = self._signals[run.id], self._data[run.id]
            signal.best = max(signal.best, measures[name])
            if data.rewards.choices and data.n_train:
                bits = data.n_train * rollouts.bits_learned(measures[name], data.rewards.choices)
                measures |= {"bits": bits, "bits_per_answer": bits / signal.completions}
        return [(measures, len(items)) for measures, items in zip(found, rows)]

    def _measure(
        self, model: nn.Module, runs: Sequence[RunSpec], rows: Sequence[Sequence[Example]]
    ) -> list[Record]:
        rewards_N, most = [self._rewards_of(run) for run in runs], runs[0].max_new_tokens
        how = (self._precision, self._join_rows, self._mesh, self._forward_parts)
        records, name = [], self.metric.name
        found = rollouts.held_out_rewards(model, rows, rewards_N, most, *how)
        for rewards, (mean, se, unread) in zip(rewards_N, found):
            sampled = {} if rewards.exact else {f"{name}_unread": unread}
            records.append({name: mean, f"{name}_se": se, **sampled})
        return records

    def facts(self, run: RunSpec) -> Record:
        """Return the reward before training, the best reward, and facts about the data set."""
        signal = self._signals[run.id]
        return {
            "reward_start": signal.reward_start,
            "best_reward": signal.state()["best_reward"],
            "collapsed": signal.collapsed,
            "answers": signal.completions,
            **super().facts(run),
        }

    def state(self, run_id: str) -> dict[str, Any]:
        return {**self._signals[run_id].state(), **super().state(run_id)}

    def load_state(self, run_id: str, state: dict[str, Any]) -> None:
        super().load_state(run_id, state)
        self._signals[run_id].load(state)


@dataclass
class Signal:
    """The rewards of one run so far. They show whether the run can learn, or has collapsed."""

    reward_start: float = math.nan
    """The base's held-out reward."""
    first_reward: float = -math.inf
    """The highest mean reward of the first 1, 2, ..., FIRST_UPDATES updates."""
    below: int = 0
    """Number of updates in a row with a reward below COLLAPSED_SHARE times `base_reward`."""
    completions: int = 0
    rewarded: float = 0.0
    """Sum of the rewards of all `completions`."""
    best: float = -math.inf
    """Highest held-out reward so far."""
    last: Record = field(default_factory=dict)
    """The record of the present update."""
    beyond_fp32: bool = False
    """Whether the weights are so large that fp32 rounding errors dominate: see check_sampler."""

    @property
    def base_reward(self) -> float:
        """The base's reward, by which a collapse is judged: the smaller of two estimates.

        One is the held-out reward. The other is `first_reward`, because training prompts may be
        harder. It is the highest of the means over the first 1, 2, ... updates. After an early
        collapse, only the means over few updates are still high.
        """
        return min(self.reward_start, self.first_reward)

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
        is_below = record["reward"] < COLLAPSED_SHARE * self.base_reward
        self.below = self.below + 1 if is_below else 0

    def check(self, run: RunSpec) -> None:
        """Raise DataError if no completion of the first updates was rewarded, or every one."""
        judged = self.completions == FIRST_UPDATES * run.batch_size
        if not judged or 0 < self.rewarded < self.completions:
            return
        which, remedy = "no", "easier data, or a base that is right at times"
        if self.rewarded:
            which, remedy = "every", "harder data"
        raise DataError(
            f"run {run.id}: {which} completion of the first {self.completions} was rewarded on "
            f"dataset {run.dataset.name!r}, so there is nothing to learn from. The base's held-out "
            f"reward is {self.reward_start:.3g}. Choose {remedy}."
        )

    def check_sampler(self, run: RunSpec, off: float) -> None:
        """Check that learner and sampler are the same policy; ModelError in the first update.

        In a later update, a difference means that the run has broken down: its weights are so large
        that rounding errors dominate. `off`: largest distance of p_learner / p_sampler from 1; the
        loop checks for NaN.
        """
        bound = max(RATIO_BOUND, ROUNDING * self.last["largest_logit"])
        if not off > bound:
            return
        self.beyond_fp32 = True
        if self.completions > run.batch_size:
            return
        raise ModelError(
            f"run {run.id}: for a sampled token, p_learner / p_sampler differs from 1 by "
            f"{off:.2g} (bound {bound:.2g}), so learner and sampler are not the same policy. "
            f"{run.model.name!r} computes something else with a cache than without: set "
            "objective=sft for it, or choose another model."
        )

    def state(self) -> dict[str, Any]:
        """Return counts and rewards as JSON values. A reward is None before its first value."""
        rewards = {"first_reward": self.first_reward, "best_reward": self.best}
        return {
            "below": self.below,
            "answers": self.completions,
            "rewarded": self.rewarded,
            **{name: x if math.isfinite(x) else None for name, x in rewards.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`."""
        self.completions, self.rewarded = state["answers"], state["rewarded"]
        rewards = (state["best_reward"], state["first_reward"])
        self.below = state["below"]
        self.best, self.first_reward = (-math.inf if x is None else x for x in rewards)


def surrogate(
    gap_NM: torch.Tensor,
    advantage_NM: torch.Tensor,
    completion_NM: torch.Tensor,
    weight_NM: torch.Tensor,
    level: str,
    clip: float | None,
) -> torch.Tensor:
    """Return the loss of each token, [N, M], whose gradient is the policy gradient.

    Args:
        gap_NM: log p_learner - log p_sampler of each token.
        completion_NM: number of the completion that a token belongs to.
        weight_NM: 1 for a token, 0 for filler.
        level: 'token', or 'sequence': the tokens of a completion share one ratio, the geometric
            mean, and their mean loss counts, not the sum (arXiv 2507.18071, eq. 5 and 7).
    """
    share_NM = weight_NM
    if level == "sequence":
        size = int(completion_NM.max()) + 1
        empty = gap_NM.new_zeros(len(gap_NM), size)
        lengths = empty.scatter_add(1, completion_NM, weight_NM).clamp(min=1)
        means = empty.scatter_add(1, completion_NM, gap_NM * weight_NM) / lengths
        gap_NM = means.gather(1, completion_NM)
        share_NM = weight_NM / lengths.gather(1, completion_NM)
    ratio = gap_NM.exp()
    gain = ratio * advantage_NM
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage_NM)
    return -gain * share_NM
