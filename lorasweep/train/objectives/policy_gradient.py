"""Policy gradient: sample answers, reward them, and raise the probability of the better ones.

The loss of an answer is the sum over its tokens of -ratio * advantage. The advantage is its reward
minus the mean of its group, the ratio p_learner / p_sampler: the `importance_sampling` loss of
github.com/thinking-machines-lab/tinker-cookbook, which the study trained with. Its gradient is that
of the expected reward (Williams 1992), times (G - 1) / G because the mean over G answers contains
the answer itself. It is divided by the number of answers, so its scale does not depend on how many
groups have equal rewards; those have no gradient and are not computed. Only tokens that the policy
drew bear loss, the end token included.

Shapes: N members, M positions per member, G answers to a prompt.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasweep.data.examples import Data, Example, Rewards
from lorasweep.data.rewards import check_available, check_rows, prompt_of
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.head import check_rows_stay_apart
from lorasweep.models.sharding import Mesh
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.train.events import Record
from lorasweep.train.objectives.base import DATA_SHA256, Evaluation, refuse_other_data
from lorasweep.train.objectives.expected import bits_learned, measure
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.objectives.rewarding import rewarded
from lorasweep.train.objectives.rollouts import Rollouts, lay_out
from lorasweep.train.objectives.signal import Signal
from lorasweep.train.objectives.surrogate import surrogate
from lorasweep.train.sampling import Answers, sample

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.models.load import Base


class PolicyGradient:
    """Reinforcement of sampled answers; each run has a data set that rewards them."""

    metric = METRICS["policy_gradient"]

    def __init__(
        self,
        data: Mapping[str, Data],
        precision: str,
        micro_batch_size: int | None = None,
        join_rows: bool = False,
        forward_parts: int = 1,
    ) -> None:
        """Set up the objective.

        `data`: run id -> the run's data set; runs may share one. `micro_batch_size`: answers per
        member and forward pass of the learner; None: all of an update. `join_rows`,
        `forward_parts`: see Exec.
        """
        self._data, self._precision, self._micro_batch_size = data, precision, micro_batch_size
        self._join_rows, self._forward_parts = join_rows, forward_parts
        self._runs = {run: Signal() for run in data}
        self._reference: nn.Module | None = None
        self._members: Sequence[RunSpec] = ()
        self._sampled_per_s = math.nan
        self._gap_NK: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._mesh = Mesh()

    def start(self, base: "Base", members: Sequence[RunSpec]) -> list[Record]:
        """Check the data, and measure the base's reward on each data set, once.

        Raises:
            DataError: an answer cannot be rewarded, or a prompt leaves no room for one.
        """
        self._mesh = mesh = base.mesh
        if self._join_rows and cpu_llama_for(base.model) is None:
            check_rows_stay_apart(base.model)
        found = []
        for member in members:
            data = self._data[member.id]
            key = f"{member.dataset.canonical}/{self._precision}/{member.max_new_tokens}/reward"
            if key not in base.at_start:
                if mesh.rank == 0:  # the others wait for it, and end with it
                    check_available(member.dataset)
                    check_rows(member.dataset, data, member.max_new_tokens)
                base.at_start[key] = self._measure(base.model, [member], [data.test])[0]
            found.append(dict(base.at_start[key]))
            self._runs[member.id].reward_start = found[-1][self.metric.name]
        if any(m.kl_weight for m in members):
            self._reference = copy.deepcopy(base.model).requires_grad_(False)
        return found

    # ---------------------------------------------------------------- an update

    def batches(self, model: "nn.Module", step: int, members: Sequence[RunSpec]) -> list[Rollouts]:
        """Sample the answers of update `step` and return the learner's micro-batches."""
        self._members, self._gap_NK = members, []
        rows_N = [
            self._data[m.id].train(m.seed, step * (n := m.batch_size // m.group_size), n)
            for m in members
        ]
        groups_N = []
        for member, rows, answers in zip(
            members, rows_N, self._sampled(model, step, members, rows_N)
        ):
            run, rewards = self._runs[member.id], self._rewards_of(member)
            groups, record = rewarded(rows, answers, rewards, member.reward_scale)
            run.note({**record, "largest_logit": answers.largest_logit}, member.batch_size)
            groups_N.append(groups)
        kept_N = [
            [g for g in groups if m.kl_weight or any(a.advantage for a in g.answers)]
            for m, groups in zip(members, groups_N)
        ]
        if not any(kept_N):
            kept_N[0] = groups_N[0][:1]  # an update without any gradient is an update all the same
        first = members[0]  # what follows is the same for all members of a pack
        share = -(-first.batch_size // self._mesh.size)
        most = min(self._micro_batch_size or share, share)
        return lay_out(kept_N, most, first.batch_size, self._join_rows, self._mesh.size)

    def _sampled(
        self,
        model: "nn.Module",
        step: int,
        members: Sequence[RunSpec],
        rows_N: Sequence[Sequence[Example]],
    ) -> list[Answers]:
        """Sample the answers of all members, and time it."""
        started, first = time.perf_counter(), members[0]
        shape = (first.batch_size, first.max_new_tokens)
        uniforms_NAL = np.stack([stream("sample", m.seed, step).random(shape) for m in members])
        prompts_N = [[prompt_of(row) for row in rows] for rows in rows_N]
        ends = self._data[first.id].rewards.ends
        found = self._mesh.run(
            sample,
            *(model, prompts_N, uniforms_NAL, ends),
            *(self._precision, self._mesh, self._forward_parts),
        )
        seconds = time.perf_counter() - started
        self._sampled_per_s = sum(len(t) for own in found for t in own.tokens) / seconds
        return found

    def _rewards_of(self, member: RunSpec) -> Rewards:
        """Return how a member's answers are rewarded, by one process for all.

        A verifier with a time limit need not decide alike in each of them.
        """
        rewards, mesh = self._data[member.id].rewards, self._mesh
        if mesh.size == 1:
            return rewards
        first = mesh.rank == 0
        return dataclasses.replace(
            rewards, of=lambda pairs: mesh.broadcast(rewards.of(pairs) if first else None)
        )

    def weights(self, batch: Rollouts) -> torch.Tensor:
        """Return the number of answers that each member's loss is divided by, [N]."""
        return torch.full((len(batch.tokens_N),), float(batch.episodes), dtype=torch.float64)

    def loss(self, model: "nn.Module", batch: Rollouts) -> torch.Tensor:
        """Return the summed loss of each member, [N].

        Raises:
            ModelError: in fp32 the learner is not the policy that sampled the first answers.
        """
        first = self._members[0]
        log_p_NM = token_log_p(model, batch.batch, self._precision)
        of_batch = (batch.sampler_NM, batch.advantage_NM, batch.batch.weight_NM)
        sampler, advantage, weight = (torch.from_numpy(a).to(log_p_NM) for a in of_batch)
        answer = torch.from_numpy(batch.answer_NM).to(log_p_NM.device)
        gap_NM = log_p_NM - sampler
        self._check_ratios(gap_NM.detach() * weight, weight)
        loss_NM = surrogate(gap_NM, advantage, answer, weight, first.ratio_level, first.clip_ratio)
        if first.kl_weight:
            with torch.no_grad():
                reference = token_log_p(self._reference, batch.batch, self._precision)
            away = reference - log_p_NM
            loss_NM = loss_NM + first.kl_weight * (away.exp() - away - 1) * weight
        return loss_NM.sum(1)

    def _check_ratios(self, gap_NM: torch.Tensor, weight_NM: torch.Tensor) -> None:
        """Note the KL from sampler to learner, and check that both are one policy."""
        self._gap_NK.append((-gap_NM.sum(1), weight_NM.sum(1)))
        if self._precision != "bf16":
            for member, off in zip(self._members, gap_NM.abs().amax(1).expm1().tolist()):
                self._runs[member.id].check_sampler(member, off)

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return what is recorded of this update.

        `surrogate`: the mean loss. `sampler_kl`: mean of log p_sampler - log p_learner, over the
        tokens that bear loss. `sampled_tokens_per_s`: of the whole pack. The rest: `rewarded`.

        Raises:
            DataError: no answer of the first updates was rewarded, or every one.
        """
        kl_N, count_N = (sum(x.double() for x in xs) for xs in zip(*self._gap_NK))
        self._mesh.sum_(kl_N, count_N)
        kls = (kl_N / count_N.clamp(min=1)).tolist()
        for run in (self._runs[member.id] for member in self._members):
            run.beyond_fp32 = self._mesh.any(run.beyond_fp32)
        for member in self._members:
            self._runs[member.id].check(member)
        return [
            {
                "surrogate": loss,
                **self._runs[member.id].last,
                "sampled_tokens_per_s": self._sampled_per_s,
                "sampler_kl": kl,
            }
            for member, loss, kl in zip(self._members, losses, kls)
        ]

    def diverged(self, run: str, loss: float) -> bool:
        """Return whether the run has broken down. Its loss is near 0 at any reward."""
        return self._runs[run].broken

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, model: "nn.Module", members: Sequence[RunSpec], final: bool
    ) -> list[Evaluation]:
        """Return each member's held-out reward with its standard error.

        Where only the row's own answer is right, the reward is the expected one, exactly: the
        probability of that answer. Elsewhere that of one sampled answer a prompt, with the share of
        those that could not be read, which count as wrong. With a known
        number of choices also what was learned, in bits, and bits an answer. At the end of training
        also the reward on the rows of the earlier evaluations.
        """
        tests = [self._data[m.id].test for m in members]
        firsts = [t[: m.dataset.n_test_curve or None] for m, t in zip(members, tests)]
        rows = tests if final else firsts
        found = self._measure(model, members, rows)
        name = self.metric.name
        if final:
            again = found
            if any(len(f) < len(t) for f, t in zip(firsts, tests)):
                again = self._measure(model, members, firsts)
            for measures, first in zip(found, again):
                measures[f"{name}_curve"] = first[name]
        for m, measures in zip(members, found):
            run, data = self._runs[m.id], self._data[m.id]
            run.best = max(run.best, measures[name])
            if data.rewards.choices and data.n_train:
                bits = data.n_train * bits_learned(measures[name], data.rewards.choices)
                measures |= {"bits": bits, "bits_per_answer": bits / run.answers}
        return [Evaluation(m, len(r)) for m, r in zip(found, rows)]

    def _measure(
        self, model: "nn.Module", members: Sequence[RunSpec], rows: Sequence[Sequence[Example]]
    ) -> list[Record]:
        rewards = [self._rewards_of(m) for m in members]
        most = members[0].max_new_tokens
        how = (self._precision, self._join_rows, self._mesh, self._forward_parts)
        means = measure(model, rows, rewards, most, *how)
        name = self.metric.name
        return [
            {
                **{name: mean, f"{name}_se": se},
                **({} if own.exact else {f"{name}_unread": unread}),
            }
            for own, (mean, se, unread) in zip(rewards, means)
        ]

    def at_end(self, model: "nn.Module", members: Sequence[RunSpec]) -> list[Record]:
        """Return nothing more."""
        return [{} for _ in members]

    def facts(self, member: RunSpec) -> Record:
        """Return the reward before training, the best one, and what was trained on."""
        run, data = self._runs[member.id], self._data[member.id]
        return {
            "reward_start": run.reward_start,
            "best_reward": run.best_known,
            "collapsed": run.collapsed,
            "answers": run.answers,
            "n_test": len(data.test),
            "n_train": data.n_train,
            DATA_SHA256: data.sha256,
            **({"data_commit": data.commit} if data.commit else {}),
        }

    def state(self, run: str) -> dict[str, Any]:
        """Return the counts of a run, its best reward, and the fingerprint of its data."""
        return {**self._runs[run].state(), DATA_SHA256: self._data[run].sha256}

    def load_state(self, run: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`, and check the data.

        Raises:
            DataError: the run was started on other data.
        """
        refuse_other_data(run, state[DATA_SHA256], self._data[run].sha256)
        self._runs[run].load(state)
