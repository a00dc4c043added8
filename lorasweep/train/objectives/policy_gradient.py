"""Policy gradient: sample completions, reward them, and raise the probability of the better ones.

The loss of a completion is -ratio * advantage, summed over its tokens (including the end). The
ratio is p_learner / p_sampler, the advantage is the reward minus the mean reward of the group. The
study has the same loss: `importance_sampling` of github.com/thinking-machines-lab/tinker-cookbook.
Except for the sign, its gradient is the gradient of the expected reward (Williams 1992) times
(G - 1) / G, because the mean contains the completion itself. Groups with equal rewards have no
gradient, so the learner skips them, but they count in the number that the loss is divided by.

Shapes: N runs of the pack, P prompts, G completions of each, M positions per run at which a token
of a completion is predicted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lorasweep.data.examples import (
    Batch,
    Data,
    Example,
    Rewards,
    eval_batches,
    filled,
    merge,
    prompt_of,
)
from lorasweep.data.rewards import check_available, check_rows
from lorasweep.models.load import Base
from lorasweep.models.sharding import ALONE, Mesh
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.train.divergence import Signal
from lorasweep.train.events import Record
from lorasweep.train.loop import Objective
from lorasweep.train.objectives.nll import in_evaluation, row_nlls, token_log_p
from lorasweep.train.sampling import Completions, sample

EVAL_TOKENS = 4096
"""Padded tokens per run and forward pass in evaluation, in packs of any size."""
DEVIATION_EPS = 1e-4
"""Added to a group's standard deviation: TRL's value (trl.GRPOTrainer)."""


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: np.ndarray
    log_p: np.ndarray
    """log p of each token under the sampler, in nats."""
    advantage: float


class Group(NamedTuple):
    """The completions of one prompt."""

    prompt: np.ndarray
    completions: list[Completion]


@dataclass(frozen=True, kw_only=True)
class Rollouts(Batch):
    """A part of an update's completions, for all runs: the learner's micro-batch."""

    sampler_NM: np.ndarray
    """log p of each token under the sampler; float64, 0 at filler."""
    advantage_NM: np.ndarray
    episodes: int = 0
    """Divisor of each run's loss: in the first micro-batch the completions that the run sampled for
    the update, in the others 0."""


class PolicyGradient(Objective):
    """Policy gradient on sampled completions, which the data set of the run rewards."""

    metric = METRICS["policy_gradient"]

    def __init__(self, data: Mapping[str, Data], *settings: Any, **more: Any) -> None:
        super().__init__(data, *settings, **more)
        self._signals = {run_id: Signal() for run_id in data}
        self._pack: Sequence[RunSpec] = ()
        """The runs of the present update."""
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
                (at_start,) = at_first = self._measure(base.model, [run], [data.test])
                first = self.curve_rows(run)
                if len(first) < len(data.test):
                    at_first = self._measure(base.model, [run], [first])
                base.at_start[key] = {on_part: at_first[0][name], **at_start}
            found.append(dict(base.at_start[key]))
            self._signals[run.id].reward_start = found[-1][name]
        return found

    def batches(self, model: nn.Module, step: int, runs: Sequence[RunSpec]) -> list[Rollouts]:
        self._pack, self._gap_NK = runs, []
        first = runs[0]  # the shape of an update is the same for all runs of a pack
        n_prompts = first.batch_size // first.group_size
        rows_N = [self._data[r.id].train(r.seed, step * n_prompts, n_prompts) for r in runs]
        started, shape = time.perf_counter(), (first.batch_size, first.max_new_tokens)
        prompts = [[prompt_of(row) for row in rows] for rows in rows_N]
        uniforms = np.stack([stream("sample", r.seed, step).random(shape) for r in runs])
        how = (self._data[first.id].rewards.ends, self._precision, self._mesh, self._forward_parts)
        completions_N = self._mesh.run(sample, model, prompts, uniforms, *how)
        n_sampled = sum(len(t) for own in completions_N for t in own.tokens)
        speed = {"sampled_tokens_per_s": n_sampled / (time.perf_counter() - started)}
        some, kept_N = list[Group](), []
        for run, rows, completions in zip(runs, rows_N, completions_N):
            rewards = self._rewards_of(run)
            groups, record = reward_groups(rows, completions, rewards, run.reward_scale)
            self._signals[run.id].note({**record, **speed}, run.batch_size)
            some = some or groups[:1]
            kept_N.append([g for g in groups if any(c.advantage for c in g.completions)])
        if not any(kept_N):
            kept_N[0] = some  # an update needs a micro-batch, even without a gradient
        share = -(-first.batch_size // self._mesh.size)
        most = min(self._micro_batch_size or share, share)
        return collate_rollouts(kept_N, most, first.batch_size, self._mesh.size)

    def _rewards_of(self, run: RunSpec) -> Rewards:
        """Return Rewards that process 0 computes and broadcasts.

        A program that checks completions may have a time limit, so two processes could disagree.
        """
        rewards, mesh = self._data[run.id].rewards, self._mesh

        def of(pairs: Sequence[tuple[Example, np.ndarray]]) -> list[float | None]:
            return mesh.broadcast(None if mesh.rank else rewards.of(pairs))

        return replace(rewards, of=of)

    def weights(self, batch: Rollouts) -> torch.Tensor:
        return torch.full((len(batch.tokens_N),), float(batch.episodes), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Rollouts) -> torch.Tensor:
        """Return the summed loss of each run, [N]; see Signal.check_sampler (not in bf16)."""
        log_p_NM = token_log_p(model, batch, self._precision)
        arrays = (batch.sampler_NM, batch.advantage_NM, batch.weight_NM)
        sampler_NM, advantage_NM, weight_NM = (torch.from_numpy(a).to(log_p_NM) for a in arrays)
        gap_NM = log_p_NM - sampler_NM
        noted_NM = gap_NM.detach() * weight_NM
        self._gap_NK.append((-noted_NM.sum(1), weight_NM.sum(1)))
        if self._precision != "bf16":
            for run, off in zip(self._pack, noted_NM.abs().amax(1).expm1().tolist()):
                self._signals[run.id].check_sampler(run, off)
        return surrogate(gap_NM, advantage_NM, weight_NM).sum(1)

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return the record of this update for each run: the keys of reward_groups, and more.

        `surrogate`: the mean loss. `sampler_kl`: mean of log p_sampler - log p_learner over loss
        tokens. DataError: see Signal.check.
        """
        kl_N, count_N = (sum(x.double() for x in xs) for xs in zip(*self._gap_NK))
        self._mesh.sum_(kl_N, count_N)
        records = []
        for run, loss, kl in zip(self._pack, losses, (kl_N / count_N.clamp(min=1)).tolist()):
            signal = self._signals[run.id]
            signal.beyond_fp32 = self._mesh.any(signal.beyond_fp32)
            signal.check(run)
            records.append({"surrogate": loss, **signal.last, "sampler_kl": kl})
        return records

    def diverged(self, run_id: str, loss: float) -> bool:
        # the loss is no sign: it is always near 0
        return self._signals[run_id].collapsed or self._signals[run_id].beyond_fp32

    def evaluate(self, model: nn.Module, runs: Sequence[RunSpec], final: bool) -> list[Record]:
        """Return each run's held-out reward with the standard error: see held_out_rewards.

        Sampled rewards come with the share of unreadable completions, which count as wrong. If the
        number of choices is known, the bits learned are added, in all and per completion. The final
        evaluation adds the reward on the rows of earlier evaluations.
        """
        name, firsts = self.metric.name, [self.curve_rows(run) for run in runs]
        rows = [self._data[run.id].test for run in runs] if final else firsts
        found = at_first = self._measure(model, runs, rows)
        if any(len(f) < len(r) for f, r in zip(firsts, rows)):
            at_first = self._measure(model, runs, firsts)
        for run, measures, first in zip(runs, found, at_first):
            if final:
                measures[self.metric.on_part] = first[name]
            signal, data = self._signals[run.id], self._data[run.id]
            if data.rewards.choices and data.n_train:
                bits = data.n_train * bits_learned(measures[name], data.rewards.choices)
                measures |= {"bits": bits, "bits_per_answer": bits / signal.completions}
        return found

    def _measure(
        self, model: nn.Module, runs: Sequence[RunSpec], rows: Sequence[Sequence[Example]]
    ) -> list[Record]:
        rewards_N, most = [self._rewards_of(run) for run in runs], runs[0].max_new_tokens
        how = (self._precision, self._mesh, self._forward_parts)
        return held_out_rewards(model, rows, rewards_N, most, *how)

    def facts(self, run: RunSpec) -> Record:
        signal = self._signals[run.id]
        found = {"reward_start": signal.reward_start, "collapsed": signal.collapsed}
        return {**found, "answers": signal.completions, **super().facts(run)}

    def state(self, run_id: str) -> dict[str, Any]:
        return {**self._signals[run_id].state(), **super().state(run_id)}

    def load_state(self, run_id: str, state: dict[str, Any]) -> None:
        super().load_state(run_id, state)
        self._signals[run_id].load(state)


def surrogate(
    gap_NM: torch.Tensor, advantage_NM: torch.Tensor, weight_NM: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each token, [N, M], whose gradient is the policy gradient.

    `gap_NM`: log p_learner - log p_sampler of each token. `weight_NM`: 1; 0 for filler.
    """
    return -(gap_NM.exp() * advantage_NM) * weight_NM


# ---------------------------------------------------------------- completions and rewards


def reward_groups(
    rows: Sequence[Example], completions: Completions, rewards: Rewards, scale: str
) -> tuple[list[Group], Record]:
    """Return a run's groups, one per row, and the record of its completions.

    `reward_se`: standard error over prompts, because completions of one prompt are similar.
    `flat_groups`: share of groups with equal rewards. `entropy`: in nats per token. `cut_off`,
    `unread`: shares of completions that were cut off, and that the verifier could not read.
    """
    size = len(completions.tokens) // len(rows)
    found = rewards.of([(rows[k // size], t) for k, t in enumerate(completions.tokens)])
    reward_PG = np.array([r or 0.0 for r in found]).reshape(-1, size)
    advantage = advantages(reward_PG, scale).ravel().tolist()
    drawn = list(map(Completion, completions.tokens, completions.log_p, advantage))
    groups = [Group(prompt_of(row), drawn[k * size : (k + 1) * size]) for k, row in enumerate(rows)]
    return groups, {
        "reward": float(reward_PG.mean(1).mean()),
        "reward_se": standard_error(reward_PG.mean(1)),
        "flat_groups": float((reward_PG == reward_PG[:, :1]).all(1).mean()),
        "entropy": completions.entropy,
        "answer_tokens": float(np.mean([len(t) for t in completions.tokens])),
        "cut_off": float(np.mean(~completions.ended)) if rewards.ends else 0.0,
        "unread": found.count(None) / len(found),
        "largest_logit": completions.largest_logit,
    }


def advantages(reward_PG: np.ndarray, scale: str) -> np.ndarray:
    """Return each reward minus the group's mean; with scale 'group' divided by the group's spread.

    The spread is the standard deviation plus DEVIATION_EPS. The variance has the divisor G - 1, as
    in TRL and in the code of GRPO (arXiv 2402.03300).
    """
    centred = reward_PG - reward_PG.mean(1, keepdims=True)
    centred[(reward_PG == reward_PG[:, :1]).all(1)] = 0.0  # exactly, also where a mean is rounded
    spread = reward_PG.std(1, ddof=1, keepdims=True) + DEVIATION_EPS if scale != "none" else 1.0
    return centred / spread


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
    mesh: Mesh = ALONE,
    forward_parts: int = 1,
) -> list[Record]:
    """Return each run's mean reward on its rows, standard error, and share of unread completions.

    If only the gold answer is rewarded, the reward of a row is the probability of that answer,
    which is the expected reward. Otherwise it is the reward of one sampled completion; every run
    and every step use the same random numbers. `forward_parts`: see Exec.
    """
    name = METRICS["policy_gradient"].name
    if all(r.exact for r in rewards_N):
        most = max(1, EVAL_TOKENS // forward_parts)
        batches_N = [eval_batches(rows, most) for rows in rows_N]
        with in_evaluation(batches_N):
            values_N = [np.exp(-nll) for nll in row_nlls(model, rows_N, batches_N, precision)]
        return [{name: float(v.mean()), f"{name}_se": standard_error(v)} for v in values_N]
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
        found.append({name: float(values.mean()), f"{name}_se": standard_error(values)})
        if not rewards.exact:
            found[-1][f"{name}_unread"] = own.count(None) / len(own)
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
    groups_N: Sequence[Sequence[Group]], rows: int, episodes: int, processes: int = 1
) -> list[Rollouts]:
    """Return micro-batches of at most `rows` completions (or one group) per run.

    Every process gets equally many. `groups_N`: each run's groups with a gradient, of equal size; a
    run that has no more of them takes part with weight 0. `episodes`: completions of a run.
    """

    def longest(group: Group) -> int:
        return len(group.prompt) + max(len(c.tokens) for c in group.completions)

    def silent(weight: int) -> Rollouts:
        """Return a micro-batch of one run with advantages 0; with weight 0 it has no rows."""
        found = _collate(some[:1])
        none, weight_NM = np.zeros_like(found.advantage_NM), weight * found.weight_NM
        tokens = found.tokens_NRT if weight else found.tokens_NRT[:, :0, :0]
        found = replace(found, tokens_NRT=tokens, tokens_N=(0,))
        return replace(found, advantage_NM=none, weight_NM=weight_NM)

    size = next(len(groups[0].completions) for groups in groups_N if groups)
    most, parts_N = max(1, rows // size), []
    for groups in groups_N:
        ordered = sorted(groups, key=longest)
        parts_N.append([ordered[k : k + most] for k in range(0, len(ordered), most)])
    some = next(parts[0] for parts in parts_N if parts)
    micro_batches = []
    for k in range(max(map(len, parts_N))):
        own = [_collate(parts[k]) if k < len(parts) else silent(0) for parts in parts_N]
        micro_batches.append(replace(merge(own), episodes=0 if k else episodes))
    return micro_batches + [silent(1)] * (-len(micro_batches) % processes)  # equally many each


def _collate(groups: Sequence[Group]) -> Rollouts:
    """Collate one run's completions; in a group, those equal up to the last token share a row."""
    rows, completions = list[np.ndarray](), list[Completion]()
    numbers, firsts = list[int](), list[int]()
    for group in groups:
        # nothing is predicted from the last token
        sharing: dict[bytes, list[Completion]] = {}
        for completion in group.completions:
            sharing.setdefault(completion.tokens[:-1].tobytes(), []).append(completion)
        for own in sharing.values():
            completions += own
            numbers += [len(rows)] * len(own)
            firsts += [len(group.prompt) - 1] * len(own)
            rows.append(np.concatenate([group.prompt, own[0].tokens[:-1]]))
    sizes = np.array([len(c.tokens) for c in completions])
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def wide(values: np.ndarray) -> np.ndarray:
        return filled([values[None]])

    return Rollouts(
        tokens_NRT=filled([row[None] for row in rows]).astype(np.int64)[None],
        rows_NM=wide(np.repeat(numbers, sizes)),
        positions_NM=wide(np.repeat(firsts, sizes) + within),
        targets_NM=wide(np.concatenate([c.tokens for c in completions]).astype(np.int64)),
        weight_NM=wide(np.ones(len(within), dtype=np.float32)),
        tokens_N=(sum(map(len, rows)),),
        sampler_NM=wide(np.concatenate([c.log_p for c in completions])),
        advantage_NM=wide(np.repeat([c.advantage for c in completions], sizes)),
    )
